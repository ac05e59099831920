"""Opening anything that runs by what a path holds: weights, TorchScript, ``.pt2``, ONNX."""

from __future__ import annotations

import logging
import os
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from converters import Checkpoint, ConversionError, FormatError, open_checkpoint
from converters.containers.onnx import read_metadata
from converters.containers.torch_zip import PROGRAMS, program_in
from converters.io.json import parse_json
from converters.io.reading import check_name

from .. import contract
from ..contract import adapters_of, has_onnx
from ..precisions import PAIR
from ..tasks import GENERATION, task_of
from ..weight_options import WeightOptions, why_weights
from .base import Decoder
from .task_model import TaskModel

log = logging.getLogger(__name__)

START = 64  # bytes that tell an archive's kind
MAX_CONFIG = 1 << 24  # bytes; labels may have long names
NAMES = {"weights": "weights", "onnx": "ONNX", **{kind: name for kind, (_, name) in PROGRAMS.items()}}


def kind_of(path: str | Path) -> str:
    """Return what a path holds, a key of ``NAMES``. A directory with weights and ONNX is "onnx"."""
    path = Path(path)
    check_name(path)
    if has_onnx(path):
        return "onnx"
    if path.is_file() and zipfile.is_zipfile(path):
        return _program_in(path) or "weights"
    return "weights"


def home_of(path: str | Path) -> str:
    """Return where the files beside a model are: for ``onnx/model.onnx``, the directory above ``onnx``."""
    file = Path(os.path.abspath(path))
    inside = file.suffix == ".onnx" and file.parent.name == "onnx" and file.is_file()
    return str(file.parent.parent) if inside else str(path)


def _program_in(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickle = next((name for name in names if name.endswith("/data.pkl")), None)
            return program_in(names, archive.open(pickle).read(START) if pickle else b"")
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, ValueError, OSError):
        return None  # opening it as weights reports the fault


def run_kind(path: str | Path, runtime: str | None) -> str:
    """Return what of a path is run, a key of ``NAMES``.

    Args:
        runtime: "torch" runs the weights of a directory that also has ONNX; "onnx" insists on ONNX; None prefers ONNX.

    Raises:
        FormatError: if torch is asked for, and the path is an ONNX file.
    """
    kind = kind_of(path)
    if runtime == "onnx":
        return "onnx"
    if kind == "onnx" and runtime == "torch":
        if Path(path).suffix == ".onnx":
            raise FormatError(f"{path}: an ONNX model, which torch does not run")
        return "weights"
    return kind


def stored_adapter(path: str | Path, adapter: str | Path | None, runtime: str | None) -> str | None:
    """The name of an adapter beside an ONNX model, if that is what ``adapter`` means, and not a directory of PEFT's.

    It is one if an adapter of this name is there. An unknown name, which is no path either, is returned as well, so that
    the error lists the names.

    Args:
        runtime: "torch" merges adapters into weights, and never takes one that is beside an ONNX model.
    """
    if adapter is None or runtime == "torch" or "://" in str(adapter):
        return None
    here = adapters_of(Path(path))
    if str(adapter) in here or (here and not Path(adapter).exists()):
        return str(adapter)
    return None


def open_decoder(
    path: str | Path,
    runtime: str | None = None,
    *,
    precision: str | None = None,
    threads: int | None = None,
    provider: str | None = None,
    **options: Unpack[WeightOptions],
) -> Decoder:
    """Open anything that runs.

    Args:
        runtime: as for ``run_kind``.
        precision: which ONNX model of a directory; by default fp32, or else the only one.
        threads: threads of each operator; by default one for each core. For torch, it holds for the whole process.
        provider: the execution provider of an ONNX model, as in ``OnnxDecoder``; by default the CPU.
        options: how weights are opened. If one is set that selects or changes weights, the weights of a directory run
            that also has ONNX. ``adapter`` is the directory of one to merge, or the name of one that was exported.

    Raises:
        ConversionError: if it cannot be opened.
    """
    stored = stored_adapter(path, options.get("adapter"), runtime)
    if stored is not None:
        options = {**options, "adapter": None}
    reason = why_weights(options)
    kind = run_kind(path, runtime or ("torch" if reason else None))
    if reason and (kind != "weights" or precision is not None):
        what = NAMES["onnx"] if precision is not None else NAMES[kind]
        raise FormatError(f"{path}: {reason}, and this would be run as {what}")
    log.info("%s: run as %s", path, NAMES[kind])
    if kind == "onnx":
        from .onnxruntime import OnnxDecoder

        return OnnxDecoder(path, precision=precision, threads=threads, providers=(provider or "cpu",), adapter=stored)
    refuse_of_onnx(path, kind, precision=precision, provider=provider)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    decoder = _open_in_torch(path, kind, options)
    decoder.threads = threads
    return decoder


def refuse_of_onnx(path: str | Path, kind: str, **options: str | None) -> None:
    """Refuse options that only an ONNX model has, by their names.

    Raises:
        FormatError: if one is set.
    """
    for name, value in options.items():
        if value is not None:
            raise FormatError(f"{path}: a {name} is for ONNX, and this would be run as {NAMES[kind]}")


def _open_in_torch(path: str | Path, kind: str, options: WeightOptions) -> Decoder:
    if kind == "weights":
        return gpt2x_model(open_checkpoint(path, **options))
    from .torch import ModuleDecoder

    if kind == "torchscript":
        return ModuleDecoder.from_torchscript(path)
    return ModuleDecoder.from_pt2(path)


def task_of_export(path: str | Path, precision: str | None = None) -> str:
    """The task of what ``gpt2x export`` wrote, without loading the model.

    Raises:
        FormatError: if there is no such model.
    """
    kind = kind_of(path)
    if kind == "weights":
        return GENERATION
    if kind == "onnx":
        from .onnx_model import find_model

        one = precision and precision.split(PAIR)[-1]  # of a pair, the one that decodes
        return read_metadata(find_model(path, one)).get(contract.TASK, GENERATION)
    return task_of(_config_in(Path(path)))


def _config_in(path: Path) -> Mapping[str, Any]:
    """The ``config.json`` in a program of torch; nothing if there is none that can be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.endswith("extra/config.json")), None)
            if name is None or archive.getinfo(name).file_size > MAX_CONFIG:
                return {}
            return parse_json(archive.read(name), str(path))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, ValueError, OSError, ConversionError):
        return {}  # loading it reports the fault


def open_task(path: str | Path, precision: str | None = None, provider: str | None = None) -> TaskModel:
    """Open an export for a task other than text generation.

    Args:
        provider: as for ``open_decoder``.

    Raises:
        ConversionError: if it cannot be opened.
    """
    kind = kind_of(path)
    if kind == "onnx":
        from .onnx_providers import CPU
        from .onnx_task import OnnxTask

        return OnnxTask(path, precision=precision, providers=provider or CPU)
    refuse_of_onnx(path, kind, provider=provider)
    from .torch_task import ModuleTask

    return ModuleTask(path, kind)


def gpt2x_model(checkpoint: Checkpoint) -> Decoder:
    """gpt2x's own model of a checkpoint."""
    from ..load import model_of
    from .torch import TorchDecoder

    return TorchDecoder(model_of(checkpoint))


def as_decoder(model: Any) -> Decoder:
    """Return a torch module as a decoder; any other model is one already."""
    torch = sys.modules.get("torch")  # whoever has a module has imported it
    if torch is None or not isinstance(model, torch.nn.Module):
        return model  # type: ignore[no-any-return]
    from .torch import TorchDecoder

    return TorchDecoder(model)
