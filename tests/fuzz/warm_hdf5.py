"""The process that lists HDF5 files, for a fuzzer: it starts no Python for a file, and forks no process for each.

    python tests/fuzz/warm_hdf5.py PROGRAM [FOLDER ...]

It reads a line of JSON for each file. A child lists many files, one after another, with ``main`` of PROGRAM (``hdf5_listing.py``), which
limits its own time and memory. A file with which the child does not answer as it should (it crashes, or raises an error) is listed
again by a child of its own, which ends as a process of Python ends, with the exit handlers of the HDF5 library. That result is
the one of the file. So a file can crash, hang or exhaust nothing but a child, and no result depends on the files before.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import io
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLD = 1000  # of so many files, one is also listed by a new process, with the same result
LISTED = 500  # files of one child
GROWN = 8 << 20  # memory that files may leave behind in a child


class WarmListing:
    """What ``subprocess.run`` is for the HDF5 reader: it returns what the process would have printed, and its exit code."""

    def __init__(self) -> None:
        self.server: subprocess.Popen[bytes] | None = None
        self.calls = 0
        self.cpu = 0.0  # seconds of the processor that the server and its children took

    def run(self, command: list[str], *, timeout: float, env: dict[str, str], **options: Any) -> Any:
        """List the file that a command names.

        Raises:
            subprocess.TimeoutExpired: if it takes longer than ``timeout``.
            RuntimeError: if a new process has another result, or the server itself ends.
        """
        sys.audit("subprocess.Popen", command[0], command, None, env)  # the guard allows this program only
        if self.server is None:
            self._start(command, env)
        answer = self._ask(command[5], timeout)
        self.calls += 1
        if self.calls % COLD == 1:
            done = subprocess.run(command, timeout=timeout, env=env, **options)
            cold, alone = (done.returncode, done.stdout), self._ask(command[5], timeout, alone=True)
            # A process that crashes when it ends has listed the file before, which the child for many files does, too.
            if cold != alone or (cold[0] == 0 and cold != answer):
                raise RuntimeError(f"a new process returns {cold}, a fork {alone}, and a fork for many files {answer}")
            answer = alone
        return subprocess.CompletedProcess(command, *answer, b"")

    def _start(self, command: list[str], env: dict[str, str]) -> None:
        program = [*command[:4], __file__, command[4], *command[6:]]
        self.server = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        atexit.register(self.close)

    def _ask(self, path: str, timeout: float, alone: bool = False) -> tuple[int, bytes]:
        assert self.server and self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps([path, timeout, alone]).encode() + b"\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that lists HDF5 files ended with {self.server.wait()}")
        code, size, self.cpu = json.loads(answer)
        printed = self.server.stdout.read(size)
        if code is None:
            raise subprocess.TimeoutExpired(path, timeout)
        return code, printed

    def close(self) -> None:
        """End the server."""
        if self.server:
            self.server.communicate()
            self.server = None


# ----------------------------------------------------------------------------------------------------------- the server


def serve(program: str) -> None:
    """Answer each line of standard input.

    The answer is the exit code of a process (null if it took too long), the size of what it printed, the time of the processor so far,
    and what it printed.
    """
    listing = _loaded(program)
    answers = os.fdopen(os.dup(1), "wb")
    children = Children(listing, answers.fileno())
    for line in sys.stdin.buffer:
        path, timeout, alone = json.loads(line)
        code, printed = children.alone(path, timeout) if alone else children.answer(path, timeout)
        answers.write(json.dumps([code, len(printed), children.cpu()]).encode() + b"\n" + printed)
        answers.flush()


def _loaded(program: str) -> Any:
    """The module of the program, after all that it imports."""
    import h5py  # noqa: F401

    spec = importlib.util.spec_from_file_location("hdf5_listing", program)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Child:
    """A fork, the pipe to it, the pipe from it, and the time of the processor that it took."""

    process: int
    questions: int
    answers: int
    cpu: float = 0

    def end(self) -> None:
        """Kill it, and wait for it."""
        os.close(self.questions)
        os.close(self.answers)
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)


class Children:
    """Lists files in a child for many, or in one of its own."""

    def __init__(self, listing: Any, answers: int) -> None:
        self.listing = listing
        self.answers = answers  # the pipe of the server, which no child may write to
        self.child: Child | None = None

    def answer(self, path: str, timeout: float) -> tuple[int | None, bytes]:
        """The exit code of a process that lists a file (None if it takes too long), and what it prints."""
        end = time.monotonic() + timeout
        if self.child is None:
            self.child = self._fork()
        os.write(self.child.questions, json.dumps(path).encode() + b"\n")
        line, is_late = _line(self.child.answers, end)
        if is_late:
            self._renew()
            return None, b""
        if not line:
            self._renew()
            return self.alone(path, timeout)
        is_clean, cpu, printed = json.loads(line)
        self.child.cpu = cpu
        if not is_clean:
            self._renew()
        return 0, printed.encode()

    def cpu(self) -> float:
        """The time of the processor of the server, of ended children, and of this one."""
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages) + (self.child.cpu if self.child else 0)

    def _renew(self) -> None:
        assert self.child
        self.child.end()
        self.child = None

    def _fork(self) -> Child:
        questions, to_child = os.pipe()
        from_child, answers = os.pipe()
        process = os.fork()
        if process == 0:
            for descriptor in (to_child, from_child, self.answers):
                os.close(descriptor)
            _list_many(self.listing, questions, answers)
        os.close(questions)
        os.close(answers)
        return Child(process, to_child, from_child)

    def alone(self, path: str, timeout: float) -> tuple[int | None, bytes]:
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(self.answers)
            os.close(readable)
            _list(self.listing, path, writable)
        os.close(writable)
        code, printed = _wait(child, readable, timeout)
        os.close(readable)
        return code, printed


def _list_many(listing: Any, questions: int, answers: int) -> None:
    """List each file that is asked for. Answer with a line of JSON, and end this process at the first error."""
    code = 1
    try:
        devices = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(devices, number)
        asked = os.fdopen(questions, "rb")
        objects, data = _open_objects(), _data()
        for count, line in enumerate(asked, start=1):
            sys.stdout = printed = io.StringIO()
            listing.main(json.loads(line))
            is_clean = count < LISTED and _open_objects() == objects and _data() - data < GROWN
            os.write(answers, json.dumps([is_clean, time.process_time(), printed.getvalue()]).encode() + b"\n")
        code = 0
    finally:
        os._exit(code)


def _open_objects() -> int:
    """How many files, data sets and other objects the library has open."""
    import h5py

    return int(h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_ALL))


def _data() -> int:
    """The memory for data that this process has allocated, in bytes."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[5]) * resource.getpagesize()


