"""SRC as a path: where it is an address, it is downloaded first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .text import printable, progress_bar

if TYPE_CHECKING:
    from gpt2x.download import Want


def is_remote(source: str) -> bool:
    """Whether a source is an address, not a path."""
    return "://" in source


def local(source: str, want: Want = "weights") -> str:
    """The path that a source means.

    Raises:
        ConversionError: if it is an address that cannot be fetched from.
    """
    if not is_remote(source):
        return source
    from gpt2x.download import fetch

    return str(fetch(source, want=want, progress=progress_bar, warn=_warn))


def runnable(source: str, runtime: str | None, precision: str | None = None) -> str:
    """The path that a source means for a command that runs it: ONNX where there is some, unless torch is asked for."""
    want: Want = "weights" if runtime == "torch" else "onnx" if runtime == "onnx" or precision else "either"
    return local(source, want)


def check_before(source: str, target: str, *, force: bool, directory: bool) -> None:
    """Refuse a destination before a download begins, as it would be refused after it.

    Raises:
        DestinationError: if it exists and is not to be replaced.
    """
    from pathlib import Path

    from converters.files import check_free

    if is_remote(source):
        check_free(Path(target), force, directory)


def _warn(sentence: str) -> None:
    click.echo(printable(f"Warning: {sentence}"), err=True)
