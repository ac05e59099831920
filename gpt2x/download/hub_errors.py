"""What went wrong between huggingface_hub and the Hub, in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from converters import ConversionError

# The exceptions of huggingface_hub and its HTTP libraries, by the names of their classes, which outlast versions. A
# subclass comes before its base class.
REFUSED = {
    "GatedRepoError": "gated repository: accept its terms on its page, then log in (hf auth login) or set HF_TOKEN",
    "DisabledRepoError": "the Hub has disabled this repository",
    "RepositoryNotFoundError": "no such repository on the Hub, or a private one: check the name, or log in (hf auth login) or set HF_TOKEN",
    "RevisionNotFoundError": "the repository has no such revision: check what follows the @",
    "EntryNotFoundError": "the Hub lists a file that it does not have: try again later",
}
STATUS = {
    401: "the Hub rejects this login: log in again (hf auth login), or correct or unset HF_TOKEN",
    403: "this login has no access: check HF_TOKEN, and the terms on the model's page",
    404: "not found on the server: is HF_ENDPOINT correct?",
    429: "too many requests to the Hub: try again later, or log in (hf auth login)",
}
UNREACHABLE = {
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, so nothing is requested",
    "ProxyError": "cannot connect to the Hub through the proxy",
    "TimeoutException": "the Hub does not answer",
    "Timeout": "the Hub does not answer",
    "ConnectError": "cannot connect to the Hub",
    "TransportError": "the connection to the Hub was lost",
    "ConnectionError": "cannot connect to the Hub",
    "LocalEntryNotFoundError": "cannot connect to the Hub",
}


class UnreachableError(ConversionError):
    """The Hub cannot be reached now; ``intended`` if the user has forbidden requests."""

    intended = False


@contextmanager
def translated(source: str) -> Iterator[None]:
    """Turn any exception of huggingface_hub into an error of one line, which begins with ``source``."""
    try:
        yield
    except (ConversionError, ImportError, MemoryError):
        raise
    except Exception as error:  # its versions have used three HTTP libraries and one in Rust
        raise explained(source, error) from error


def explained(source: str, error: Exception) -> ConversionError:
    """Return the error to show for an exception of huggingface_hub. It has no addresses, which can hold signatures."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    status = getattr(getattr(error, "response", None), "status_code", None)
    refusal = _first_text(REFUSED, kinds)
    # LocalEntryNotFoundError is an EntryNotFoundError, but means that the Hub was not asked.
    if refusal and "LocalEntryNotFoundError" not in kinds:
        return ConversionError(f"{source}: {refusal}")
    if status in STATUS:
        return ConversionError(f"{source}: {STATUS[status]}")
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return ConversionError(f"{source}: {_disk_error(error)}; HF_HOME moves the cache elsewhere")
    reason = _first_text(UNREACHABLE, kinds)
    if reason is None and status is not None:
        reason = f"the Hub answers with status {status}: try again later"
    if reason:
        unreachable = UnreachableError(f"{source}: {reason}")
        unreachable.intended = "OfflineModeIsEnabled" in kinds
        return unreachable
    first_line = str(error).strip().split("\n")[0]
    text = re.sub(r"\w+://\S+", "(an address)", first_line)[:200]
    return ConversionError(f"{source}: huggingface_hub failed: {type(error).__name__}: {text}")


def _first_text(texts: Mapping[str, str], kinds: list[str]) -> str | None:
    return next((text for name, text in texts.items() if name in kinds), None)


def _disk_error(error: OSError) -> str:
    where = error.filename or "the Hub's cache"
    return f"{where}: {os.strerror(error.errno or 0)}"
