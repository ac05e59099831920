"""Who may use the server, and how large and slow a request may be."""

from __future__ import annotations

import asyncio
import hmac

from starlette.requests import ClientDisconnect, Request

from .faults import ServingError
from .settings import Settings

MIN_KEY = 8  # characters


def check_framing(request: Request) -> None:
    """Refuse a body whose end is stated twice: a proxy in front of the server may see another end, and another request after it.

    Raises:
        ServingError: if there are both ``Content-Length`` and ``Transfer-Encoding``.
    """
    if "content-length" in request.headers and "transfer-encoding" in request.headers:
        raise ServingError(
            "invalid_http", "the request has both Content-Length and Transfer-Encoding: send one of them"
        )


def check_key(request: Request, keys: tuple[bytes, ...]) -> None:
    """Refuse a request without a valid API key.

    Raises:
        ServingError: if there are keys, and it has none of them.
    """
    if not keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    key = given.strip().encode("utf-8", "replace")
    # Every key is compared in full, so that the time says nothing of any.
    matches = [hmac.compare_digest(key, known) for known in keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise ServingError("invalid_api_key", "a valid API key is needed: Authorization: Bearer KEY")


def check_host(request: Request, allowed: frozenset[str] | None) -> None:
    """Refuse a request to another host, which a web page of a stranger sends through the browser of a user.

    Raises:
        ServingError: if the ``Host`` header names a host that is not allowed.
    """
    if allowed is None:
        return
    host = request.headers.get("host", "")
    name = host.rsplit(":", 1)[0] if host.rsplit(":", 1)[-1].isdigit() else host
    if name.strip("[]").lower() not in allowed:
        raise ServingError(
            "host_not_allowed", f"the Host header is {host[:100]!r}: start the server with --allowed-host, or --api-key"
        )


async def read_body(request: Request, settings: Settings) -> bytes:
    """The body of a request with JSON.

    Raises:
        ServingError: if it is not JSON by its media type, compressed, too large, or too slow.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ServingError("unsupported_media_type", "the body must be JSON: Content-Type: application/json")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ServingError(
            "unsupported_media_type", f"the body must not be compressed: leave out Content-Encoding: {encoding[:30]}"
        )
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > settings.max_body:
        raise _too_large(settings)
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > settings.max_body:
                    raise _too_large(settings)
    except TimeoutError:
        raise ServingError(
            "request_timeout", f"the body did not arrive within {settings.body_timeout:g} seconds"
        ) from None
    except ClientDisconnect:
        raise ServingError("request_timeout", "the client disconnected before the body was complete") from None
    return bytes(body)


def _too_large(settings: Settings) -> ServingError:
    return ServingError("request_too_large", f"the body exceeds the limit of {settings.max_body} bytes")


def parse_keys(text: str) -> tuple[bytes, ...]:
    """The keys of a file: one a line; empty lines and lines with ``#`` are left out.

    Raises:
        ValueError: if there is none, or one is too short, or holds what no header can.
    """
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if len(key) < MIN_KEY:
            raise ValueError(f"line {number}: the key has fewer than {MIN_KEY} characters")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"line {number}: a key holds printable ASCII characters only, without spaces")
        keys.append(key.encode())
    if not keys:
        raise ValueError("no key in it: write one key a line")
    return tuple(keys)
