"""Two models on the same tokens, in every way that a model is used: one pass, step by step, in chunks, padded, batched.

One of the two, the yardstick, only ever runs a plain row in one pass. The other must give the same logits whichever way
it is run. numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters import CheckpointError

from .generate import Decoder, Generation, Sampling
from .subjects import Subject

Array = NDArray[Any]

GREEDY_TOKENS = 200
STEPS = 64  # tokens that are fed one by one from the start
ROWS = 5  # of a batch
BLOCK = 64  # positions that are compared at a time, so that memory stays small


@dataclass(frozen=True)
class Check:
    """One question and its answer."""

    name: str
    passed: bool | None  # None: not asked, for the reason in ``result``
    result: str
    details: Mapping[str, Any] = field(default_factory=dict)


# ----------------------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class Bounds:
    """How far logits may be apart. Errors are in shares of the largest logit.

    A disagreement on the likeliest token, or on the five likeliest, counts where the yardstick's gap exceeds twice
    ``max_abs_error``: under that it is a near tie, which rounding may decide either way.
    """

    max_abs_error: float = 1e-5  # of the largest logit of all
    mean_abs_error: float = 2e-6
    max_rel_error: float = 5e-5  # of the largest logit at the same position
    mean_rel_error: float = 5e-6
    kl_divergence: float = 1e-6  # nats, mean over positions
    perplexity: float = 1e-5  # relative difference

    def or_wider(self, metrics: Metrics, times: float) -> Bounds:
        """The wider of these bounds and of so many times what exact arithmetic measures on a model."""
        scale = metrics.max_logit or 1.0
        apart = abs((metrics.perplexity_other or 1.0) / (metrics.perplexity or 1.0) - 1)
        spread = math.sqrt(2 * metrics.kl_divergence / STEPS)  # of a mean over the fewest tokens that it is taken of
        found = (
            metrics.max_abs_error / scale,
            metrics.mean_abs_error / scale,
            metrics.max_rel_error,
            metrics.mean_rel_error,
            metrics.kl_divergence,
            max(apart, spread),
        )
        return Bounds(*(max(own, times * value) for own, value in zip(astuple(self), found, strict=True)))


FP32 = Bounds()

# One pass against chunks of the same model.
PREFILL = Bounds(1e-3, 2e-4, 5e-3, 5e-4, 1e-5, 1e-4)

# Kind of numbers -> how far its logits may be from the source's, the narrowest first: about three times what was measured
# on the model that ships with gpt2x (``docs/design.md`` lists it). fp16 was measured where it is computed in half floats, on
# an emulated Neoverse N1; most x86 processors compute it in float32, with a hundredth of the KL. What each precision stores
# is also compared with the source, block by block (``gpt2x.stored``).
CACHE8 = "8-bit cache"
BOUNDS = {
    "fp32": FP32,
    "fp16": Bounds(8e-3, 7e-4, 1.7e-2, 1.5e-3, 3e-5, 1.4e-3),
    CACHE8: Bounds(1.2e-2, 2.5e-3, 2e-2, 2.5e-3, 4e-5, 3e-3),
    "int8": Bounds(3e-2, 7e-3, 5.5e-2, 7e-3, 3e-4, 4e-3),
    "w8a8": Bounds(5e-2, 8e-3, 8e-2, 8e-3, 6e-4, 6e-3),
    "int4": Bounds(3e-1, 5e-2, 4.5e-1, 5e-2, 2.5e-2, 1e-1),
}
TIMES = 3  # a bound, as a multiple of what was measured
# The same where exact arithmetic was measured: an ARM processor sums halves in halves, which loses three times as much.
TIMES_EXACT = {"fp16": 9}
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


# --------------------------------------------------------------------------------------------------------- scenarios


class Text:
    """Tokens to compare on, and the yardstick's logits after each of them."""

    def __init__(self, yardstick: Subject, ids: Sequence[int]) -> None:
        self.yardstick, self.ids = yardstick, list(ids)
        self.logits = one_pass(yardstick, self.ids)  # (N, V)

    def row(self, start: int, length: int) -> tuple[list[int], Array]:
        """A prompt out of the middle of the text, and its logits."""
        ids = self.ids[start : start + length]
        return ids, self.logits[:length] if start == 0 else one_pass(self.yardstick, ids)


@dataclass
class Found:
    """What a scenario gave: the yardstick's logits (N, V), the subject's, and the tokens that came next, if known."""

    expected: Array
    found: Array
    targets: Sequence[int] | None = None


def one_pass(subject: Subject, ids: Sequence[int]) -> Array:
    """The logits after each token of one row, (T, V); fed one by one where the model gives the last only."""
    if getattr(subject, "last_only", False):
        return np.concatenate(list(feed(subject, ids, [1] * len(ids))))
    logits, _ = subject.run(np.array([ids]), None, np.arange(len(ids))[None], None)
    return np.asarray(logits[0])


