"""How many guesses speculative decoding makes, and when it makes none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .guesses import MODEL

COUNTS = (1, 3, 7, 15)  # the numbers of guesses: few, since each has bindings and a price of its own
WORTH = 1.05  # tokens for the price of one step from which on guesses are expected to pay
START = 1.0  # how many steps may be lost before anything was won
EARNED = 0.012  # how many more for each token
MOST = 4.0  # how many at most
FADES = 0.85  # how much of what was counted remains after each run
NEWS = 0.2  # the weight of a new measurement in a running average
CHEAPEST = 0.01  # the least slope: what is 0 once would stay 0
# The share of guesses that is expected to be right before any was checked, by their level: of a draft model, then by the length
# of the n-gram, as measured on greedy texts of the shipped model and a larger one. It counts as much as HOPES guesses.
HOPE = (0.6, 0.45, 0.65, 0.7, 0.75, 0.8, 0.85)
HOPES = 4.0


class _Hits:
    """How many guesses of a level were right of those that were checked."""

    def __init__(self, level: int) -> None:
        self.checked = HOPES
        self.right = HOPES * HOPE[min(level, len(HOPE) - 1)]

    def add(self, guesses: int, right: int) -> None:
        self.right = FADES * self.right + right
        self.checked = FADES * self.checked + min(guesses, right + 1)

    @property
    def share(self) -> float:
        return self.right / self.checked


@dataclass
class Prices:
    """What guesses cost, and runs of several tokens, in runs of one token.

    Each further token of a run is assumed to cost the same. A price for each length would be learned from few runs, and a
    single slow one could rule out its length for good.

    Args:
        slope: what each further token of a run costs until it is measured.
        guess: what a guess of a draft model costs until it is measured.
        measures: whether to follow the clock. The tokens must not depend on it.
    """

    slope: float
    guess: float
    measures: bool
    _single: float = 0.0  # seconds of a run of one token
    _met: set[int] = field(default_factory=set)

    def of(self, tokens: int) -> float:
        """The price of a run of so many tokens."""
        return 1 + self.slope * (tokens - 1)

    def measured(self, tokens: int, seconds: float) -> None:
        """Learn from a run. The first one of each length may prepare it, and does not count."""
        if not self.measures:
            return
        if tokens not in self._met:
            self._met.add(tokens)
        elif tokens == 1:
            self._single = _follow(self._single or seconds, seconds, NEWS)
        elif self._single:
            slope = (seconds / self._single - 1) / (tokens - 1)
            # The longer the run, the less its slope depends on how exactly a run of one token is known.
            self.slope = _follow(self.slope, max(slope, CHEAPEST), NEWS * (tokens - 1) / tokens)

    def guessed(self, guesses: int, seconds: float) -> None:
        """Learn from guesses of a draft model."""
        if self.measures and self._single and guesses:
            self.guess = _follow(self.guess, seconds / guesses / self._single, NEWS)


class Pace:
    """Decides on the guesses, so that guesses that fail never cost more than about 2% of the steps.

    It keeps an account in steps of the model: each token earns a little, a run of guesses earns its tokens and costs its
    price. Guesses that are expected to fail are made only as far as the account allows.

    Args:
        most: the largest number of guesses.
        prices: what runs and guesses cost.
    """

    def __init__(self, most: int, prices: Prices) -> None:
        self.counts = [count for count in COUNTS if count < most] + [most]
        self.prices = prices
        self.account = START
        self._has_drafted = False
        self.hits: dict[int, _Hits] = {}

    def price(self, level: int, guesses: int) -> float:
        """The price of making and checking guesses."""
        price = self.prices.of(guesses + 1)
        if level == MODEL:
            price += guesses * self.prices.guess
        return price

    def choose(self, levels: Sequence[int], most: int) -> tuple[int, int]:
        """Which kind of guesses to make, and how many, at most ``most``; 0 for a plain step."""
        best = (MODEL, 0)
        best_gain = 0.0
        for level in levels:
            for count in self._possible(level, most):
                gain = self._gain(level, count)
                if gain > best_gain:
                    best, best_gain = (level, count), gain
        if best_gain >= WORTH:
            return best
        if best_gain and self.account >= START:  # try again, rarely
            level = best[0]
            return level, self._possible(level, most)[0]
        return MODEL, 0

    def _possible(self, level: int, most: int) -> list[int]:
        """The numbers of guesses that the account allows, and that are worth their price if all are right."""
        found = []
        for count in self.counts:
            price = self.price(level, count)
            if count <= most and price - 1 <= self.account and count + 1 >= WORTH * price:
                found.append(count)
        return found

    def _gain(self, level: int, guesses: int) -> float:
        """How many tokens to expect for the price of one step."""
        share = self._hits_of(level).share
        tokens = sum(share**i for i in range(guesses + 1))
        return tokens / self.price(level, guesses)

    def _hits_of(self, level: int) -> _Hits:
        if level not in self.hits:
            self.hits[level] = _Hits(level)
        return self.hits[level]

    def step(self) -> None:
        """A plain step was made."""
        self._earn(EARNED)

    def guessed(self, level: int, guesses: int, seconds: float) -> None:
        """So many steps of a draft model were made for guesses. The first ones have read the prompt, and do not count."""
        if level != MODEL:
            return
        if self._has_drafted:
            self.prices.guessed(guesses, seconds)
        self._has_drafted = True

    def checked(self, level: int, guesses: int, right: int) -> None:
        """A run of guesses was checked."""
        self._hits_of(level).add(guesses, right)
        self._earn(right + 1 - self.price(level, guesses) + EARNED * (right + 1))

    def lost(self, steps: int) -> None:
        """Steps had to be made again."""
        self._earn(-steps)

    def _earn(self, steps: float) -> None:
        self.account = min(MOST, self.account + steps)


def _follow(average: float, value: float, news: float) -> float:
    """Return the running average with one more value. A run that other programs delayed counts as twice the average."""
    return average + news * (min(value, 2 * average) - average)
