"""Stop strings in streamed text: what may become one is held back."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Cuts a text at the first stop string, as its pieces arrive.

    ``stopped`` is true once one was found.

    Args:
        strings: the stop strings.

    Raises:
        ValueError: if one is empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        check_stop_strings(strings)
        self.strings = tuple(strings)
        self.held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Return what may be shown after another piece: no stop string, and no text that may be the start of one."""
        if self.stopped:
            return ""
        text = self.held + piece
        at = first_stop(text, self.strings)
        if at is not None:
            self.stopped = True
            self.held = ""
            return text[:at]
        keep = self._start_at_end(text)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self.held = self.held, ""
        return held

    def _start_at_end(self, text: str) -> int:
        """The length of the longest end of the text that a stop string starts with."""
        longest = max(map(len, self.strings), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            end = text[len(text) - n :]
            if any(string.startswith(end) for string in self.strings):
                return n
        return 0


def check_stop_strings(strings: Sequence[str]) -> None:
    """Refuse an empty stop string.

    Raises:
        ValueError: if one is empty, or ``strings`` is itself a string.
    """
    if isinstance(strings, str):
        raise ValueError(f"stop_strings is the string {strings!r}; pass a list of strings")
    if not all(strings):
        raise ValueError("a stop string is empty; it would stop every text at once")


def first_stop(text: str, strings: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first, as the text arrives; None if there is none."""
    found = []
    for string in strings:
        at = text.find(string)
        if at >= 0:
            found.append((at + len(string), at))
    return min(found)[1] if found else None


def cut(text: str, strings: Sequence[str]) -> str:
    """A text up to its first stop string."""
    return text[: first_stop(text, strings)]