def feed(subject: Subject, ids: Sequence[int], sizes: Sequence[int]) -> Iterator[Array]:
    """One row in pieces of these sizes: the logits (t or 1, V) after each piece."""
    cache, start = None, 0
    for size in sizes:
        end = start + size
        logits, cache = subject.run(np.array([ids[start:end]]), None, np.arange(start, end)[None], cache)
        yield logits[0]
        start = end


def _full_context(subject: Subject, text: Text) -> Found:
    if getattr(subject, "last_only", False):
        logits, _ = subject.run(np.array([text.ids]), None, np.arange(len(text.ids))[None], None)
        return Found(text.logits[-1:], logits[0])
    return Found(text.logits, one_pass(subject, text.ids), text.ids[1:])


def _one_token(subject: Subject, text: Text) -> Found:
    return Found(text.logits[:1], one_pass(subject, text.ids[:1]))


def _token_by_token(subject: Subject, text: Text) -> Found:
    n = min(STEPS, len(text.ids))
    return _in_pieces(subject, text, [1] * n)


def _chunks(subject: Subject, text: Text) -> Found:
    return _in_pieces(subject, text, chunk_sizes(len(text.ids)))


def chunk_sizes(n: int) -> list[int]:
    """How a full context of n tokens is cut: a few small pieces, two large ones, and one by one up to the last slot."""
    sizes: list[int] = []
    for small in (3, 1, 7, 2, 20):
        sizes += [small] if sum(sizes) + small <= n // 2 else []
    rest = n - sum(sizes)
    ones = min(STEPS // 4, rest // 2)
    second = (rest - ones) // 3
    return [*sizes, rest - ones - second, *([second] if second else []), *[1] * ones]


def _in_pieces(subject: Subject, text: Text, sizes: Sequence[int]) -> Found:
    """The beginning of the text in pieces, against the yardstick's one pass."""
    n, last = sum(sizes), getattr(subject, "last_only", False)
    expected = text.logits[np.cumsum(sizes) - 1] if last else text.logits[:n]
    found, filled = np.empty_like(expected), 0
    for logits in feed(subject, text.ids, sizes):
        found[filled : filled + len(logits)] = logits
        filled += len(logits)
    return Found(expected, found, None if last else text.ids[1 : n + 1])


def _batch(subject: Subject, text: Text) -> Found:
    n = max(1, min(16, len(text.ids) // 3))
    rows = [text.row(i * n % (len(text.ids) - n + 1), n) for i in range(ROWS)]
    logits, _ = subject.run(np.array([ids for ids, _ in rows]), None, np.tile(np.arange(n), (ROWS, 1)), None)
    return Found(np.concatenate([e[-logits.shape[1] :] for _, e in rows]), np.concatenate(list(logits)))


def _left_padding(subject: Subject, text: Text) -> Found:
    return _padded(subject, text, left=True)


def _right_padding(subject: Subject, text: Text) -> Found:
    return _padded(subject, text, left=False)


def _padded(subject: Subject, text: Text, left: bool) -> Found:
    """Three prompts of unequal lengths in one batch, then some more tokens each: the mask has holes then."""
    longest = max(1, min(STEPS, len(text.ids)) * 2 // 3)
    more = min(8, len(text.ids) - longest)
    lengths = [longest, 1, max(1, longest // 2)]
    rows = [text.row(0, length + more) for length in lengths]
    ids, mask = np.zeros((3, longest), np.int64), np.zeros((3, longest), np.int64)
    for i, length in enumerate(lengths):
        place = slice(longest - length, longest) if left else slice(0, length)
        ids[i, place], mask[i, place] = rows[i][0][:length], 1
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    logits, cache = subject.run(ids, mask, positions, None)
    last_only = logits.shape[1] == 1 < longest
    pairs = [(rows[i][1][n - 1 : n], logits[i]) if last_only else (rows[i][1][:n], logits[i][mask[i] == 1])
             for i, n in enumerate(lengths)]  # fmt: skip
    for step in range(more):
        ids = np.array([[row[length + step]] for (row, _), length in zip(rows, lengths, strict=True)])
        mask = np.concatenate((mask, np.ones_like(ids)), 1)
        logits, cache = subject.run(ids, mask, np.array(lengths)[:, None] + step, cache)
        pairs += [(rows[i][1][n + step][None], logits[i]) for i, n in enumerate(lengths)]
    return Found(np.concatenate([e for e, _ in pairs]), np.concatenate([f for _, f in pairs]))


Scenario = Callable[[Subject, Text], Found]
SCENARIOS: dict[str, Scenario] = {
    "full context": _full_context,
    "one token": _one_token,
    "token by token": _token_by_token,
    "chunks": _chunks,
    "batch rows": _batch,
    "left padding": _left_padding,
    "right padding": _right_padding,
}


def compare_runs(yardstick: Subject, subject: Subject, ids: Sequence[int], bounds: Bounds = FP32) -> list[Check]:
    """Every scenario, then greedy words. ``ids`` are at most a full context."""
    text = Text(yardstick, ids)
    checks = [compare_logits(name, subject, text, bounds) for name in SCENARIOS]
    if bounds != FP32:
        checks.append(compare_prefill(subject, text.ids))
    plain = getattr(subject, "unoptimized", None)
    if plain is not None and not subject.needs_optimizing:  # type: ignore[attr-defined]
        checks.append(compare_logits("full context", plain(), text, bounds, called="ORT_DISABLE_ALL"))
    seen = [c.details for c in checks if c.details]
    allowed = bounds.max_abs_error * max((d["max_logit"] for d in seen), default=0.0)
    error = min(allowed, max((d["max_abs_error"] for d in seen), default=0.0))
    return [*checks, compare_words(yardstick, subject, text.ids, error)]


def compare_prefill(subject: Subject, ids: Sequence[int]) -> Check:
    """A prompt in chunks, each of a quarter, against the same model's one pass: what is lost in rounding must not hang on
    how a prompt is cut."""
    size = -(-len(ids) // 4)
    pieces = [min(size, len(ids) - start) for start in range(0, len(ids), size)]
    found = list(feed(subject, ids, pieces))
    if getattr(subject, "last_only", False):
        whole, _ = subject.run(np.array([ids]), None, np.arange(len(ids))[None], None)
        metrics = measure(whole[0], found[-1])
    else:
        metrics = measure(one_pass(subject, ids), np.concatenate(found))
    return verdict("chunked prefill", metrics, PREFILL)


def compare_logits(
    scenario: str, subject: Subject, text: Text, bounds: Bounds = FP32, *, called: str | None = None
) -> Check:
    """One scenario's logits against the yardstick's."""
    name = called or scenario
    if getattr(subject, "last_only", False) and scenario == "right padding":
        return Check(name, None, "not asked: this model gives the logits of the last slot only")
    seen = SCENARIOS[scenario](subject, text)
    metrics = measure(seen.expected, seen.found, seen.targets)
    return verdict(name, metrics, bounds)


def verdict(name: str, metrics: Metrics, bounds: Bounds = FP32) -> Check:
    """A check out of metrics: what failed, or how close it was."""
    faults = metrics.failures(bounds)
    share = metrics.max_abs_error / metrics.max_logit if metrics.max_logit else 0.0
    close = (
        "bit-identical"
        if metrics.max_abs_error == 0
        else f"error {share:.1e} of the largest logit, KL {metrics.kl_divergence:.1e}"
    )
    places = f"{metrics.positions} position{'s' if metrics.positions > 1 else ''}"
    result = "; ".join(faults) if faults else f"{close}, {places}"
    return Check(
        name,
        not faults,
        result,
        {**asdict(metrics), "limits": metrics.limits(bounds), "failures": faults, "inexact": bounds != FP32},
    )


# ------------------------------------------------------------------------------------------------------------- words


def compare_words(yardstick: Decoder, subject: Decoder, prompt: Sequence[int], error: float) -> Check:
    """Greedy tokens, as long as the context allows, up to 200.

    A divergence counts where the yardstick's gap between first and second exceeds twice ``error``, the logits' largest
    (and no more than its bound); under that it is a near tie, which rounding may decide either way.
    """
    prompt = list(prompt[: max(1, min(32, yardstick.n_ctx // 2))])
    n = min(GREEDY_TOKENS, yardstick.n_ctx - len(prompt))
    words = []
    for which, decoder in (("first", yardstick), ("second", subject)):
        try:
            words.append(greedy(decoder, prompt, n))
        except CheckpointError:
            result = f"none: the {which} one's logits are not all numbers"
            return Check("greedy words", False, result, {"tokens": n, "first_difference": None})
    theirs, ours = words
    first = next((i for i, (x, y) in enumerate(zip(ours, theirs, strict=True)) if x != y), None)
    if first is None:
        return Check("greedy words", True, f"{n} of {n} tokens the same", {"tokens": n, "first_difference": None})
    gap = top_gap(yardstick, [*prompt, *theirs[:first]])
    tie = gap <= 2 * error
    result = f"differ from token {first} of {n} (gap {gap:.2e}{', a near tie' if tie else ''})"
    return Check("greedy words", tie, result, {"tokens": n, "first_difference": first, "gap": gap, "near_tie": tie})


def greedy(decoder: Decoder, prompt: list[int], n: int) -> list[int]:
    """Greedy tokens after a prompt; never stops at an end of text."""
    generation = Generation(decoder, [prompt], n, Sampling(temperature=0))
    return [token for (token,) in generation if token is not None]


def top_gap(decoder: Decoder, ids: list[int]) -> float:
    """How far the likeliest next token's logit is from the second's."""
    logits, _ = decoder.step(np.array([ids]), None, np.arange(len(ids))[None], None)
    second, first = np.sort(logits[0])[-2:]
    return float(first - second)
