"""How far two models' logits are apart, and how far they may be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..precisions import Bounds

Array = NDArray[Any]


BLOCK = 64  # positions that are compared at a time, so that memory stays small


FP32 = Bounds()

# One pass against chunks of the same model.
PREFILL = Bounds(1e-3, 2e-4, 5e-3, 5e-4, 1e-5, 1e-4)


# Logits of any precision with an int8 KV cache. The bounds of precisions are in ``gpt2x.precisions``.
CACHE8 = Bounds(1.2e-2, 2.5e-3, 2e-2, 2.5e-3, 4e-5, 3e-3)

TIMES = 3  # a bound, as a multiple of what was measured

STEPS = 64  # tokens that are fed one by one from the start

FEW = 16  # positions, over which a mean is not one yet


@dataclass
class Metrics:
    """How far apart two sets of logits are.

    ``max_rel_error`` and ``mean_rel_error`` are relative to the largest logit at the same position. KL divergence is of
    the yardstick's distribution from the other's, in nats. ``top1_gap`` is the widest gap between the yardstick's first
    and second token where the two disagree on the first; ``top5_gap`` likewise between its fifth and sixth.
    """

    positions: int
    max_logit: float
    max_abs_error: float
    mean_abs_error: float
    max_rel_error: float
    mean_rel_error: float
    kl_divergence: float
    max_kl_divergence: float
    top1_agreement: float
    top5_agreement: float
    top1_gap: float
    top5_gap: float
    perplexity: float | None = None  # the yardstick's
    perplexity_other: float | None = None
    error_by_position: list[float] = field(default_factory=list, repr=False)
    kl_by_position: list[float] = field(default_factory=list, repr=False)

    def limits(self, bounds: Bounds) -> dict[str, float]:
        """The largest value that each metric may have, in its own unit."""
        return {
            "max_abs_error": bounds.max_abs_error * self.max_logit,
            "mean_abs_error": bounds.mean_abs_error * self.max_logit,
            "max_rel_error": bounds.max_rel_error,
            "mean_rel_error": bounds.mean_rel_error,
            "kl_divergence": bounds.kl_divergence * (TIMES if self.positions < FEW else 1),
        }

    def failures(self, bounds: Bounds = FP32) -> list[str]:
        """What is out of bounds, by the name of the metric."""
        if not np.isfinite(self.max_logit):
            return ["the first one's logits are not all numbers: nothing can be compared"]
        if not np.isfinite(self.max_abs_error):
            return ["max_abs_error is not a number: the second one's logits are not all numbers"]
        limits = self.limits(bounds)
        values = {name: getattr(self, name) for name in limits}
        faults = [f"{n} is {values[n]:.2e} (bound {limits[n]:.2e})" for n in limits if not values[n] <= limits[n]]
        near = 2 * limits["max_abs_error"]
        for name, share, gap in (
            ("top1_agreement", self.top1_agreement, self.top1_gap),
            ("top5_agreement", self.top5_agreement, self.top5_gap),
        ):
            if not gap <= near:
                faults.append(f"{name} is {share:.2%}, with a gap of {gap:.2e} (bound {near:.2e})")
        if self.perplexity is not None and self.perplexity_other is not None:
            apart = abs(self.perplexity_other / self.perplexity - 1)
            if not apart <= bounds.perplexity:
                faults.append(f"perplexity is {self.perplexity_other:.6g}, not {self.perplexity:.6g}")
        return faults


def measure(expected: Array, found: Array, targets: Sequence[int] | None = None) -> Metrics:
    """Compare logits (N, V) with the yardstick's; ``targets`` are the tokens that came after the first of them."""
    parts = [_Part.of(expected[i : i + BLOCK], found[i : i + BLOCK]) for i in range(0, len(expected), BLOCK)]
    error, mean, largest, kl, gap1, gap5, same1, same5 = (
        np.concatenate([getattr(p, f) for p in parts]) for f in _Part.__dataclass_fields__
    )
    scale = np.where(largest > 0, largest, 1)
    with np.errstate(invalid="ignore"):
        relative, mean_relative = error / scale, mean / scale
    metrics = Metrics(
        positions=len(expected),
        max_logit=float(largest.max()),
        max_abs_error=float(error.max()),
        mean_abs_error=float(mean.mean()),
        max_rel_error=float(relative.max()),
        mean_rel_error=float(mean_relative.mean()),
        kl_divergence=float(kl.mean()),
        max_kl_divergence=float(kl.max()),
        top1_agreement=float(same1.mean()),
        top5_agreement=float(same5.mean()),
        top1_gap=float(gap1[~same1].max(initial=0)),
        top5_gap=float(gap5[~same5].max(initial=0)),
        error_by_position=_rounded(error),
        kl_by_position=_rounded(kl),
    )
    if targets is not None and len(targets):
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            metrics.perplexity, metrics.perplexity_other = (perplexity(x, targets) for x in (expected, found))
    return metrics