def _line(readable: int, end: float) -> tuple[bytes, bool]:
    """A line from a child, which is empty if the child ended; and whether the time is over."""
    line = bytearray()
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([readable], [], [], max(0, end - time.monotonic()))
        if not ready:
            return b"", True
        chunk = os.read(readable, 1 << 16)
        if not chunk:
            return b"", False
        line += chunk
    return bytes(line), False


def _list(listing: Any, path: str, writable: int) -> None:
    """Run the program in this process, and end it."""
    empty = os.open(os.devnull, os.O_RDWR)
    for number, target in enumerate((empty, writable, empty)):
        os.dup2(target, number)
    code = 1
    try:
        listing.main(path)
        sys.stdout.flush()
        atexit._run_exitfuncs()
        code = 0
    finally:
        ctypes.CDLL(None).exit(code)


def _wait(child: int, readable: int, timeout: float) -> tuple[int | None, bytes]:
    """What a process printed until it ended, and its exit code as ``subprocess`` states it."""
    printed, end = bytearray(), time.monotonic() + timeout
    while True:
        ready, _, _ = select.select([readable], [], [], max(0, end - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None, b""
        chunk = os.read(readable, 1 << 16)
        if not chunk:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), bytes(printed)
        printed += chunk


if __name__ == "__main__":
    sys.path += sys.argv[2:]  # where h5py and numpy are
    serve(str(Path(sys.argv[1])))
