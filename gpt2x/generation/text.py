"""Text to token ids and back, while it is generated."""

from __future__ import annotations

from typing import Any, Protocol


class TextTokenizer(Protocol):
    """What generation needs of a tokenizer."""

    eos_token_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class ForeignTokenizer:
    """The tokenizer of another library (transformers, tokenizers, tiktoken) as a ``TextTokenizer``.

    These libraries share no base class, and differ in three points:

    - ``tokenizers`` encodes to an object with ``ids``, the others to the ids themselves.
    - transformers may remove the spaces before punctuation, unless ``clean_up_tokenization_spaces`` is false.
    - Only transformers has ``eos_token_id``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        cleans_up = hasattr(tokenizer, "clean_up_tokenization_spaces")
        self._decode_options = {"clean_up_tokenization_spaces": False} if cleans_up else {}
        end = getattr(tokenizer, "eos_token_id", None)
        self.eos_token_id: int | None = end if isinstance(end, int) else None

    def encode(self, text: str) -> list[int]:
        encoded = self.tokenizer.encode(text)
        return list(getattr(encoded, "ids", encoded))

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, **self._decode_options))


def text_tokenizer(tokenizer: Any) -> TextTokenizer:
    """Return gpt2x's own tokenizer as it is, and any other behind an adapter."""
    from ..tokenizer import Tokenizer

    if isinstance(tokenizer, Tokenizer | ForeignTokenizer):
        return tokenizer
    return ForeignTokenizer(tokenizer)


class TextStream:
    """Tokens in, text out, as soon as characters are complete."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = text_tokenizer(tokenizer)
        self.pending: list[int] = []

    def push(self, token: int | None) -> str:
        """Return the text that one more token completes; None returns what is left."""
        if token is not None:
            self.pending.append(token)
        text = self.tokenizer.decode(self.pending) if self.pending else ""
        # U+FFFD at the end may be the first bytes of a character.
        if token is not None and text.endswith("\ufffd"):
            return ""
        self.pending = []
        return text
