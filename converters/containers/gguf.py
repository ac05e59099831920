"""GGUF, the format of llama.cpp: metadata, a list of tensors, and their data, aligned.

The types of tensors are in ``gguf_types.py``. Sources: ``docs/gguf.md`` of ggml; ``ggml-quants.c`` for how Q8_0 is rounded.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..dtypes import whole_items
from ..errors import CheckpointError, FormatError, truncated
from ..io.publishing import Output
from ..io.reading import Cursor, File
from ..tensors import F32, LazyTensor
from ..values import is_list_of
from .container import MAX_VALUES, Container
from .gguf_types import PLAIN, Q8_0, TYPES, UNREAD, TensorType

MAGIC = b"GGUF"
# Version 1 had lengths of 32 bits. llama.cpp does not read it any more, either.
VERSIONS = (2, 3)
ALIGNMENT = 32
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
MAX_ITEMS = 1_000_000  # of metadata, tensors and arrays, as there are tokens in the largest vocabularies
MAX_STRING = 1 << 20
MAX_RANK = 4

# Types of metadata -> format of ``struct``. 8 is a string, 9 an array.
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
UINT32, FLOAT32, INT32 = 4, 6, 5


# ---------------------------------------------------------------------------------------------------- reading


def open_gguf(path: Path, check: Callable[[Mapping[str, Any], str], None] | None = None) -> Container:
    """Open a GGUF file, which may be one part of several (``gguf_split.py``).

    Args:
        path: the file.
        check: called with the metadata and the path before the tensors are looked at; it may raise.

    Raises:
        FormatError: if any part of it is invalid.
        CheckpointError: if a tensor is of a type that is not read.
    """
    file = File(path)
    cursor = Cursor(file)
    magic, version = cursor.take(4), cursor.number("<I")
    if magic != MAGIC or version not in VERSIONS:
        # In a big-endian file, the bytes of the version are reversed.
        swapped = version in (v << 24 for v in VERSIONS)
        raise FormatError(f"{path}: {'big-endian GGUF' if swapped else f'GGUF of version {version}'}; 2 and 3 are read")
    n_tensors, n_metadata = cursor.number("<Q"), cursor.number("<Q")
    metadata = _metadata(cursor, n_metadata)
    if check:
        check(metadata, str(path))
    infos = [_info(cursor) for _ in range(_count(n_tensors, cursor))]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    # ggml allows powers of two.
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise FormatError(f"{path}: general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    if infos or not is_part(metadata):  # the first part may hold metadata only
        _check_places(file, infos, start, alignment)
    tensors = {info.name: _tensor(file, start, info) for info in infos}
    return Container("gguf", path, tensors, metadata, notes=tuple(notes_on(tensors)))


def is_part(metadata: Mapping[str, Any]) -> bool:
    """Whether a file is one of several that were split."""
    return bool(metadata.get(SPLIT_COUNT, 1) != 1)


def notes_on(tensors: Mapping[str, LazyTensor]) -> Iterator[str]:
    """What the user should know of the types of tensors."""
    counts = Counter(tensor.stored[0] for tensor in tensors.values() if tensor.stored)
    if counts:
        types = ", ".join(f"{count} x {name}" for name, count in counts.items())
        yield f"{counts.total()} tensors are quantized ({types}): they are read as F32: the rounded values that they store"


def _count(count: int, cursor: Cursor) -> int:
    # An item has at least one byte, so a list is never longer than the rest of the file.
    if count > min(MAX_ITEMS, cursor.end - cursor.position):
        raise truncated(
            cursor.file.path, f"{count} items needed after byte {cursor.position}, the file has {cursor.end}"
        )
    return count


def _string(cursor: Cursor) -> str:
    size = cursor.number("<Q")
    if size > MAX_STRING:
        raise FormatError(f"{cursor.file.path}: a string of {size} bytes before byte {cursor.position}")
    data = cursor.take(size)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{cursor.file.path}: a string before byte {cursor.position} is not UTF-8") from None


def _metadata(cursor: Cursor, count: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for _ in range(_count(count, cursor)):
        key, kind = _string(cursor), cursor.number("<I")
        if key in result:
            raise FormatError(f"{cursor.file.path}: duplicate key {key[:100]!r}")
        result[key] = _array(cursor, key) if kind == ARRAY else _value(cursor, kind, key)
    return result


def _value(cursor: Cursor, kind: int, key: str) -> Any:
    if kind == STRING:
        return _string(cursor)
    if kind not in SCALARS:
        raise FormatError(f"{cursor.file.path}: {key[:100]!r} is of an unknown type ({kind})")
    return cursor.number(SCALARS[kind])


def _array(cursor: Cursor, key: str) -> list[Any]:
    kind, count = cursor.number("<I"), cursor.number("<Q")
    if kind == ARRAY:
        raise FormatError(f"{cursor.file.path}: {key[:100]!r} is an array of arrays")
    return [_value(cursor, kind, key) for _ in range(_count(count, cursor))]


@dataclass(frozen=True)
class _Info:
    name: str
    shape: tuple[int, ...]  # outermost first; the file stores the reverse
    kind: TensorType
    offset: int  # from the start of the data

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.values * self.kind.nbytes


def _info(cursor: Cursor) -> _Info:
    name, rank = _string(cursor), cursor.number("<I")
    where = f"{cursor.file.path}: {name[:100]!r}"
    if not 0 < rank <= MAX_RANK or "\0" in name:
        raise FormatError(f"{where}: not a tensor of 1 to {MAX_RANK} dimensions with a proper name")
    shape = tuple(cursor.number("<Q") for _ in range(rank))[::-1]
    number, offset = cursor.number("<I"), cursor.number("<Q")
    kind = TYPES.get(number)
    if kind is None:
        raise CheckpointError(
            f"{where}: the type {UNREAD.get(number, f'number {number}')} is not supported; run 'gpt2x formats' for a list. "
            "Convert the file that it was made from"
        )
    if math.prod(shape) >= MAX_VALUES:
        raise FormatError(f"{where}: invalid shape, {list(shape)}")
    if shape[-1] % kind.values:
        raise FormatError(
            f"{where}: invalid shape, {list(shape)}: {kind.name} needs rows of a multiple of {kind.values}"
        )
    return _Info(name, shape, kind, offset)


def _check_places(file: File, infos: Sequence[_Info], start: int, alignment: int) -> None:
    """Check that the tensors cover the data from ``start`` to the end, each aligned, with only padding between them."""
    if len({info.name for info in infos}) != len(infos):
        twice = next(a for a, b in itertools.pairwise(sorted(info.name for info in infos)) if a == b)
        raise FormatError(f"{file.path}: duplicate tensor {twice[:100]!r}")
    if not infos:
        raise FormatError(
            f"{file.path}: no tensors in it, only metadata, such as a vocabulary; pass the GGUF file of the whole model"
        )
    end = start
    # By size, too: an empty tensor has the offset of the one after it.
    for info in sorted(infos, key=lambda info: (info.offset, info.nbytes)):
        begin = start + info.offset
        if info.offset % alignment or begin != -(-end // alignment) * alignment:
            raise FormatError(
                f"{file.path}: {info.name[:100]!r} has the offset {info.offset}, which does not follow the tensor before it"
            )
        end = begin + info.nbytes
    fault = f"{file.size} bytes, but its tensors end at byte {end}"
    if file.size < end:
        raise truncated(file.path, fault)
    if file.size > -(-end // alignment) * alignment:
        raise FormatError(f"{file.path}: {fault}")


def _tensor(file: File, start: int, info: _Info) -> LazyTensor:
    begin = start + info.offset
    if not info.kind.is_quantized:
        return LazyTensor.in_file(file, begin, info.kind.dtype, info.shape)

    def stream() -> Iterator[bytes]:
        return _dequantized(file.chunks(begin, info.nbytes), info.kind)

    return LazyTensor(F32, info.shape, stream, stored=(info.kind.name, info.nbytes))


def _dequantized(chunks: Iterator[bytes], kind: TensorType) -> Iterator[bytes]:
    from .gguf_quants import dequantize

    for chunk in whole_items(chunks, kind.nbytes):
        for values in dequantize(kind, chunk):
            yield values.tobytes()


# ---------------------------------------------------------------------------------------------------- writing


def write_gguf(
    out: Output, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, Any], quantized: Sequence[str] = ()
) -> None:
    """Write a GGUF file, version 3. The tensors named in ``quantized`` are rounded to Q8_0.

    Metadata: str, bool, int (unsigned, 32 bits), float (32 bits), or a list of str or int (signed).
    """
    infos = []
    offset = 0
    for name, tensor in tensors.items():
        kind = Q8_0 if name in quantized else next(kind for kind in PLAIN if kind.dtype == tensor.dtype)
        infos.append(_Info(name, tensor.shape, kind, offset))
        offset += -(-infos[-1].nbytes // ALIGNMENT) * ALIGNMENT
    head = MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(infos), len(metadata))
    head += b"".join(_packed(key) + _typed(value) for key, value in metadata.items())
    for info in infos:
        head += _packed(info.name) + struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *info.shape[::-1])
        head += struct.pack("<IQ", info.kind.number, info.offset)
    out.write(head)
    for info in infos:
        _align(out)
        for chunk in _stored(info.name, tensors[info.name], info.kind):
            out.write(chunk)
    _align(out)


def _align(out: Output) -> None:
    out.write(bytes(-out.position % ALIGNMENT))


def _stored(name: str, tensor: LazyTensor, kind: TensorType) -> Iterator[bytes]:
    if kind != Q8_0:
        yield from tensor.chunks()
        return
    from ..arrays import as_array, to_q8_0

    for chunk in whole_items(tensor.cast(F32, name).chunks(), Q8_0.values * F32.itemsize):
        yield to_q8_0(as_array(chunk, F32, (-1,)), name)


def through_q8_0(tensor: LazyTensor, name: str) -> LazyTensor:
    """A tensor's values after rounding to Q8_0 and back.

    Raises (while streaming):
        ConversionError: if a block holds NaN, infinity or a magnitude that Q8_0 cannot represent.
    """

    def stream() -> Iterator[bytes]:
        return _dequantized(_stored(name, tensor, Q8_0), Q8_0)

    return LazyTensor(F32, tensor.shape, stream)


def _packed(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: Any) -> bytes:
    if isinstance(value, list):
        if is_list_of(value, str):
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_packed, value))
        return struct.pack(f"<IIQ{len(value)}i", ARRAY, INT32, len(value), *value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _packed(value)
    # Before int: in Python, a bool is one.
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    return struct.pack("<II", UINT32, value) if isinstance(value, int) else struct.pack("<If", FLOAT32, value)
