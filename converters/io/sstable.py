"""LevelDB's table format (SSTable), which TensorFlow's index files have."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Mapping

from ..errors import FormatError, truncated
from .checksums import crc32c
from .protobuf import field_bytes, field_number, read_varint, varint
from .publishing import Output
from .reading import File

MAGIC = 0xDB4775248B80FB57
FOOTER = 48
TRAILER = 5  # a byte for the compression, four for the checksum
RESTART_INTERVAL = 16  # TensorFlow's, and so are the next two
BLOCK_SIZE = 256 << 10
MAX_NAME = 4096
MAX_NAMES = 16 << 20  # bytes of all names, whose shared prefixes the file stores once
MAX_INDEX = 64 << 20  # of GPT-2's 1558M: 25 KB


def read_table(file: File) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of an SSTable, in order. Every block's checksum is verified.

    Raises:
        FormatError: if any byte of it is invalid.
    """
    where = str(file.path)
    if file.size < FOOTER:
        raise truncated(where, f"a TensorFlow index needs {FOOTER} bytes, the file has {file.size}")
    if file.size > MAX_INDEX:
        raise FormatError(f"{where}: {file.size} bytes exceed the limit of {MAX_INDEX} for an index")
    data = file.read(0, file.size)
    footer = data[-FOOTER:]
    if struct.unpack("<Q", footer[-8:])[0] != MAGIC:
        raise FormatError(f"{where}: not a TensorFlow index (no table magic at its end)")
    meta, position = _handle(footer, 0, where)
    index, position = _handle(footer, position, where)
    # The footer has two handles, zeros up to byte 40, and the magic number.
    if position > 40 or any(footer[position:40]):
        raise FormatError(f"{where}: the footer's padding is not zero")
    # TensorFlow's meta block has no entries that matter; reading it verifies its checksum.
    list(_block(data, meta, where))
    previous, names = None, 0
    for _, value in _block(data, index, where):
        for key, entry in _block(data, _handle(value, 0, where)[0], where):
            # TensorFlow finds a name by binary search: it would not see one that is out of order.
            if previous is not None and key <= previous:
                fault = "duplicate name" if key == previous else "name out of order"
                raise FormatError(f"{where}: {fault} {key_text(key)}")
            previous, names = key, names + len(key)
            if names > MAX_NAMES:
                raise FormatError(f"{where}: the names exceed the limit of {MAX_NAMES >> 20} MB")
            yield key, entry


def _handle(data: bytes, position: int, where: str) -> tuple[tuple[int, int], int]:
    offset, position = read_varint(data, position, where)
    size, position = read_varint(data, position, where)
    return (offset, size), position


def _block(data: bytes, handle: tuple[int, int], where: str) -> Iterator[tuple[bytes, bytes]]:
    """The entries of one block, after its checksum is verified."""
    offset, _ = handle
    block = _verified_block(data, handle, where)
    yield from _entries(block, f"{where}: the block at {offset}")


def _verified_block(data: bytes, handle: tuple[int, int], where: str) -> bytes:
    """The bytes of a block whose checksum matches, without its trailer."""
    offset, size = handle
    end = offset + size
    if end + TRAILER > len(data) - FOOTER:
        raise truncated(where, f"the block at {offset} ends after the file")
    stored = unmask(struct.unpack_from("<I", data, end + 1)[0])
    if stored != crc32c(0, data[offset : end + 1]):
        raise FormatError(f"{where}: the block at {offset} is damaged: checksum mismatch")
    compression = data[end]
    if compression:
        raise FormatError(
            f"{where}: the block at {offset} is compressed (type {compression}), which TensorFlow never does"
        )
    return data[offset:end]


def _entries(block: bytes, where: str) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a block. A key stores only what differs from the key before, except at a restart."""
    restarts, limit = _restarts(block, where)
    unseen = set(restarts)
    key = b""
    position = 0
    while position < limit:
        start = position
        shared, position = read_varint(block, position, where)
        fresh, position = read_varint(block, position, where)
        length, position = read_varint(block, position, where)
        value_start = position + fresh
        value_end = value_start + length
        shares_at_restart = start in unseen and shared > 0
        if shared > len(key) or shares_at_restart or value_end > limit or shared + fresh > MAX_NAME:
            raise FormatError(f"{where} has an invalid entry at {start}")
        unseen.discard(start)
        key = key[:shared] + block[position:value_start]
        position = value_end
        yield key, block[value_start:value_end]
    if unseen - {0}:
        raise FormatError(f"{where} has a restart point that is not an entry")


def _restarts(block: bytes, where: str) -> tuple[tuple[int, ...], int]:
    """The restart points at the end of a block, and where its entries end."""
    if len(block) < 4:
        raise truncated(where, f"4 bytes needed, it has {len(block)}")
    count = struct.unpack_from("<I", block, len(block) - 4)[0]
    limit = len(block) - 4 - 4 * count
    if count == 0 or limit < 0:
        raise FormatError(f"{where} has an invalid number of restart points: {count}")
    restarts = struct.unpack_from(f"<{count}I", block, limit)
    is_ascending = all(a < b for a, b in itertools.pairwise(restarts))
    if restarts[0] != 0 or not is_ascending:
        raise FormatError(f"{where} has invalid restart points")
    return restarts, limit


def mask(crc: int) -> int:
    """LevelDB's mask: a checksum of data that holds checksums stays reliable."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def unmask(masked: int) -> int:
    """The inverse of ``mask``."""
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    return ((rotated >> 17) | (rotated << 15)) & 0xFFFFFFFF


HEADER = field_number(1, 1) + field_bytes(3, field_number(1, 1))  # one shard, little-endian, version 1


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
    # LevelDB shares no prefixes in the block that lists the others.
    index = _write_block(out, [(_separator(last, following), handle) for handle, last, following in blocks], interval=1)
    out.write((meta + index).ljust(40, b"\0") + struct.pack("<Q", MAGIC))


def _write_block(out: Output, entries: list[tuple[bytes, bytes]], interval: int = RESTART_INTERVAL) -> bytes:
    """Write one block. Returns its handle."""
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


def key_text(key: bytes) -> str:
    return key[:200].decode("utf-8", "backslashreplace").replace("\0", "\\0")
