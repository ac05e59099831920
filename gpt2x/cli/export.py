"""``gpt2x export``: plan, write, verify, publish."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..precisions import BLOCK, BLOCKS, DEFAULT, PRECISIONS, Precision
from ..tasks import EXTRAS, GENERATION, LOGITS, TASKS, check_outputs
from .source import check_before, local, named_adapter, weight_options, with_local_adapter
from .text import SAMPLE, need, printable, progress_bar, read_text, warn
from .verify import table

if TYPE_CHECKING:
    from converters import Checkpoint

    from ..export.onnx_directory import ExportOptions
    from ..verify.report import Report
    from ..weight_options import WeightOptions

QUANTIZED = ", ".join(name for name, precision in PRECISIONS.items() if precision.bits)
BLOCKWISE = ", ".join(name for name, precision in PRECISIONS.items() if precision.block_sizes)

NO_PADDING = (
    "the source's configuration has no pad_token_id: clients that pad batches need one, in config.json and in the tokenizer. "
    "The model itself needs none: attention_mask shows the padding"
)


@dataclass(frozen=True)
class Request:
    """What was typed. The defaults are those of options that were not given."""

    src: str
    weights: WeightOptions
    adapters: dict[str, str]
    onnx: str | None = None
    torchscript: str | None = None
    pt2: str | None = None
    task: str = GENERATION
    outputs: tuple[str, ...] = (LOGITS,)
    triton: str | None = None
    logits: str = "all"
    precision: tuple[str, ...] | None = None
    cache: str | None = None
    calibrate: str | None = None
    block_size: str | None = None
    opset: int | None = None
    single_file: bool = False
    safetensors: bool = False
    push: str | None = None
    tokenizer: str | None = None
    no_tokenizer: bool = False
    no_verify: bool = False
    force: bool = False
    as_json: bool = False

    @property
    def targets(self) -> list[str]:
        """The destinations."""
        return [target for target in (self.onnx, self.torchscript, self.pt2, self.triton) if target]

    @property
    def directories(self) -> list[str]:
        """The destinations that are directories."""
        return [target for target in (self.onnx, self.triton) if target]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the precisions that are written."""
        return self.precision or (DEFAULT,)

    @property
    def chosen(self) -> list[Precision]:
        """These precisions as objects."""
        return [PRECISIONS[name] for name in self.names]


# Options that change only what --onnx and --triton write, and --onnx alone.
OF_ONNX_MODELS = ("logits", "precision", "cache", "calibrate", "block_size", "opset", "single_file")
ONNX_ONLY = ("safetensors", "push")


