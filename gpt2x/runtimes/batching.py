"""Continuous batching: sequences that join and leave between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..memory import give_back
from .base import EMPTY, InputError, Logits
from .onnxruntime import OnnxDecoder


class RunningBatch:
    """Sequences of any lengths that share each step of decoding, joining and leaving between steps: what a service
    needs for continuous batching.

        batch = RunningBatch(OnnxDecoder("gpt2-onnx/"))        # exported with --cache inplace
        a, logits = batch.join(ids)                            # logits (V,) after the prompt
        logits = batch.step({a: int(logits.argmax())})[a]      # one step of all that are in
        batch.leave(a)

    It is a context manager, too: at its end, or after ``close``, no sequence is in, and the cache's memory is free. It can
    be used again then.

    Raises:
        InputError: if the decoder's cache does not stay in place.
    """

    def __init__(self, decoder: OnnxDecoder) -> None:
        if not decoder.in_place:
            raise InputError(f"{decoder.path}: its cache grows; rows join and leave only one made with --cache inplace")
        self.decoder = decoder
        self.cache = decoder.row_cache(0)
        self._rows: list[int] = []  # which sequence each row is of
        self._next = 0

    def __len__(self) -> int:
        return len(self._rows)

    def close(self) -> None:
        """Let every sequence leave, and free the cache's memory. The decoder stays open."""
        self._rows.clear()
        self.cache = self.decoder.row_cache(0)
        give_back()

    def __enter__(self) -> RunningBatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def length(self, sequence: int) -> int:
        """How many tokens a sequence has."""
        return int(self.cache.lengths[self._row(sequence)])

    def join(self, prompt: Sequence[int]) -> tuple[int, Logits]:
        """A new sequence with its prompt. Gives its number, and the logits (V,) after the prompt.

        Raises:
            InputError: if the prompt is empty, longer than the context, or holds an id outside the vocabulary.
        """
        if isinstance(prompt, str) or not isinstance(prompt, Sequence | np.ndarray):
            raise InputError(
                f"the prompt is of type {type(prompt).__name__}; token ids are needed: encode a text first"
            )
        if not len(prompt):
            raise InputError(EMPTY)
        if len(prompt) > self.decoder.n_ctx:
            raise InputError(f"the prompt has {len(prompt)} tokens; the model's context is {self.decoder.n_ctx}")
        ids, positions = self.decoder._tokens([list(prompt)], np.arange(len(prompt))[None])
        row = len(self._rows)
        self.cache.reserve(row + 1, len(prompt))
        self.cache.lengths[row] = 0
        logits = self.decoder._prefill(ids[0], positions[0], self.cache, row)
        self._rows.append(self._next)
        self._next += 1
        return self._rows[-1], logits[-1]

    def step(self, tokens: Mapping[int, int]) -> dict[int, Logits]:
        """One more token for every sequence that is in. Gives the logits (V,) after each.

        Raises:
            InputError: if a sequence has no token here, is full, or is not in; nothing has changed then.
        """
        for sequence in tokens:
            self._row(sequence)
        if missing := [sequence for sequence in self._rows if sequence not in tokens]:
            raise InputError(f"no token for sequence {missing[0]}: give one for each that is in, or let it leave")
        if not self._rows:
            return {}
        lengths = self.cache.lengths[: len(self._rows)].copy()
        if full := [s for s, n in zip(self._rows, lengths, strict=True) if n >= self.decoder.n_ctx]:
            raise InputError(f"sequence {full[0]} has filled the context of {self.decoder.n_ctx} tokens: let it leave")
        ids, positions = self.decoder._tokens([[tokens[s]] for s in self._rows], lengths[:, None])
        logits = self.decoder._advance(ids[:, 0], positions[:, 0], self.cache)
        return dict(zip(self._rows, logits, strict=True))

    def leave(self, sequence: int) -> None:
        """Take a sequence out; the last one gets its row."""
        row, last = self._row(sequence), len(self._rows) - 1
        if row != last:
            self.cache.move(last, row)
            self._rows[row] = self._rows[last]
        self._rows.pop()

    def _row(self, sequence: int) -> int:
        if sequence not in self._rows:
            raise InputError(f"sequence {sequence} is not in the batch")
        return self._rows.index(sequence)
