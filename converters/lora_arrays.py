"""What merging an adapter needs of numpy. It is imported when a merged tensor is first read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .arrays import as_array, cast_array
from .dtypes import F32, F64, DType, whole_items
from .errors import ConversionError
from .tensors import LazyTensor

if TYPE_CHECKING:
    from .adapters import Rows
    from .lora import Product

Matrix = NDArray[np.float64]
ONE_THREAD = 1 << 18  # multiplications up to which OpenBLAS (interface/gemm.c) uses one thread


def added(tensor: LazyTensor, product: Product, dtype: DType, name: str, rows: int) -> Iterator[bytes]:
    """The bytes of a matrix with a product added, ``rows`` rows at a time."""
    if product.magnitude is None:
        for block in _sums(tensor, product, rows):
            yield cast_array(block, F64, dtype, name).tobytes()
        return
    magnitude = _wide(product.magnitude).reshape(-1)
    lengths = None if product.by_row else _column_lengths(tensor, product, rows)
    first = 0
    for block in _sums(tensor, product, rows):
        if lengths is None:
            block = _scaled(block, magnitude[first : first + len(block), None], _row_lengths(block))
        else:
            block = _scaled(block, magnitude, lengths)
        first += len(block)
        yield cast_array(block, F64, dtype, name).tobytes()


def replaced(tensor: LazyTensor, rows: Rows, dtype: DType, name: str, rows_at_once: int) -> Iterator[bytes]:
    """The bytes of a matrix with some of its rows replaced."""
    values = _wide(rows.values)
    indices = np.array(rows.indices)
    first = 0
    for block in _blocks(tensor, rows_at_once):
        inside = (indices >= first) & (indices < first + len(block))
        block[indices[inside] - first] = values[inside]
        first += len(block)
        yield cast_array(block, F64, dtype, name).tobytes()


def scaled(factor: LazyTensor, scale: float, name: str) -> Iterator[bytes]:
    """The bytes of a factor times a number, in float32.

    Raises:
        ConversionError: if a value is NaN or infinite, or does not fit into float32.
    """
    for chunk in whole_items(factor.chunks(), factor.dtype.itemsize):
        values = cast_array(as_array(chunk, factor.dtype, (-1,)), factor.dtype, F64, name)
        if not np.isfinite(values).all():
            raise ConversionError(f"{name}: the adapter holds NaN or infinity")
        with np.errstate(over="ignore"):
            product = values * scale
        yield cast_array(product, F64, F32, name).tobytes()


def spread(b: LazyTensor, enabled: tuple[bool, ...], outputs: int, rank: int) -> bytes:
    """B of some of several parts, [parts * outputs, rank, 1], as B of all of them, float64, with zeros elsewhere.

    The factors of a part are a block on the diagonal: [all parts * outputs, parts * rank].
    """
    source = _wide(b)[:, :, 0]
    result = np.zeros((len(enabled) * outputs, sum(enabled) * rank))
    parts = [part for part, is_enabled in enumerate(enabled) if is_enabled]
    for i, part in enumerate(parts):
        rows = slice(part * outputs, (part + 1) * outputs)
        result[rows, i * rank : (i + 1) * rank] = source[i * outputs : (i + 1) * outputs]
    return result.tobytes()


def _sums(tensor: LazyTensor, product: Product, rows: int) -> Iterator[Matrix]:
    """The matrix and the product, added, some rows at a time."""
    right = _wide(product.right)  # (rank, columns)
    for block, left in zip(_blocks(tensor, rows), _blocks(product.left, rows), strict=True):
        yield _sum(block, left, right, product.scale)


# A file may hold NaN, infinity and zeros: they go into the result, which is checked when it is written, without a warning.


def _sum(block: Matrix, left: Matrix, right: Matrix, scale: float) -> Matrix:
    with np.errstate(all="ignore"):
        return block + _product(left, right) * scale


def _product(left: Matrix, right: Matrix) -> Matrix:
    """left right, in tiles of columns that are small enough for one thread.

    OpenBLAS divides larger products among threads. They are finished so soon that the threads mostly wait for one another,
    which takes ten times as long on a machine that is busy.
    """
    result = np.empty((left.shape[0], right.shape[1]))
    width = max(1, ONE_THREAD // max(1, left.size))
    for first in range(0, right.shape[1], width):
        columns = slice(first, first + width)
        np.matmul(left, right[:, columns], out=result[:, columns])
    return result


def _scaled(block: Matrix, magnitude: Matrix, lengths: Matrix) -> Matrix:
    with np.errstate(all="ignore"):
        return block * (magnitude / lengths)


def _row_lengths(block: Matrix) -> Matrix:
    """(rows, 1)"""
    with np.errstate(all="ignore"):
        lengths: Matrix = np.sqrt((block * block).sum(1, keepdims=True))
        return lengths


def _column_lengths(tensor: LazyTensor, product: Product, rows: int) -> Matrix:
    """(columns,)"""
    squares = np.zeros(tensor.shape[1])
    with np.errstate(all="ignore"):
        for block in _sums(tensor, product, rows):
            squares += (block * block).sum(0)
        return np.sqrt(squares)


def _blocks(tensor: LazyTensor, rows: int) -> Iterator[Matrix]:
    """A matrix in float64, in blocks of exactly ``rows`` rows, but for the last."""
    columns = tensor.shape[1]
    size = rows * columns * tensor.dtype.itemsize
    data = bytearray()
    for chunk in tensor.chunks():
        data += chunk
        while len(data) >= size:
            yield _matrix(bytes(data[:size]), tensor.dtype, columns)
            del data[:size]
    if data:
        yield _matrix(bytes(data), tensor.dtype, columns)


def _matrix(data: bytes, dtype: DType, columns: int) -> Matrix:
    values = cast_array(as_array(data, dtype, (-1, columns)), dtype, F64, "")
    return np.array(values)  # a copy, which may be changed


def _wide(tensor: LazyTensor) -> Matrix:
    """A whole tensor in float64."""
    return cast_array(tensor.read(), tensor.dtype, F64, "")
