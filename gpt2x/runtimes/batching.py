"""Continuous batching: sequences that join and leave between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..memory import give_back
from .base import EMPTY, InputError, Logits
from .kv_cache import RowCache
from .onnx_run import InPlaceRun
from .onnxruntime import OnnxDecoder


class RunningBatch:
    """Sequences of any lengths that share each decoding step, and join and leave between steps: continuous batching.

        batch = RunningBatch(OnnxDecoder("gpt2-onnx/"))        # exported with --cache inplace
        a, logits = batch.join(ids)                            # logits (V,) after the prompt
        logits = batch.step({a: int(logits.argmax())})[a]      # one step for all sequences
        batch.leave(a)

    A long prompt can be read in pieces, between steps of the others:

        reading = batch.begin()
        logits = reading.read(ids[:64])                        # and so on
        b = batch.finish(reading)

    All sequences have the decoder's adapter: ``RunningBatch(decoder.with_adapter("french"))``.

    It is also a context manager. At its end, or after ``close``, it is empty and the cache's memory is free; it can be
    used again.

    Raises:
        InputError: if the decoder's cache does not stay in place.
    """

    def __init__(self, decoder: OnnxDecoder) -> None:
        self._run = decoder.in_place_run()
        self.decoder = decoder
        self.cache = self._run.new_cache(0)
        self._rows: list[int] = []  # the sequence of each row
        self._next = 0
        self._reading: Reading | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def close(self) -> None:
        """Remove every sequence, and free the cache's memory. The decoder stays open."""
        self._rows.clear()
        self._reading = None
        self.cache = self._run.new_cache(0)
        give_back()

    def __enter__(self) -> RunningBatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def length(self, sequence: int) -> int:
        """How many tokens a sequence has."""
        return int(self.cache.lengths[self._row(sequence)])

    def join(self, prompt: Sequence[int]) -> tuple[int, Logits]:
        """Add a sequence with its prompt.

        Returns:
            The number of the sequence, and the logits (V,) after the prompt.

        Raises:
            InputError: if the prompt is empty, longer than the context, or holds an id outside the vocabulary.
        """
        self._check_prompt(prompt)
        reading = self.begin()
        try:
            logits = reading.read(prompt)
        except BaseException:
            self.abandon(reading)
            raise
        return self.finish(reading), logits[-1]

    def reserve(self, sequences: int, tokens: int) -> None:
        """Make room for so many sequences of so many tokens, so that no later call has to."""
        self.cache.reserve(sequences, tokens)

    def begin(self) -> Reading:
        """Begin a sequence whose prompt is read in pieces. It joins the batch with ``finish``.

        Raises:
            InputError: if another one is being read.
        """
        if self._reading is not None:
            raise InputError("a prompt is being read: call finish or abandon first")
        row = len(self._rows)
        self.cache.reserve(row + 1, 1)
        self.cache.lengths[row] = 0
        self._reading = Reading(self._run, self.cache, row)
        return self._reading

    def finish(self, reading: Reading) -> int:
        """Let a sequence join whose prompt was read. Returns its number.

        Raises:
            InputError: if it is not the one that is being read, or has no tokens.
        """
        if reading is not self._reading:
            raise InputError("this prompt is not being read")
        if not reading.length:
            raise InputError(EMPTY)
        self._reading = None
        row = len(self._rows)
        # Others may have left since it began.
        if row != reading.row:
            self.cache.copy(reading.row, row)
        return self._add()

    def abandon(self, reading: Reading) -> None:
        """Give up a prompt that is being read."""
        if reading is self._reading:
            self._reading = None

    def fork(self, sequence: int) -> int:
        """Add a sequence with the tokens of another, whose prompt is not read again.

        Returns:
            The number of the new sequence. It continues from the logits that the other one has.

        Raises:
            InputError: if the sequence is not in the batch, or a prompt is being read.
        """
        if self._reading is not None:
            raise InputError("a prompt is being read: call finish or abandon first")
        source = self._row(sequence)
        row = len(self._rows)
        self.cache.reserve(row + 1, int(self.cache.lengths[source]))
        self.cache.copy(source, row)
        return self._add()

    def _add(self) -> int:
        sequence = self._next
        self._rows.append(sequence)
        self._next += 1
        return sequence

    def _check_prompt(self, prompt: Sequence[int]) -> None:
        if isinstance(prompt, str) or not isinstance(prompt, Sequence | np.ndarray):
            raise InputError(
                f"the prompt is of type {type(prompt).__name__}; token ids are needed: encode the text first"
            )
        if not len(prompt):
            raise InputError(EMPTY)
        if len(prompt) > self.decoder.n_ctx:
            raise InputError(f"the prompt has {len(prompt)} tokens; the model's context is {self.decoder.n_ctx}")

    def step(self, tokens: Mapping[int, int]) -> dict[int, Logits]:
        """Add one token to every sequence.

        Returns:
            The logits (V,) after each.

        Raises:
            InputError: if a sequence has no token here, is full, or is not in the batch; nothing has changed then.
        """
        for sequence in tokens:
            self._row(sequence)
        for sequence in self._rows:
            if sequence not in tokens:
                raise InputError(f"no token for sequence {sequence}: pass one for each sequence, or call leave")
        if not self._rows:
            return {}
        lengths = self.cache.lengths[: len(self._rows)].copy()
        for sequence, length in zip(self._rows, lengths, strict=True):
            if length >= self.decoder.n_ctx:
                raise InputError(f"sequence {sequence} fills the context of {self.decoder.n_ctx} tokens: call leave")
        new = [[tokens[sequence]] for sequence in self._rows]
        ids, positions = self._run.model.check_tokens(new, lengths[:, None])
        logits = self._run.advance(ids[:, 0], positions[:, 0], self.cache)
        return dict(zip(self._rows, logits, strict=True))

    def leave(self, sequence: int) -> None:
        """Remove a sequence; the last one moves into its row."""
        row = self._row(sequence)
        last = len(self._rows) - 1
        if row != last:
            self.cache.copy(last, row)
            self._rows[row] = self._rows[last]
        self._rows.pop()

    def _row(self, sequence: int) -> int:
        if sequence not in self._rows:
            raise InputError(f"sequence {sequence} is not in the batch")
        return self._rows.index(sequence)


