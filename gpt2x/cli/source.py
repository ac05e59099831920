"""The model that a command reads: its path, of which a URL is downloaded first, and the options on its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ..precisions import PRECISIONS, precisions_in
from ..weight_options import WeightOptions
from .text import progress_bar, warn

if TYPE_CHECKING:
    from pathlib import Path

    from ..download.common import Want

PRECISION = click.Choice(list(PRECISIONS))


class RunPrecision(click.ParamType[str]):
    """A precision to run, or a pair: one for prompts and one for decoding."""

    name = "precision"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join(PRECISIONS)}|w8a8+int4|...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            precisions_in(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)


def weight_options(model: str, **adapter: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options that say how the weights of the argument ``model`` are opened.

    The command receives their values together, as its argument ``weights`` (a ``WeightOptions``).

    Args:
        adapter: of ``click.option``, for a command where --adapter is more than the directory of one to merge.
    """
    merged = {"metavar": "DIR", "help": f"PEFT adapter (LoRA) to merge into the weights of {model}."}
    options = (
        click.option("--n-head", type=click.IntRange(min=1), help="Attention heads, if no configuration states them."),
        click.option("--adapter", **{**merged, **adapter}),
        click.option("--entry", metavar="KEYS", help=f"Keys of the weights, if {model} is a .pt with several models."),
        click.option("--prefix", metavar="PREFIX", help=f"Prefix of the names to read, if {model} has several GPT-2s."),
        click.option(
            "--tie/--untie",
            default=None,
            help="Drop or keep an lm_head that differs from the token embedding, if no configuration states that it is untied. "
            "--untie also keeps the changes of an adapter to a tied pair apart.",
        ),
        click.option(
            "--ignore-config-key",
            "ignore_config_keys",
            metavar="KEY",
            multiple=True,
            help="Leave KEY out of the configuration (repeatable).",
        ),
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def collecting(*arguments: Any, **values: Any) -> None:
            weights = {name: values.pop(name) for name in WeightOptions.__annotations__}
            command(*arguments, weights=weights, **values)

        # Decorators apply from the last to the first, and help lists options in the order of the source.
        for option in reversed(options):
            collecting = option(collecting)
        return collecting

    return decorate


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

    return str(fetch(source, want=want, progress=progress_bar, warn=warn))


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


def named_adapter(value: str | Path | None) -> tuple[str, str] | None:
    """The name and the directory of NAME=DIR. None for a directory alone: a path that exists is one, and a URL.

    Raises:
        UsageError: if the name cannot be that of a file, or there is no directory.
    """
    import os

    from ..contract import check_adapter_names

    text = str(value or "")
    name, equals, folder = text.partition("=")
    if not equals or "://" in name or os.path.lexists(text):
        return None
    try:
        check_adapter_names([name])
    except ValueError as error:
        raise click.UsageError(f"--adapter {text[:200]}: {error}") from None
    if not folder:
        raise click.UsageError(f"--adapter {text}: no directory after the name")
    return name, folder


def with_local_adapter(weights: WeightOptions) -> WeightOptions:
    """The same options with the path of the adapter; a URL is downloaded first.

    Raises:
        ConversionError: if the download fails.
    """
    adapter = weights.get("adapter")
    return {**weights, "adapter": local(str(adapter), "adapter")} if adapter else weights


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
