"""TensorFlow's checkpoint, V2 ("tensor bundle"): ``PREFIX.index`` and ``PREFIX.data-00000-of-00001``.

The index is an SSTable in LevelDB's table format whose values are protobufs; the data files hold the raw tensors.
Sources: TensorFlow's ``tensor_bundle.cc``, ``tensor_bundle.proto``, ``ordered_code.cc`` and ``lib/io/table*.cc``;
LevelDB's ``doc/table_format.md``. No TensorFlow is needed, to read or to write.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import FormatError, truncated
from ..io.checksums import crc32c
from ..io.protobuf import Fields, field_bytes, field_number
from ..io.publishing import new_file
from ..io.reading import File, values_file
from ..io.sstable import key_text, mask, read_table, unmask, write_index
from ..tensors import DTYPES, Checksum, DType, LazyTensor
from ..values import are_sizes
from . import tf_objects
from .container import MAX_RANK, MAX_VALUES, Container

MAX_SLICES = 256

# DataType of TensorFlow's types.proto -> ours.
TYPES = {1: "F32", 2: "F64", 3: "I32", 4: "U8", 5: "I16", 6: "I8", 9: "I64", 10: "BOOL", 14: "BF16", 17: "U16", 19: "F16", 22: "U32", 23: "U64"}  # fmt: skip
TYPE_NUMBERS = {name: number for number, name in TYPES.items()}
STRING = 7
V1 = "a TensorFlow V1 checkpoint (one file, without an .index); save it again as V2 with tf.compat.v1.train.Saver"


# ---------------------------------------------------------------------------------------------------- reading


def open_bundle(prefix: Path) -> Container:
    """Open the checkpoint at ``prefix``. Every checksum of the index is verified now, each tensor's when it is read.

    Raises:
        FormatError: if any part of it is invalid.
    """
    index = File(Path(f"{prefix}.index"))
    entries = dict(read_table(index))
    where = str(index.path)
    header = _header(entries.pop(b"", None), where)
    parsed = {key: Entry.parse(value, f"{where}: {key_text(key)}") for key, value in entries.items()}
    # The keys of slices begin with a zero byte (see slice_key).
    whole = {key: entry for key, entry in parsed.items() if not key.startswith(b"\0")}
    shards = _Shards(prefix, header.num_shards)
    for key, entry in parsed.items():
        if not entry.slices:
            shards.claim(entry, f"{where}: {key_text(key)}")
    shards.check_overlaps()
    variables = _variables(whole, shards, where)
    tensors: dict[str, LazyTensor] = {}
    left_out = []  # strings, which are not parameters
    for key, entry in sorted(whole.items()):
        if variables is not None and key == tf_objects.KEY:
            continue
        name = _name(key, where) if variables is None else variables.get(key, "")
        if entry.dtype == STRING or not name:
            left_out.append(_name(key, where))
        else:
            tensors[name] = _tensor(key, entry, parsed, shards, where)
    _check_strays(parsed, whole, where)
    return Container(
        "tf",
        prefix,
        tensors,
        left_out=tuple(left_out),
        parts=tuple(file.path for file in shards.files.values()),
    )


def _check_strays(parsed: Mapping[bytes, Entry], whole: Mapping[bytes, Entry], where: str) -> None:
    """Refuse a slice that no variable lists."""
    used = {slice_key(key, extents) for key, entry in whole.items() for extents in entry.slices}
    strays = sorted(set(parsed) - set(whole) - used)
    if strays:
        raise FormatError(f"{where}: {key_text(strays[0])} is a slice of an unknown variable")


def _variables(entries: Mapping[bytes, Entry], shards: _Shards, where: str) -> dict[bytes, str] | None:
    """Key -> the name of its variable, in an object-based checkpoint; None for one whose keys are the names."""
    graph = entries.get(tf_objects.KEY)
    if graph is None:
        return None
    where = f"{where}: {key_text(tf_objects.KEY)}"
    if graph.dtype != STRING or graph.shape or graph.size > tf_objects.MAX_GRAPH:
        raise FormatError(f"{where}: not one string of at most {tf_objects.MAX_GRAPH} bytes")
    stored = shards.file(graph.shard, where).read(graph.offset, graph.size)
    keys = [key for key, entry in entries.items() if entry.dtype != STRING]
    return tf_objects.variable_names(stored, graph.crc, keys, where)


def _name(key: bytes, where: str) -> str:
    try:
        return key.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{where}: the name {key_text(key)} is not UTF-8") from None


@dataclass(frozen=True)
class _Header:
    num_shards: int


def _header(value: bytes | None, where: str) -> _Header:
    if value is None:
        raise FormatError(f"{where}: no header: not a TensorFlow V2 checkpoint")
    if value[:1] == b"\x0a":  # field 1 is a message, not a number
        raise FormatError(f"{where}: {V1}")
    fields = Fields(value, f"{where}: header")
    if fields.number(2) != 0:
        raise FormatError(f"{where}: big-endian tensors; only little-endian ones are read")
    version = Fields(fields.bytes(3), f"{where}: header version")
    # min_consumer and bad_consumers of TensorFlow's VersionDef.
    if version.number(2) > 1 or 1 in version.numbers(3):
        raise FormatError(f"{where}: written for readers of version {version.number(2)}; gpt2x reads version 1")
    num_shards = fields.signed(1)
    if not 0 < num_shards < 100_000:
        raise FormatError(f"{where}: invalid shard count: {num_shards}")
    return _Header(num_shards)


@dataclass(frozen=True)
class Entry:
    """A BundleEntryProto: where a tensor is stored. A sliced one has ``slices`` and no data of its own."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int  # masked
    slices: tuple[tuple[tuple[int, int], ...], ...] = ()

    @classmethod
    def parse(cls, value: bytes, where: str) -> Entry:
        """Parse one entry, and check everything that does not depend on other entries."""
        fields = Fields(value, where)
        shape = _shape(fields.bytes(2), where)
        if len(fields.all_bytes(7)) > MAX_SLICES:
            raise FormatError(
                f"{where}: {len(fields.all_bytes(7))} slices of one variable, which exceeds the limit of {MAX_SLICES}"
            )
        slices = tuple(_slice(raw, shape, where) for raw in fields.all_bytes(7))
        entry = cls(
            fields.number(1), shape, fields.signed(3), fields.signed(4), fields.signed(5), fields.fixed32(6), slices
        )
        if entry.dtype not in TYPES and entry.dtype != STRING:
            raise FormatError(f"{where}: unsupported TensorFlow data type {entry.dtype}")
        if min(entry.shard, entry.offset, entry.size) < 0:
            raise FormatError(f"{where}: a negative shard, offset or size")
        expected = math.prod(shape) * DTYPES[TYPES[entry.dtype]].itemsize if entry.dtype in TYPES else entry.size
        if expected != entry.size and not slices:
            raise FormatError(f"{where}: {entry.size} bytes, but shape {list(shape)} needs {expected}")
        return entry

    def serialize(self) -> bytes:
        """The message in bytes, as TensorFlow writes it: fields in order, zeros omitted."""
        dims = b"".join(field_bytes(2, field_number(1, n)) for n in self.shape)
        # 0x35 is the tag of field 6, a number of four bytes.
        crc = b"\x35" + struct.pack("<I", self.crc) if self.crc else b""
        return (
            field_number(1, self.dtype)
            + field_bytes(2, dims)
            + field_number(3, self.shard)
            + field_number(4, self.offset)
            + field_number(5, self.size)
            + crc
        )


