"""GPT2 -> ONNX: the model is traced by ``torch.fx``, and one table translates its operators.

No weight is touched: the model lives on the meta device, and an initializer says where in a file its bytes lie.
Sources: ONNX's operator specifications (opset 17 to 23) and its external data format (``docs/ExternalData.md`` of onnx).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional, Tuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn
from torch.nn import functional as F

from converters import ConfigError, GPT2Config

from .. import contract
from .. import model as definition
from .._version import __version__
from ..contract import Slot
from ..precisions.weights import Piece, Quantized, Weights
from .interface import Interface

ATTENTION_OPSET = 23  # the first with Attention
OPSETS = range(17, 24)  # LayerNormalization comes with 17
BLOCKS_OPSET = 21  # the first whose DequantizeLinear has blocks
INT4_OPSET = 21  # the first whose operators take int4
ELEMENTS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int4": TensorProto.INT4,
}
MICROSOFT = "com.microsoft"  # the domain of GroupQueryAttention
Scales = Tuple[NDArray[np.float32], NDArray[np.float32]]


def to_onnx(
    config: GPT2Config,
    weights: Weights,
    metadata: Mapping[str, str],
    *,
    last: bool = False,
    cache: str = "growing",
    scales: Sequence[Scales] = (),
    opset: int | None = None,
) -> onnx.ModelProto:
    """The ONNX model of a configuration.

    Args:
        weights: where each weight lies in the file beside the ONNX file, and as what.
        metadata: goes into ``metadata_props``, with the first version of ONNX Runtime that runs the model.
        last: compute the logits of the last position only.
        cache: one of ``contract.CACHES``.
        scales: of keys and values in each layer, (H, 1, D) each, for a cache of 8-bit numbers.
        opset: the version of ONNX's operators; by default the lowest that has them all. From 23 on, a growing cache is
            attended to with ONNX's ``Attention``, below with ``MatMul`` and ``Softmax``.

    Returns:
        A model of a few kilobytes, equal for equal arguments, that ``onnx.checker`` passes.

    Raises:
        ConfigError: if this opset lacks an operator of the model.
    """
    kind = weights.precision, cache
    takes, gives = contract.inputs(config, *kind), contract.outputs(config, last, *kind)
    g = translate(trace(config, last), Graph(weights, cache, scales, opset), takes, list(gives))
    lowest = lowest_opset(g)
    if opset is not None and opset not in range(lowest, OPSETS.stop):
        raise unknown_opset(weights.precision, cache, lowest, opset)
    opset = opset or lowest
    graph = helper.make_graph(
        g.nodes,
        "gpt2",
        [_info(name, slot) for name, slot in takes.items()],
        [_info(name, slot) for name, slot in gives.items()],
        list(g.initializers.values()),
        value_info=[_info(name, slot) for name, slot in g.shapes.items()],
    )
    imports = [helper.make_opsetid("", opset)]
    if contract.stays(cache):
        imports.append(helper.make_opsetid(MICROSOFT, 1))
    model = helper.make_model(
        graph,
        opset_imports=imports,
        ir_version=helper.find_min_ir_version_for(imports, ignore_unknown=True),
        producer_name="gpt2x",
        producer_version=__version__,
    )
    helper.set_model_props(model, {**metadata, contract.RUNTIME: contract.runtime_version(*kind, opset)})
    return model


def unknown_opset(precision: str, cache: str, lowest: int, opset: int) -> ConfigError:
    """The error for an opset that lacks an operator of a model."""
    return ConfigError(
        f"opset {opset} is too low for {precision} with --cache {cache}: {lowest} to {OPSETS[-1]} are supported. Leave --opset "
        f"out for {lowest}, which loads most widely"
    )


def lowest_opset(g: Graph) -> int:
    """The lowest of ``OPSETS`` that has every operator of a graph as it is used there."""
    standard = [node for node in g.nodes if not node.domain]
    kinds = {(node.op_type, len(node.input), tuple(a.name for a in node.attribute)) for node in standard}
    lowest = next(opset for opset in OPSETS if all(_knows(opset, *kind) for kind in kinds))
    has_int4 = any(tensor.data_type == TensorProto.INT4 for tensor in g.initializers.values())
    return max(lowest, INT4_OPSET) if has_int4 else lowest


def _knows(opset: int, operator: str, inputs: int, attributes: tuple[str, ...]) -> bool:
    """Whether a version of ONNX has an operator with so many inputs and these attributes."""
    try:
        schema = onnx.defs.get_schema(operator, opset)
    except onnx.defs.SchemaError:
        return False
    return inputs <= schema.max_input and all(name in schema.attributes for name in attributes)


def _info(name: str, slot: Slot) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ELEMENTS[slot.dtype], slot.shape)


def _external(name: str, piece: Piece, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=ELEMENTS[piece.dtype], dims=piece.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", piece.offset), ("length", piece.size)):
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


class Weight(NamedTuple):
    """A weight of the model, by its canonical name."""

    name: str


class Graph:
    """An ONNX graph in the making."""

    def __init__(
        self, weights: Weights, cache: str = "growing", scales: Sequence[Scales] = (), opset: int | None = None
    ) -> None:
        self.weights, self.cache, self.scales = weights, cache, iter(scales)
        self.has_attention = opset is not None and opset >= ATTENTION_OPSET
        self.has_blocks = opset is None or opset >= BLOCKS_OPSET
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.shapes: dict[str, Slot] = {}  # of values that shape inference cannot see
        self.n_embd = weights.stored["wpe.weight"].shape[1]  # type: ignore[union-attr]
        self.scope = ""  # the module that is being translated
        self._names: Counter[str] = Counter()
        self._made: dict[str, Any] = {}

    def op(self, kind: str, *arguments: Value, dtype: str | None = None, n: int = 1, **attributes: Any) -> Any:
        """Append a node. Gives its value, or a list of ``n``, of ``dtype`` or else the first argument's type."""
        path = f"{self.scope}/{kind}" if self.scope else kind
        self._names[path] += 1
        name = path if self._names[path] == 1 else f"{path}_{self._names[path] - 1}"
        outputs = [Value(f"{name}_output_{i}", dtype or arguments[0].dtype) for i in range(n)]
        names = [value.name for value in arguments], [value.name for value in outputs]
        self.nodes.append(helper.make_node(kind, *names, name, **attributes))
        return outputs[0] if n == 1 else outputs

    def maker(self, value: Value) -> onnx.NodeProto:
        """The node that a value comes from."""
        return next(node for node in reversed(self.nodes) if value.name in node.output)

    def constant(self, value: Any, dtype: str = "int64") -> Value:
        """A number, or a list of them, as a constant; equal ones are one."""
        array = np.array(value, dtype)
        name = f"constant_{dtype}_{str(value).replace(' ', '')}"
        self.initializers.setdefault(name, numpy_helper.from_array(array, name))
        return Value(name, dtype)

    def inline(self, name: str, array: NDArray[Any]) -> Value:
        """A small tensor of numbers that the ONNX file itself holds."""
        self.initializers[name] = numpy_helper.from_array(array, name)
        return Value(name, str(array.dtype))

    def piece(self, name: str, piece: Piece) -> Value:
        """A tensor in the file of weights."""
        self.initializers.setdefault(name, _external(name, piece, self.weights.location))
        return Value(name, piece.dtype)

    def plain(self, weight: Weight) -> Value:
        """A weight that is stored as it is."""
        piece = self.weights.stored[weight.name]
        assert isinstance(piece, Piece), f"{weight.name} is used where quantised weights are not looked for"
        return self.piece(weight.name, piece)

    def cast(self, x: Value, dtype: str) -> Value:
        """A value as another type, if it is not of that type already."""
        return x if x.dtype == dtype else self.op("Cast", x, dtype=dtype, to=ELEMENTS[dtype])

    def once(self, key: str, make: Callable[[], Value]) -> Value:
        """A value that all layers share, under no module's name."""
        if key not in self._made:
            scope, self.scope = self.scope, ""
            self._made[key] = make()
            self.scope = scope
        return self._made[key]  # type: ignore[no-any-return]

    def values(self, *arguments: Any) -> list[Value]:
        """Arguments of which some are plain numbers, these as constants; all of the widest type among them."""
        found = [self.plain(a) if isinstance(a, Weight) else a for a in arguments]
        types = [a.dtype for a in found if isinstance(a, Value)]
        dtype = "float32" if "float32" in types else types[0]
        return [self.cast(a, dtype) if isinstance(a, Value) else self.constant(a, dtype) for a in found]


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
    if contract.stays(g.cache):
        return _attend_in_place(g, q, k, key, value, n, scale)
    # One conversion of the mask for all layers, where a runtime would make one for each.
    allowed, not_allowed = (g.constant(number, q.dtype) for number in (0.0, float(np.finfo(q.dtype).min)))
    bias = g.once(f"additive {mask.name}", lambda: g.op("Where", mask, allowed, not_allowed, dtype=q.dtype))
    if not g.has_attention:
        return _attend_in_steps(g, q, k, v, bias, key, value, n, scale)
    options: dict[str, Any] = {"q_num_heads": n, "kv_num_heads": n, "scale": scale}
    if q.dtype == "float16":
        options["softmax_precision"] = TensorProto.FLOAT
    return g.op("Attention", q, k, v, bias, key, value, n=3, **options)


