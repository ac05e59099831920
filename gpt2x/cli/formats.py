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


@click.command(short_help="List the supported formats.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def formats(as_json: bool) -> None:
    """List the formats, and what each can store.

    \b
      gpt2x formats
      gpt2x formats --json

    Every format that is read converts to every format that is written.
    """
    from converters import FORMATS

    if as_json:
        click.echo(json.dumps([facts(entry) for entry in FORMATS], indent=2))
    else:
        click.echo("\n".join(map(block, FORMATS)))


def facts(entry: Format) -> dict[str, Any]:
    """The facts of a format, for JSON."""
    return {field: getattr(entry, field) for field in FIELDS}


def block(entry: Format) -> str:
    """The facts of a format, as text."""
    written = f"written ({entry.ask}): {' '.join(entry.writes)}" if entry.writes else "not written"
    holds = [
        f"configuration {entry.configuration}"
        if entry.configuration
        else "no configuration: needs config.json beside it, or --n-head",
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
