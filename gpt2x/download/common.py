"""What both kinds of download share."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

SCHEMES = {
    "hf": "hf://OWNER/NAME, with @REVISION and /FILE where they are meant",
    "openai": "openai://124M, 355M, 774M or 1558M",
}


Want = Literal["weights", "onnx", "either"]


Bar = Callable[[int], AbstractContextManager[Callable[[int], None] | None]]


Warn = Callable[[str], None]


def cache_home() -> Path:
    """Where what is downloaded is kept: ``GPT2X_CACHE``, else ``gpt2x`` in the user's cache."""
    if own := os.environ.get("GPT2X_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "gpt2x"
