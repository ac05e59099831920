"""Mutate files at random: bits, bytes, lengths, offsets, parts of other files; without and with knowledge of the format.

All choices come from one ``random.Random``, so that a case number is reproducible. ``shrink.py`` passes Hypothesis's ``Random``,
which shrinks a failing case to a minimal one. ``run.py`` is faster, and continues after a reader that kills its process.
"""

from __future__ import annotations

import io
import json
import random
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from seeds import Seed

from converters import ConversionError
from converters.containers.tf_bundle import Entry
from converters.io.checksums import crc32c
from converters.io.protobuf import read_varint, varint
from converters.io.sstable import FOOTER, TRAILER, mask, write_index

POWERS = [2**n for n in (7, 8, 15, 16, 24, 31, 32, 40, 62, 63, 64)]
NUMBERS = [0, 1, 2, 3, 5, 16, 100, *(n + d for n in POWERS for d in (-1, 0, 1))]
# Tokens of the formats: pickle opcodes, MessagePack codes, protobuf tags, magic numbers, pickle globals.
PIECES = [
    b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"GGUF", b"\x89HDF\r\n\x1a\n", b"TREE", b"HEAP", b"SNOD",
    b"(", b")", b"]", b"}", b"t", b"R", b"Q", b"b", b"s", b"u", b"e", b"\x85", b"\x86", b"\x87", b"\x93", b"\x94", b".",
    b"q\0h\0", b"h\0", b"p0\n", b"N", b"K\0", b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 8 + b"\0", b"\x8b\0\x10\0\0", b"I99\n", b"F1e999\n",
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\ngetattr\n", b"ctorch\nSize\n", b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n",
    b"\x80", b"\x81", b"\x90", b"\x91", b"\xa0", b"\xc0", b"\xc1", b"\xc4\0", b"\xc7\1\1", b"\xc9\0\0\0\0\1", b"\xdc\xff\xff", b"\xdf\xff\xff\xff\xff",
    b"\xd4\1", b"\xcb" + b"\xff" * 8, b"\x08\1", b"\x12\0", b"\x0a\x7f", b"\x3a\0", b"\xff" * 9 + b"\1", b"\x80" * 9 + b"\0", b"\xff" * 10,
    b"\0", b"\0" * 8, b"/", b"../", b"/etc/hostname", b"\xed\xa0\x80", b"\n", b'"', b"{", b"[", b",", b":", b"[" * 1500, b"1e999", b"NaN", b"-1",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A seed, its files after mutation, and whether checksums were repaired."""

    seed: Seed
    files: dict[str, bytes]
    repaired: bool


def mutated(rng: random.Random, seeds: list[Seed]) -> Case:
    """Return a case made of one of the seeds."""
    seed = rng.choice(seeds)
    others = [other.files[name] for other in seeds for name in other.changed]
    return mutated_again(rng, Case(seed, seed.files, False), others)


def mutated_again(rng: random.Random, case: Case, others: list[bytes]) -> Case:
    """Return the case with more mutations. ``others`` are files from which parts are taken."""
    seed = case.seed
    name = rng.choice(seed.changed)
    data = case.files[name]
    if structured := _structured(rng, name, data):
        return Case(seed, {**case.files, name: structured}, True)
    changed = {**case.files, name: blind(rng, data, others)}
    if rng.random() < 0.15 and len(seed.changed) > 1:
        second = rng.choice(seed.changed)
        changed[second] = blind(rng, changed[second], others)
    if rng.random() < 0.5:
        return Case(seed, _repaired(seed, changed), True)
    return Case(seed, changed, case.repaired)


# ---------------------------------------------------------------------------- mutations without knowledge of the format


def blind(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Apply one mutation or several."""
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3, 6))):
        data = rng.choice(CHANGES)(rng, data, rng.choice(others))
    return data


def place(rng: random.Random, size: int) -> int:
    """Return an offset in a file. Head and tail, where lengths and offsets are, are more likely than the middle."""
    near = int(size ** rng.random()) if size else 0
    return min(max(0, rng.choice((near, near, size - near, rng.randrange(size + 1)))), max(0, size - 1))


