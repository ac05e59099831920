"""What every container gives back: named tensors, and what else was in the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..tensors import LazyTensor
from ..tokenizer import Vocabulary


@dataclass(frozen=True)
class Container:
    """Named tensors, opened but not read.

    ``config`` is a configuration that the file carries, in the words of ``config_of``, a key of ``config.PARSERS``.
    ``left_out`` names what the file holds besides tensors (an optimizer's state, run data); ``notes`` says what is to be
    known of it. ``parts`` are the files of weights where there are several. ``vocabulary`` gives the tokenizer of a
    format that has one inside.
    """

    format: str
    path: Path
    tensors: Mapping[str, LazyTensor]
    config: dict[str, Any] | None = None
    left_out: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[Path, ...] = ()
    config_of: str = "hf"
    notes: tuple[str, ...] = ()
    vocabulary: Callable[[], Vocabulary] | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that holds weights."""
        return self.parts or (self.path,)