def _attend_in_steps(
    g: Graph, q: Value, k: Value, v: Value, bias: Value, key: Value, value: Value, n: int, scale: float
) -> Any:
    """The same in operators that runtimes before ONNX Runtime 1.23 have, too; the softmax in float32."""
    heads = g.constant([0, 0, n, -1])
    q = g.op("Mul", q, g.constant(scale, q.dtype))
    q, k, v = (g.op("Transpose", g.op("Reshape", x, heads), perm=[0, 2, 1, 3]) for x in (q, k, v))  # (B, H, T, D)
    keys = g.op("Concat", key, k, axis=2)  # (B, H, P + T, D)
    values = g.op("Concat", value, v, axis=2)
    scores = g.op("MatMul", q, g.op("Transpose", keys, perm=[0, 1, 3, 2]))  # (B, H, T, P + T)
    scores = g.op("Add", scores, bias)
    shares = g.cast(g.op("Softmax", g.cast(scores, "float32"), axis=-1), q.dtype)
    y = g.op("Transpose", g.op("MatMul", shares, values), perm=[0, 2, 1, 3])
    return [g.op("Reshape", y, g.constant([0, 0, -1])), keys, values]


def _attend_in_place(g: Graph, q: Value, k: Value, key: Value, value: Value, n: int, scale: float) -> Any:
    """Attention that writes new keys and values where the cache lies. It takes q, k and v as one, and knows no mask but
    the number of tokens in each row."""
    seen, one = Value("attention_mask", "int64"), g.constant(1)
    counts = g.once("counts", lambda: g.op("ReduceSum", seen, g.constant([1]), keepdims=0))
    ends = g.once("ends", lambda: g.op("Cast", g.op("Sub", counts, one), dtype="int32", to=TensorProto.INT32))
    width = g.once("width", lambda: g.op("Squeeze", g.op("Shape", seen, start=1, end=2)))
    total = g.once("total", lambda: g.op("Cast", width, dtype="int32", to=TensorProto.INT32))
    qkv = Value(g.maker(k).input[0], q.dtype)  # what was split
    nothing = Value("", "")
    heads: dict[str, Any] = {"num_heads": n, "kv_num_heads": n, "scale": scale}
    arguments = [qkv, nothing, nothing, key, value, ends, total]
    if g.cache == "inplace-int8":
        names = (f"{g.scope}.key_scale", f"{g.scope}.value_scale")
        scales = [g.inline(name, array) for name, array in zip(names, next(g.scales), strict=True)]
        arguments += [nothing] * 5 + scales  # no rotation, positions, bias or sink
        heads |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    y, *present = g.op("GroupQueryAttention", *arguments, n=3, domain=MICROSOFT, **heads)
    g.shapes[y.name] = Slot(y.dtype, (contract.BATCH, contract.NEW, g.n_embd))
    narrowed = g.maker(q).op_type == "Slice"  # the last token alone is asked for
    return [_narrow(g, y, 1, -1, 1) if narrowed else y, *present]


