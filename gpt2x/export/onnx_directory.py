"""The directory around an ONNX model, which ONNX Runtime, onnxruntime-genai, optimum and transformers.js load as it
is, from a disk and from the Hub. It holds one copy of the weights.

An export plans (``onnx_plan``), writes into a staging directory, and publishes that in one step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from converters import Checkpoint, LazyTensor
from converters.config import to_hf
from converters.containers.onnx import read_metadata
from converters.containers.safetensors import write_safetensors
from converters.dialects import HF
from converters.io.publishing import new_directory, new_file
from converters.io.reading import File
from converters.saving import Progress, Warn, watched, write_small
from converters.tensors import F32

from .. import contract
from ..precisions import PRECISIONS, Precision
from ..runtimes.adapter_files import AdapterFile, open_adapter_file
from ..task_heads import body_of
from ..tasks import GENERATION
from ..verify.sample_text import sample_ids
from .adapters import open_adapters
from .client_files import Checksums, metadata, source_name
from .model_card import model_card
from .onnx_graph import Scales, to_onnx
from .onnx_plan import SAFETENSORS, TOKENIZER, Plan, Request, locations, make_plan
from .options import DEFAULT_OPTIONS, Exported, ExportOptions
from .single_file import write_single_file
from .task_card import task_card

OF_0_1_0 = "1.23.0"  # the ONNX Runtime that models of gpt2x 0.1.0 need

__all__ = ["ExportOptions", "Exported", "export_onnx"]


def export_onnx(
    checkpoint: Checkpoint,
    path: str | Path,
    options: ExportOptions = DEFAULT_OPTIONS,
    *,
    force: bool = False,
    need_tokenizer: bool = True,
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> Exported:
    """Write a checkpoint as a directory with an ONNX model of each precision. All files appear at once, or none.

    In the source's own directory, this adds ``onnx/`` and the files that are missing beside it. In a directory with
    other precisions of the same model, it adds the new ones, and a README with all of them.

    Args:
        force: replace existing files.
        need_tokenizer: refuse a checkpoint without a tokenizer.
        progress: called with the number of tensor bytes read, as they are read.
        warn: called with a sentence if a tensor holds NaN or infinity.

    Raises:
        TokenizerError: if there is no tokenizer and one is needed.
        DestinationError: if the destination exists or cannot be written.
        ConversionError: if the source is damaged, a precision cannot represent it, or an adapter does not fit it.
        ValueError: if calibration has a token id that is not the model's.
    """
    if options.task != GENERATION:
        checkpoint = body_of(checkpoint)
    adapters = open_adapters(checkpoint, options.adapters)
    request = Request(checkpoint, Path(path), options, force, need_tokenizer, adapters)
    source = watched(checkpoint.cast(F32), progress, warn)
    with ThreadPoolExecutor(1) as pool:
        checksums = pool.submit(_checksums, checkpoint.files)
        plan = make_plan(request, checksums)
        with new_directory(request.path, force or plan.kept, plan.rivals) as stage:
            _write(stage, source, request, plan, checksums.result())
            exported = _listing(stage, request.path)
        _remove(request.path, plan.superseded)
    return exported


def _write(stage: Path, source: Checkpoint, request: Request, plan: Plan, checksums: Checksums) -> None:
    """Write all files into the staging directory."""
    options = request.options
    (stage / "onnx").mkdir()
    write_small(stage, plan.small)
    for adapter in plan.adapters:
        adapter.write(stage)
    known = dict(checksums)
    if SAFETENSORS in plan.large:
        with new_file(stage / SAFETENSORS) as out:
            write_safetensors(out, _for_transformers(source, request), to_hf(source.config))
        known[SAFETENSORS] = _sha256(stage / SAFETENSORS)  # more precisions may be exported from this file
    scales = _cache_scales(request.checkpoint, options) if contract.has_int8_cache(options.cache) else ()
    for precision in options.chosen:
        _write_model(stage, source, precision, request, known, scales)
    if plan.card:
        write_small(stage, {plan.card: _card(stage, request, plan)})


def _for_transformers(source: Checkpoint, request: Request) -> dict[str, LazyTensor]:
    """The weights as transformers' class for the task names them, with those of its head."""
    tensors = HF.write(source.tensors, source.config)
    heads = request.heads.tensors if request.options.task != GENERATION else {}
    if not heads:
        return tensors
    named = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    return {**named, **{name: tensor.cast(F32, name) for name, tensor in heads.items()}}


def _listing(stage: Path, path: Path) -> Exported:
    files = [file for file in stage.rglob("*") if file.is_file()]
    total = sum(file.stat().st_size for file in files)
    return Exported(path, total, tuple(sorted(str(file.relative_to(stage)) for file in files)))


