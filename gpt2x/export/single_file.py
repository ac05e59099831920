"""An ONNX model and its weights in one file, for clients that load bytes: browsers, Android, Java, serverless functions.

The file is one protobuf message. Weights are copied in chunks, so memory does not grow with the model. Source:
``onnx.proto`` of the ONNX project, and protobuf's encoding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from converters import ConversionError
from converters.io.protobuf import varint
from converters.io.publishing import Output
from converters.io.reading import File

MAX_SINGLE_FILE = (1 << 31) - 1  # bytes of a protobuf message
GRAPH, INITIALIZER, RAW_DATA = (bytes([number << 3 | 2]) for number in (7, 5, 9))  # tags of fields


def write_single_file(out: Output, model: onnx.ModelProto, data: Path, name: str) -> None:
    """Write a model together with its external data, which is all in one file.

    Args:
        data: the file with the external data.
        name: of the result, for messages.

    Raises:
        ConversionError: if the file would be larger than protobuf allows.
    """
    source = File(data)
    tensors = [_parts(tensor) for tensor in model.graph.initializer]
    model = _copy(model)
    del model.graph.initializer[:]
    graph = model.graph.SerializeToString(deterministic=True)
    model.ClearField("graph")
    rest = model.SerializeToString(deterministic=True)
    size = len(graph) + sum(len(head) + length for head, _, length in tensors)
    if len(rest) + size + 16 > MAX_SINGLE_FILE:
        raise too_large(name, size)
    # A message may have its fields in any order. So the weights come last, and the size of the graph counts them.
    out.write(rest + GRAPH + varint(size) + graph)
    for head, offset, length in tensors:
        out.write(head)
        for chunk in source.chunks(offset, length):
            out.write(chunk)


def too_large(name: str, size: int) -> ConversionError:
    """The error for a model that exceeds the size of one file."""
    return ConversionError(
        f"{name}: would be {size / 1e9:.1f} GB, and one ONNX file holds 2 GB: remove --single-file, or choose a "
        "precision with fewer bits"
    )


def _parts(tensor: TensorProto) -> tuple[bytes, int, int]:
    """The bytes that precede an initializer's data in the result, and the offset and length of that data."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(place.get("offset", 0)), int(place.get("length", 0))
    inline = _copy(tensor)
    inline.ClearField("external_data")
    inline.ClearField("data_location")
    head = inline.SerializeToString(deterministic=True)
    if place:
        # raw_data without its bytes, which are copied behind it.
        head += RAW_DATA + varint(length)
    return INITIALIZER + varint(len(head) + length) + head, offset, length


def _copy(message: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
