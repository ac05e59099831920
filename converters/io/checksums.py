"""Checksums of bytes."""

from __future__ import annotations

import google_crc32c


def crc32c(value: int, data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of bytes, extended from the CRC of those before them."""
    return int(google_crc32c.extend(value, data))
