"""An ONNX graph under construction, whose weights lie in a file beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import TensorProto, helper, numpy_helper

from .stored import Piece, Stored

ELEMENTS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int4": TensorProto.INT4,
}


class Value(NamedTuple):
    """An ONNX value: its name and dtype (numpy's name), and what the translation of later operators needs to know."""

    name: str
    dtype: str
    source: Optional[Value] = None  # the value that this one was split or sliced from
    after_gelu: bool = False  # whether GELU computed it: then no number is below -0.17


class Weight(NamedTuple):
    """A weight of the model, by its canonical name."""

    name: str


class Graph:
    """Nodes and initializers.

    Args:
        stored: where each weight is in the file of weights.
        location: the name of that file.
        has_blocks: whether the opset's ``DequantizeLinear`` has blocks.
    """

    def __init__(self, stored: Stored, location: str, has_blocks: bool = True) -> None:
        self.stored = stored
        self.location = location
        self.has_blocks = has_blocks
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.shapes: dict[str, tuple[str, tuple[int | str, ...]]] = {}  # dtype and shape where ONNX cannot infer them
        self.scope = ""  # the module that is being translated
        self._names: Counter[str] = Counter()
        self._shared: dict[str, Any] = {}

    def op(self, kind: str, *arguments: Value, dtype: str | None = None, n: int = 1, **attributes: Any) -> Any:
        """Append a node.

        Args:
            dtype: of the outputs; by default the first argument's.
            n: how many outputs.

        Returns:
            Its output, or a list of ``n`` outputs.
        """
        # Names of modules show in tools such as Netron where a node comes from. Names must be unique.
        path = f"{self.scope}/{kind}" if self.scope else kind
        self._names[path] += 1
        name = path if self._names[path] == 1 else f"{path}_{self._names[path] - 1}"
        outputs = [Value(f"{name}_output_{i}", dtype or arguments[0].dtype) for i in range(n)]
        inputs = [value.name for value in arguments]
        self.nodes.append(helper.make_node(kind, inputs, [value.name for value in outputs], name, **attributes))
        return outputs[0] if n == 1 else outputs

    def constant(self, value: Any, dtype: str = "int64") -> Value:
        """A number, or a list of numbers, as a constant. Equal constants are one initializer."""
        array = np.array(value, dtype)
        name = f"constant_{dtype}_{str(value).replace(' ', '')}"
        self.initializers.setdefault(name, numpy_helper.from_array(array, name))
        return Value(name, dtype)

    def inline(self, name: str, values: ArrayLike, dtype: str) -> Value:
        """A small tensor that the ONNX file itself holds."""
        self.initializers[name] = numpy_helper.from_array(np.asarray(values, dtype), name)
        return Value(name, dtype)

    def piece(self, name: str, piece: Piece) -> Value:
        """A tensor in the file of weights."""
        if name not in self.initializers:
            self.initializers[name] = _external(name, piece, self.location)
        return Value(name, piece.dtype)

    def plain(self, weight: Weight) -> Value:
        """A weight that is not quantized."""
        piece = self.stored[weight.name]
        assert isinstance(piece, Piece), f"{weight.name} is quantized, and this operator does not dequantize it"
        return self.piece(weight.name, piece)

    def cast(self, x: Value, dtype: str) -> Value:
        """A value as another dtype. No node if it has that dtype already."""
        return x if x.dtype == dtype else self.op("Cast", x, dtype=dtype, to=ELEMENTS[dtype])

    def once(self, key: str, make: Callable[[], Value]) -> Value:
        """A value that all layers share. Its nodes have no module's name."""
        if key not in self._shared:
            scope, self.scope = self.scope, ""
            self._shared[key] = make()
            self.scope = scope
        return self._shared[key]  # type: ignore[no-any-return]

    def values(self, *arguments: Any) -> list[Value]:
        """Arguments as values of one dtype, float32 if any is. Numbers become constants, weights initializers."""
        found = [self.plain(a) if isinstance(a, Weight) else a for a in arguments]
        dtypes = [a.dtype for a in found if isinstance(a, Value)]
        dtype = "float32" if "float32" in dtypes else dtypes[0]
        return [self.cast(a, dtype) if isinstance(a, Value) else self.constant(a, dtype) for a in found]


def _external(name: str, piece: Piece, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=ELEMENTS[piece.dtype], dims=piece.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", piece.offset), ("length", piece.size)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
