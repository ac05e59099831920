"""How many guesses speculative decoding makes, and when it makes none."""

from __future__ import annotations

from dataclasses import dataclass, field

COUNTS = (1, 2, 3, 5, 7, 11, 15)  # the numbers of guesses: few, since each has bindings and a price of its own
WORTH = 1.05  # tokens for the price of one step from which on guesses are expected to pay
START = 1.0  # how many steps may be lost before anything was won
EARNED = 0.012  # how many more for each token
MOST = 4.0  # how many at most
FADES = 0.85  # how much of what was counted remains after each run
HOPE, HOPES = 0.7, 2.0  # the share of guesses that is expected to be right before any was checked, and its weight


@dataclass
class _Hits:
    """How many guesses of a kind were right of those that were checked."""

    right: float = HOPE * HOPES
    checked: float = HOPES

    def add(self, guesses: int, right: int) -> None:
        self.right = FADES * self.right + right
        self.checked = FADES * self.checked + min(guesses, right + 1)

    @property
    def share(self) -> float:
        return self.right / self.checked


@dataclass
class Prices:
    """What a run of several tokens costs, in runs of one token.

    Args:
        slope: what each further token costs until it is measured.
        measures: whether to follow the clock. The tokens must not depend on it.
    """

    slope: float
    measures: bool
    _single: float = 0.0  # seconds of a run of one token
    _ratios: dict[int, float] = field(default_factory=dict)  # tokens in a run -> its price
    _met: set[int] = field(default_factory=set)

    def of(self, tokens: int) -> float:
        """The price of a run of so many tokens."""
        if tokens in self._ratios:
            return self._ratios[tokens]
        slope = self.slope
        if self._ratios:
            nearest = min(self._ratios, key=lambda measured: abs(measured - tokens))
            slope = (self._ratios[nearest] - 1) / (nearest - 1)
        return 1 + slope * (tokens - 1)

    def share(self, seconds: float) -> float | None:
        """A time as a share of a run of one token; None if that is not known."""
        return seconds / self._single if self._single else None

    def measured(self, tokens: int, seconds: float) -> None:
        """Learn from a run. The first one of each length also binds buffers, and does not count."""
        if not self.measures:
            return
        if tokens not in self._met:
            self._met.add(tokens)
        elif tokens == 1:
            self._single = _follow(self._single or seconds, seconds)
        elif self._single:
            ratio = min(max(1.0, seconds / self._single), 2.0 * tokens)
            self._ratios[tokens] = _follow(self._ratios.get(tokens, ratio), ratio)


class Pace:
    """Decides on the number of guesses, so that guesses that fail never cost more than about 2% of the steps.

    It keeps an account in steps of the model: each token earns a little, a run of guesses earns its tokens and costs its
    price. Guesses that are expected to fail are made only as far as the account allows.

    Args:
        most: the largest number of guesses.
        prices: what runs cost.
        guess_price: what a guess costs.
    """

    def __init__(self, most: int, prices: Prices, guess_price: float) -> None:
        self.counts = [count for count in COUNTS if count < most] + [most]
        self.prices = prices
        self.guess_price = guess_price
        self.account = START
        self._has_guessed = False
        self.hits: dict[int, _Hits] = {}

    def price(self, guesses: int) -> float:
        """The price of making and checking guesses."""
        return self.prices.of(guesses + 1) + guesses * self.guess_price

    def count(self, level: int, most: int) -> int:
        """How many guesses of a kind to make, at most ``most``; 0 for a plain step."""
        share = self.hits.setdefault(level, _Hits()).share
        possible = [count for count in self.counts if count <= most and self.price(count) - 1 <= self.account]
        possible = [count for count in possible if count + 1 >= WORTH * self.price(count)]
        if not possible:
            return 0
        best = max(possible, key=lambda count: self._tokens(count, share) / self.price(count))
        if self._tokens(best, share) >= WORTH * self.price(best):
            return best
        return possible[0] if self.account >= START else 0  # try again, rarely

    def step(self) -> None:
        """A plain step was made."""
        self._earn(EARNED)

    def guessed(self, guesses: int, seconds: float) -> None:
        """Guesses were made. The first ones may have read the prompt, and do not count."""
        share = self.prices.share(seconds)
        if self.guess_price and self._has_guessed and guesses and share is not None:
            self.guess_price = _follow(self.guess_price, share / guesses)
        self._has_guessed = True

    def checked(self, level: int, guesses: int, right: int) -> None:
        """A run of guesses was checked."""
        self.hits[level].add(guesses, right)
        self._earn(right + 1 - self.price(guesses) + EARNED * (right + 1))

    def lost(self, steps: int) -> None:
        """Steps had to be made again."""
        self._earn(-steps)

    def _earn(self, steps: float) -> None:
        self.account = min(MOST, self.account + steps)

    def _tokens(self, guesses: int, share: float) -> float:
        """How many tokens to expect of a run."""
        return sum(share**i for i in range(guesses + 1))


def _follow(average: float, value: float) -> float:
    return 0.8 * average + 0.2 * value
