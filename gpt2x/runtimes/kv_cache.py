"""A cache in place: rows of keys and values of any lengths, which a model of contract 2 writes into.

In such a cache the slot of a token is its position. So a row may continue from anywhere up to its length, and what was
behind that position is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..memory import give_back
from .base import InputError
from .onnx_memory import CpuMemory, Memory

log = logging.getLogger(__name__)

LEAST = 64  # tokens of the first allocation


class RowCache:
    """Keys and values of each layer in turn, each (rows, H, capacity, D), and how many tokens each row holds.

    Capacity doubles when it is needed: of tokens up to ``n_ctx``, of rows without a limit.

    Args:
        memory: where the buffers are; by default arrays in the CPU's memory.
    """

    def __init__(
        self,
        rows: int,
        *,
        tensors: int,
        n_head: int,
        head_dim: int,
        n_ctx: int,
        dtype: Any,
        memory: Memory | None = None,
    ) -> None:
        self.n_ctx = n_ctx
        self.memory: Memory = memory or CpuMemory()
        self.kind = tensors, n_head, head_dim, n_ctx, np.dtype(dtype)
        self.adapter: str | None = None  # the adapter that computed it
        self.bound: dict[Any, Any] = {}  # bindings of models to these buffers, kept from step to step
        self.seen = 0  # slots that ``OnnxDecoder.run`` and ``step`` were given, with padding
        self.mask: NDArray[np.bool_] | None = None  # (rows, seen), false for padding; None without any padding
        self.lengths = np.zeros(rows, np.int64)
        self.buffers: list[Any] = [self.memory.zeros((rows, n_head, 0, head_dim), dtype) for _ in range(tensors)]

    @property
    def capacity(self) -> int:
        """How many tokens fit into a row. The last buffer grows last."""
        return int(self.buffers[-1].shape[2])

    @property
    def is_empty(self) -> bool:
        """Whether no row holds a token."""
        return self.seen == 0 and not self.lengths.any()

    @property
    def nbytes(self) -> int:
        """The size of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for so many rows of so many tokens. If memory runs out, the cache stays valid."""
        had_rows, had_tokens = len(self.lengths), self.capacity
        new_rows = self._grown_rows(rows)
        new_tokens = self._grown_tokens(tokens)
        if (new_rows, new_tokens) == (had_rows, had_tokens):
            return
        self.bound.clear()
        # One buffer after another, so that only one exists twice.
        for i, old in enumerate(self.buffers):
            self.buffers[i] = self._grown(old, new_rows, new_tokens)
        self.lengths = np.concatenate((self.lengths, np.zeros(new_rows - had_rows, np.int64)))
        log.debug("cache: %d rows of %d tokens, %.1f MB", new_rows, new_tokens, self.nbytes / 1e6)
        if had_tokens:
            give_back()  # the memory of the smaller buffers

    def _grown_rows(self, rows: int) -> int:
        had = len(self.lengths)
        return had if rows <= had else max(rows, 2 * had)

    def _grown_tokens(self, tokens: int) -> int:
        return grown_capacity(self.capacity, tokens, self.n_ctx)

    def _grown(self, old: Any, rows: int, tokens: int) -> Any:
        # It may have grown already, before memory ran out in an earlier call.
        if old.shape[0] >= rows and old.shape[2] >= tokens:
            return old
        return self.memory.resized(old, rows, tokens, int(self.lengths.max(initial=0)))

    def truncate(self, length: int) -> None:
        """Take every row back to at most so many tokens. Nothing is copied."""
        np.minimum(self.lengths, length, out=self.lengths)
        self.seen = min(self.seen, length)
        if self.mask is not None:
            self.mask = self.mask[:, : self.seen]

    def fork(self, row: int, count: int = 1) -> list[int]:
        """Add rows that hold the same tokens as another, so that several texts continue what was read once.

        Returns:
            The numbers of the new rows, the last ones.
        """
        had = len(self.lengths)
        self.reorder(np.concatenate((np.arange(had), np.full(count, row))))
        return list(range(had, had + count))

    def copy(self, source: int, target: int) -> None:
        """Put one row's tokens into another row, in place of its own."""
        self._copy_rows(np.array([source]), np.array([target]))
        self.lengths[target] = self.lengths[source]

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Make the given rows (N,) of this cache its only rows, in this order. Only rows that change are copied."""
        had = len(self.lengths)
        if len(rows) > had:
            self._repeat(rows)
        else:
            changed = np.flatnonzero(rows != np.arange(len(rows)))
            self._copy_rows(rows[changed], changed)
        if len(rows) < had:
            self.bound.clear()
            self.buffers = self.rows(0, len(rows))
        self.lengths = self.lengths[rows]
        if self.mask is not None:
            self.mask = self.mask[rows]

    def _copy_rows(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Copy the tokens of some rows (N,) into others (N,). What is read is copied before anything is written."""
        if not len(targets):
            return
        used = int(self.lengths[sources].max(initial=0))
        for i, buffer in enumerate(self.buffers):
            self._replace(i, self.memory.copied(buffer, sources, targets, used))

    def _repeat(self, rows: NDArray[np.int64]) -> None:
        used = int(self.lengths[rows].max(initial=0))
        for i, old in enumerate(self.buffers):
            self._replace(i, self.memory.gathered(old, rows, used))

    def _replace(self, i: int, buffer: Any) -> None:
        """Take a buffer in place of one that bindings may refer to."""
        if buffer is not self.buffers[i]:
            self.bound.clear()
            self.buffers[i] = buffer

    def rows(self, start: int, stop: int) -> list[Any]:
        """Some rows of each buffer, which a model can write into; then call ``put_rows``."""
        return [self.memory.rows(buffer, start, stop) for buffer in self.buffers]

    def put_rows(self, start: int, tensors: Sequence[Any]) -> None:
        """Take over what a model wrote into the tensors of ``rows``."""
        for i, tensor in enumerate(tensors):
            self._replace(i, self.memory.with_rows(self.buffers[i], start, tensor))

    def read(self, row: int, start: int, stop: int) -> list[NDArray[Any]]:
        """The keys and values of some tokens of a row: of each layer in turn, each (H, stop - start, D)."""
        return [self.memory.read(buffer, row, start, stop) for buffer in self.buffers]

    def write(self, row: int, start: int, tensors: Sequence[NDArray[Any]]) -> None:
        """Write keys and values that ``read`` returned into a row that has room for them."""
        for i, tensor in enumerate(tensors):
            self._replace(i, self.memory.written(self.buffers[i], row, start, tensor))

    def see(self, real: NDArray[np.bool_] | None, slots: int) -> None:
        """Remember new slots, and which of them hold tokens (rows, slots); None if all do."""
        if real is not None or self.mask is not None:
            rows = len(self.lengths)
            earlier = np.ones((rows, self.seen), bool) if self.mask is None else self.mask
            new = np.ones((rows, slots), bool) if real is None else real
            self.mask = np.concatenate((earlier, new), 1)
        self.seen += slots

    def check(self, row: int, positions: NDArray[np.int64]) -> None:
        """Refuse positions that do not follow what a row holds.

        Raises:
            InputError: if they leave a gap.
        """
        gap = int(positions[0]) > self.lengths[row]
        jump = len(positions) > 1 and bool((np.diff(positions) != 1).any())
        if gap or jump:
            raise InputError(
                f"row {row} holds {self.lengths[row]} tokens, and its new positions {_few(positions)} do not follow: "
                "in a cache in place, a token's slot is its position"
            )


def grown_capacity(capacity: int, tokens: int, n_ctx: int) -> int:
    """The capacity of a cache after it made room for so many tokens in a row."""
    if tokens <= capacity:
        return capacity
    grown = capacity or LEAST
    while grown < tokens:
        grown *= 2
    return min(n_ctx, grown)


def _few(numbers: Sequence[int] | NDArray[Any]) -> str:
    shown = [str(int(number)) for number in numbers[:5]]
    if len(numbers) > 5:
        shown.append("...")
    return f"[{', '.join(shown)}]"
