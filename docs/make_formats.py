"""Write the tables of ``docs/formats.md`` from the tables in the code:

python docs/make_formats.py
"""

from __future__ import annotations

import re
from pathlib import Path

from converters import FORMATS
from converters.dialects import DIALECTS, Dialect, Lead1, Same, Transposed
from converters.spec import LM_HEAD, SPEC

PAGE = Path(__file__).with_name("formats.md")
MARKS: dict[type[Same], str] = {Same: "", Transposed: " **T**", Lead1: " **1**"}


def formats() -> str:
    """The table of formats."""
    head = ("name", "who writes it", "files", "read", "written", "ask for it", "configuration", "tokenizer", "checksums", "untied `lm_head`")  # fmt: skip
    rows = [
        (
            f"`{f.name}`", f.what, f.files, " ".join(f.reads), " ".join(f.writes) or "no", f.ask, f.configuration or "beside it",
            f.tokenizer, f.checksums or "none", "yes" if f.untied else "no",
        )
        for f in FORMATS
    ]  # fmt: skip
    return table(head, rows)


def names() -> str:
    """The table of names and layouts."""
    head = ("canonical", "shape", *(dialect.name for dialect in DIALECTS))
    rows = [
        (f"`{row}`", f"[{', '.join(shape)}]", *(cell(dialect.table[row]) for dialect in DIALECTS))
        for row, shape in SPEC.items()
    ]
    rows.append((f"`{LM_HEAD}`, untied", "[V, C]", *(output(dialect) for dialect in DIALECTS)))
    before = (", ".join(f"`{prefix}`" if prefix else "nothing" for prefix in dialect.prefixes) for dialect in DIALECTS)
    return table(head, [*rows, ("*before the names*", "", *before)])


def cell(layout: Same) -> str:
    """A name, and the mark of its layout."""
    return f"`{layout.name}`{MARKS[type(layout)]}"


def output(dialect: Dialect) -> str:
    """What an output of its own is called."""
    return ", ".join(map(cell, dialect.lm_head)) or "cannot be"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(text: str) -> str:
    """The page with its tables made anew."""
    for name, make in (("formats", formats), ("names", names)):
        text = re.sub(f"<!-- {name} -->\n.*?<!-- end -->", lambda _, n=name, m=make: f"<!-- {n} -->\n{m()}<!-- end -->", text, flags=re.S)  # fmt: skip
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
