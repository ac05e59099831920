"""Draw ``docs/decoding.svg`` from a table of ``docs/benchmarks.md``: decoding speed by precision and program.

    python benchmarks/plot.py

The table is the first one under SECTION with the columns of PANELS. A cell has one number, or one for each run. The strong part
of a bar ends at the slowest run, the pale part at the fastest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import click

DOCS = Path(__file__).parents[1] / "docs"
PAGE, PICTURE = DOCS / "benchmarks.md", DOCS / "decoding.svg"
SECTION = "### Decoding next to other programs"
PANELS = {"decode after 128, tokens/s": "after 128 tokens", "decode after 900, tokens/s": "after 900 tokens"}
GROUPS = {
    "float32": ("fp32", "F32", "transformers", "optimum"),
    "8 bits": ("int8", "w8a8", "Q8"),
    "4 bits": ("int4", "Q4"),
}

WIDTH, MARGIN, NAMES, GAP = 900, 24, 242, 96  # GAP: right of a panel, for the numbers at its bars
TOP, GROUP, ROW, BAR = 118, 28, 21, 13  # GROUP: what a heading of a group adds
STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; fill: #1f2328 }
  .title { font-size: 17px; font-weight: 600 }
  .group, .panel { font-weight: 600 }
  .quiet { fill: #59636e }
  .paper { fill: #ffffff }
  .line { stroke: #d1d9e0 }
  .own { fill: #0969da }
  .other { fill: #7d8590 }
  .fastest { opacity: 0.35 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc }
    .quiet { fill: #9198a1 }
    .paper { fill: #0d1117 }
    .line { stroke: #3d444d }
    .own { fill: #4493f8 }
    .other { fill: #9198a1 }
  }
"""


@dataclass(frozen=True)
class Row:
    """A model and its speeds, one tuple for each panel."""

    name: str
    speeds: tuple[tuple[float, ...], ...]

    @property
    def group(self) -> str:
        model = self.name.partition(",")[0]
        for group, marks in GROUPS.items():
            if any(mark in model for mark in marks):
                return group
        raise ValueError(f"{PAGE.name}: {self.name!r} is of no precision in GROUPS")


@dataclass(frozen=True)
class Panel:
    """A place for bars: where it begins, and its pixels for a token per second."""

    left: float
    scale: float
    fastest: float


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows(page: str) -> list[Row]:
    """Read the table of SECTION. Raises ValueError if it is missing."""
    lines = iter(page.partition(SECTION)[2].splitlines())
    for line in lines:
        head = cells(line)
        if set(PANELS) <= set(head):
            break
    else:
        raise ValueError(f"{PAGE.name}: no table with {', '.join(PANELS)} under {SECTION!r}")
    next(lines)  # | --- |
    places = [head.index(column) for column in PANELS]
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        row = cells(line)
        speeds = tuple(tuple(float(speed) for speed in row[place].split(",")) for place in places)
        found.append(Row(row[0].replace("`", ""), speeds))
    return found


def machine(page: str) -> str:
    """Return the heading of the machine that SECTION belongs to."""
    return re.findall(r"^## (.+)$", page.partition(SECTION)[0], re.M)[-1]


def panels_of(table: Sequence[Row]) -> list[Panel]:
    """Place the panels side by side, all with the same scale."""
    fastest = [max(max(row.speeds[i]) for row in table) for i in range(len(PANELS))]
    scale = (WIDTH - 2 * MARGIN - NAMES - GAP * len(PANELS)) / sum(fastest)
    left, found = float(MARGIN + NAMES), []
    for speed in fastest:
        found.append(Panel(left, scale, speed))
        left += speed * scale + GAP
    return found


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def bar(panel: Panel, y: float, speeds: Sequence[float], kind: str) -> list[str]:
    """Draw the slowest and the fastest run, and write both."""
    slowest, fastest = min(speeds), max(speeds)
    said = f"{slowest:g}" if slowest == fastest else f"{slowest:g} to {fastest:g}"
    drawn = []
    for speed, of in ((fastest, f"{kind} fastest"), (slowest, kind)):
        box = f'x="{panel.left:.1f}" y="{y - BAR + 2:.1f}" width="{speed * panel.scale:.1f}" height="{BAR}"'
        drawn.append(f'<rect {box} class="{of}"/>')
    return [*drawn, text(panel.left + fastest * panel.scale + 5, y, said, "quiet")]


def header(page: str) -> list[str]:
    """The title, the machine and the key."""
    key = MARGIN + 1
    return [
        text(MARGIN, 34, "Decoding speed of GPT-2 small, tokens/s", "title"),
        text(MARGIN, 55, f"{machine(page)}; 2 threads; strong: the slowest run, pale: the fastest", "quiet"),
        f'<rect x="{key}" y="69" width="12" height="12" class="own"/>',
        text(key + 18, 80, "gpt2x"),
        f'<rect x="{key + 70}" y="69" width="12" height="12" class="other"/>',
        text(key + 88, 80, "other programs"),
    ]


def draw(page: str) -> str:
    """Return the picture of the page's table."""
    table = rows(page)
    panels = panels_of(table)
    parts, y = header(page), float(TOP - ROW // 2)
    for panel, title in zip(panels, PANELS.values(), strict=True):
        parts.append(text(panel.left, y - 12, title, "panel"))
    for group in GROUPS:
        y += GROUP
        parts.append(text(MARGIN, y, group, "group"))
        for row in table:
            if row.group != group:
                continue
            y += ROW
            parts.append(text(MARGIN + NAMES - 10, y, row.name, anchor="end"))
            kind = "own" if row.name.startswith("gpt2x") else "other"
            for panel, speeds in zip(panels, row.speeds, strict=True):
                parts += bar(panel, y, speeds, kind)
    for panel in panels:
        parts.append(f'<path d="M{panel.left:.1f} {TOP - 4}V{y + 8:.1f}" class="line"/>')
    height = y + MARGIN
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}">'
    paper = '<rect width="100%" height="100%" rx="6" class="paper"/>'
    return "\n".join([opening, f"<style>{STYLE}</style>", paper, *parts, "</svg>\n"])


@click.command()
def main() -> None:
    """Draw docs/decoding.svg from docs/benchmarks.md."""
    PICTURE.write_text(draw(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