def _project(g: Graph, x: Value, weight: Any) -> Any:
    """``x @ weight``."""
    if isinstance(weight, Value):
        return g.op("MatMul", x, weight)
    stored = g.weights.stored[weight.name]
    if isinstance(stored, Piece):
        return g.op("MatMul", g.cast(x, stored.dtype), g.plain(weight))
    return _multiply(g, x, weight.name, stored)


def _multiply(g: Graph, x: Value, name: str, stored: Quantized, transposed: bool = False) -> Value:
    """``x`` times a quantised matrix, which may have to be transposed: a constant, so that ONNX Runtime does it once."""
    parts = [g.piece(name, stored.q), g.piece(f"{name}_scale", stored.scale)]
    if transposed:
        parts = [g.op("Transpose", part, perm=[1, 0]) for part in parts]
    if g.weights.precision == "w8a8":
        return _multiply_whole(g, x, *parts)
    # The pair of DequantizeLinear and MatMul is what ONNX Runtime makes one, if nothing else uses the numbers.
    numbers, scale = parts
    matrix = _dequantize(g, numbers, scale, 0, stored.q.shape[int(transposed)], stored.block)
    return g.op("MatMul", x, matrix)  # type: ignore[no-any-return]


def _multiply_whole(g: Graph, x: Value, numbers: Value, scale: Value) -> Value:
    """``x @ (numbers * scale)``, (B, T, K) by int8 (K, N) with scales (1, N), as a product of whole numbers.

    Each row of x is rounded to 8 bits by its own largest number, so that what else is in the batch or the chunk changes
    nothing. GELU ends at -0.17, so that after it nearly all of the 8 bits are for what is positive.
    """
    if g.maker(x).op_type == "Gelu":
        zero, levels = 16, 239
        least = g.constant(levels / 94, "float32")  # so that -0.17 is no more than 16 steps
        largest = g.op("Max", g.op("ReduceMax", x, g.constant([-1]), keepdims=1), least)
    else:
        zero, levels = 128, 127
        largest = g.op("ReduceMax", g.op("Abs", x), g.constant([-1]), keepdims=1)
    point, step = g.constant(zero, "uint8"), g.constant(1 / levels, "float32")
    shares = g.op("Div", x, largest)  # NaN in a row of zeros: whatever whole numbers that gives, 0 times them is 0
    rounded = g.op("QuantizeLinear", shares, step, point, dtype="uint8")
    product = g.cast(g.op("MatMulInteger", rounded, numbers, point, dtype="int32"), "float32")
    return g.op("Mul", g.op("Mul", product, largest), g.op("Mul", scale, step))  # type: ignore[no-any-return]


