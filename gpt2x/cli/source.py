"""SRC as a path: a URL is downloaded first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import click

from ..precisions import PRECISIONS
from .text import printable, progress_bar

Command = TypeVar("Command", bound="Callable[..., object]")

if TYPE_CHECKING:
    from ..download.common import Want


PRECISION = click.Choice(list(PRECISIONS))
IGNORE_CONFIG_KEY = click.option(
    "--ignore-config-key",
    "ignore_config_keys",
    metavar="KEY",
    multiple=True,
    help="Leave KEY out of the configuration (repeatable).",
)


def adapter_option(model: str) -> Callable[[Command], Command]:
    """The option ``--adapter`` of a command whose argument is called ``model``."""
    return click.option("--adapter", metavar="DIR", help=f"PEFT adapter (LoRA) to merge into the weights of {model}.")


def is_remote(source: str) -> bool:
    """Whether a source is a URL, not a path."""
    return "://" in source


def local(source: str, want: Want = "weights") -> str:
    """The path of a source; a URL is downloaded first.

    Raises:
        ConversionError: if the download fails.
    """
    if not is_remote(source):
        _check_meant(source)
        return source
    from ..download.fetch import fetch

    return str(fetch(source, want=want, progress=progress_bar, warn=_warn))


def _check_meant(source: str) -> None:
    """Refuse a missing path that looks like the name of a model on the Hub.

    Raises:
        ConversionError: with the URL of that model.
    """
    import re
    from pathlib import Path

    from converters import FormatError

    path = Path(source)
    hub = re.fullmatch(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*", source) and not path.parent.exists()
    short = re.fullmatch(r"(distil)?gpt2(-medium|-large|-xl)?", source)
    if (hub or short) and not path.exists() and not Path(f"{source}.index").exists():
        address = source if hub else f"{'distilbert' if short and short[1] else 'openai-community'}/{source}"
        raise FormatError(
            f"{source}: no such file or directory. For the model on the Hugging Face Hub, pass hf://{address}"
        )


def local_adapter(source: str | None) -> str | None:
    """The path of an adapter; a URL is downloaded first.

    Raises:
        ConversionError: if the download fails.
    """
    return local(source, "adapter") if source else None


def runnable(source: str, runtime: str | None, precision: str | None = None) -> str:
    """The path of a source for a command that runs it: an ONNX model if there is one, unless ``runtime`` is torch."""
    want: Want = "weights" if runtime == "torch" else "onnx" if runtime == "onnx" or precision else "either"
    return local(source, want)


def check_before(source: str, target: str, *, force: bool, directory: bool) -> None:
    """Refuse a destination before a download begins, not after it.

    Raises:
        DestinationError: if it exists and ``force`` is false.
    """
    from pathlib import Path

    from converters.io.publishing import check_free

    if is_remote(source):
        check_free(Path(target), force, directory)


def _warn(sentence: str) -> None:
    click.echo(printable(f"Warning: {sentence}"), err=True)
