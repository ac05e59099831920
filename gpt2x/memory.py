"""Memory that a process keeps although nothing in it is used. Standard library only."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Return free memory to the system, which the C library keeps otherwise. Takes some milliseconds at most."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
