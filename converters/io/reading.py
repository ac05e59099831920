"""Positioned reads.

Files are read by position into one small buffer, not through a memory map: a mapped page counts as memory, and a file
that shrinks under a map kills the process. (``File.map`` is for loading a model.)
"""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import re
import stat
import struct
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import FormatError, UnsafeError, short, truncated

CHUNK = 1 << 20
WINDOW = 64 << 10  # bytes that a cursor reads at once


def files_in(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Name -> path of those of these files that a folder has, in the order of the names."""
    return {name: folder / name for name in names if (folder / name).is_file()}


def names_of(paths: Iterable[Path]) -> str:
    """The names of files or folders, without the folders that they are in, as text for the user."""
    return ", ".join(path.name for path in paths)


def check_present(files: Sequence[Path], index: Path) -> None:
    """Check that files that an index names are there.

    Raises:
        FormatError: if one is missing; the message names the first ones.
    """
    missing = [file for file in files if not file.is_file()]
    if not missing:
        return
    raise FormatError(
        f"{missing[0]}: no such file; missing: {len(missing)} of the {len(files)} files that {index.name} names: "
        f"{', '.join(short([file.name for file in missing], 5))}; download or copy again what is missing"
    )


class File:
    """A regular file, open for positioned reads.

    Raises:
        FormatError: if it is missing, no regular file, or not readable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
            # Before it is opened: opening a named pipe would wait for a writer.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise FormatError(f"{path}: not a regular file")
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            weakref.finalize(self, os.close, self._fd)
            self._identity = self._stamp()
        self.size = self._identity[0]

    def read(self, offset: int, size: int) -> bytes:
        """Exactly these bytes. The caller keeps ``size`` small."""
        self._inside(offset, size)
        with reading(self.path):
            data = os.pread(self._fd, size, offset)
        if len(data) != size:
            raise self._changed()
        return data

    def chunks(self, offset: int, size: int) -> Iterator[bytes]:
        """These bytes in order, about a megabyte at a time."""
        self._inside(offset, size)
        end = offset + size
        while offset < end:
            with reading(self.path):
                chunk = os.pread(self._fd, min(CHUNK, end - offset), offset)
            if not chunk:
                raise self._changed()
            yield chunk
            offset += len(chunk)
        # At the end: what was read may be of two versions of the file.
        if self._stamp() != self._identity:
            raise self._changed()

    def map(self, offset: int, size: int) -> memoryview:
        """These bytes as a private map: writing to it changes memory, never the file."""
        self._inside(offset, size)
        return self._map[offset : offset + size]

    @functools.cached_property
    def _map(self) -> memoryview:
        if self.size == 0:
            return memoryview(bytearray())
        with reading(self.path):
            pages = mmap.mmap(self._fd, self.size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return memoryview(pages)

    def _inside(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise truncated(self.path, f"{offset + size} bytes needed, the file has {self.size}")

    def _stamp(self) -> tuple[int, int, int]:
        s = os.fstat(self._fd)
        return s.st_size, s.st_mtime_ns, s.st_ino

    def _changed(self) -> FormatError:
        return FormatError(f"{self.path}: changed while it was read")


class Cursor:
    """A file, or a part of one, read sequentially in small pieces; large parts are skipped, not read.

    Raises (from every method):
        FormatError: if it is truncated.
    """

    def __init__(self, file: File, position: int = 0, end: int | None = None) -> None:
        self.file, self.position = file, position
        self.end = file.size if end is None else end
        self._window, self._start = b"", 0

    def take(self, size: int) -> bytes:
        """The next bytes. The caller keeps ``size`` small."""
        begin = self.skip(size) - self._start
        if not 0 <= begin <= begin + size <= len(self._window):
            self._start, begin = self.position - size, 0
            self._window = self.file.read(self._start, min(max(size, WINDOW), self.end - self._start))
        return self._window[begin : begin + size]

    def skip(self, size: int) -> int:
        """Skip the next bytes. Returns where they begin."""
        if not 0 <= size <= self.end - self.position:
            raise truncated(self.file.path, f"{self.position + size} bytes needed, there are {self.end}")
        begin, self.position = self.position, self.position + size
        return begin

    def number(self, form: str) -> Any:
        """One number, in a format of ``struct`` with its byte order."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn OSError into FormatError."""
    try:
        yield
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from None


def check_name(path: Path) -> None:
    """Refuse an invalid file name.

    Raises:
        FormatError: if the system cannot represent it.
    """
    try:
        os.lstat(path)
    except ValueError:  # a zero byte, or a character without an encoding
        raise FormatError(f"{str(path)[:200]!r}: not a valid file name") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise FormatError(f"{str(path)[:200]}...: too long for a file name") from None


def beside(directory: Path, name: str, where: str) -> Path:
    """The file of this name in a directory, or below it.

    Raises:
        UnsafeError: if the name leads out of the directory, or through a directory that is a link to another place. (The
            file itself may be a link, as in the Hub's cache.)
    """
    # On Windows a backslash separates folders, and the name may come from there.
    leaves = not name or name.startswith("/") or "\\" in name or re.search(r"(^|/)\.\.?(/|$)", name)
    if not leaves and name.isprintable() and len(name) <= 200:
        path = directory / name
        if path.parent.resolve().is_relative_to(directory.resolve()):
            return path
    raise UnsafeError(f"{where}: points to {name[:200]!r}, which is not a file beside it: refused")


def values_file(path: Path, of: str) -> File:
    """Open a file with values that another file refers to.

    Args:
        path: the file.
        of: what the values belong to, in a word.

    Raises:
        FormatError: if it is missing, or not a regular file.
    """
    if not path.exists():
        raise FormatError(f"{path}: no such file; it holds values of the {of}: download or copy it again")
    return File(path)


@functools.cache
def keep_freed_chunks() -> None:
    # glibc returns freed megabytes to the system, and each new one then costs 256 page faults: a third of a conversion's
    # time. After one large block (never touched, so it takes no memory) is freed, glibc keeps them.
    bytes(31 << 20)
