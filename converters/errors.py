"""The exceptions of this package, as a tree.

ConversionError             the base class; its message is for the user
├── FormatError             invalid bytes
│   ├── ChecksumError       a checksum does not match
│   └── UnsafeError         the file requests something that gpt2x never does (run code, leave the directory)
├── CheckpointError         valid bytes, but not the tensors of a GPT-2
├── ConfigError             an invalid, unknown or contradicted configuration
│   └── UnknownHeadsError   no configuration states the number of attention heads, which tensors do not show
├── DestinationError        the result cannot be written there
└── TokenizerError          a tokenizer is missing or damaged
    └── OtherTokenizerError a tokenizer that is not a byte-level BPE as GPT-2's is

Every message names the file, the fault and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable

SHOWN = 20  # faults listed before "and N more"


def short(facts: list[str], shown: int = SHOWN) -> list[str]:
    """The first ``shown`` lines, and how many more there are."""
    return facts if len(facts) <= shown else [*facts[:shown], f"and {len(facts) - shown} more"]


class ConversionError(Exception):
    """The base class of all errors of this package. ``str(error)`` is for the user."""

    @classmethod
    def listing(cls, headline: str, facts: Iterable[str], advice: str = "") -> ConversionError:
        """An error that lists all faults at once: a headline, one indented line for each, advice."""
        lines = [headline, *(f"  {fact}".replace("\n", "\\n") for fact in facts)]  # a name may hold anything
        return cls("\n".join([*lines, advice] if advice else lines))


class FormatError(ConversionError):
    """The bytes of a file are invalid."""


class ChecksumError(FormatError):
    """A checksum that the file carries does not match its bytes."""


class UnsafeError(FormatError):
    """The file requests something that gpt2x never does, such as running code."""


class CheckpointError(ConversionError):
    """The tensors are not those of a GPT-2: missing, unknown, duplicate, or of another shape."""


class ConfigError(ConversionError):
    """A configuration that is invalid, unknown or contradicted by the tensors."""


class UnknownHeadsError(ConfigError):
    """No configuration states the number of attention heads, which tensors do not show."""


class DestinationError(ConversionError):
    """The result cannot be written there."""


class TokenizerError(ConversionError):
    """A tokenizer is missing or damaged."""


class OtherTokenizerError(TokenizerError):
    """A tokenizer that is not a byte-level BPE as GPT-2's is. ``kind`` says what it is, as text for the user."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


def truncated(where: object, fault: str, what: str = "truncated") -> FormatError:
    """The error of a file that ends too early, with the next step.

    Args:
        where: the file, and the place in it.
        fault: what is missing there.
        what: the word before it.
    """
    return FormatError(f"{where}: {what}: {fault}; download or copy it again")
