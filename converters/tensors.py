"""A tensor that is still on disk, the number formats, and casts between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from .errors import ChecksumError, ConversionError
from .files import CHUNK, Bytes, File

Array = NDArray[Any]


@dataclass(frozen=True)
class DType:
    """A number format, named as safetensors names it. bfloat16, which numpy lacks, travels as uint16."""

    name: str
    numpy: str

    @property
    def itemsize(self) -> int:
        """Bytes a value."""
        return np.dtype(self.numpy).itemsize

    @property
    def is_float(self) -> bool:
        """Whether a parameter may have it."""
        return self.name in ("F64", "F32", "F16", "BF16")

    def __str__(self) -> str:
        return self.name


F64, F32, F16, BF16 = DType("F64", "<f8"), DType("F32", "<f4"), DType("F16", "<f2"), DType("BF16", "<u2")
DTYPES = {
    d.name: d
    for d in (
        F64, F32, F16, BF16, DType("I64", "<i8"), DType("I32", "<i4"), DType("I16", "<i2"), DType("I8", "|i1"),
        DType("U64", "<u8"), DType("U32", "<u4"), DType("U16", "<u2"), DType("U8", "|u1"), DType("BOOL", "|b1"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose bytes (row-major, little-endian) are read when they are asked for.

    ``chunks()`` streams them, a megabyte at a time, and raises ChecksumError at the end if the file carries a checksum
    that they do not meet. ``read()`` gives one array. ``map()`` gives an array over a private memory map where the
    bytes lie in a file as they are, after the same check.
    """

    dtype: DType
    shape: tuple[int, ...]
    stream: Callable[[], Iterator[Bytes]]
    mapped: Callable[[], Bytes] | None = None
    checksummed: bool = False

    @classmethod
    def of(cls, array: Array, dtype: DType | None = None) -> LazyTensor:
        """A tensor over an array in memory. ``dtype=BF16`` takes bfloat16 as uint16."""
        found = dtype or next(d for d in DTYPES.values() if np.dtype(d.numpy) == array.dtype)
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

        def stream() -> Iterator[Bytes]:
            return (flat[i : i + CHUNK] for i in range(0, len(flat), CHUNK))

        return cls(found, array.shape, stream, lambda: flat)

    @classmethod
    def in_file(
        cls, file: File, offset: int, dtype: DType, shape: tuple[int, ...], checksum: Checksum | None = None
    ) -> LazyTensor:
        """A tensor whose bytes lie in ``file``, contiguous from ``offset``."""
        size = math.prod(shape) * dtype.itemsize

        def stream() -> Iterator[Bytes]:
            chunks = file.chunks(offset, size)
            return checksum.over(chunks) if checksum else chunks

        def mapped() -> Bytes:
            data = file.map(offset, size)
            if checksum:
                for _ in checksum.over(iter([data])):
                    pass
            return data

        return cls(dtype, shape, stream, mapped, checksum is not None)

    @property
    def size(self) -> int:
        """How many values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes."""
        return self.size * self.dtype.itemsize

    def chunks(self) -> Iterator[Bytes]:
        """The bytes in order."""
        return self.stream()

    def read(self) -> Array:
        """The whole tensor in memory; bfloat16 as uint16."""
        data = np.empty(self.nbytes, np.uint8)
        position = 0
        for chunk in self.chunks():
            data[position : position + len(chunk)] = chunk
            position += len(chunk)
        return data.view(self.dtype.numpy).reshape(self.shape)

    def map(self) -> Array:
        """The whole tensor without a copy where that is possible; bfloat16 as uint16."""
        if self.mapped is None:
            return self.read()
        data = self.mapped()
        if data.ctypes.data % self.dtype.itemsize:  # a file may put it at an odd place
            data = data.copy()
        return data.view(self.dtype.numpy).reshape(self.shape)

    def reshape(self, shape: tuple[int, ...]) -> LazyTensor:
        """The same bytes under another shape."""
        return replace(self, shape=shape)

    def cast(self, dtype: DType, name: str) -> LazyTensor:
        """The same values, rounded to nearest-even, in another number format, still lazily.

        Raises (while streaming):
            ConversionError: if a finite value becomes infinite.
        """
        if dtype == self.dtype:
            return self

        def stream() -> Iterator[Bytes]:
            for chunk in whole_items(self.chunks(), self.dtype.itemsize):
                yield cast_array(chunk.view(self.dtype.numpy), self.dtype, dtype, name).view(np.uint8)

        return LazyTensor(dtype, self.shape, stream, None, self.checksummed)


@dataclass(frozen=True)
class Checksum:
    """A running checksum, what it should come to, and the words for when it does not."""

    update: Callable[[int, Bytes], int]
    expected: int
    where: str

    def over(self, chunks: Iterator[Bytes]) -> Iterator[Bytes]:
        """The chunks, unchanged; raises ChecksumError after the last one."""
        value = 0
        for chunk in chunks:
            value = self.update(value, chunk)
            yield chunk
        if value != self.expected:
            raise ChecksumError(
                f"{self.where}: checksum is {value:08x}, the file says {self.expected:08x}: it is damaged"
            )


def crc32c(value: int, data: bytes | Bytes) -> int:
    """CRC-32C (Castagnoli), extended."""
    return int(google_crc32c.extend(value, data))


def whole_items(chunks: Iterator[Bytes], itemsize: int) -> Iterator[Bytes]:
    """The same bytes in chunks that never split a value."""
    rest = np.empty(0, np.uint8)
    for chunk in chunks:
        data = np.concatenate((rest, chunk)) if len(rest) else chunk
        cut = len(data) - len(data) % itemsize
        rest = data[cut:].copy()
        if cut:
            yield data[:cut] if data[:cut].ctypes.data % itemsize == 0 else data[:cut].copy()


def cast_array(values: Array, source: DType, target: DType, name: str) -> Array:
    """``values`` (bfloat16 as uint16) in another number format, rounded to nearest-even.

    float64 goes to bfloat16 by way of float32, as in torch.
    """
    wide = (values.astype(np.uint32) << 16).view(np.float32) if source == BF16 else values
    with np.errstate(over="ignore", invalid="ignore"):
        result = _to_bfloat16(wide.astype(np.float32)) if target == BF16 else wide.astype(target.numpy)
    lost = np.isfinite(wide) & ~is_finite(result, target)
    if lost.any():
        largest = float(np.abs(wide[lost].astype(np.float64)).max())
        raise ConversionError(f"{name}: {largest:g} does not fit into {target}; choose another --dtype")
    return result


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40  # a NaN stays a NaN whatever its payload
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def is_finite(values: Array, dtype: DType) -> NDArray[np.bool_]:
    """Elementwise: neither NaN nor infinite."""
    if dtype == BF16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    result: NDArray[np.bool_] = np.isfinite(values)
    return result


def all_finite(chunk: Bytes, dtype: DType) -> bool:
    """Whether a chunk of whole values holds no NaN and no infinity. Cheap: a sum tells, nearly always."""
    values = chunk.view(dtype.numpy)
    if dtype in (F32, F64):
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(np.add.reduce(values)):
                return True
    return bool(is_finite(values, dtype).all())
