"""Write the pickle of a file of PyTorch's."""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from typing import Any

from .torch_pickle import STORAGES
from .torch_values import TensorRef


def dump_pickle(value: Any) -> bytes:
    """The pickle of dicts, OrderedDicts, str, bool, int, float and TensorRef, as ``torch.save`` writes it."""
    # The opcodes here are those of protocol 2, as pickletools describes them: c names a global, ( marks, t makes a
    # tuple of what follows the mark, u sets items, R calls, Q refers to a storage, X, J, G and \x8a are a string and
    # numbers.
    return b"\x80\x02" + _pickled(value) + b"."


def _pickled(value: Any) -> bytes:
    if isinstance(value, TensorRef):
        return _rebuilt(value)
    if isinstance(value, dict):
        empty = b"ccollections\nOrderedDict\n)R" if isinstance(value, OrderedDict) else b"}"
        return empty + b"(" + b"".join(_str(key) + _pickled(item) for key, item in value.items()) + b"u"
    # Before numbers: in Python, a bool is an int.
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    return _str(value) if isinstance(value, str) else _int(value)


def _rebuilt(ref: TensorRef) -> bytes:
    storage, kinds = ref.storage, {dtype: name for name, dtype in STORAGES.items()}
    strides = [math.prod(ref.shape[i + 1 :]) for i in range(len(ref.shape))]
    kind = f"ctorch\n{kinds[storage.dtype.name]}\n".encode()
    pid = b"(" + _str("storage") + kind + _str(storage.key) + _str("cpu") + _int(storage.size) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = pid + _int(ref.offset) + _ints(ref.shape) + _ints(strides) + b"\x89" + hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def _str(text: str) -> bytes:
    data = text.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _int(value: int) -> bytes:
    if value < 2**31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def _ints(values: Any) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"
