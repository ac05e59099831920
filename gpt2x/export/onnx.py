"""GPT2 -> ONNX: the model is traced by ``torch.fx``, and one table translates its operators.

No weight is touched: the model lives on the meta device, and an initializer says where in a safetensors file its bytes
lie. Sources: ONNX's operator specifications (opset 23) and its external data format (``docs/ExternalData.md`` of onnx).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional, Tuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn
from torch.nn import functional as F

from converters.spec import GPT2Config
from gpt2x import __version__, contract
from gpt2x import model as definition
from gpt2x.contract import Slot

from .interface import Interface

OPSET = 23  # the first with Attention
IR_VERSION = 11  # the first that knows opset 23
LOWEST = float(np.finfo(np.float32).min)  # a logit that gets no weight, and is not yet infinite
ELEMENTS = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


class Place(NamedTuple):
    """Where the bytes of a tensor lie in the file of weights."""

    shape: tuple[int, ...]
    offset: int
    size: int


def to_onnx(
    config: GPT2Config, weights: Mapping[str, Place], metadata: Mapping[str, str], *, last: bool = False
) -> onnx.ModelProto:
    """The ONNX model of a configuration.

    Args:
        weights: canonical name -> where its float32 bytes lie in ``model.safetensors`` beside the ONNX file.
        metadata: goes into ``metadata_props``.
        last: compute the logits of the last position only.

    Returns:
        A model of a few kilobytes, equal for equal arguments, that ``onnx.checker`` passes.
    """
    takes, gives = contract.inputs(config), contract.outputs(config, last)
    nodes, constants = translate(trace(config, last), takes, list(gives))
    graph = helper.make_graph(
        nodes,
        "gpt2",
        [_info(name, slot) for name, slot in takes.items()],
        [_info(name, slot) for name, slot in gives.items()],
        [_external(name, place) for name, place in weights.items()] + constants,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="gpt2x",
        producer_version=__version__,
    )
    helper.set_model_props(model, dict(metadata))
    return model


def _info(name: str, slot: Slot) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ELEMENTS[slot.dtype], slot.shape)


def _external(name: str, place: Place) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=place.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", contract.WEIGHTS), ("offset", place.offset), ("length", place.size)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


# ---------------------------------------------------------------------------------------------------------- tracing


def onnx_attention(
    q: Any, k: Any, v: Any, past: Optional[Tuple[Any, Any]], mask: Any, n_head: int, scale: float, drop: float
) -> Tuple[Any, Tuple[Any, Any]]:
    """``gpt2x.model.attention`` as one node: ONNX's operator joins the cache and the new keys and values itself."""
    assert past is not None
    node = q.tracer.create_proxy("call_function", onnx_attention, (q, k, v, mask, *past, n_head, scale), {})
    return node[0], (node[1], node[2])


@contextmanager
def attention_as_a_node() -> Iterator[None]:
    """While this lasts, ``GPT2`` attends with ``onnx_attention``."""
    before, definition.attention = definition.attention, onnx_attention
    try:
        yield
    finally:
        definition.attention = before


def trace(config: GPT2Config, last: bool = False) -> fx.GraphModule:
    """The from-scratch model as a graph of torch's operators, whatever the batch and the lengths."""
    with torch.device("meta"):
        model = Interface(definition.GPT2.from_config(config), last).eval()
    with attention_as_a_node():
        cache = [(fx.PH, fx.PH)] * config.n_layer  # type: ignore[attr-defined]
        return fx.symbolic_trace(model, concrete_args={"past": cache})


# ------------------------------------------------------------------------------------------------------ translating


class Value(NamedTuple):
    """An ONNX value: its name, and numpy's name of its type."""

    name: str
    dtype: str


class Graph:
    """ONNX nodes in the making."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.scope = ""  # the module that is being translated
        self._names: Counter[str] = Counter()
        self._additive: dict[Value, Value] = {}

    def op(self, kind: str, *arguments: Value, dtype: str | None = None, n: int = 1, **attributes: Any) -> Any:
        """Append a node. Gives its value, or a list of ``n``, of ``dtype`` or else the first argument's type."""
        path = f"{self.scope}/{kind}" if self.scope else kind
        self._names[path] += 1
        name = path if self._names[path] == 1 else f"{path}_{self._names[path] - 1}"
        outputs = [Value(f"{name}_output_{i}", dtype or arguments[0].dtype) for i in range(n)]
        names = [value.name for value in arguments], [value.name for value in outputs]
        self.nodes.append(helper.make_node(kind, *names, name, **attributes))
        return outputs[0] if n == 1 else outputs

    def constant(self, value: Any, dtype: str = "int64") -> Value:
        """A number, or a list of them, as a constant; equal ones are one."""
        array = np.array(value, dtype)
        name = f"constant_{dtype}_{str(value).replace(' ', '')}"
        self.constants.setdefault(name, numpy_helper.from_array(array, name))
        return Value(name, dtype)

    def additive(self, mask: Value) -> Value:
        """A mask as numbers to add: one conversion for all layers, where a runtime would make one for each."""
        if mask not in self._additive:
            allowed, not_allowed = self.constant(0.0, "float32"), self.constant(LOWEST, "float32")
            self._additive[mask] = self.op("Where", mask, allowed, not_allowed, dtype="float32")
        return self._additive[mask]

    def values(self, *arguments: Any) -> list[Value]:
        """Arguments of which some are plain numbers, these as constants of the others' type."""
        dtype = next(a.dtype for a in arguments if isinstance(a, Value))
        return [a if isinstance(a, Value) else self.constant(a, dtype) for a in arguments]