def _shape(data: bytes, where: str) -> tuple[int, ...]:
    fields = Fields(data, f"{where}: shape")
    if fields.number(3):
        raise FormatError(f"{where}: a shape of unknown rank")
    dims = tuple(Fields(raw, f"{where}: shape").signed(1) for raw in fields.all_bytes(2)[:9])
    if len(dims) > MAX_RANK or not are_sizes(dims, MAX_VALUES) or math.prod(dims) >= MAX_VALUES:
        raise FormatError(f"{where}: invalid shape, {list(dims[:9])}")
    return dims


def _slice(data: bytes, shape: tuple[int, ...], where: str) -> tuple[tuple[int, int], ...]:
    """A TensorSliceProto as (start, length) a dimension; length -1 is all of it."""
    messages = Fields(data, f"{where}: slice").all_bytes(1)[: len(shape) + 1]
    result = tuple(_extent(message, where) for message in messages)
    if len(result) != len(shape) or not all(map(_is_inside, result, shape)):
        raise FormatError(f"{where}: a slice {list(result)} outside the shape {list(shape)}")
    return result


def _extent(data: bytes, where: str) -> tuple[int, int]:
    fields = Fields(data, f"{where}: slice")
    return fields.signed(1), fields.signed(2) if fields.has(2) else -1


