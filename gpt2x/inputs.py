"""What a decoder is given, checked: tokens, positions and a mask that fit the model and one another. numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .generate import EMPTY, Ids, InputError


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
