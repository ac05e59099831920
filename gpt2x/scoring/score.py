"""The score of a text: log-likelihood, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import tee
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..generation.prompts import check_vocabulary
from ..generation.text import text_tokenizer
from ..runtimes.base import Decoder, Ids, InputError
from ..runtimes.opening import as_decoder
from .logits import TokenScores
from .spans import Span, score_spans, score_unordered
from .windows import Window, check_stride, default_stride, windows_of

EMPTY = "the text is empty: there is nothing to score"


@dataclass(frozen=True)
class Score:
    """What a model says of a text.

    Attributes:
        log_likelihood: the sum of the log-probabilities of the scored tokens, in nats.
        tokens: how many tokens the text has.
        scored: how many of them were scored: all but the first, if windows overlap.
        bytes: how many bytes of UTF-8 the text has.
        perplexity: as transformers' documentation computes it; None if nothing was scored.
        bits_per_byte: -log2 of the likelihood, for each byte of the text; None if nothing was scored, or if the stride is
            above the context, so that a part of the text was left out.
        log_probabilities: if they were asked for, of each token (tokens,), NaN for those that were not scored.
    """

    log_likelihood: float
    tokens: int
    scored: int
    bytes: int
    perplexity: float | None
    bits_per_byte: float | None
    log_probabilities: NDArray[np.float64] | None = None


def score(
    model: Any, tokenizer: Any, text: str, stride: int | None = None, *, log_probabilities: bool = False
) -> Score:
    """Score a text with a sliding window.

    Args:
        model: a ``GPT2``, or any other runtime of gpt2x.
        tokenizer: gpt2x's ``Tokenizer``, or GPT-2's of transformers, tokenizers or tiktoken.
        text: a text of any length. Of a single token, nothing is scored: the log-likelihood is 0, the perplexity None.
        stride: how far the window moves each time; by default half the context, as in transformers' documentation.
        log_probabilities: also return those of the single tokens.

    Raises:
        InputError: if the text is empty or does not fit the model, the stride is below 1, the model returns only the last
            logits, or it is a pair of precisions.
        CheckpointError: if the logits contain NaN or infinity.
    """
    decoder = as_decoder(model)
    encoded = encode_text(decoder, tokenizer, text)
    tally = Tally(decoder, encoded, stride)
    each = np.full(len(encoded.tokens), np.nan) if log_probabilities else None
    for window, found in scored_windows(decoder, encoded.tokens, stride):
        tally.add(window, found)
        if each is not None:
            each[window.first : window.end] = found.log_probabilities
    return replace(tally.score(), log_probabilities=each)


def score_texts(decoder: Decoder, tokenizer: Any, texts: Sequence[str], stride: int | None = None) -> list[Score]:
    """Score several texts of any lengths together. Each score is the one that the text has alone, but for rounding.

    Raises:
        InputError, CheckpointError: as ``score``.
    """
    return score_encoded(decoder, [encode_text(decoder, tokenizer, text) for text in texts], stride)


def score_encoded(decoder: Decoder, all_encoded: Sequence[Encoded], stride: int | None) -> list[Score]:
    """As ``score_texts``, of texts that ``encode_text`` returned."""
    windows = [list(_windows(decoder, encoded.tokens, stride)) for encoded in all_encoded]
    spans = []
    for encoded, of_text in zip(all_encoded, windows, strict=True):
        spans += [_span(encoded.tokens, window) for window in of_text]
    found = iter(score_unordered(decoder, spans))
    scores = []
    for encoded, of_text in zip(all_encoded, windows, strict=True):
        tally = Tally(decoder, encoded, stride)
        for window in of_text:
            tally.add(window, next(found))
        scores.append(tally.score())
    return scores


def scored_windows(
    decoder: Decoder, tokens: Ids, stride: int | None, alternatives: int = 0
) -> Iterator[tuple[Window, TokenScores]]:
    """Each window of a text with its scores, in order."""
    windows, again = tee(_windows(decoder, tokens, stride))
    spans = (_span(tokens, window) for window in windows)
    yield from zip(again, score_spans(decoder, spans, alternatives), strict=True)


def _windows(decoder: Decoder, tokens: Ids, stride: int | None) -> Iterator[Window]:
    return windows_of(len(tokens), decoder.n_ctx, default_stride(decoder.n_ctx) if stride is None else stride)


def _span(tokens: Ids, window: Window) -> Span:
    return Span(tokens[window.begin : window.end], window.first - window.begin)


@dataclass(frozen=True)
class Encoded:
    """A text as tokens (n,), and its size in bytes of UTF-8."""

    tokens: Ids
    bytes: int


def encode_text(decoder: Decoder, tokenizer: Any, text: str) -> Encoded:
    """The tokens of a text that is to be scored.

    Raises:
        InputError: if it is empty, or a token is outside the model's vocabulary.
    """
    tokens = np.array(text_tokenizer(tokenizer).encode(text), np.int64)
    if not len(tokens):
        raise InputError(EMPTY)
    check_vocabulary(decoder, tokens)
    return Encoded(tokens, len(text.encode("utf-8", "replace")))


class Tally:
    """The score of a text, window by window.

    Raises:
        InputError: if the stride is below 1.
    """

    def __init__(self, decoder: Decoder, encoded: Encoded, stride: int | None) -> None:
        if stride is not None:
            check_stride(stride)
        self.encoded = encoded
        self.leaves_gaps = stride is not None and stride > decoder.n_ctx
        self.log_likelihood = 0.0
        self.scored = 0
        self._losses = 0.0
        self._weights = 0

    def add(self, window: Window, found: TokenScores) -> None:
        """Count the tokens of one window."""
        total = float(found.log_probabilities.sum())
        number = len(found.log_probabilities)
        self.log_likelihood += total
        self.scored += number
        self._losses -= total / number * window.weight
        self._weights += window.weight

    def score(self) -> Score:
        """The score of all windows so far."""
        bits = None
        if self.scored and not self.leaves_gaps:
            bits = -self.log_likelihood / math.log(2) / self.encoded.bytes
        return Score(
            self.log_likelihood, len(self.encoded.tokens), self.scored, self.encoded.bytes, self._perplexity(), bits
        )

    def _perplexity(self) -> float | None:
        if not self._weights:
            return None
        return float(np.exp(self._losses / self._weights))
