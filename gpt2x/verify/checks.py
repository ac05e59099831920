"""One check of a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """One check and its result."""

    name: str
    passed: bool | None  # None: not checked, for the reason in ``result``
    result: str
    details: Mapping[str, Any] = field(default_factory=dict)
