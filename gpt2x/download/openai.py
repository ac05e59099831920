"""``openai://``: GPT-2 as OpenAI published it, from the public bucket, into gpt2x's own cache.

A download that was interrupted goes on where it stopped. The index says how long the data are and what each tensor's
CRC-32C is; a folder counts as fetched when all of them have been verified, and then needs no network any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import http
import http.client
import json
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from converters import ConversionError, DestinationError, FormatError, open_checkpoint
from converters.containers.tf_bundle import Entry, open_bundle
from converters.formats.tensorflow import from_hparams
from converters.io.json import read_json
from converters.io.protobuf import Fields
from converters.io.publishing import writing
from converters.io.reading import File
from converters.io.sstable import read_table
from converters.opening import tokenizer_in

from .._version import __version__
from .common import SCHEMES, Bar, Warn, cache_home

URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"  # of the README and download_model.py of openai/gpt-2
SIZES = ("124M", "355M", "774M", "1558M")

INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
SMALL = ("checkpoint", "hparams.json", "encoder.json", "vocab.bpe")
FILES = (*SMALL, INDEX, DATA)
VERIFIED = ".verified"  # in the cache: what each file's size and time were when all had been verified

MAX_SMALL, MAX_INDEX, MAX_DATA = 64 << 20, 1 << 20, 16 << 30  # of 1558M: 1 MB, 25 KB and 6.2 GB
TIMEOUT = 30.0  # seconds without a byte
TRIES, PAUSE = 5, 0.5  # attempts that bring less than PROGRESS bytes, and seconds after the first, then twice as many
FIRST_TRIES = 3  # where nothing has come at all
PROGRESS = 1 << 20
CHUNK = 1 << 18

ADVICE = "\nIs there a network? GPT2X_OPENAI_URL names a mirror, and GPT2X_CACHE a folder in which openai/124M may lie already."

Place = Callable[[int], None]  # told how many bytes of a file are here


def download(source: str, rest: str, progress: Bar | None, warn: Warn) -> Path:
    """Have one of OpenAI's checkpoints on disk, whole and verified.

    Raises:
        ConversionError: as ``gpt2x.fetch``.
    """
    size = rest.removesuffix("/")
    if size not in SIZES:
        raise ConversionError(
            f"{source[:200]}: OpenAI published {SCHEMES['openai']} (117M is now 124M, and 345M is 355M)"
        )
    folder = cache_home() / "openai" / size
    if _is_verified(folder):
        return folder
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, warn):
        if not _is_verified(folder):  # another process may have done it meanwhile
            _fetch(folder, size, progress or _no_bar, warn)
    return folder


def _fetch(folder: Path, size: str, progress: Bar, warn: Warn) -> None:
    """Everything that is missing; what does not verify is fetched anew, once."""
    for last in (False, True):
        _complete(folder, size, progress)
        try:
            _verify(folder, progress)
        except ConversionError as error:
            for name in FILES:
                (folder / name).unlink(missing_ok=True)
            if last:
                raise type(error)(f"{error}\nFetched anew it is no better, and has been removed.") from None
            warn(f"{error}; it is fetched anew")
        else:
            break
    _mark(folder)


def _complete(folder: Path, size: str, progress: Bar) -> None:
    base = _base()
    for name in (*SMALL, INDEX):
        if not _is_sound(folder / name):
            most = MAX_INDEX if name == INDEX else MAX_SMALL
            _receive(f"{base}/{size}/{name}", folder / name, most, None, CHECKS[name], _nothing)
    expected = data_size(folder / INDEX)
    if not _has_size(folder / DATA, expected):
        (folder / DATA).unlink(missing_ok=True)
        _check_space(folder, expected)
        with progress(expected) as advance:
            place = _placed(advance)
            try:
                _receive(f"{base}/{size}/{DATA}", folder / DATA, expected, expected, _no_check, place)
            except _WrongSizeError:
                (folder / INDEX).unlink(missing_ok=True)  # which of the two is old, the next call finds out
                raise


def _base() -> str:
    """Where the models are.

    Raises:
        ConversionError: if ``GPT2X_OPENAI_URL`` is no plain http(s) address. Its value is not shown.
    """
    base = (os.environ.get("GPT2X_OPENAI_URL") or URL).rstrip("/")
    try:
        parts = urllib.parse.urlsplit(base)
        extra = parts.query or parts.fragment or "@" in parts.netloc or parts.port == 0  # port raises for a bad one
        plain = parts.scheme in ("http", "https") and parts.hostname and not extra
    except ValueError:
        plain = False
    if not plain or not re.fullmatch(r"[!-~]+", base):
        raise ConversionError("GPT2X_OPENAI_URL: http://HOST/FOLDER or https://HOST/FOLDER is wanted, nothing behind it and no password in it")  # fmt: skip
    return base


def _check_space(folder: Path, expected: int) -> None:
    here = _size(_part(folder / DATA))
    free = shutil.disk_usage(folder).free
    if free < expected - here:
        raise DestinationError(f"{folder}: {free:,} bytes are free, and {expected - here:,} are needed; GPT2X_CACHE moves the cache elsewhere")  # fmt: skip


# ------------------------------------------------------------------------------------------------- what came


def data_size(index: Path) -> int:
    """How long the file of data is by its index, whose own checksums are verified here.

    Raises:
        FormatError: if it is not the index of one file of data of a sensible length.
    """
    entries = dict(read_table(File(index)))
    header = entries.pop(b"", b"")
    parsed = [Entry.parse(value, f"{index}: {key[:100]!r}") for key, value in entries.items()]
    if Fields(header, f"{index}: header").signed(1) != 1 or any(entry.shard for entry in parsed):
        raise FormatError(f"{index}: not the index of one file of data")
    size = max((entry.offset + entry.size for entry in parsed), default=0)
    if not 0 < size <= MAX_DATA:
        raise FormatError(f"{index}: {size} bytes of data: that cannot be")
    return size


def _check_checkpoint(path: Path) -> None:
    if b"model_checkpoint_path" not in File(path).read(0, min(_size(path), 4096)):
        raise FormatError(f"{path}: not TensorFlow's note of a checkpoint")


def _check_merges(path: Path) -> None:
    if not File(path).read(0, min(_size(path), 16)).startswith(b"#version"):
        raise FormatError(f"{path}: not a table of merges")


def _is_sound(path: Path) -> bool:
    """Whether a small file is here, and what it should be."""
    try:
        CHECKS[path.name](path)
    except ConversionError:
        return False
    return True


def _no_check(path: Path) -> None:
    pass  # it is verified together with the others


CHECKS: dict[str, Callable[[Path], Any]] = {
    "checkpoint": _check_checkpoint,
    "hparams.json": lambda path: from_hparams(read_json(path, MAX_INDEX), str(path)),
    "encoder.json": lambda path: read_json(path, MAX_SMALL),
    "vocab.bpe": _check_merges,
    INDEX: data_size,
}


def _verify(folder: Path, progress: Bar) -> None:
    """Read every tensor, whose checksum is verified thereby, and open the whole as it will be opened.

    Raises:
        ConversionError: if anything about it is not sound.
    """
    tensors = open_bundle(folder / INDEX.removesuffix(".index")).tensors.values()
    with progress(sum(tensor.nbytes for tensor in tensors)) as advance:
        for tensor in tensors:
            for chunk in tensor.chunks():
                (advance or _nothing)(len(chunk))
    open_checkpoint(folder)
    vocabulary = tokenizer_in(folder).vocabulary()
    if len(vocabulary.ids) != 256 + len(vocabulary.merges) + 1:  # bytes, what they merge to, and <|endoftext|>
        raise FormatError(f"{folder}: {len(vocabulary.merges)} merges do not make {len(vocabulary.ids)} tokens")


def _mark(folder: Path) -> None:
    with writing(folder / VERIFIED):
        new = _part(folder / VERIFIED)
        new.write_text(json.dumps(_stamps(folder)))
        os.replace(new, folder / VERIFIED)


def _is_verified(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / VERIFIED).read_text()) == _stamps(folder))
    except (OSError, ValueError):
        return False


def _stamps(folder: Path) -> dict[str, list[int]]:
    return {name: [(s := (folder / name).stat()).st_size, s.st_mtime_ns] for name in FILES}


# ------------------------------------------------------------------------------------------------- how it comes


class _DroppedError(Exception):
    """An attempt failed in a way that another may not."""


class _WrongSizeError(ConversionError):
    """A file is not as long as it must be."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http and https alone, and not from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        allowed = ("https",) if req.type == "https" else ("http", "https")
        if urllib.parse.urlsplit(newurl).scheme not in allowed:
            return None  # the answer itself then comes out as an error
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """An opener that knows no ftp:, file: or data:."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _receive(url: str, path: Path, most: int, exact: int | None, check: Callable[[Path], Any], place: Place) -> None:
    """Have a file of at most ``most`` bytes, or of ``exact`` ones, at ``path``; it appears there whole and checked.

    Raises:
        ConversionError: if it cannot be had. What has come of it is kept where the next call can go on from there.
    """
    part, tries = _part(path), 0
    while True:
        before = _size(part)
        try:
            _attempt(url, part, most, exact, place)
            break
        except _DroppedError as error:
            tries = 1 if _size(part) - before >= PROGRESS else tries + 1
            if tries >= (TRIES if _size(part) else FIRST_TRIES):
                kept = " What has come is kept: the same command goes on from there." if _size(part) else ADVICE
                raise ConversionError(f"{url}: {error}, in {tries} attempts.{kept}") from None
            time.sleep(PAUSE * 2 ** (tries - 1))
        except ConversionError:
            _drop(part)
            raise
    try:
        check(part)
    except ConversionError as error:
        _drop(part)
        raise ConversionError(f"{url}: what came is not the file that was asked for: {error}") from None
    with writing(path):
        os.replace(part, path)
        _stamp(part).unlink(missing_ok=True)


def _attempt(url: str, part: Path, most: int, exact: int | None, place: Place) -> None:
    have, version = _begun(part, most)
    place(have)
    if have == exact:
        return
    headers = {"User-Agent": f"gpt2x/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    with _answer(url, urllib.request.Request(url, headers=headers)) as response:
        if response.status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            if exact is None and have and _range(response) == (None, have) and _same(version, response):
                return  # there was nothing left to come
            _drop(part)
            raise _DroppedError("the server does not go on where the download stopped")
        have, end = _agreed(url, response, part, have, version)
        _check_size(url, end, most, exact)
        place(have)
        here = _copy(url, response, part, have, most, place)
    if here != (exact if exact is not None else end if end is not None else here):
        raise _DroppedError(f"the connection was cut after {here:,} bytes")


def _answer(url: str, request: urllib.request.Request) -> http.client.HTTPResponse:
    """The server's answer: 200, 206 or 416."""
    try:
        response: http.client.HTTPResponse = _opener().open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return error  # type: ignore[return-value]  # which is a response, too
        with error:
            raise _refusal(url, error.code) from None
    except urllib.error.URLError as error:
        raise _unreachable(url, error.reason) from None
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(url, error) from None
    if response.status not in (200, 206):
        response.close()
        raise _refusal(url, response.status)
    return response


