"""w8a8: 8-bit weights with a scale for each column, multiplied as integers with 8-bit activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .precision import Bounds
from .quantized import QuantizedPrecision

if TYPE_CHECKING:
    from ..model import GPT2
    from .graph import Graph, Value

# 255 x 127 x 65536 is below 2**31.
LONGEST = 65536  # products of 8 by 8 bits whose sum int32 holds


class Columns(QuantizedPrecision):
    """Products are summed as integers along a column, so a whole column shares a scale."""

    def block_of(self, name: str, summed: int, block: int) -> int:
        if summed > LONGEST:
            from converters import ConversionError

            raise ConversionError(
                f"{name}: w8a8 sums at most {LONGEST} products, this matrix has {summed}. Export it as int8."
            )
        return summed

    def multiply(self, g: Graph, x: Value, numbers: Value, scale: Value, length: int, block: int) -> Any:
        """Integer product. Each row of x is rounded to 8 bits by its own largest value, so that neither the rest of the
        batch nor the chunk size changes it.

        ``gpt2x.precisions.activations.by_row`` computes the same in torch.
        """
        if x.after_gelu:
            # GELU is never below -0.17, so nearly all 8 bits go to positive values.
            zero, levels = 16, 239
            least = g.constant(levels / 94, "float32")  # so that -0.17 is at most 16 steps
            largest = g.op("Max", g.op("ReduceMax", x, g.constant([-1]), keepdims=1), least)
        else:
            zero, levels = 128, 127
            largest = g.op("ReduceMax", g.op("Abs", x), g.constant([-1]), keepdims=1)
        point, step = g.constant(zero, "uint8"), g.constant(1 / levels, "float32")
        shares = g.op("Div", x, largest)  # NaN in a row of zeros; any integers do there, as they are multiplied by 0
        rounded = g.op("QuantizeLinear", shares, step, point, dtype="uint8")
        product = g.cast(g.op("MatMulInteger", rounded, numbers, point, dtype="int32"), "float32")
        return g.op("Mul", g.op("Mul", product, largest), g.op("Mul", scale, step))

    def dequantize_rows(self, g: Graph, rows: Value, scales: Value, length: int, block: int) -> Any:
        return g.op("Mul", g.cast(rows, "float32"), scales)  # one scale for each row

    def exact(self, model: GPT2, block: int) -> GPT2:
        from .activations import by_row, round_inputs

        return round_inputs(model, by_row)


W8A8 = Columns(
    name="w8a8",
    suffix="_int8",
    transformers_js="int8",
    about="8-bit weights with a scale a column, multiplied as integers with activations of 8 bits: the fastest prompts and batches. Exact on every processor",
    bytes_per_weight=1,
    near_tie=1.5e-2,
    bits=8,
    bounds=Bounds(5e-2, 8e-3, 8e-2, 8e-3, 6e-4, 6e-3),
    worst_block=0.25,  # a whole column, whose scale may depend on one large weight
    integer_products=True,
    runtime_by_opset={23: (1, 24)},  # QuantizeLinear of opset 23
)
