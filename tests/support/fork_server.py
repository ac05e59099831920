"""A process that imports gpt2x once, and forks a process for each command. This is faster than starting Python each time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Reads a line for each command: words, with tabs between.
SERVER = """
import os, sys
from converters import arrays, saving
from converters.containers import gguf, llmc, safetensors, tf_bundle, torch_zip
from gpt2x.cli import main

def answer():
    return ()

{program}
print("ready", flush=True)
for line in sys.stdin:
    words = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        main(prepare(*words))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, *answer(), flush=True)
"""


@contextmanager
def fork_server(program: str) -> Iterator[Callable[..., list[int]]]:
    """Yield ``run(*words)``, which returns the exit code of a command and what ``answer`` adds to it.

    Args:
        program: defines ``prepare(*words)``, which prepares the forked process and returns the arguments of gpt2x. It may define
            ``answer()``, which returns numbers once that process has ended.
    """
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SERVER.format(program=program)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdin and server.stdout
        stdin, stdout = server.stdin, server.stdout
        assert stdout.readline() == "ready\n"

        def run(*words: object) -> list[int]:
            stdin.write("\t".join(map(str, words)) + "\n")
            stdin.flush()
            return [int(number) for number in stdout.readline().split()]

        yield run
        stdin.close()
