"""``model.safetensors.index.json`` and ``pytorch_model.bin.index.json``: one checkpoint in several files.

Source: ``save_pretrained`` of transformers: ``weight_map`` says for each tensor which file beside the index holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import FormatError
from ..io.json import read_json
from ..io.reading import beside
from ..tensors import LazyTensor
from .container import Container


def open_shards(path: Path, open_file: Callable[[Path], Container]) -> Container:
    """Open all shards that an index names. ``open_file`` opens one.

    Raises:
        UnsafeError: if the index points outside its directory.
        FormatError: if a shard is missing, or index and shards disagree on what lies where.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise FormatError(f"{path}: no valid weight_map of names to files")
    for name in sorted(set(weight_map.values())):
        beside(path.parent, name, str(path))
    if index := next((name for name in weight_map.values() if name.endswith((".json", ".index"))), None):
        raise FormatError(f"{path}: points to {index!r}, which is not a file of weights")
    shards = {name: open_file(path.parent / name) for name in sorted(set(weight_map.values()))}
    tensors: dict[str, LazyTensor] = {}
    for file, shard in shards.items():
        if twice := sorted(set(tensors) & set(shard.tensors)):
            raise FormatError(f"{path}: duplicate tensor: {twice[0]} is in two of its files")
        tensors.update(shard.tensors)
        if unlisted := sorted(name for name in shard.tensors if weight_map.get(name) != file):
            raise FormatError(f"{path}: {file} holds {unlisted[0]}, but the index states otherwise")
    if missing := sorted(set(weight_map) - set(tensors)):
        raise FormatError(f"{path}: {missing[0]} is not in {weight_map[missing[0]]}, although the index states so")
    first = next(iter(shards.values()))
    return Container(
        f"{first.format} shards",
        path,
        tensors,
        left_out=sum((shard.left_out for shard in shards.values()), ()),
        parts=tuple(shard.path for shard in shards.values()),
        shards=tuple(shards.values()),
    )
