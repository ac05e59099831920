"""Download one file over HTTP or HTTPS, with httpx2.

The bytes go to ``NAME.part``, and the version of the file (its ETag or its time of modification) to
``NAME.part.version``. An interrupted download is resumed if the server still has that version, and is started over
if it has another one. The file gets its own name when it is complete and valid.

httpx2 can retry a connection, but not resume a body; so the attempts are counted here.
"""

from __future__ import annotations

import http
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from converters import ConversionError
from converters.io.publishing import writing

from .._version import __version__

TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 5  # failed attempts in a row, where one that brings PROGRESS bytes starts the count again
FIRST_ATTEMPTS = 3  # as long as nothing of the file has arrived
PROGRESS = 1 << 20
PAUSE = 0.5  # seconds after the first failed attempt; they double with each further one
MAX_REDIRECTS = 10

RESUME = " The bytes that arrived are kept: run the same command again to resume."
ADVICE = "\nIs there a network? GPT2X_OPENAI_URL selects a mirror. GPT2X_CACHE selects a cache that may hold openai/124M already."

Report = Callable[[int], None]  # called with the number of bytes that are on disk, which drops when a download restarts


class SizeError(ConversionError):
    """The server's file does not have the size that it must have."""


class _TemporaryError(Exception):
    """An attempt failed, and another one may succeed."""


@dataclass(frozen=True)
class Target:
    """What to download, where to put it, and how long it may be."""

    url: str
    path: Path
    max_bytes: int
    exact: bool = False  # whether it must have exactly max_bytes


class PartialFile:
    """What has arrived of a file, and a note of the version that it belongs to."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(f"{path.name}.part")
        self.note = path.with_name(f"{path.name}.part.version")

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return size_of(self.path)

    @property
    def version(self) -> str:
        """The server's name for the version; empty if it is unknown."""
        try:
            return self.note.read_text("ascii")
        except (OSError, ValueError):
            return ""

    def resumable(self, max_bytes: int) -> int:
        """Return the number of bytes after which a download can be resumed."""
        usable = self.version and self.size <= max_bytes
        return self.size if usable else 0

    def start(self, version: str) -> None:
        """Start over with an empty file."""
        with writing(self.path):
            self.path.write_bytes(b"")
            self.note.write_text(version, "ascii")

    def remove(self) -> None:
        """Forget what has arrived."""
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def publish(self, path: Path) -> None:
        """Give the complete file its name."""
        with writing(path):
            os.replace(self.path, path)
            self.note.unlink(missing_ok=True)


@contextmanager
def http_client() -> Iterator[httpx2.Client]:
    """An HTTP client with the proxies and the certificates that the environment names.

    Raises:
        ConversionError: if these cannot be used. A proxy's address is not shown, as it can hold a password.
    """
    # A compressed body would have other lengths and offsets than the file.
    headers = {"User-Agent": f"gpt2x/{__version__}", "Accept-Encoding": "identity"}
    try:
        client = httpx2.Client(headers=headers, timeout=TIMEOUT)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConversionError(f"SSL_CERT_FILE or SSL_CERT_DIR: cannot read the certificates: {reason}") from None
    except (ImportError, ValueError, httpx2.InvalidURL):
        raise ConversionError(
            "http_proxy, https_proxy or all_proxy: unsupported proxy; set it to http://HOST:PORT (SOCKS needs: pip install socksio)"
        ) from None
    with client:
        yield client


def download(client: httpx2.Client, target: Target, check: Callable[[Path], object], report: Report) -> None:
    """Download a file, which appears at its path when it is complete and valid.

    Args:
        check: raises ConversionError if a complete file is not valid.

    Raises:
        SizeError: if the server's file is not as long as it must be.
        ConversionError: if the download fails. What has arrived is kept where it can be resumed.
    """
    part = PartialFile(target.path)
    try:
        _complete(client, target, part, report)
    except ConversionError:
        part.remove()
        raise
    except _TemporaryError as error:
        raise ConversionError(f"{target.url}: {error}{RESUME if part.size else ADVICE}") from None
    try:
        check(part.path)
    except ConversionError as error:
        part.remove()
        raise ConversionError(f"{target.url}: the downloaded file is not valid: {error}") from None
    part.publish(target.path)


