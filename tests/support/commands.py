"""What became of a command: of one that ran in this process, or in another."""

from __future__ import annotations

import subprocess
from typing import TypeVar

from click.testing import Result

# Run as `python -c SEVERAL COMMANDS`, with a JSON list of commands: it prints the exit code, stdout and stderr of each.
SEVERAL = """if True:
    import json, sys
    from click.testing import CliRunner
    from gpt2x.cli import main
    results = [CliRunner().invoke(main, command) for command in json.loads(sys.argv[1])]
    print(json.dumps([(r.exit_code, r.stdout, r.stderr) for r in results]))
"""


class Done:
    """A finished process, with the names of click's results."""

    def __init__(self, process: subprocess.CompletedProcess[str] | tuple[int, str, str]):
        if isinstance(process, subprocess.CompletedProcess):
            process = (process.returncode, process.stdout, process.stderr)
        self.exit_code, self.stdout, self.stderr = process
        self.output = self.stdout + self.stderr


AnyResult = TypeVar("AnyResult", Result, Done)


def done(result: AnyResult) -> AnyResult:
    """The result of a command that must have succeeded."""
    assert result.exit_code == 0, result.output
    return result


def assert_refused(result: Result | Done, *words: str) -> None:
    """One clear error on stderr, exit code 1, no traceback."""
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: "), result.stderr
    assert "Traceback" not in result.output
    assert "fault in gpt2x" not in result.stderr, result.stderr
    for word in words:
        assert word in result.stderr
