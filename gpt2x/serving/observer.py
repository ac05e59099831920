"""What the engine tells of itself, for metrics. Every method does nothing here."""

from __future__ import annotations


class Observer:
    """Is told what happens in an engine, from the engine's thread."""

    def prompt_read(self, tokens: int, cached: int) -> None:
        """A prompt was read; ``cached`` of its tokens came from the prefix cache."""

    def stepped(self, rows: int, seconds: float) -> None:
        """Each of so many sequences got a token."""

    def first_token(self, seconds: float) -> None:
        """A text got its first token, so long after its request."""

    def text_ended(self, tokens: int) -> None:
        """A text is complete."""

    def cancelled(self) -> None:
        """A request was cancelled."""

    def failed(self, code: str) -> None:
        """A request failed."""

    def state(self, waiting: int, running: int, cache_tokens: int, prefix_bytes: int) -> None:
        """After each step: texts that wait and that run, tokens in the cache, and the size of the prefix cache."""
