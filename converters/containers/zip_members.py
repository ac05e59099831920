"""Zip archives of stored members, as PyTorch and NumPy write them: where the bytes of each member are.

The standard library reads the archive's directory; everything that it states is checked here, and the members are then
read by position. Source: PKWARE's APPNOTE.TXT.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import FormatError, truncated
from ..io.reading import File
from ..tensors import DTYPES, Checksum, LazyTensor

LOCAL = struct.Struct("<4s5H3L2H")
MAX_MEMBERS = 100_000
DESCRIPTOR = 24  # bytes of a data descriptor, at most


def crc32(value: int, data: bytes) -> int:
    """The checksum of the members of a zip archive, extended."""
    return zlib.crc32(data, value)


@dataclass(frozen=True)
class Member:
    """A member of an archive.

    Args:
        header: where its own header begins.
        start: where its data begin.
        end: where its data end.
        crc: their checksum, once they are not compressed.
        descriptor: how many bytes may follow the data: a data descriptor.
        is_stored: whether the data are neither compressed nor encrypted.
    """

    header: int
    start: int
    end: int
    crc: int
    descriptor: int
    is_stored: bool

    @property
    def size(self) -> int:
        """How many bytes the data have in the archive."""
        return self.end - self.start

    def tensor(self, file: File, name: str) -> LazyTensor:
        """The bytes, as uint8; their checksum is verified."""
        checksum = Checksum(crc32, self.crc, f"{file.path}: {name}")
        return LazyTensor.in_file(file, self.start, DTYPES["U8"], (self.size,), checksum)


def read_members(file: File) -> dict[str, Member]:
    """Every member by name. None is a duplicate, and they cover the archive without gaps.

    Raises:
        FormatError: if the archive is invalid.
    """
    infos, directory = _central_directory(file)
    members: dict[str, Member] = {}
    for info in infos:
        name = info.orig_filename
        if name in members:
            raise FormatError(f"{file.path}: duplicate member {name!r}")
        members[name] = _member(file, info)
    _check_cover(file, members.values(), directory)
    return members


def check_stored(file: File, members: Mapping[str, Member], advice: str) -> None:
    """Refuse members that are compressed or encrypted."""
    for name, member in members.items():
        if not member.is_stored:
            raise FormatError(f"{file.path}: the member {name!r} is compressed or encrypted; {advice}")


def _central_directory(file: File) -> tuple[list[zipfile.ZipInfo], int]:
    """The entries of the archive's directory, and where it begins."""
    try:
        with open(file.path, "rb") as raw, zipfile.ZipFile(raw) as archive:
            infos = archive.infolist()
            directory = archive.start_dir
            comment = archive.comment
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error, UnicodeDecodeError) as error:
        raise FormatError(f"{file.path}: not a valid zip archive: {error}; download or copy it again") from None
    # The end record has 22 bytes. If more follow, programs differ in which of several directories they take.
    if file.read(file.size - 22, 4) != b"PK\x05\x06":
        raise FormatError(f"{file.path}: extra bytes after the end of the zip archive")
    if comment:
        raise FormatError(f"{file.path}: a zip archive with a comment, which neither PyTorch nor NumPy writes")
    if len(infos) > MAX_MEMBERS:
        raise FormatError(
            f"{file.path}: a zip archive with {len(infos)} members, which exceeds the limit of {MAX_MEMBERS}"
        )
    return infos, directory


def _check_cover(file: File, members: Iterable[Member], directory: int) -> None:
    """Between two members lies nothing but a data descriptor, where the first one has it."""
    end, descriptor = 0, 0
    for member in sorted(members, key=lambda member: member.header):
        _check_gap(file, end, member.header, descriptor)
        end, descriptor = member.end, member.descriptor
    _check_gap(file, end, directory, descriptor)


def _check_gap(file: File, end: int, begin: int, allowed: int) -> None:
    if begin < end:
        raise FormatError(f"{file.path}: not a valid zip archive: members overlap")
    if begin - end > allowed:
        raise FormatError(f"{file.path}: not a valid zip archive: stray bytes at {end}")


def _member(file: File, info: zipfile.ZipInfo) -> Member:
    """Check a member's own header against the archive's directory."""
    # Some programs trust this header, others the directory: two that disagree would be two different files.
    where = f"{file.path}: the member {info.orig_filename!r}"
    fields = LOCAL.unpack(file.read(info.header_offset, LOCAL.size))
    signature, compression = fields[0], fields[3]
    name_length, extra_length = fields[9], fields[10]
    if signature != b"PK\x03\x04" or compression != info.compress_type:
        raise FormatError(f"{where} has an invalid header")
    name = file.read(info.header_offset + LOCAL.size, name_length)
    # Bits of the flags: 11 is a name in UTF-8, 3 a descriptor after the data, 0 encryption.
    encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
    if name != info.orig_filename.encode(encoding):
        raise FormatError(f"{where} has another name in its own header")
    start: int = info.header_offset + LOCAL.size + name_length + extra_length
    end = start + info.compress_size
    if end > file.size:
        raise truncated(where, f"it ends at byte {end}, the file has {file.size}")
    descriptor = DESCRIPTOR if info.flag_bits & 8 else 0
    is_plain = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
    is_stored = is_plain and not info.flag_bits & 1
    return Member(info.header_offset, start, end, info.CRC, descriptor, is_stored)
