"""Two models on the same tokens, in every way a model is used: one pass, token by token, in chunks, padded, batched.

One of the two, the reference, only runs a single row in one pass. The other, the model under test, must return the same
logits in every scenario. numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from converters import CheckpointError

from ..generation.loop import Generation
from ..generation.sampling import Sampling
from ..precisions import Bounds
from ..runtimes.base import Decoder
from .checks import Check
from .metrics import FP32, PREFILL, STEPS, Array, Metrics, measure

GREEDY = "greedy tokens"
GREEDY_TOKENS = 200
GREEDY_PROMPT = 32  # tokens
ROWS = 5  # of a batch


# --------------------------------------------------------------------------------------------------- running a model


def one_pass(model: Decoder, ids: Sequence[int]) -> Array:
    """The logits after each token of one row, (T, V). A model that returns only the last runs token by token."""
    if model.last_only:
        return np.concatenate(list(feed(model, ids, [1] * len(ids))))
    return _run_row(model, ids)


def feed(model: Decoder, ids: Sequence[int], sizes: Sequence[int]) -> Iterator[Array]:
    """Run one row in pieces of these sizes. Yields the logits (t or 1, V) after each piece."""
    cache: Any = None
    start = 0
    for size in sizes:
        end = start + size
        logits, cache = model.run(np.array([ids[start:end]]), None, np.arange(start, end)[None], cache)
        yield logits[0]
        start = end


def _run_row(model: Decoder, ids: Sequence[int]) -> Array:
    """Run one row in one pass. Returns the logits (T or 1, V)."""
    logits, _ = model.run(np.array([ids]), None, np.arange(len(ids))[None], None)
    return np.asarray(logits[0])


@dataclass
class Row:
    """A prompt, and the reference's logits (N, V) after each of its N tokens."""

    ids: list[int]
    logits: Array


class Text:
    """The tokens to compare on, and the reference's logits after each of them."""

    def __init__(self, reference: Decoder, ids: Sequence[int]) -> None:
        self.reference = reference
        self.ids = list(ids)
        self.logits = one_pass(reference, self.ids)  # (N, V)

    def row(self, start: int, length: int) -> Row:
        """A prompt out of the text."""
        ids = self.ids[start : start + length]
        if start == 0:
            return Row(ids, self.logits[:length])
        return Row(ids, one_pass(self.reference, ids))


# --------------------------------------------------------------------------------------------------------- scenarios


@dataclass
class Found:
    """The result of a scenario: logits (N, V) of the reference and of the model, and the next tokens, if known."""

    expected: Array
    found: Array
    targets: Sequence[int] | None = None


@dataclass
class _Pairs:
    """Logits of the reference and of the model, collected in pieces."""

    expected: list[Array] = field(default_factory=list)
    found: list[Array] = field(default_factory=list)

    def add(self, expected: Array, found: Array) -> None:
        self.expected.append(expected)
        self.found.append(found)

    def joined(self) -> Found:
        return Found(np.concatenate(self.expected), np.concatenate(self.found))


def _full_context(model: Decoder, text: Text) -> Found:
    found = _run_row(model, text.ids)
    if model.last_only:
        return Found(text.logits[-1:], found)
    return Found(text.logits, found, text.ids[1:])


def _one_token(model: Decoder, text: Text) -> Found:
    return Found(text.logits[:1], _run_row(model, text.ids[:1]))


def _token_by_token(model: Decoder, text: Text) -> Found:
    n = min(STEPS, len(text.ids))
    return _in_pieces(model, text, [1] * n)


def _chunks(model: Decoder, text: Text) -> Found:
    return _in_pieces(model, text, chunk_sizes(len(text.ids)))


