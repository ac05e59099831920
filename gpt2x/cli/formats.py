"""``gpt2x formats``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from converters import Format

FIELDS = (
    "name", "what", "files", "dialects", "reads", "writes", "ask", "configuration", "checksums", "tokenizer", "untied",
)  # fmt: skip


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def formats(as_json: bool) -> None:
    """List the formats that are read and written, and what each can hold.

    \b
      gpt2x formats
      gpt2x formats --json

    Any of those that are read converts to any of those that are written.
    """
    from converters import FORMATS

    if as_json:
        click.echo(json.dumps([facts(entry) for entry in FORMATS], indent=2))
    else:
        click.echo("\n".join(map(block, FORMATS)))


def facts(entry: Format) -> dict[str, Any]:
    """What a format can hold, and how it is asked for."""
    return {field: getattr(entry, field) for field in FIELDS}


def block(entry: Format) -> str:
    """The same in a few lines."""
    written = f"written ({entry.ask}): {' '.join(entry.writes)}" if entry.writes else "not written"
    holds = [
        f"configuration {entry.configuration}"
        if entry.configuration
        else "no configuration: config.json beside it, or --n-head",
        f"tokenizer {entry.tokenizer}",
        entry.checksums or "no checksums",
        "untied lm_head" if entry.untied else "tied lm_head only",
    ]
    lines = [
        f"{entry.name:<12}{entry.what}: {entry.files}",
        f"read: {' '.join(entry.reads)}; {written}",
        "; ".join(holds),
    ]
    return "\n".join([lines[0], *(f"{'':<12}{line}" for line in lines[1:])]).replace("`", "")
