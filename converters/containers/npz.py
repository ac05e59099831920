"""NumPy's ``.npz``: a zip archive of stored ``.npy`` members, each a short header and the bytes of one array.

The header is the text of a Python dict. It is matched with a pattern and never evaluated; arrays of Python objects, which
NumPy stores as pickles, are refused. Source: ``numpy/lib/format.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..dtypes import BY_NUMPY
from ..errors import FormatError, UnsafeError
from ..io.reading import File
from ..tensors import DType, LazyTensor
from .container import MAX_RANK, MAX_VALUES, Container
from .zip_members import Member, check_stored, read_members

SUFFIX = ".npy"
MAGIC = b"\x93NUMPY"
LENGTHS = {1: 2, 2: 4, 3: 4}  # version -> bytes of the header's length
MAX_HEADER = 10_000  # bytes, as numpy.load's own limit
HEADER = re.compile(
    rb"\{'descr': '([^'\\]{2,20})', 'fortran_order': (True|False), 'shape': \(((?:\d{1,19}(?:, ?|(?=\))))*)\), \} *\n"
)


def open_npz(path: Path) -> Container:
    """Open an archive of arrays.

    Raises:
        UnsafeError: if an array holds Python objects.
        FormatError: if the archive or the header of an array is invalid, or of a kind that is not read.
    """
    file = File(path)
    members = read_members(file)
    check_stored(file, members, "save it with numpy.savez, not numpy.savez_compressed")
    tensors: dict[str, LazyTensor] = {}
    for name, member in members.items():
        if not name.endswith(SUFFIX):
            raise FormatError(f"{path}: {name[:100]!r} is not an array ({SUFFIX})")
        tensors[name.removesuffix(SUFFIX)] = _tensor(file, name, member)
    return Container("npz", path, tensors)


@dataclass(frozen=True)
class _Header:
    """What the header of an array states; ``size`` is its own length in bytes."""

    size: int
    dtype: DType
    shape: tuple[int, ...]
    is_fortran: bool


def _tensor(file: File, name: str, member: Member) -> LazyTensor:
    where = f"{file.path}: {name[:100]!r}"
    header = _header(file, member, where)
    nbytes = math.prod(header.shape) * header.dtype.itemsize
    if header.size + nbytes != member.size:
        raise FormatError(
            f"{where}: {member.size - header.size} bytes of data, but {list(header.shape)} of {header.dtype} needs {nbytes}"
        )
    whole = member.tensor(file, name)

    def stream() -> Iterator[bytes]:
        return _without_first(whole.chunks(), header.size)

    def mapped() -> object:
        assert whole.mapped
        return whole.mapped()[header.size :]

    stored = header.shape[::-1] if header.is_fortran else header.shape
    tensor = LazyTensor(header.dtype, stored, stream, mapped, checksummed=True)
    return tensor.transposed() if header.is_fortran and len(stored) == 2 else tensor


def _without_first(chunks: Iterator[bytes], count: int) -> Iterator[bytes]:
    """The same bytes without the first ones."""
    for chunk in chunks:
        yield chunk[count:]
        count = max(0, count - len(chunk))


def _header(file: File, member: Member, where: str) -> _Header:
    start = file.read(member.start, min(member.size, len(MAGIC) + 6))
    version = start[len(MAGIC)] if len(start) == len(MAGIC) + 6 else 0
    if not start.startswith(MAGIC) or version not in LENGTHS:
        raise FormatError(f"{where}: not an array in NumPy's format")
    before = len(MAGIC) + 2 + LENGTHS[version]
    size = int.from_bytes(start[len(MAGIC) + 2 : before], "little")
    if size > min(MAX_HEADER, member.size - before):
        raise FormatError(f"{where}: a header of {size} bytes, which exceeds its {member.size} bytes, or {MAX_HEADER}")
    match = HEADER.fullmatch(file.read(member.start + before, size))
    if not match:
        raise FormatError(f"{where}: an array with a header that NumPy does not write")
    descriptor, order, sizes = match.groups()
    return _Header(before + size, _dtype(descriptor, where), _shape(sizes, where, order), order == b"True")


def _dtype(descriptor: bytes, where: str) -> DType:
    text = descriptor.decode("latin-1")
    if text[1:].startswith("O"):
        raise UnsafeError(f"{where}: an array of Python objects, which NumPy stores as a pickle: refused")
    if text not in BY_NUMPY:
        raise FormatError(f"{where}: values of the type {text!r}, which gpt2x does not read")
    return BY_NUMPY[text]


def _shape(sizes: bytes, where: str, order: bytes) -> tuple[int, ...]:
    shape = tuple(int(size) for size in re.findall(rb"\d+", sizes))
    if len(shape) > MAX_RANK or math.prod(shape) >= MAX_VALUES:
        raise FormatError(f"{where}: invalid shape, {list(shape)[:9]}")
    if order == b"True" and len(shape) > 2:
        raise FormatError(
            f"{where}: an array of {len(shape)} axes in Fortran's order; save numpy.ascontiguousarray of it"
        )
    return shape
