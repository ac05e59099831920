"""Two models on the same tokens, in every way that a model is used: one pass, step by step, in chunks, padded, batched.

One of the two, the yardstick, only ever runs a plain row in one pass. The other must give the same logits whichever way
it is run. numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from converters import CheckpointError

from ..generation.loop import Generation
from ..generation.sampling import Sampling
from ..precisions import Bounds
from ..runtimes.base import Decoder, Subject
from .checks import Check
from .metrics import FP32, PREFILL, STEPS, Array, Metrics, measure

GREEDY_TOKENS = 200
ROWS = 5  # of a batch


# ----------------------------------------------------------------------------------------------------------- metrics


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
