"""The checks of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """One check and its result."""

    name: str
    passed: bool | None  # None: not checked, for the reason in ``result``
    result: str
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The result in a word or two, for a table; empty if it was not checked."""
        if self.details.get("near_tie"):
            return "near tie"
        if self.passed is None:
            return ""
        if not self.passed:
            return "different"
        return "within bounds" if self.details.get("inexact") else "same"


def failed(checks: Iterable[Check]) -> bool:
    """Whether one of the checks failed."""
    return any(check.passed is False for check in checks)
