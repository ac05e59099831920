"""``gpt2x export``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .source import check_before, local
from .text import need, printable, progress_bar
from .verify import read_text, table

if TYPE_CHECKING:
    from converters import Checkpoint

    from ..export.onnx_directory import ExportOptions
    from ..verify.report import Report


@click.command()
@click.argument("src")
@click.option("--onnx", metavar="DIR", help="Write a directory with an ONNX model, its weights and its tokenizer.")
@click.option("--torchscript", metavar="FILE", help="Write TorchScript, which torch.jit.load reads.")
@click.option("--pt2", metavar="FILE", help="Write a program of torch.export, which torch.export.load reads.")
@click.option(
    "--logits",
    type=click.Choice(["all", "last"]),
    default="all",
    show_default=True,
    help="ONNX: logits of every position, or of the last only (for left or no padding).",
)
@click.option(
    "--precision",
    "precisions",
    metavar="LIST",
    help="ONNX: fp32 (the default), fp16, int8, w8a8, int4, or several: fp32,int8. Each is a model of its own.",
)
@click.option(
    "--cache",
    type=click.Choice(["growing", "inplace", "inplace-int8"]),
    help="ONNX: each run returns a longer cache (the default), or can write into the one it is given (faster; right padding only), which may hold 8-bit numbers (a quarter of the memory).",
)
@click.option(
    "--calibrate",
    metavar="FILE",
    help="ONNX: text to round int8, w8a8, int4 and an 8-bit cache by, like what the model will be given.",
)
@click.option(
    "--block-size",
    type=click.Choice(["16", "32", "64", "128", "256"]),
    help="ONNX: how many weights of int8 and int4 share a scale (32).",
)
@click.option(
    "--opset",
    type=click.IntRange(17, 23),
    metavar="N",
    help="ONNX opset, up to 23 (default: the lowest that the model needs, 20 or 21, so that older runtimes load it).",
)
@click.option("--single-file", is_flag=True, help="ONNX: weights inside each .onnx file, which has 2 GB at most.")
@click.option("--safetensors", is_flag=True, help="ONNX: add model.safetensors, for transformers.")
@click.option(
    "--push",
    metavar="OWNER/NAME",
    help="ONNX: upload the models, tokenizer, configuration and weights in DIR to the Hugging Face Hub, as a new repository.",
)
@click.option(
    "--tokenizer",
    "tokenizer_dir",
    metavar="DIR",
    help="Where the tokenizer is (a directory, or a GGUF file), if not beside the weights.",
)
@click.option("--no-tokenizer", is_flag=True, help="Write the ONNX directory without a tokenizer.")
@click.option("--no-verify", is_flag=True, help="Do not compare what was written with SRC.")
@click.option("--n-head", type=click.IntRange(min=1), help="Attention heads, where nothing beside SRC says it.")
@click.option("--tie", is_flag=True, help="Drop an lm_head that differs from the token embedding.")
@click.option("--force", is_flag=True, help="Replace what is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def export(
    ctx: click.Context, src: str, onnx: str | None, torchscript: str | None, pt2: str | None, logits: str,
    precisions: str | None, cache: str | None, calibrate: str | None, block_size: str | None, opset: int | None,
    single_file: bool, safetensors: bool, push: str | None, tokenizer_dir: str | None, no_tokenizer: bool,
    no_verify: bool, n_head: int | None, tie: bool, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Export the GPT-2 in SRC for other programs: ONNX with a KV cache, TorchScript, torch.export.

    \b
      gpt2x export models/124M --onnx gpt2-onnx/
      gpt2x export models/124M --onnx gpt2-onnx/ --precision fp32,int8,int4
      gpt2x export models/124M --onnx gpt2-onnx/ --push me/my-gpt2
      gpt2x export gpt2-hf/ --torchscript gpt2.pt

    SRC is anything that convert reads. DIR is loaded as it is by ONNX Runtime, onnxruntime-genai, optimum and
    transformers.js, from the disk and from the Hub; its README.md has the contract. What was written is compared with
    SRC: exit code 1 when anything differs. Only what passed is uploaded.
    """
    if not (onnx or torchscript or pt2):
        raise click.UsageError("say what to write: --onnx DIR, --torchscript FILE or --pt2 FILE")
    about = {"--logits": logits == "last", "--precision": precisions, "--cache": cache, "--calibrate": calibrate,
             "--block-size": block_size, "--opset": opset, "--single-file": single_file,
             "--safetensors": safetensors, "--push": push is not None}  # fmt: skip
    if not onnx and (given := next((name for name, value in about.items() if value), None)):
        raise click.UsageError(f"{given} is about --onnx, which is not given")
    kinds = _precisions(precisions)
    if block_size and not {"int8", "int4"} & set(kinds):
        raise click.UsageError("--block-size is about int8 and int4")
    if calibrate and not {"int8", "w8a8", "int4"} & set(kinds) and cache != "inplace-int8":
        raise click.UsageError("--calibrate is about int8, w8a8 and int4")
    if onnx and Path(onnx).suffix == ".onnx":
        raise click.UsageError(
            f"--onnx takes a directory (the model will be {onnx.removesuffix('.onnx')}/onnx/model.onnx)"
        )
    if push is not None and no_verify:
        raise click.UsageError("--push uploads what was compared with SRC: leave --no-verify out")
    if pt2 and Path(pt2).suffix != ".pt2":
        raise click.UsageError("torch wants a name that ends in .pt2")
    need("torch", *(["onnx"] if onnx else []), extra="export")
    from converters import open_checkpoint
    from converters.io.publishing import check_free

    from ..contract import models_in
    from ..verify.report import verify_export

    for target in (onnx, torchscript, pt2):
        if target:
            check_before(src, target, force=force, directory=target == onnx)
            _check_utf8(target)
    if push is not None:
        from ..export.push import check_push

        check_push(push)
    checkpoint = open_checkpoint(local(src), n_head=n_head, tie=tie)
    checkpoint = _with_tokenizer(checkpoint, tokenizer_dir, no_tokenizer)
    _check_apart([target for target in (onnx, torchscript, pt2) if target])
    for target in (torchscript, pt2):
        if target:
            check_free(Path(target), force, directory=False)  # before any of them is written
    results = []
    if onnx:
        from ..export.onnx_directory import ExportOptions
        from ..precisions.weights import BLOCK

        ids = _calibration(checkpoint, calibrate) if calibrate else None
        options = ExportOptions(
            kinds, cache or "growing", logits == "last", ids, int(block_size or BLOCK), opset, single_file, safetensors
        )
        results.append(_write("onnx", onnx, lambda: _export_onnx(checkpoint, onnx, options, force, no_tokenizer)))
    if torchscript or pt2:
        from ..export.torch_program import export_pt2, export_torchscript
    if torchscript:
        write = partial(export_torchscript, checkpoint, torchscript, force=force)
        results.append(_write("torchscript", torchscript, write))
    if pt2:
        results.append(_write("pt2", pt2, partial(export_pt2, checkpoint, pt2, force=force)))
    start = time.perf_counter()
    if onnx and push:  # what was there already is uploaded, too
        kinds = tuple(models_in(Path(onnx)))
    written = [(r["destination"], p) for r in results for p in (kinds if r["format"] == "onnx" else (None,))]
    reports = [] if no_verify else [verify_export(checkpoint, path, precision=p) for path, p in written]
    seconds = round(time.perf_counter() - start, 3)
    passed = all(report.passed for report in reports)
    facts = {"source": src, "exports": results, "notes": list(checkpoint.notes)}
    if not as_json:
        _show(facts, reports, seconds)
    if onnx and push and passed:
        facts["pushed"] = _push(onnx, push)
    if as_json:
        verified = [json.loads(report.to_json()) for report in reports]
        click.echo(json.dumps({**facts, "verify": verified}, indent=2))
    ctx.exit(0 if passed else 1)


