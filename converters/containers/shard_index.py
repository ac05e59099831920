"""``model.safetensors.index.json`` and ``pytorch_model.bin.index.json``: one checkpoint in several files.

Source: ``save_pretrained`` of transformers: ``weight_map`` says for each tensor which file beside the index holds it.
The files are called ``model-00001-of-00003.safetensors``, so that a complete set can be read without an index, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FormatError
from ..io.json import read_json
from ..io.reading import beside, check_present
from ..tensors import LazyTensor
from ..values import all_are
from .container import Container

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)$")


GGUF_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class ShardSet:
    """The files of one checkpoint, by their names.

    Args:
        files: those that are there, in order.
        missing: the names of those that are not.
        count: how many there should be.
    """

    files: tuple[Path, ...]
    missing: tuple[str, ...]
    count: int


def shard_sets(directory: Path) -> list[ShardSet]:
    """Every set of shards in a directory, safetensors first."""
    sets: dict[tuple[bool, str, int], set[str]] = {}
    for file in directory.iterdir():
        match = SHARD.match(file.name)
        if match and file.is_file():
            count = int(match["count"])
            pattern = f"{match['stem']}-{{:05d}}-of-{match['count']}{match['suffix']}"
            # False is sorted before True.
            key = (match["suffix"] != ".safetensors", pattern, count)
            sets.setdefault(key, set()).add(file.name)
    return [_shard_set(directory, *key[1:], names) for key, names in sorted(sets.items())]


def _shard_set(directory: Path, pattern: str, count: int, names: set[str]) -> ShardSet:
    expected = [pattern.format(number) for number in range(1, count + 1)]
    files = tuple(directory / name for name in expected if name in names)
    missing = tuple(name for name in expected if name not in names)
    return ShardSet(files, missing, count)


def without_later_parts(files: Sequence[Path]) -> list[Path]:
    """Files without those that belong to a split file whose first part, or else an earlier one, is among them."""
    kept: list[Path] = []
    seen: set[tuple[Path, str, str]] = set()
    for file in sorted(files):
        match = GGUF_PART.fullmatch(file.name)
        if match is None:
            kept.append(file)
            continue
        key = (file.parent, match["stem"], match["count"])
        if key not in seen:
            kept.append(file)
        seen.add(key)
    return kept


def open_shards(paths: Sequence[Path], open_file: Callable[[Path], Container]) -> Container:
    """Open the shards of one checkpoint that has no index. ``open_file`` opens one.

    Raises:
        FormatError: if a tensor is in two of them.
    """
    shards = {path.name: open_file(path) for path in paths}
    return _joined(paths[0], shards)


def open_index(path: Path, open_file: Callable[[Path], Container]) -> Container:
    """Open all shards that an index names. ``open_file`` opens one.

    Raises:
        UnsafeError: if the index points outside its directory.
        FormatError: if a shard is missing, or index and shards disagree on what lies where.
    """
    weight_map = _weight_map(path)
    names = sorted(set(weight_map.values()))
    _check_files(path, names)
    shards = {name: open_file(path.parent / name) for name in names}
    container = _joined(path, shards)
    for name, shard in shards.items():
        unlisted = sorted(tensor for tensor in shard.tensors if weight_map.get(tensor) != name)
        if unlisted:
            raise FormatError(f"{path}: {name} holds {unlisted[0]}, but the index states otherwise")
    missing = sorted(set(weight_map) - set(container.tensors))
    if missing:
        raise FormatError(f"{path}: {missing[0]} is not in {weight_map[missing[0]]}, although the index states so")
    return container


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all_are(weight_map.values(), str):
        raise FormatError(f"{path}: no valid weight_map of names to files")
    return weight_map


def _check_files(path: Path, names: Sequence[str]) -> None:
    """Check that an index names files beside it, and that all of them are there."""
    files = [beside(path.parent, name, str(path)) for name in names]
    for name in names:
        # Otherwise an index could name itself, or another one, without end.
        if name.endswith((".json", ".index")):
            raise FormatError(f"{path}: points to {name!r}, which is not a file of weights")
    check_present(files, path)


def _joined(path: Path, shards: Mapping[str, Container]) -> Container:
    """The tensors of all shards in one container."""
    tensors: dict[str, LazyTensor] = {}
    for shard in shards.values():
        twice = sorted(set(tensors) & set(shard.tensors))
        if twice:
            raise FormatError(f"{path}: duplicate tensor: {twice[0]} is in two of its files")
        tensors.update(shard.tensors)
    first = next(iter(shards.values()))
    return Container(
        f"{first.format} shards",
        path,
        tensors,
        left_out=sum((shard.left_out for shard in shards.values()), ()),
        parts=tuple(shard.path for shard in shards.values()),
        shards=tuple(shards.values()),
    )
