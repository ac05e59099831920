"""TensorFlow's checkpoint, V2 ("tensor bundle"): ``PREFIX.index`` and ``PREFIX.data-00000-of-00001``.

The index is an SSTable in LevelDB's table format whose values are protobufs; the data files hold the raw tensors.
Sources: TensorFlow's ``tensor_bundle.cc``, ``tensor_bundle.proto``, ``ordered_code.cc`` and ``lib/io/table*.cc``;
LevelDB's ``doc/table_format.md``. No TensorFlow is needed, to read or to write.
"""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .container import Container
from .errors import FormatError
from .files import File, Output, new_file
from .tensors import DTYPES, Checksum, DType, LazyTensor, crc32c

MAGIC = 0xDB4775248B80FB57
FOOTER = 48
TRAILER = 5  # a byte for the compression, four for the checksum
RESTART_INTERVAL = 16  # TensorFlow's, and so are the next two
BLOCK_SIZE = 256 << 10
MAX_NAME = 4096
MAX_NAMES = 16 << 20  # bytes of all names together, whose beginnings the file may share
MAX_SLICES = 256
MAX_INDEX = 64 << 20  # of GPT-2's 1558M: 25 KB

# DataType of TensorFlow's types.proto -> ours.
TYPES = {1: "F32", 2: "F64", 3: "I32", 4: "U8", 5: "I16", 6: "I8", 9: "I64", 10: "BOOL", 14: "BF16", 17: "U16", 19: "F16", 22: "U32", 23: "U64"}  # fmt: skip
TYPE_NUMBERS = {name: number for number, name in TYPES.items()}
STRING = 7
V1 = "a TensorFlow V1 checkpoint (one file, without an .index); save it again as V2 with tf.compat.v1.train.Saver"


def prefix_of(path: Path) -> Path | None:
    """The prefix that ``path`` stands for: itself, its ``.index``, one of its ``.data`` files, or None."""
    name = re.sub(r"\.(index|data-\d{5}-of-\d{5})$", "", path.name)
    if name in ("", ".", "..") or (name == path.name and path.exists()):
        return None
    prefix = path.with_name(name)
    return prefix if name != path.name or Path(f"{prefix}.index").is_file() else None


def find_prefix(directory: Path) -> Path | None:
    """The checkpoint in a directory: the one that the file ``checkpoint`` names, else the only one there.

    Raises:
        FormatError: if there are several and ``checkpoint`` names none of them, or names one elsewhere.
    """
    found = sorted(p.with_suffix("") for p in directory.glob("*.index") if p.is_file())
    state = directory / "checkpoint"
    named = _named_prefix(state) if state.is_file() else None
    if named in found:
        return named
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise FormatError(f"{directory}: several checkpoints ({names}); give the prefix of one")
    if named and found:
        raise FormatError(
            f"{state}: names {named.name!r}, which is not here; give the prefix {found[0]} if that is meant"
        )
    if named and named.is_file():
        raise FormatError(f"{named}: {V1}")
    if named:
        raise FormatError(f"{state}: names {named.name!r}, but {named.name}.index is not here")
    return found[0] if found else None


def _named_prefix(state: Path) -> Path | None:
    # The name is often the absolute path of the machine that saved it: only its last component means anything here.
    file = File(state)
    match = re.search(rb'^[ \t]*model_checkpoint_path:\s*"([^"\n]*)"', file.read(0, min(file.size, 1 << 16)), re.M)
    name = re.split(r"[/\\]", match[1].decode("utf-8", "replace"))[-1] if match else ""
    return None if name in ("", ".", "..") or not name.isprintable() or len(name) > 200 else state.with_name(name)


# ---------------------------------------------------------------------------------------------------- reading


def open_bundle(prefix: Path) -> Container:
    """Open the checkpoint at ``prefix``. Every checksum of the index is verified now, each tensor's when it is read.

    Raises:
        FormatError: if any part of it is not sound.
    """
    index = File(Path(f"{prefix}.index"))
    entries = dict(read_table(index))
    where = str(index.path)
    header = _header(entries.pop(b"", None), where)
    if b"_CHECKPOINTABLE_OBJECT_GRAPH" in entries:
        raise FormatError(
            f"{where}: an object-based TensorFlow 2 or Keras checkpoint; GPT-2's is name-based. Save it with tf.compat.v1.train.Saver"
        )
    parsed = {key: Entry.parse(value, f"{where}: {_text(key)}") for key, value in entries.items()}
    shards = _Shards(prefix, header.num_shards)
    whole = {key: entry for key, entry in parsed.items() if not key.startswith(b"\0")}
    for key, entry in parsed.items():
        if not entry.slices:
            shards.claim(entry, f"{where}: {_text(key)}")
    shards.check_overlaps()
    tensors = {_name(key, where): _tensor(key, entry, parsed, shards, where) for key, entry in sorted(whole.items())}
    used = {slice_key(key, extents) for key, entry in whole.items() for extents in entry.slices}
    if strays := sorted(set(parsed) - set(whole) - used):
        raise FormatError(f"{where}: {_text(strays[0])} is a slice of no variable")
    return Container(
        "tf",
        prefix,
        {n: t for n, t in tensors.items() if t},
        left_out=tuple(n for n, t in tensors.items() if not t),
        parts=tuple(file.path for file in shards.files.values()),
    )


