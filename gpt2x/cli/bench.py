"""``gpt2x bench``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .running import PROVIDER
from .source import RunPrecision, local
from .text import need, printable

HEAD = (
    "precision  batch  prefill, ms  first token, ms  decode, tokens/s  bandwidth utilization  load, s  peak memory, MB"
)


@click.command(short_help="Measure speed and memory of ONNX models.")
@click.argument("model")
@click.option("--prompt", type=click.IntRange(min=1), default=128, show_default=True, help="Number of prompt tokens.")
@click.option("--new", type=click.IntRange(min=1), default=64, show_default=True, help="Number of new tokens.")
@click.option("--batch", default="1", show_default=True, metavar="LIST", help="Batch sizes, such as 1,4,16.")
@click.option("--precision", metavar="LIST", help="Precisions or pairs (w8a8+int4) to measure (default: all in MODEL).")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads per operator (default: one per core).")
@PROVIDER
@click.option(
    "--speculate",
    metavar="lookup|MODEL",
    help="Measure speculative decoding instead, beside plain decoding: from n-grams, or with a draft MODEL.",
)
@click.option("--json", "json_file", metavar="FILE", help="Write the results as JSON (- for stdout).")
@click.option("--plot", "plot_file", metavar="FILE.png", help="Write a plot of the decoding speed.")
@click.option("--force", is_flag=True, help="Overwrite the files of --json and --plot.")
def bench(
    model: str, prompt: int, new: int, batch: str, precision: str | None, threads: int | None,
    provider: str | None, speculate: str | None, json_file: str | None, plot_file: str | None, force: bool,
) -> None:  # fmt: skip
    """Measure the ONNX models in MODEL: speed, memory, and memory-bandwidth utilization.

    \b
      gpt2x bench gpt2-onnx/
      gpt2x bench gpt2-onnx/ --speculate lookup
      gpt2x bench gpt2-onnx/ --prompt 900 --new 64 --batch 1,4,16 --json bench.json --plot bench.png

    Each model runs on random prompts in its own process. Decoding reads every weight for each token. Utilization is the
    time to read as many bytes from memory, measured in the same run, divided by the time of a decoding step; "-" for another
    --provider than cpu.
    """
    from converters.io.publishing import check_free, new_file

    from .. import bench as measuring
    from ..runtimes.onnx_providers import CPU

    batches, used = _numbers(batch), provider or CPU
    if speculate and (plot_file or json_file or batches != [1]):
        raise click.UsageError("--speculate prints figures for a batch of 1: leave out --batch, --json and --plot")
    if speculate and new < 2:
        raise click.UsageError("--speculate measures the tokens after the first one: pass --new 2 or more")
    for file in (json_file, plot_file):
        if file not in (None, "-"):
            check_free(Path(str(file)), force, directory=False)
    if plot_file:
        need("matplotlib", extra="verify")  # before the measurements
    model = local(model, "onnx")
    kinds = _kinds(model, precision)
    _check_context(model, kinds, prompt, new)
    if speculate:
        _speculation(model, kinds, prompt, new, threads or os.cpu_count() or 1, speculate, used)
        return
    if json_file != "-":
        click.echo(HEAD)

    def show(run: dict[str, Any]) -> None:
        if json_file != "-":
            click.echo(printable(row(run)))

    result = measuring.bench(model, kinds, prompt, new, batches, threads or os.cpu_count() or 1, show, used)
    text = json.dumps(result, indent=2)
    if json_file == "-":
        click.echo(text)
    elif json_file:
        with new_file(Path(json_file), force) as out:
            out.write((text + "\n").encode())
    if plot_file:
        with new_file(Path(plot_file), force) as out:
            out.write(measuring.plot(result))


def _kinds(model: str, precision: str | None) -> list[str | None]:
    """The precisions and pairs to measure: those that the option lists, or else all in a directory."""
    from .. import contract

    if precision:
        return [RunPrecision()(part.strip()) for part in precision.split(",")]
    if Path(model).is_dir():
        return [*contract.models_in(Path(model))] or [None]
    return [None]


def _check_context(model: str, kinds: Sequence[str | None], prompt: int, new: int) -> None:
    from converters import ConversionError

    from ..precisions import PAIR
    from ..runtimes.onnx_model import stated_config

    names: list[str | None] = []
    for kind in kinds:
        names += kind.split(PAIR) if kind else [None]
    n_ctx = min(stated_config(model, name).n_ctx for name in names)
    if prompt + new > n_ctx:
        raise ConversionError(f"--prompt {prompt} and --new {new} exceed the context of {n_ctx} tokens")


def _speculation(
    model: str, kinds: Sequence[str | None], prompt: int, new: int, threads: int, speculate: str, provider: str
) -> None:
    """Print a line for each precision, with and without guesses."""
    from .. import bench as measuring
    from ..generation.guesses import Draft, PromptLookup
    from .running import open_draft

    if speculate == "lookup":
        guesses: PromptLookup | Draft = PromptLookup()
    else:
        guesses = Draft(open_draft(speculate, threads, provider))
    click.echo("precision  plain, tokens/s  speculative, tokens/s  ratio  tokens/run  accepted")
    for kind in kinds:
        run = measuring.speculation(model, kind, prompt, new, threads, guesses, provider)
        plain, found = run["plain_tokens_per_s"], run["tokens_per_s"]
        click.echo(
            f"{run['precision']:<9}  {plain:>15.1f}  {found:>21.1f}  {found / plain:>5.2f}  {run['tokens_per_run']:>10.2f}  "
            f"{run['accepted']:>8.0%}"
        )


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--batch takes a list of integers, such as 1,4,16; not {text!r}") from None
    if min(numbers) < 1:
        raise click.UsageError("--batch: each batch size must be at least 1")
    return numbers


def row(run: dict[str, Any]) -> str:
    """The results of one run, under ``HEAD``."""
    share = "-" if run["bandwidth_share"] is None else f"{run['bandwidth_share']:.0%}"
    return (
        f"{run['precision']:<9}  {run['batch']:>5}  {run['prefill_ms']:>11.1f}  {run['ttft_ms']:>15.1f}  "
        f"{run['decode_tokens_per_s']:>16.1f}  {share:>21}  {run['load_s']:>7.2f}  {run['rss_mb']:>15.0f}"
    )