def _bit(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = place(rng, len(data))
    return data[:at] + bytes(b ^ 1 << rng.randrange(8) for b in data[at : at + 1]) + data[at + 1 :]


def _byte(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = place(rng, len(data))
    return data[:at] + rng.choice((rng.randbytes(1), b"\0", b"\xff", b"\x7f", b"\x80")) + data[at + 1 :]


def _cut(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.choice((place(rng, len(data)), max(0, len(data) - rng.randrange(1, 9))))]


def _longer(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data + rng.choice((bytes(rng.randrange(1, 100)), rng.randbytes(rng.randrange(1, 100)), other))


def _inserted(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = place(rng, len(data))
    return data[:at] + rng.choice((rng.randbytes(rng.randrange(1, 9)), rng.choice(PIECES))) + data[at:]


def _deleted(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = place(rng, len(data))
    return data[:at] + data[at + rng.choice((1, 2, 4, 8, 16, 100, rng.randrange(1, 5000))) :]


def _piece(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at, piece = place(rng, len(data)), rng.choice(PIECES)
    return data[:at] + piece + data[at + len(piece) :]


def _spliced(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = place(rng, len(data))
    return data[:at] + other[rng.choice((at, place(rng, len(other)))) :]


def _transplanted(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at, begin, size = place(rng, len(data)), place(rng, len(other)), rng.choice((4, 8, 16, 64, 512))
    return data[:at] + other[begin : begin + size] + data[at + size :]


def _doubled(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at, size = place(rng, len(data)), rng.choice((1, 4, 16, 64, 512, 4096))
    return data[: at + size] + data[at : at + size] * rng.choice((1, 1, 2, 50)) + data[at + size :]


def _number(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Replace an integer by another value, or by a value near the old one."""
    at, width = place(rng, len(data)), rng.choice((1, 2, 4, 8))
    order: Any = rng.choice(("little", "little", "big"))
    here = int.from_bytes(data[at : at + width], order)
    value = rng.choice(
        (rng.choice(NUMBERS), rng.choice(NUMBERS), -rng.choice(NUMBERS), len(data) + rng.randrange(-9, 9))
    )
    value = rng.choice((value, value, here + rng.choice((-8, -4, -1, 1, 4, 8)), here * 2))
    return data[:at] + (value % 256**width).to_bytes(width, order) + data[at + width :]


def _varint(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Replace the varint that may be at this offset."""
    at = place(rng, len(data))
    end = next((i + 1 for i in range(at, min(at + 10, len(data))) if data[i] < 0x80), at)
    return data[:at] + varint(rng.choice(NUMBERS)) + data[end:]


CHANGES: list[Callable[[random.Random, bytes, bytes], bytes]] = [
    _bit, _bit, _byte, _byte, _cut, _longer, _inserted, _deleted, _piece, _spliced, _transplanted, _doubled, _number, _number, _varint,
]  # fmt: skip


# ------------------------------------------------------------------------------- mutations with knowledge of the format


def _structured(rng: random.Random, name: str, data: bytes) -> bytes | None:
    """Mutate a part of a file and keep the container valid.

    Return None in half of the cases, for other formats, and if an earlier mutation has made the file invalid.
    """
    if rng.random() < 0.5:
        return None
    try:
        return _with_valid_container(rng, name, data)
    except INVALID:
        return None


INVALID = (
    ConversionError, ValueError, LookupError, AttributeError, TypeError, struct.error, zipfile.BadZipFile, EOFError,
    NotImplementedError, RuntimeError, StopIteration, OverflowError, zlib.error, OSError,
)  # fmt: skip


def _with_valid_container(rng: random.Random, name: str, data: bytes) -> bytes | None:
    if name.endswith(".json"):
        return changed_json(rng, data)
    if name.endswith(".safetensors"):
        size = struct.unpack("<Q", data[:8])[0]
        header = changed_json(rng, data[8 : 8 + size])
        return struct.pack("<Q", len(header)) + header + data[8 + size :]
    if data[:2] == b"PK":
        return _changed_zip(rng, data)
    if name.endswith(".index"):
        return _changed_index(rng, data)
    return None


VALUES = [
    0, 1, -1, 2, 3, 2**31, 2**32, 2**63, 2**64, 10**400, 10**4299, -(10**4299), 0.5, -0.0, 1e308, float("nan"), float("inf"), 2.0, True, False, None,
    "", "x", "gelu", "gpt2", "F32", "F16", "I64", "I8", "../x", "/etc/hostname", "x" * 5000, "\0", "\x1b[2J", "é", [], {}, [0], [[]], [0, 0], [2**62] * 4, {"a": 1},
    ["a", "b"], "DEEP", "SURROGATE", "TWICE",
]  # fmt: skip
MARKS = {'"SURROGATE"': '"\\ud800"', '"TWICE"': '{"a": 1, "a": 2}'}


def changed_json(rng: random.Random, data: bytes) -> bytes:
    """Mutate some values or keys of a JSON document."""
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        _change_node(rng, document)
    text = json.dumps(document)
    for mark, meant in MARKS.items():
        text = text.replace(mark, meant)
    depth = rng.choice((3, 50, 300, rng.randrange(900, 1000)))
    return text.replace('"DEEP"', "[" * depth + "]" * depth).encode()


def _change_node(rng: random.Random, document: dict | list) -> None:
    nodes = list(_nodes(document))
    if not nodes:
        return
    holder, key = rng.choice(nodes)
    action = rng.randrange(8)
    if action == 0:
        del holder[key]
    elif action == 1:
        other, theirs = rng.choice(nodes)
        holder[key], other[theirs] = other[theirs], json.loads(json.dumps(holder[key]))
    elif action == 2 and isinstance(holder, dict):
        holder[rng.choice(["", "x", "../x", "h.0.ln_1.bias", "n_head", str(key) + "x", "__metadata__"])] = holder.pop(
            key
        )
    elif action == 3 and isinstance(holder[key], int):
        holder[key] += rng.choice((-8, -4, -1, 1, 4, 8))
    else:
        holder[key] = json.loads(json.dumps(rng.choice(VALUES)))


def _nodes(value: object):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _nodes(item)


def _changed_zip(rng: random.Random, data: bytes) -> bytes:
    """Mutate the name or the contents of one zip member, and keep all checksums valid."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    pickle = next((i for i, (n, _) in enumerate(members) if n.endswith("data.pkl")), 0)  # NumPy's archives have none
    at = rng.choice((rng.randrange(len(members)), pickle))
    name, contents = members[at]
    if rng.random() < 0.9:
        members[at] = name, blind(rng, contents, [c for _, c in members])
    else:
        members[at] = rng.choice([n for n, _ in members] + [name + "/x", "../x", "x", name[:-1] + "é"]), contents
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, contents in members:
            info = zipfile.ZipInfo("x")
            info.filename = name  # bypasses the sanitizing of names in ZipInfo
            _add(archive, info, contents)
    return out.getvalue()


def _add(archive: zipfile.ZipFile, info: zipfile.ZipInfo, contents: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # duplicate name
        archive.writestr(info, contents)


class _Memory:
    """The part of the ``Output`` interface that writing an index needs."""

    def __init__(self) -> None:
        self.data = b""

    @property
    def position(self) -> int:
        return len(self.data)

    def write(self, data: bytes) -> None:
        self.data += data


def _changed_index(rng: random.Random, data: bytes) -> bytes:
    """Mutate one entry of an index, and keep the checksums of the index valid."""
    entries = dict(_entries(data))
    key = rng.choice(list(entries))
    if rng.random() < 0.8:
        entries[key] = blind(rng, entries[key], list(entries.values()))
    else:
        entries[blind(rng, key, list(entries))[:4000]] = entries.pop(key)
    out: Any = _Memory()
    write_index(out, {k: v for k, v in entries.items() if k}, entries.get(b"", b""))
    return out.data


def _handles(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    offset, at = read_varint(data, at, "seed")
    size, at = read_varint(data, at, "seed")
    return (offset, size), at


def _blocks(data: bytes) -> list[tuple[int, int]]:
    """Return offset and size of the blocks of a valid index: metaindex, index, and data blocks."""
    meta, at = _handles(data, len(data) - FOOTER)
    index, _ = _handles(data, at)
    return [meta, index, *(_handles(value, 0)[0] for _, value in _pairs(data, index))]


def _pairs(data: bytes, block: tuple[int, int]):
    begin, size = block
    end = begin + size - 4 - 4 * struct.unpack_from("<I", data, begin + size - 4)[0]
    key = b""
    while begin < end:
        shared, begin = read_varint(data, begin, "seed")
        fresh, begin = read_varint(data, begin, "seed")
        length, begin = read_varint(data, begin, "seed")
        key = key[:shared] + data[begin : begin + fresh]
        yield key, data[begin + fresh : begin + fresh + length]
        begin += fresh + length


def _entries(data: bytes):
    for block in _blocks(data)[2:]:
        yield from _pairs(data, block)


# -------------------------------------------------------------------------------------------------- repairing checksums


def _repaired(seed: Seed, changed: dict[str, bytes]) -> dict[str, bytes]:
    """Recompute the checksums of mutated bytes, so that readers get past the checksum test."""
    files = {n: _repaired_zip(data) if data[:2] == b"PK" else data for n, data in changed.items()}
    for name in files:
        if name.endswith(".index"):
            files[name] = _repaired_index(files[name], seed, files)
    return files


def _repaired_zip(data: bytes) -> bytes:
    out = bytearray(data)
    for found in re.finditer(re.escape(b"PK\x01\x02"), data):
        at = found.start()
        if at + 46 > len(data):
            continue
        size, header = struct.unpack_from("<L", data, at + 24)[0], struct.unpack_from("<L", data, at + 42)[0]
        if header + 30 <= len(data):
            begin = header + 30 + sum(struct.unpack_from("<2H", data, header + 26))
            struct.pack_into("<L", out, at + 16, zlib.crc32(data[begin : begin + size]))
    return bytes(out)


def _repaired_index(data: bytes, seed: Seed, files: dict[str, bytes]) -> bytes:
    """Recompute the checksums of blocks at their original offsets; and of tensors, if the index itself is unchanged."""
    original = next(seed.files[n] for n in seed.files if n.endswith(".index"))
    if data == original:
        return _with_new_sums(data, files)
    out = bytearray(data)
    for offset, size in _blocks(original):
        if offset + size + TRAILER <= len(out):
            struct.pack_into("<I", out, offset + size + 1, mask(crc32c(0, bytes(out[offset : offset + size + 1]))))
    return bytes(out)


def _with_new_sums(index: bytes, files: dict[str, bytes]) -> bytes:
    shards = [data for name, data in sorted(files.items()) if ".data-" in name]
    entries = dict(_entries(index))
    for key, value in list(entries.items()):
        entry = Entry.parse(value, "seed") if key else None
        if entry and not entry.slices:
            data = shards[entry.shard][entry.offset : entry.offset + entry.size]
            entries[key] = replace(entry, crc=mask(crc32c(0, data))).serialize()
    out: Any = _Memory()
    write_index(out, {k: v for k, v in entries.items() if k}, entries[b""])
    return out.data
