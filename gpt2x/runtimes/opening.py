"""Whatever can be run and compared, opened by what it is: weights, TorchScript, ``.pt2``, ONNX."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from converters import Checkpoint, FormatError, open_checkpoint
from converters.containers.torch_zip import PROGRAMS, program_in
from converters.io.reading import check_name

from ..contract import has_onnx
from .base import Decoder, Subject

NAMES = {"weights": "weights", "onnx": "ONNX", **{kind: name for kind, (_, name) in PROGRAMS.items()}}


def kind_of(path: str | Path) -> str:
    """What a path holds, of ``NAMES``. Of a directory that has ONNX, the ONNX is meant."""
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
        return []  # whoever opens it as weights says what is wrong


def open_subject(
    path: str | Path, runtime: str | None = None, *, n_head: int | None = None, precision: str | None = None
) -> Subject:
    """Open anything that can be run.

    Args:
        runtime: "torch" runs the weights of a directory that has ONNX as well; "onnx" insists on ONNX.
        precision: which ONNX model of a directory; by default fp32, or else the only one.

    Raises:
        ConversionError: if it cannot be opened.
    """
    kind = kind_of(path)
    if runtime == "onnx" or (kind == "onnx" and runtime is None):
        from .onnxruntime import OnnxDecoder

        return OnnxDecoder(path, precision=precision)
    if kind == "onnx" and Path(path).suffix == ".onnx":
        raise FormatError(f"{path}: an ONNX model, which torch does not run")
    if precision is not None:
        meant = NAMES["weights" if kind == "onnx" else kind]
        raise FormatError(f"{path}: precisions are for ONNX, and this would be run as {meant}")
    from .torch import ModuleDecoder

    if kind == "torchscript":
        return ModuleDecoder.from_torchscript(path)
    if kind == "pt2":
        return ModuleDecoder.from_pt2(path)
    return gpt2x_model(open_checkpoint(path, n_head=n_head))


def gpt2x_model(checkpoint: Checkpoint) -> Subject:
    """gpt2x's own model of a checkpoint."""
    from ..load import model_of
    from .torch import TorchDecoder

    return TorchDecoder(model_of(checkpoint))


def as_decoder(model: Any) -> Decoder:
    """A runtime as it is; a torch ``GPT2`` as a runtime."""
    if hasattr(model, "step"):
        return model  # type: ignore[no-any-return]
    from .torch import TorchDecoder

    return TorchDecoder(model)
