"""Text to token ids and back, as it is generated."""

from __future__ import annotations

from typing import Any


class TextStream:
    """Tokens in, text out, as soon as whole characters are there."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.pending: list[int] = []

    def push(self, token: int | None) -> str:
        """The text that one more token completes; None flushes what is left."""
        if token is not None:
            self.pending.append(token)
        text = decode(self.tokenizer, self.pending) if self.pending else ""
        if token is not None and text.endswith("\ufffd"):  # perhaps the beginning of a character
            return ""
        self.pending = []
        return text


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids from gpt2x's tokenizer, transformers' or a bare ``tokenizers.Tokenizer``."""
    ids = tokenizer.encode(text)
    return list(getattr(ids, "ids", ids))


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Text, exactly: transformers may be set to tidy the spaces before punctuation."""
    if hasattr(tokenizer, "clean_up_tokenization_spaces"):
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return str(tokenizer.decode(ids))


def end_of(tokenizer: Any, model: Any) -> int | None:
    """The id that ends a text: the tokenizer's word, else the model's."""
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None:
        end = getattr(getattr(model, "config", None), "eos_token_id", None)
    return end if isinstance(end, int) else None
