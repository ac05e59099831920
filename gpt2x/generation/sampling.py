"""Choosing the next token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from converters import CheckpointError

from ..runtimes.base import Logits

NOT_FINITE = "the logits contain NaN or infinity: the weights are damaged, or too large for their dtype"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature, then top-k, then top-p.

    Args:
        temperature: 0 for greedy decoding.
        top_k: keep the k likeliest tokens, and those tied with the last of them; None or 0 to disable.
        top_p: nucleus sampling: keep the fewest likeliest tokens whose probabilities reach p; None or 1 to disable.
        seed: makes the choice reproducible; each row of a batch has its own random stream.

    Raises:
        ValueError: if a value is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be a finite number of 0 or more")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (disabled) or more")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be between 0 and 1 (disabled)")

    def generators(self, n: int) -> list[np.random.Generator]:
        """One random stream for each row."""
        seeds = np.random.SeedSequence(self.seed).spawn(n)
        return [np.random.default_rng(seed) for seed in seeds]

    def choose(self, logits: Logits, generator: np.random.Generator) -> int:
        """Choose a token id from the logits (V,) of one row.

        Raises:
            CheckpointError: if the logits contain NaN or infinity.
        """
        best = int(logits.argmax())  # the index of a NaN, if there is one
        if not np.isfinite(logits[best]):
            raise CheckpointError(NOT_FINITE)
        if self.temperature == 0:
            return best
        p = self.probabilities(logits)
        return int(generator.choice(len(p), p=p))

    def probabilities(self, logits: Logits) -> NDArray[np.float64]:
        """The distribution to sample from, (V,)."""
        x: NDArray[np.float64] = logits.astype(np.float64)
        x = (x - x.max()) / max(self.temperature, 1e-300)
        if self.top_k and self.top_k < len(x):
            x[x < np.partition(x, -self.top_k)[-self.top_k]] = -np.inf
        p: NDArray[np.float64] = np.exp(x)
        p /= p.sum()
        if self.top_p is not None and self.top_p < 1:
            order = np.argsort(-p, kind="stable")
            before = np.cumsum(p[order]) - p[order]
            p[order[1:][before[1:] >= self.top_p]] = 0  # the likeliest token always stays
            p /= p.sum()
        return p
