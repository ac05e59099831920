"""``gpt2x convert``."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from .source import check_before, is_remote, local, weight_options, with_local_adapter
from .text import printable, progress_bar, warn

if TYPE_CHECKING:
    from converters import Checkpoint
    from converters.saving import Saved, Warn

    from ..weight_options import WeightOptions

DTYPES = ("fp32", "fp16", "bf16", "q8_0")


@dataclass(frozen=True)
class Request:
    """What was typed."""

    src: str
    dst: str
    to: str | None
    dtype: str
    max_shard_size: str | None
    n_vocab: int | None
    activation_function: str | None
    tokenizer_dir: str | None
    no_tokenizer: bool
    force: bool
    as_json: bool
    weights: WeightOptions

    @property
    def rounded_to(self) -> str | None:
        """The dtype that all weights get; None if each keeps its own."""
        return None if self.dtype == "keep" else self.dtype


class WrittenFormat(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3 only
    """A format that is written. The registry is imported when a value or the help is needed, not before."""

    name = "format"

    @property
    def _choice(self) -> click.Choice[str]:
        from converters import WRITERS

        return click.Choice(tuple(WRITERS))

    def get_metavar(self, *arguments: Any, **options: Any) -> str | None:
        return self._choice.get_metavar(*arguments, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return self._choice.convert(value, param, ctx)


@click.command(short_help="Convert GPT-2 weights to another format.")
@click.argument("src")
@click.argument("dst")
@click.option("--to", type=WrittenFormat(), help="Output format (default: inferred from the suffix of DST).")
@click.option(
    "--dtype",
    type=click.Choice(["keep", *DTYPES]),
    default="keep",
    show_default=True,
    help="Dtype of the weights in DST; q8_0 for GGUF only.",
)
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    help="Split the weights into files of at most SIZE, such as 5GB (directories only).",
)
@weight_options("SRC")
@click.option("--n-vocab", type=click.IntRange(min=1), help="Truncate a padded vocabulary to N rows.")
@click.option("--activation-function", help="Activation function (gelu_new, gelu, ...), if no configuration states it.")
@click.option("--tokenizer", "tokenizer_dir", metavar="DIR", help="Directory of the tokenizer, if not beside SRC.")
@click.option("--no-tokenizer", is_flag=True, help="Convert the weights without their tokenizer.")
@click.option("--force", is_flag=True, help="Replace DST.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def convert(**options: Any) -> None:
    """Convert the GPT-2 in SRC to DST, without TensorFlow or PyTorch.

    \b
      gpt2x convert models/124M gpt2.safetensors
      gpt2x convert models/124M gpt2-hf/
      gpt2x convert pytorch_model.bin gpt2.safetensors
      gpt2x convert gpt2-hf/ models/back --to tf
      gpt2x convert hf://openai-community/gpt2 gpt2.safetensors
      gpt2x convert gpt2-hf/ tuned/ --adapter lora/

    SRC is a weight file of any format that 'gpt2x formats' lists, or a directory with one; hf://OWNER/NAME and
    openai://124M are downloaded. DST ends in .safetensors, .bin or .gguf, or is a directory in Hugging Face's layout; --to
    selects any other format. Every checksum in SRC is verified. DST appears whole, or not at all.
    """
    request = Request(**options)
    if request.no_tokenizer and request.tokenizer_dir:
        raise click.UsageError("--tokenizer and --no-tokenizer exclude each other")
    _check_destination(request)
    path = local(request.src)
    start = time.perf_counter()
    checkpoint = _opened(path, request)
    warnings: list[str] = []
    saved = _saved(checkpoint, request, warnings.append)
    facts = {
        "source": request.src,
        "destination": request.dst,
        **_facts(checkpoint, saved),
        "seconds": round(time.perf_counter() - start, 3),
        "notes": [*checkpoint.notes, *saved.notes],
        "warnings": warnings,
    }
    for warning in warnings:
        warn(warning)
    click.echo(json.dumps(facts, indent=2) if request.as_json else printable(summary(facts)))


def _check_destination(request: Request) -> None:
    """Refuse an invalid or existing DST before anything is read."""
    from converters import DestinationError
    from converters.formats import BY_NAME
    from converters.saving import check_destination

    if is_remote(request.dst):
        raise DestinationError(f"{request.dst}: gpt2x convert does not upload; pass a file or a directory")
    _, kind = check_destination(request.dst, request.to, request.rounded_to, request.max_shard_size)
    if is_remote(request.src):
        check_before(request.src, request.dst, force=request.force, directory=BY_NAME[kind].is_directory)


def _opened(path: str, request: Request) -> Checkpoint:
    from converters import open_checkpoint

    checkpoint = open_checkpoint(
        path,
        n_vocab=request.n_vocab,
        activation_function=request.activation_function,
        tokenizer=request.tokenizer_dir,
        merged_dtype="fp64" if request.rounded_to else None,  # it is rounded once, when it is written
        **with_local_adapter(request.weights),
    )
    return replace(checkpoint, tokenizer=None) if request.no_tokenizer else checkpoint


def _saved(checkpoint: Checkpoint, request: Request, warned: Warn) -> Saved:
    from converters import save_checkpoint

    with progress_bar(checkpoint.nbytes) as advance:
        return save_checkpoint(
            checkpoint,
            request.dst,
            request.to,
            dtype=request.rounded_to,
            max_shard_size=request.max_shard_size,
            force=request.force,
            progress=advance,
            warn=warned,
        )


def _facts(checkpoint: Checkpoint, saved: Saved) -> dict[str, Any]:
    """What was read, and what was written."""
    from converters.config import to_hf

    return {
        "format_from": f"{checkpoint.format} ({checkpoint.dialect})",
        "format_to": saved.format,
        "config": to_hf(checkpoint.config),
        "tensors": len(checkpoint.tensors),
        "parameters": checkpoint.parameters,
        "bytes": saved.bytes,
        "left_out": list(checkpoint.left_out),
        "checksums_verified": checkpoint.checksummed,
    }


def summary(facts: dict[str, Any]) -> str:
    """The result as text."""
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
    lines += [f"  note: {note}" for note in facts["notes"]]
    return "\n".join(line.replace("\n", "\\n") for line in lines)