def _name(key: bytes, where: str) -> str:
    try:
        return key.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{where}: the name {_text(key)} is not UTF-8") from None


def _text(key: bytes) -> str:
    return key[:200].decode("utf-8", "backslashreplace").replace("\0", "\\0")


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
    if version.number(2) > 1 or any(bad == 1 for bad in version.numbers(3)):
        raise FormatError(f"{where}: written for readers of version {version.number(2)}; this one is of version 1")
    num_shards = fields.signed(1)
    if not 0 < num_shards < 100_000:
        raise FormatError(f"{where}: {num_shards} data files: that cannot be")
    return _Header(num_shards)


@dataclass(frozen=True)
class Entry:
    """A BundleEntryProto: where a tensor lies. A sliced one has ``slices`` and no data of its own."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int  # masked
    slices: tuple[tuple[tuple[int, int], ...], ...] = ()

    @classmethod
    def parse(cls, value: bytes, where: str) -> Entry:
        """Parse and check everything that one entry can be wrong about by itself."""
        fields = Fields(value, where)
        shape = _shape(fields.bytes(2), where)
        if len(fields.all_bytes(7)) > MAX_SLICES:
            raise FormatError(f"{where}: {len(fields.all_bytes(7))} slices of one variable")
        slices = tuple(_slice(raw, shape, where) for raw in fields.all_bytes(7))
        entry = cls(
            fields.number(1), shape, fields.signed(3), fields.signed(4), fields.signed(5), fields.fixed32(6), slices
        )
        if entry.dtype not in TYPES and entry.dtype != STRING:
            raise FormatError(f"{where}: TensorFlow's data type {entry.dtype} is not one that a GPT-2 has")
        if min(entry.shard, entry.offset, entry.size) < 0:
            raise FormatError(f"{where}: a negative shard, offset or size")
        expected = math.prod(shape) * DTYPES[TYPES[entry.dtype]].itemsize if entry.dtype in TYPES else entry.size
        if expected != entry.size and not slices:
            raise FormatError(f"{where}: {entry.size} bytes, but shape {list(shape)} needs {expected}")
        return entry

    def serialize(self) -> bytes:
        """The same message in bytes, as TensorFlow writes it: in order of fields, zeros left out."""
        dims = b"".join(_field_bytes(2, _field_number(1, n)) for n in self.shape)
        numbers = ((3, self.shard), (4, self.offset), (5, self.size))
        crc = b"\x35" + struct.pack("<I", self.crc) if self.crc else b""
        return (
            _field_number(1, self.dtype)
            + _field_bytes(2, dims)
            + b"".join(_field_number(n, v) for n, v in numbers)
            + crc
        )


def _shape(data: bytes, where: str) -> tuple[int, ...]:
    fields = Fields(data, f"{where}: shape")
    if fields.number(3):
        raise FormatError(f"{where}: a shape of unknown rank")
    dims = tuple(Fields(raw, f"{where}: shape").signed(1) for raw in fields.all_bytes(2)[:9])
    if len(dims) > 8 or any(not 0 <= d < 2**40 for d in dims) or math.prod(dims) >= 2**40:
        raise FormatError(f"{where}: an impossible shape, {list(dims[:9])}")
    return dims


def _slice(data: bytes, shape: tuple[int, ...], where: str) -> tuple[tuple[int, int], ...]:
    """A TensorSliceProto as (start, length) a dimension; length -1 is all of it."""
    extents = [Fields(raw, f"{where}: slice") for raw in Fields(data, f"{where}: slice").all_bytes(1)[: len(shape) + 1]]
    result = tuple((e.signed(1), e.signed(2) if e.has(2) else -1) for e in extents)
    inside = (
        start >= 0 and length >= 1 and start + length <= n if length != -1 else start == 0
        for (start, length), n in zip(result, shape, strict=False)
    )
    if len(result) != len(shape) or not all(inside):
        raise FormatError(f"{where}: a slice {list(result)} outside the shape {list(shape)}")
    return result


class _Shards:
    """The data files of a bundle, opened when an entry first points into them."""

    def __init__(self, prefix: Path, count: int) -> None:
        self.prefix, self.count = prefix, count
        self.files: dict[int, File] = {}
        self.claims: dict[int, list[tuple[int, int, str]]] = {}

    def file(self, shard: int, where: str) -> File:
        if shard >= self.count:
            raise FormatError(f"{where}: lies in data file {shard + 1} of {self.count}")
        if shard not in self.files:
            self.files[shard] = File(Path(f"{self.prefix}.data-{shard:05d}-of-{self.count:05d}"))
        return self.files[shard]

    def claim(self, entry: Entry, where: str) -> None:
        file = self.file(entry.shard, where)
        if entry.offset + entry.size > file.size:
            raise FormatError(
                f"{where}: ends at byte {entry.offset + entry.size} of {file.path.name}, which has {file.size}: it is cut short"
            )
        if entry.size:
            self.claims.setdefault(entry.shard, []).append((entry.offset, entry.offset + entry.size, where))

    def check_overlaps(self) -> None:
        for claims in self.claims.values():
            for (_, end, _), (start, _, where) in itertools.pairwise(sorted(claims)):
                if start < end:
                    raise FormatError(f"{where}: overlaps another tensor's bytes")


def _tensor(key: bytes, entry: Entry, entries: Mapping[bytes, Entry], shards: _Shards, where: str) -> LazyTensor | None:
    """The tensor of one name; None for strings, which are no parameters."""
    if entry.dtype == STRING:
        return None
    dtype = DTYPES[TYPES[entry.dtype]]
    if entry.slices:
        return _sliced(key, entry, entries, shards, dtype, f"{where}: {_text(key)}")
    file = shards.file(entry.shard, where)
    checksum = Checksum(crc32c, unmask(entry.crc), f"{file.path}: {_text(key)}")
    return LazyTensor.in_file(file, entry.offset, dtype, entry.shape, checksum)


def _sliced(
    key: bytes, entry: Entry, entries: Mapping[bytes, Entry], shards: _Shards, dtype: DType, where: str
) -> LazyTensor:
    """A partitioned variable, put together from the entries of its slices."""
    parts: list[tuple[tuple[slice, ...], LazyTensor]] = []
    for extents in entry.slices:
        sub_key = slice_key(key, extents)
        place = tuple(
            slice(s, s + n) if n != -1 else slice(0, d) for (s, n), d in zip(extents, entry.shape, strict=True)
        )
        shape = tuple(p.stop - p.start for p in place)
        sub = entries.get(sub_key)
        if sub is None or sub.slices or sub.shape != shape or sub.dtype != entry.dtype:
            raise FormatError(f"{where}: its slice {list(extents)} is missing or of another shape")
        part = _tensor(sub_key, sub, entries, shards, where)
        assert part
        parts.append((place, part))
    _check_tiling([place for place, _ in parts], entry.shape, where)

    def stream() -> Iterator[bytes]:
        if all(p[1:] == tuple(slice(0, d) for d in entry.shape[1:]) for p, _ in parts):  # cut along the first axis
            for _, part in sorted(parts, key=lambda item: [place.start for place in item[0]]):
                yield from part.chunks()
            return
        import numpy as np

        whole = np.empty(entry.shape, dtype.numpy)
        for place, part in parts:
            whole[place] = part.read()
        yield from LazyTensor.of(whole, dtype).chunks()

    return LazyTensor(dtype, entry.shape, stream, None, checksummed=True)


def _check_tiling(places: list[tuple[slice, ...]], shape: tuple[int, ...], where: str) -> None:
    for a, b in itertools.combinations(places, 2):
        if all(x.start < y.stop and y.start < x.stop for x, y in zip(a, b, strict=True)):
            raise FormatError(f"{where}: its slices overlap")
    if sum(math.prod(s.stop - s.start for s in place) for place in places) != math.prod(shape):
        raise FormatError(f"{where}: its slices leave a gap")


# ------------------------------------------------------------------------------------ the table (LevelDB's format)


def read_table(file: File) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of an SSTable, in order, every block's checksum verified.

    Raises:
        FormatError: if any byte of it is not as the format says.
    """
    where = str(file.path)
    if file.size < FOOTER:
        raise FormatError(f"{where}: {file.size} bytes is too short for a TensorFlow index")
    if file.size > MAX_INDEX:
        raise FormatError(f"{where}: {file.size} bytes is too large for a GPT-2's index")
    data = file.read(0, file.size)
    footer = data[-FOOTER:]
    if struct.unpack("<Q", footer[-8:])[0] != MAGIC:
        raise FormatError(f"{where}: not a TensorFlow index (no table magic at its end)")
    meta, position = _handle(footer, 0, where)
    index, position = _handle(footer, position, where)
    if position > 40 or any(footer[position:40]):
        raise FormatError(f"{where}: the footer's padding is not zero")
    list(_block(data, meta, where))
    previous, names = None, 0
    for _, value in _block(data, index, where):
        for key, entry in _block(data, _handle(value, 0, where)[0], where):
            if previous is not None and key <= previous:
                fault = "there twice" if key == previous else "out of order"
                raise FormatError(f"{where}: the name {_text(key)} is {fault}")
            previous, names = key, names + len(key)
            if names > MAX_NAMES:
                raise FormatError(f"{where}: more than {MAX_NAMES >> 20} MB of names")
            yield key, entry


