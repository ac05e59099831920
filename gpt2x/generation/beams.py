"""Beam search over any runtime, as transformers defines it (transformers 5, ``GenerationMixin._beam_search``). numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..memory import give_back
from ..runtimes.base import Decoder, InputError, Logits
from .processors import NEVER, apply, log_softmax
from .prompts import Finish, check_prompts, check_tokens, left_pad
from .sampling import ALL_RULED_OUT, Sampling, check_finite

ENDED = np.float32(-1e9)  # added to the score of a beam that cannot go on
HitsStop = Callable[[Sequence[int]], bool]


@dataclass(frozen=True)
class Beams:
    """Settings of beam search. The names are those of transformers' ``GenerationConfig``.

    Args:
        num_beams: how many texts are continued at once, 2 or more.
        length_penalty: a finished text's score is the sum of its log-probabilities, divided by its number of new tokens to
            this power. Above 0, longer texts score higher.
        early_stopping: True: stop as soon as ``num_beams`` texts are finished. False: stop when a better text is unlikely.
            "never": stop only when a better text is impossible.

    Raises:
        ValueError: if a value is out of range.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if self.num_beams < 2:
            raise ValueError(f"num_beams is {self.num_beams}; beam search needs 2 or more")
        if not np.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty is {self.length_penalty}; it must be finite")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping is {self.early_stopping!r}; it must be True, False or 'never'")


@dataclass(frozen=True)
class Hypothesis:
    """A finished text.

    Attributes:
        tokens: the new token ids, without the token that ends the text.
        score: the sum of the log-probabilities, over the number of new tokens to the power of ``length_penalty``.
        finish: why it ended.
    """

    tokens: list[int]
    score: float
    finish: Finish


def beam_search(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    beams: Beams,
    *,
    sampling: Sampling | None = None,
    end_tokens: Sequence[int] = (),
    hits_stop: HitsStop | None = None,
) -> list[list[Hypothesis]]:
    """Return the best continuations of each prompt, at most ``num_beams``, the best first.

    Args:
        decoder: the model.
        prompts: token ids, at least one for each row.
        max_new_tokens: the limit of new tokens; a sequence has one for each prompt.
        beams: the settings.
        sampling: penalties and biases of the log-probabilities; ``temperature`` and what else only sampling applies are
            not used.
        end_tokens: the tokens that end a text.
        hits_stop: whether the new tokens of a text contain a stop string.

    Raises:
        PromptError: if a prompt is empty, longer than the context, or holds an id outside the vocabulary.
        InputError: if a control names a token outside the vocabulary, or rules out all of it.
    """
    sampling = sampling or Sampling(temperature=0)
    check_prompts(decoder, prompts)
    check_tokens(decoder, sampling, end_tokens)
    if isinstance(max_new_tokens, int):
        max_new_tokens = [max_new_tokens] * len(prompts)
    searches = []
    for prompt, limit in zip(prompts, max_new_tokens, strict=True):
        limits = _Limits(limit, decoder.n_ctx, tuple(end_tokens), hits_stop)
        searches.append(_Search(prompt, limits, beams, sampling))
    try:
        _run(decoder, [search for search in searches if not search.done])
    finally:
        give_back()  # the cache's memory
    return [search.finished for search in searches]


def _run(decoder: Decoder, live: list[_Search]) -> None:
    """Advance all searches by one token at a time, each beam in a row of the cache, until each search is done."""
    if not live:
        return
    ids, mask = left_pad([search.prompt for search in live])
    padded = bool((mask == 0).any())
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    starts = list(range(len(live)))  # the first row of each search
    cache: Any = None
    while True:
        logits, cache = decoder.step(ids, mask if padded else None, positions, cache)
        parents: list[int] = []
        for search, start in zip(live, starts, strict=True):
            search.advance(logits[start : start + search.rows])
            parents += [start + parent for parent in search.parents]
        live = [search for search in live if not search.done]
        if not live:
            return
        cache = decoder.reorder(cache, np.array(parents))
        mask = np.concatenate((mask[parents], np.ones((len(parents), 1), np.int64)), axis=1)
        ids = np.array([[token] for search in live for token in search.new_tokens()])
        positions = np.array([[search.length - 1] for search in live for _ in range(search.rows)])
        starts = np.cumsum([0, *(search.rows for search in live)]).tolist()[:-1]


@dataclass(frozen=True)
class _Limits:
    """What ends a text."""

    max_new_tokens: int
    n_ctx: int
    end_tokens: tuple[int, ...]
    hits_stop: HitsStop | None


@dataclass
class _Beam:
    """A text that is continued: its new tokens, and the sum of their log-probabilities."""

    tokens: list[int]
    score: np.float32
    row: int  # where the search's part of the cache holds it


