"""A cache that stays where it is: rows of keys and values of any lengths, which a model of contract 2 writes into.

In such a cache the slot of a token is its position. So a row may go on from anywhere up to its length, and what was
behind is forgotten. numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..memory import give_back
from .base import InputError

LEAST = 64  # tokens that room is made for at first


class RowCache:
    """Keys and values of each layer in turn, each (rows, H, capacity, D), and how many tokens each row holds.

    Room doubles as it is needed: of tokens up to ``n_ctx``, of rows without end.
    """

    def __init__(self, rows: int, *, tensors: int, n_head: int, head_dim: int, n_ctx: int, dtype: Any) -> None:
        self.n_ctx = n_ctx
        self.kind = tensors, n_head, head_dim, n_ctx, np.dtype(dtype)
        self.bound: Any = None  # what a model keeps from step to step of its binding to these buffers
        self.seen = 0  # slots that ``OnnxDecoder.run`` and ``step`` were given, padding among them
        self.mask: NDArray[np.bool_] | None = None  # (rows, seen), false for padding; None while there was none
        self.lengths = np.zeros(rows, np.int64)
        self.buffers = [np.zeros((rows, n_head, 0, head_dim), dtype) for _ in range(tensors)]

    @property
    def capacity(self) -> int:
        """How many tokens a row has room for: the last buffer grows last."""
        return int(self.buffers[-1].shape[2])

    @property
    def nbytes(self) -> int:
        """What the buffers take."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for so many rows of so many tokens. If memory ends on the way, what is there stays good."""
        had_rows, had_tokens = len(self.lengths), self.capacity
        new_rows = had_rows if rows <= had_rows else max(rows, 2 * had_rows)
        new_tokens = had_tokens or LEAST
        while new_tokens < tokens:
            new_tokens *= 2
        new_tokens = had_tokens if tokens <= had_tokens else min(self.n_ctx, new_tokens)
        if (new_rows, new_tokens) == (had_rows, had_tokens):
            return
        self.bound = None
        used = int(self.lengths.max(initial=0))
        for i, old in enumerate(self.buffers):  # one after another, so that only one is there twice
            if old.shape[0] < new_rows or old.shape[2] < new_tokens:  # the others grew before memory ended
                new = np.zeros((new_rows, old.shape[1], new_tokens, old.shape[3]), old.dtype)
                new[:had_rows, :, :used] = old[:had_rows, :, :used]
                self.buffers[i] = new
        self.lengths = np.concatenate((self.lengths, np.zeros(new_rows - had_rows, np.int64)))
        if had_tokens:
            give_back()  # what smaller buffers took

    def move(self, source: int, target: int) -> None:
        """Put one row's tokens in another's place."""
        n = int(self.lengths[source])
        for buffer in self.buffers:
            buffer[target, :, :n] = buffer[source, :, :n]
        self.lengths[target] = n

    def see(self, real: NDArray[np.bool_] | None, slots: int) -> None:
        """Remember that so many slots came: which of them hold tokens (rows, slots), or None if all do."""
        if real is not None or self.mask is not None:
            rows = len(self.lengths)
            earlier = np.ones((rows, self.seen), bool) if self.mask is None else self.mask
            self.mask = np.concatenate((earlier, np.ones((rows, slots), bool) if real is None else real), 1)
        self.seen += slots

    def check(self, row: int, positions: NDArray[np.int64]) -> None:
        """Refuse positions that do not follow what a row holds.

        Raises:
            InputError: if they leave a gap.
        """
        first = int(positions[0])
        if first > self.lengths[row] or (len(positions) > 1 and (np.diff(positions) != 1).any()):
            raise InputError(
                f"row {row} holds {self.lengths[row]} tokens, and its new positions {_few(positions)} do not follow: "
                "in a cache that stays in place, a token's slot is its position"
            )


def _few(numbers: Sequence[int] | NDArray[Any]) -> str:
    shown = ", ".join(str(int(number)) for number in numbers[:5])
    return f"[{shown}{', ...' if len(numbers) > 5 else ''}]"