def _remove(path: Path, names: Sequence[str]) -> None:
    for name in names:
        (path / name).unlink(missing_ok=True)


def _write_model(
    stage: Path,
    checkpoint: Checkpoint,
    precision: Precision,
    request: Request,
    checksums: Checksums,
    scales: Sequence[Scales],
) -> None:
    """Write the file of weights first, then the graph, which gives their places in it, and the one for adapters."""
    options = request.options
    data = stage / "onnx" / precision.data_file
    with new_file(data) as out:
        stored = precision.store(out, checkpoint, options.block, options.calibration)
    precision.check_activations(checkpoint, partial(_sample, checkpoint))
    facts = metadata(checkpoint, checksums, precision, options, request.lora, request.heads.labels)
    for file, lora in request.graphs(precision).items():
        model = to_onnx(
            checkpoint.config,
            precision,
            stored,
            facts,
            options.target(request.heads),
            scales=scales,
            opset=options.opset,
            lora=lora,
        )
        with new_file(stage / file) as out:
            if options.single_file:
                write_single_file(out, model, data, file)
            else:
                out.write(model.SerializeToString(deterministic=True))
    if options.single_file:
        data.unlink()


def _cache_scales(checkpoint: Checkpoint, options: ExportOptions) -> Sequence[Scales]:
    from ..precisions.calibrate import cache_scales

    return cache_scales(checkpoint, options.calibration or _sample(checkpoint))


def _sample(checkpoint: Checkpoint) -> Sequence[int]:
    """Token ids of the text that ``verify`` runs models on."""
    return sample_ids(checkpoint.config, checkpoint.tokenizer)[0]


def _card(stage: Path, request: Request, plan: Plan) -> bytes:
    """The model card of the models that are new and of those that stay."""
    checkpoint, options = request.checkpoint, request.options
    for_cpu_first = sorted(PRECISIONS.values(), key=lambda precision: not precision.for_cpu)
    precisions = [p.name for p in for_cpu_first if p.name in options.precisions or p.name in plan.others]
    runtimes = {}
    for name in precisions:
        folder = stage if name in options.precisions else request.path
        runtimes[name] = _runtime_of(folder / contract.model_file(name))
    facts: dict[str, Any] = {
        "precisions": precisions,
        "tokenizer": checkpoint.tokenizer is not None and (TOKENIZER in plan.small or _is_there(request, plan)),
        "source": source_name(checkpoint),
        "runtimes": runtimes,
        "locations": locations(request, plan.others),
        "safetensors": options.safetensors or (plan.kept and (request.path / SAFETENSORS).is_file()),
    }
    if options.task != GENERATION:
        return task_card(checkpoint.config, options.task, request.heads.labels, **facts).encode()
    generation: dict[str, Any] = {
        "cache": options.cache,
        "last": options.last,
        "outputs": options.outputs,
        "adapters": _adapters_in(stage, request, plan),
        "adapter_model": _adapter_model(stage, request, precisions[0]),
    }
    return model_card(checkpoint.config, **generation, **facts).encode()


def _adapters_in(stage: Path, request: Request, plan: Plan) -> list[AdapterFile]:
    """The adapters that are new, and those of a directory that is kept."""
    files = contract.adapters_in(request.path / "onnx") if plan.kept else {}
    files |= contract.adapters_in(stage / "onnx")
    slots = contract.factor_slots(request.checkpoint.config, request.lora)
    return [open_adapter_file(files[name], slots) for name in sorted(files)]


def _adapter_model(stage: Path, request: Request, precision: str) -> str:
    """The ONNX file of a precision that takes adapters; the model itself if it holds its weights."""
    model = contract.model_file(precision)
    folder = stage if precision in request.options.precisions else request.path
    lora = contract.lora_file(model)
    return lora if (folder / lora).is_file() else model


def _is_there(request: Request, plan: Plan) -> bool:
    """Whether a directory that is kept has a ``tokenizer.json`` already."""
    return plan.kept and (request.path / TOKENIZER).is_file()


def _runtime_of(file: Path) -> str:
    """The first version of ONNX Runtime that runs a model, as its metadata says."""
    version = read_metadata(file).get(contract.RUNTIME, "")
    return version if contract.VERSION.fullmatch(version) else OF_0_1_0


def _checksums(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of each file, by base name."""
    return {file.name: _sha256(file) for file in files}


def _sha256(path: Path) -> str:
    digest, file = hashlib.sha256(), File(path)
    for chunk in file.chunks(0, file.size):
        digest.update(chunk)
    return digest.hexdigest()
