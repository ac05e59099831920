"""Tensors that stay on disk until they are streamed, read or mapped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .dtypes import BF16, DTYPES, EXPONENTS, F16, F32, F64, DType, whole_items
from .errors import ChecksumError
from .io.reading import CHUNK, File

if TYPE_CHECKING:
    from .arrays import Array


TRANSPOSED = 64 << 20  # bytes of a matrix that are transposed at once; the largest of the 1558M model has 41 MB


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose bytes (row-major, little-endian) are read on demand.

    ``chunks()`` streams them, a megabyte at a time, and raises ChecksumError at the end if the file has a checksum that
    does not match. ``read()`` returns one array. ``map()`` returns an array over a private memory map, if a file stores the
    bytes as they are, after the same check.
    """

    dtype: DType
    shape: tuple[int, ...]
    stream: Callable[[], Iterator[bytes]]
    mapped: Callable[[], Any] | None = None
    checksummed: bool = False
    transpose_of: LazyTensor | None = None
    stored: tuple[str, int] | None = (
        None  # type and bytes in the file, where it stands for these values and is not they
    )

    @classmethod
    def of(cls, array: Array, dtype: DType | None = None) -> LazyTensor:
        """A tensor over an array in memory. ``dtype=BF16`` takes bfloat16 as uint16."""
        found = dtype or next(d for d in DTYPES.values() if array.dtype == d.numpy)
        flat = array.reshape(-1).view("u1").data

        def stream() -> Iterator[bytes]:
            return (bytes(flat[i : i + CHUNK]) for i in range(0, len(flat), CHUNK))

        return cls(found, array.shape, stream, lambda: flat)

    @classmethod
    def of_bytes(cls, data: bytes) -> LazyTensor:
        """Bytes in memory, as uint8."""
        return cls(DTYPES["U8"], (len(data),), lambda: iter([data]))

    @classmethod
    def in_file(
        cls, file: File, offset: int, dtype: DType, shape: tuple[int, ...], checksum: Checksum | None = None
    ) -> LazyTensor:
        """A tensor whose bytes are in ``file``, contiguous from ``offset``."""
        size = math.prod(shape) * dtype.itemsize

        def stream() -> Iterator[bytes]:
            chunks = file.chunks(offset, size)
            return checksum.over(chunks) if checksum else chunks

        def mapped() -> Any:
            # A checksum is of the whole tensor, and a map is read page by page: it is verified before.
            if checksum:
                for _ in stream():
                    pass
            return file.map(offset, size)

        return cls(dtype, shape, stream, mapped, checksum is not None)

    @classmethod
    def zeros(cls, dtype: DType, shape: tuple[int, ...]) -> LazyTensor:
        """A tensor of zeros."""
        size = math.prod(shape) * dtype.itemsize
        return cls(dtype, shape, lambda: (bytes(min(CHUNK, size - i)) for i in range(0, size, CHUNK)))

    @classmethod
    def joined(cls, parts: Sequence[LazyTensor], shape: tuple[int, ...]) -> LazyTensor:
        """The values of several tensors of one dtype, concatenated, in a new shape."""

        def stream() -> Iterator[bytes]:
            return (chunk for part in parts for chunk in part.chunks())

        return cls(parts[0].dtype, shape, stream, None, all(part.checksummed for part in parts))

    @property
    def size(self) -> int:
        """How many values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes."""
        return self.size * self.dtype.itemsize

    def chunks(self) -> Iterator[bytes]:
        """The bytes in order."""
        return self.stream()

    def read(self) -> Array:
        """The whole tensor in memory; bfloat16 as uint16."""
        from .arrays import as_array

        data = bytearray(self.nbytes)
        position = 0
        for chunk in self.chunks():
            data[position : position + len(chunk)] = chunk
            position += len(chunk)
        return as_array(data, self.dtype, self.shape)

    def map(self) -> Array:
        """The whole tensor without a copy where that is possible; bfloat16 as uint16."""
        from .arrays import as_array

        return as_array(self.mapped(), self.dtype, self.shape) if self.mapped else self.read()

    def reshape(self, shape: tuple[int, ...]) -> LazyTensor:
        """The same bytes in another shape."""
        return replace(self, shape=shape, transpose_of=None)

    def transposed(self) -> LazyTensor:
        """A matrix [a, b] as [b, a], lazily. Transposing twice returns the original tensor.

        A large matrix is read in several passes, each of which collects a block of columns, so that memory holds a
        block and not the matrix.
        """
        if self.transpose_of:
            return self.transpose_of
        rows, columns = self.shape
        width = max(1, TRANSPOSED // max(1, rows * self.dtype.itemsize))  # columns in a block

        def stream() -> Iterator[bytes]:
            from .arrays import columns_of

            for begin in range(0, columns, width):
                block = columns_of(
                    self.chunks(), self.dtype, self.shape, begin, min(begin + width, columns)
                ).T  # (some columns, rows)
                step = max(1, CHUNK // max(1, rows * self.dtype.itemsize))
                yield from (block[i : i + step].tobytes() for i in range(0, len(block), step))
                del block  # before the next is made

        return LazyTensor(self.dtype, (columns, rows), stream, None, self.checksummed, self, self.stored)

    def rows(self, begin: int, end: int) -> LazyTensor:
        """Rows ``begin`` to ``end`` of a matrix, or values of a vector. The others are read, too, if that verifies a checksum."""
        row_size = math.prod(self.shape[1:]) * self.dtype.itemsize
        first, last = begin * row_size, end * row_size

        def stream() -> Iterator[bytes]:
            position = 0
            for chunk in self.chunks():
                kept = chunk[max(0, first - position) : max(0, last - position)]
                position += len(chunk)
                if kept:
                    yield kept
                if position >= last and not self.checksummed:
                    return

        mapped, total = self.mapped, self.shape[0]
        stored = (self.stored[0], self.stored[1] * (end - begin) // total) if self.stored else None
        return LazyTensor(
            self.dtype,
            (end - begin, *self.shape[1:]),
            stream,
            (lambda: mapped()[first:last]) if mapped else None,
            self.checksummed,
            stored=stored,
        )

    def first_rows(self, count: int) -> LazyTensor:
        """The first rows of a matrix."""
        return self.rows(0, count)

    def cast(self, dtype: DType, name: str) -> LazyTensor:
        """The same values in another dtype, rounded to nearest-even, lazily.

        Raises (while streaming):
            ConversionError: if a finite value becomes infinite.
        """
        if dtype == self.dtype:
            return self

        def stream() -> Iterator[bytes]:
            from .arrays import as_array, cast_array

            for chunk in whole_items(self.chunks(), self.dtype.itemsize):
                values = as_array(chunk, self.dtype, (-1,))
                yield cast_array(values, self.dtype, dtype, name).tobytes()

        origin = self.transpose_of.cast(dtype, name) if self.transpose_of else None
        return LazyTensor(dtype, self.shape, stream, None, self.checksummed, origin)


@dataclass(frozen=True)
class Checksum:
    """A checksum: how it is computed, the expected value, and the place to name in an error."""

    update: Callable[[int, bytes], int]
    expected: int
    where: str

    def over(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The chunks, unchanged; raises ChecksumError after the last one."""
        value = 0
        for chunk in chunks:
            value = self.update(value, chunk)
            yield chunk
        if value != self.expected:
            raise ChecksumError(
                f"{self.where}: checksum is {value:08x}, but the file states {self.expected:08x}: it is damaged"
            )


def all_finite(chunk: bytes, dtype: DType) -> bool:
    """Whether a chunk of whole values holds neither NaN nor infinity. The first bytes nearly always show it."""
    first = chunk[dtype.itemsize - 1 :: dtype.itemsize]
    if not any(byte in first for byte in EXPONENTS[dtype.name]):
        return True
    from .arrays import as_array, is_finite

    return bool(is_finite(as_array(chunk, dtype, (-1,)), dtype).all())


__all__ = [
    "BF16",
    "DTYPES",
    "F16",
    "F32",
    "F64",
    "Checksum",
    "DType",
    "LazyTensor",
    "all_finite",
    "whole_items",
]
