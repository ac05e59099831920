"""What the engine is asked for, and what it answers. No HTTP, no JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..generation.sampling import Sampling
from ..scoring.logits import TokenScores
from .faults import ServingError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TextRequest:
    """A prompt, and how it is continued.

    Attributes:
        prompt: token ids.
        max_tokens: the limit of new tokens; with 0, the prompt is only read.
        sampling: how tokens are chosen. Text i of a seed is the same, alone and in any batch.
        end_tokens: tokens that end a text.
        stop_strings: a text ends before the first of them.
        texts: how many texts continue the prompt.
        logprobs: how many alternatives are returned with each token; None for no log-probabilities.
        score_prompt: return the log-probabilities of the prompt, too.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    end_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    texts: int = 1
    logprobs: int | None = None
    score_prompt: bool = False


@dataclass(frozen=True)
class ScoredToken:
    """A new token.

    Attributes:
        id: its id.
        offset: where it begins in the new text, in characters.
        score: its log-probability and its alternatives, if they were asked for.
    """

    id: int
    offset: int
    score: TokenScores | None


@dataclass(frozen=True)
class PromptRead:
    """A prompt was read.

    Attributes:
        prompt: its number in the request.
        cached: how many of its tokens came from the prefix cache.
        scores: of each token but the first, if they were asked for.
    """

    prompt: int
    cached: int
    scores: TokenScores | None


@dataclass(frozen=True)
class TextPiece:
    """A piece of a text that can be shown. It never holds a part of a stop string, or of a character.

    Attributes:
        prompt: the number of the prompt in the request.
        text: the number of the text of this prompt.
        piece: the text.
        tokens: the tokens that begin in it.
    """

    prompt: int
    text: int
    piece: str
    tokens: tuple[ScoredToken, ...]


@dataclass(frozen=True)
class TextEnd:
    """A text is complete.

    Attributes:
        prompt: the number of the prompt in the request.
        text: the number of the text of this prompt.
        reason: why it ended.
        tokens: how many tokens were generated, with those of a stop string.
        log_probability: the sum of the log-probabilities of its tokens, if log-probabilities were asked for.
    """

    prompt: int
    text: int
    reason: FinishReason
    tokens: int
    log_probability: float


@dataclass(frozen=True)
class Failed:
    """The request failed as a whole. It is the last event."""

    error: ServingError


Event = PromptRead | TextPiece | TextEnd | Failed
