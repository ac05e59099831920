"""``.onnx_adapter``: named tensors that ONNX Runtime's ``LoraAdapter`` passes to a model in place of its initializers.

A FlatBuffers message. ONNX Runtime before 1.26 does not compare a tensor's shape with its bytes, and reads beyond them; so
gpt2x reads the file itself. Source: ``adapter_schema.fbs`` of ONNX Runtime 1.20, and FlatBuffers' "Internals".
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FormatError, truncated
from ..io.publishing import Output
from ..io.reading import File
from ..tensors import DTYPES, LazyTensor
from ..values import are_sizes
from .container import MAX_RANK, MAX_VALUES, Container

SUFFIX = ".onnx_adapter"
IDENTIFIER = b"TORT"
FORMAT_VERSION = 1
# Fields of Adapter, and those of Parameter, in the order of the schema.
FORMAT, PARAMETERS = 0, 3
NAME, DIMS, DATA_TYPE, RAW_DATA = 0, 1, 2, 3
TYPES = {1: "F32", 10: "F16", 11: "F64", 16: "BF16"}  # TensorProto.DataType -> ours
MAX_PARAMETERS = 20_000
MAX_NAME = 1024
MAX_FILE = (1 << 31) - 1  # bytes of a FlatBuffers message
TABLE = 20  # bytes of a table of either kind: a reference to the vtable, and four fields
VTABLE = struct.pack("<6H", 12, TABLE, 4, 8, 12, 16)  # its size, that of the table, and where the fields are in it
ROOT = 8 + len(VTABLE)


# --------------------------------------------------------------------------------------------------------------- read


def open_onnx_adapter(path: Path) -> Container:
    """Open the parameters of an adapter.

    Raises:
        FormatError: if the file is invalid.
    """
    message = _Message(File(path))
    if message.file.size < 8 or message.file.read(4, 4) != IDENTIFIER:
        raise FormatError(f"{path}: not an adapter of ONNX Runtime: it does not have {IDENTIFIER.decode()} at byte 4")
    root = _Table(message, message.reference(0))
    version = root.number(FORMAT)
    if version != FORMAT_VERSION:
        raise FormatError(f"{path}: version {version} of the format; gpt2x reads version {FORMAT_VERSION}")
    tensors: dict[str, LazyTensor] = {}
    for place in _elements(root):
        name, tensor = _parameter(_Table(message, message.reference(place)), str(path))
        if name in tensors:
            raise FormatError(f"{path}: duplicate parameter {name[:100]!r}")
        tensors[name] = tensor
    # Each of them is inside the file. Many references to the same bytes would be a small file with a large model.
    if sum(tensor.nbytes for tensor in tensors.values()) > message.file.size:
        raise FormatError(f"{path}: its parameters overlap")
    return Container("onnx_adapter", path, tensors)


class _Message:
    """References and vectors of a FlatBuffers message. Every read is inside the file, or a FormatError."""

    def __init__(self, file: File) -> None:
        self.file = file

    def number(self, form: str, place: int) -> int:
        """One number, in a format of ``struct``."""
        return int(struct.unpack(form, self.file.read(place, struct.calcsize(form)))[0])

    def reference(self, place: int) -> int:
        """The place that a reference leads to, which is always a later one."""
        return place + self.number("<I", place)

    def vector(self, place: int, itemsize: int, limit: int, what: str) -> tuple[int, int]:
        """Where the elements of a vector begin, and how many there are.

        Raises:
            FormatError: if there are more than ``limit``, or the file is truncated.
        """
        count = self.number("<I", place)
        if count > limit:
            raise FormatError(f"{self.file.path}: {count} {what}, which exceeds the limit of {limit}")
        if place + 4 + count * itemsize > self.file.size:
            needed = place + 4 + count * itemsize
            raise truncated(self.file.path, f"{needed} bytes needed, the file has {self.file.size}")
        return place + 4, count


class _Table:
    """A table of a message, whose fields are found by its vtable."""

    def __init__(self, message: _Message, place: int) -> None:
        self.message = message
        self.place = place
        # A vtable lies anywhere before or after its tables, which may share it: the distance has a sign.
        self.vtable = place - message.number("<i", place)
        self.size = message.number("<H", self.vtable)

    def field(self, index: int) -> int | None:
        """Where a field is; None if the table leaves it out."""
        entry = 4 + 2 * index
        offset = self.message.number("<H", self.vtable + entry) if entry + 2 <= self.size else 0
        return self.place + offset if offset else None

    def number(self, index: int) -> int:
        """An int32; 0 if it is left out."""
        place = self.field(index)
        return 0 if place is None else self.message.number("<i", place)

    def vector(self, index: int, itemsize: int, limit: int, what: str) -> tuple[int, int]:
        """As ``_Message.vector``; no elements if it is left out."""
        place = self.field(index)
        if place is None:
            return 0, 0
        return self.message.vector(self.message.reference(place), itemsize, limit, what)


def _elements(root: _Table) -> Iterator[int]:
    begin, count = root.vector(PARAMETERS, 4, MAX_PARAMETERS, "parameters")
    for i in range(count):
        yield begin + 4 * i


def _parameter(table: _Table, where: str) -> tuple[str, LazyTensor]:
    """The name and the tensor of a parameter."""
    file = table.message.file
    begin, size = table.vector(NAME, 1, MAX_NAME, "bytes of a name")
    try:
        name = file.read(begin, size).decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{where}: a name at byte {begin} is not UTF-8") from None
    where = f"{where}: {name[:100]!r}"
    begin, rank = table.vector(DIMS, 8, MAX_RANK, "dimensions")
    shape = struct.unpack(f"<{rank}q", file.read(begin, 8 * rank))
    if not are_sizes(shape, MAX_VALUES) or math.prod(shape) >= MAX_VALUES:
        raise FormatError(f"{where}: invalid shape, {list(shape)}")
    kind = table.number(DATA_TYPE)
    if kind not in TYPES:
        raise FormatError(f"{where}: data type {kind}, which gpt2x does not read")
    dtype = DTYPES[TYPES[kind]]
    begin, size = table.vector(RAW_DATA, 1, file.size, "bytes")
    expected = math.prod(shape) * dtype.itemsize
    if size != expected:
        raise FormatError(f"{where}: {size} bytes, but shape {list(shape)} of {dtype} needs {expected}")
    return name, LazyTensor.in_file(file, begin, dtype, tuple(shape))


# -------------------------------------------------------------------------------------------------------------- write


@dataclass(frozen=True)
class _Places:
    """Where the parts of one parameter begin in a file."""

    table: int
    name: int
    dims: int
    data: int


def write_onnx_adapter(out: Output, tensors: Mapping[str, LazyTensor]) -> None:
    """Write float32 tensors as an adapter, in their order. Equal tensors give equal bytes.

    Raises:
        FormatError: if the file would be larger than the format allows.
    """
    places = _layout(tensors)
    head = bytearray(_head_size(places))
    struct.pack_into("<I4s", head, 0, ROOT, IDENTIFIER)
    head[8:ROOT] = VTABLE
    vector = ROOT + TABLE
    struct.pack_into("<5i", head, ROOT, ROOT - 8, FORMAT_VERSION, 1, 1, 4)  # versions of the adapter and the model: 1
    struct.pack_into("<I", head, vector, len(tensors))
    for i, (name, place) in enumerate(zip(tensors, places, strict=True)):
        element = vector + 4 + 4 * i
        struct.pack_into("<I", head, element, place.table - element)
        _put_parameter(head, place, name.encode(), tensors[name])
    out.write(bytes(head))
    position = len(head)
    for place, tensor in zip(places, tensors.values(), strict=True):
        out.write(bytes(place.data - 4 - position) + struct.pack("<I", tensor.nbytes))
        for chunk in tensor.chunks():
            out.write(chunk)
        position = place.data + tensor.nbytes


def _layout(tensors: Mapping[str, LazyTensor]) -> list[_Places]:
    """Where everything is: the tables, then names and dimensions, then the data."""
    first = ROOT + TABLE + 4 + 4 * len(tensors)
    position = first + TABLE * len(tensors)
    texts = []
    for name, tensor in tensors.items():
        start = _aligned(position, 4)
        # A string ends with a zero byte that its length does not count. Numbers of 8 bytes are aligned, not the count
        # before them.
        dims = _aligned(start + 4 + len(name.encode()) + 1 + 4, 8) - 4
        texts.append((start, dims))
        position = dims + 4 + 8 * len(tensor.shape)
    places = []
    for i, (tensor, (start, dims)) in enumerate(zip(tensors.values(), texts, strict=True)):
        data = _aligned(position + 4, 16)
        places.append(_Places(first + TABLE * i, start, dims, data))
        position = data + tensor.nbytes
    if position > MAX_FILE:
        raise FormatError(f"an adapter of {position} bytes; one {SUFFIX} file holds {MAX_FILE}")
    return places


def _aligned(position: int, multiple: int) -> int:
    return -(-position // multiple) * multiple


def _head_size(places: Sequence[_Places]) -> int:
    """The size of what comes before the data, without the length of the first tensor."""
    return places[0].data - 4 if places else ROOT + TABLE + 4


def _put_parameter(head: bytearray, place: _Places, name: bytes, tensor: LazyTensor) -> None:
    """Put one parameter's table, name and dimensions into the head."""
    table = place.table
    kind = next(kind for kind, dtype in TYPES.items() if dtype == tensor.dtype.name)
    references = place.name - (table + 4), place.dims - (table + 8), kind, place.data - 4 - (table + 16)
    struct.pack_into("<5i", head, table, table - 8, *references)
    struct.pack_into(f"<I{len(name)}s", head, place.name, len(name), name)
    rank = len(tensor.shape)
    struct.pack_into(f"<I{rank}q", head, place.dims, rank, *tensor.shape)
