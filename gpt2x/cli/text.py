"""Printing to a terminal."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

SAMPLE = 1 << 20  # bytes of a text that are enough to compare or calibrate a model
PER_BYTE = 8  # bytes of memory that a text and its tokens need at least, for each byte of its file
CHUNK = 1 << 20


def need(*modules: str, extra: str) -> None:
    """Stop with the command to install a missing module."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise click.ClickException(f"this needs {' and '.join(missing)}: pip install 'gpt2x[{extra}]'")


def printable(text: str) -> str:
    """Escape control characters, which may come from a file."""
    # A name in a file could hold a sequence that moves the cursor or changes what the terminal shows.
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def warn(sentence: str) -> None:
    """Print a warning to stderr."""
    click.echo(printable(f"Warning: {sentence}"), err=True)


def read_text(path: str, limit: int | None = None) -> str:
    """The text in a file, or its first ``limit`` bytes; ``-`` is standard input.

    Raises:
        FormatError: if it is not UTF-8, or a whole text and its tokens do not fit into this machine's memory.
    """
    from converters import FormatError

    from ..memory import machine_memory

    with click.open_file(path, "rb") as file:
        if limit is None:
            data = _read_at_most(file, path, machine_memory() // PER_BYTE)
            complete = True
        else:
            data = file.read(limit)
            complete = not file.read(1)
    try:
        # A limit may cut the last character in two.
        return data.decode("utf-8", "strict" if complete else "ignore")
    except UnicodeDecodeError as error:
        raise FormatError(f"{_name(path)}: not UTF-8 at byte {error.start}") from None


def _read_at_most(file: IO[bytes], path: str, most: int) -> bytes:
    """All of a file, which is refused before it is read if its size says that it is too large.

    Raises:
        FormatError: if it has more than ``most`` bytes.
    """
    from converters import FormatError

    fault = FormatError(
        f"{_name(path)}: more than {most} bytes, so that the text and its tokens do not fit into this machine's memory: "
        "split it"
    )
    if os.path.isfile(path) and os.path.getsize(path) > most:
        raise fault
    data = bytearray()
    for chunk in iter(lambda: file.read(CHUNK), b""):
        data += chunk
        if len(data) > most:
            raise fault
    return bytes(data)


def read_whole_text(path: str, most: int) -> str:
    """The text in a file of at most so many bytes; ``-`` is standard input.

    Raises:
        FormatError: if it is larger, or not UTF-8.
    """
    from converters import FormatError

    with click.open_file(path, "rb") as file:
        data: bytes = file.read(most + 1)
    if len(data) > most:
        raise FormatError(f"{_name(path)}: exceeds the limit of {most} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{_name(path)}: not UTF-8 at byte {error.start}") from None


def _name(path: str) -> str:
    return "standard input" if path == "-" else path


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], None] | None]:
    """A progress bar of bytes on stderr if that is a terminal; None otherwise."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _bar(total, DownloadColumn(), TransferSpeedColumn()) as advance:
        yield advance


@contextmanager
def steps_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of things to do, on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    from rich.progress import MofNCompleteColumn

    with _bar(total, MofNCompleteColumn()) as advance:
        yield advance


@contextmanager
def _bar(total: int, *counts: ProgressColumn) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda n: progress.advance(task, n)
