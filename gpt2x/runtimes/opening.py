"""Opening anything that runs by what a path holds: weights, TorchScript, ``.pt2``, ONNX."""

from __future__ import annotations

import logging
import sys
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from converters import Checkpoint, FormatError, open_checkpoint
from converters.containers.torch_zip import PROGRAMS, program_in
from converters.io.reading import check_name

from ..contract import has_onnx
from .base import Decoder

log = logging.getLogger(__name__)

NAMES = {"weights": "weights", "onnx": "ONNX", **{kind: name for kind, (_, name) in PROGRAMS.items()}}


def kind_of(path: str | Path) -> str:
    """Return what a path holds, a key of ``NAMES``. A directory with weights and ONNX is "onnx"."""
    path = Path(path)
    check_name(path)
    if has_onnx(path):
        return "onnx"
    if path.is_file() and zipfile.is_zipfile(path):
        return program_in(_members(path)) or "weights"
    return "weights"


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError):
        return []  # opening it as weights reports the fault


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


def open_decoder(
    path: str | Path,
    runtime: str | None = None,
    *,
    n_head: int | None = None,
    precision: str | None = None,
    ignore_config_keys: Collection[str] = (),
) -> Decoder:
    """Open anything that runs.

    Args:
        runtime: as for ``run_kind``.
        n_head: attention heads, if nothing beside the weights says it.
        precision: which ONNX model of a directory; by default fp32, or else the only one.
        ignore_config_keys: keys to leave out of the configuration of weights.

    Raises:
        ConversionError: if it cannot be opened.
    """
    kind = run_kind(path, runtime)
    log.info("%s: run as %s", path, NAMES[kind])
    if kind == "onnx":
        from .onnxruntime import OnnxDecoder

        return OnnxDecoder(path, precision=precision)
    if precision is not None:
        raise FormatError(f"{path}: a precision is for ONNX, and this would be run as {NAMES[kind]}")
    if kind == "weights":
        return gpt2x_model(open_checkpoint(path, n_head=n_head, ignore_config_keys=ignore_config_keys))
    from .torch import ModuleDecoder

    if kind == "torchscript":
        return ModuleDecoder.from_torchscript(path)
    return ModuleDecoder.from_pt2(path)


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
