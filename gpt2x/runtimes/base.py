"""What every runtime is: the decoder's protocol, and checked inputs."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from converters import GPT2Config

Array = NDArray[Any]
Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
EMPTY = "the prompt is empty: give at least one token (<|endoftext|> starts a new text)"


class InputError(ValueError):
    """Tokens, a mask, positions or a cache that do not fit the model or one another."""


class PromptError(InputError):
    """A prompt that the model cannot take."""


class Decoder(Protocol):
    """A model as one step of decoding."""

    n_ctx: int
    n_vocab: int

    def step(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """Feed new tokens.

        Args:
            input_ids: (B, T).
            attention_mask: (B, P + T), 0 for padding, or None where there is none.
            position_ids: (B, T).
            cache: what the step before returned; None at first.

        Returns:
            The logits of the last position (B, V), and the cache.
        """
        ...


class Subject(Decoder, Protocol):
    """A decoder that also gives the logits of every new token."""

    config: GPT2Config
    runtime: str  # what runs it

    def run(self, input_ids: Array, attention_mask: Array | None, position_ids: Array, cache: Any) -> tuple[Array, Any]:
        """As ``step``, but logits (B, T, V); (B, 1, V) where the subject's ``last_only`` is true."""
        ...


# ------------------------------------------------------------------------------------------------------------ checks


def check_tokens(input_ids: Any, position_ids: Any, n_vocab: int, n_ctx: int) -> tuple[Ids, Ids]:
    """Both as int64: of one shape (B, T), and within the vocabulary and the context.

    Raises:
        InputError: if they are not.
    """
    ids, positions = whole(input_ids, "input_ids"), whole(position_ids, "position_ids")
    if ids.ndim != 2:
        raise InputError(f"input_ids are {ids.shape}; (batch, tokens) is needed")
    if 0 in ids.shape:
        raise InputError(EMPTY)
    if positions.shape != ids.shape:
        raise InputError(f"position_ids are {positions.shape}, input_ids {ids.shape}: they must have one shape")
    _check_range(ids, n_vocab, "token id", "the vocabulary")
    _check_range(positions, n_ctx, "position", "the context")
    return ids, positions


def check_mask(attention_mask: Any, B: int, P: int, T: int) -> Ids:
    """A mask (B, P + T) as int64, ones where there is none.

    Raises:
        InputError: if it is of another shape.
    """
    mask = np.ones((B, P + T), np.int64) if attention_mask is None else whole(attention_mask, "attention_mask")
    if mask.shape != (B, P + T):
        raise InputError(f"attention_mask is {mask.shape}, but {P} cached and {T} new tokens need {(B, P + T)}")
    return mask


def whole(array: Any, name: str) -> Ids:
    """Whole numbers as contiguous int64.

    Raises:
        InputError: if they are none.
    """
    try:
        found = np.asarray(array)
    except ValueError:
        raise InputError(f"{name} have rows of unequal lengths; pad them") from None
    if found.dtype.kind not in "biu" or (found.dtype == np.uint64 and (found > np.iinfo(np.int64).max).any()):
        raise InputError(f"{name} are {found.dtype} {found.shape}; whole numbers of 64 bits are needed")
    return np.asarray(found, np.int64, order="C")


def _check_range(values: NDArray[np.int64], limit: int, what: str, of: str) -> None:
    if values.view(np.uint64).max() >= limit:  # negative ones are large there
        low, high = int(values.min()), int(values.max())
        raise InputError(f"{what} {low if low < 0 else high} is outside {of} of {limit}")