def _handle(data: bytes, position: int, where: str) -> tuple[tuple[int, int], int]:
    offset, position = read_varint(data, position, where)
    size, position = read_varint(data, position, where)
    return (offset, size), position


def _block(data: bytes, handle: tuple[int, int], where: str) -> Iterator[tuple[bytes, bytes]]:
    """The entries of one block, after its checksum."""
    offset, size = handle
    end = offset + size
    if end + TRAILER > len(data) - FOOTER:
        raise FormatError(f"{where}: a block at {offset} ends behind the file's")
    block, kind = data[offset:end], data[end]
    if unmask(struct.unpack_from("<I", data, end + 1)[0]) != crc32c(0, data[offset : end + 1]):
        raise FormatError(f"{where}: the block at {offset} is damaged (its checksum differs)")
    if kind:
        raise FormatError(f"{where}: the block at {offset} is compressed (type {kind}), which TensorFlow never writes")
    if size < 4:
        raise FormatError(f"{where}: the block at {offset} is too short")
    count = struct.unpack_from("<I", block, size - 4)[0]
    limit = size - 4 - 4 * count
    if count == 0 or limit < 0:
        raise FormatError(f"{where}: the block at {offset} has impossible restarts")
    restarts = struct.unpack_from(f"<{count}I", block, limit)
    key, position = b"", 0
    unseen = set(restarts)
    if restarts[0] != 0 or len(unseen) != count or list(restarts) != sorted(restarts):
        raise FormatError(f"{where}: the block at {offset} has impossible restarts")
    while position < limit:
        start = position
        shared, position = read_varint(block, position, where)
        fresh, position = read_varint(block, position, where)
        length, position = read_varint(block, position, where)
        if (
            shared > len(key)
            or (start in unseen and shared)
            or position + fresh + length > limit
            or shared + fresh > MAX_NAME
        ):
            raise FormatError(f"{where}: the block at {offset} has an impossible entry at {start}")
        unseen.discard(start)
        key = key[:shared] + block[position : position + fresh]
        position += fresh + length
        yield key, block[position - length : position]
    if unseen - {0}:
        raise FormatError(f"{where}: the block at {offset} has a restart that is no entry")


