"""What may reach a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """The same text without the control characters that a file may bring to a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
