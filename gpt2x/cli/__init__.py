"""The command line. Heavy imports live inside the commands, so that help is instant."""

from __future__ import annotations

import os
import signal
import warnings
from typing import Any

import click

from .. import _EXTRAS
from .._version import __version__
from .bench import bench
from .convert import convert
from .demo import demo
from .export import export
from .formats import formats
from .generate import generate
from .inspect import inspect
from .score import score
from .serve import serve
from .text import printable, warn
from .verify import verify


class Main(click.Group):
    """Every failure becomes one message on stderr and exit code 1, here and nowhere else."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        # click prints these itself, each with its own exit code.
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:
            raise  # the reader has seen enough; click ends quietly
        except Exception as error:
            if os.environ.get("GPT2X_TRACEBACK"):
                raise
            raise click.ClickException(printable(explain(error))) from None


def explain(error: Exception) -> str:
    """What to say of an exception."""
    from converters import ConversionError

    from ..runtimes.base import InputError

    if isinstance(error, ConversionError | InputError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
        return f"this needs {error.name}: pip install 'gpt2x[{_EXTRAS[error.name]}]'"
    if isinstance(error, OSError):
        return f"{error.filename or 'input/output'}: {error.strerror or error}"
    if isinstance(error, MemoryError):
        return "not enough memory"
    return f"{type(error).__name__}: {error}\nThis is a fault in gpt2x. GPT2X_TRACEBACK=1 shows where it happened."


@click.group(
    cls=Main,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 refused or failed, 2 wrong usage.",
)
@click.version_option(__version__, prog_name="gpt2x")
def main() -> None:
    """Convert GPT-2 weights from any format to any other, and prove that nothing changed.

    \b
    Start with:
      gpt2x demo
      gpt2x convert models/124M gpt2.safetensors
      gpt2x convert openai://124M gpt2.safetensors
      gpt2x export models/124M --onnx gpt2-onnx/
      gpt2x verify gpt2.safetensors --against openai-124M
    """
    signal.signal(signal.SIGTERM, _terminate)
    warnings.showwarning = _warn


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning in one line, without the line of code that it came from."""
    warn(str(message))


def _terminate(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)  # unwinds, so that no half-written file stays


for command in (convert, export, inspect, verify, generate, score, serve, bench, formats, demo):
    main.add_command(command)

__all__ = ["main"]
