"""What every container returns: named tensors, and what else the file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..tensors import LazyTensor


@dataclass(frozen=True)
class Container:
    """Named tensors, opened but not read.

    Args:
        format: the name of the container's format.
        path: the file.
        tensors: name -> tensor.
        metadata: key -> value of what the file holds besides tensors, as the file spells it.
        left_out: names of what is neither a tensor nor metadata, such as an optimizer's state.
        notes: what the user should know of the file.
        parts: the files of weights, if there are several.
        shards: the containers that this one is made of, if it is an index of them.
        wrappers: the parts of wrappers that were taken out of the names of tensors.
    """

    format: str
    path: Path
    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    parts: tuple[Path, ...] = ()
    shards: tuple[Container, ...] = ()
    wrappers: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that holds weights."""
        return self.parts or (self.path,)
