"""int8 and int4: blocks of weights along the axis that a product sums over share a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .precision import Bounds
from .quantized import QuantizedPrecision

if TYPE_CHECKING:
    from ..model import GPT2
    from .graph import Graph, Value

BLOCKS = (16, 32, 64, 128, 256)  # that ONNX Runtime's fused product (MatMulNBits) takes
BLOCK = 32  # the default: docs/quantization.md shows the effect of others
FUSED = (1, 19)  # the first ONNX Runtime with blocks, which opset 21 brings


@dataclass(frozen=True, kw_only=True)
class Blockwise(QuantizedPrecision):
    """The graph dequantizes a matrix before the product; ONNX Runtime fuses the two."""

    block_sizes: tuple[int, ...] = BLOCKS

    def block_of(self, name: str, summed: int, block: int) -> int:
        return block

    def multiply(self, g: Graph, x: Value, numbers: Value, scale: Value, length: int, block: int) -> Any:
        # ONNX Runtime fuses DequantizeLinear and MatMul only if nothing else uses the dequantized matrix.
        return g.op("MatMul", x, _dequantize(g, numbers, scale, 0, length, block))

    def dequantize_rows(self, g: Graph, rows: Value, scales: Value, length: int, block: int) -> Any:
        return _dequantize(g, rows, scales, 2, length, block)

    def exact(self, model: GPT2, block: int) -> GPT2:
        from .activations import by_block, round_inputs

        return round_inputs(model, lambda x, after_gelu: by_block(x, block))


def _dequantize(g: Graph, numbers: Value, scales: Value, axis: int, length: int, block: int) -> Any:
    """Integers times the scales of their blocks, along an axis of this length, in float32."""
    if g.has_blocks:
        return g.op("DequantizeLinear", numbers, scales, dtype="float32", axis=axis, block_size=block)
    block_of_each = [i // block for i in range(length)]
    places = g.inline(f"blocks_of_{length}_by_{block}", block_of_each, "int64")
    return g.op("Mul", g.cast(numbers, "float32"), g.op("Gather", scales, places, axis=axis))


INT8 = Blockwise(
    name="int8",
    suffix="_quantized",
    transformers_js="q8",
    about="weights in blocks of 8-bit numbers that share a scale",
    bytes_per_weight=1,
    near_tie=1.5e-2,
    several_price=0.35,
    bits=8,
    bounds=Bounds(3e-2, 7e-3, 5.5e-2, 7e-3, 3e-4, 4e-3),
    worst_block=0.1,  # rounding to nearest has 1%; calibration and small blocks have more
    runtime_by_opset={21: FUSED},
)
INT4 = Blockwise(
    name="int4",
    suffix="_q4",
    transformers_js="q4",
    about="weights in blocks of 4-bit numbers that share a scale",
    bytes_per_weight=0.5,
    near_tie=1.5e-2,
    several_price=0.35,
    row_by_row=False,
    bits=4,
    bounds=Bounds(3e-1, 5e-2, 4.5e-1, 5e-2, 2.5e-2, 1e-1),
    worst_block=0.6,  # rounding to nearest has 10%
    min_opset=21,  # the first whose operators take int4
    runtime_by_opset={21: FUSED},
)
