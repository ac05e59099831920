"""A file of JSON Lines, worked through line by line into another one: skipping bad lines, and resumable."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import click

from converters import DestinationError, FormatError
from converters.io.json import parse_value

from .text import printable

MAX_LINE = 16 << 20  # bytes of a line of the source
MAX_RESULT = 8 * MAX_LINE  # bytes of a line of the output, which spells the same text in another way, and adds to it
BOM = b"\xef\xbb\xbf"  # what some editors on Windows write at the start of a file


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
            self.remaining = sum(1 for line, _ in source_lines(file) if line > done)
        self.objects: dict[int, dict[str, Any]] = {}  # by line, until its result is written
        self.order: deque[int] = deque()

    def texts(self) -> Iterator[tuple[int, str]]:
        """The number and the text of each line that has one. The others are reported and skipped."""
        with self.path.open("rb") as file:
            for line, data in source_lines(file):
                if line <= self.done:
                    continue
                try:
                    found = parse_line(data, self.work.key, MAX_LINE)
                    _check_writable(found)
                except ValueError as error:
                    self.skip(line, str(error))
                    continue
                self.objects[line] = found
                self.order.append(line)
                yield line, found[self.work.key]

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


def source_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines of a source with their numbers. Blank lines, and a byte order mark before the first line, are left out."""
    for line, data in enumerate(lines_of(file, MAX_LINE), 1):
        if line == 1:
            data = data.removeprefix(BOM)
        if data.strip():
            yield line, data


def lines_of(file: BinaryIO, limit: int) -> Iterator[bytes]:
    """The lines of a file. Of one that is longer than ``limit``, only the first bytes, one more than the limit."""
    while data := file.readline(limit + 1):
        yield data
        while len(data) > limit and not data.endswith(b"\n"):
            data = file.readline(limit + 1)


def parse_line(data: bytes, key: str, limit: int) -> dict[str, Any]:
    """The object of a line.

    Raises:
        ValueError: if it is not one with a text under this key.
    """
    if len(data) > limit:
        raise ValueError(f"the line has more than {limit} bytes")
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


def _check_writable(found: dict[str, Any]) -> None:
    """Refuse numbers that JSON does not have. Python reads NaN, Infinity and 1e999, and the output has every key again.

    Raises:
        ValueError: if there is one.
    """
    try:
        json.dumps(found, allow_nan=False)
    except ValueError:
        raise ValueError("not JSON (a number is NaN, infinite, or too large)") from None


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


def lines_done(work: Work, file: BinaryIO, output: Path, source: Path, results: int, *, fewer: bool = False) -> int:
    """The last line of the source that has all its results. What was written after them is removed.

    Args:
        results: how many each line has.
        fewer: whether a line may have fewer, as of beam search. The last line is then computed again.

    Raises:
        DestinationError: if the output does not hold results of this source, or holds another number of them for a line.
    """
    groups = [_Group(0, "")]
    offset = 0
    for data in lines_of(file, MAX_RESULT):
        # Cut off while it was written.
        if not data.endswith(b"\n"):
            break
        try:
            result = parse_line(data, work.key, MAX_RESULT)
            line = int(result["line"])
        except (ValueError, KeyError, TypeError, OverflowError):
            raise DestinationError(f"{output} does not hold results of {work.command}; pass another --output") from None
        offset += len(data)
        if line != groups[-1].line:
            _check_number(output, groups[-1], results, fewer)
            groups = [groups[-1], _Group(line, result[work.key])]
        groups[-1].results += 1
        groups[-1].end = offset
    _check_number(output, groups[-1], results, True)  # the last line may be incomplete
    complete = groups[-1] if groups[-1].results >= results else groups[0]
    if groups[-1].line:
        _check_same(work, output, source, groups[-1])  # before anything is removed
    file.truncate(complete.end)
    file.seek(complete.end)
    return complete.line


@dataclass
class _Group:
    """The results of one line of the source."""

    line: int
    text: str
    results: int = 0
    end: int = 0  # where they end in the file


def _check_number(output: Path, group: _Group, results: int, fewer: bool) -> None:
    """Refuse an output of a run that wrote another number of results for each line."""
    if not group.line:
        return
    if group.results > results or (group.results < results and not fewer):
        raise DestinationError(
            f"{output}: has {group.results} results of line {group.line}, and {results} are asked for: continue it with "
            "the options that it was begun with, or pass another --output"
        )


def _check_same(work: Work, output: Path, source: Path, group: _Group) -> None:
    with source.open("rb") as file:
        data = next((data for line, data in source_lines(file) if line == group.line), b"")
    try:
        # The last line that is done shows whether it is the same source: comparing all would take as long as reading
        # both.
        same = parse_line(data, work.key, MAX_LINE)[work.key] == group.text
    except ValueError:
        same = False
    if not same:
        raise DestinationError(
            f"{output}: its line {group.line} {work.verb} another {work.key} than {source}; pass the same {work.source}, or "
            "another --output"
        )
