"""The tokens that models are compared and checked on."""

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
    """A full context of real text where the tokenizer is there and fits, else the same arbitrary ids each time.

    A text that is shorter than the context is repeated.

    Returns:
        The ids, and a word on what they are.

    Raises:
        ConversionError: if a text is given that cannot be used.
    """
    if tokenizer:
        ids = Tokenizer.from_files(tokenizer).encode(text if text is not None else default_text())
        if ids and max(ids) < config.n_vocab:
            name, n = "the built-in scene" if text is None else "the text given", config.n_ctx
            said = f"the first {n} of {len(ids)} tokens of {name}"
            if len(ids) < n:
                said = f"{len(ids)} token{'s' if len(ids) > 1 else ''} of {name}, repeated to {n}"
            return (ids * (n // len(ids) + 1))[:n], said
    if text is not None:
        why = (
            "the text is empty"
            if tokenizer
            else "a text needs a tokenizer, and none is beside the models: put one's files there"
        )
        raise ConversionError(why)
    arbitrary = [int(i) for i in np.random.default_rng(0).integers(config.n_vocab, size=config.n_ctx)]
    return arbitrary, f"{config.n_ctx} arbitrary tokens: no tokenizer that fits is beside the models"


def default_text() -> str:
    """The first scene of Coriolanus: real text, so that a real model is compared where it lives."""
    return resources.files("gpt2x").joinpath("coriolanus.txt").read_text(encoding="utf-8")
