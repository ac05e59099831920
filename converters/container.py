"""What every container gives back: named tensors, and what else was in the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .tensors import LazyTensor


@dataclass(frozen=True)
class Container:
    """Named tensors, opened but not read.

    ``config`` is Hugging Face's configuration where the file carries one; ``left_out`` names what the file holds
    besides tensors (an optimizer's state, run data). ``parts`` are the files of weights where there are several.
    """

    format: str
    path: Path
    tensors: Mapping[str, LazyTensor]
    config: dict[str, Any] | None = None
    left_out: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that holds weights."""
        return self.parts or (self.path,)
