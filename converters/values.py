"""Questions about values that a file states, which may be of any type."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeGuard, TypeVar

T = TypeVar("T")


def all_are(values: Iterable[object], kind: type | tuple[type, ...]) -> bool:
    """Whether every value is of a type. ``True`` is an int, too."""
    return all(isinstance(value, kind) for value in values)


def is_list_of(value: object, kind: type[T]) -> TypeGuard[list[T]]:
    """Whether a value is a list, which may be empty, and every item is of a type."""
    return isinstance(value, list) and all_are(value, kind)


def are_sizes(values: Iterable[Any], limit: float = math.inf) -> bool:
    """Whether every value is an int from 0 to below ``limit``, and not a bool."""
    return all(type(value) is int and 0 <= value < limit for value in values)


def any_ends_with(names: Iterable[str], end: str | tuple[str, ...]) -> bool:
    """Whether one of the names has this end, or one of these."""
    return any(name.endswith(end) for name in names)
