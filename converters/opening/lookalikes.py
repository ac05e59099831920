"""Files that people take for weights, and what to do instead."""

from __future__ import annotations

from ..containers import tf_bundle
from ..io import sstable
from ..io.reading import File

LLMC_STATES = tuple(number.to_bytes(4, "little") for number in (20240327, 20240527))  # of its tests, of its optimizer
WEB_PAGES = (b"<!doctype", b"<html", b"<?xml")


def download_fault(head: bytes) -> str | None:
    """What is wrong with a file that a failed download left, by its first bytes; None if it is none."""
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run 'git lfs pull' in the repository that it comes from"
    if head.lstrip()[:64].lower().startswith(WEB_PAGES):
        return "a web page, not weights; the download fetched the page that shows the file. Download the file itself"
    return None


def lookalike_fault(file: File, head: bytes) -> str | None:
    """What a file is if not weights; None if that is not known."""
    if not head:
        return "an empty file"
    fault = download_fault(head)
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
        return tf_bundle.V1
    if head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5:
        return "a pickle, but not one of torch.save: refused"
    return None


def _is_table(file: File) -> bool:
    """Whether the file ends as a table of LevelDB's does, which a TensorFlow V1 checkpoint is."""
    if file.size < sstable.FOOTER:
        return False
    return file.read(file.size - 8, 8) == sstable.MAGIC.to_bytes(8, "little")
