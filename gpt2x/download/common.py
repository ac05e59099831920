"""What both kinds of download share."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

SCHEMES = {
    "hf": "hf://OWNER/NAME, optionally with @REVISION and /FILE",
    "openai": "openai://124M, 355M, 774M or 1558M",
}

Want = Literal["weights", "onnx", "either", "adapter"]

Advance = Callable[[int], None]  # moves a progress bar by so many bytes, which may be negative
ProgressBar = Callable[[int], AbstractContextManager[Advance | None]]  # total bytes -> a context that shows a bar

Warn = Callable[[str], None]


def cache_home() -> Path:
    """Return gpt2x's cache directory: ``GPT2X_CACHE``, or else ``gpt2x`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    if chosen := os.environ.get("GPT2X_CACHE"):
        return Path(chosen).expanduser().absolute()
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return user_cache.expanduser().absolute() / "gpt2x"


def ignore(value: object) -> None:
    """Do nothing: in place of a report that nobody asked for."""
