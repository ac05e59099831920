"""The initializers of an ONNX model, inside it or beside it. The nodes of the graph are skipped.

An ONNX model is one protobuf message; numbers lie in it, or in another file of the same folder ("external data").
Source: ``onnx.proto`` of the ONNX project.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, FormatError, truncated
from ..io.protobuf import read_varint
from ..io.reading import Cursor, File, beside, values_file
from ..tensors import DTYPES, LazyTensor
from .container import MAX_RANK, MAX_VALUES, Container

# Numbers of fields.
GRAPH, METADATA = 7, 14  # of ModelProto
INITIALIZER = 5  # of GraphProto
DIMS, TYPE, NAME, EXTERNAL, LOCATION = 1, 2, 8, 13, 14  # of TensorProto
DATA = {9: None, 4: 1, 10: 11}  # fields of values -> the only data type they may have: raw, float, double
IGNORED = (12, 16)  # documentation and metadata
KEY, VALUE = 1, 2  # of StringStringEntryProto
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types

# TensorProto.DataType -> ours.
TYPES = {1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 12: "U32", 13: "U64", 16: "BF16"}  # fmt: skip
QUANTIZED_TYPES = (17, 18, 19, 20, 21, 22, 23, 24, 25, 26)  # of 8 bits and fewer
CONSTANT = "constant_"  # prefix of constants, such as shapes, in gpt2x's own graphs
QUANTIZED = ("_scale", "_scales", "_zero_point", "_quantized", "_pairs")
MERGED = re.compile(r"_merged_\d+$")  # suffix of the names in optimum's decoder_model_merged.onnx
MAX_NAME = 4096
MAX_METADATA = 1 << 20
MAX_ENTRIES = 1000  # of metadata
MAX_INITIALIZERS = 20_000  # of GPT-2's 1558M: less than a thousand, with constants
MAX_FILES = 64


def open_onnx(path: Path, keep: Collection[str] = ()) -> Container:
    """Open the initializers of an ONNX model, and the values of ``metadata_props`` whose keys are in ``keep``.

    Raises:
        FormatError: if the model is invalid.
        UnsafeError: if it keeps data outside its folder.
        CheckpointError: if its weights are quantized.
    """
    files = _Files(File(path))
    metadata: dict[str, str] = {}
    for part in _parts(Cursor(files.model), METADATA):
        if isinstance(part, Cursor):
            key, value = _entry(part, str(path), MAX_METADATA)
            if key in keep:
                metadata[key] = value
    found = _initializers(files)
    files.check_overlaps()
    _check_weights(found, path)
    # A single float is a constant of the graph, such as the epsilon of a norm.
    weights = {name: tensor for name, tensor in found.items() if tensor.dtype.is_float and tensor.size > 1}
    # An empty tensor is the default of an optional input.
    others = (name for name, tensor in found.items() if name not in weights and tensor.size)
    return Container(
        "onnx",
        path,
        weights,
        metadata,
        tuple(name for name in others if not name.startswith(CONSTANT)),
        parts=(path, *(other.path for other in files.others.values())),
    )


def _initializers(files: _Files) -> dict[str, LazyTensor]:
    """The initializers of the graph by name."""
    path = files.model.path
    found: dict[str, LazyTensor] = {}
    for graph in _parts(Cursor(files.model), GRAPH):
        for part in _parts(graph, INITIALIZER):
            if not isinstance(part, Cursor):
                continue
            tensor = _tensor(part, str(path))
            tensor.name = MERGED.sub("", tensor.name)
            if tensor.name in found or len(found) > MAX_INITIALIZERS:
                raise FormatError(
                    f"{path}: duplicate initializer {tensor.name[:100]!r}, or more than {MAX_INITIALIZERS} of them"
                )
            found[tensor.name] = files.lazy(tensor)
    return found


def _check_weights(found: Mapping[str, LazyTensor], path: Path) -> None:
    """Refuse a model without weights, and one with rounded ones."""
    if not found:
        raise CheckpointError(f"{path}: an ONNX model without weights, or not an ONNX model")
    quantized = next((name for name in found if name.endswith(QUANTIZED)), None)
    if quantized:
        raise CheckpointError(
            f"{path}: a quantized model (it holds {quantized[:100]}): its weights are rounded; convert the model that it was made from"
        )


def read_metadata(path: Path) -> dict[str, str]:
    """The ``metadata_props`` of an ONNX model; its graph is skipped.

    Raises:
        FormatError: if the model is invalid.
    """
    entries = itertools.islice(_parts(Cursor(File(path)), METADATA), MAX_ENTRIES)
    return dict(_entry(part, str(path), MAX_METADATA) for part in entries)


def external_files(path: Path) -> frozenset[str]:
    """The names of the files beside an ONNX model that store its initializers.

    Raises:
        FormatError: if the model is invalid.
    """
    found = set()
    for graph in _parts(Cursor(File(path)), GRAPH):
        for tensor in _parts(graph, INITIALIZER):
            for part in _parts(tensor, EXTERNAL):
                key, value = _entry(part, str(path))
                if key == "location":
                    found.add(value)
    return frozenset(found)


def _parts(message: Any, field: int) -> Iterator[Any]:
    """The values of one field of a message; none if it is no message."""
    if isinstance(message, Cursor):
        for number, part in _fields(message):
            if number == field:
                yield part


def _fields(cursor: Cursor) -> Iterator[tuple[int, Any]]:
    """Number and value of each field: an int, bytes of a fixed width, or a Cursor over a part of the file."""
    while cursor.position < cursor.end:
        tag = _varint(cursor)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            yield number, _varint(cursor)
        elif kind in (FIXED64, FIXED32):
            yield number, cursor.take(8 if kind == FIXED64 else 4)
        elif kind == BYTES:
            size = _varint(cursor)
            begin = cursor.skip(size)
            yield number, Cursor(cursor.file, begin, begin + size)
        else:
            raise FormatError(f"{cursor.file.path}: not an ONNX model (wire type {kind} before byte {cursor.position})")


def _varint(cursor: Cursor) -> int:
    data = b""
    while not data or data[-1] & 0x80:
        data += cursor.take(1)
        if len(data) > 10:
            break
    return read_varint(data, 0, str(cursor.file.path))[0]


def _text(part: Any, where: str, limit: int = MAX_NAME) -> str:
    if not isinstance(part, Cursor) or part.end - part.position > limit:
        raise FormatError(f"{where}: a name that is not a string, or is longer than {limit} bytes")
    try:
        return part.take(part.end - part.position).decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{where}: a name before byte {part.position} is not UTF-8") from None


def _entry(entry_part: Any, where: str, limit: int = MAX_NAME) -> tuple[str, str]:
    if not isinstance(entry_part, Cursor):
        raise FormatError(f"{where}: an entry that is not a message")
    entry = {KEY: "", VALUE: ""}
    for number, part in _fields(entry_part):
        if number in entry:
            entry[number] = _text(part, where, limit)
    return entry[KEY], entry[VALUE]


@dataclass
class _Tensor:
    """A parsed TensorProto."""

    name: str = ""
    shape: list[int] = field(default_factory=list)
    kind: int = 0
    data: list[tuple[int, Cursor]] = field(default_factory=list)
    is_external: bool = False
    external: dict[str, str] = field(default_factory=dict)


def _tensor(cursor: Cursor, where: str) -> _Tensor:
    tensor = _Tensor(_name_of(cursor, where))
    where = f"{where}: {tensor.name[:100]!r}"
    for number, part in _fields(cursor):
        _add_field(tensor, number, part, where)
        if len(tensor.shape) > MAX_RANK or len(tensor.data) > 1 or len(tensor.external) > 8:
            raise FormatError(f"{where} is not a valid ONNX tensor")
    return tensor


def _name_of(cursor: Cursor, where: str) -> str:
    """The name of a tensor, wherever it is among the fields: read first, so that errors can state it."""
    name = ""
    for part in _parts(Cursor(cursor.file, cursor.position, cursor.end), NAME):
        name = _text(part, where)
    return name


def _add_field(tensor: _Tensor, number: int, part: Any, where: str) -> None:
    if number == DIMS:
        tensor.shape += _numbers(part, where)
    elif number == TYPE and isinstance(part, int):
        tensor.kind = part
    elif number == LOCATION and isinstance(part, int):
        tensor.is_external = bool(part)
    elif number == EXTERNAL:
        key, value = _entry(part, where)
        if key in tensor.external:
            raise FormatError(f"{where} has a duplicate key in its external data: {key[:100]}")
        tensor.external[key] = value
    elif number in DATA and isinstance(part, Cursor):
        tensor.data.append((number, part))
    elif number not in (NAME, *IGNORED):
        raise FormatError(f"{where} stores its values in field {number}, which gpt2x does not read")


def _numbers(part: Any, where: str) -> list[int]:
    """Integers, packed into one field or alone in it."""
    if isinstance(part, bytes):
        raise FormatError(f"{where}: a dimension that is not an integer")
    if isinstance(part, int):
        return [part]
    cursor: Cursor = part
    numbers: list[int] = []
    while cursor.position < cursor.end and len(numbers) <= MAX_RANK:
        numbers.append(_varint(cursor))
    return numbers


class _Files:
    """The files that store the data of a model: itself, and those beside it."""

    def __init__(self, model: File) -> None:
        self.model = model
        self.others: dict[str, File] = {}
        self.spans: list[tuple[str, int, int, str]] = []

    def lazy(self, tensor: _Tensor) -> LazyTensor:
        where = f"{self.model.path}: {tensor.name[:100]!r}"
        if tensor.kind in QUANTIZED_TYPES:
            raise CheckpointError(
                f"{where} is quantized: its weights are rounded; convert the model that it was made from"
            )
        if tensor.kind not in TYPES:
            raise FormatError(f"{where}: data type {tensor.kind}, which gpt2x does not read")
        dtype, shape = DTYPES[TYPES[tensor.kind]], tuple(tensor.shape)
        if math.prod(shape) >= MAX_VALUES:
            raise FormatError(f"{where}: invalid shape, {list(shape)}")
        size = math.prod(shape) * dtype.itemsize
        file, offset, length = self._external(tensor, where, size) if tensor.is_external else self._inside(tensor)
        if length != size:
            raise FormatError(f"{where}: {length} bytes, but shape {list(shape)} of {dtype} needs {size}")
        return LazyTensor.in_file(file, offset, dtype, shape)

    def _inside(self, tensor: _Tensor) -> tuple[File, int, int]:
        if not tensor.data:
            return self.model, 0, 0
        number, data = tensor.data[0]
        if DATA[number] not in (None, tensor.kind):
            raise FormatError(
                f"{self.model.path}: {tensor.name[:100]!r} stores its values in field {number}, which is not of its dtype"
            )
        return self.model, data.position, data.end - data.position

    def _external(self, tensor: _Tensor, where: str, size: int) -> tuple[File, int, int]:
        name = tensor.external.get("location", "")
        path = beside(self.model.path.parent, name, where)
        if name not in self.others:
            if len(self.others) >= MAX_FILES:
                raise FormatError(f"{self.model.path}: its data is in more than {MAX_FILES} files")
            self.others[name] = values_file(path, "model")
        numbers = tensor.external.get("offset", "0"), tensor.external.get("length", str(size))
        # int() alone would also take signs, spaces and underscores.
        if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in numbers):
            raise FormatError(f"{where}: invalid offset or length in {name}: {numbers}")
        offset, length = map(int, numbers)
        if offset + length > self.others[name].size:
            raise truncated(where, f"{offset + length} bytes needed, {path} has {self.others[name].size}")
        self.spans.append((name, offset, offset + length, tensor.name))
        return self.others[name], offset, length

    def check_overlaps(self) -> None:
        for (file, _, end, name), (other, begin, _, second) in itertools.pairwise(sorted(self.spans)):
            if file == other and begin < end:
                raise FormatError(f"{self.model.path}: {name[:100]!r} and {second[:100]!r} overlap in {file}")
