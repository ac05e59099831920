"""What commands that run a model share: the model, its tokenizer, and their options."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..weight_options import WeightOptions, why_weights
from .source import is_remote, runnable, with_local_adapter

if TYPE_CHECKING:
    from ..runtimes.base import Decoder
    from ..tokenizer import Tokenizer

TOKENIZER = click.option(
    "--tokenizer",
    "tokenizer_dir",
    metavar="DIR",
    help="Directory (or GGUF file) with the tokenizer (default: beside the model).",
)
RUNTIME = click.option(
    "--runtime", type=click.Choice(["torch", "onnx"]), help="What to run if MODEL has both weights and ONNX."
)
THREADS = click.option("--threads", type=click.IntRange(min=1), help="Threads per operator (default: one per core).")

PROVIDER = click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "webgpu"]),
    help="ONNX Runtime's execution provider (default: cpu). Others need another package of ONNX Runtime.",
)


@dataclass(frozen=True)
class Running:
    """A model on this machine, and how it is run.

    Args:
        model: its path.
        runtime: "torch" or "onnx", if the user asks for one.
        precision: the ONNX model of a directory that the user asks for.
        threads: threads of each operator.
        weights: how weights are opened.
        adapter: the name of an adapter beside an ONNX model, if the option --adapter is one.
        provider: the execution provider of an ONNX model.
    """

    model: str
    runtime: str | None
    precision: str | None
    threads: int | None
    weights: WeightOptions
    adapter: str | None = None
    provider: str | None = None

    @classmethod
    def of(
        cls,
        source: str,
        runtime: str | None,
        precision: str | None,
        threads: int | None,
        weights: WeightOptions,
        provider: str | None = None,
    ) -> Running:
        """The model of a source, which is downloaded first if it is a URL.

        Raises:
            ConversionError: if the download fails.
        """
        from ..runtimes.opening import stored_adapter

        adapter = str(weights.get("adapter") or "")
        rest: WeightOptions = {**weights, "adapter": None}
        is_name = bool(adapter) and not is_remote(adapter) and not os.path.lexists(adapter)
        merges = why_weights(rest if is_name else weights) is not None
        model = runnable(source, "torch" if merges and runtime is None else runtime, precision)
        stored = stored_adapter(model, adapter or None, runtime)
        opened = rest if stored else with_local_adapter(weights)
        return cls(model, runtime, precision, threads, opened, stored, provider)

    def open(self) -> Decoder:
        """Open the model.

        Raises:
            ConversionError: if it cannot be opened.
        """
        from ..runtimes.opening import open_decoder

        weights: WeightOptions = {**self.weights, "adapter": self.adapter} if self.adapter else self.weights
        return open_decoder(
            self.model,
            self.runtime,
            precision=self.precision,
            threads=self.threads,
            provider=self.provider,
            **weights,
        )

    def tokenizer(self, folder: str | None) -> Tokenizer:
        """The tokenizer in a directory, or beside the model.

        Raises:
            ConversionError: if there is none, or no model either.
        """
        from converters import TokenizerError

        from ..tokenizer import Tokenizer

        try:
            return Tokenizer.from_pretrained(folder or self._tokenizer_home())
        except TokenizerError:
            if os.path.isdir(self.model):
                self.open()  # a missing model is the more important error
            raise

    def home(self) -> str:
        """Where the files beside the model are."""
        from ..runtimes.opening import home_of

        return home_of(self.model)

    def _tokenizer_home(self) -> str | Path:
        """The adapter's directory, if it has a tokenizer; else the model's."""
        from converters.opening.adapter import tokenizer_beside

        adapter = self.weights.get("adapter")
        return (tokenizer_beside(adapter) if adapter else None) or self.home()


def open_draft(source: str, threads: int | None, provider: str | None = None) -> Decoder:
    """Open a draft model, of weights or in ONNX.

    In ONNX Runtime it has one thread: the threads of two sessions wait for work by spinning, and take the cores from each
    other. With two threads each on two cores, guesses made decoding slower (0.7 times the speed) where one makes it faster (1.3).

    Args:
        threads: those of the other model, which weights use, too.
        provider: that of the other model, if ONNX Runtime runs the draft model.

    Raises:
        ConversionError: if it cannot be opened.
    """
    from ..runtimes.opening import run_kind

    running = Running.of(source, None, None, threads, {})
    if run_kind(running.model, None) == "onnx":
        running = replace(running, threads=1, provider=provider)
    return running.open()
