"""Generate the tables of ``docs/formats.md`` from the tables in the code:

python docs/make_formats.py
"""

from __future__ import annotations

import re
from pathlib import Path

from converters import FORMATS
from converters.dialects import DIALECTS, Dialect, HeadsFirst, HeadsLast, Layout, Lead1, Same, Transposed, parts_of
from converters.opening.situations import SITUATIONS, Situation
from converters.spec import LM_HEAD, SPEC

PAGE = Path(__file__).with_name("formats.md")
MARKS: dict[type[Same], str] = {
    Same: "",
    Transposed: " **T**",
    Lead1: " **1**",
    HeadsLast: " **H**",
    HeadsFirst: " **H**",
}


def formats() -> str:
    """Return the table of formats."""
    head = ("name", "format", "files", "dtypes read", "dtypes written", "how to write it", "configuration", "tokenizer", "checksums", "untied `lm_head`")  # fmt: skip
    rows = [
        (
            f"`{f.name}`", f.what, f.files, " ".join(f.reads), " ".join(f.writes) or "no", f.ask, f.configuration or "beside it",
            f.tokenizer, f.checksums or "none", "yes" if f.untied else "no",
        )
        for f in FORMATS
    ]  # fmt: skip
    return table(head, rows)


def names() -> str:
    """Return the table of names and layouts."""
    head = ("canonical", "shape", *(dialect.name for dialect in DIALECTS))
    rows = [
        (f"`{row}`", f"[{', '.join(shape)}]", *(cell(dialect.table[row]) for dialect in DIALECTS))
        for row, shape in SPEC.items()
    ]
    rows.append((f"`{LM_HEAD}`, untied", "[V, C]", *(output(dialect) for dialect in DIALECTS)))
    prefixes = (", ".join(f"`{prefix}`" if prefix else "none" for prefix in dialect.prefixes) for dialect in DIALECTS)
    return table(head, [*rows, ("*prefix*", "", *prefixes)])


def cell(layout: Layout) -> str:
    """Return a tensor name and the mark of its layout; of a joined parameter, those of every part."""
    return " + ".join(f"`{part.name}`{MARKS[type(part)]}" for part in parts_of(layout))


def situations() -> str:
    """Return the table of what is not read, and what to do then."""
    return table(("what you have", "what gpt2x says"), [(row.what, said(row)) for row in SITUATIONS])


def said(row: Situation) -> str:
    """Return the sentence of a row, with names in place of paths."""
    sentence = in_capitals(row.sentence)
    if not row.command:
        return sentence
    return f"{sentence}. Run `{in_capitals(row.command)}` and pass `{in_capitals(row.result)}`"


def in_capitals(text: str) -> str:
    """Return a text with each field in capital letters."""
    fields = re.findall(r"(?<!{){(\w+)}", text)
    return text.format_map({name: name.upper() for name in fields})


def output(dialect: Dialect) -> str:
    """Return the names of an untied ``lm_head``."""
    return ", ".join(map(cell, dialect.lm_head)) or "not supported"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(text: str) -> str:
    """Return the page with its tables generated again."""
    for name, make in (("formats", formats), ("names", names), ("situations", situations)):
        text = re.sub(f"<!-- {name} -->\n.*?<!-- end -->", lambda _, n=name, m=make: f"<!-- {n} -->\n{m()}<!-- end -->", text, flags=re.S)  # fmt: skip
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
