"""One question of a report and its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """One question and its answer."""

    name: str
    passed: bool | None  # None: not asked, for the reason in ``result``
    result: str
    details: Mapping[str, Any] = field(default_factory=dict)
