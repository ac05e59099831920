"""The decode loop for every runtime. numpy only."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..memory import give_back
from ..runtimes.base import Decoder, Ids, Logits
from .guesses import Speculate
from .prompts import Finish, as_end_tokens, check_prompts, check_tokens, left_pad
from .sampling import Chooser, Sampling
from .speculate import Counts, SpeculativeText, check_speculation

log = logging.getLogger(__name__)


@dataclass
class Generation:
    """A run of the decode loop over a batch of prompts of any lengths. Iterate over it once.

    Each item is the new token of every row, None for rows that have ended. ``finish`` then holds the reason for each row:
    "stop" (an end token, which is not among the items, or ``stop``), "length", or "context".

    Args:
        decoder: the model.
        prompts: token ids, at least one for each row.
        max_new_tokens: the limit for each row; a sequence has one for each prompt.
        sampling: how the next token is chosen.
        eos_token_id: the token, or the tokens, that end a row; None for no such token.
        num_return_sequences: how many rows continue each prompt. The rows of a prompt follow one another.
        generators: the random stream of each row, instead of those of ``sampling.seed``.
        speculate: speculative decoding, for a single row; several rows decode plainly. ``speculation`` then counts what
            it did.

    Raises:
        PromptError: if a prompt is empty, longer than the context, or holds an id outside the vocabulary.
        InputError: if a control names a token outside the vocabulary, or the model cannot decode speculatively.
    """

    decoder: Decoder
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int | Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    eos_token_id: int | Sequence[int] | None = None
    num_return_sequences: int = 1
    generators: Sequence[np.random.Generator] | None = None
    speculate: Speculate | None = None

    def __post_init__(self) -> None:
        self.end_tokens = as_end_tokens(self.eos_token_id)
        self.rows = len(self.prompts) * self.num_return_sequences
        self.finish: list[Finish | None] = [None] * self.rows
        check_prompts(self.decoder, self.prompts)
        check_tokens(self.decoder, self.sampling, self.end_tokens)
        self.speculation = Counts()
        if self.speculate:
            check_speculation(self.decoder, self.speculate)

    def stop(self, row: int) -> None:
        """End a row, because of what its text says. It gets no further token."""
        self.finish[row] = self.finish[row] or "stop"

    def __iter__(self) -> Iterator[list[int | None]]:
        try:
            if self.speculate and self.rows == 1:
                yield from self._speculative_steps(self.speculate)
            else:
                yield from self._steps()
        finally:
            give_back()  # the cache's memory: its sizes fit this batch alone, and the next would need new memory

    def _steps(self) -> Iterator[list[int | None]]:
        ids, mask = left_pad(self.prompts)  # (B, T) each
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        padded = bool((mask == 0).any())
        rows = self._new_rows()
        cache: Any = None
        for step in itertools.count():
            self._end_at(rows, step)
            if all(self.finish):
                log.info("ended after %d steps: %s", step, ", ".join(map(str, self.finish)))
                return
            logits, cache = self.decoder.step(ids, mask if padded else None, positions, cache)
            if step == 0:
                log.info("%d prompts of up to %d tokens were read", *ids.shape)
                logits, mask, cache = self._repeated(logits, mask, cache)
            tokens = [self._next(i, row, logits[i]) for i, row in enumerate(rows)]
            positions = np.array([[min(len(row.tokens), self.decoder.n_ctx - 1)] for row in rows])
            for row, token in zip(rows, tokens, strict=True):
                row.tokens.append(token or 0)
            yield tokens
            ids = np.array([[row.tokens[-1]] for row in rows])
            mask = np.concatenate((mask, np.ones_like(ids)), axis=1)

    def _speculative_steps(self, speculate: Speculate) -> Iterator[list[int | None]]:
        (row,) = self._new_rows()
        text = SpeculativeText(self.decoder, speculate, row.tokens, row.limit, row.choose, self.end_tokens)
        self.speculation = text.counts
        new_tokens = iter(text)
        for step in itertools.count():
            self._end_at([row], step)
            if self.finish[0]:
                log.info("ended after %d steps: %s; %s", step, self.finish[0], text.counts)
                return
            token = next(new_tokens)
            if token in self.end_tokens:
                self.finish[0] = "stop"
                yield [None]
            else:
                yield [token]

    def _new_rows(self) -> list[_Row]:
        generators = iter(self.generators or self.sampling.generators(self.rows))
        limits = self.max_new_tokens
        if isinstance(limits, int):
            limits = [limits] * len(self.prompts)
        rows = []
        for prompt, limit in zip(self.prompts, limits, strict=True):
            for _ in range(self.num_return_sequences):
                choose = Chooser(self.sampling, len(prompt), self.end_tokens, next(generators))
                rows.append(_Row(list(prompt), limit, choose))
        return rows

    def _repeated(self, logits: Logits, mask: Ids, cache: Any) -> tuple[Logits, Ids, Any]:
        """As many rows as texts are wanted of each prompt, which was read once."""
        if self.num_return_sequences == 1:
            return logits, mask, cache
        rows = np.repeat(np.arange(len(self.prompts)), self.num_return_sequences)
        return logits[rows], mask[rows], self.decoder.reorder(cache, rows)

    def _end_at(self, rows: Sequence[_Row], step: int) -> None:
        for i, row in enumerate(rows):
            if self.finish[i] is not None:
                continue
            if step >= row.limit:
                self.finish[i] = "length"
            elif len(row.tokens) >= self.decoder.n_ctx:
                self.finish[i] = "context"

    def _next(self, i: int, row: _Row, logits: Logits) -> int | None:
        if self.finish[i]:
            return None
        token = row.choose(row.tokens, logits)
        if token in self.end_tokens:
            self.finish[i] = "stop"
            return None
        return token


@dataclass
class _Row:
    """The tokens so far of a text, its limit of new ones, and what chooses the next one."""

    tokens: list[int]
    limit: int
    choose: Chooser