def _show(facts: dict[str, Any], reports: list[Report], seconds: float) -> None:
    click.echo(printable(summary(facts)))
    for report in reports:
        click.echo(printable(table(report)))
    if reports:
        click.echo(f"Compared in {seconds:.1f} s.")


def _push(directory: str, name: str) -> str:
    """Upload a directory, and return where it is."""
    from ..export.push import push

    click.echo(printable(f"Uploading {directory} to {name}"), err=True)
    url = push(Path(directory), name)
    click.echo(printable(f"Uploaded: {url}"), err=True)
    return url


def _check_utf8(target: str) -> None:
    """Refuse a destination that ONNX Runtime and torch cannot open, before anything is written."""
    from converters import DestinationError

    try:
        target.encode()
    except UnicodeEncodeError:
        raise DestinationError(f"{target}: ONNX Runtime and torch open only paths in UTF-8: choose another") from None


def _check_apart(targets: list[str]) -> None:
    """Refuse results of one name, or of which one lies in another."""
    places = [Path(os.path.realpath(target)) for target in targets]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise click.UsageError(f"two results cannot have one name, {place.name}")
        if above := next((other for other in places if other in place.parents), None):
            raise click.UsageError(
                f"one result cannot lie in another, {place.name} in {above.name}: write it beside it"
            )


