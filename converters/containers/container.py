"""What every container returns: named tensors, and what else the file holds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..tensors import LazyTensor

# Limits of the shape that a file may state, which is refused before anything is computed from it. GPT-2 has matrices, in
# Keras's files three axes, and fewer than 2**31 values in the 1558M model.
MAX_RANK = 8
MAX_VALUES = 2**40


@dataclass(frozen=True)
class Entry:
    """One of several sets of named tensors that a file holds.

    Args:
        name: its place in the file: the keys that lead to it, such as ``checkpoint.model``.
        tensors: name -> what identifies the tensor; equal for two names of the same values.
        open: opens it alone.
    """

    name: str
    tensors: Mapping[str, Hashable]
    open: Callable[[], Container]


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
        entry: the place of the tensors in the file, if they are one of the values that it holds.
        entries: the sets of named tensors, if the file holds several; then ``tensors`` is empty.
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
    entry: str = ""
    entries: tuple[Entry, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that holds weights."""
        return self.parts or (self.path,)