Operator = Callable[..., Any]


def _same(kind: str, dtype: str | None = None) -> Operator:
    """An operator that ONNX has, too."""
    return lambda g, *arguments: g.op(kind, *g.values(*arguments), dtype=dtype)


def _range(g: Graph, *ends: Any, device: Any) -> Value:
    start, end = g.values(*ends) if len(ends) == 2 else g.values(0, *ends)
    return g.op("Range", start, end, g.constant(1))  # type: ignore[no-any-return]


class Sizes(NamedTuple):
    """``x.shape``, of which single sizes are asked for."""

    of: Value


def _attribute(g: Graph, x: Value, name: str) -> Any:
    return {"shape": Sizes(x), "device": None, "dtype": x.dtype}[name]


def _item(g: Graph, x: Any, index: int) -> Any:
    if not isinstance(x, Sizes):
        return x[index]
    return g.op("Squeeze", g.op("Shape", x.of, dtype="int64", start=index, end=index + 1))


def _narrow(g: Graph, x: Value, axis: int, start: int, length: int) -> Any:
    assert (start, length) == (-1, 1), "only the last one is asked for"
    return g.op("Slice", x, g.constant([-1]), g.constant([np.iinfo(np.int64).max]), g.constant([axis]))


def _attend(g: Graph, q: Value, k: Value, v: Value, mask: Value, key: Value, value: Value, n: int, scale: float) -> Any:
    return g.op("Attention", q, k, v, g.additive(mask), key, value, n=3, q_num_heads=n, kv_num_heads=n, scale=scale)


def _cast(g: Graph, x: Value, dtype: str) -> Any:
    return x if x.dtype == dtype else g.op("Cast", x, dtype=dtype, to=ELEMENTS[dtype])


# torch's operator (a function, a method's name, or the class of a module) -> ONNX's. Whatever the model comes to use
# must be here: an unknown one stops the export.
OPERATORS: dict[Any, Operator] = {
    getattr: _attribute,
    operator.getitem: _item,
    operator.add: _same("Add"),
    operator.mul: _same("Mul"),
    operator.matmul: _same("MatMul"),
    operator.le: _same("LessOrEqual", "bool"),
    operator.eq: _same("Equal", "bool"),
    operator.ne: lambda g, *pair: g.op("Not", g.op("Equal", *g.values(*pair), dtype="bool")),
    operator.or_: _same("Or"),
    operator.and_: _same("And"),
    torch.arange: _range,
    torch.tanh: _same("Tanh"),
    F.embedding: lambda g, ids, table, **_: g.op("Gather", table, ids, axis=0),
    F.linear: lambda g, x, weight: g.op("MatMul", x, g.op("Transpose", weight, perm=[1, 0])),
    onnx_attention: _attend,
    "unsqueeze": lambda g, x, axis: g.op("Unsqueeze", x, g.constant([axis])),
    "chunk": lambda g, x, n, dim: g.op("Split", x, n=n, num_outputs=n, axis=dim),
    "narrow": _narrow,
    "float": lambda g, x: _cast(g, x, "float32"),
    "to": _cast,
    nn.Dropout: lambda g, module, x: x,
    nn.GELU: lambda g, module, x: g.op("Gelu", x, approximate=module.approximate),
    nn.ReLU: lambda g, module, x: g.op("Relu", x),
    nn.SiLU: lambda g, module, x: g.op("Mul", x, g.op("Sigmoid", x)),
    nn.Tanh: lambda g, module, x: g.op("Tanh", x),
    nn.LayerNorm: lambda g, module, x: g.op(
        "LayerNormalization", x, *(Value(f"{g.scope}.{p}", x.dtype) for p in ("weight", "bias")), epsilon=module.eps
    ),
}


def translate(
    traced: fx.GraphModule, takes: Mapping[str, Slot], gives: list[str]
) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """The nodes of a traced model and their constants. ``takes`` are its inputs, ``gives`` the names of its outputs.

    Raises:
        NotImplementedError: for an operator that is not in the table.
    """
    g = Graph()
    inputs = (Value(name, slot.dtype) for name, slot in takes.items())
    values: dict[fx.Node, Any] = {}
    results: list[Value] = []
    for node in traced.graph.nodes:
        g.scope = _module_of(node)
        arguments, options = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "placeholder":
            values[node] = next(inputs)
        elif node.op == "get_attr":
            values[node] = Value(node.target.removeprefix("model."), "float32")
        elif node.op == "output":
            results = _flat(arguments)
        elif node.op == "call_module":
            module = traced.get_submodule(node.target)
            values[node] = _operator(type(module), node)(g, module, *arguments, **options)
        else:
            values[node] = _operator(node.target, node)(g, *arguments, **options)
    renamed = {value.name: name for value, name in zip(results, gives, strict=True)}
    for made in g.nodes:
        made.input[:] = [renamed.get(name, name) for name in made.input]
        made.output[:] = [renamed.get(name, name) for name in made.output]
    return g.nodes, list(g.constants.values())


def _flat(results: Any) -> list[Value]:
    return [results] if isinstance(results, Value) else [value for part in results for value in _flat(part)]


def _operator(target: Any, node: fx.Node) -> Operator:
    if target not in OPERATORS:
        raise NotImplementedError(f"{target} (in {_module_of(node) or 'GPT2'}) has no translation to ONNX")
    return OPERATORS[target]


def _module_of(node: fx.Node) -> str:
    """The module that a node comes from, such as ``h.0.attn.c_attn``."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack), "")
    return path.removeprefix("model").removeprefix(".")
