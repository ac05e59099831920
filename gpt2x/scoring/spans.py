"""Scoring of token sequences that fit the context: in batches, and in pieces through the cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..memory import give_back
from ..precisions import PAIR
from ..runtimes.base import Decoder, Ids, InputError
from .logits import TokenScores, joined, score_tokens

LOGITS = 64 << 20  # bytes of logits that one run returns: those of 256 tokens of GPT-2
PIECE = 256  # tokens of a row in one run, as attention over T tokens computes T * T scores and masks half of them
BATCH = 1024  # tokens in a batch of several rows, with padding


@dataclass(frozen=True)
class Span:
    """Tokens (n,) of which those from ``first`` on are scored, each after all the tokens before it.

    ``first`` is at least 1, and n at most the context length + 1: the last token is not an input.
    """

    tokens: Ids
    first: int


def check_can_score(decoder: Decoder) -> None:
    """Refuse a model that does not return the logits of every position, and a pair of precisions.

    Of a pair, a short run takes the model that decodes, and a long one the other: a text would be scored by both.

    Raises:
        InputError: with what to do instead.
    """
    if PAIR in decoder.precision:
        raise InputError(pair_refused(decoder.precision))
    if decoder.last_only:
        raise InputError(
            f"{decoder.path or decoder.runtime}: returns only the last logits, and scoring needs all: export it "
            "without --logits last"
        )


def pair_refused(pair: str) -> str:
    """What is wrong with a pair of precisions, and what to do instead."""
    first, second = pair.split(PAIR)
    return (
        f"{pair} is a pair of precisions, and a score is that of one: choose {first} or {second}. "
        f"gpt2x score compares them: --precision {first},{second}"
    )


def score_spans(decoder: Decoder, spans: Iterable[Span], alternatives: int = 0) -> Iterator[TokenScores]:
    """Score spans in order. Spans that follow one another run together: those of similar lengths waste least.

    Raises:
        InputError: if the model returns only the last logits, or is a pair of precisions.
        CheckpointError: if the logits contain NaN or infinity.
    """
    check_can_score(decoder)
    for batch in _batches(spans):
        yield from _score_batch(decoder, batch, alternatives)


def score_unordered(decoder: Decoder, spans: Sequence[Span]) -> list[TokenScores]:
    """As ``score_spans``, for spans of any lengths: they run in the order of their lengths.

    Returns:
        The scores in the order of the spans.
    """
    order = sorted(range(len(spans)), key=lambda i: len(spans[i].tokens))
    found = score_spans(decoder, [spans[i] for i in order])
    scores = dict(zip(order, found, strict=True))
    return [scores[i] for i in range(len(spans))]


def _batches(spans: Iterable[Span]) -> Iterator[list[Span]]:
    batch: list[Span] = []
    width = 0
    for span in spans:
        width = max(width, len(span.tokens))
        if batch and (len(batch) + 1) * width > BATCH:
            yield batch
            batch, width = [], len(span.tokens)
        batch.append(span)
    if batch:
        yield batch


def _score_batch(decoder: Decoder, batch: list[Span], alternatives: int) -> list[TokenScores]:
    """One batch, a piece at a time.

    Rows are padded on the right, without a mask: no token sees what follows it, and the logits of padding are not used.
    """
    width = max(len(span.tokens) for span in batch) - 1
    ids = np.zeros((len(batch), width), np.int64)
    for row, span in enumerate(batch):
        ids[row, : len(span.tokens) - 1] = span.tokens[:-1]
    positions = np.tile(np.arange(width), (len(batch), 1))
    parts: list[list[TokenScores]] = [[] for _ in batch]
    cache: Any = None
    unscored = min(span.first for span in batch) - 1
    size = max(16, min(PIECE, LOGITS // (4 * len(batch) * decoder.n_vocab)))
    for start, end in [*_pieces(0, unscored, size), *_pieces(unscored, width, size)]:
        if end <= unscored:
            cache = decoder.extend(ids[:, start:end], None, positions[:, start:end], cache)
            continue
        logits, cache = decoder.run(ids[:, start:end], None, positions[:, start:end], cache)
        for row, span in enumerate(batch):
            # The logits at position p are those of the token at p + 1.
            first = max(span.first - 1, start)
            last = min(len(span.tokens) - 1, end)
            if first < last:
                targets = span.tokens[first + 1 : last + 1]
                scored = logits[row, first - start : last - start]
                parts[row].append(score_tokens(scored, targets, alternatives, decoder.threads))
    del cache
    give_back()
    return [joined(part) for part in parts]


def _pieces(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(start, end, size):
        yield first, min(first + size, end)
