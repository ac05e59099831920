"""Logits processors: functions of (tokens so far, logits) that return changed logits. numpy only.

Names, semantics and order are those of transformers' ``LogitsProcessor`` classes (transformers 5, ``generation/logits_process.py``), but for
one row: tokens (T,) and logits (V,), so padding never counts. ``presence_penalty`` and ``frequency_penalty`` are those of OpenAI's API.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtimes.base import Ids

Scores = NDArray[Any]  # logits or log-probabilities, float32 or float64
Processor = Callable[[Ids, Scores], Scores]
NEVER = -np.inf
ROUNDING = 1e-9
"""More than what a sum of the probabilities of a vocabulary can differ from its exact value, in float64."""


@dataclass(frozen=True)
class SequenceBias:
    """Add a bias to the last token of a sequence, where the tokens so far end with the tokens before it."""

    biases: Mapping[tuple[int, ...], float]

    def __call__(self, tokens: Ids, logits: Scores) -> Scores:
        bias = np.zeros_like(logits)
        for sequence, value in self.biases.items():
            if _ends_with(tokens, sequence[:-1]):
                bias[sequence[-1]] += value
        return logits + bias


@dataclass(frozen=True)
class RepetitionPenalty:
    """Make each token of the text so far less likely: positive logits are divided by the penalty, negative ones multiplied."""

    penalty: float

    def __call__(self, tokens: Ids, logits: Scores) -> Scores:
        changed = logits.copy()
        # A token that occurs several times is changed once: each time to the same value.
        scores = logits[tokens]
        penalty = np.float32(self.penalty)
        changed[tokens] = np.where(scores < 0, scores * penalty, scores / penalty)
        return changed


@dataclass(frozen=True)
class CountPenalty:
    """Subtract ``presence`` from each token that was generated, and ``frequency`` for each time. The prompt does not count."""

    presence: float
    frequency: float
    prompt_length: int

    def __call__(self, tokens: Ids, logits: Scores) -> Scores:
        changed = logits.copy()
        seen, counts = np.unique(tokens[self.prompt_length :], return_counts=True)
        changed[seen] -= (self.presence + self.frequency * counts).astype(np.float32)
        return changed


@dataclass(frozen=True)
class NoRepeatNGram:
    """Rule out each token that would complete an n-gram that the text already holds."""

    size: int

    def __call__(self, tokens: Ids, logits: Scores) -> Scores:
        if len(tokens) < self.size:
            return logits
        windows = np.lib.stride_tricks.sliding_window_view(tokens, self.size)  # (T - size + 1, size)
        current = tokens[len(tokens) - self.size + 1 :]
        begins_so = (windows[:, :-1] == current).all(axis=1)
        return ruled_out(logits, windows[begins_so, -1])


@dataclass(frozen=True)
class RuleOut:
    """Rule out some tokens."""

    tokens: Sequence[int]

    def __call__(self, tokens: Ids, logits: Scores) -> Scores:
        return ruled_out(logits, self.tokens)


@dataclass(frozen=True)
class MinLength:
    """Rule out the tokens that end a text, until it has so many tokens, the prompt's included."""

    count: int
    end_tokens: Sequence[int]

    def __call__(self, tokens: Ids, logits: Scores) -> Scores:
        if len(tokens) >= self.count:
            return logits
        return ruled_out(logits, self.end_tokens)


# --------------------------------------------------------------------- what narrows a distribution, before sampling


@dataclass(frozen=True)
class Temperature:
    """Divide the logits, after their maximum was subtracted."""

    temperature: float

    def __call__(self, tokens: Ids, logits: Scores) -> Scores:
        # A tiny temperature would overflow without the maximum at 0.
        shifted: Scores = logits - logits.max()
        if self.temperature == 1:
            return shifted
        divided: Scores = shifted / max(self.temperature, 1e-300)
        return divided


