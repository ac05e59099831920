"""MessagePack, as Flax wrote ``flax_model.msgpack``: nested maps whose leaves are arrays.

An array is an extension of type 1: in it, packed once more, its shape, the name of its type, and its bytes. Only the
bytes are large: they are skipped, and read on demand. Sources: the MessagePack specification;
``flax/serialization.py``, which also cuts arrays of more than 1 GiB into chunks.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, FormatError, truncated
from ..io.reading import Cursor, File
from ..tensors import DTYPES, LazyTensor
from ..values import are_sizes
from .container import MAX_RANK, MAX_VALUES, Container

NDARRAY, SCALAR = 1, 3  # extension types of Flax
CHUNKED = "__msgpack_chunked_array__"
MAX_DEPTH = 16
MAX_ITEMS = 1_000_000
MAX_STRING = 256
TYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip

# Leading byte -> format of the number that follows: the value itself, or the length of what follows.
NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}  # fmt: skip
MAPS, LISTS = {0xDE: ">H", 0xDF: ">I"}, {0xDC: ">H", 0xDD: ">I"}
STRINGS, BYTES = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}, {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
EXTENSIONS = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def open_msgpack(path: Path) -> Container:
    """Open a file of Flax's. A tensor's name is the keys that lead to it, joined by ``/``.

    Raises:
        FormatError: if it is invalid, or holds anything other than nested maps of arrays.
    """
    file = File(path)
    reader = _Reader(file)
    tree = reader.value(0)
    if reader.cursor.position != file.size:
        raise FormatError(f"{path}: {file.size - reader.cursor.position} extra bytes after the end of its data")
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: holds {type(tree).__name__}, not a map of arrays")
    tensors: dict[str, LazyTensor] = {}
    _flatten(tree, "", tensors, str(path))
    return Container("msgpack", path, tensors)


class _Reader:
    """Decodes bytes into dicts, lists, numbers, strings and LazyTensors."""

    def __init__(self, file: File) -> None:
        self.cursor = Cursor(file)
        self.where = str(file.path)
        self.items = 0

    def value(self, depth: int) -> Any:
        self.items += 1
        if depth > MAX_DEPTH or self.items > MAX_ITEMS:
            raise self._fault(f"nested too deeply, or more than {MAX_ITEMS} values")
        code = self.cursor.take(1)[0]
        # Here the byte is the number itself, from -32 to 127. Short maps, lists and strings have their length in it.
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 256
        if code in CONSTANTS:
            return CONSTANTS[code]
        if code in NUMBERS:
            return self.cursor.number(NUMBERS[code])
        if code < 0x90 or code in MAPS:
            return self._map(self._length(code, MAPS, 0x80), depth)
        if code < 0xA0 or code in LISTS:
            return [self.value(depth + 1) for _ in range(self._length(code, LISTS, 0x90))]
        if code < 0xC0 or code in STRINGS:
            return self._text(self._length(code, STRINGS, 0xA0))
        if 0xD4 <= code <= 0xD8 or code in EXTENSIONS:
            return self._extension(
                1 << (code - 0xD4) if code not in EXTENSIONS else self.cursor.number(EXTENSIONS[code])
            )
        raise self._fault(f"{'bytes' if code in BYTES else 'an unknown kind of value'} where an array is expected")

    def _fault(self, what: str) -> FormatError:
        return FormatError(f"{self.where}: {what}, before byte {self.cursor.position}")

    def _length(self, code: int, forms: dict[int, str], small: int) -> int:
        length: int = self.cursor.number(forms[code]) if code in forms else code - small
        if length > self.cursor.end - self.cursor.position:
            raise truncated(
                self.where, f"{length} items needed after byte {self.cursor.position}, the file has {self.cursor.end}"
            )
        return length

    def _text(self, size: int) -> str:
        if size > MAX_STRING:
            raise self._fault(f"a string of {size} bytes")
        try:
            return self.cursor.take(size).decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{self.where}: a string before byte {self.cursor.position} is not UTF-8") from None

    def _map(self, count: int, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in result or "/" in key:
                raise self._fault(f"invalid or duplicate key {str(key)[:100]!r}")
            result[key] = self.value(depth + 1)
        return result

    def _extension(self, size: int) -> LazyTensor:
        code = self.cursor.number(">b")
        if code not in (NDARRAY, SCALAR):
            raise self._fault(f"extension type {code}, which is not an array")
        end = self.cursor.position + size
        header, outer_end = self.cursor.take(1), self.cursor.end
        # 0x93 is a list of three: shape, dtype and bytes.
        if header != b"\x93":
            raise self._fault("an invalid array")
        if end > outer_end:
            raise truncated(self.where, f"an array needs {end} bytes, the file has {outer_end}")
        self.cursor.end = end
        # At this depth only a flat list can follow.
        shape, kind = self.value(MAX_DEPTH - 1), self._name()
        tensor = self._bytes(shape, kind)
        if self.cursor.position != end:
            raise self._fault("extra bytes after an array")
        self.cursor.end = outer_end
        return tensor

    def _name(self) -> str:
        code = self.cursor.take(1)[0]
        if not (0xA0 <= code < 0xC0 or code in STRINGS or code in BYTES):
            raise self._fault("an array without a dtype")
        return self._text(self._length(code, STRINGS | BYTES, 0xA0))

    def _bytes(self, shape: Any, kind: str) -> LazyTensor:
        code = self.cursor.take(1)[0]
        if code not in BYTES:
            raise self._fault("an array without bytes")
        size: int = self.cursor.number(BYTES[code])
        sizes = _sizes(shape, f"{self.where}: before byte {self.cursor.position}")
        if kind not in TYPES:
            raise self._fault(f"an array of {kind[:60]!r}, which gpt2x does not read")
        dtype = DTYPES[TYPES[kind]]
        if size != math.prod(sizes) * dtype.itemsize:
            raise self._fault(
                f"{size} bytes, but shape {list(sizes)} of {dtype} needs {math.prod(sizes) * dtype.itemsize}"
            )
        return LazyTensor.in_file(self.cursor.file, self.cursor.skip(size), dtype, sizes)


def _sizes(shape: Any, where: str) -> tuple[int, ...]:
    sound = isinstance(shape, list) and len(shape) <= MAX_RANK and are_sizes(shape)
    if not sound or math.prod(shape) >= MAX_VALUES:
        raise FormatError(f"{where}: invalid shape, {str(shape)[:100]}")
    return tuple(shape)


def _flatten(tree: dict[str, Any], above: str, tensors: dict[str, LazyTensor], where: str) -> None:
    """Collect the arrays of nested maps under the names of their paths."""
    if len(above) > MAX_STRING:
        raise FormatError(f"{where}: a name that exceeds the limit of {MAX_STRING} characters")
    for key, item in tree.items():
        if isinstance(item, dict) and CHUNKED in item:
            tensors[above + key] = _joined(item, f"{where}: {above}{key}")
        elif isinstance(item, dict):
            _flatten(item, f"{above}{key}/", tensors, where)
        elif isinstance(item, LazyTensor):
            tensors[above + key] = item
        else:
            raise CheckpointError(f"{where}: {above}{key} is {str(item)[:60]!r}, not an array")


def _joined(item: dict[str, Any], where: str) -> LazyTensor:
    """An array in chunks: a shape and chunks, each a map of the numbers from 0 to its items."""
    shape = _listed(item.get("shape"), where)
    parts = _listed(item.get("chunks"), where)
    sizes = _sizes(shape, where)
    if not parts or not all(isinstance(part, LazyTensor) and part.dtype == parts[0].dtype for part in parts):
        raise FormatError(f"{where}: chunks that are not arrays of one dtype")
    if sum(part.size for part in parts) != math.prod(sizes):
        raise FormatError(f"{where}: chunks that do not add up to shape {list(sizes)}")
    return LazyTensor.joined(parts, sizes)


def _listed(numbered: Any, where: str) -> list[Any]:
    if not isinstance(numbered, dict) or list(numbered) != list(map(str, range(len(numbered)))):
        raise FormatError(f"{where}: the chunks of an array are not numbered")
    return list(numbered.values())