def _precisions(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    """The precisions of a list, each once."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in PRECISIONS:
            raise click.UsageError(f"unknown precision {part!r}{_hint(part.lower())}")
    return tuple(dict.fromkeys(parts))


def _hint(part: str) -> str:
    """The precision that may be meant: by another program's name for it, or in other case."""
    others = {precision.transformers_js: name for name, precision in PRECISIONS.items()}
    meant = part if part in PRECISIONS else others.get(part) or others.get(part.replace("f", "fp"))
    return f": did you mean {meant}?" if meant else f"; known are {', '.join(PRECISIONS)}"


def _outputs(ctx: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
    """The outputs of a list, in their order."""
    from converters import ConfigError

    try:
        return check_outputs([part.strip() for part in text.split(",")])
    except ConfigError as error:
        raise click.UsageError(f"--outputs: {error}") from None


@click.command(short_help="Export to ONNX with a KV cache, TorchScript or torch.export.")
@click.argument("src")
@click.option("--onnx", metavar="DIR", help="Write an ONNX directory: model, weights, tokenizer.")
@click.option("--torchscript", metavar="FILE", help="Write TorchScript, for torch.jit.load.")
@click.option("--pt2", metavar="FILE", help="Write a torch.export program, for torch.export.load.")
@click.option("--triton", metavar="DIR", help="Write a model repository for Triton Inference Server.")
@click.option(
    "--task",
    type=click.Choice(list(TASKS)),
    default=GENERATION,
    show_default=True,
    help="Task of the model. Classification needs the head in SRC.",
)
@click.option(
    "--outputs",
    metavar="LIST",
    default=LOGITS,
    callback=_outputs,
    help=f"{GENERATION}: {LOGITS}, and any of {', '.join(EXTRAS)} (default: {LOGITS}).",
)
@click.option(
    "--logits",
    type=click.Choice(["all", "last"]),
    default="all",
    show_default=True,
    help="ONNX: logits of all positions, or of the last one only (then pad left, or not at all).",
)
@click.option(
    "--precision",
    metavar="LIST",
    callback=_precisions,
    help=f"ONNX: {', '.join(PRECISIONS)}, or several separated by commas, a model for each (default: {DEFAULT}).",
)
@click.option(
    "--cache",
    type=click.Choice(["growing", "inplace", "inplace-int8"]),
    help="ONNX: return a longer KV cache from each run (default: growing), or update it in place (faster; right padding only), in float or in int8 (a quarter of the memory).",
)
@click.option(
    "--calibrate",
    metavar="FILE",
    help=f"ONNX: calibration text for {QUANTIZED} (GPTQ) and for an int8 cache.",
)
@click.option(
    "--block-size",
    type=click.Choice([str(size) for size in BLOCKS]),
    help=f"ONNX: number of weights that share a scale, in {BLOCKWISE} (default: {BLOCK}).",
)
@click.option(
    "--opset",
    type=click.IntRange(17, 23),
    metavar="N",
    help="ONNX: opset, up to 23 (default: the lowest that has all operators: 20 or 21).",
)
@click.option("--single-file", is_flag=True, help="ONNX: put the weights into each .onnx file (2 GB at most).")
@click.option("--safetensors", is_flag=True, help="ONNX: add model.safetensors, for transformers.")
@click.option("--push", metavar="OWNER/NAME", help="ONNX: upload DIR to the Hugging Face Hub, as a new repository.")
@click.option("--tokenizer", metavar="DIR", help="Tokenizer directory or GGUF file (default: beside the weights).")
@click.option("--no-tokenizer", is_flag=True, help="Write the ONNX directory without a tokenizer.")
@click.option("--no-verify", is_flag=True, help="Do not compare the result with SRC.")
@weight_options(
    "SRC",
    multiple=True,
    metavar="[NAME=]DIR",
    help="PEFT adapter (LoRA) to merge into the weights of SRC; with NAME=, to choose at run time (ONNX; repeatable).",
)
@click.option("--force", is_flag=True, help="Replace existing files.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def export(ctx: click.Context, /, **options: Any) -> None:
    """Export the GPT-2 in SRC for other programs: ONNX with a KV cache, Triton, TorchScript, torch.export.

    \b
      gpt2x export models/124M --onnx gpt2-onnx/
      gpt2x export models/124M --onnx gpt2-onnx/ --precision fp32,int8,int4
      gpt2x export models/124M --onnx gpt2-onnx/ --push me/my-gpt2
      gpt2x export gpt2-hf/ --torchscript gpt2.pt
      gpt2x export gpt2-hf/ --triton repository/
      gpt2x export gpt2-hf/ --onnx tuned-onnx/ --adapter lora/
      gpt2x export gpt2-hf/ --onnx gpt2-onnx/ --adapter french=lora-fr/ --adapter poems=lora-poems/
      gpt2x export classifier/ --onnx classifier-onnx/ --task text-classification

    SRC is anything that convert reads. ONNX Runtime, onnxruntime-genai, optimum and transformers.js load DIR, from disk
    or from the Hub; its README.md documents the inputs and outputs. The result is compared with SRC: exit code 1 if it
    differs. --push uploads it only if it passed.
    """
    merged, adapters = _sorted_adapters(options["weights"]["adapter"])
    options["weights"]["adapter"] = merged
    request = Request(**options, adapters=adapters)
    _check_usage(request)
    need("torch", *(["onnx"] if request.directories else []), extra="export")
    checkpoint = _plan(request)
    results = _write(request, checkpoint)
    start = time.perf_counter()
    reports = [] if request.no_verify else _verify(request, checkpoint, results)
    seconds = time.perf_counter() - start
    passed = all(report.passed for report in reports)
    facts = {"source": request.src, "exports": results, "notes": list(checkpoint.notes)}
    if not request.as_json:
        _show(facts, reports, seconds)
    if request.onnx and request.push and passed:
        facts["pushed"] = _push(request.onnx, request.push)
    if request.as_json:
        verified = [json.loads(report.to_json()) for report in reports]
        click.echo(json.dumps({**facts, "verify": verified}, indent=2))
    ctx.exit(0 if passed else 1)


# ------------------------------------------------------------------------------------------------------------ plan


def _sorted_adapters(given: tuple[str, ...]) -> tuple[str | None, dict[str, str]]:
    """The directory of the adapter that is merged, and name -> directory of those that are chosen at run time.

    Raises:
        UsageError: if a name is given twice, or several adapters are to be merged.
    """
    from ..contract import check_adapter_names

    pairs = [(text, named_adapter(text)) for text in given]
    merged = [text for text, named in pairs if named is None]
    named = [pair for _, pair in pairs if pair is not None]
    if len(merged) > 1:
        raise click.UsageError(
            f"only one adapter can be merged, not {len(merged)}; pass those to choose from at run time as NAME=DIR"
        )
    try:
        check_adapter_names(name for name, _ in named)
    except ValueError as error:
        raise click.UsageError(f"--adapter: {error}") from None
    return (merged[0] if merged else None), dict(named)


def _check_usage(request: Request) -> None:
    """Refuse options that do not go together.

    Raises:
        UsageError: naming them.
    """
    if not request.targets:
        raise click.UsageError("nothing to write: pass --onnx DIR, --triton DIR, --torchscript FILE or --pt2 FILE")
    _check_scope(request)
    if request.adapters and not request.onnx:
        raise click.UsageError("--adapter NAME=DIR applies to --onnx only; --adapter DIR merges an adapter")
    if request.task != GENERATION:
        _check_task_usage(request)
    if request.triton:
        _check_triton_usage(request)
    _check_quantization(request)
    if request.push is not None and request.no_verify:
        raise click.UsageError("--push uploads only what was compared with SRC: remove --no-verify")
    _check_names(request)


def _check_triton_usage(request: Request) -> None:
    """Refuse options that a repository for Triton does not have.

    Raises:
        UsageError: naming the option.
    """
    if request.task != GENERATION or request.outputs != (LOGITS,):
        raise click.UsageError("--triton serves text generation: leave out --task and --outputs")
    if len(request.names) > 1:
        raise click.UsageError("--triton takes one --precision: export each to a repository of its own")
    if request.no_tokenizer:
        raise click.UsageError("--triton needs the tokenizer: remove --no-tokenizer")


def _check_quantization(request: Request) -> None:
    """Refuse options that none of the precisions has.

    Raises:
        UsageError: naming the option.
    """
    if request.block_size and not any(precision.block_sizes for precision in request.chosen):
        raise click.UsageError(f"--block-size applies to {BLOCKWISE} only")
    if request.calibrate and not any(precision.bits for precision in request.chosen) and not _has_int8_cache(request):
        raise click.UsageError(f"--calibrate applies to {QUANTIZED} and an int8 cache only")


def _check_names(request: Request) -> None:
    """Refuse destinations with the name of something else.

    Raises:
        UsageError: with the name that is expected.
    """
    if request.onnx and Path(request.onnx).suffix == ".onnx":
        name = request.onnx.removesuffix(".onnx")
        raise click.UsageError(f"--onnx takes a directory (the model will be {name}/onnx/model.onnx)")
    if request.pt2 and Path(request.pt2).suffix != ".pt2":
        raise click.UsageError("--pt2 takes a file name that ends in .pt2")


def _check_task_usage(request: Request) -> None:
    """Refuse options that only text generation has.

    Raises:
        UsageError: naming the option.
    """
    of_generation = {
        "--outputs": request.outputs != (LOGITS,),
        "--cache": request.cache,
        "--logits": request.logits != "all",
        "--adapter NAME=DIR": bool(request.adapters),
    }
    for option, given in of_generation.items():
        if given:
            raise click.UsageError(f"{option} applies to --task {GENERATION} only")


def _check_scope(request: Request) -> None:
    """Refuse options of a target that is not written.

    Raises:
        UsageError: naming the option and the target.
    """
    defaults = {field.name: field.default for field in fields(Request)}
    given = [name for name in (*OF_ONNX_MODELS, *ONNX_ONLY) if getattr(request, name) != defaults[name]]
    for name in given:
        option = f"--{name.replace('_', '-')}"
        if name in ONNX_ONLY and not request.onnx:
            raise click.UsageError(f"{option} applies to --onnx only")
        if not request.directories:
            raise click.UsageError(f"{option} applies to --onnx and --triton only")


def _has_int8_cache(request: Request) -> bool:
    from ..contract import has_int8_cache

    return request.cache is not None and has_int8_cache(request.cache)


def _plan(request: Request) -> Checkpoint:
    """Check every destination, and open the source.

    Raises:
        ConversionError: if a destination cannot be written, or the source cannot be read.
    """
    from converters import open_checkpoint
    from converters.io.publishing import check_free

    from ..task_heads import heads_of

    # Destinations first: a download may take an hour, and must not be for nothing.
    for target in request.targets:
        check_before(request.src, target, force=request.force, directory=target in request.directories)
        _check_utf8(target)
    if request.push is not None:
        from ..export.push import check_push

        check_push(request.push)
    source, weights = local(request.src), with_local_adapter(request.weights)
    request.adapters.update({name: local(folder, "adapter") for name, folder in request.adapters.items()})
    checkpoint = open_checkpoint(source, **weights)
    checkpoint = _with_tokenizer(checkpoint, request)
    heads_of(checkpoint, request.task, request.outputs)
    if request.task == "text-classification" and checkpoint.config.pad_token_id is None:
        warn(NO_PADDING)
    _check_apart(request.targets)
    for file in (request.torchscript, request.pt2):
        if file:
            check_free(Path(file), request.force, directory=False)  # before any of them is written
    return checkpoint


def _check_utf8(target: str) -> None:
    """Refuse a destination that ONNX Runtime and torch cannot open.

    Raises:
        DestinationError: if the path is not UTF-8.
    """
    from converters import DestinationError

    try:
        target.encode()
    except UnicodeEncodeError:
        raise DestinationError(f"{target}: ONNX Runtime and torch open only paths in UTF-8: choose another") from None


def _check_apart(targets: list[str]) -> None:
    """Refuse results with the same path, or with one inside another.

    Raises:
        UsageError: naming the two.
    """
    places = [Path(os.path.realpath(target)) for target in targets]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise click.UsageError(f"two outputs have the same path, {place.name}")
        above = next((other for other in places if other in place.parents), None)
        if above is not None:
            raise click.UsageError(f"an output is inside another, {place.name} in {above.name}: write it beside it")


def _with_tokenizer(checkpoint: Checkpoint, request: Request) -> Checkpoint:
    from converters.opening import tokenizer_in

    if request.no_tokenizer:
        return replace(checkpoint, tokenizer=None)
    if request.tokenizer is None:
        return checkpoint
    return replace(checkpoint, tokenizer=tokenizer_in(Path(request.tokenizer)))


# ----------------------------------------------------------------------------------------------------------- write


def _write(request: Request, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Write every result. Returns its facts, in the order of ``Request.targets``."""
    results = []
    program: dict[str, Any] = {"force": request.force, "task": request.task, "outputs": request.outputs}
    if request.onnx:
        options = _onnx_options(request, checkpoint)
        results.append(_timed("onnx", request.onnx, lambda: _export_onnx(request, checkpoint, options)))
    if request.torchscript or request.pt2:
        from ..export.torch_program import export_pt2, export_torchscript
    if request.torchscript:
        write = partial(export_torchscript, checkpoint, request.torchscript, **program)
        results.append(_timed("torchscript", request.torchscript, write))
    if request.pt2:
        results.append(_timed("pt2", request.pt2, partial(export_pt2, checkpoint, request.pt2, **program)))
    if request.triton:
        results.append(_timed("triton", request.triton, lambda: _export_triton(request, checkpoint)))
    return results


def _timed(kind: str, destination: str, write: Callable[[], int]) -> dict[str, Any]:
    start = time.perf_counter()
    size = write()
    return {"format": kind, "destination": destination, "bytes": size, "seconds": round(time.perf_counter() - start, 3)}


def _onnx_options(request: Request, checkpoint: Checkpoint) -> ExportOptions:
    from ..export.onnx_directory import ExportOptions

    return ExportOptions(
        precisions=request.names,
        cache=request.cache or "growing",
        last=request.logits == "last",
        calibration=_calibration(checkpoint, request.calibrate) if request.calibrate else None,
        block=int(request.block_size or BLOCK),
        opset=request.opset,
        single_file=request.single_file,
        safetensors=request.safetensors,
        adapters=dict(request.adapters),
        task=request.task,
        outputs=request.outputs,
    )


def _calibration(checkpoint: Checkpoint, path: str) -> list[int]:
    """The token ids of a calibration text.

    Raises:
        ConversionError: if there is no tokenizer, or the text has no token ids of the model.
    """
    from converters import ConversionError

    from ..tokenizer import Tokenizer

    if checkpoint.tokenizer is None:
        raise ConversionError("--calibrate needs a tokenizer for the text: pass --tokenizer DIR")
    ids = Tokenizer.from_files(checkpoint.tokenizer).encode(read_text(path, SAMPLE))
    if not ids:
        raise ConversionError(
            f"{path}: the file is empty; --calibrate needs some text like that which the model will read"
        )
    if max(ids) >= checkpoint.config.n_vocab:
        raise ConversionError(f"{path}: has token id {max(ids)}; the model's vocabulary is {checkpoint.config.n_vocab}")
    if len(ids) < checkpoint.config.n_ctx:
        warn(f"{path} has {len(ids)} tokens; calibration needs several thousand")
    return ids


def _export_onnx(request: Request, checkpoint: Checkpoint, options: ExportOptions) -> int:
    from ..export.onnx_directory import export_onnx

    assert request.onnx is not None
    with progress_bar(4 * checkpoint.parameters * len(options.precisions)) as advance:
        exported = export_onnx(
            checkpoint,
            request.onnx,
            options,
            force=request.force,
            need_tokenizer=not request.no_tokenizer,
            progress=advance,
            warn=warn,
        )
    return exported.bytes


def _export_triton(request: Request, checkpoint: Checkpoint) -> int:
    from ..export.triton import export_triton

    assert request.triton is not None
    options = replace(_onnx_options(request, checkpoint), safetensors=False, adapters={})
    with progress_bar(4 * checkpoint.parameters) as advance:
        exported = export_triton(checkpoint, request.triton, options, force=request.force, progress=advance, warn=warn)
    return exported.bytes


# ---------------------------------------------------------------------------------------------- verify and publish


def _verify(request: Request, checkpoint: Checkpoint, results: list[dict[str, Any]]) -> list[Report]:
    """Compare each result with the source: of ONNX, each precision."""
    from ..contract import models_in
    from ..verify.report import verify_adapter, verify_export

    reports = []
    for result in results:
        path = result["destination"]
        precisions: tuple[str | None, ...] = (None,)
        if result["format"] == "onnx":
            # An upload includes the models that were in the directory already.
            precisions = tuple(models_in(Path(path))) if request.push else request.names
        elif result["format"] == "triton":
            from ..export.triton import MODEL

            path = os.path.join(path, MODEL)
        for precision in precisions:
            reports.append(verify_export(checkpoint, path, precision=precision))
            if result["format"] == "onnx":
                for name, folder in request.adapters.items():
                    reports.append(verify_adapter(checkpoint, folder, path, name, precision=precision))
    return reports


def _push(directory: str, name: str) -> str:
    """Upload a directory. Returns its address."""
    from ..export.push import push

    click.echo(printable(f"Uploading {directory} to {name}"), err=True)
    url = push(Path(directory), name)
    click.echo(printable(f"Uploaded: {url}"), err=True)
    return url


def _show(facts: dict[str, Any], reports: list[Report], seconds: float) -> None:
    click.echo(printable(summary(facts)))
    for report in reports:
        click.echo(printable(table(report)))
    if reports:
        click.echo(f"Compared in {seconds:.1f} s.")


def summary(facts: dict[str, Any]) -> str:
    """What was written, in a few lines."""
    lines = []
    for result in facts["exports"]:
        lines.append(f"{facts['source']} -> {result['destination']}")
        lines.append(f"  {result['format']}: {result['bytes']:,} bytes, {result['seconds']:.2f} s")
    lines += [f"  note: {note}" for note in facts["notes"]]
    return "\n".join(lines)
