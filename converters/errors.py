"""What can go wrong with a weight file, as a tree to catch from.

ConversionError             anything that gpt2x refuses, with a message for a person
├── FormatError             the bytes are not what they claim to be
│   ├── ChecksumError       they are, but a checksum does not match
│   └── UnsafeError         they ask for something that gpt2x never does (run code, leave the folder)
├── CheckpointError         sound bytes, but not the tensors of a GPT-2
├── ConfigError             a configuration that is impossible, unknown or contradicted
│   └── UnknownHeadsError   the number of attention heads, which tensors do not show, is stated nowhere
├── DestinationError        the result cannot be written there
└── TokenizerError          a tokenizer is missing or is not GPT-2's kind

Every message names the file, the place and the fact, and what to do next where there is something to do.
"""

from __future__ import annotations

from collections.abc import Iterable

SHOWN = 20  # facts listed before "and N more"


def short(facts: list[str]) -> list[str]:
    """The same facts, or the first of very many."""
    return facts if len(facts) <= SHOWN else [*facts[:SHOWN], f"and {len(facts) - SHOWN} more"]


class ConversionError(Exception):
    """Anything that gpt2x refuses. ``str(error)`` is meant for the user."""

    @classmethod
    def listing(cls, headline: str, facts: Iterable[str], advice: str = "") -> ConversionError:
        """An error that reports everything at once: a headline, one indented line a fact, advice."""
        lines = [headline, *(f"  {fact}".replace("\n", "\\n") for fact in facts)]  # a name may hold anything
        return cls("\n".join([*lines, advice] if advice else lines))


class FormatError(ConversionError):
    """The bytes are not what they claim to be."""


class ChecksumError(FormatError):
    """A checksum that the file carries does not match its bytes."""


class UnsafeError(FormatError):
    """The file asks for something that gpt2x never does, such as running code."""


class CheckpointError(ConversionError):
    """The tensors are not those of a GPT-2: missing, unknown, twice there, or of another shape."""


class ConfigError(ConversionError):
    """A configuration that is impossible, unknown or contradicted by the tensors."""


class UnknownHeadsError(ConfigError):
    """The number of attention heads, which tensors do not show, is stated nowhere."""


class DestinationError(ConversionError):
    """The result cannot be written there."""


class TokenizerError(ConversionError):
    """A tokenizer is missing, or is not GPT-2's kind."""
