"""What commands that run a model share: the model and its tokenizer."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..runtimes.base import Decoder
    from ..tokenizer import Tokenizer


def tokenizer_of(
    model: str, folder: str | None, runtime: str | None, precision: str | None, n_head: int | None
) -> Tokenizer:
    """The tokenizer in a directory, or beside a model.

    Raises:
        ConversionError: if there is none, or no model either.
    """
    from converters import TokenizerError

    from ..runtimes.opening import open_decoder
    from ..tokenizer import Tokenizer

    try:
        return Tokenizer.from_pretrained(folder or home(model))  # before the model, which takes longer to open
    except TokenizerError:
        if os.path.isdir(model):
            # A missing model is the more important error.
            open_decoder(model, runtime, n_head=n_head, precision=precision)
        raise


def open_model(
    model: str, runtime: str | None, precision: str | None, n_head: int | None, threads: int | None
) -> Decoder:
    """A model as ``runnable`` found it.

    Raises:
        ConversionError: if it cannot be opened.
    """
    from ..runtimes.opening import open_decoder

    return open_decoder(model, runtime, n_head=n_head, precision=precision, threads=threads)


def home(model: str) -> str:
    """The directory of a model's tokenizer: for ``onnx/model.onnx``, the one above ``onnx``."""
    folder = os.path.dirname(os.path.abspath(model))
    inside = model.endswith(".onnx") and os.path.basename(folder) == "onnx"
    if inside and os.path.isfile(model):
        return os.path.dirname(folder)
    return model
