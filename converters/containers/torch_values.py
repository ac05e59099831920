"""What a pickle of PyTorch's describes: tensors, storages, globals and other objects. None of them is the thing itself."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..tensors import DType
from ..values import all_are

SHOWN = 100  # characters of a name that a message shows


@dataclass(frozen=True)
class Global:
    """A global that the pickle names. It is never resolved."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A block of raw values that the pickle refers to by key.

    Args:
        key: its name in the file.
        dtype: of its values; U8 where gpt2x does not read its kind.
        size: number of values of ``dtype``.
        count: number of values as the file counts them.
        unread: the kind of storage, if gpt2x does not read it.
    """

    key: str
    dtype: DType
    size: int
    count: int
    unread: str = ""


@dataclass(frozen=True)
class TensorRef:
    """A contiguous tensor in a storage, or the transposed view of a contiguous matrix."""

    storage: Storage
    offset: int  # values
    shape: tuple[int, ...]
    is_transposed: bool = False


@dataclass(frozen=True)
class UnreadTensor:
    """A tensor that gpt2x does not read. Beside the weights it does no harm."""

    reason: str


class OtherKey:
    """A key of a dict that is neither a string nor a number. It equals no other key, so that it is never hashed itself."""

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what

    def __str__(self) -> str:
        return f"({self.what})"


class Opaque:
    """An object of a class that is not part of weights. It is described, never constructed.

    Args:
        name: the class, or the function that would return the object.
        arguments: what it would be called with.
    """

    __slots__ = ("arguments", "items", "name", "pairs", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None
        self.items: list[Any] | None = None  # of a list or a set
        self.pairs: dict[Any, Any] | None = None  # of a mapping

    def __repr__(self) -> str:
        return describe(self)

    def fields(self) -> dict[str, Any]:
        """Its attributes by name, as its pickle states them; empty where it states them in a way of its own."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)  # of __dict__ and __slots__
        result: dict[str, Any] = {}
        for part in parts[:2]:
            if isinstance(part, dict):
                result |= {key: value for key, value in part.items() if isinstance(key, str)}
        return result


def describe(value: Any) -> str:
    """What a value is, for people: ``an object of argparse.Namespace``."""
    if isinstance(value, TensorRef | UnreadTensor):
        return "a tensor"
    if isinstance(value, Opaque):
        return f"an object of {value.name[:SHOWN]}"
    if isinstance(value, Global):
        return value.name[:SHOWN]
    return "an empty dict" if value == {} else f"a {type(value).__name__}"


PLAIN = (str, int, float, type(None))
MAX_LIST = 100  # plain values in a list


def plain_fields(value: Any) -> Mapping[str, Any] | None:
    """The fields of a dict or of an object by name; None if it is neither.

    A value that is not plain (a string, a number, None, or a short list of them) is replaced by its description.
    Private fields of an object are left out.
    """
    named = fields_of(value)
    return None if named is None else {key: _plain(item) for key, item in named.items()}


def fields_of(value: Any) -> Mapping[str, Any] | None:
    """The same, with the values as they are."""
    if isinstance(value, Opaque):
        named = value.pairs if value.pairs else value.fields()
        return {key: item for key, item in named.items() if isinstance(key, str) and not key.startswith("_")}
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if isinstance(key, str)}
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Opaque) and value.name.endswith(".multiarray.scalar"):
        return _numpy_scalar(value)
    if isinstance(value, list | dict) and not value:
        return value
    if isinstance(value, list) and len(value) <= MAX_LIST and all_are(value, PLAIN):
        return value
    return describe(value)


# dtypes of NumPy, without the byte order -> formats of struct
NUMBERS = {
    "i1": "b",
    "u1": "B",
    "i2": "h",
    "u2": "H",
    "i4": "i",
    "u4": "I",
    "i8": "q",
    "u8": "Q",
    "f2": "e",
    "f4": "f",
    "f8": "d",
}


def _numpy_scalar(scalar: Opaque) -> Any:
    """The number of a NumPy scalar, as NumPy writes it: a dtype and the bytes. What it is, if it is no such number."""
    if len(scalar.arguments) != 2:
        return describe(scalar)
    dtype, data = scalar.arguments
    if isinstance(data, Opaque) and data.name == "_codecs.encode":  # bytes, in pickles for Python 2
        text = data.arguments[0] if data.arguments else None
        data = text.encode("latin1", "replace") if isinstance(text, str) else None
    kind = dtype.arguments[0] if isinstance(dtype, Opaque) and dtype.arguments else None
    form = NUMBERS.get(kind) if isinstance(kind, str) else None
    order = dtype.state[1] if form and isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "<"
    if form is None or order == ">" or not isinstance(data, bytes) or len(data) != struct.calcsize(f"<{form}"):
        return describe(scalar)
    return struct.unpack(f"<{form}", data)[0]