class _Search:
    """The beams of one prompt, the best first."""

    def __init__(self, prompt: Sequence[int], limits: _Limits, beams: Beams, sampling: Sampling) -> None:
        self.prompt = list(prompt)
        self.limits = limits
        self.settings = beams
        self.penalties = sampling.penalties(len(prompt), limits.end_tokens)
        room = limits.n_ctx - len(prompt)
        self.limit = min(limits.max_new_tokens, room)
        self.at_limit: Finish = "context" if room < limits.max_new_tokens else "length"
        self.beams = [_Beam([], np.float32(0), 0)]
        self.parents: list[int] = []  # the row that each row continues
        self.finished: list[Hypothesis] = []
        self.done = self.limit <= 0
        if self.done:
            self.finished.append(Hypothesis([], 0.0, self.at_limit))

    @property
    def rows(self) -> int:
        """How many rows of the cache it has."""
        return len(self.beams)

    @property
    def length(self) -> int:
        """How many tokens each beam has, with the prompt."""
        return len(self.prompt) + len(self.beams[0].tokens)

    def new_tokens(self) -> list[int]:
        """The newest token of each row."""
        by_row = sorted(self.beams, key=lambda beam: beam.row)
        return [beam.tokens[-1] for beam in by_row]

    def advance(self, logits: Logits) -> None:
        """Continue every beam by a token, from the logits (rows, V) after each row."""
        candidates = self._candidates(self._scores(logits))
        finishes = [self._finish(candidate.tokens) for candidate in candidates]
        self._collect(candidates, finishes)
        for candidate, finish in zip(candidates, finishes, strict=True):
            if finish:
                candidate.score += ENDED
        candidates.sort(key=lambda beam: -beam.score)  # stable
        self.beams = candidates[: self.settings.num_beams]
        self.done = all(finishes) or not self._can_improve()
        self.parents = [] if self.done else self._assign_rows()

    def _scores(self, logits: Logits) -> Logits:
        """The score of each beam with each next token, (beams, V)."""
        scores = np.empty_like(logits)
        for i, beam in enumerate(self.beams):
            check_finite(logits[beam.row])
            own = log_softmax(logits[beam.row])
            if self.penalties:
                own = apply(self.penalties, np.array(self.prompt + beam.tokens), own)
            scores[i] = own + beam.score
        return scores

    def _candidates(self, scores: Logits) -> list[_Beam]:
        """The best continuations: enough that ``num_beams`` go on if each beam's best are end tokens."""
        count = self.settings.num_beams * max(2, 1 + len(self.limits.end_tokens))
        flat = scores.ravel()
        count = min(count, int((flat > NEVER).sum()))
        if not count:
            raise InputError(ALL_RULED_OUT)
        best = np.argpartition(-flat, count - 1)[:count]
        best = best[np.lexsort((best, -flat[best]))]
        found = []
        for index in best.tolist():
            beam, token = divmod(index, scores.shape[1])
            parent = self.beams[beam]
            found.append(_Beam([*parent.tokens, token], flat[index], parent.row))
        return found

    def _finish(self, tokens: list[int]) -> Finish | None:
        limits = self.limits
        if tokens[-1] in limits.end_tokens:
            return "stop"
        if limits.hits_stop and limits.hits_stop(tokens):
            return "stop"
        return self.at_limit if len(tokens) >= self.limit else None

    def _collect(self, candidates: Sequence[_Beam], finishes: Sequence[Finish | None]) -> None:
        """Add what has ended. Only the best ``num_beams`` candidates count: the others are there to go on."""
        keep = self.settings.num_beams
        for beam, finish in zip(candidates[:keep], finishes, strict=False):
            if finish is None:
                continue
            tokens = beam.tokens[:-1] if beam.tokens[-1] in self.limits.end_tokens else beam.tokens
            self.finished.append(Hypothesis(tokens, self._normalized(beam.score, len(beam.tokens)), finish))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)  # stable
        del self.finished[keep:]

    def _can_improve(self) -> bool:
        """Whether a beam may still become better than the worst finished text."""
        if len(self.finished) < self.settings.num_beams:
            return True
        if self.settings.early_stopping is True:
            return False
        best = self.beams[0]
        length = len(best.tokens)
        if self.settings.early_stopping == "never" and self.settings.length_penalty > 0:
            length = self.limit
        return self._normalized(best.score, length) > self.finished[-1].score

    def _normalized(self, score: np.float32, length: int) -> float:
        return float(score / np.float32(length**self.settings.length_penalty))

    def _assign_rows(self) -> list[int]:
        """Give each beam a row, its parent's where that is free, so that little is copied. Returns each row's parent."""
        free = list(range(len(self.beams)))
        moved = []
        parents = [0] * len(self.beams)
        for beam in self.beams:
            if beam.row in free:
                free.remove(beam.row)
                parents[beam.row] = beam.row
            else:
                moved.append(beam)
        for beam, row in zip(moved, free, strict=True):
            parents[row] = beam.row
            beam.row = row
        return parents
