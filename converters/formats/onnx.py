"""ONNX: the weights inside a model, or beside it. ``gpt2x export`` puts the configuration into the metadata."""

from __future__ import annotations

from pathlib import Path

from ..containers.container import Container
from ..io.json import parse_json
from .format import EXPORTED, FLOATS, Embedded, Format, Opener
from .huggingface import CODEC

CONFIG_KEY = "gpt2x.config"  # of metadata_props


def _matches(head: bytes, size: int) -> bool:
    """Whether field 1, the version of ONNX's format, is a small integer, and another field follows."""
    # 0x08 is the tag of field 1 (ir_version), a number, which writers put first. After it comes a number or text: wire
    # type 0 or 2.
    return len(head) > 2 and head[0] == 0x08 and 1 <= head[1] <= 32 and head[2] & 7 in (0, 2)


def _open(path: Path) -> Container:
    from ..containers.onnx import open_onnx

    return open_onnx(path, keep=(CONFIG_KEY,))


def _embedded(container: Container) -> Embedded | None:
    text = container.metadata.get(CONFIG_KEY)
    if text is None:
        return None
    return Embedded(parse_json(text.encode(), f"{container.path}: its metadata"), CODEC)


ONNX = Format(
    name="onnx",
    what="optimum, torch.onnx and gpt2x",
    files="`.onnx`, with its data beside it",
    dialect="hf",
    reads=FLOATS,
    configuration="in its metadata (gpt2x's)",
    openers=(Opener(_matches, _open, uncertain=True),),
    file_names=(
        "model.onnx",
        "decoder_model.onnx",
        "decoder_model_merged.onnx",
        "onnx/model.onnx",
        "onnx/decoder_model.onnx",
    ),
    turn=EXPORTED,
    suffixes=(".onnx",),
    codec=CODEC,
    embedded=_embedded,
)
