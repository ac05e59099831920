"""Choosing the next token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from converters import CheckpointError

from ..runtimes.base import Ids, InputError, Logits
from .processors import (
    NEVER,
    CountPenalty,
    MinLength,
    MinP,
    NoRepeatNGram,
    Processor,
    RepetitionPenalty,
    RuleOut,
    Scores,
    SequenceBias,
    Temperature,
    TopK,
    TopP,
    TypicalP,
    apply,
    softmax,
)

NOT_FINITE = "the logits contain NaN or infinity: the weights are damaged, or too large for their dtype"
ALL_RULED_OUT = (
    "no token is left: bad_words_ids, no_repeat_ngram_size, suppress_tokens and min_new_tokens exclude all of the "
    "vocabulary"
)
NO_TOKENS: Ids = np.empty(0, np.int64)
MARGIN = 1e-9
"""Relative; more than what rounding in float64 can change."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The names are those of transformers' ``GenerationConfig``.

    Controls are applied in the order of the list, as transformers does; ``temperature`` and what follows it only if a
    token is sampled.

    Args:
        temperature: 0 for greedy decoding.
        top_k: keep the k likeliest tokens, and those tied with the last of them; None or 0 to disable.
        top_p: nucleus sampling: keep the fewest likeliest tokens whose probabilities reach p; None or 1 to disable.
        seed: makes the choice reproducible; each row of a batch has its own random stream.
        sequence_bias: token ids of a sequence -> what is added to the logit of its last token where the text so far ends
            with the tokens before it.
        logit_bias: token id -> what is added to its logit (OpenAI's name).
        repetition_penalty: above 1, tokens of the prompt and of the new text become less likely; 1 to disable.
        presence_penalty: subtracted from the logit of each token of the new text (OpenAI's).
        frequency_penalty: subtracted for each time that the token is in the new text (OpenAI's).
        no_repeat_ngram_size: no n-gram of this size occurs twice; 0 to disable.
        bad_words_ids: sequences of tokens that are never completed.
        min_new_tokens: the text does not end before it has so many new tokens.
        min_length: the same, with the tokens of the prompt; not used with ``min_new_tokens``, as in transformers.
        suppress_tokens: tokens that are never chosen.
        processors: functions of your own: (tokens so far (T,), logits (V,)) -> logits (V,).
        min_p: keep tokens with at least this share of the likeliest token's probability; None or 0 to disable.
        typical_p: locally typical sampling: the mass to keep; None or 1 to disable.

    Raises:
        ValueError: if a value is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    sequence_bias: Mapping[tuple[int, ...], float] | None = None
    logit_bias: Mapping[int, float] | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] = ()
    min_new_tokens: int = 0
    min_length: int = 0
    suppress_tokens: Sequence[int] = ()
    processors: Sequence[Processor] = ()
    min_p: float | None = None
    typical_p: float | None = None

    def __post_init__(self) -> None:
        _check(0 <= self.temperature < np.inf, "temperature", self.temperature, "a finite number of 0 or more")
        _check(self.top_k is None or self.top_k >= 0, "top_k", self.top_k, "0 (disabled) or more")
        _check_share("top_p", self.top_p)
        _check_share("min_p", self.min_p)
        _check_share("typical_p", self.typical_p)
        _check(0 < self.repetition_penalty < np.inf, "repetition_penalty", self.repetition_penalty, "above 0")
        _check(np.isfinite(self.presence_penalty), "presence_penalty", self.presence_penalty, "finite")
        _check(np.isfinite(self.frequency_penalty), "frequency_penalty", self.frequency_penalty, "finite")
        _check(self.no_repeat_ngram_size >= 0, "no_repeat_ngram_size", self.no_repeat_ngram_size, "0 or more")
        _check(self.min_new_tokens >= 0, "min_new_tokens", self.min_new_tokens, "0 or more")
        _check(self.min_length >= 0, "min_length", self.min_length, "0 or more")
        for sequence in self.sequences():
            _check(len(sequence) > 0, "a sequence of tokens", "empty", "at least one token id")
            for token in sequence:
                _check(token >= 0, "a token id", token, "0 or more")
        for bias in self._biases().values():
            _check(not np.isnan(bias) and bias < np.inf, "a bias", bias, "a number below infinity")

    def sequences(self) -> list[Sequence[int]]:
        """Every sequence of tokens that a control names."""
        suppressed = [[token] for token in self.suppress_tokens]
        return [*self._biases(), *self.bad_words_ids, *suppressed]

    def _biases(self) -> dict[tuple[int, ...], float]:
        biases = {tuple(sequence): bias for sequence, bias in (self.sequence_bias or {}).items()}
        for token, bias in (self.logit_bias or {}).items():
            biases[token,] = biases.get((token,), 0.0) + bias
        return biases

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is chosen."""
        return self.temperature == 0

    def generators(self, n: int) -> list[np.random.Generator]:
        """One random stream for each row."""
        seeds = np.random.SeedSequence(self.seed).spawn(n)
        return [np.random.default_rng(seed) for seed in seeds]

    def penalties(self, prompt_length: int = 0, end_tokens: Sequence[int] = ()) -> list[Processor]:
        """The processors of one row that greedy decoding and beam search apply, too, in order."""
        found: list[Processor] = []
        biases = self._biases()
        if biases:
            found.append(SequenceBias(biases))
        if self.repetition_penalty != 1:
            found.append(RepetitionPenalty(self.repetition_penalty))
        if self.presence_penalty or self.frequency_penalty:
            found.append(CountPenalty(self.presence_penalty, self.frequency_penalty, prompt_length))
        if self.no_repeat_ngram_size:
            found.append(NoRepeatNGram(self.no_repeat_ngram_size))
        # A text must be able to end, so transformers ignores a bad word that is nothing but an end token.
        ends = [[token] for token in end_tokens]
        bad_words = {tuple(word): NEVER for word in self.bad_words_ids if list(word) not in ends}
        if bad_words:
            found.append(SequenceBias(bad_words))
        least = prompt_length + self.min_new_tokens if self.min_new_tokens else self.min_length
        if end_tokens and least > prompt_length:
            found.append(MinLength(least, end_tokens))
        if self.suppress_tokens:
            found.append(RuleOut(self.suppress_tokens))
        return [*found, *self.processors]

    def warpers(self) -> list[Processor]:
        """The processors that only sampling applies, in order."""
        found: list[Processor] = [Temperature(self.temperature)]
        if self.top_k:
            found.append(TopK(self.top_k))
        if self.top_p is not None and self.top_p < 1:
            found.append(TopP(self.top_p))
        if self.min_p:
            found.append(MinP(self.min_p))
        if self.typical_p is not None and self.typical_p < 1:
            found.append(TypicalP(self.typical_p))
        return found

    def choose(
        self, logits: Logits, generator: np.random.Generator, tokens: Ids = NO_TOKENS, prompt_length: int = 0,
        end_tokens: Sequence[int] = (),
    ) -> int:  # fmt: skip
        """Choose a token id from the logits (V,) of one row.

        Args:
            logits: (V,).
            generator: the row's random stream.
            tokens: the tokens so far (T,), with the prompt.
            prompt_length: how many of them are the prompt.
            end_tokens: the tokens that end the text.

        Raises:
            CheckpointError: if the logits contain NaN or infinity.
            InputError: if the controls rule out every token.
        """
        return Chooser(self, prompt_length, end_tokens, generator)(tokens, logits)

    def probabilities(self, logits: Scores) -> Scores:
        """The distribution (V,) to sample from, after ``penalties`` were applied."""
        found = self.candidates(logits)
        p = np.zeros(len(logits))
        p[found.ids] = found.p
        return p

    def candidates(self, logits: Scores) -> Candidates:
        """The tokens to sample from, of logits (V,) after ``penalties`` were applied."""
        ids = np.arange(len(logits))
        least = self._least(logits)
        if least > NEVER:
            ids = np.flatnonzero(logits >= least)
            logits = logits[ids]
        warped = apply(self.warpers(), NO_TOKENS, logits.astype(np.float64))
        possible = warped > NEVER
        if not possible.all():
            kept = np.flatnonzero(possible)
            ids = ids[kept]
            warped = warped[kept]
        return Candidates(ids, softmax(warped))

    def _least(self, logits: Scores) -> float:
        """A logit below which no token is sampled, so that the float64 arithmetic can leave these out.

        It is a little lower than necessary, because ``TopK`` and ``MinP`` decide, and logits that differ may be tied
        after the temperature is applied, by rounding.
        """
        best = float(logits.max())
        if self.top_k and self.top_k < len(logits):
            least = float(np.partition(logits, -self.top_k)[-self.top_k])
            return least - MARGIN * (best - least)
        if self.min_p and self.top_p in (None, 1):
            least = best + self.temperature * math.log(self.min_p)
            return least - MARGIN * (abs(best) + abs(least) + self.temperature)
        return NEVER


@dataclass(frozen=True)
class Candidates:
    """The tokens that may be sampled: all others have a probability of 0.

    Attributes:
        ids: (n,), in rising order.
        p: their probabilities (n,), float64.
    """

    ids: Ids
    p: Scores


class Chooser:
    """Chooses the tokens of one row.

    Args:
        sampling: the controls.
        prompt_length: how many tokens are the prompt.
        end_tokens: the tokens that end the text.
        generator: the row's random stream.
    """

    def __init__(
        self, sampling: Sampling, prompt_length: int, end_tokens: Sequence[int], generator: np.random.Generator
    ) -> None:
        self.sampling = sampling
        self.penalties = sampling.penalties(prompt_length, end_tokens)
        self.generator = generator

    def __call__(self, tokens: Sequence[int] | Ids, logits: Logits) -> int:
        """Choose the token after the tokens so far (T,), from logits (V,).

        Raises:
            CheckpointError: if the logits contain NaN or infinity.
            InputError: if the controls rule out every token.
        """
        scores = self.scores(tokens, logits)
        if self.sampling.greedy:
            return int(scores.argmax())
        found = self.sampling.candidates(scores)
        return int(found.ids[self.draw(found.p)])

    def scores(self, tokens: Sequence[int] | Ids, logits: Logits) -> Scores:
        """The logits (V,) after the penalties.

        Raises:
            CheckpointError: if the logits contain NaN or infinity.
            InputError: if the controls rule out every token.
        """
        check_finite(logits)
        if not self.penalties:
            return logits
        scores = apply(self.penalties, np.asarray(tokens, np.int64), logits)
        if not scores.max() > NEVER:
            raise InputError(ALL_RULED_OUT)
        return scores

    def draw(self, p: Scores) -> int:
        """Draw an index of a distribution (n,): the one that ``Generator.choice`` draws, which checks more and takes twice as long.

        Raises:
            ValueError: if it contains NaN.
        """
        cumulative = np.cumsum(p, dtype=np.float64)
        if not cumulative[-1] > 0:
            raise ValueError("the probabilities contain NaN")
        cumulative /= cumulative[-1]
        return int(cumulative.searchsorted(self.generator.random(), side="right"))


def check_finite(logits: Logits) -> None:
    """Refuse logits (V,) that no model with valid weights returns.

    Raises:
        CheckpointError: if they contain NaN or infinity.
    """
    best = logits.argmax()  # the index of a NaN, if there is one
    if not np.isfinite(logits[best]):
        raise CheckpointError(NOT_FINITE)


def _check(valid: bool | np.bool_, name: str, value: object, wanted: str) -> None:
    if not valid:
        raise ValueError(f"{name} is {value}; it must be {wanted}")


def _check_share(name: str, value: float | None) -> None:
    _check(value is None or 0 <= value <= 1, name, value, "between 0 and 1")