def _is_inside(extent: tuple[int, int], size: int) -> bool:
    start, length = extent
    if length == -1:
        return start == 0
    return start >= 0 and length >= 1 and start + length <= size


class _Shards:
    """The data files of a bundle, opened when an entry first refers to them."""

    def __init__(self, prefix: Path, count: int) -> None:
        self.prefix, self.count = prefix, count
        self.files: dict[int, File] = {}
        self.claims: dict[int, list[tuple[int, int, str]]] = {}

    def file(self, shard: int, where: str) -> File:
        if shard >= self.count:
            raise FormatError(f"{where}: invalid shard: data file {shard + 1} of {self.count}")
        if shard not in self.files:
            path = Path(f"{self.prefix}.data-{shard:05d}-of-{self.count:05d}")
            self.files[shard] = values_file(path, "checkpoint")
        return self.files[shard]

    def claim(self, entry: Entry, where: str) -> None:
        file = self.file(entry.shard, where)
        if entry.offset + entry.size > file.size:
            raise truncated(where, f"{entry.offset + entry.size} bytes needed, {file.path.name} has {file.size}")
        if entry.size:
            self.claims.setdefault(entry.shard, []).append((entry.offset, entry.offset + entry.size, where))

    def check_overlaps(self) -> None:
        for claims in self.claims.values():
            for (_, end, _), (start, _, where) in itertools.pairwise(sorted(claims)):
                if start < end:
                    raise FormatError(f"{where}: overlaps another tensor's bytes")


def _tensor(key: bytes, entry: Entry, entries: Mapping[bytes, Entry], shards: _Shards, where: str) -> LazyTensor:
    """The tensor of one name, or of one slice."""
    dtype = DTYPES[TYPES[entry.dtype]]
    if entry.slices:
        return _sliced(key, entry, entries, shards, dtype, f"{where}: {key_text(key)}")
    file = shards.file(entry.shard, where)
    checksum = Checksum(crc32c, unmask(entry.crc), f"{file.path}: {key_text(key)}")
    return LazyTensor.in_file(file, entry.offset, dtype, entry.shape, checksum)


def _sliced(
    key: bytes, entry: Entry, entries: Mapping[bytes, Entry], shards: _Shards, dtype: DType, where: str
) -> LazyTensor:
    """A partitioned variable, concatenated from the entries of its slices."""
    places: list[tuple[slice, ...]] = []
    parts: list[LazyTensor] = []
    for extents in entry.slices:
        sub_key = slice_key(key, extents)
        place = tuple(map(_range, extents, entry.shape))
        sub = entries.get(sub_key)
        if sub is None or sub.slices or sub.shape != _lengths(place) or sub.dtype != entry.dtype:
            raise FormatError(f"{where}: its slice {list(extents)} is missing or has another shape")
        places.append(place)
        parts.append(_tensor(sub_key, sub, entries, shards, where))
    _check_tiling(places, entry.shape, where)

    def stream() -> Iterator[bytes]:
        placed = list(zip(places, parts, strict=True))
        if all(_lengths(place[1:]) == entry.shape[1:] for place in places):  # cut along the first axis
            for _, part in sorted(placed, key=lambda item: _starts(item[0])):
                yield from part.chunks()
            return
        import numpy as np

        whole = np.empty(entry.shape, dtype.numpy)
        for place, part in placed:
            whole[place] = part.read()
        yield from LazyTensor.of(whole, dtype).chunks()

    return LazyTensor(dtype, entry.shape, stream, None, checksummed=True)


