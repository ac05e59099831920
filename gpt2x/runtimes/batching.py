"""Continuous batching: sequences that join and leave between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..memory import give_back
from .base import EMPTY, InputError, Logits
from .onnxruntime import OnnxDecoder


class RunningBatch:
    """Sequences of any lengths that share each decoding step, and join and leave between steps: continuous batching.

        batch = RunningBatch(OnnxDecoder("gpt2-onnx/"))        # exported with --cache inplace
        a, logits = batch.join(ids)                            # logits (V,) after the prompt
        logits = batch.step({a: int(logits.argmax())})[a]      # one step for all sequences
        batch.leave(a)

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

    def __len__(self) -> int:
        return len(self._rows)

    def close(self) -> None:
        """Remove every sequence, and free the cache's memory. The decoder stays open."""
        self._rows.clear()
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
        ids, positions = self._run.model.check_tokens([list(prompt)], np.arange(len(prompt))[None])
        row = len(self._rows)
        self.cache.reserve(row + 1, len(prompt))
        self.cache.lengths[row] = 0
        logits = self._run.prefill(ids[0], positions[0], self.cache, row)
        return self._add(row), logits[-1]

    def fork(self, sequence: int) -> int:
        """Add a sequence with the tokens of another, whose prompt is not read again.

        Returns:
            The number of the new sequence. It continues from the logits that the other one has.

        Raises:
            InputError: if the sequence is not in the batch.
        """
        source = self._row(sequence)
        row = len(self._rows)
        self.cache.reserve(row + 1, int(self.cache.lengths[source]))
        self.cache.copy(source, row)
        return self._add(row)

    def _add(self, row: int) -> int:
        """Name the sequence of a new row."""
        assert row == len(self._rows)
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