@dataclass(frozen=True)
class TopK:
    """Keep the k likeliest tokens, and those tied with the last of them."""

    k: int

    def __call__(self, tokens: Ids, logits: Scores) -> Scores:
        if self.k >= len(logits):
            return logits
        least = np.partition(logits, -self.k)[-self.k]
        return np.where(logits < least, NEVER, logits)


@dataclass(frozen=True)
class TopP:
    """Keep the fewest likeliest tokens whose probabilities reach p."""

    p: float

    def __call__(self, tokens: Ids, logits: Scores) -> Scores:
        kept = nucleus(softmax(logits), self.p)
        narrowed = np.full_like(logits, NEVER)
        narrowed[kept] = logits[kept]
        return narrowed


@dataclass(frozen=True)
class MinP:
    """Keep the tokens whose probability is at least a share of the likeliest token's."""

    share: float

    def __call__(self, tokens: Ids, logits: Scores) -> Scores:
        p = softmax(logits)
        return np.where(p < self.share * p.max(), NEVER, logits)


@dataclass(frozen=True)
class TypicalP:
    """Keep the tokens whose surprise is nearest to the entropy, until their probabilities reach a mass.

    Locally typical sampling, https://arxiv.org/abs/2202.00666.
    """

    mass: float

    def __call__(self, tokens: Ids, logits: Scores) -> Scores:
        p = softmax(logits)
        surprise = -log_softmax(logits)
        possible = p > 0
        entropy = np.sum(p[possible] * surprise[possible])
        distance = np.abs(surprise - entropy)
        order = np.argsort(distance, kind="stable")
        reached = int(np.sum(np.cumsum(p[order]) < self.mass))
        last = order[min(reached, len(order) - 1)]
        keep = distance <= distance[last]
        keep[order[0]] = True
        return np.where(keep, logits, NEVER)


# ----------------------------------------------------------------------------------------------------------- helpers


def apply(processors: Sequence[Processor], tokens: Ids, logits: Scores) -> Scores:
    """Logits (V,) after some processors, for the tokens so far (T,)."""
    for processor in processors:
        logits = processor(tokens, logits)
    return logits


def ruled_out(logits: Scores, tokens: Sequence[int] | NDArray[np.int64]) -> Scores:
    """The logits with minus infinity for some tokens."""
    changed = logits.copy()
    changed[np.asarray(tokens, np.int64)] = NEVER
    return changed


def nucleus(p: Scores, mass: float) -> Ids:
    """The fewest likeliest tokens that reach a mass, at least one. Of tied tokens, those with the lowest ids.

    Args:
        p: probabilities (V,), float64.
        mass: from 0 to 1.

    Returns:
        Their ids, in no particular order.
    """
    # Of what may be left out, tokens below this have less than half together, so only the others need sorting.
    least = (1 - mass) / (2 * len(p))
    likely = np.flatnonzero(p >= least)
    p_likely = p[likely]
    values = np.sort(p_likely)[::-1]
    # With a mass of almost 1, the sum may not reach it, but for rounding.
    if not values.sum() > mass + ROUNDING:
        return sorted_nucleus(p, mass)
    before = np.cumsum(values) - values
    count = max(1, int((before < mass).sum()))
    last = values[count - 1]
    above = likely[p_likely > last]
    tied = likely[p_likely == last]
    return np.concatenate((above, tied[: count - len(above)]))


def sorted_nucleus(p: Scores, mass: float) -> Ids:
    """The same as ``nucleus``, but every token is sorted, which takes ten times as long."""
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    kept = before < mass
    kept[0] = True
    return order[kept]


def softmax(logits: Scores) -> Scores:
    """Probabilities (..., V) of logits (..., V), in their dtype."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    normalized: Scores = p / p.sum(-1, keepdims=True)
    return normalized


def log_softmax(logits: Scores) -> Scores:
    """Log-probabilities (..., V) of logits (..., V), in their dtype."""
    shifted = logits - logits.max(-1, keepdims=True)
    result: Scores = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _ends_with(tokens: Ids, sequence: Sequence[int]) -> bool:
    n = len(sequence)
    return n <= len(tokens) and bool((tokens[len(tokens) - n :] == sequence).all())