def mask(crc: int) -> int:
    """LevelDB's mask, so that a checksum of data with checksums in it stays a good one."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def unmask(masked: int) -> int:
    """The inverse of ``mask``."""
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    return ((rotated >> 17) | (rotated << 15)) & 0xFFFFFFFF


# ------------------------------------------------------------------------------------------------ protobuf, in short


def read_varint(data: bytes, position: int, where: str) -> tuple[int, int]:
    """An unsigned varint of at most 64 bits, and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise FormatError(f"{where}: a number is cut short")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 2**64:
                break
            return value, position
    raise FormatError(f"{where}: a number of more than 64 bits")


class Fields:
    """The fields of one protobuf message."""

    def __init__(self, data: bytes, where: str) -> None:
        self.where = where
        self.values: dict[int, list[int | bytes]] = {}
        position = 0
        while position < len(data):
            tag, position = read_varint(data, position, where)
            value: int | bytes
            if tag & 7 == 0:
                value, position = read_varint(data, position, where)
            elif tag & 7 in (1, 2, 5):
                n = 8 if tag & 7 == 1 else 4
                if tag & 7 == 2:
                    n, position = read_varint(data, position, where)
                if position + n > len(data):
                    raise FormatError(f"{where}: a field is cut short")
                value, position = data[position : position + n], position + n
            else:
                raise FormatError(f"{where}: an unknown kind of field ({tag & 7})")
            self.values.setdefault(tag >> 3, []).append(value)

    def has(self, field: int) -> bool:
        return field in self.values

    def numbers(self, field: int) -> list[int]:
        values = self.values.get(field, [])
        if packed := [v for v in values if isinstance(v, bytes)]:  # repeated numbers may come packed
            return [n for data in packed for n in _unpack(data, self.where)]
        return [v for v in values if isinstance(v, int)]

    def number(self, field: int) -> int:
        value = self.values.get(field, [0])[-1]
        if not isinstance(value, int):
            raise FormatError(f"{self.where}: field {field} is not a number")
        return value

    def signed(self, field: int) -> int:
        value = self.number(field)
        return value - 2**64 if value >= 2**63 else value

    def all_bytes(self, field: int) -> list[bytes]:
        values = self.values.get(field, [])
        if not all(isinstance(v, bytes) for v in values):
            raise FormatError(f"{self.where}: field {field} is not a message")
        return [v for v in values if isinstance(v, bytes)]

    def bytes(self, field: int) -> bytes:
        return b"".join(self.all_bytes(field))  # messages in parts merge by concatenation

    def fixed32(self, field: int) -> int:
        data = (self.all_bytes(field) or [bytes(4)])[-1]
        if len(data) != 4:
            raise FormatError(f"{self.where}: field {field} is not four bytes")
        return int.from_bytes(data, "little")