def _with_tokenizer(checkpoint: Checkpoint, directory: str | None, without: bool) -> Checkpoint:
    from converters.opening import tokenizer_in

    if without:
        return replace(checkpoint, tokenizer=None)
    return checkpoint if directory is None else replace(checkpoint, tokenizer=tokenizer_in(Path(directory)))


def _write(kind: str, destination: str, write: Callable[[], int]) -> dict[str, Any]:
    start = time.perf_counter()
    size = write()
    return {"format": kind, "destination": destination, "bytes": size, "seconds": round(time.perf_counter() - start, 3)}


def _precisions(text: str | None) -> tuple[str, ...]:
    """The precisions of a list, each once."""
    from ..contract import SUFFIXES

    names = tuple(dict.fromkeys(part.strip() for part in (text or "fp32").split(",")))
    if unknown := [name for name in names if name not in SUFFIXES]:
        meant = {"q8": "int8", "q4": "int4", "f16": "fp16", "f32": "fp32"}.get(unknown[0].lower(), unknown[0].lower())
        hint = f": did you mean {meant}?" if meant in SUFFIXES else f"; known are {', '.join(SUFFIXES)}"
        raise click.UsageError(f"unknown precision {unknown[0]!r}{hint}")
    return names


def _calibration(checkpoint: Checkpoint, path: str) -> list[int]:
    from converters import ConversionError

    from ..tokenizer import Tokenizer

    if checkpoint.tokenizer is None:
        raise ConversionError("--calibrate needs a tokenizer to read the text with; say where one is: --tokenizer DIR")
    ids = Tokenizer.from_files(checkpoint.tokenizer).encode(read_text(path))
    if not ids or max(ids) >= checkpoint.config.n_vocab:
        raise ConversionError(f"{path}: " + ("is empty" if not ids else "has tokens that the model does not know"))
    if len(ids) < checkpoint.config.n_ctx:
        click.echo(f"Warning: {path} has {len(ids)} tokens; some thousands are needed to round well", err=True)
    return ids


def _export_onnx(
    checkpoint: Checkpoint, destination: str, options: ExportOptions, force: bool, without_tokenizer: bool
) -> int:
    from ..export.onnx_directory import export_onnx

    def warn(sentence: str) -> None:
        click.echo(printable(f"Warning: {sentence}"), err=True)

    with progress_bar(4 * checkpoint.parameters * len(options.precisions)) as advance:
        return export_onnx(
            checkpoint, destination, options, force=force, need_tokenizer=not without_tokenizer,
            progress=advance, warn=warn,
        ).bytes  # fmt: skip


def summary(facts: dict[str, Any]) -> str:
    """What was written, in a few lines."""
    lines = [
        f"{facts['source']} -> {e['destination']}\n  {e['format']}: {e['bytes']:,} bytes, {e['seconds']:.2f} s"
        for e in facts["exports"]
    ]
    return "\n".join(lines + [f"  note: {note}" for note in facts["notes"]])
