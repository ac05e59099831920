"""The process that lists an HDF5 file, from one that has imported h5py: a small part of the time of starting Python for each.

    python tests/fuzz/warm_hdf5.py PROGRAM [FOLDER ...]

It reads a line of JSON for each file, and forks. The fork runs ``main`` of PROGRAM (``hdf5_listing.py``), which limits its own
time and memory, and ends as a process of Python ends, with the exit handlers of the HDF5 library. So a file can crash, hang or
exhaust nothing but the fork of its own.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COLD = 100  # of so many files, one is also listed by a new process, with the same result


class WarmListing:
    """What ``subprocess.run`` is for the HDF5 reader: it returns what the process would have printed, and its exit code."""

    def __init__(self) -> None:
        self.server: subprocess.Popen[bytes] | None = None
        self.calls = 0

    def run(self, command: list[str], *, timeout: float, env: dict[str, str], **options: Any) -> Any:
        """List the file that a command names.

        Raises:
            subprocess.TimeoutExpired: if it takes longer than ``timeout``.
            RuntimeError: if a new process has another result, or the server itself ends.
        """
        sys.audit("subprocess.Popen", command[0], command, None, env)  # the guard allows this program only
        if self.server is None:
            self._start(command, env)
        code, printed = self._ask(command[5], timeout)
        self.calls += 1
        if self.calls % COLD == 1:
            cold = subprocess.run(command, timeout=timeout, env=env, **options)
            if (cold.returncode, cold.stdout) != (code, printed):
                raise RuntimeError(f"a new process returns {cold.returncode} {cold.stdout!r}, not {code} {printed!r}")
        return subprocess.CompletedProcess(command, code, printed, b"")

    def _start(self, command: list[str], env: dict[str, str]) -> None:
        program = [*command[:4], __file__, command[4], *command[6:]]
        self.server = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        atexit.register(self.close)

    def _ask(self, path: str, timeout: float) -> tuple[int, bytes]:
        assert self.server and self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps([path, timeout]).encode() + b"\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that lists HDF5 files ended with {self.server.wait()}")
        code, size = json.loads(answer)
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
    """Answer each line of standard input: the exit code of a fork (null if it took too long), the size of what it printed, and that."""
    listing = _loaded(program)
    answers = os.fdopen(os.dup(1), "wb")
    for line in sys.stdin.buffer:
        path, timeout = json.loads(line)
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            answers.close()
            os.close(readable)
            _list(listing, path, writable)
        os.close(writable)
        code, printed = _wait(child, readable, timeout)
        os.close(readable)
        answers.write(json.dumps([code, len(printed)]).encode() + b"\n" + printed)
        answers.flush()


def _loaded(program: str) -> Any:
    """The module of the program, after all that it imports."""
    import h5py  # noqa: F401

    spec = importlib.util.spec_from_file_location("hdf5_listing", program)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