def _unpack(data: bytes, where: str) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = read_varint(data, position, where)
        yield value


def varint(value: int) -> bytes:
    """An unsigned varint."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field_number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value) if value else b""


def _field_bytes(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


# ------------------------------------------------------------------ the key of a slice (TensorFlow's "ordered code")


def slice_key(name: bytes, extents: Iterable[tuple[int, int]]) -> bytes:
    """The key under which a slice of a partitioned variable lies: EncodeTensorNameSlice of TensorFlow."""
    extents = list(extents)
    parts = [_code_number(0), _code_string(name), _code_number(len(extents))]
    return b"".join(parts + [_code_signed(n) for extent in extents for n in extent])


def _code_number(value: int) -> bytes:
    data = value.to_bytes((value.bit_length() + 7) // 8, "big")
    return bytes([len(data)]) + data


def _code_string(value: bytes) -> bytes:
    return value.replace(b"\xff", b"\xff\xfe").replace(b"\0", b"\0\xff").replace(b"\xff\xfe", b"\xff\0") + b"\0\x01"


def _code_signed(value: int) -> bytes:
    bits = (~value if value < 0 else value).bit_length()
    n = bits // 7 + 1
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


HEADER = _field_number(1, 1) + _field_bytes(3, _field_number(1, 1))  # one shard, little-endian, version 1


def write_index(out: Output, entries: Mapping[bytes, bytes], header: bytes = HEADER) -> None:
    """Write the table of an index: the header under the empty name, then the entries in order."""
    blocks: list[tuple[bytes, bytes, bytes | None]] = []  # handle, last key, the key that follows
    pending, size = [(b"", header)], 0
    for key, value in sorted(entries.items()):
        if size >= BLOCK_SIZE:
            blocks.append((_write_block(out, pending), pending[-1][0], key))
            pending, size = [], 0
        pending.append((key, value))
        size += len(key) + len(value)
    blocks.append((_write_block(out, pending), pending[-1][0], None))
    meta = _write_block(out, [])
    index = _write_block(out, [(_separator(last, following), handle) for handle, last, following in blocks], interval=1)
    out.write((meta + index).ljust(40, b"\0") + struct.pack("<Q", MAGIC))


def _write_block(out: Output, entries: list[tuple[bytes, bytes]], interval: int = RESTART_INTERVAL) -> bytes:
    """Write one block; returns its handle."""
    data, restarts, previous = bytearray(), [0], b""
    for i, (key, value) in enumerate(entries):
        if i and i % interval == 0:
            restarts.append(len(data))
            previous = b""
        shared = _common(previous, key)
        data += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        previous = key
    data += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
    handle = varint(out.position) + varint(len(data))
    data.append(0)  # not compressed
    out.write(bytes(data) + struct.pack("<I", mask(crc32c(0, bytes(data)))))
    return handle


def _common(a: bytes, b: bytes) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _separator(last: bytes, following: bytes | None) -> bytes:
    """The shortest key from ``last`` up to, and not including, ``following``, as LevelDB chooses it."""
    if following is None:  # FindShortSuccessor
        i = next((i for i, byte in enumerate(last) if byte != 0xFF), len(last))
        return last[:i] + bytes([last[i] + 1]) if i < len(last) else last
    i = _common(last, following)
    if i < min(len(last), len(following)) and last[i] < 0xFF and last[i] + 1 < following[i]:
        return last[:i] + bytes([last[i] + 1])
    return last