def size_of(path: Path) -> int:
    """Return the size of a file in bytes; 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


# ------------------------------------------------------------------------------------------------------ attempts


def _complete(client: httpx2.Client, target: Target, part: PartialFile, report: Report) -> None:
    """Repeat attempts until the partial file is complete.

    Raises:
        _TemporaryError: if too many attempts in a row fail.
    """
    failures = 0
    while True:
        before = part.size
        try:
            _attempt(client, target, part, report)
            return
        except _TemporaryError as error:
            advanced = part.size - before >= PROGRESS
            failures = 1 if advanced else failures + 1
            allowed = ATTEMPTS if part.size else FIRST_ATTEMPTS
            if failures >= allowed:
                raise _TemporaryError(f"{error} ({failures} attempts).") from None
            time.sleep(PAUSE * 2 ** (failures - 1))


def _attempt(client: httpx2.Client, target: Target, part: PartialFile, report: Report) -> None:
    start = part.resumable(target.max_bytes)
    report(start)
    if target.exact and start == target.max_bytes:
        return
    # With If-Range, the server sends the whole file (200, not 206) if it has another version.
    headers = {"Range": f"bytes={start}-", "If-Range": part.version} if start else {}
    with _response(client, target.url, headers) as response:
        if response.status_code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            _check_complete(target, part, response, start)
            return
        start, total = _begin(target, part, response, start)
        _check_size(target, total)
        report(start)
        end = _save(target, part, response, start, report)
    expected = target.max_bytes if target.exact else total
    if expected is not None and end != expected:
        raise _TemporaryError(f"the connection was closed after {end:,} bytes")


def _check_complete(target: Target, part: PartialFile, response: httpx2.Response, start: int) -> None:
    """Accept an answer that there is nothing after ``start``, if that is where the file ends."""
    nothing_left = start and _content_range(response) == (None, start) and _same_version(part, response)
    if target.exact or not nothing_left:
        raise _cannot_resume(part)


def _begin(target: Target, part: PartialFile, response: httpx2.Response, start: int) -> tuple[int, int | None]:
    """Return the position of the answer's first byte, and the size of the whole file where the server states it."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ConversionError(f"{target.url}: the server sent a compressed file, which was not requested")
    if response.headers.get("Content-Type", "").partition(";")[0].strip().lower() == "text/html":
        raise ConversionError(
            f"{target.url}: the server sent a web page instead of the file; does a login page or a proxy intervene?"
        )
    if response.status_code == http.HTTPStatus.PARTIAL_CONTENT:
        first, total = _content_range(response)
        if not start or first != start or total is None or not _same_version(part, response):
            raise _cannot_resume(part)
        return start, total
    part.start(_version(response))
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if re.fullmatch(r"\d{1,15}", length) else None


def _cannot_resume(part: PartialFile) -> _TemporaryError:
    part.remove()
    return _TemporaryError("the server cannot resume the download")


def _check_size(target: Target, total: int | None) -> None:
    if total is None:
        return
    if target.exact and total != target.max_bytes:
        raise SizeError(
            f"{target.url}: {target.max_bytes:,} bytes expected from the index, the server has {total:,}; "
            "run the command again to download both"
        )
    if total > target.max_bytes:
        raise ConversionError(f"{target.url}: {total:,} bytes exceed the limit of {target.max_bytes:,}")


def _save(target: Target, part: PartialFile, response: httpx2.Response, size: int, report: Report) -> int:
    """Append the answer's bytes, never beyond the limit, and return the size of the partial file."""
    with writing(part.path), open(part.path, "ab") as file:
        for chunk in response.iter_raw():
            size += len(chunk)
            if size > target.max_bytes:
                raise ConversionError(
                    f"{target.url}: the server sends more than the limit of {target.max_bytes:,} bytes"
                )
            file.write(chunk)
            report(size)
        file.flush()
        os.fsync(file.fileno())
    return size


