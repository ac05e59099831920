"""Returning free memory to the system. Standard library only."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Return free memory, which the C library would keep, to the system. Takes a few milliseconds."""
    if sys.platform != "linux":
        return
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:  # musl has no such function
        return
    trim(0)