def chunk_sizes(n: int) -> list[int]:
    """How a full context of n tokens is split: a few small pieces, two large ones, then one by one up to the last slot."""
    sizes: list[int] = []
    for small in (3, 1, 7, 2, 20):
        if sum(sizes) + small <= n // 2:
            sizes.append(small)
    rest = n - sum(sizes)
    ones = min(STEPS // 4, rest // 2)
    second = (rest - ones) // 3
    sizes.append(rest - ones - second)
    if second:
        sizes.append(second)
    return sizes + [1] * ones


def _in_pieces(model: Decoder, text: Text, sizes: Sequence[int]) -> Found:
    """The beginning of the text in pieces, against the reference's single pass."""
    n = sum(sizes)
    if model.last_only:
        expected, targets = text.logits[np.cumsum(sizes) - 1], None
    else:
        expected, targets = text.logits[:n], text.ids[1 : n + 1]
    found = np.empty_like(expected)
    filled = 0
    for logits in feed(model, text.ids, sizes):
        found[filled : filled + len(logits)] = logits
        filled += len(logits)
    return Found(expected, found, targets)


def _batch(model: Decoder, text: Text) -> Found:
    """Rows of equal lengths from different places of the text in one batch."""
    n = max(1, min(16, len(text.ids) // 3))
    # Rows of a short text overlap: they are taken from its beginning again.
    starts = [i * n % (len(text.ids) - n + 1) for i in range(ROWS)]
    rows = [text.row(start, n) for start in starts]
    ids = np.array([row.ids for row in rows])
    logits, _ = model.run(ids, None, np.tile(np.arange(n), (ROWS, 1)), None)  # (ROWS, n or 1, V)
    pairs = _Pairs()
    for row, found in zip(rows, logits, strict=True):
        pairs.add(row.logits[-len(found) :], found)
    return pairs.joined()


def _left_padding(model: Decoder, text: Text) -> Found:
    return _padded(model, text, left=True)


def _right_padding(model: Decoder, text: Text) -> Found:
    return _padded(model, text, left=False)


@dataclass
class _PaddedRow:
    """A prompt of ``length`` tokens in a padded batch. The tokens behind it are fed one by one."""

    row: Row
    length: int
    place: slice  # where the prompt is in the batch


def _padded(model: Decoder, text: Text, left: bool) -> Found:
    """Three prompts of unequal lengths in one batch, then some more tokens each: with padding on the right, the mask then
    has holes."""
    rows, width, more = _padded_rows(text, left)
    pairs = _Pairs()
    ids, mask = _batch_of(rows, width)
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    logits, cache = model.run(ids, mask, positions, None)
    for padded, found in zip(rows, logits, strict=True):
        if model.last_only:
            pairs.add(padded.row.logits[padded.length - 1 : padded.length], found)
        else:
            pairs.add(padded.row.logits[: padded.length], found[padded.place])
    for step in range(more):
        ids = np.array([[padded.row.ids[padded.length + step]] for padded in rows])
        mask = np.concatenate((mask, np.ones_like(ids)), 1)
        positions = np.array([[padded.length + step] for padded in rows])
        logits, cache = model.run(ids, mask, positions, cache)
        for padded, found in zip(rows, logits, strict=True):
            pairs.add(padded.row.logits[padded.length + step][None], found)
    return pairs.joined()


def _padded_rows(text: Text, left: bool) -> tuple[list[_PaddedRow], int, int]:
    """The rows, the width of their batch, and how many more tokens each row has."""
    width = max(1, min(STEPS, len(text.ids)) * 2 // 3)
    more = min(8, len(text.ids) - width)
    rows = []
    for length in (width, 1, max(1, width // 2)):
        place = slice(width - length, width) if left else slice(0, length)
        rows.append(_PaddedRow(text.row(0, length + more), length, place))
    return rows, width, more


def _batch_of(rows: Sequence[_PaddedRow], width: int) -> tuple[Array, Array]:
    """Token ids and attention mask, (B, width) each."""
    ids = np.zeros((len(rows), width), np.int64)
    mask = np.zeros_like(ids)
    for i, padded in enumerate(rows):
        ids[i, padded.place] = padded.row.ids[: padded.length]
        mask[i, padded.place] = 1
    return ids, mask


Scenario = Callable[[Decoder, Text], Found]
SCENARIOS: dict[str, Scenario] = {
    "full context": _full_context,
    "one token": _one_token,
    "token by token": _token_by_token,
    "chunks": _chunks,
    "batch rows": _batch,
    "left padding": _left_padding,
    "right padding": _right_padding,
}


# ------------------------------------------------------------------------------------------------------------ checks


def compare_runs(reference: Decoder, model: Decoder, ids: Sequence[int], bounds: Bounds = FP32) -> list[Check]:
    """Run every scenario, then greedy decoding. ``ids`` are at most a full context."""
    text = Text(reference, ids)
    checks = [compare_logits(name, model, text, bounds) for name in SCENARIOS]
    if bounds != FP32:
        checks.append(compare_prefill(model, text.ids))
    unoptimized = model.unoptimized()
    if unoptimized is not None:
        checks.append(compare_logits("full context", unoptimized, text, bounds, called="ORT_DISABLE_ALL"))
    return [*checks, compare_greedy(reference, model, text.ids, _error(checks, bounds))]


def _error(checks: Sequence[Check], bounds: Bounds) -> float:
    """The largest error of a logit, but not more than its bound."""
    measured = [check.details for check in checks if check.details]
    largest = max((details["max_logit"] for details in measured), default=0.0)
    error = max((details["max_abs_error"] for details in measured), default=0.0)
    return float(min(bounds.max_abs_error * largest, error))


def compare_prefill(model: Decoder, ids: Sequence[int]) -> Check:
    """A prompt in four chunks against the same model's single pass: rounding must not depend on how a prompt is split."""
    size = -(-len(ids) // 4)
    sizes = [min(size, len(ids) - start) for start in range(0, len(ids), size)]
    chunks = list(feed(model, ids, sizes))
    found = chunks[-1] if model.last_only else np.concatenate(chunks)
    return verdict("chunked prefill", measure(_run_row(model, ids), found), PREFILL)


def compare_logits(
    scenario: str, model: Decoder, text: Text, bounds: Bounds = FP32, *, called: str | None = None
) -> Check:
    """The logits of one scenario against the reference's."""
    name = called or scenario
    if model.last_only and scenario == "right padding":
        return Check(name, None, "skipped: this model returns the logits of the last slot only")
    result = SCENARIOS[scenario](model, text)
    return verdict(name, measure(result.expected, result.found, result.targets), bounds)


def verdict(name: str, metrics: Metrics, bounds: Bounds = FP32, *, inexact: bool | None = None) -> Check:
    """A check from metrics: what failed, or how large the error is.

    Args:
        inexact: whether the bounds allow more than rounding in float32; by default, if they are not those of fp32.
    """
    failures = metrics.failures(bounds)
    result = "; ".join(failures) if failures else _summary(metrics)
    details = {
        **asdict(metrics),
        "limits": metrics.limits(bounds),
        "failures": failures,
        "inexact": bounds != FP32 if inexact is None else inexact,
    }
    return Check(name, not failures, result, details)


def _summary(metrics: Metrics) -> str:
    error = "bit-identical"
    if metrics.max_abs_error:
        share = metrics.max_abs_error / metrics.max_logit if metrics.max_logit else 0.0
        error = f"error {share:.1e} of the largest logit, KL {metrics.kl_divergence:.1e}"
    plural = "s" if metrics.positions > 1 else ""
    return f"{error}, {metrics.positions} position{plural}"


# ---------------------------------------------------------------------------------------------------- greedy decoding


def compare_greedy(reference: Decoder, model: Decoder, prompt: Sequence[int], error: float) -> Check:
    """Compare greedy tokens, as many as fit into the context, up to 200.

    A difference counts if the reference's gap between its first and second token exceeds twice ``error``, the largest
    error of a logit (limited by its bound). Below that it is a near tie, which rounding may decide either way.
    """
    prompt = list(prompt[: max(1, min(GREEDY_PROMPT, reference.n_ctx // 2))])
    n = min(GREEDY_TOKENS, reference.n_ctx - len(prompt))
    details: dict[str, Any] = {"tokens": n, "first_difference": None}
    generated = []
    for which, decoder in (("first", reference), ("second", model)):
        try:
            generated.append(greedy(decoder, prompt, n))
        except CheckpointError:
            return Check(GREEDY, False, f"none: the {which} model's logits contain NaN or infinity", details)
    expected, found = generated
    differing = [i for i in range(n) if expected[i] != found[i]]
    if not differing:
        return Check(GREEDY, True, f"{n} of {n} tokens the same", details)
    first = differing[0]
    gap = top_gap(reference, [*prompt, *expected[:first]])
    tie = gap <= 2 * error
    remark = ", a near tie" if tie else ""
    details = {"tokens": n, "first_difference": first, "gap": gap, "near_tie": tie}
    return Check(GREEDY, tie, f"differ from token {first} of {n} (gap {gap:.2e}{remark})", details)


def greedy(decoder: Decoder, prompt: list[int], n: int) -> list[int]:
    """Return n greedy tokens after a prompt; an end of text does not stop them."""
    generation = Generation(decoder, [prompt], n, Sampling(temperature=0))
    return [token for (token,) in generation if token is not None]


def top_gap(decoder: Decoder, ids: list[int]) -> float:
    """The difference between the two largest logits of the next token."""
    logits, _ = decoder.step(np.array([ids]), None, np.arange(len(ids))[None], None)
    second, first = np.sort(logits[0])[-2:]
    return float(first - second)
