"""The tokens that models are compared on."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import numpy as np

from converters import ConversionError, GPT2Config
from converters.tokenizer import TokenizerFiles

from ..tokenizer import Tokenizer


def sample_ids(
    config: GPT2Config, tokenizer: TokenizerFiles | None, text: str | None = None
) -> tuple[Sequence[int], str]:
    """Return a full context of real text if there is a tokenizer that fits, else the same random ids each time.

    A text that is shorter than the context is repeated.

    Returns:
        The ids, and a description of them.

    Raises:
        ConversionError: if ``text`` is given but cannot be used.
    """
    n = config.n_ctx
    if tokenizer and (text is not None or not tokenizer.fault):
        ids = Tokenizer.from_files(tokenizer).encode(default_text() if text is None else text)
        if ids and max(ids) < config.n_vocab:
            name = "the built-in scene" if text is None else "the given text"
            return (ids * (n // len(ids) + 1))[:n], _description(len(ids), n, name)
    if text is not None and tokenizer:
        raise ConversionError("the text is empty, or its tokenizer does not fit the model")
    if text is not None:
        raise ConversionError("a text needs a tokenizer: put the tokenizer's files beside one of the models")
    random = np.random.default_rng(0).integers(config.n_vocab, size=n)
    return random.tolist(), f"{n} random tokens: no tokenizer that fits is beside the models"


def _description(available: int, n: int, name: str) -> str:
    if available >= n:
        return f"the first {n} of {available} tokens of {name}"
    plural = "s" if available > 1 else ""
    return f"{available} token{plural} of {name}, repeated to {n}"


def default_text() -> str:
    """The first scene of Coriolanus: on real text, logits are those that a model has in use."""
    return resources.files("gpt2x").joinpath("coriolanus.txt").read_text(encoding="utf-8")
