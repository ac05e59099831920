"""``gpt2x inspect``."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import click

from .text import printable


@click.command()
@click.argument("path")
@click.option("--tensors", "show_tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: str, show_tensors: bool, as_json: bool) -> None:
    """Say what PATH is: format, dialect, sizes, number formats, configuration, checksums.

    \b
      gpt2x inspect models/124M
      gpt2x inspect pytorch_model.bin --tensors --json

    Only names and shapes are read, not the weights.
    """
    facts = describe(path)
    if not show_tensors:
        del facts["tensor_list"]
    click.echo(json.dumps(facts, indent=2) if as_json else printable("\n".join(lines(facts))))


def describe(path: str) -> dict[str, Any]:
    """Everything that can be said without reading a weight."""
    from converters import open_checkpoint
    from converters.config import to_hf
    from converters.errors import UnknownHeadsError

    try:
        checkpoint = open_checkpoint(path)
        config = to_hf(checkpoint.config)
    except UnknownHeadsError:
        checkpoint = open_checkpoint(path, n_head=1)  # any number that divides the width, to see the rest
        config = {**to_hf(checkpoint.config), "n_head": None}
    notes = checkpoint.notes if config["n_head"] else ("n_head is not in the file: convert it with --n-head",)
    tensors = checkpoint.tensors
    return {
        "path": path,
        "format": checkpoint.format,
        "dialect": checkpoint.dialect,
        "size": checkpoint.config.size_name if config["n_head"] else None,
        "config": config,
        "tensors": len(tensors),
        "parameters": checkpoint.parameters,
        "bytes": checkpoint.nbytes,
        "dtypes": dict(Counter(t.dtype.name for t in tensors.values())),
        "checksums": checkpoint.checksummed,
        "tokenizer": str(checkpoint.tokenizer.directory) if checkpoint.tokenizer else None,
        "left_out": list(checkpoint.left_out),
        "notes": list(notes),
        "tensor_list": [{"name": name, "dtype": t.dtype.name, "shape": list(t.shape)} for name, t in tensors.items()],
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts for a person."""
    config = facts["config"]
    size = f" ({facts['size']})" if facts["size"] else ""
    shape = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    switches = {
        k: v for k, v in config.items() if k.startswith(("activation", "layer_norm", "scale", "reorder", "tie"))
    }
    rows = [
        ("format", f"{facts['format']}, names of {facts['dialect']}"),
        (
            "model",
            f"GPT-2{size}, {facts['parameters']:,} parameters in {facts['tensors']} tensors, {facts['bytes']:,} bytes",
        ),
        ("dtypes", ", ".join(f"{n} x {d}" for d, n in facts["dtypes"].items())),
        ("config", ", ".join(f"{k} {'?' if config[k] is None else config[k]}" for k in shape)),
        ("switches", ", ".join(f"{k} {str(v).lower() if isinstance(v, bool) else v}" for k, v in switches.items())),
        (
            "checksums",
            f"{facts['checksums']} of {facts['tensors']} tensors carry one"
            if facts["checksums"]
            else "none in this format",
        ),
        ("tokenizer", facts["tokenizer"] or "none beside it"),
        *(("left out", name) for name in facts["left_out"]),
        *(("note", note) for note in facts["notes"]),
        *((t["dtype"], f"{t['name']} {t['shape']}") for t in facts.get("tensor_list", [])),
    ]
    return [facts["path"], *(f"  {key:<10} {value}" for key, value in rows)]
