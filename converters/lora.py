"""Merge an adapter into the parameters of a GPT-2, tensor by tensor, while they are streamed.

Everything is computed in float64 and rounded once, to the dtype of the result: the order in which a processor adds is
lost in the rounding, and so is how a file is divided into chunks.

Sources: ``get_delta_weight`` and ``merge`` of peft's ``tuners/lora/layer.py``, ``DoraLinearVariant`` of ``variants.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from .adapters import Adapter, LowRank, Rows
from .dtypes import F64, DType
from .io.reading import CHUNK
from .spec import LM_HEAD
from .tensors import LazyTensor

ONE = LazyTensor(F64, (1, 1), lambda: iter([struct.pack("<d", 1.0)]))


@dataclass(frozen=True)
class Product:
    """A change of a matrix [rows, columns] in its own layout: scale * left right.

    Args:
        left: [rows, rank], streamed together with the matrix.
        right: [rank, columns], held in memory.
        scale: the factor of the product.
        magnitude: DoRA: the length of each column, or of each row, after the change.
        by_row: whether ``magnitude`` has a value for each row.
    """

    left: LazyTensor
    right: LazyTensor
    scale: float
    magnitude: LazyTensor | None = None
    by_row: bool = False

    @classmethod
    def of(cls, name: str, change: LowRank) -> Product:
        """The change of a parameter. Projections and embeddings are [in, out], ``lm_head`` is [out, in]."""
        if name == LM_HEAD:
            return cls(change.b, change.a, change.scale, change.magnitude, by_row=True)
        return cls(change.a.transposed(), change.b.transposed(), change.scale, change.magnitude)


def changed(name: str, tensor: LazyTensor, adapter: Adapter, dtype: DType | None = None) -> LazyTensor:
    """A parameter of the base with everything that an adapter does to it, lazily.

    Args:
        name: its canonical name.
        tensor: the base's.
        adapter: an adapter that fits the base.
        dtype: the dtype of the result, if it changes; by default the base's.
    """
    wanted = dtype or tensor.dtype
    change = adapter.factors.get(name)
    rows = adapter.rows.get(name)
    bias_of = adapter.factors.get(name.removesuffix(".bias") + ".weight") if name.endswith(".bias") else None
    if name in adapter.replaced:
        replacement = adapter.replaced[name]
        # It is rounded once, after the change.
        tensor = replacement if change else replacement.cast(wanted, name)
    if rows:
        tensor = with_rows(tensor, rows, wanted, name)
    if change:
        tensor = with_product(tensor, Product.of(name, change), wanted, name)
    if bias_of and bias_of.bias:
        tensor = _with_bias(tensor, bias_of.bias, bias_of.scale, wanted, name)
    return tensor


def with_product(tensor: LazyTensor, product: Product, dtype: DType, name: str) -> LazyTensor:
    """A matrix with a product added, lazily. With a magnitude it is read twice: once for the lengths.

    Raises (while streaming):
        ConversionError: if a finite value becomes infinite.
    """

    def stream() -> Iterator[bytes]:
        from .lora_arrays import added

        yield from added(tensor, product, dtype, name, rows=_rows_at_once(tensor))

    return LazyTensor(dtype, tensor.shape, stream, None, tensor.checksummed)


def with_rows(tensor: LazyTensor, rows: Rows, dtype: DType, name: str) -> LazyTensor:
    """A matrix with some of its rows replaced, lazily."""

    def stream() -> Iterator[bytes]:
        from .lora_arrays import replaced

        yield from replaced(tensor, rows, dtype, name, rows_at_once=_rows_at_once(tensor))

    return LazyTensor(dtype, tensor.shape, stream, None, tensor.checksummed)


def _with_bias(tensor: LazyTensor, change: LazyTensor, scale: float, dtype: DType, name: str) -> LazyTensor:
    """A bias with a scaled vector added: a product of rank 1."""
    column = (tensor.size, 1)
    product = Product(change.reshape(column), ONE, scale)
    return with_product(tensor.reshape(column), product, dtype, name).reshape(tensor.shape)


def _rows_at_once(tensor: LazyTensor) -> int:
    """A fixed number for a shape, whatever chunks the file is read in."""
    return max(1, CHUNK // (8 * tensor.shape[1]))
