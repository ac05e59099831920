"""How much memory there is, and returning free memory to the system. Standard library only."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def machine_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or those of its control group."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in LIMITS:
        try:
            found.append(int(file.read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return min(found)


def give_back() -> None:
    """Return free memory, which the C library would keep, to the system. Takes a few milliseconds."""
    if sys.platform != "linux":
        return
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:  # musl has no such function
        return
    trim(0)
