"""The protocol of a model for a task other than text generation, and rows of tokens as a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from converters import GPT2Config
from converters.head_config import Labels

from ..precisions import DEFAULT
from .base import Ids, InputError, check_mask, check_tokens

Outputs = Mapping[str, NDArray[Any]]


class TaskModel(Protocol):
    """A GPT-2 for a task, and what it declares about itself."""

    task: str
    """One of ``gpt2x.tasks.TASKS``."""
    config: GPT2Config
    labels: Labels | None = None
    """Of a classifier."""
    runtime: str
    """What runs the model, for reports."""
    path: Path | None = None
    """The file of the model; None for weights that are already in memory."""
    precision: str = DEFAULT
    """How the weights are stored."""
    cache_kind: str = "growing"  # there is none; of ``Decoder``, whose weights are compared in the same way

    def run(self, input_ids: Ids, attention_mask: Ids | None = None) -> Outputs:
        """Run the model.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 for padding, on either side; None if there is no padding.

        Returns:
            Output -> array: ``logits`` (B, N) of text classification, (B, T, N) of token classification;
            ``last_hidden_state`` (B, T, C), ``mean_embedding`` and ``last_token_embedding`` (B, C) of feature extraction.
        """
        ...


def check_rows(input_ids: Any, attention_mask: Any, config: GPT2Config) -> tuple[Ids, Ids]:
    """Return token ids and mask as int64, (B, T).

    Raises:
        InputError: if they do not fit the model or one another.
    """
    shape = np.shape(input_ids)
    ids, _ = check_tokens(input_ids, np.zeros(shape, np.int64), config.n_vocab, config.n_ctx)
    mask = check_mask(attention_mask, ids.shape[0], 0, ids.shape[1])
    tokens = (mask != 0).sum(1)
    if not tokens.all():
        raise InputError(f"row {int(tokens.argmin())} has no token: attention_mask is 0 everywhere")
    if int(tokens.max()) > config.n_ctx:
        raise InputError(f"a row has {int(tokens.max())} tokens; the context is {config.n_ctx}")
    return ids, mask


def pad_rows(rows: Sequence[Sequence[int]], pad_token_id: int = 0, *, left: bool = False) -> tuple[Ids, Ids]:
    """Return rows of token ids as one batch: ids and attention mask, (B, T) each.

    Args:
        pad_token_id: stands at padding; any id of the vocabulary does.
        left: pad on the left, not on the right.

    Raises:
        InputError: if there is no row, or an empty one.
    """
    if not rows or not all(len(row) for row in rows):
        raise InputError("a batch needs rows, and each row a token")
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_token_id, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = row
        mask[i, place] = 1
    return ids, mask
