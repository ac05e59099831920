"""The responses of OpenAI's API, from the events of the engine."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..scoring.logits import TokenScores
from .embedder import Vectors
from .requests import Event, PromptRead, ScoredToken, TextEnd, TextPiece
from .token_text import TokenTexts
from .translate import Prepared

Json = dict[str, Any]
encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
MARK = "\0"  # in place of a text; no other field holds it


@dataclass
class _Text:
    """A text so far."""

    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)
    end: TextEnd | None = None


class Answer:
    """The answer to one request, whole or in pieces.

    Args:
        prepared: the request.
    """

    kind = "text_completion"
    piece_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.names = prepared.model.token_texts
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.cached = 0
        self._prompt_scores: dict[int, TokenScores | None] = {}
        self._texts: dict[tuple[int, int], _Text] = {}
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def add(self, event: Event) -> None:
        """Take an event of the engine."""
        if isinstance(event, PromptRead):
            self.cached += event.cached
            self._prompt_scores[event.prompt] = event.scores
            return
        assert isinstance(event, TextPiece | TextEnd)
        text = self._texts.get((event.prompt, event.text))
        if text is None:
            text = self._texts[event.prompt, event.text] = _Text()
        if isinstance(event, TextEnd):
            text.end = event
            return
        text.text += event.piece
        text.tokens += event.tokens

    def stream(self, event: Event) -> bytes:
        """Take an event of the engine. Returns the server-sent events that it makes."""
        known = len(self._texts)
        self.add(event)
        if isinstance(event, PromptRead):
            return b""
        assert isinstance(event, TextPiece | TextEnd)
        began = b"".join(map(sent_event, self._first(event))) if len(self._texts) > known else b""
        if isinstance(event, TextEnd):
            return began + sent_event(self._piece(event, "", (), event.reason))
        if self.prepared.logprobs is not None:
            return began + sent_event(self._piece(event, event.piece, event.tokens, None))
        before, after = self._frame(event)
        return began + before + encode(event.piece).encode() + after

    def _frame(self, event: TextPiece) -> tuple[bytes, bytes]:
        """What is before and after the text in each piece of a text without log-probabilities."""
        index = self._index(event)
        frame = self._frames.get(index)
        if frame is None:
            made = sent_event(self._piece(event, MARK, (), None))
            before, _, after = made.partition(encode(MARK).encode())
            frame = self._frames[index] = before, after
        return frame

    def whole(self) -> Json:
        """The answer to a request without a stream."""
        choices = []
        for prompt in range(len(self.prepared.requests)):
            for number, text in enumerate(self._best(prompt)):
                choices.append(self._choice(prompt, prompt * self.prepared.n + number, text))
        return {**self._head(self.kind), "choices": choices, "usage": self.usage()}

    def usage(self) -> Json:
        """How many tokens were read and generated."""
        read = sum(len(request.prompt) for request in self.prepared.requests)
        new = sum(text.end.tokens for text in self._texts.values() if text.end)
        return {
            "prompt_tokens": read,
            "completion_tokens": new,
            "total_tokens": read + new,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def stream_end(self) -> bytes:
        """The last server-sent events of a stream: the usage, if it was asked for."""
        usage = b""
        if self.prepared.usage:
            usage = sent_event({**self._head(self.piece_kind), "choices": [], "usage": self.usage()})
        return usage + b"data: [DONE]\n\n"

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.prepared.model.name}

    def _best(self, prompt: int) -> list[_Text]:
        """The texts of a prompt that are returned: those with the highest log-probability for each token."""
        texts = [self._texts[prompt, number] for number in range(self.prepared.requests[prompt].texts)]
        if len(texts) > self.prepared.n:
            texts.sort(key=_mean_log_probability, reverse=True)  # stable
        return texts[: self.prepared.n]

    def _index(self, event: TextPiece | TextEnd) -> int:
        return event.prompt * self.prepared.n + event.text

    def _with_usage(self, piece: Json) -> Json:
        return {**piece, "usage": None} if self.prepared.usage else piece

    # What differs between completions and chat.

    def _first(self, event: TextPiece | TextEnd) -> list[Json]:
        """What a stream of a text begins with: the prompt, if it is returned."""
        if self.prepared.echoes is None:
            return []
        scores = None
        if self.prepared.logprobs is not None:
            scores = _Legacy(self.names)
            scores.add_prompt(self.prepared.requests[event.prompt].prompt, self._prompt_scores[event.prompt])
        choice = {
            "index": self._index(event),
            "text": self.prepared.echoes[event.prompt],
            "logprobs": scores.json() if scores else None,
            "finish_reason": None,
        }
        return [self._with_usage({**self._head(self.piece_kind), "choices": [choice]})]

    def _piece(self, event: TextPiece | TextEnd, text: str, tokens: Sequence[ScoredToken], reason: str | None) -> Json:
        choice = {
            "index": self._index(event),
            "text": text,
            "logprobs": self._logprobs(event.prompt, tokens) if tokens else None,
            "finish_reason": reason,
        }
        return self._with_usage({**self._head(self.piece_kind), "choices": [choice]})

    def _choice(self, prompt: int, index: int, text: _Text) -> Json:
        assert text.end
        echoes = self.prepared.echoes
        return {
            "index": index,
            "text": (echoes[prompt] if echoes else "") + text.text,
            "logprobs": self._logprobs(prompt, text.tokens, whole=True),
            "finish_reason": text.end.reason,
        }

    def _logprobs(self, prompt: int, tokens: Sequence[ScoredToken], whole: bool = False) -> Json | None:
        if self.prepared.logprobs is None:
            return None
        found = _Legacy(self.names)
        echoes = self.prepared.echoes
        start = len(echoes[prompt]) if echoes else 0
        if whole and echoes:
            found.add_prompt(self.prepared.requests[prompt].prompt, self._prompt_scores[prompt])
        found.add(tokens, start)
        return found.json()


class ChatAnswer(Answer):
    """The answer to a conversation."""

    kind = "chat.completion"
    piece_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def _first(self, event: TextPiece | TextEnd) -> list[Json]:
        return [self._delta(event, {"role": "assistant", "content": ""}, (), None)]

    def _piece(self, event: TextPiece | TextEnd, text: str, tokens: Sequence[ScoredToken], reason: str | None) -> Json:
        delta = {"content": text} if reason is None else {}
        return self._delta(event, delta, tokens, reason)

    def _delta(
        self, event: TextPiece | TextEnd, delta: Json, tokens: Sequence[ScoredToken], reason: str | None
    ) -> Json:
        choice = {
            "index": self._index(event),
            "delta": delta,
            "logprobs": self._content_logprobs(tokens) if tokens else None,
            "finish_reason": reason,
        }
        return self._with_usage({**self._head(self.piece_kind), "choices": [choice]})

    def _choice(self, prompt: int, index: int, text: _Text) -> Json:
        assert text.end
        return {
            "index": index,
            "message": {"role": "assistant", "content": text.text, "refusal": None},
            "logprobs": self._content_logprobs(text.tokens),
            "finish_reason": text.end.reason,
        }

    def _content_logprobs(self, tokens: Sequence[ScoredToken]) -> Json | None:
        if self.prepared.logprobs is None:
            return None
        content = []
        for token in tokens:
            assert token.score
            entry = self._entry(token.id, float(token.score.log_probabilities[0]))
            entry["top_logprobs"] = [self._entry(*pair) for pair in _alternatives(token.score, 0)]
            content.append(entry)
        return {"content": content, "refusal": None}

    def _entry(self, token: int, log_probability: float) -> Json:
        return {
            "token": self.names.text(token),
            "logprob": log_probability,
            "bytes": list(self.names.raw(token)),
        }


def embeddings_json(model: str, vectors: Vectors, tokens: int, as_base64: bool) -> Json:
    """The answer to a request for embeddings.

    Args:
        model: its name.
        vectors: (n, C).
        tokens: of all inputs.
        as_base64: return the bytes of little-endian float32 numbers, not a list.
    """
    values: list[Any] = vectors.tolist()
    if as_base64:
        values = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": value} for i, value in enumerate(values)],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def sent_event(value: Json) -> bytes:
    """A server-sent event."""
    return b"data: " + encode(value).encode() + b"\n\n"


class _Legacy:
    """The log-probabilities of completions."""

    def __init__(self, names: TokenTexts) -> None:
        self.names = names
        self.tokens: list[str] = []
        self.log_probabilities: list[float | None] = []
        self.top: list[dict[str, float] | None] = []
        self.offsets: list[int] = []

    def add_prompt(self, prompt: Sequence[int], scores: TokenScores | None) -> None:
        """The tokens of the prompt. Nothing is before the first of them, so it has no log-probability."""
        self.offsets += self.names.offsets(prompt)
        self._add_token(prompt[0], None, 0)
        for i, token in enumerate(prompt[1:]):
            self._add_token(token, scores, i)

    def add(self, tokens: Sequence[ScoredToken], start: int) -> None:
        """New tokens, whose text begins after ``start`` characters."""
        for token in tokens:
            self.offsets.append(start + token.offset)
            self._add_token(token.id, token.score, 0)

    def _add_token(self, token: int, scores: TokenScores | None, i: int) -> None:
        name = self.names.text(token)
        self.tokens.append(name)
        if scores is None:
            self.log_probabilities.append(None)
            self.top.append(None)
            return
        own = float(scores.log_probabilities[i])
        top = {self.names.text(other): value for other, value in _alternatives(scores, i)}
        # The token itself is always there, as OpenAI has it.
        top.setdefault(name, own)
        self.log_probabilities.append(own)
        self.top.append(top)

    def json(self) -> Json:
        return {
            "tokens": self.tokens,
            "token_logprobs": self.log_probabilities,
            "top_logprobs": self.top,
            "text_offset": self.offsets,
        }


def _alternatives(scores: TokenScores, i: int) -> Iterator[tuple[int, float]]:
    """The most likely tokens at a position, best first."""
    found = scores.alternatives
    if found is not None:
        yield from zip(found.ids[i].tolist(), map(float, found.log_probabilities[i]), strict=True)


def _mean_log_probability(text: _Text) -> float:
    assert text.end
    return text.end.log_probability / max(1, text.end.tokens)
