"""``gpt2x convert``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from .text import printable

if TYPE_CHECKING:
    from converters.tokenizer_files import TokenizerFiles

DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
FORMATS = ("safetensors", "bin", "hf", "tf")


@click.command()
@click.argument("src")
@click.argument("dst")
@click.option("--to", type=click.Choice(FORMATS), help="Format of DST where its name does not say it.")
@click.option(
    "--dtype",
    type=click.Choice(["keep", *DTYPES]),
    default="keep",
    show_default=True,
    help="Number format of the weights in DST.",
)
@click.option("--n-head", type=click.IntRange(min=1), help="Attention heads, where nothing beside SRC says it.")
@click.option("--tie", is_flag=True, help="Drop an lm_head that differs from the token embedding.")
@click.option("--force", is_flag=True, help="Replace DST.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def convert(
    src: str, dst: str, to: str | None, dtype: str, n_head: int | None, tie: bool, force: bool, as_json: bool
) -> None:
    """Convert the GPT-2 in SRC to DST. Neither TensorFlow nor PyTorch is needed.

    \b
      gpt2x convert models/124M gpt2.safetensors
      gpt2x convert models/124M gpt2-hf/
      gpt2x convert pytorch_model.bin gpt2.safetensors
      gpt2x convert gpt2-hf/ models/back --to tf

    SRC is OpenAI's TensorFlow checkpoint (its directory, prefix, .index or .data file), a .bin, a .safetensors, a
    shard index, or a directory with one of them. DST ends in .safetensors or .bin, or is a directory in Hugging
    Face's layout. Every checksum that SRC carries is verified; DST appears whole or not at all.
    """
    from converters import open_checkpoint, save_checkpoint
    from converters.config import to_hf
    from converters.tensors import DTYPES as KINDS

    start = time.perf_counter()
    checkpoint = open_checkpoint(src, n_head=n_head, tie=tie)
    if dtype != "keep":
        checkpoint = checkpoint.cast(KINDS[DTYPES[dtype]])
    warnings: list[str] = []
    with progress_bar(sum(tensor.nbytes for tensor in checkpoint.tensors.values())) as advance:
        saved = save_checkpoint(checkpoint, dst, to, force=force, progress=advance, warn=warnings.append)
    facts = {
        "source": src,
        "destination": dst,
        "format_from": f"{checkpoint.format} ({checkpoint.dialect})",
        "format_to": saved.format,
        "config": to_hf(checkpoint.config),
        "tensors": len(checkpoint.tensors),
        "parameters": checkpoint.parameters,
        "bytes": saved.bytes,
        "left_out": list(checkpoint.left_out),
        "checksums_verified": checkpoint.checksummed,
        "seconds": round(time.perf_counter() - start, 3),
        "notes": [*checkpoint.notes, *_tokenizer_note(saved.format, checkpoint.tokenizer)],
        "warnings": warnings,
    }
    for warning in warnings:
        click.echo(printable(f"Warning: {warning}"), err=True)
    click.echo(json.dumps(facts, indent=2) if as_json else printable(summary(facts)))


def _tokenizer_note(kind: str, tokenizer: TokenizerFiles | None) -> list[str]:
    if kind not in ("hf", "tf"):
        return []
    if tokenizer is None:
        return ["no tokenizer beside the source, so none in the result"]
    added = tokenizer.vocabulary().added if kind == "tf" else ()
    return (
        [f"OpenAI's layout cannot mark added tokens, which will be read as text: {', '.join(added)}"] if added else []
    )


def summary(facts: dict[str, Any]) -> str:
    """The result in a few lines."""
    checked = f", {facts['checksums_verified']} checksums verified" if facts["checksums_verified"] else ""
    lines = [
        f"{facts['source']} -> {facts['destination']}",
        f"  {facts['format_from']} -> {facts['format_to']}: {facts['tensors']} tensors, {facts['parameters']:,} parameters, "
        f"{facts['bytes']:,} bytes{checked}, {facts['seconds']:.2f} s",
    ]
    left_out = facts["left_out"]
    if left_out:
        lines.append(
            f"  left out: {', '.join(left_out[:5])}{f' and {len(left_out) - 5} more' if len(left_out) > 5 else ''}"
        )
    return "\n".join(lines + [f"  note: {note}" for note in facts["notes"]])


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], None] | None]:
    """A bar on stderr where that is a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda n: progress.advance(task, n)
