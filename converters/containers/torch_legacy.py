"""``torch.save`` before PyTorch 1.6: five pickles in a row, then the storages.

In order: a magic number, the protocol version, facts of the machine, the object, the keys of the storages in the order
in which they follow; then each storage as a 64-bit count of values and the values. There are no checksums.
Source: ``_legacy_save`` in PyTorch's ``torch/serialization.py``.
"""

from __future__ import annotations

import struct
from pathlib import Path

from ..errors import FormatError, truncated
from ..io.reading import File
from ..tensors import LazyTensor
from ..values import is_list_of
from .container import Container
from .torch_entries import container_of, named_tensors
from .torch_pickle import load_pickle
from .torch_values import Storage
from .torch_zip import part_of

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


def open_torch_legacy(path: Path) -> Container:
    """Open a ``.bin`` in the format before PyTorch 1.6. Raises as ``open_torch_zip`` does."""
    file = File(path)
    where = str(path)
    # Read as a stream: where a pickle ends is known only when it is parsed.
    with open(path, "rb") as raw:
        if load_pickle(raw, where) != MAGIC:
            raise FormatError(f"{where}: not a file of torch.save (wrong magic number)")
        if load_pickle(raw, where) != PROTOCOL:
            raise FormatError(f"{where}: unknown protocol version of torch.save; gpt2x reads {PROTOCOL}")
        machine = load_pickle(raw, where)
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise FormatError(f"{where}: written on a big-endian machine, which gpt2x does not read")
        described: dict[str, Storage] = {}
        saved = load_pickle(raw, where, described)
        keys = load_pickle(raw, where)
        start = raw.tell()
    storages = _storages(file, start, keys, described)
    if missing := sorted(set(described) - set(storages)):
        raise FormatError(f"{where}: missing storage {missing[0]}")
    found = named_tensors(saved, where)
    return container_of(path, found, lambda ref: part_of(storages[ref.storage.key], ref))


def _storages(file: File, position: int, keys: object, described: dict[str, Storage]) -> dict[str, LazyTensor]:
    """Every storage by key. They follow one another, and the last one must end at the end of the file."""
    if not is_list_of(keys, str) or len(set(keys)) != len(keys):
        raise FormatError(f"{file.path}: invalid list of storages")
    result: dict[str, LazyTensor] = {}
    for key in keys:
        if key not in described:
            raise FormatError(f"{file.path}: the storage {key} does not belong to a tensor")
        dtype, size, stated = described[key].dtype, described[key].size, described[key].count
        count = struct.unpack("<q", file.read(position, 8))[0]
        if count != stated:
            raise FormatError(f"{file.path}: the storage {key} has {count} values, but the pickle states {stated}")
        end = position + 8 + size * dtype.itemsize
        if end > file.size:
            raise truncated(file.path, f"the storage {key} needs {end} bytes, the file has {file.size}")
        result[key] = LazyTensor.in_file(file, position + 8, dtype, (size,))
        position = end
    if position != file.size:
        raise FormatError(f"{file.path}: {file.size - position} extra bytes after the last storage")
    return result
