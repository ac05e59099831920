"""Write files and directories atomically: they appear whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import DestinationError
from .reading import check_name, keep_freed_chunks

WRITEBACK = 16 << 20  # bytes after which the kernel is asked to start writing
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h
WAITING = 9  # chunks that wait for the disk
MAX_KEPT = 1000  # files that are linked into a new directory


class Output:
    """A file that is written sequentially. Bytes already written can be patched.

    A thread writes, so that reading and checksums continue meanwhile; at most a few chunks wait. Its errors are raised by
    a later call, at the latest by ``close``. A signal handler may raise anywhere in here: a ``SimpleQueue`` has no Python
    lock that would stay locked then.
    """

    def __init__(self, fd: int) -> None:
        keep_freed_chunks()
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
        """Stop writing. What waits is dropped."""
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
            # It may write less than it is given, as on a disk that is nearly full.
            n = os.pwrite(self._fd, view, offset)
            view, offset = view[n:], offset + n
        self._written = max(self._written, offset)
        if self._written - self._flushed >= WRITEBACK:
            _start_writeback(self._fd, self._flushed, self._written)
            self._flushed = self._written


def _start_writeback(fd: int, start: int, end: int) -> None:
    # The disk writes while we read, so the final fsync is short; and a large result does not fill the page cache.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn OSError into DestinationError."""
    try:
        yield
    except OSError as error:
        raise DestinationError(f"{path}: cannot be written: {error.strerror or error}") from None


def check_free(path: Path, force: bool, directory: bool) -> None:
    """Refuse a destination that exists, before any other work.

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
        raise DestinationError(f"{path}: is neither a file nor a directory; choose another name")
    if path.is_dir() != directory:
        kind, wanted = ("a directory", "a file") if path.is_dir() else ("a file", "a directory")
        raise DestinationError(
            f"{path}: exists and is {kind}, which cannot be replaced by {wanted}; choose another name"
        )
    if not force:
        raise DestinationError(f"{path}: already exists; pass --force to replace it")


@contextlib.contextmanager
def new_file(path: Path, force: bool = False) -> Iterator[Output]:
    """Write ``path`` atomically.

    Raises:
        DestinationError: if it exists and ``force`` is false, or the disk refuses; nothing is then left behind.
    """
    check_free(path, force, directory=False)
    temporary = _beside(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # O_EXCL: never through a link that somebody has put there. The umask narrows 0o666, as for any new file.
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


def write_small(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files of these names and contents."""
    for name, data in files.items():
        with new_file(directory / name) as out:
            out.write(data)


@contextlib.contextmanager
def staged_file(path: Path, room: Sequence[int], force: bool = False) -> Iterator[Path]:
    """As ``new_file``, for a library that writes by name: yields the path to write to, with the same file name.

    There must be room for files of the sizes of ``room``, if the system can tell: libraries differ in how they fail on a
    full disk.
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
    """Yield a directory to write files into. They appear in ``path`` together at the end, or not at all.

    With ``force``, files of the same names are replaced, and others in ``path`` are kept. ``rivals`` names files in
    ``path`` that would be read as part of the result: if one of them would be kept, nothing is written.
    """
    check_free(path, force, directory=True)
    # "." has no name that a temporary folder beside it could have.
    path = Path(os.path.abspath(path))
    stage = _beside(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            stage.mkdir()
        yield stage
        with writing(path):
            # The files before the rename: after a crash, no name may lead to a file without its contents.
            for part in [*stage.rglob("*"), stage]:
                _sync(part)
            new = set(map(Path.as_posix, _files(stage)))
            others = rivals(path) if rivals and path.is_dir() else []
            stale = [name for name in others if name not in new]
            if stale:
                raise DestinationError(
                    f"{path}: holds {stale[0]}, which would be read together with the new files; move it away first"
                )
            with _uninterrupted():
                _publish_directory(stage, path, force)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _check_room(folder: Path, sizes: Sequence[int]) -> None:
    """Raise OSError if there is no room for files of these sizes."""
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
            raise DestinationError(f"{path}: was created meanwhile; pass --force to replace it") from None
        except OSError:  # a file system without hard links
            check_free(path, force, directory=False)
            os.replace(temporary, path)
    _sync(path.parent)


def check_tree(path: Path, names: Iterable[Path]) -> None:
    """Refuse relative file names that conflict with what is in a directory.

    Raises:
        DestinationError: if a folder has the name of a file, a file that of a folder, or a folder is a link.
    """
    for name in names:
        if (path / name).is_dir():
            raise DestinationError(f"{path / name}: is a directory, which --force does not replace by a file")
        for above in (path / p for p in name.parents if p.name):
            if above.is_symlink():
                raise DestinationError(
                    f"{above}: is a symbolic link, and gpt2x does not write through links; move it away first"
                )
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
    """Every file in a tree, relative to it. Links count as files."""
    found: list[Path] = []
    for top, below, files in os.walk(directory):
        folder = Path(top).relative_to(directory)
        found += map(folder.joinpath, (*files, *_links(top, below)))
    return found


def _links(top: str, below: list[str]) -> list[str]:
    return [name for name in below if Path(top, name).is_symlink()]


def _exchange(stage: Path, path: Path) -> bool:
    """Replace ``path`` by ``stage`` in one system call, keeping what else is in ``path``.

    Returns False where that is impossible; ``stage`` may then hold links to files of ``path``. It requires Linux
    (``renameat2``), a directory of not too many files, and no process that works inside it.
    """
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    kept = [name for name in _files(path) if not os.path.lexists(stage / name)]
    folders = [Path(top).relative_to(path) for top, _, _ in os.walk(path)]  # the outer before the inner
    if renameat2 is None or not _can_exchange(path, kept, folders):
        return False
    try:
        _keep_others(stage, path, kept, folders)
    except OSError:  # a file system without hard links
        return False
    result = renameat2(AT_FDCWD, os.fsencode(stage), AT_FDCWD, os.fsencode(path), RENAME_EXCHANGE)
    return bool(result == 0)


def _can_exchange(path: Path, kept: Sequence[Path], folders: Sequence[Path]) -> bool:
    if path.is_symlink() or path.is_mount():
        return False
    if len(kept) > MAX_KEPT or Path.cwd().is_relative_to(path):
        return False
    # The new directory is ours. One of another owner would change hands.
    return all((path / folder).stat().st_uid == os.geteuid() for folder in folders)


def _keep_others(stage: Path, path: Path, kept: Sequence[Path], folders: Sequence[Path]) -> None:
    """Link the files of ``path`` that stay into ``stage``, in directories with the same permissions and times."""
    for folder in folders:
        (stage / folder).mkdir(exist_ok=True)
    for name in kept:
        os.link(path / name, stage / name, follow_symlinks=False)
    for folder in reversed(folders):
        shutil.copystat(path / folder, stage / folder)
    _sync(stage)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay SIGINT, SIGTERM and SIGHUP during the few renames that belong together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A signal mask does not help: the system would deliver to another thread, and Python runs the handler in this one.
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
    # File names have 255 bytes at most. A character that is cut in two is left out.
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
