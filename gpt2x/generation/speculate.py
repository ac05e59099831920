"""Speculative decoding of one text: guesses are checked in one run of the model. numpy only.

**Greedy** decoding chooses the tokens of plain decoding. A run of several tokens and runs of one token round differently,
so near ties (``Decoder.near_tie``) are decided as plain decoding does: the cache is truncated to the tokens that runs of
one token put there, and the tokens after them are run again, one by one. Where runs of several tokens return the same bits
(``Decoder.same_in_runs``, which is checked once for each model), nothing has to be decided.

**Sampling** draws from the distribution of plain decoding: a guess x that was drawn from q is accepted with the probability
min(1, p(x) / q(x)), and otherwise a token is drawn from what p has more than q (https://arxiv.org/abs/2211.17192).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..runtimes.base import FEW, Decoder, InputError, Logits
from .guesses import MODEL, Guess, Speculate
from .pace import Pace, Prices
from .processors import Scores
from .sampling import Chooser

log = logging.getLogger(__name__)

PROBE = 4  # tokens that are run both ways to see whether a model returns the same bits
TIES_WEIGHT = 20.0  # how many positions the expected share of near ties counts for, before any was seen
TIES_SHARE = 10.0  # that share, as a multiple of ``Decoder.near_tie``
RISK = 0.15  # near ties that may be expected in the rest of the text: after each, its steps are made again
FEWEST = 10  # the last tokens of a text are not worth the preparation of a run where near ties are likely
HOPELESS = 10 * RISK  # from here on, near ties are not even counted
AGREES: WeakKeyDictionary[Decoder, bool] = WeakKeyDictionary()  # what the check of ``same_in_runs`` found
PRICES: WeakKeyDictionary[Decoder, WeakKeyDictionary[Speculate, Prices]] = (
    WeakKeyDictionary()
)  # what earlier texts measured


def check_speculation(decoder: Decoder, speculate: Speculate) -> None:
    """Refuse a model that cannot check guesses, or guesses that are not for it.

    Raises:
        InputError: with the reason.
    """
    if decoder.last_only:
        raise InputError(
            f"{decoder.runtime} returns the logits of the last token only, and speculative decoding needs those of each: "
            "export the model with --logits all"
        )
    if not decoder.can_truncate:
        raise InputError(f"{decoder.runtime} cannot truncate its cache, which speculative decoding needs")
    speculate.check(decoder)


def prices_of(decoder: Decoder, speculate: Speculate, guess_price: float, greedy: bool) -> Prices:
    """Return what runs and guesses cost. For greedy decoding, they are measured, over all texts of a model."""
    fresh = Prices(decoder.several_price, guess_price, measures=greedy)
    if not greedy:  # with a seed, a sampled text is the same each time, so it must not follow the clock
        return fresh
    return PRICES.setdefault(decoder, WeakKeyDictionary()).setdefault(speculate, fresh)


@dataclass
class Counts:
    """What speculative decoding did.

    Attributes:
        runs: runs of the model after the prompt.
        tokens: new tokens.
        guesses: guesses that were checked.
        right: those that were accepted.
        again: runs of one token that were made again, because of near ties.
    """

    runs: int = 0
    tokens: int = 0
    guesses: int = 0
    right: int = 0
    again: int = 0


class Ties:
    """How often the best two logits are so near that rounding may decide."""

    def __init__(self, near: float) -> None:
        self.near = near
        self.seen = min(0.5, TIES_SHARE * near) * TIES_WEIGHT
        self.positions = TIES_WEIGHT

    def check(self, logits: Logits, scores: Scores) -> bool:
        """Whether the best two scores (V,) are nearly tied; their logits (V,) say what is near."""
        tolerance = self.near * float(np.abs(logits).max())
        tied = bool(np.count_nonzero(scores >= scores.max() - tolerance) > 1)
        self.seen += tied
        self.positions += 1
        return tied

    def risk(self, tokens: int) -> float:
        """How many to expect in so many tokens."""
        return self.seen / self.positions * tokens


class SpeculativeText:
    """The new tokens of one text, without an end: the caller takes as many as it wants. Iterate over it once.

    Args:
        decoder: the model.
        speculate: where guesses come from.
        tokens: the prompt (T,); each new token is appended.
        limit: how many new tokens the caller takes at most.
        choose: chooses the tokens.
        end_tokens: the tokens after which the caller takes no more.
    """

    def __init__(
        self, decoder: Decoder, speculate: Speculate, tokens: list[int], limit: int, choose: Chooser,
        end_tokens: Sequence[int],
    ) -> None:  # fmt: skip
        self.decoder = decoder
        self.tokens = tokens
        self.end = min(len(tokens) + limit, decoder.n_ctx)
        self.choose = choose
        self.end_tokens = end_tokens
        self.counts = Counts()
        self.guesser = speculate.start(decoder, choose)
        greedy = choose.sampling.greedy
        prices = prices_of(decoder, speculate, self.guesser.price, greedy)
        self.pace = Pace(min(speculate.guesses, FEW - 1), prices)
        self.ties = Ties(decoder.near_tie) if greedy else None
        self.probe: list[Logits] = []  # of the last plain steps, until runs of several tokens were checked
        self.cache: Any = None
        self.held = 0  # tokens in the cache
        self.plain = 0  # so many of them are as plain decoding has them

    def __iter__(self) -> Iterator[int]:
        logits, self.cache = self.decoder.step(
            np.array([self.tokens]), None, np.arange(len(self.tokens))[None], self.cache
        )
        self.held = self.plain = len(self.tokens)
        yield self._add(self.choose(self.tokens, logits[0]))
        while True:
            level, guesses = self._guesses()
            if not guesses:
                yield self._plain_step()
                continue
            yield from self._check(level, guesses)

    def _add(self, token: int) -> int:
        self.tokens.append(token)
        self.counts.tokens += 1
        return token

    # ------------------------------------------------------------------------------------------------ plain steps

    def _plain_step(self) -> int:
        start = time.perf_counter()
        is_plain = self.plain == self.held
        logits = self._single()
        self.pace.prices.measured(1, time.perf_counter() - start)
        self.pace.step()
        scores = self.choose.scores(self.tokens, logits)
        if self.ties is None:
            return self._add(self.choose.draw(self.choose.sampling.probabilities(scores)))
        if self._must_probe():
            self.probe = [*self.probe[1 - PROBE :], logits]
        elif self._must_check(is_plain) and self.ties.check(logits, scores) and not is_plain:
            scores = self._decide()
        return self._add(int(scores.argmax()))

    def _must_check(self, is_plain: bool) -> bool:
        """Whether a step is checked for a near tie: to decide it, or, after a plain cache, to count it."""
        assert self.ties is not None
        if self._same_bits():
            return False
        return not is_plain or self.ties.risk(self._room()) <= HOPELESS

    def _single(self) -> Logits:
        """Run the next token alone. Logits (V,)."""
        ids, position = np.array([[self.tokens[self.held]]]), np.array([[self.held]])
        logits, self.cache = self.decoder.step(ids, None, position, self.cache)
        if self.plain == self.held:
            self.plain += 1
        self.held += 1
        self.counts.runs += 1
        found: Logits = logits[0]
        return found

    def _several(self, tokens: Sequence[int]) -> Logits:
        """Run tokens (T,) after those in the cache. Logits (T, V)."""
        positions = np.arange(self.held, self.held + len(tokens))
        start = time.perf_counter()
        logits, self.cache = self.decoder.run(np.array([tokens]), None, positions[None], self.cache)
        self.pace.prices.measured(len(tokens), time.perf_counter() - start)
        self.held += len(tokens)
        self.counts.runs += 1
        found: Logits = logits[0]
        return found

    def _truncate(self, length: int) -> None:
        if length < self.held:
            self.cache = self.decoder.truncate(self.cache, length)
            self.held = length
            self.plain = min(self.plain, length)

    # ---------------------------------------------------------------------------------------------------- guesses

    def _guesses(self) -> tuple[int, list[Guess]]:
        """Guesses of the next tokens, and their level; none where a plain step is expected to be better."""
        room = self._room()
        if room < 1 or not self._may_speculate(room):
            return MODEL, []
        level, count = self.pace.choose(self.guesser.levels(self.tokens), room)
        if not count:
            return level, []
        start = time.perf_counter()
        guesses = self.guesser.guess(level, self.tokens, count)
        self.pace.guessed(level, len(guesses), time.perf_counter() - start)
        for i, guess in enumerate(guesses):
            if guess.token in self.end_tokens:
                return level, guesses[: i + 1]
        return level, guesses

    def _room(self) -> int:
        """How many guesses may follow: the run itself adds a token."""
        return self.end - len(self.tokens) - 1

    def _may_speculate(self, room: int) -> bool:
        if self.ties is None or self._same_bits():
            return True
        if self._must_probe():
            return len(self.probe) == PROBE and self._run_probe()
        return self.ties.risk(max(room, FEWEST)) < RISK

    def _same_bits(self) -> bool:
        return self.decoder.same_in_runs and AGREES.get(self.decoder, False)

    def _must_probe(self) -> bool:
        return self.decoder.same_in_runs and self.decoder not in AGREES

    def _run_probe(self) -> bool:
        """Run the last tokens again, in one run, and see whether the logits are the same to the last bit."""
        self._truncate(self.held - PROBE)
        again = self._several(self.tokens[self.held : self.held + PROBE])
        same = np.array_equal(again, np.array(self.probe))
        if same:
            self.plain = self.held
        AGREES[self.decoder] = same
        log.info(
            "%s: runs of several tokens return %s", self.decoder.runtime, "the same bits" if same else "other bits"
        )
        return same

    # --------------------------------------------------------------------------------------------------- checking

    def _check(self, level: int, guesses: list[Guess]) -> Iterator[int]:
        """Yield the guesses that are accepted, and one more token."""
        run = self._several([self.tokens[-1], *(guess.token for guess in guesses)])
        if self._same_bits():
            self.plain = self.held
        right = 0
        for logits, guess in zip(run, guesses, strict=False):
            token, accepted = self._judge(logits, guess)
            yield self._add(token)
            if not accepted:
                break
            right += 1
        else:
            yield self._add(self._judge(run[-1], None)[0])
        self._truncate(len(self.tokens) - 1)
        self.counts.guesses += min(len(guesses), right + 1)
        self.counts.right += right
        self.pace.checked(level, len(guesses), right)

    def _judge(self, logits: Logits, guess: Guess | None) -> tuple[int, bool]:
        """The next token, from its logits (V,) in a run of several, and whether the rest of the run may be used."""
        scores = self.choose.scores(self.tokens, logits)
        if self.ties is None:
            return self._sample(self.choose.sampling.probabilities(scores), guess)
        if not self._same_bits() and self.ties.check(logits, scores):
            scores = self._decide()
            return int(scores.argmax()), False
        token = int(scores.argmax())
        return token, guess is not None and token == guess.token

    def _decide(self) -> Scores:
        """The scores (V,) of plain decoding: every token that a run of several put into the cache is run again, alone."""
        self._truncate(self.plain)
        logits = None
        before = self.counts.runs
        while self.held < len(self.tokens):
            logits = self._single()
        assert logits is not None  # the last token is never in a plain cache
        again = self.counts.runs - before
        self.counts.again += again
        self.pace.lost(again)
        return self.choose.scores(self.tokens, logits)

    def _sample(self, p: Scores, guess: Guess | None) -> tuple[int, bool]:
        if guess is None:
            return self.choose.draw(p), False
        x = guess.token
        q = np.zeros_like(p)
        if guess.q is None:
            q[x] = 1.0
        else:
            q = guess.q
        if self.choose.generator.random() * q[x] < p[x]:
            return x, True
        rest = np.maximum(p - q, 0)
        total = rest.sum()
        # Where p and q are equal but for rounding, nothing is left; then p itself is right.
        return self.choose.draw(rest / total if total > 0 else p), False
