"""``openai://``: GPT-2 as OpenAI published it, downloaded from the public bucket into gpt2x's cache.

The index gives the length of the data and the CRC-32C of each tensor. A folder of the cache is complete when all of
them have been verified; it needs no network any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from converters import ConversionError, DestinationError, FormatError, open_checkpoint
from converters.containers.tf_bundle import Entry, open_bundle
from converters.formats.tensorflow import from_hparams
from converters.io.json import read_json
from converters.io.protobuf import Fields
from converters.io.publishing import writing
from converters.io.reading import File
from converters.io.sstable import read_table
from converters.opening import tokenizer_in

from .common import SCHEMES, Advance, ProgressBar, Warn, cache_home, ignore

if TYPE_CHECKING:
    import httpx2

URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"  # of the README and download_model.py of openai/gpt-2
SIZES = ("124M", "355M", "774M", "1558M")

INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
SMALL = ("checkpoint", "hparams.json", "encoder.json", "vocab.bpe")
FILES = (*SMALL, INDEX, DATA)
VERIFIED = ".verified"  # in the cache: size and time of modification of each file when all of them were verified
LOCK = ".lock"

MAX_SMALL, MAX_INDEX, MAX_DATA = 64 << 20, 1 << 20, 16 << 30  # bytes; those of 1558M are 1 MB, 25 kB and 6.2 GB


def download(source: str, rest: str, progress: ProgressBar | None, warn: Warn) -> Path:
    """Return the folder of one of OpenAI's checkpoints, complete and verified.

    Raises:
        ConversionError: as ``gpt2x.fetch``.
        ModuleNotFoundError: if filelock, or where something has to be downloaded httpx2, is not installed.
    """
    size = rest.removesuffix("/")
    if size not in SIZES:
        raise ConversionError(
            f"{source[:200]}: unknown model; OpenAI published {SCHEMES['openai']} (117M is now 124M, and 345M is 355M)"
        )
    folder = cache_home() / "openai" / size
    if _is_verified(folder):
        return folder
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, warn):
        # Another process may have downloaded it while this one waited.
        if not _is_verified(folder):
            _download_and_verify(folder, size, progress or _no_bar, warn)
    return folder


@contextlib.contextmanager
def _locked(folder: Path, warn: Warn) -> Iterator[None]:
    """Keep every other process out of a folder of the cache."""
    import filelock

    lock = filelock.FileLock(folder / LOCK)
    with writing(folder / LOCK):
        try:
            # Without waiting at first, so that the user is told before a long wait.
            lock.acquire(blocking=False)
        except filelock.Timeout:
            warn(f"another process is downloading into {folder}; waiting for it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _download_and_verify(folder: Path, size: str, progress: ProgressBar, warn: Warn) -> None:
    """Download what is missing. If it fails verification, download everything again, once."""
    _complete(folder, size, progress)
    damage = _damage(folder, progress)
    if damage:
        warn(f"{damage}; downloading it again")
        _complete(folder, size, progress)
        damage = _damage(folder, progress)
    if damage:
        raise type(damage)(f"{damage}\nDownloading it again failed verification, too; the files were removed.")
    _mark_verified(folder)


# ----------------------------------------------------------------------------------------------------- downloads


def _complete(folder: Path, size: str, progress: ProgressBar) -> None:
    """Download each file that is missing or, as far as can be seen without reading all of it, damaged."""
    missing = [name for name in (*SMALL, INDEX) if not _is_valid(folder / name)]
    if not missing and _has_data(folder):
        return
    from .transfer import http_client

    base = f"{_base_url()}/{size}"
    with http_client() as client:
        for name in missing:
            _download_small(client, f"{base}/{name}", folder / name)
        if not _has_data(folder):
            _download_data(client, f"{base}/{DATA}", folder, progress)


def _has_data(folder: Path) -> bool:
    """Whether the file of data has the size that the index gives."""
    path = folder / DATA
    return path.is_file() and path.stat().st_size == data_size(folder / INDEX)


def _download_small(client: httpx2.Client, url: str, path: Path) -> None:
    from .transfer import Target, download

    max_bytes = MAX_INDEX if path.name == INDEX else MAX_SMALL
    download(client, Target(url, path, max_bytes), CHECKS[path.name], ignore)


def _download_data(client: httpx2.Client, url: str, folder: Path, progress: ProgressBar) -> None:
    from .transfer import PartialFile, SizeError, Target, download

    target = Target(url, folder / DATA, data_size(folder / INDEX), exact=True)
    target.path.unlink(missing_ok=True)
    _check_space(folder, target.max_bytes - PartialFile(target.path).size)
    with progress(target.max_bytes) as advance:
        try:
            download(client, target, ignore, _steps(advance))
        except SizeError:
            # The index may be the outdated one of the two, so the next call downloads it again.
            (folder / INDEX).unlink(missing_ok=True)
            raise


def _base_url() -> str:
    """Return the address of the folder of models.

    Raises:
        ConversionError: if ``GPT2X_OPENAI_URL`` is no plain http(s) address. Its value is not shown.
    """
    base = (os.environ.get("GPT2X_OPENAI_URL") or URL).rstrip("/")
    if not re.fullmatch(r"[!-~]+", base) or not _is_plain(base):
        raise ConversionError(
            "GPT2X_OPENAI_URL: not a valid mirror; set it to http://HOST/FOLDER or https://HOST/FOLDER, "
            "without a query and without a password"
        )
    return base


def _is_plain(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    extra = parts.query or parts.fragment or "@" in parts.netloc or port == 0
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not extra


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DestinationError(
            f"{folder}: {needed:,} bytes needed, the disk has {free:,} free; GPT2X_CACHE moves the cache elsewhere"
        )


# -------------------------------------------------------------------------------------------------- verification


def data_size(index: Path) -> int:
    """Return the size of the file of data in bytes, as its index gives it. The index's own checksums are verified.

    Raises:
        FormatError: if it is not the index of a single file of data, or the size exceeds the limit.
    """
    entries = dict(read_table(File(index)))
    header = entries.pop(b"", b"")
    parsed = [Entry.parse(value, f"{index}: {key[:100]!r}") for key, value in entries.items()]
    shards = Fields(header, f"{index}: header").signed(1)
    if shards != 1 or any(entry.shard for entry in parsed):
        raise FormatError(f"{index}: not the index of a single file of data")
    size = max((entry.offset + entry.size for entry in parsed), default=0)
    if not 0 < size <= MAX_DATA:
        raise FormatError(f"{index}: invalid size of the data: {size:,} bytes (the limit is {MAX_DATA:,})")
    return size


def _check_checkpoint(path: Path) -> None:
    if b"model_checkpoint_path" not in _start_of(path, 4096):
        raise FormatError(f"{path}: not TensorFlow's checkpoint state file")


def _check_hparams(path: Path) -> None:
    from_hparams(read_json(path, MAX_INDEX), str(path))


def _check_encoder(path: Path) -> None:
    read_json(path, MAX_SMALL)


def _check_merges(path: Path) -> None:
    if not _start_of(path, 16).startswith(b"#version"):
        raise FormatError(f"{path}: not a file of BPE merges")


def _start_of(path: Path, count: int) -> bytes:
    file = File(path)
    return file.read(0, min(file.size, count))


CHECKS: dict[str, Callable[[Path], object]] = {
    "checkpoint": _check_checkpoint,
    "hparams.json": _check_hparams,
    "encoder.json": _check_encoder,
    "vocab.bpe": _check_merges,
    INDEX: data_size,
}


def _is_valid(path: Path) -> bool:
    """Whether a small file exists and passes its check."""
    try:
        CHECKS[path.name](path)
    except ConversionError:
        return False
    return True


def _damage(folder: Path, progress: ProgressBar) -> ConversionError | None:
    """Verify a folder. Where that fails, remove its files and return the error."""
    try:
        _verify(folder, progress)
    except ConversionError as error:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        return error
    return None


def _verify(folder: Path, progress: ProgressBar) -> None:
    """Verify the checksum of every tensor, and open the checkpoint and its tokenizer.

    Raises:
        ConversionError: if anything is damaged, or the files do not belong together.
    """
    tensors = open_bundle(folder / INDEX.removesuffix(".index")).tensors.values()
    with progress(sum(tensor.nbytes for tensor in tensors)) as advance:
        advance = advance or ignore
        for tensor in tensors:
            for chunk in tensor.chunks():  # which verifies the checksum at the tensor's end
                advance(len(chunk))
    open_checkpoint(folder)
    vocabulary = tokenizer_in(folder).vocabulary()
    expected = 256 + len(vocabulary.merges) + 1  # bytes, what the merges make of them, and <|endoftext|>
    if len(vocabulary.ids) != expected:
        raise FormatError(
            f"{folder}: {len(vocabulary.merges)} merges need {expected} tokens, encoder.json has {len(vocabulary.ids)}"
        )


def _mark_verified(folder: Path) -> None:
    mark = folder / VERIFIED
    with writing(mark):
        new = mark.with_name(f"{VERIFIED}.part")
        new.write_text(json.dumps(_stamps(folder)))
        os.replace(new, mark)


def _is_verified(folder: Path) -> bool:
    """Whether a folder was verified, and its files have not changed since."""
    try:
        stamps = json.loads((folder / VERIFIED).read_text())
        return bool(stamps == _stamps(folder))
    except (OSError, ValueError):
        return False


def _stamps(folder: Path) -> dict[str, list[int]]:
    stamps = {}
    for name in FILES:
        stat = (folder / name).stat()
        stamps[name] = [stat.st_size, stat.st_mtime_ns]
    return stamps


# ------------------------------------------------------------------------------------------------------ progress


@contextlib.contextmanager
def _no_bar(total: int) -> Iterator[None]:
    yield None


def _steps(advance: Advance | None) -> Callable[[int], None]:
    """Return a function that is told the bytes on disk, and advances a bar by the difference to the last call."""
    shown = 0

    def report(size: int) -> None:
        nonlocal shown
        if advance and size != shown:
            advance(size - shown)
        shown = size

    return report
