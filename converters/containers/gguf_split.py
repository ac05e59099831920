"""GGUF files that were split: ``gpt2-00001-of-00003.gguf`` and the parts after it.

Sources: ``gguf-split`` of llama.cpp and ``GGUFWriter`` of gguf-py. The metadata of the model are those of the first part.
Each part states its number, counted from 0, how many parts there are, and how many tensors they all hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..io.reading import names_of
from ..tensors import LazyTensor
from .container import Container
from .gguf import SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS, is_part, notes_on, open_gguf
from .shard_index import GGUF_PART

MAX_PARTS = (1 << 16) - 1  # split.count is a uint16
Check = Callable[[Mapping[str, Any], str], None]


def open_whole(path: Path, check: Check) -> Container:
    """Open a GGUF file, or all parts of one that was split, of which ``path`` is any.

    Args:
        check: called with the metadata of the model and the path, before other parts are opened; it may raise.

    Raises:
        FormatError: if a part is missing or invalid, or the parts are not those of one file.
        CheckpointError: if a tensor is of a type that is not read.
    """

    def check_whole(metadata: Mapping[str, Any], where: str) -> None:
        if not is_part(metadata):
            check(metadata, where)

    container = open_gguf(path, check_whole)
    if not is_part(container.metadata):
        return container
    paths = _paths_of(path, _place_in(container))
    parts = [open_gguf(paths[0], check)]
    parts += [open_gguf(part) for part in paths[1:]]
    return _joined(parts)


@dataclass(frozen=True)
class _Place:
    """What a part states of its place: its number, counted from 0, the number of parts, and that of all tensors."""

    number: int
    parts: int
    tensors: int


def _place_in(part: Container) -> _Place:
    values = {}
    for key, limit in ((SPLIT_NO, MAX_PARTS), (SPLIT_COUNT, MAX_PARTS), (SPLIT_TENSORS, 1 << 31)):
        value = part.metadata.get(key)
        if type(value) is not int or not 0 <= value <= limit:
            raise FormatError(f"{part.path}: {key} is {str(value)[:60]}")
        values[key] = value
    place = _Place(values[SPLIT_NO], values[SPLIT_COUNT], values[SPLIT_TENSORS])
    if place.number >= place.parts:
        raise FormatError(f"{part.path}: {SPLIT_NO} is {place.number}, and {SPLIT_COUNT} is {place.parts}")
    return place


def _paths_of(path: Path, place: _Place) -> list[Path]:
    """All parts, in order.

    Raises:
        FormatError: if one is missing, or the name of this one is not that of its place.
    """
    match = GGUF_PART.fullmatch(path.name)
    ending = f"-{place.number + 1:05d}-of-{place.parts:05d}.gguf"
    if match is None or not path.name.endswith(ending):
        raise FormatError(
            f"{path}: part {place.number + 1} of {place.parts} of a GGUF file that was split, under another name: rename it "
            f"to NAME{ending}, beside the other parts"
        )
    paths = [path.with_name(f"{match['stem']}-{n:05d}-of-{match['count']}.gguf") for n in range(1, place.parts + 1)]
    missing = [part for part in paths if not part.is_file()]
    if missing:
        raise FormatError(
            f"{path}: {len(missing)} of {place.parts} parts missing ({names_of(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}); copy or download them into this folder"
        )
    return paths


def _joined(parts: Sequence[Container]) -> Container:
    """The tensors of all parts, with the metadata of the first.

    Raises:
        FormatError: if the parts are not those of one file.
    """
    places = [_place_in(part) if is_part(part.metadata) else None for part in parts]
    tensors: dict[str, LazyTensor] = {}
    for number, (part, place) in enumerate(zip(parts, places, strict=True)):
        if place is None or place.number != number or place.parts != len(parts):
            raise FormatError(f"{part.path}: not part {number + 1} of {len(parts)}, as its name states")
        twice = sorted(tensors.keys() & part.tensors.keys())
        if twice:
            raise FormatError(f"{part.path}: duplicate tensor: {twice[0][:100]!r} is in an earlier part, too")
        tensors.update(part.tensors)
    for part, place in zip(parts, places, strict=True):
        if place and place.tensors != len(tensors):
            raise FormatError(f"{part.path}: {SPLIT_TENSORS} is {place.tensors}, but the parts hold {len(tensors)}")
    first = parts[0]
    metadata = {key: value for key, value in first.metadata.items() if not key.startswith("split.")}
    paths = tuple(part.path for part in parts)
    return Container("gguf", first.path, tensors, metadata, notes=tuple(notes_on(tensors)), parts=paths)
