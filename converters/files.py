"""The only room that touches the disk: positioned reads in, whole files out.

Reading is by position into one small buffer, never through a memory map: a mapped page counts as memory, and a file
that shrinks under a map kills the process. (``File.map`` exists for loading a model, where mapping is the point.)
Writing goes to a temporary name beside the destination, is synced, and takes its place in one rename.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import mmap
import os
import queue
import re
import shutil
import signal
import stat
import struct
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import DestinationError, FormatError, UnsafeError

CHUNK = 1 << 20
WINDOW = 64 << 10  # bytes that a cursor reads at once
WRITEBACK = 16 << 20  # bytes after which the kernel is asked to start writing
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h
WAITING = 9  # chunks on their way to the disk
MAX_DIGITS, MAX_DEPTH = 1000, 64  # of a number and of a value in JSON


class File:
    """A regular file, open for positioned reads.

    Raises:
        FormatError: if it is missing, no regular file, or not readable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
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
            raise FormatError(f"{self.path}: cut short: bytes {offset} to {offset + size} of {self.size} are asked for")

    def _stamp(self) -> tuple[int, int, int]:
        s = os.fstat(self._fd)
        return s.st_size, s.st_mtime_ns, s.st_ino

    def _changed(self) -> FormatError:
        return FormatError(f"{self.path}: changed while it was being read")


class Cursor:
    """A file, or a stretch of one, read from front to back in small pieces; what is large is skipped, not read.

    Raises (from every method):
        FormatError: if the stretch ends before what is asked for does.
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
        """Pass over the next bytes; gives where they begin."""
        if not 0 <= size <= self.end - self.position:
            raise FormatError(f"{self.file.path}: cut short: {size} bytes are said to follow byte {self.position}")
        begin, self.position = self.position, self.position + size
        return begin

    def number(self, form: str) -> Any:
        """One number, of a type of ``struct`` (with its byte order)."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the system's refusals into ours."""
    try:
        yield
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from None


def check_name(path: Path) -> None:
    """Refuse what no file can be called.

    Raises:
        FormatError: if the system has no way to say this name.
    """
    try:
        os.lstat(path)
    except ValueError:  # a zero byte, or what the system has no encoding for
        raise FormatError(f"{str(path)[:200]!r}: not a name that a file can have") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise FormatError(f"{str(path)[:200]}...: too long for the name of a file") from None


def beside(directory: Path, name: str, where: str) -> Path:
    """The file of this name in a directory, or below: model cards keep weights in folders too.

    Raises:
        UnsafeError: if the name leads out of the directory, or through a folder that is a link to elsewhere. (The file
            itself may be one: the Hub's cache has them.)
    """
    leaves = not name or name.startswith("/") or "\\" in name or re.search(r"(^|/)\.\.?(/|$)", name)
    if not leaves and name.isprintable() and len(name) <= 200:
        path = directory / name
        if path.parent.resolve().is_relative_to(directory.resolve()):
            return path
    raise UnsafeError(f"{where}: points to {name[:200]!r}, which is not a file beside it: refused")


def read_json(path: Path, limit: int = 64 << 20) -> dict[str, Any]:
    """A small JSON file that holds an object."""
    file = File(path)
    if file.size > limit:
        raise FormatError(f"{path}: {file.size} bytes is too large for what it should be (at most {limit})")
    return parse_json(file.read(0, file.size), str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object with no key twice.

    Raises:
        FormatError: for anything else.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_int=_whole_number)
        _check_depth(value)
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise FormatError(f"{where}: not sound JSON: a string that is no text") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not sound JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{where}: a JSON object is expected, not {type(value).__name__}")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key[:100]!r} is there twice")
        for text in (key, value):
            if isinstance(text, str):
                text.encode()  # a lone surrogate is no text
        result[key] = value
    return result


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:  # Python does not print what has thousands
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _check_depth(value: Any) -> None:
    """Refuse what Python may read but then, deeper in its own calls, neither compare nor print."""
    level = [value]
    for _ in range(MAX_DEPTH):
        parts = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for part in parts for x in part if isinstance(x, dict | list)]
        if not level:
            return
    raise ValueError(f"values nested more than {MAX_DEPTH} deep")


@functools.cache
def _keep_freed_chunks() -> None:
    # glibc gives freed megabytes back to the system, and every fresh one then costs 256 page faults: a third of a
    # conversion's time. One large block (never touched, so it takes no memory), freed at once, teaches it to keep them.
    bytes(31 << 20)


