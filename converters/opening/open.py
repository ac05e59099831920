"""Step 2: open the container, recognised by its first bytes."""

from __future__ import annotations

import glob
from functools import partial
from pathlib import Path

from ..containers.container import Container
from ..containers.shard_index import open_index, open_shards
from ..containers.tf_bundle import open_bundle
from ..errors import FormatError
from ..formats import FORMATS, INDEXES
from ..formats.format import Opener
from ..io.reading import File
from .find import Source
from .select_entry import select_entry
from .situations import HEAD, advice_on_download, advice_on_file


def open_container(source: Source, entry: str | None = None) -> Container:
    """Open the file of weights, or the files that it names.

    Args:
        source: where the weights are.
        entry: the place of the tensors in the file, if it holds several models.

    Raises:
        FormatError: if it is not of a known format, or not valid.
        CheckpointError: if it holds several models, or nothing at ``entry``.
    """
    if source.is_bundle:
        return select_entry(_open_bundle(source.weights), entry)
    for suffix, open_set in INDEXES.items():
        if source.weights.name.endswith(suffix):
            return select_entry(open_set(source.weights), entry)
    if source.weights.name.endswith(".index.json"):
        return open_index(source.weights, partial(open_file, entry=entry))
    if source.shards:
        return open_shards(source.shards, partial(open_file, entry=entry))
    return open_file(source.weights, entry)


def open_file(path: Path, entry: str | None = None) -> Container:
    """Open one file of any format that its first bytes tell."""
    return select_entry(_open_any(path), entry)


def _open_any(path: Path) -> Container:
    file = File(path)
    head = file.read(0, min(file.size, HEAD))
    opener = _opener(head, file.size)
    # The order matters: an opener that is not certain would take files that are no weights, or damaged ones of other
    # formats.
    if opener and not opener.uncertain:
        return opener.open(path)
    advice = advice_on_file(file, head)
    if advice:
        raise FormatError(f"{path}: {advice}")
    by_suffix = _opener_of_suffix(path)
    if by_suffix:
        return by_suffix.open(path)
    if opener:
        return opener.open(path)
    raise FormatError(f"{path}: unknown format; run 'gpt2x formats' for a list of those that are read")


def _opener(head: bytes, size: int) -> Opener | None:
    for entry in FORMATS:
        for opener in entry.openers:
            if opener.matches(head, size):
                return opener
    return None


def _opener_of_suffix(path: Path) -> Opener | None:
    """So that a damaged file is refused by the reader of its format, which says what is wrong."""
    for entry in FORMATS:
        if path.suffix in entry.suffixes and entry.suffix_decides:
            return entry.openers[0]
    return None


def _open_bundle(prefix: Path) -> Container:
    # Git LFS and web pages leave text in place of a file, which the readers below would call damaged.
    name = glob.escape(prefix.name)
    for path in sorted([*prefix.parent.glob(f"{name}.index"), *prefix.parent.glob(f"{name}.data-*")]):
        if path.is_file():
            _refuse_failed_download(path)
    return open_bundle(prefix)


def _refuse_failed_download(path: Path) -> None:
    file = File(path)
    advice = advice_on_download(file, file.read(0, min(file.size, HEAD)))
    if advice:
        raise FormatError(f"{path}: {advice}")
