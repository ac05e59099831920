"""What needs numpy. It is imported when an array is first needed.

Most conversions pass bytes from one file to another; importing numpy would add a third to their time.
bfloat16, which numpy lacks, is stored as uint16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import BF16, DType, whole_items
from .errors import ConversionError

Array = NDArray[Any]


def as_array(data: Any, dtype: DType, shape: tuple[int, ...]) -> Array:
    """An array over the bytes of a buffer. They are copied only if they are not aligned."""
    raw = np.frombuffer(data, np.uint8)
    aligned = raw if raw.ctypes.data % dtype.itemsize == 0 else raw.copy()
    return aligned.view(dtype.numpy).reshape(shape)


def cast_array(values: Array, source: DType, target: DType, name: str) -> Array:
    """``values`` in another dtype, rounded to nearest-even.

    float64 goes to bfloat16 by way of float32, as in torch.

    Raises:
        ConversionError: if a finite value becomes infinite.
    """
    wide = _widened(values) if source == BF16 else values
    # numpy would warn of an overflow. It is looked for below, and the error names the tensor.
    with np.errstate(over="ignore", invalid="ignore"):
        result = _to_bfloat16(wide.astype(np.float32)) if target == BF16 else wide.astype(target.numpy)
    lost = np.isfinite(wide) & ~is_finite(result, target)
    if lost.any():
        largest = float(np.abs(wide[lost].astype(np.float64)).max())
        raise ConversionError(f"{name}: {largest:g} does not fit into {target}; choose another --dtype")
    return result


def columns_of(chunks: Iterator[bytes], dtype: DType, shape: tuple[int, ...], begin: int, end: int) -> Array:
    """Columns of a matrix [a, b]: an array [a, end - begin], collected while the whole matrix is streamed."""
    rows, columns = shape
    result = np.empty((rows, end - begin), dtype.numpy)
    row = 0
    for chunk in whole_items(chunks, columns * dtype.itemsize):
        values = as_array(chunk, dtype, (-1, columns))
        result[row : row + len(values)] = values[:, begin:end]
        row += len(values)
    return result


def is_finite(values: Array, dtype: DType) -> NDArray[np.bool_]:
    """Elementwise: neither NaN nor infinite."""
    result: NDArray[np.bool_] = np.isfinite(_widened(values) if dtype == BF16 else values)
    return result


def _widened(bfloat16: Array) -> NDArray[np.float32]:
    # A bfloat16 is the upper half of a float32.
    return (bfloat16.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    # To nearest-even: add just less than half of the last bit that stays, and that bit itself.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40  # a NaN stays a NaN for any payload
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def to_q8_0(values: NDArray[np.float32], name: str) -> bytes:
    """Blocks of Q8_0, rounded as ggml's reference does: half away from zero, with a scale of the largest magnitude / 127.

    Raises:
        ConversionError: if a block holds NaN, infinity or a magnitude that Q8_0 cannot represent.
    """
    blocks = values.reshape(-1, 32)
    result = np.empty(len(blocks), np.dtype([("scale", "<f2"), ("values", "i1", 32)]))
    # float32 throughout, as in ggml: in float64, some values would be rounded to another integer.
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scale = np.abs(blocks).max(axis=1) / np.float32(127)
        result["scale"] = scale
        if not np.isfinite(result["scale"]).all():
            raise ConversionError(
                f"{name}: holds NaN, infinity, or a magnitude that Q8_0 cannot represent; choose another --dtype"
            )
        inverse = np.float32(1) / scale
        # A block of zeros has no inverse scale; ggml takes 0.
        scaled = blocks * np.where(np.isfinite(inverse), inverse, np.float32(0))[:, None]
    size = np.abs(scaled)
    whole = np.floor(size)
    result["values"] = np.copysign(whole + (size - whole >= np.float32(0.5)), scaled)
    return result.tobytes()
