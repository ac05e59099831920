"""Prompts and tokens for a decoder: checks, and padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from ..runtimes.base import EMPTY, Decoder, Ids, InputError, PromptError
from .sampling import Sampling

Finish = Literal["stop", "length", "context"]
"""Why a text ended: an end token or a stop string, the limit of new tokens, or the end of the model's context."""


class HasVocabulary(Protocol):
    """A model that takes the tokens of a vocabulary."""

    @property
    def n_vocab(self) -> int:
        """The size of the vocabulary."""
        ...


def check_prompts(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse a prompt that is empty, too long, or not of this model.

    Raises:
        PromptError: with the reason.
    """
    for prompt in prompts:
        if not len(prompt):
            raise PromptError(EMPTY)
        if len(prompt) > decoder.n_ctx:
            raise PromptError(f"the prompt has {len(prompt)} tokens; the model's context is {decoder.n_ctx}")
        check_vocabulary(decoder, prompt)


def check_vocabulary(model: HasVocabulary, tokens: Sequence[int] | Ids) -> None:
    """Refuse tokens of another vocabulary.

    Raises:
        PromptError: with the first of them.
    """
    ids = np.asarray(tokens)
    wrong = ids[(ids < 0) | (ids >= model.n_vocab)]
    if len(wrong):
        raise PromptError(
            f"token id {wrong[0]} is outside the model's vocabulary of {model.n_vocab}: does the tokenizer belong to "
            "another model?"
        )


def check_tokens(decoder: Decoder, sampling: Sampling, end_tokens: Sequence[int]) -> None:
    """Refuse controls that name a token outside the vocabulary, or n-grams longer than the context.

    Raises:
        InputError: with the id, or the size.
    """
    check_ngram_size(sampling, [decoder.n_ctx])
    for sequence in sampling.sequences():
        _check_in_vocabulary(decoder, sequence, "a control")
    _check_in_vocabulary(decoder, end_tokens, "eos_token_id or stop_token_ids")


def check_ngram_size(sampling: Sampling, lengths: Sequence[int]) -> None:
    """Refuse an n-gram size that no text reaches, so that it would have no effect.

    Args:
        lengths: how many tokens each text has at most, with its prompt.

    Raises:
        InputError: with the size.
    """
    size = sampling.no_repeat_ngram_size
    longest = max(lengths, default=size)
    if size > longest:
        raise InputError(
            f"no_repeat_ngram_size is {size}, larger than the text, which has at most {longest} tokens with its prompt: "
            "set a smaller size, or leave it out"
        )


def _check_in_vocabulary(decoder: Decoder, tokens: Sequence[int], what: str) -> None:
    for token in tokens:
        if not 0 <= token < decoder.n_vocab:
            raise InputError(f"{what} names token id {token}; the model's vocabulary is {decoder.n_vocab}")


def as_end_tokens(eos_token_id: int | Sequence[int] | None) -> tuple[int, ...]:
    """One token, several, or none, as a tuple."""
    if eos_token_id is None:
        return ()
    if isinstance(eos_token_id, int | np.integer):
        return (int(eos_token_id),)
    return tuple(eos_token_id)


def left_pad(prompts: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
    """Token ids and mask, (B, T) each, of prompts that end together."""
    width = max(map(len, prompts), default=0)
    ids = np.zeros((len(prompts), width), np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, mask