def _rounded(values: Array) -> list[float]:
    return [float(f"{value:.3g}") for value in values]


@dataclass
class _Part:
    """Some positions' figures, an array of one a position each."""

    error: Array
    mean: Array
    largest: Array
    kl: Array
    gap1: Array
    gap5: Array
    same1: Array
    same5: Array

    @classmethod
    def of(cls, expected: Array, found: Array) -> _Part:
        x, y = expected.astype(np.float64), found.astype(np.float64)  # (n, V)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            apart = np.abs(x - y)
            p, q = log_softmax(x), log_softmax(y)
            kl = np.maximum((np.exp(p) * (p - q)).sum(1), 0)  # rounding makes tiny ones negative
        best, other = top(x, 6), top(y, 6)  # (n, 6)
        logits = np.take_along_axis(x, best, 1)
        gap1, gap5 = (_gap(logits, k) for k in (1, 5))
        same1 = best[:, 0] == other[:, 0]
        same5 = (np.sort(best[:, :5], 1) == np.sort(other[:, :5], 1)).all(1)
        return cls(apart.max(1), apart.mean(1), np.abs(x).max(1), kl, gap1, gap5, same1, same5)


def top(logits: Array, k: int) -> Array:
    """The k likeliest tokens of each row, the likeliest first: (n, V) -> (n, k), or (n, V) where there are fewer."""
    k = min(k, logits.shape[1])
    some = np.argpartition(-logits, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(logits, some, 1), axis=1, kind="stable")
    return np.take_along_axis(some, order, 1)


def _gap(logits: Array, k: int) -> Array:
    """How far the k-th likeliest is from the next: sorted logits (n, m) -> (n,)."""
    return logits[:, k - 1] - logits[:, k] if logits.shape[1] > k else np.full(len(logits), np.inf)


def log_softmax(x: Array) -> Array:
    """Logits (n, V) as logarithms of probabilities."""
    shifted = x - x.max(1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def perplexity(logits: Array, targets: Sequence[int]) -> float:
    """How surprised logits (N, V) are by the N or fewer tokens that came next."""
    lost = [
        log_softmax(logits[i : i + BLOCK].astype(np.float64))[np.arange(len(t)), list(t)]
        for i in range(0, len(targets), BLOCK)
        if (t := targets[i : i + BLOCK])
    ]
    return float(np.exp(-np.concatenate(lost).mean()))


def widened(bounds: Bounds, metrics: Metrics, times: float) -> Bounds:
    """Bounds of at least ``times`` the error that exact arithmetic has on a model.

    Args:
        metrics: of exact arithmetic against the reference.
    """
    scale = metrics.max_logit or 1.0
    ratio = (metrics.perplexity_other or 1.0) / (metrics.perplexity or 1.0)
    # The standard deviation of a mean of so few positions: less than that cannot be told from chance.
    spread = math.sqrt(2 * metrics.kl_divergence / STEPS)
    measured = Bounds(
        max_abs_error=metrics.max_abs_error / scale,
        mean_abs_error=metrics.mean_abs_error / scale,
        max_rel_error=metrics.max_rel_error,
        mean_rel_error=metrics.mean_rel_error,
        kl_divergence=metrics.kl_divergence,
        perplexity=max(abs(ratio - 1), spread),
    )
    pairs = zip(astuple(bounds), astuple(measured), strict=True)
    return Bounds(*(max(bound, times * error) for bound, error in pairs))


def loosest(bounds: Iterable[Bounds]) -> Bounds:
    """The bounds that allow the largest errors."""
    return max(bounds, key=lambda one: one.max_abs_error)