class Output:
    """A file being written, sequentially, with room to patch what is already there.

    A thread of its own writes, so that reading and checksums go on meanwhile; a few chunks wait at most. Its errors
    come out of a later call, ``close`` at the latest. A signal's handler may raise anywhere in here: a ``SimpleQueue``
    has no lock of Python's, which would stay locked then.
    """

    def __init__(self, fd: int) -> None:
        _keep_freed_chunks()
        self._fd = fd
        self._waiting: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()  # (where, what); None ends it
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each chunk that may come
        for _ in range(WAITING):
            self._room.put(None)
        self._error: BaseException | None = None
        self._written = self._flushed = 0  # the thread's own
        self.position = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._put((self.position, data))
        self.position += len(data)

    def patch(self, offset: int, data: bytes) -> None:
        """Replace a few bytes that were appended before."""
        self._put((offset, data))

    def close(self) -> None:
        """Wait until everything is written and on the disk."""
        self._stop()
        self._raise()
        os.fsync(self._fd)

    def abandon(self) -> None:
        """Stop writing, whatever waits."""
        self._error = self._error or OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        self._stop()

    def _put(self, item: tuple[int, bytes]) -> None:
        self._raise()
        self._room.get()
        self._waiting.put(item)

    def _raise(self) -> None:
        if self._error:
            raise self._error

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            if not self._error:  # after an error, what waits is dropped
                try:
                    self._write(*item)
                except BaseException as error:
                    self._error = error
            self._room.put(None)

    def _write(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while len(view):
            n = os.pwrite(self._fd, view, offset)
            view, offset = view[n:], offset + n
        self._written = max(self._written, offset)
        if self._written - self._flushed >= WRITEBACK:
            _start_writeback(self._fd, self._flushed, self._written)
            self._flushed = self._written


def _start_writeback(fd: int, start: int, end: int) -> None:
    # The disk works while we read on, so the final fsync is short; and a large result does not fill the page cache.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusals to write into ours."""
    try:
        yield
    except OSError as error:
        raise DestinationError(f"{path}: cannot be written: {error.strerror or error}") from None


def check_free(path: Path, force: bool, directory: bool) -> None:
    """Refuse a destination that exists, before any work is done.

    Raises:
        DestinationError: if ``path`` exists and ``force`` is false, or is the wrong kind of thing.
    """
    check_name(path)
    above = next((above for above in path.absolute().parents if os.path.lexists(above)), path)
    if above != path and not above.is_dir():
        raise DestinationError(f"{path}: cannot be written: {above.name} is not a directory")
    if not os.path.lexists(path):
        return
    if not (path.is_dir() or path.is_file() or path.is_symlink()):
        raise DestinationError(f"{path}: is neither a file nor a directory; it is left alone")
    if path.is_dir() != directory:
        kind, wanted = ("a directory", "a file") if path.is_dir() else ("a file", "a directory")
        raise DestinationError(f"{path}: exists already and is {kind}, which is not replaced by {wanted}")
    if not force:
        raise DestinationError(f"{path}: exists already; --force replaces it")


@contextlib.contextmanager
def new_file(path: Path, force: bool = False) -> Iterator[Output]:
    """Write ``path`` whole or not at all.

    Raises:
        DestinationError: if it exists and ``force`` is false, or the disk refuses; nothing is then left behind.
    """
    check_free(path, force, directory=False)
    temporary = _beside(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            output = Output(fd)
            try:
                yield output
                output.close()
            finally:
                output.abandon()
                os.close(fd)
            _publish(temporary, path, force)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def staged_file(path: Path, room: Sequence[int], force: bool = False) -> Iterator[Path]:
    """As ``new_file``, for a library that writes by name: gives the name to write to, which ends as ``path`` does.

    Files of the sizes of ``room`` must find their place there first, where the system can tell: what a library does on a
    full disk is its own affair.
    """
    check_free(path, force, directory=False)
    folder = _beside(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            _check_room(folder, room)
            yield folder / path.name
            _sync(folder / path.name)
            _publish(folder / path.name, path, force)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def new_directory(path: Path, force: bool = False, rivals: Callable[[Path], list[str]] | None = None) -> Iterator[Path]:
    """Stage files in the directory that is yielded; they appear in ``path`` together at the end, or not at all.

    With ``force``, files of the same names are replaced and any others in ``path`` are left alone. ``rivals`` names
    files in ``path`` which, left alone, would be taken for part of the result: if one would stay, nothing is written.
    """
    check_free(path, force, directory=True)
    path = Path(os.path.abspath(path))
    stage = _beside(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            stage.mkdir()
        yield stage
        with writing(path):
            for part in [*stage.rglob("*"), stage]:
                _sync(part)
            new = {name.as_posix() for name in _files(stage)}
            if stale := [name for name in (rivals(path) if rivals and path.is_dir() else []) if name not in new]:
                raise DestinationError(
                    f"{path}: holds {stale[0]}, which would be read together with the new files; move it away first"
                )
            with _uninterrupted():
                _publish_directory(stage, path, force)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _check_room(folder: Path, sizes: Sequence[int]) -> None:
    """Raise what the system says of files of these sizes."""
    scratch = [folder / f"room{i}" for i in range(len(sizes))]
    for path, size in zip(scratch, sizes, strict=True):
        with open(path, "wb") as file:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:  # some file systems cannot
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
    for path in scratch:
        path.unlink()


def _publish(temporary: Path, path: Path, force: bool) -> None:
    if force:
        os.replace(temporary, path)
    else:
        try:
            os.link(temporary, path)  # unlike a rename, fails where a file has appeared meanwhile
            temporary.unlink()
        except FileExistsError:
            raise DestinationError(f"{path}: has appeared meanwhile; --force replaces it") from None
        except OSError:  # a file system without hard links
            check_free(path, force, directory=False)
            os.replace(temporary, path)
    _sync(path.parent)


def check_tree(path: Path, names: Iterable[Path]) -> None:
    """Refuse to put files of these relative names into a directory where something else is in their way.

    Raises:
        DestinationError: if a folder has the name of a file, a file that of a folder, or a folder is a link.
    """
    for name in names:
        if (path / name).is_dir():
            raise DestinationError(f"{path / name}: is a directory, which --force does not replace by a file")
        for above in (path / p for p in name.parents if p.name):
            if above.is_symlink():
                raise DestinationError(f"{above}: is a link, and nothing is written through it; move it away first")
            if above.exists() and not above.is_dir():
                raise DestinationError(f"{above}: is a file, which --force does not replace by a directory")


def _publish_directory(stage: Path, path: Path, force: bool) -> None:
    if force and path.is_dir():
        new = _files(stage)
        check_tree(path, new)
        if not _exchange(stage, path):
            for name in sorted(new):
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(stage / name, path / name)
        _sync(path)
    else:
        stage.rename(path)
    _sync(path.parent)


def _files(directory: Path) -> list[Path]:
    """Every file in a tree, relative to it; links are files here."""
    found = (Path(top, name) for top, below, files in os.walk(directory) for name in (*files, *_links(top, below)))
    return [file.relative_to(directory) for file in found]


def _links(top: str, below: list[str]) -> list[str]:
    return [name for name in below if Path(top, name).is_symlink()]


def _exchange(stage: Path, path: Path) -> bool:
    """Put the whole of ``stage`` into the place of ``path`` in one step, with what else was in ``path``.

    That needs Linux (``renameat2``), a folder of not too many files, and nobody who works inside it. False where it
    cannot be; ``stage`` may then hold links to what was in ``path``.
    """
    import ctypes

    kept = [name for name in _files(path) if not os.path.lexists(stage / name)]
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None or path.is_symlink() or path.is_mount():
        return False
    if len(kept) > 1000 or Path.cwd().is_relative_to(path):
        return False
    folders = [Path(top).relative_to(path) for top, _, _ in os.walk(path)]  # the outer before the inner
    if any((path / folder).stat().st_uid != os.geteuid() for folder in folders):
        return False  # a folder of another owner would become ours
    try:
        for folder in folders:
            (stage / folder).mkdir(exist_ok=True)
        for name in kept:
            os.link(path / name, stage / name, follow_symlinks=False)
        for folder in reversed(folders):
            shutil.copystat(path / folder, stage / folder)
        _sync(stage)
    except OSError:  # a file system without hard links
        return False
    return bool(renameat2(AT_FDCWD, os.fsencode(stage), AT_FDCWD, os.fsencode(path), RENAME_EXCHANGE) == 0)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C and a polite kill for the few renames that belong together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Not by a mask: the system would hand the signal to another thread, and Python the handler to this one.
    held: list[int] = []
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not None]
    before = {n: signal.signal(n, lambda number, frame: held.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in dict.fromkeys(held):
            signal.raise_signal(late)


def _beside(path: Path) -> Path:
    start = os.fsdecode(os.fsencode(path.name)[:100]).encode("utf-8", "ignore").decode("utf-8", "ignore")
    return path.with_name(f".{start}.{os.urandom(4).hex()}.tmp")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:  # some file systems cannot sync a directory
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)
