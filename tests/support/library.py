"""The shipped model in Python, to compare commands and streams with."""

from __future__ import annotations

from typing import Any

from gpt2x import SHAKESPEARE, Tokenizer, from_pretrained, generate_text


def open_library() -> tuple[Any, Tokenizer]:
    """The shipped model and its tokenizer."""
    return from_pretrained(SHAKESPEARE), Tokenizer.from_pretrained(SHAKESPEARE)


def text_of(library: tuple[Any, Tokenizer], *args: Any, **controls: Any) -> Any:
    """The text of ``generate_text``."""
    generate: Any = generate_text
    return generate(*library, *args, **controls)
