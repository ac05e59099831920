"""The precisions of an exported ONNX model: how each stores a weight, and how its graph computes with it.

``PRECISIONS`` is the only list of them. Importing it loads no numpy, onnx or torch.
To add a precision, write a subclass of ``Precision`` in a module of its own, and add its object to the tuple below.
"""

from __future__ import annotations

from .blockwise import BLOCK, BLOCKS, INT4, INT8
from .fp16 import FP16
from .fp32 import FP32
from .precision import Bounds, Precision
from .w8a8 import W8A8

PRECISIONS = {precision.name: precision for precision in (FP32, FP16, INT8, W8A8, INT4)}
DEFAULT = FP32.name
PAIR = "+"
"""Between the precisions of two models that share a cache: one reads prompts, the other decodes (``w8a8+int4``)."""


def precisions_in(name: str) -> tuple[Precision, ...]:
    """The precisions that a name stands for: one, or a pair.

    Raises:
        ValueError: if it is unknown, or not a pair of different precisions.
    """
    names = name.split(PAIR)
    unknown = [part for part in names if part not in PRECISIONS]
    if unknown:
        raise ValueError(f"{name!r} is not one of {', '.join(PRECISIONS)}, nor a pair of them such as w8a8+int4")
    if len(names) > 2 or len(set(names)) < len(names):
        raise ValueError(
            f"{name!r} is not a pair: one precision for prompts and another for decoding, such as w8a8+int4"
        )
    return tuple(PRECISIONS[part] for part in names)


__all__ = ["BLOCK", "BLOCKS", "DEFAULT", "FP32", "PAIR", "PRECISIONS", "Bounds", "Precision", "precisions_in"]
