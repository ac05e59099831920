"""What int8, int4 and w8a8 share: matrices of small integers with scales, everything else in float32."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .precision import Precision
from .stored import TABLES, Quantized

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from converters import Checkpoint
    from converters.io.publishing import Output

    from .graph import Graph, Value, Weight
    from .stored import Piece, Stored
    from .weights import Writer


@dataclass(frozen=True, kw_only=True)
class QuantizedPrecision(Precision):
    """Projections and token tables are quantized; position embeddings, biases and norms stay float32."""

    bits: int

    # ------------------------------------------------------------------------------------------------------- storage

    def store(self, out: Output, checkpoint: Checkpoint, block: int, calibration: Sequence[int] | None) -> Stored:
        from .weights import Writer, check_finite, with_hessians

        writer = Writer(out)
        stored: dict[str, Piece | Quantized] = {}
        for name, array, hessian in with_hessians(checkpoint, calibration):
            check_finite(name, array, self.name)
            if array.ndim < 2 or name == "wpe.weight":
                stored[name] = writer.add("float32", array.shape, array)
            else:
                stored[name] = self._store_matrix(writer, name, array, block, hessian)
        return stored

    def _store_matrix(
        self, writer: Writer, name: str, array: NDArray[Any], block: int, hessian: NDArray[Any] | None
    ) -> Quantized:
        from .weights import write_quantized

        is_table = name in TABLES
        summed = array.shape[1] if is_table else array.shape[0]
        odd_rows = is_table and array.shape[1] % 2 == 1  # 4-bit rows of an odd length would share a byte
        bits = 8 if odd_rows else self.bits
        block = self.block_of(name, summed, block)
        return write_quantized(writer, name, array, bits, block, hessian, paired=self.integer_products)

    @abstractmethod
    def block_of(self, name: str, summed: int, block: int) -> int:
        """How many weights share a scale, in a matrix whose product sums so many.

        Raises:
            ConversionError: if a sum could overflow.
        """

    # ------------------------------------------------------------------------------------------------------ lowering

    def product(self, g: Graph, x: Value, weight: Weight) -> Any:
        """``x @ weight``."""
        stored = self._stored(g, weight)
        numbers, scale = _parts(g, weight.name, stored)
        return self.multiply(g, x, numbers, scale, stored.q.shape[0], stored.block)

    def logits(self, g: Graph, x: Value, table: Weight) -> Any:
        """``x @ table.T``. The transpose is of constants: ONNX Runtime computes it once, as it loads the model."""
        stored = self._stored(g, table)
        numbers, scale = (g.op("Transpose", part, perm=[1, 0]) for part in _parts(g, table.name, stored))
        return self.multiply(g, x, numbers, scale, stored.q.shape[1], stored.block)

    def look_up(self, g: Graph, ids: Value, table: Weight) -> Any:
        """Rows of a table, (B, T, C), in float32."""
        stored = g.stored[table.name]
        if not isinstance(stored, Quantized):
            return super().look_up(g, ids, table)
        rows = _gather(g, ids, table.name, stored.q)
        scales = g.op("Gather", g.piece(f"{table.name}_scale", stored.scale), ids, axis=0)
        return self.dequantize_rows(g, rows, scales, stored.q.shape[1], stored.block)

    @abstractmethod
    def multiply(self, g: Graph, x: Value, numbers: Value, scale: Value, length: int, block: int) -> Any:
        """``x`` (B, T, K) times a quantized matrix: ``numbers`` (K, N), and ``scale`` (ceil(K / block), N).

        Args:
            length: K.
        """

    @abstractmethod
    def dequantize_rows(self, g: Graph, rows: Value, scales: Value, length: int, block: int) -> Any:
        """Rows (B, T, C) of a quantized table in float32; their scales are (B, T, ceil(C / block)).

        Args:
            length: C.
        """

    def _stored(self, g: Graph, weight: Weight) -> Quantized:
        stored = g.stored[weight.name]
        assert isinstance(stored, Quantized), f"{weight.name} is not quantized"
        return stored


def _parts(g: Graph, name: str, stored: Quantized) -> list[Value]:
    return [g.piece(name, stored.q), g.piece(f"{name}_scale", stored.scale)]


def _gather(g: Graph, ids: Value, name: str, q: Piece) -> Any:
    """Rows of integers, (B, T, C), as int8."""
    if q.dtype != "int4":
        return g.op("Gather", g.piece(name, q), ids, axis=0)
    # Gather takes no int4: the same bytes are also an initializer of uint8, two values each.
    V, C = q.shape
    pairs_of_table = q._replace(dtype="uint8", shape=(V, C // 2))
    pairs = g.op("Gather", g.piece(f"{name}_pairs", pairs_of_table), ids, axis=0)
    low = g.op("BitwiseAnd", pairs, g.constant(15, "uint8"))
    high = g.op("BitShift", pairs, g.constant(4, "uint8"), direction="RIGHT")
    halves = [g.op("Unsqueeze", half, g.constant([3])) for half in (low, high)]
    unsigned = g.op("Reshape", g.op("Concat", *halves, axis=3), g.constant([0, 0, C]))  # (B, T, C) of 0 to 15
    # Two's complement of 4 bits: flip the sign bit, then subtract 8.
    flipped = g.op("BitwiseXor", unsigned, g.constant(8, "uint8"))
    return g.cast(g.op("Sub", g.cast(flipped, "int32"), g.constant(8, "int32")), "int8")
