"""How much the logits of two models differ, and how much they may differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..precisions import FP32 as FP32_PRECISION
from ..precisions import Bounds
from ..scoring.logits import top

Array = NDArray[Any]

FP32 = FP32_PRECISION.bounds
# A model against itself: one pass against chunks.
PREFILL = Bounds(1e-3, 2e-4, 5e-3, 5e-4, 1e-5, 1e-4)
# Any precision with an int8 KV cache. The bounds of precisions are in ``gpt2x.precisions``.
CACHE8 = Bounds(1.2e-2, 2.5e-3, 2e-2, 2.5e-3, 4e-5, 3e-3)

BLOCK = 64  # positions that are compared at a time, so that memory stays small
STEPS = 64  # tokens of the token-by-token comparison
FEW = 16  # a mean over fewer positions varies much,
FEW_FACTOR = 3  # so its bound is this many times larger


@dataclass
class Metrics:
    """How much two sets of logits differ.

    ``max_rel_error`` and ``mean_rel_error`` are relative to the largest logit at the same position. The KL divergence is of
    the other distribution from the reference's, in nats. ``top1_gap`` is the largest gap between the reference's first and
    second logit where top-1 disagrees; ``top5_gap`` likewise between its fifth and sixth.
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
    perplexity: float | None = None  # the reference's
    perplexity_other: float | None = None
    error_by_position: list[float] = field(default_factory=list, repr=False)
    kl_by_position: list[float] = field(default_factory=list, repr=False)

    def limits(self, bounds: Bounds) -> dict[str, float]:
        """The largest value of each metric that passes, in the metric's unit."""
        kl_factor = FEW_FACTOR if self.positions < FEW else 1
        return {
            "max_abs_error": bounds.max_abs_error * self.max_logit,
            "mean_abs_error": bounds.mean_abs_error * self.max_logit,
            "max_rel_error": bounds.max_rel_error,
            "mean_rel_error": bounds.mean_rel_error,
            "kl_divergence": bounds.kl_divergence * kl_factor,
        }

    def failures(self, bounds: Bounds = FP32) -> list[str]:
        """A message for each metric that is out of bounds."""
        if not np.isfinite(self.max_logit):
            return ["the first model's logits contain NaN or infinity: nothing can be compared"]
        if not np.isfinite(self.max_abs_error):
            return ["max_abs_error is not finite: the second model's logits contain NaN or infinity"]
        limits = self.limits(bounds)
        faults = []
        for name, limit in limits.items():
            value = getattr(self, name)
            # Not ">", which is false for NaN.
            if not value <= limit:
                faults.append(f"{name} is {value:.2e} (bound {limit:.2e})")
        near_tie = 2 * limits["max_abs_error"]
        for name, agreement, gap in (
            ("top1_agreement", self.top1_agreement, self.top1_gap),
            ("top5_agreement", self.top5_agreement, self.top5_gap),
        ):
            if not gap <= near_tie:
                faults.append(f"{name} is {agreement:.2%}, with a gap of {gap:.2e} (bound {near_tie:.2e})")
        if self.perplexity is not None and self.perplexity_other is not None:
            difference = abs(self.perplexity_other / self.perplexity - 1)
            if not difference <= bounds.perplexity:
                faults.append(f"perplexity is {self.perplexity_other:.6g}, not {self.perplexity:.6g}")
        return faults


def measure(expected: Array, found: Array, targets: Sequence[int] | None = None) -> Metrics:
    """Compare logits (N, V) with the reference's (N, V).

    Args:
        targets: the next tokens of the first positions, for the perplexity.
    """
    parts = [_Part.of(expected[i : i + BLOCK], found[i : i + BLOCK]) for i in range(0, len(expected), BLOCK)]
    whole = _Part.joined(parts)
    scale = np.where(whole.largest > 0, whole.largest, 1)
    with np.errstate(invalid="ignore"):
        relative, mean_relative = whole.error / scale, whole.mean / scale
    metrics = Metrics(
        positions=len(expected),
        max_logit=float(whole.largest.max()),
        max_abs_error=float(whole.error.max()),
        mean_abs_error=float(whole.mean.mean()),
        max_rel_error=float(relative.max()),
        mean_rel_error=float(mean_relative.mean()),
        kl_divergence=float(whole.kl.mean()),
        max_kl_divergence=float(whole.kl.max()),
        top1_agreement=float(whole.same1.mean()),
        top5_agreement=float(whole.same5.mean()),
        top1_gap=float(whole.gap1[~whole.same1].max(initial=0)),
        top5_gap=float(whole.gap5[~whole.same5].max(initial=0)),
        error_by_position=_rounded(whole.error),
        kl_by_position=_rounded(whole.kl),
    )
    if targets is not None and len(targets):
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            metrics.perplexity = perplexity(expected, targets)
            metrics.perplexity_other = perplexity(found, targets)
    return metrics


def _rounded(values: Array) -> list[float]:
    return [float(f"{value:.3g}") for value in values]


@dataclass
class _Part:
    """The metrics of some positions: arrays of one value for each."""

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
            difference = np.abs(x - y)
            p, q = log_softmax(x), log_softmax(y)
            kl = np.maximum((np.exp(p) * (p - q)).sum(1), 0)  # rounding can make tiny ones negative
        best, other = top(x, 6), top(y, 6)  # (n, 6)
        logits = np.take_along_axis(x, best, 1)
        gap1, gap5 = (_gap(logits, k) for k in (1, 5))
        same1 = best[:, 0] == other[:, 0]
        same5 = (np.sort(best[:, :5], 1) == np.sort(other[:, :5], 1)).all(1)
        return cls(difference.max(1), difference.mean(1), np.abs(x).max(1), kl, gap1, gap5, same1, same5)

    @classmethod
    def joined(cls, parts: Sequence[_Part]) -> _Part:
        """The metrics of all positions."""
        names = cls.__dataclass_fields__
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def _gap(logits: Array, k: int) -> Array:
    """The difference between the k-th logit and the next: sorted logits (n, m) -> (n,). Infinity if there is no next."""
    if logits.shape[1] <= k:
        return np.full(len(logits), np.inf)
    gap: Array = logits[:, k - 1] - logits[:, k]
    return gap


def log_softmax(x: Array) -> Array:
    """Logits (n, V) as log probabilities."""
    shifted = x - x.max(1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def perplexity(logits: Array, targets: Sequence[int]) -> float:
    """Perplexity of logits (N, V) on the N or fewer tokens that come next."""
    losses = []
    for start in range(0, len(targets), BLOCK):
        block = list(targets[start : start + BLOCK])
        log_probabilities = log_softmax(logits[start : start + BLOCK].astype(np.float64))
        losses.append(log_probabilities[np.arange(len(block)), block])
    return float(np.exp(-np.concatenate(losses).mean()))


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
