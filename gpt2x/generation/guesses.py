"""Where the guesses of speculative decoding come from: the text so far, or a smaller model. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..runtimes.base import FEW, Decoder, InputError
from .processors import Scores
from .sampling import Chooser

Ngram = tuple[int, ...]


@dataclass(frozen=True)
class Guess:
    """A token that may come next.

    Attributes:
        token: its id.
        q: the distribution (V,) that it was drawn from; None if it was not drawn.
    """

    token: int
    q: Scores | None = None


MODEL = 0
"""The level of a draft model's guesses. Other levels are the lengths of n-grams, and cost nothing."""


class Guesser(Protocol):
    """Makes the guesses for one text."""

    price: float
    """What a guess of the level ``MODEL`` costs, as a share of a step of the model: a first estimate."""

    def levels(self, tokens: Sequence[int]) -> list[int]:
        """The kinds of guesses that can be made after the tokens so far, each a number; none for no guess."""
        ...

    def guess(self, level: int, tokens: Sequence[int], count: int) -> list[Guess]:
        """At most ``count`` guesses of the tokens that follow. ``levels`` was called for the same tokens."""
        ...


def check_count(guesses: int) -> None:
    """Refuse a number of guesses that is no number of guesses.

    Raises:
        ValueError: if it is below 1.
    """
    if guesses < 1:
        raise ValueError(f"the number of guesses is {guesses}; it must be 1 or more")


# ------------------------------------------------------------------------------------------------------ prompt lookup


@dataclass(frozen=True)
class PromptLookup:
    """Guess that the text continues as it did after an earlier occurrence of its last tokens (an n-gram).

    Args:
        guesses: the largest number of guesses in a run; more than 31 count as 31.
        ngram: the longest n-gram that is looked up, of 1 token or more.

    Raises:
        ValueError: if a number is too small.
    """

    guesses: int = 7
    ngram: int = 6

    def __post_init__(self) -> None:
        check_count(self.guesses)
        if self.ngram < 1:
            raise ValueError(f"ngram is {self.ngram}; it must be 1 or more")

    def check(self, decoder: Decoder) -> None:
        """Every model can be guessed for."""

    def start(self, decoder: Decoder, choose: Chooser) -> Lookup:
        """The guesses for one text."""
        return Lookup(self.ngram)


class Lookup(Guesser):
    """The n-grams of one text, and where each occurred last."""

    price = 0.0

    def __init__(self, ngram: int) -> None:
        self.sizes = range(ngram, 0, -1)
        self.follows: dict[Ngram, int] = {}  # n-gram -> the index of the token after it
        self.read = 0
        self._found = 0

    def levels(self, tokens: Sequence[int]) -> list[int]:
        """The length of the longest n-gram that the text ends with and that occurred before."""
        self._read(tokens)
        for size in self.sizes:
            found = self.follows.get(tuple(tokens[-size:]))
            if found is not None:
                self._found = found
                return [size]
        return []

    def guess(self, level: int, tokens: Sequence[int], count: int) -> list[Guess]:
        """The tokens that followed. Where they end, the text repeats itself, and they are repeated, too."""
        period = len(tokens) - self._found
        return [Guess(tokens[self._found + i % period]) for i in range(count)]

    def _read(self, tokens: Sequence[int]) -> None:
        """Remember every n-gram that a token follows. The last one of the text has none yet."""
        for end in range(self.read, len(tokens)):
            for size in self.sizes:
                if size <= end:
                    self.follows[tuple(tokens[end - size : end])] = end
        self.read = len(tokens)


# -------------------------------------------------------------------------------------------------------- draft model


@dataclass(frozen=True)
class Draft:
    """Guess with a smaller model of the same vocabulary, or as ``PromptLookup`` does, whichever is expected to gain more.

    Args:
        decoder: the smaller model, in any runtime that can truncate its cache. In ONNX Runtime open it with one thread:
            the threads of two models wait for work by spinning, and take the cores from each other.
        guesses: the largest number of guesses in a run; more than 31 count as 31.

    Raises:
        ValueError: if the number is too small.
    """

    decoder: Decoder
    guesses: int = 7

    def __post_init__(self) -> None:
        check_count(self.guesses)

    def check(self, decoder: Decoder) -> None:
        """Refuse a draft model that cannot guess for another.

        Raises:
            InputError: if its vocabulary is another one, or it cannot truncate its cache.
        """
        draft = self.decoder
        if draft.n_vocab != decoder.n_vocab:
            raise InputError(
                f"the draft model's vocabulary is {draft.n_vocab}, the model's {decoder.n_vocab}: use a draft model with "
                "the same tokenizer"
            )
        if not draft.can_truncate:
            raise InputError(f"the draft model's runtime ({draft.runtime}) cannot truncate its cache")

    def start(self, decoder: Decoder, choose: Chooser) -> Drafter:
        """The guesses for one text."""
        return Drafter(self.decoder, choose, _size(self.decoder) / _size(decoder))


class Drafter(Guesser):
    """The guesses of a smaller model for one text, and those of prompt lookup. The model's cache follows the text."""

    def __init__(self, decoder: Decoder, choose: Chooser, price: float) -> None:
        self.decoder = decoder
        self.choose = choose
        self.price = price
        self.lookup = Lookup(PromptLookup.ngram)
        self.cache: Any = None
        self.held: list[int] = []  # the tokens in the cache
        self.agreed = 0  # so many of them belonged to the text when it was last seen

    def levels(self, tokens: Sequence[int]) -> list[int]:
        """The level of prompt lookup, and ``MODEL`` within the context of the model."""
        found = self.lookup.levels(tokens)
        if len(tokens) <= self.decoder.n_ctx:
            found.append(MODEL)
        return found

    def guess(self, level: int, tokens: Sequence[int], count: int) -> list[Guess]:
        """Continue the text, with the controls of the text."""
        if level != MODEL:
            return self.lookup.guess(level, tokens, count)
        text = list(tokens)
        self._take_back(text)
        guesses: list[Guess] = []
        while len(guesses) < count and len(text) <= self.decoder.n_ctx:
            try:
                guesses.append(self._next(text))
            except InputError:  # the controls rule out every token after this guess; the text may never come here
                break
            text.append(guesses[-1].token)
        return guesses

    def _take_back(self, text: list[int]) -> None:
        """Remove from the cache what is no part of the text, and its last token, which has to be run again."""
        keep = min(self.agreed, len(text) - 1)
        while keep < min(len(self.held), len(text) - 1) and self.held[keep] == text[keep]:
            keep += 1
        if keep < len(self.held):
            self.cache = self.decoder.truncate(self.cache, keep) if keep else None
            del self.held[keep:]
        self.agreed = keep

    def _next(self, text: list[int]) -> Guess:
        new = text[len(self.held) :]
        positions = np.arange(len(self.held), len(text))
        # A step reads several tokens as a prompt. For the few that follow others, a run is cheaper.
        read = self.decoder.run if self.held and len(new) <= FEW else self.decoder.step
        logits, self.cache = read(np.array([new]), None, positions[None], self.cache)
        self.held += new
        scores = self.choose.scores(text, logits.reshape(-1, self.decoder.n_vocab)[-1])
        if self.choose.sampling.greedy:
            return Guess(int(scores.argmax()))
        q = self.choose.sampling.probabilities(scores)
        return Guess(self.choose.draw(q), q)


def _size(decoder: Decoder) -> int:
    """How many weights a step reads, roughly."""
    config = decoder.config
    return 12 * config.n_layer * config.n_embd**2 + config.n_vocab * config.n_embd


Speculate = PromptLookup | Draft
