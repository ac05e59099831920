"""``gpt2x formats``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from converters import Format


@click.command(short_help="List the supported formats.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def formats(as_json: bool) -> None:
    """List the formats that are read and written, and what each can hold.

    \b
      gpt2x formats
      gpt2x formats --json

    Any of those that are read converts to any of those that are written.
    """
    from converters import FORMATS

    listed = [entry for entry in FORMATS if entry.what]
    click.echo(json.dumps([facts(f) for f in listed], indent=2) if as_json else "\n".join(map(block, listed)))


def facts(entry: Format) -> dict[str, Any]:
    """What is to be said of a format."""
    hidden = ("opener", "begins")
    return {key: value for key, value in asdict(entry).items() if key not in hidden}


def block(entry: Format) -> str:
    """The same in a few lines."""
    written = f"written ({entry.ask}): {' '.join(entry.writes)}" if entry.writes else "not written"
    holds = [
        f"configuration {entry.configuration}"
        if entry.configuration
        else "no configuration: config.json beside it, or --n-head",
        f"tokenizer {entry.tokenizer}",
        entry.checksums or "no checksums",
        "an output of its own" if entry.untied else "tied output only",
    ]
    lines = [
        f"{entry.name:<12}{entry.what}: {entry.files}",
        f"read: {' '.join(entry.reads)}; {written}",
        "; ".join(holds),
    ]
    return "\n".join([lines[0], *(f"{'':<12}{line}" for line in lines[1:])]).replace("`", "")
