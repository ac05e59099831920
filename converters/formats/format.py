"""What is known of a format, as one object; and what its writer gets and returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..containers.container import Container
from ..dialects import DIALECTS, SAME_NAMES
from ..spec import GPT2Config
from ..tokenizer import Vocabulary

FLOATS = ("F64", "F32", "F16", "BF16")

# In which turn a directory is searched for the files of a format. A TensorFlow checkpoint comes after the first turn.
FIRST, LATER, EXPORTED = range(3)


@dataclass(frozen=True)
class Codec:
    """How a format spells a configuration.

    Args:
        read: the format's keys and values, and the place they come from -> fields of GPT2Config. Raises ConfigError.
        write: GPT2Config -> the format's keys and values.
        applies: whether keys and values are spelled so, where several formats name their file alike; None is any.
        notes: what the user should know of keys and values that are valid, each with the place.
    """

    read: Callable[[Mapping[str, Any], str], dict[str, Any]]
    write: Callable[[GPT2Config], dict[str, Any]]
    applies: Callable[[Mapping[str, Any]], bool] | None = None
    notes: Callable[[Mapping[str, Any], str], list[str]] = lambda raw, where: []


@dataclass(frozen=True)
class Embedded:
    """A configuration inside a file of weights, not parsed yet.

    ``complete`` is false where it states sizes only, so that files beside it are read, too.
    """

    raw: Mapping[str, Any]
    codec: Codec
    complete: bool = True


@dataclass(frozen=True)
class Opener:
    """How one kind of file is recognised and opened.

    Args:
        matches: whether a file with these first bytes, and of this size, may be of this kind.
        open: opens it. Imports its container when it is called, so that a conversion loads only what it needs.
        uncertain: whether files of other kinds may begin with the same bytes.
    """

    matches: Callable[[bytes, int], bool]
    open: Callable[[Path], Container]
    uncertain: bool = False


@dataclass(frozen=True)
class Job:
    """A checkpoint to write, and where.

    ``rivals`` names the files of a directory that would be read together with the new ones.
    """

    checkpoint: Checkpoint
    path: Path
    force: bool
    dtype: str | None
    max_shard_size: int | None
    rivals: Callable[[Path], list[str]]


@dataclass(frozen=True)
class Written:
    """The files that a writer wrote, and what the user should know."""

    files: list[Path]
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A file format: everything that the rest of the package knows of it.

    Args:
        name: its name in ``--to``, and in what ``inspect`` and ``convert`` print.
        what: who writes it.
        files: its usual file names, for people.
        dialect: the name of the dialect that is most usual in it. Others name the format (``Dialect.formats``).
        reads: the dtypes that are read. Quantized ones are read as float32.
        writes: the dtypes that are written; empty without a writer.
        ask: how a user asks for it on the command line.
        configuration: where the configuration is stored; empty if not in the file.
        checksums: what protects its bytes; empty if nothing does.
        tokenizer: where the tokenizer is stored.
        untied: whether it can hold an untied ``lm_head``.
        openers: how its files are recognised by their first bytes, and opened.
        indexes: suffix of a JSON file that lists several files of weights -> opens them.
        file_names: the names by which a directory's weights are found, in order.
        turn: when a directory is searched for them: FIRST, LATER or EXPORTED.
        suffixes: suffixes of its files, by which a lone file in a directory is found.
        suffix_decides: whether the suffix alone tells the format of a file that no first bytes tell.
        config_file: a file beside the weights that states the configuration, in the format of ``codec``.
        codec: how it spells a configuration.
        embedded: finds the configuration inside an open file.
        vocabulary: finds the tokenizer inside an open file: None, or a function that reads it or raises TokenizerError.
        write: its writer.
        write_suffixes: destination suffixes that select it; "" is any unknown suffix.
        is_directory: whether it is written as a directory.
        casts: whether its writer chooses the dtype of each tensor; else all are cast before.
        shards: whether it can be written as several files of weights.
    """

    name: str
    what: str
    files: str
    dialect: str
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()
    ask: str = ""
    configuration: str = ""
    checksums: str = ""
    tokenizer: str = "beside it"
    untied: bool = True
    openers: tuple[Opener, ...] = ()
    indexes: Mapping[str, Callable[[Path], Container]] = field(default_factory=dict)
    file_names: tuple[str, ...] = ()
    turn: int = FIRST
    suffixes: tuple[str, ...] = ()
    suffix_decides: bool = False
    config_file: str = ""
    codec: Codec | None = None
    embedded: Callable[[Container], Embedded | None] | None = None
    vocabulary: Callable[[Container], Callable[[], Vocabulary] | None] | None = None
    write: Callable[[Job], Written] | None = None
    write_suffixes: tuple[str, ...] = ()
    is_directory: bool = False
    casts: bool = False
    shards: bool = False

    @property
    def dialects(self) -> tuple[str, ...]:
        """The names of the dialects that are usual in it, its own first."""
        others = (dialect.name for dialect in (*DIALECTS, *SAME_NAMES) if self.name in dialect.formats)
        return (self.dialect, *others)


def starts_with(*beginnings: bytes) -> Callable[[bytes, int], bool]:
    """A check of a file's first bytes."""
    return lambda head, size: head.startswith(beginnings)
