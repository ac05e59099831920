"""Generate the table of faults in ``docs/serving.md`` from the table in the code:

python docs/make_serving.py
"""

from __future__ import annotations

from pathlib import Path

from gpt2x.serving.faults import FAULTS

PAGE = Path(__file__).with_name("serving.md")
START = "<!-- faults: python docs/make_serving.py -->\n"
END = "<!-- end of faults -->\n"


def faults() -> str:
    """Return the table of faults."""
    lines = ["| status | `error.code` | `error.type` | when | what to do |", "| --- | --- | --- | --- | --- |"]
    for code, fault in sorted(FAULTS.items(), key=lambda item: item[1].status):
        lines.append(f"| {fault.status} | `{code}` | `{fault.type}` | {fault.when} | {fault.remedy} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """Return a page with its table replaced."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return before + START + "\n" + faults() + "\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
