"""A file of JSON Lines, worked through line by line into another one: skipping bad lines, and resumable."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import click

from converters import DestinationError, FormatError
from converters.io.json import parse_value

from .text import printable

MAX_LINE = 16 << 20  # bytes


@dataclass(frozen=True)
class Work:
    """What a command does with a file of lines.

    Attributes:
        command: its name, for messages.
        verb: what it does with a text: "continues".
        key: the key of the text in each line.
        source: the option or argument that names the file.
    """

    command: str
    verb: str
    key: str
    source: str


class Lines:
    """The lines of a file, from a line on."""

    def __init__(self, work: Work, path: Path, done: int) -> None:
        self.work = work
        self.path = path
        self.done = done
        self.skipped = 0
        with path.open("rb") as file:
            self.remaining = sum(1 for _ in lines_of(file)) - done
        self.objects: dict[int, dict[str, Any]] = {}  # by line, until its result is written
        self.order: deque[int] = deque()

    def texts(self) -> Iterator[tuple[int, str]]:
        """The number and the text of each line that has one. The others are reported and skipped."""
        with self.path.open("rb") as file:
            for line, data in enumerate(lines_of(file), 1):
                if line <= self.done:
                    continue
                try:
                    self.objects[line] = parse_line(data, self.work.key)
                except ValueError as error:
                    self.skip(line, str(error))
                    continue
                self.order.append(line)
                yield line, self.objects[line][self.work.key]

    def next_complete(self, results: dict[int, Any]) -> Iterator[int]:
        """The lines whose turn it is to be written."""
        while self.order and self.order[0] in results:
            yield self.order.popleft()

    def skip(self, line: int, reason: str) -> None:
        """Report a line that has no result."""
        self.skipped += 1
        click.echo(printable(f"{self.path}:{line}: {reason}; skipped"), err=True)

    def report(self) -> None:
        """Say how many lines were skipped, if any."""
        if self.skipped:
            click.echo(f"Skipped {self.skipped} of {self.remaining} lines, see above.", err=True)


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file. Of one that is longer than ``MAX_LINE``, only the first bytes, one more than the limit."""
    while data := file.readline(MAX_LINE + 1):
        yield data
        while len(data) > MAX_LINE and not data.endswith(b"\n"):
            data = file.readline(MAX_LINE + 1)


def parse_line(data: bytes, key: str) -> dict[str, Any]:
    """The object of a line.

    Raises:
        ValueError: if it is not one with a text under this key.
    """
    if len(data) > MAX_LINE:
        raise ValueError(f"the line has more than {MAX_LINE} bytes")
    try:
        found = parse_value(data, "")
    except FormatError as error:
        reason = str(error).removeprefix(": ")
        raise ValueError(f"not JSON ({reason})") from None
    if not isinstance(found, dict):
        raise ValueError(f'not an object such as {{"{key}": "..."}}')
    if not isinstance(found.get(key), str):
        raise ValueError(f'no text under the key "{key}"')
    return found


def write_line(file: BinaryIO, result: dict[str, Any]) -> None:
    """Write an object as a line."""
    file.write(json.dumps(result, ensure_ascii=False).encode("utf-8", "replace") + b"\n")


# ------------------------------------------------------------------------------------------------------------ resume


def open_output(output: Path, resume: bool) -> BinaryIO:
    """Open a new output, or with ``resume`` one that may exist.

    Raises:
        DestinationError: if it exists and ``resume`` is false.
    """
    if not output.exists():
        return output.open("x+b")
    if not resume:
        raise DestinationError(f"{output} exists: pass --resume to continue it, or another --output")
    return output.open("r+b")


def lines_done(work: Work, file: BinaryIO, output: Path, source: Path, results: int) -> int:
    """The last line of the source that has all its results. What was written after them is removed.

    Args:
        results: how many each line has.

    Raises:
        DestinationError: if the output does not hold results of this source.
    """
    groups = [_Group(0, "")]
    offset = 0
    for data in lines_of(file):
        # Cut off while it was written.
        if not data.endswith(b"\n"):
            break
        try:
            result = parse_line(data, work.key)
            line = int(result["line"])
        except (ValueError, KeyError, TypeError):
            raise DestinationError(f"{output} does not hold results of {work.command}; pass another --output") from None
        offset += len(data)
        if line != groups[-1].line:
            groups = [groups[-1], _Group(line, result[work.key])]
        groups[-1].results += 1
        groups[-1].end = offset
    # A line may have fewer results than asked for, as of beam search; then it is computed again.
    complete = groups[-1] if groups[-1].results >= results else groups[0]
    file.truncate(complete.end)
    file.seek(complete.end)
    if complete.line:
        _check_same(work, output, source, complete)
    return complete.line


@dataclass
class _Group:
    """The results of one line of the source."""

    line: int
    text: str
    results: int = 0
    end: int = 0  # where they end in the file


def _check_same(work: Work, output: Path, source: Path, group: _Group) -> None:
    with source.open("rb") as file:
        data = next(islice(lines_of(file), group.line - 1, None), b"")
    try:
        # The last line that is done shows whether it is the same source: comparing all would take as long as reading
        # both.
        same = parse_line(data, work.key)[work.key] == group.text
    except ValueError:
        same = False
    if not same:
        raise DestinationError(
            f"{output}: its line {group.line} {work.verb} another {work.key} than {source}; pass the same {work.source}, or "
            "another --output"
        )
