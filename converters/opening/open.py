"""Step 2: open the container, recognised by its first bytes."""

from __future__ import annotations

import glob
from pathlib import Path

from ..containers.container import Container
from ..containers.shard_index import open_shards
from ..containers.tf_bundle import V1, open_bundle
from ..errors import FormatError
from ..formats import FORMATS, INDEXES
from ..formats.format import Opener
from ..io import sstable
from ..io.reading import File
from .find import Source
from .select_entry import select_entry

HEAD = 512  # bytes that tell the format
LLMC_STATES = tuple(number.to_bytes(4, "little") for number in (20240327, 20240527))  # of its tests, of its optimizer
WEB_PAGES = (b"<!doctype", b"<html", b"<?xml")


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
    for suffix, open_index in INDEXES.items():
        if source.weights.name.endswith(suffix):
            return select_entry(open_index(source.weights), entry)
    if source.weights.name.endswith(".index.json"):
        return open_shards(source.weights, lambda path: open_file(path, entry))
    return open_file(source.weights, entry)


def open_file(path: Path, entry: str | None = None) -> Container:
    """Open one file of any format that its first bytes tell."""
    return select_entry(_open_any(path), entry)


def _open_any(path: Path) -> Container:
    file = File(path)
    head = file.read(0, min(file.size, HEAD))
    opener = _opener(head, file.size)
    if opener and not opener.uncertain:
        return opener.open(path)
    fault = _lookalike_fault(file, head)
    if fault:
        raise FormatError(f"{path}: {fault}")
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
    name = glob.escape(prefix.name)
    for path in sorted([*prefix.parent.glob(f"{name}.index"), *prefix.parent.glob(f"{name}.data-*")]):
        if path.is_file():
            _refuse_failed_download(path)
    return open_bundle(prefix)


def _refuse_failed_download(path: Path) -> None:
    file = File(path)
    fault = _download_fault(file.read(0, min(file.size, HEAD)))
    if fault:
        raise FormatError(f"{path}: {fault}")


# ------------------------------------------------------------------------- files that people take for weights


def _download_fault(head: bytes) -> str | None:
    """What is wrong with a file that a failed download left, by its first bytes; None if it is none."""
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run 'git lfs pull' in the repository that it comes from"
    if head.lstrip()[:64].lower().startswith(WEB_PAGES):
        return "a web page, not weights; the download fetched the page that shows the file. Download the file itself"
    return None


def _lookalike_fault(file: File, head: bytes) -> str | None:
    """What a file is if not weights; None if that is not known."""
    if not head:
        return "an empty file"
    fault = _download_fault(head)
    if fault:
        return fault
    if head[257:262] == b"ustar" or head.startswith((b"\x1f\x8b", b"BZh")):
        return "a tar or a compressed archive; unpack it first"
    if head.lstrip().startswith(b"{") and file.path.suffix == ".json":
        return "JSON, not weights; pass the directory that it is in"
    if head[4:8] == b"TFL3":
        return (
            "a TensorFlow Lite model, which is a program and not weights; convert the checkpoint that it was made from"
        )
    if head[:4] in LLMC_STATES:
        return "the state of an llm.c run, not its weights; pass the file of weights, whose magic number is 20240326"
    if _is_table(file):
        return V1
    if head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5:
        return "a pickle, but not one of torch.save: refused"
    return None


def _is_table(file: File) -> bool:
    """Whether the file ends as a table of LevelDB's does, which a TensorFlow V1 checkpoint is."""
    if file.size < sstable.FOOTER:
        return False
    return file.read(file.size - 8, 8) == sstable.MAGIC.to_bytes(8, "little")
