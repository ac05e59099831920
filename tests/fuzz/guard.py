"""Detect, from inside the process, what a reader must never do."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CPU_SECONDS = 10
WALL_SECONDS = 60  # the HDF5 listing can take that long
MEMORY = 256 << 20
FREED = 1 << 20  # memory that a case may leave behind before it is returned to the system

# Events of Python's audit table that are allowed, because they only concern objects of the process.
HARMLESS = ("object.", "builtins.id", "sys._getframe", "sys._current_frames", "sys.unraisablehook", "gc.", "cpython.", "array.", "time.sleep", "_thread.start")  # fmt: skip
ON_FILES = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.truncate", "os.utime", "os.chmod", "pathlib.Path.glob", "pathlib.Path.rglob", "pathlib.Path.walk", "shutil.rmtree")  # fmt: skip
STARTS = ("subprocess.Popen", "os.posix_spawn")  # since Python 3.13, the second follows the first


class Violation(BaseException):
    """Something that no file may cause. It is a BaseException, so that ``except Exception`` does not catch it."""


class Guard:
    """Monitors one case at a time: files, network, subprocesses, code, imports, memory and time.

    Create one per process, because an audit hook cannot be removed.
    """

    def __init__(self, programs: tuple[str, ...] = ()) -> None:
        self.programs = programs  # scripts that may run in a Python subprocess
        self.folder: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._audit)
        sys.unraisablehook = lambda fault: self.seen.append(f"an unraisable error: {fault.exc_value!r}")
        threading.excepthook = lambda fault: self.seen.append(f"an error in a thread: {fault.exc_value!r}")
        signal.signal(signal.SIGPROF, self._late)
        signal.signal(signal.SIGALRM, self._late)
        self.memory = Memory()

    @contextlib.contextmanager
    def watching(self, folder: Path) -> Iterator[None]:
        """Monitor one case. Its folder is the working directory.

        Raises:
            Violation: if the case does something that is not allowed.
        """
        os.chdir(folder)
        self.seen = []
        self.memory.start()
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        self.folder = folder
        try:
            yield
        finally:
            self.folder = None
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.grown = self.memory.stop()
        if self.grown > MEMORY:
            self.seen.append(f"{self.grown >> 20} MB of memory")
        if self.seen:
            raise Violation("; ".join(self.seen))

    def _late(self, number: int, frame: object) -> None:
        self._stop("timeout")

    def _stop(self, fault: str) -> None:
        self.seen.append(fault)
        raise Violation(fault)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or event.startswith(HARMLESS):
            return
        if event in ON_FILES:
            if outside := [a for a in arguments if isinstance(a, str | bytes | os.PathLike) and not self._inside(a)]:
                self._stop(f"{event} of {outside[0]!r}, outside its folder")
        elif not (event in STARTS and self._is_ours(arguments[1])):
            self._stop(f"{event} {str(arguments)[:200]}")

    def _inside(self, path: str | bytes | os.PathLike[Any]) -> bool:
        assert self.folder
        name = os.path.normpath(self.folder / os.fsdecode(path))
        return name == os.devnull or Path(name).is_relative_to(self.folder)

    def _is_ours(self, command: list[str]) -> bool:
        return command[0] == sys.executable and any(Path(part).name in self.programs for part in command[1:5])


class Memory:
    """Limits the memory that one case may allocate, and measures what it uses.

    The limit is on allocated memory, used or not: beyond it is a MemoryError. What is measured is used memory: pages in RAM.
    """

    def __init__(self) -> None:
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        self._clear = os.open("/proc/self/clear_refs", os.O_WRONLY)
        self._hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        self._return_freed()

    def start(self) -> None:
        """Set the limit, and note the memory in use."""
        now = self._read()
        resource.setrlimit(resource.RLIMIT_DATA, (now["VmData"] + MEMORY, self._hard))
        if now["VmHWM"] > now["VmRSS"]:
            os.pwrite(self._clear, b"5", 0)  # resets the peak to what is in use
            now = self._read()
        self._before = now["VmHWM"]

    def stop(self) -> int:
        """Return how far memory has grown since the start, at its peak, in bytes."""
        grown = self._read()["VmHWM"] - self._before
        if grown > FREED:
            # Otherwise the C library keeps it, and a later case that uses it again would seem to use none.
            self._return_freed()
        return grown

    def _read(self) -> dict[str, int]:
        return fields(os.pread(self._status, 4096, 0))

    def _return_freed(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


def fields(status: bytes) -> dict[str, int]:
    """Return the memory fields of /proc/self/status, in bytes."""
    return {name.decode(): int(value) << 10 for name, value in re.findall(rb"(VmHWM|VmRSS|VmData):\s+(\d+)", status)}


def status(what: str) -> int:
    """Return a field of /proc/self/status, in bytes."""
    return fields(Path("/proc/self/status").read_bytes())[what]


def attempt(guard: Guard, folder: Path, action: Callable[[], str]) -> tuple[str, str]:
    """Run an action under the guard. Return ("done", its result) or ("fault", a description)."""
    try:
        with guard.watching(folder):
            words = action()
        return "done", words
    except BaseException as error:
        return "fault", f"{type(error).__name__}: {str(error)[:2000]}\n{_place(error)}"


def _place(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_tb(error.__traceback__)[-4:])