def _embed(g: Graph, ids: Value, table: Weight, **_: Any) -> Any:
    """Rows of a table, (B, T, C), in float32."""
    stored = g.weights.stored[table.name]
    if isinstance(stored, Piece):
        return g.cast(g.op("Gather", g.plain(table), ids, axis=0), "float32")
    if stored.q.dtype == "int4":
        rows = _gather4(g, ids, table.name, stored.q)
    else:
        rows = g.op("Gather", g.piece(table.name, stored.q), ids, axis=0)
    scales = g.op("Gather", g.piece(f"{table.name}_scale", stored.scale), ids, axis=0)
    if g.weights.precision == "w8a8":  # a row has one scale
        return g.op("Mul", g.cast(rows, "float32"), scales)
    return _dequantize(g, rows, scales, 2, stored.q.shape[1], stored.block)


def _dequantize(g: Graph, numbers: Value, scales: Value, axis: int, length: int, block: int) -> Value:
    """Numbers times the scales of their blocks along an axis of this length, in float32."""
    if g.has_blocks:
        return g.op("DequantizeLinear", numbers, scales, dtype="float32", axis=axis, block_size=block)  # type: ignore[no-any-return]
    places = g.inline(f"blocks_of_{length}_by_{block}", np.arange(length) // block)
    return g.op("Mul", g.cast(numbers, "float32"), g.op("Gather", scales, places, axis=axis))  # type: ignore[no-any-return]


def _gather4(g: Graph, ids: Value, name: str, q: Piece) -> Value:
    """Rows of 4-bit numbers as int8. Gather takes no int4, so it gets the same bytes of the file as uint8."""
    V, C = q.shape
    pairs = g.op("Gather", g.piece(f"{name}_pairs", Piece("uint8", (V, C // 2), q.offset, q.size)), ids, axis=0)
    low = g.op("BitwiseAnd", pairs, g.constant(15, "uint8"))
    high = g.op("BitShift", pairs, g.constant(4, "uint8"), direction="RIGHT")
    halves = [g.op("Unsqueeze", half, g.constant([3])) for half in (low, high)]
    numbers = g.op("Reshape", g.op("Concat", *halves, axis=3), g.constant([0, 0, C]))  # (B, T, C) of 0 to 15
    signed = g.op("BitwiseXor", numbers, g.constant(8, "uint8"))  # and 8 too many
    return g.cast(g.op("Sub", g.cast(signed, "int32"), g.constant(8, "int32")), "int8")


def _unembed(g: Graph, x: Value, table: Weight) -> Any:
    """``x @ table.T``, in float32."""
    stored = g.weights.stored[table.name]
    if isinstance(stored, Piece):
        columns = g.op("Transpose", g.cast(g.plain(table), "float32"), perm=[1, 0])
        return g.op("MatMul", x, columns)
    return _multiply(g, x, table.name, stored, transposed=True)


def _normalize(g: Graph, module: nn.LayerNorm, x: Value) -> Any:
    parts = (g.plain(Weight(f"{g.scope}.{part}")) for part in ("weight", "bias"))
    return g.op("LayerNormalization", g.cast(x, "float32"), *parts, epsilon=module.eps)


def _same_type(g: Graph, x: Value, dtype: Any = None) -> Value:
    """Between types of floats: which of them is used where is the precision's business."""
    return x


# torch's operator (a function, a method's name, or the class of a module) -> ONNX's. Whatever the model comes to use
# must be here: an unknown one stops the export.
OPERATORS: dict[Any, Operator] = {
    getattr: _attribute,
    operator.getitem: _item,
    operator.add: _same("Add"),
    operator.mul: _same("Mul"),
    operator.matmul: _project,
    operator.le: _same("LessOrEqual", "bool"),
    operator.eq: _same("Equal", "bool"),
    operator.ne: lambda g, *pair: g.op("Not", g.op("Equal", *g.values(*pair), dtype="bool")),
    operator.or_: _same("Or"),
    operator.and_: _same("And"),
    torch.arange: _range,
    torch.tanh: _same("Tanh"),
    F.embedding: _embed,
    F.linear: _unembed,
    onnx_attention: _attend,
    "unsqueeze": lambda g, x, axis: g.op("Unsqueeze", x, g.constant([axis])),
    "chunk": lambda g, x, n, dim: g.op("Split", x, n=n, num_outputs=n, axis=dim),
    "narrow": _narrow,
    "float": _same_type,
    "to": _same_type,
    nn.Dropout: lambda g, module, x: x,
    nn.GELU: lambda g, module, x: g.op("Gelu", x, approximate=module.approximate),
    nn.ReLU: lambda g, module, x: g.op("Relu", x),
    nn.SiLU: lambda g, module, x: g.op("Mul", x, g.op("Sigmoid", x)),
    nn.Tanh: lambda g, module, x: g.op("Tanh", x),
    nn.LayerNorm: _normalize,
}


def translate(traced: fx.GraphModule, g: Graph, takes: Mapping[str, Slot], gives: list[str]) -> Graph:
    """Put the nodes of a traced model into a graph. ``takes`` are its inputs, ``gives`` the names of its outputs.

    Raises:
        NotImplementedError: for an operator that is not in the table.
    """
    inputs = (Value(name, slot.dtype) for name, slot in takes.items())
    values: dict[fx.Node, Any] = {}
    results: list[Value] = []
    for node in traced.graph.nodes:
        g.scope = _module_of(node)
        arguments, options = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "placeholder":
            values[node] = next(inputs)
        elif node.op == "get_attr":
            values[node] = Weight(node.target.removeprefix("model."))
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
    _drop_unused(g, set(gives))
    return g


def _drop_unused(g: Graph, used: set[str]) -> None:
    """Leave out what no output depends on, such as the mask of attention that knows none."""
    kept = []
    for node in reversed(g.nodes):
        if used.intersection(node.output):
            kept.append(node)
            used.update(node.input)
    g.nodes = kept[::-1]
    g.initializers = {name: tensor for name, tensor in g.initializers.items() if name in used}


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