def _refusal(url: str, code: int) -> Exception:
    with contextlib.suppress(ValueError):
        phrase = f"{code} ({http.HTTPStatus(code).phrase})"
        if code >= 500 or code in (408, 425, 429):
            return _DroppedError(f"the server answers {phrase}")
        if 300 <= code < 400:
            return ConversionError(f"{url}: redirects to somewhere that is not fetched from")
        advice = "; is GPT2X_OPENAI_URL right?" if os.environ.get("GPT2X_OPENAI_URL") else ""
        return ConversionError(f"{url}: the server answers {phrase}{advice}")
    return ConversionError(f"{url}: the server answers {code}")


def _unreachable(url: str, reason: object) -> Exception:
    if isinstance(reason, ssl.SSLCertVerificationError):
        return ConversionError(f"{url}: the server's certificate is not to be trusted: {reason.verify_message}")
    return _DroppedError(f"cannot be reached: {_words(reason)}")


def _words(reason: object) -> str:
    """What to say of a failure, without the addresses that may be in its text."""
    if isinstance(reason, TimeoutError):
        return "no answer in time"
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return re.sub(r"\w+://\S+", "(an address)", reason)[:100] if isinstance(reason, str) else type(reason).__name__


def _agreed(url: str, response: Any, part: Path, have: int, version: str) -> tuple[int, int | None]:
    """From which byte the answer goes, and where it says that the file ends."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ConversionError(f"{url}: came compressed, though that was not asked for")
    if response.headers.get_content_type() == "text/html":
        raise ConversionError(f"{url}: a web page came, not the file; is there a login or a proxy between?")
    length = response.headers.get("Content-Length", "")
    size = int(length) if re.fullmatch(r"\d{1,15}", length) else None
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        start, total = _range(response)
        if not have or start != have or total is None or not _same(version, response):
            _drop(part)
            raise _DroppedError("the server does not go on where the download stopped")
        return have, total
    _begin(part, response)
    return 0, size


def _check_size(url: str, end: int | None, most: int, exact: int | None) -> None:
    if exact is not None and end not in (None, exact):
        raise _WrongSizeError(f"{url}: has {end:,} bytes there, and by its index {exact:,}; try once more, which fetches both anew")  # fmt: skip
    if end is not None and end > most:
        raise ConversionError(f"{url}: has {end:,} bytes there, which is too many for what it should be (at most {most:,})")  # fmt: skip


def _copy(url: str, response: Any, part: Path, have: int, most: int, place: Place) -> int:
    """Append what comes, never beyond ``most``; how many bytes there are then."""
    with writing(part), open(part, "ab", buffering=0) as file:  # what _read raises is no OSError
        while chunk := _read(response):
            have += len(chunk)
            if have > most:
                raise ConversionError(f"{url}: sends more than the {most:,} bytes that it can have")
            _write(file, chunk)
            place(have)
        os.fsync(file.fileno())
    return have


def _read(response: Any) -> bytes:
    try:
        return bytes(response.read1(CHUNK))
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a chunk's length that is no number
        raise _DroppedError(f"the connection broke: {_words(error)}") from None


def _write(file: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def _begun(part: Path, most: int) -> tuple[int, str]:
    """How much of a file is here, and of which version of it; nothing where the version is not known."""
    have = _size(part)
    try:
        version = _stamp(part).read_text("ascii")
    except (OSError, ValueError):
        version = ""
    return (have, version) if version and have <= most else (0, "")


def _begin(part: Path, response: Any) -> None:
    """An empty file, with a note beside it of the version that will fill it."""
    with writing(part):
        part.write_bytes(b"")
        _stamp(part).write_text(_version(response), "ascii")


def _version(response: Any) -> str:
    """What a server can be asked to go on with: a strong ETag, else the time of the last change, else nothing."""
    tag, changed = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
    return next((v for v in (tag, changed) if re.fullmatch(r'"[!-~]{1,200}|\w{3},[ -~]{1,60}', v)), "")


def _same(version: str, response: Any) -> bool:
    """Whether an answer is of the same version, as far as it says."""
    now = _version(response)
    return not now or now == version or now.startswith('"') != version.startswith('"')


def _range(response: Any) -> tuple[int | None, int | None]:
    """Where a part of a file starts, and how long the whole is."""
    match = re.fullmatch(r"bytes (?:(\d{1,15})-(\d{1,15})|\*)/(\d{1,15})", response.headers.get("Content-Range", ""))
    if not match or (match[2] and int(match[2]) + 1 != int(match[3])):
        return None, None
    return (int(match[1]) if match[1] else None), int(match[3])


# ----------------------------------------------------------------------------------------------- names on the disk


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _stamp(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


def _drop(part: Path) -> None:
    for path in (part, _stamp(part)):
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and _size(path) == size


@contextlib.contextmanager
def _alone(folder: Path, warn: Warn) -> Iterator[None]:
    """Keep every other process out of a folder of the cache."""
    with writing(folder / ".lock"):
        fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with writing(folder / ".lock"):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                warn(f"another process is fetching into {folder}; waiting for it")
                fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _no_bar(total: int) -> Iterator[None]:
    yield None


def _placed(advance: Callable[[int], None] | None) -> Place:
    """Tell a bar, which counts forward and back, where a download is."""
    shown = 0

    def place(position: int) -> None:
        nonlocal shown
        if advance and position != shown:
            advance(position - shown)
        shown = position

    return place


def _nothing(count: int) -> None:
    pass
