"""Small ONNX models in memory, written without the onnx package, which running a model does not need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from converters.io.protobuf import varint

IR_VERSION, OPSET = 8, 17  # ONNX Runtime 1.12 and newer load them
FLOAT32, INT8, INT64, FLOAT16 = 1, 3, 7, 10  # of onnx.TensorProto
INT = 2  # of onnx.AttributeProto


@dataclass(frozen=True)
class Node:
    """An operator of ONNX with one output."""

    operator: str
    inputs: tuple[str, ...]
    output: str
    axis: int | None = None


def graph_bytes(nodes: Sequence[Node], inputs: Mapping[str, int], outputs: Mapping[str, int]) -> bytes:
    """The bytes of an ONNX model.

    Args:
        inputs: the element type of each; they have any shape.
        outputs: the same.
    """
    graph = b"".join(_message(1, _node(node)) for node in nodes) + _message(2, b"graph")
    graph += b"".join(_message(11, _value(*pair)) for pair in inputs.items())
    graph += b"".join(_message(12, _value(*pair)) for pair in outputs.items())
    return _number(1, IR_VERSION) + _message(7, graph) + _message(8, _number(2, OPSET))


def _node(node: Node) -> bytes:
    data = b"".join(_message(1, name.encode()) for name in node.inputs)
    data += _message(2, node.output.encode()) + _message(4, node.operator.encode())
    if node.axis is not None:
        data += _message(5, _message(1, b"axis") + _number(3, node.axis) + _number(20, INT))
    return data


def _value(name: str, element: int) -> bytes:
    return _message(1, name.encode()) + _message(2, _message(1, _number(1, element)))


def _number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def _message(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data
