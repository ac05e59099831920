"""What commands that run a model share: the model and its tokenizer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..weight_options import WeightOptions, why_weights
from .source import runnable, with_local_adapter

if TYPE_CHECKING:
    from ..runtimes.base import Decoder
    from ..tokenizer import Tokenizer


@dataclass(frozen=True)
class Running:
    """A model on this machine, and how it is run.

    Args:
        model: its path.
        runtime: "torch" or "onnx", if the user asks for one.
        precision: the ONNX model of a directory that the user asks for.
        threads: threads of each operator.
        weights: how weights are opened.
    """

    model: str
    runtime: str | None
    precision: str | None
    threads: int | None
    weights: WeightOptions

    @classmethod
    def of(
        cls, source: str, runtime: str | None, precision: str | None, threads: int | None, weights: WeightOptions
    ) -> Running:
        """The model of a source, which is downloaded first if it is a URL.

        Raises:
            ConversionError: if the download fails.
        """
        model = runnable(source, "torch" if why_weights(weights) and runtime is None else runtime, precision)
        return cls(model, runtime, precision, threads, with_local_adapter(weights))

    def open(self) -> Decoder:
        """Open the model.

        Raises:
            ConversionError: if it cannot be opened.
        """
        from ..runtimes.opening import open_decoder

        return open_decoder(self.model, self.runtime, precision=self.precision, threads=self.threads, **self.weights)

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