def _range(extent: tuple[int, int], size: int) -> slice:
    """The part of an axis that an extent covers."""
    start, length = extent
    return slice(0, size) if length == -1 else slice(start, start + length)


def _starts(place: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(axis.start for axis in place)


def _lengths(place: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(axis.stop - axis.start for axis in place)


def _check_tiling(places: list[tuple[slice, ...]], shape: tuple[int, ...], where: str) -> None:
    for a, b in itertools.combinations(places, 2):
        if all(x.start < y.stop and y.start < x.stop for x, y in zip(a, b, strict=True)):
            raise FormatError(f"{where}: its slices overlap")
    if sum(map(math.prod, map(_lengths, places))) != math.prod(shape):
        raise FormatError(f"{where}: its slices leave a gap")


# ------------------------------------------------------------------ the key of a slice (TensorFlow's "ordered code")


def slice_key(name: bytes, extents: Iterable[tuple[int, int]]) -> bytes:
    """The key of a slice of a partitioned variable: EncodeTensorNameSlice of TensorFlow."""
    extents = list(extents)
    parts = [_code_number(0), _code_string(name), _code_number(len(extents))]
    return b"".join([*parts, *map(_code_signed, itertools.chain.from_iterable(extents))])


def _code_number(value: int) -> bytes:
    data = value.to_bytes((value.bit_length() + 7) // 8, "big")
    return bytes([len(data)]) + data


def _code_string(value: bytes) -> bytes:
    # A zero byte becomes 00 FF, and FF becomes FF 00, so that 00 01 can only be the end. FE keeps the two replacements
    # apart.
    return value.replace(b"\xff", b"\xff\xfe").replace(b"\0", b"\0\xff").replace(b"\xff\xfe", b"\xff\0") + b"\0\x01"


def _code_signed(value: int) -> bytes:
    bits = (~value if value < 0 else value).bit_length()
    n = bits // 7 + 1
    # As in UTF-8, the leading ones of the header count the bytes. A negative number, which begins with ones itself,
    # inverts them, so that it is sorted before a positive one.
    header = (0xFF00 >> n & 0xFF) << 8 if n <= 8 else 0xFF00 | (0xFF00 >> (n - 8) & 0xFF)
    data = bytearray((value & (1 << 80) - 1).to_bytes(10, "big")[10 - n :])
    data[0] ^= header >> 8
    if n > 1:
        data[1] ^= header & 0xFF
    return bytes(data)


# ---------------------------------------------------------------------------------------------------- writing


def write_bundle(prefix: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write ``PREFIX.index`` and its one data file, as TensorFlow's BundleWriter lays them out.

    The names are sorted, and the data is contiguous in their order, as in OpenAI's release.
    """
    entries: dict[bytes, Entry] = {}
    with new_file(Path(f"{prefix}.data-00000-of-00001")) as out:
        for name, tensor in sorted(tensors.items(), key=lambda item: item[0].encode()):
            offset, crc = out.position, 0
            for chunk in tensor.chunks():
                crc = crc32c(crc, chunk)
                out.write(chunk)
            entries[name.encode()] = Entry(
                TYPE_NUMBERS[tensor.dtype.name], tensor.shape, 0, offset, tensor.nbytes, mask(crc)
            )
    with new_file(Path(f"{prefix}.index")) as out:
        write_index(out, {key: entry.serialize() for key, entry in entries.items()})