class Reading:
    """A prompt that is read in pieces into a row of the cache, before its sequence joins a ``RunningBatch``."""

    def __init__(self, run: InPlaceRun, cache: RowCache, row: int) -> None:
        self._run = run
        self._cache = cache
        self.row = row

    @property
    def length(self) -> int:
        """How many tokens were read."""
        return int(self._cache.lengths[self.row])

    def read(self, tokens: Sequence[int], *, every: bool = False) -> Logits:
        """Read the next tokens (T,) of the prompt.

        Args:
            every: return the logits after each token, not only after the last one.

        Returns:
            The logits, (T, V) or (1, V). (1, V) for a model that returns only the last logits.

        Raises:
            InputError: if there are no tokens, or they do not fit the vocabulary or the context.
        """
        start = self.length
        ids, positions = self._run.model.check_tokens([list(tokens)], np.arange(start, start + len(tokens))[None])
        return self._run.prefill(ids[0], positions[0], self._cache, self.row, last=not every)

    def copy(self, start: int, stop: int) -> list[NDArray[Any]]:
        """The keys and values of some of the tokens: of each layer in turn, each (H, stop - start, D)."""
        return self._cache.read(self.row, start, stop)

    def restore(self, tensors: Sequence[NDArray[Any]]) -> None:
        """Append keys and values that ``copy`` returned for the same tokens at the same positions."""
        start = self.length
        stop = start + tensors[0].shape[1]
        self._cache.reserve(self.row + 1, stop)
        self._cache.write(self.row, start, tensors)
        self._cache.lengths[self.row] = stop
