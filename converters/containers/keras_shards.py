"""``model.weights.json``: the weights of a Keras 3 model in several HDF5 files.

Source: ``ShardedH5IOStore`` in Keras's ``saving_lib.py``: ``weight_map`` says for each group of variables which files
beside the index hold some of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..io.json import read_json
from ..io.reading import beside, check_present
from ..tensors import LazyTensor
from ..values import is_list_of
from .container import Container
from .hdf5 import open_hdf5

MAX_FILES = 1000
MAX_INDEX = 16 << 20  # bytes


def open_keras_shards(path: Path) -> Container:
    """Open all files that an index names.

    Raises:
        UnsafeError: if the index points outside its directory.
        FormatError: if a file is missing, or index and files disagree on what lies where.
    """
    weight_map = _weight_map(read_json(path, MAX_INDEX), path)
    names = sorted(set(itertools.chain.from_iterable(weight_map.values())))
    if len(names) > MAX_FILES:
        raise FormatError(f"{path}: {len(names)} files of weights, which exceeds the limit of {MAX_FILES}")
    files = {name: beside(path.parent, name, str(path)) for name in names}
    check_present(list(files.values()), path)
    tensors: dict[str, LazyTensor] = {}
    for name, file in files.items():
        shard = open_hdf5(file)
        _check(path, name, shard, weight_map, tensors)
        tensors.update(shard.tensors)
    missing = sorted(set(weight_map) - set(map(_group, tensors)))
    if missing:
        raise FormatError(f"{path}: {missing[0][:100]} is in none of its files, although the index states so")
    return Container("hdf5", path, tensors, parts=tuple(files.values()))


def _weight_map(raw: Mapping[str, Any], path: Path) -> dict[str, list[str]]:
    """Group of variables -> names of the files that hold some of it."""
    stated = raw.get("weight_map")
    if not isinstance(stated, dict) or not stated:
        raise FormatError(f"{path}: no valid weight_map of groups to files")
    result = {}
    for group, files in stated.items():
        listed = [files] if isinstance(files, str) else files
        if not is_list_of(listed, str) or not listed:
            raise FormatError(f"{path}: no valid weight_map of groups to files: {group[:100]!r}")
        # The names in the files have no slash at either end.
        result[group.strip("/")] = listed
    return result


def _check(
    path: Path,
    file: str,
    shard: Container,
    weight_map: Mapping[str, list[str]],
    before: Mapping[str, LazyTensor],
) -> None:
    for name in shard.tensors:
        if name in before:
            raise FormatError(f"{path}: duplicate tensor: {name[:100]} is in two of its files")
        if file not in weight_map.get(_group(name), ()):
            raise FormatError(f"{path}: {file} holds {name[:100]}, but the index states otherwise")


def _group(name: str) -> str:
    return name.rpartition("/")[0]
