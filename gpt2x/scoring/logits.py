"""Logits to log-probabilities of the tokens that follow."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters import CheckpointError

from ..generation.sampling import NOT_FINITE
from ..runtimes.base import Ids, Logits

ROWS = 4  # of logits at once: they stay in the processor's cache from one pass to the next
MOST_THREADS = 4  # that compute in numpy: more wait for memory


@dataclass(frozen=True)
class Alternatives:
    """The most likely tokens at n positions, best first.

    Attributes:
        ids: (n, k).
        log_probabilities: (n, k).
    """

    ids: Ids
    log_probabilities: NDArray[np.float64]


@dataclass(frozen=True)
class TokenScores:
    """What a model says of n tokens.

    Attributes:
        log_probabilities: (n,), natural logarithms.
        greedy: (n,), whether the token is the most likely one.
        alternatives: the most likely tokens in its place, if they were asked for.
    """

    log_probabilities: NDArray[np.float64]
    greedy: NDArray[np.bool_]
    alternatives: Alternatives | None = None


def score_tokens(logits: Logits, tokens: Ids, k: int = 0, threads: int | None = None) -> TokenScores:
    """Score tokens (n,) with the logits (n, V) of their positions.

    Args:
        k: how many alternatives are returned.
        threads: at most so many, and at most ``MOST_THREADS``; by default one for each core.

    Raises:
        CheckpointError: if the logits contain NaN or infinity.
    """
    best = np.empty(len(tokens), np.float32)
    normalizers = np.empty(len(tokens), np.float64)
    threads = min(threads or os.cpu_count() or 1, MOST_THREADS, len(tokens) // ROWS)
    if threads > 1:
        share = -(-len(tokens) // threads)
        with ThreadPoolExecutor(threads) as pool:
            starts = range(0, len(tokens), share)
            for _ in pool.map(lambda at: _normalize(logits[at : at + share], best[at:], normalizers[at:]), starts):
                pass
    else:  # a thread takes longer to start than a row takes
        _normalize(logits, best, normalizers)
    chosen = logits[np.arange(len(tokens)), tokens]
    log_probabilities = chosen.astype(np.float64) - normalizers
    if not np.isfinite(log_probabilities).all():
        raise CheckpointError(NOT_FINITE)
    alternatives = None
    if k:
        ids = top(logits, k)
        alternatives = Alternatives(ids, np.take_along_axis(logits, ids, 1) - normalizers[:, None])
    return TokenScores(log_probabilities, chosen >= best, alternatives)


def _normalize(logits: Logits, best: Logits, normalizers: NDArray[np.float64]) -> None:
    """Fill in the maximum and the log-sum-exp of each row: log(sum(exp(x))) = max + log(sum(exp(x - max)))."""
    scratch = np.empty((min(ROWS, len(logits)), logits.shape[1]), np.float32)
    for start in range(0, len(logits), ROWS):
        rows = logits[start : start + ROWS]
        part = scratch[: len(rows)]
        highest = rows.max(1)
        with np.errstate(over="ignore", invalid="ignore"):  # a difference of -inf is a probability of 0
            np.subtract(rows, highest[:, None], out=part)
        np.exp(part, out=part)
        best[start : start + len(rows)] = highest
        normalizers[start : start + len(rows)] = highest + np.log(part.sum(1, dtype=np.float32).astype(np.float64))


def top(logits: NDArray[Any], k: int) -> NDArray[Any]:
    """The k most likely tokens of each row, in order: (n, V) -> (n, k), or (n, V) if there are fewer."""
    k = min(k, logits.shape[1])
    some = np.argpartition(-logits, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(logits, some, 1), axis=1, kind="stable")
    return np.take_along_axis(some, order, 1)


def joined(parts: list[TokenScores]) -> TokenScores:
    """The scores of parts that follow one another, as one."""
    alternatives = [part.alternatives for part in parts if part.alternatives]
    both = None
    if alternatives:
        both = Alternatives(
            np.concatenate([one.ids for one in alternatives]),
            np.concatenate([one.log_probabilities for one in alternatives]),
        )
    return TokenScores(
        np.concatenate([part.log_probabilities for part in parts]),
        np.concatenate([part.greedy for part in parts]),
        both,
    )