def _version(response: httpx2.Response) -> str:
    """Return what names the file's version in a later request: a strong ETag, or else the time of modification."""
    for name in ("ETag", "Last-Modified"):
        value: str = response.headers.get(name, "")
        if re.fullmatch(r'"[!-~]{1,200}|\w{3},[ -~]{1,60}', value):
            return value
    return ""


def _same_version(part: PartialFile, response: httpx2.Response) -> bool:
    """Whether an answer is of the partial file's version, as far as the two can be compared."""
    now = _version(response)
    before = part.version
    comparable = now and now.startswith('"') == before.startswith('"')
    return not comparable or now == before


def _content_range(response: httpx2.Response) -> tuple[int | None, int | None]:
    """Return the position of the first byte, and the size of the whole file; None where the server does not state them.

    A range that does not go to the file's end is not what was requested.
    """
    text = response.headers.get("Content-Range", "")
    if match := re.fullmatch(r"bytes \*/(\d{1,15})", text):
        return None, int(match[1])
    match = re.fullmatch(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})", text)
    if not match or int(match[2]) + 1 != int(match[3]):
        return None, None
    return int(match[1]), int(match[3])


# ------------------------------------------------------------------------------------------- requests and errors


@contextmanager
def _response(client: httpx2.Client, url: str, headers: dict[str, str]) -> Iterator[httpx2.Response]:
    """The server's answer with status 200, 206 or 416, whose body is still to be read."""
    try:
        request = client.build_request("GET", url, headers=headers)
        with closing(_send(client, request)) as response:
            if response.status_code not in (200, 206, 416):
                raise _status_error(url, response.status_code)
            yield response
    except httpx2.InvalidURL:
        raise ConversionError(f"{url}: not a valid address") from None
    except httpx2.TransportError as error:
        raise _connection_error(url, error) from None


def _send(client: httpx2.Client, request: httpx2.Request) -> httpx2.Response:
    """Send a request and follow redirects, but not from https to http, nor to anything else than a web server.

    The bodies of redirects are not read, since they may be of any length.
    """
    first = request.url
    for _ in range(MAX_REDIRECTS + 1):
        response = client.send(request, stream=True)
        following = response.next_request
        if following is None:
            return response
        response.close()
        allowed = ("https",) if request.url.scheme == "https" else ("http", "https")
        if following.url.scheme not in allowed:
            raise ConversionError(f"{first}: the server redirects to an address that gpt2x does not follow")
        request = following
    raise ConversionError(f"{first}: more than {MAX_REDIRECTS} redirects")


def _status_error(url: str, status: int) -> Exception:
    try:
        answer = f"the server answers {status} ({http.HTTPStatus(status).phrase})"
    except ValueError:
        return ConversionError(f"{url}: the server answers {status}")
    if status >= 500 or status in (408, 425, 429):
        return _TemporaryError(answer)
    advice = "; is GPT2X_OPENAI_URL correct?" if os.environ.get("GPT2X_OPENAI_URL") else ""
    return ConversionError(f"{url}: {answer}{advice}")


def _connection_error(url: str, error: httpx2.TransportError) -> Exception:
    if certificate := _certificate_error(error):
        return ConversionError(f"{url}: the server's certificate is not trusted: {certificate.verify_message}")
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
        return _TemporaryError(f"cannot connect: {_reason(error)}")
    return _TemporaryError(f"the connection was lost: {_reason(error)}")


def _certificate_error(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """Return the error of a certificate that another error was raised for."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _reason(error: httpx2.TransportError) -> str:
    """Return what to say of a failure, without the addresses that can be in its text."""
    if isinstance(error, httpx2.TimeoutException):
        return f"no answer in {TIMEOUT:.0f} seconds"
    text = re.sub(r"^\[Errno -?\d+\] ", "", str(error))
    text = re.sub(r"\w+://\S+", "(an address)", text)
    return text[:100] or type(error).__name__
