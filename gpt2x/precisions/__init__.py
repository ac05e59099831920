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

__all__ = ["BLOCK", "BLOCKS", "DEFAULT", "FP32", "PRECISIONS", "Bounds", "Precision"]
