"""GPT2 -> ONNX: the model is traced by ``torch.fx``, and one table translates its operators.

No weight is read: the model is on the meta device, and an initializer names the place of its bytes in a file.
Sources: ONNX's operator specifications (opset 17 to 23) and its external data format (``docs/ExternalData.md`` of
onnx).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional, Tuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import fx, nn
from torch.nn import functional as F

from converters import ConfigError, GPT2Config, LazyTensor
from converters.tensors import F32

from .. import contract
from .. import model as definition
from .._version import __version__
from ..contract import Slot
from ..precisions import Precision
from ..precisions.graph import ELEMENTS, Graph, Value, Weight
from ..precisions.stored import Stored
from ..task_heads import TaskHeads
from ..tasks import GENERATION, LOGITS
from .interface import exported_module

OPSETS = range(17, 24)  # LayerNormalization comes with 17
BLOCKS_OPSET = 21  # the first whose DequantizeLinear has blocks
ATTENTION_OPSET = 23  # the first with Attention
MICROSOFT = "com.microsoft"  # the domain of GroupQueryAttention
Scales = Tuple[NDArray[np.float32], NDArray[np.float32]]
Cached = Optional[Value]  # keys or values of a cache; None if the model has none


@dataclass(frozen=True)
class Target:
    """What a model computes.

    Args:
        task: one of ``TASKS``.
        outputs: of text generation: the logits and any of ``EXTRAS``.
        heads: the heads that the task and its outputs need.
        last: compute the logits of the last position only.
        cache: of text generation, one of ``contract.CACHES``.
    """

    task: str = GENERATION
    outputs: tuple[str, ...] = (LOGITS,)
    heads: TaskHeads = field(default_factory=lambda: TaskHeads({}))
    last: bool = False
    cache: str = "growing"

    def slots(self, config: GPT2Config, precision: str) -> tuple[dict[str, Slot], dict[str, Slot]]:
        """The inputs and the outputs of the model."""
        if self.task == GENERATION:
            outputs = contract.outputs(config, self.last, precision, self.cache, self.outputs)
            return contract.inputs(config, precision, self.cache), outputs
        labels = len(self.heads.labels.names) if self.heads.labels else 0
        return contract.task_inputs(), contract.task_outputs(self.task, config, labels)


TEXT_GENERATION = Target()


def to_onnx(
    config: GPT2Config,
    precision: Precision,
    stored: Stored,
    metadata: Mapping[str, str],
    target: Target = TEXT_GENERATION,
    *,
    scales: Sequence[Scales] = (),
    opset: int | None = None,
    lora: Sequence[str] = (),
) -> onnx.ModelProto:
    """The ONNX model of a configuration.

    Args:
        stored: where each weight lies in the precision's file of weights, and how it is encoded.
        metadata: goes into ``metadata_props``, with the first version of ONNX Runtime that runs the model.
        target: what it computes. The weights of heads are read, and go into the model itself.
        scales: of keys and values in each layer, (H, 1, D) each, for an int8 cache.
        opset: the ONNX opset; by default the lowest that has all operators. From 23 on, a growing cache uses ONNX's
            ``Attention``, below ``MatMul`` and ``Softmax``.
        lora: the projections that take factors of adapters as optional inputs.

    Returns:
        A model of a few kilobytes, equal for equal arguments, that passes ``onnx.checker``.

    Raises:
        ConfigError: if this opset lacks an operator of the model.
    """
    inputs, outputs = target.slots(config, precision.name)
    cache = target.cache
    g = Graph(stored, precision.data_file, has_blocks=opset is None or opset >= BLOCKS_OPSET)
    factors = contract.factor_slots(config, lora)
    low_rank = LowRank(precision, factors)
    operators: dict[Any, Operator] = {
        **OPERATORS,
        **_operators_of(precision, low_rank),
        onnx_attention: _attention_of(config, cache, scales, opset),
        nn.Linear: HeadLayers(target.heads),
    }
    translate(trace(config, target), g, operators, inputs, list(outputs))
    assert not low_rank.changes, "a projection without a bias"
    lowest = max(lowest_opset(g), precision.min_opset)
    if opset is not None and opset not in range(lowest, OPSETS.stop):
        raise unknown_opset(precision, cache, lowest, opset)
    opset = opset or lowest
    imports = [helper.make_opsetid("", opset)]
    if contract.stays(cache):
        imports.append(helper.make_opsetid(MICROSOFT, 1))
    model = _model_of(g, {**inputs, **factors}, outputs, imports)
    runtime = contract.runtime_version(precision.name, cache, opset, lora=bool(lora))
    helper.set_model_props(model, {**metadata, contract.RUNTIME: runtime})
    return model


def _model_of(
    g: Graph, inputs: Mapping[str, Slot], outputs: Mapping[str, Slot], imports: list[onnx.OperatorSetIdProto]
) -> onnx.ModelProto:
    """A complete graph as a model, with the lowest IR version that its opsets need."""
    graph = helper.make_graph(
        g.nodes,
        "gpt2",
        [_info(name, slot) for name, slot in inputs.items()],
        [_info(name, slot) for name, slot in outputs.items()],
        list(g.initializers.values()),
        value_info=[_info(name, Slot(*known)) for name, known in g.shapes.items()],
    )
    return helper.make_model(
        graph,
        opset_imports=imports,
        ir_version=helper.find_min_ir_version_for(imports, ignore_unknown=True),
        producer_name="gpt2x",
        producer_version=__version__,
    )


def unknown_opset(precision: Precision, cache: str, lowest: int, opset: int) -> ConfigError:
    """The error for an opset that lacks an operator of a model."""
    return ConfigError(
        f"opset {opset} is too low for {precision.name} with --cache {cache}: {lowest} to {OPSETS[-1]} are supported. "
        f"Leave --opset out for {lowest}, which the most runtimes load"
    )


def lowest_opset(g: Graph) -> int:
    """The lowest of ``OPSETS`` that has every operator of a graph as it is used there."""
    standard = [node for node in g.nodes if not node.domain]
    kinds = {(node.op_type, len(node.input), tuple(a.name for a in node.attribute)) for node in standard}
    return next(opset for opset in OPSETS if all(_knows(opset, *kind) for kind in kinds))


def _knows(opset: int, operator: str, inputs: int, attributes: tuple[str, ...]) -> bool:
    """Whether an opset has an operator with so many inputs and these attributes."""
    try:
        schema = onnx.defs.get_schema(operator, opset)
    except onnx.defs.SchemaError:
        return False
    return inputs <= schema.max_input and all(name in schema.attributes for name in attributes)


def _info(name: str, slot: Slot) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ELEMENTS[slot.dtype], slot.shape)


# ---------------------------------------------------------------------------------------------------------- tracing


def onnx_attention(
    q: Any, k: Any, v: Any, past: Optional[Tuple[Any, Any]], mask: Any, n_head: int, scale: float, drop: float
) -> Tuple[Any, Tuple[Any, Any]]:
    """``gpt2x.model.attention`` as one node, which also appends the new keys and values to the cache."""
    cached = past or (None, None)
    node = q.tracer.create_proxy("call_function", onnx_attention, (q, k, v, mask, *cached, n_head, scale), {})
    return node[0], (node[1], node[2])


@contextmanager
def attention_as_a_node() -> Iterator[None]:
    """While this lasts, ``GPT2`` calls ``onnx_attention`` for attention."""
    before, definition.attention = definition.attention, onnx_attention
    try:
        yield
    finally:
        definition.attention = before


def trace(config: GPT2Config, target: Target = TEXT_GENERATION) -> fx.GraphModule:
    """The from-scratch model as a graph of torch's operators, for any batch and any lengths."""
    with torch.device("meta"):
        whole = definition.GPT2.from_config(config)
        model = exported_module(whole, target.task, target.outputs, target.heads, last=target.last).eval()
    with attention_as_a_node():
        if target.task != GENERATION:
            return fx.symbolic_trace(model)
        cache = [(fx.PH, fx.PH)] * config.n_layer  # type: ignore[attr-defined]
        return fx.symbolic_trace(model, concrete_args={"past": cache})


# ------------------------------------------------------------------------------------------------------ translating

Operator = Callable[..., Any]


def _same(kind: str, dtype: str | None = None) -> Operator:
    """An operator that ONNX has, too."""
    return lambda g, *arguments: g.op(kind, *g.values(*arguments), dtype=dtype)


def _range(g: Graph, *ends: Any, device: Any) -> Value:
    start, end = g.values(*ends) if len(ends) == 2 else g.values(0, *ends)
    return g.op("Range", start, end, g.constant(1))  # type: ignore[no-any-return]


class Sizes(NamedTuple):
    """``x.shape``, of which the model uses single sizes."""

    of: Value


def _attribute(g: Graph, x: Value, name: str) -> Any:
    return {"shape": Sizes(x), "device": None, "dtype": x.dtype}[name]


def _item(g: Graph, x: Any, index: int) -> Any:
    if not isinstance(x, Sizes):
        return x[index]
    return g.op("Squeeze", g.op("Shape", x.of, dtype="int64", start=index, end=index + 1))


def _chunk(g: Graph, x: Value, n: int, dim: int) -> list[Value]:
    chunks = g.op("Split", x, n=n, num_outputs=n, axis=dim)
    return [chunk._replace(source=x) for chunk in chunks]


def _narrow(g: Graph, x: Value, axis: int, start: int, length: int) -> Value:
    assert (start, length) == (-1, 1), "the model narrows to the last position only"
    last = g.op("Slice", x, g.constant([-1]), g.constant([np.iinfo(np.int64).max]), g.constant([axis]))
    return last._replace(source=x)  # type: ignore[no-any-return]


def _gelu(g: Graph, module: nn.GELU, x: Value) -> Value:
    return g.op("Gelu", x, approximate=module.approximate)._replace(after_gelu=True)  # type: ignore[no-any-return]


def _clip(g: Graph, module: nn.Hardtanh, x: Value) -> Value:
    ends = (g.constant(float(end), x.dtype) for end in (module.min_val, module.max_val))
    return g.op("Clip", x, *ends)._replace(after_gelu=x.after_gelu)  # type: ignore[no-any-return]


def _mish(g: Graph, module: nn.Mish, x: Value) -> Value:
    # ONNX's Mish comes with opset 18.
    return g.op("Mul", x, g.op("Tanh", g.op("Softplus", x)))  # type: ignore[no-any-return]


def _normalize(g: Graph, module: nn.LayerNorm, x: Value) -> Any:
    parts = (g.plain(Weight(f"{g.scope}.{part}")) for part in ("weight", "bias"))
    return g.op("LayerNormalization", g.cast(x, "float32"), *parts, epsilon=module.eps)


def _same_type(g: Graph, x: Value, dtype: Any = None) -> Value:
    """A conversion between float dtypes: the precision decides where each is used."""
    return x


def _cumulative(g: Graph, x: Value, axis: int) -> Value:
    return g.op("CumSum", x, g.constant(axis))  # type: ignore[no-any-return]


def _sum(g: Graph, x: Value, axis: int) -> Value:
    return g.op("ReduceSum", x, g.constant([axis]), keepdims=0)  # type: ignore[no-any-return]


def _first_maximum(g: Graph, x: Value, axis: int) -> Value:
    return g.op("ArgMax", x, dtype="int64", axis=axis, keepdims=0)  # type: ignore[no-any-return]


def _at_least(g: Graph, x: Value, min: int) -> Value:
    return g.op("Max", x, g.constant(min, x.dtype))  # type: ignore[no-any-return]


def _expand(g: Graph, x: Value, *sizes: int) -> Value:
    return g.op("Expand", x, g.constant([max(size, 1) for size in sizes]))  # type: ignore[no-any-return]


class HeadLayers:
    """The translation of a head's linear layers, in float32 in every precision. Their weights are in the model itself.

    Args:
        heads: of the task.
    """

    def __init__(self, heads: TaskHeads) -> None:
        self.layers = iter(heads.layers)

    def __call__(self, g: Graph, module: nn.Linear, x: Value) -> Value:
        layer = next(self.layers)  # the trace has them in the order of the outputs
        columns = g.op("Transpose", _values_of(g, f"{layer.name}.weight", layer.weight), perm=[1, 0])
        y = g.op("MatMul", g.cast(x, "float32"), columns)
        if layer.bias is not None:
            y = g.op("Add", y, _values_of(g, f"{layer.name}.bias", layer.bias))
        return y  # type: ignore[no-any-return]


def _values_of(g: Graph, name: str, tensor: LazyTensor) -> Value:
    return g.inline(name, tensor.cast(F32, name).read(), "float32")


# ------------------------------------------------------------------------------------------------------- attention


def _attention_of(config: GPT2Config, cache: str, scales: Sequence[Scales], opset: int | None) -> Operator:
    """The translation of ``onnx_attention`` for a kind of cache."""
    if contract.stays(cache):
        return InPlaceAttention(config.n_embd, scales if contract.has_int8_cache(cache) else None)
    has_attention = opset is not None and opset >= ATTENTION_OPSET
    return _attend_growing if has_attention else _attend_in_steps


def _attend_growing(
    g: Graph, q: Value, k: Value, v: Value, mask: Value, key: Cached, value: Cached, n: int, scale: float
) -> Any:
    """ONNX's ``Attention``, which appends the new keys and values to the cache, if there is one."""
    options: dict[str, Any] = {"q_num_heads": n, "kv_num_heads": n, "scale": scale}
    if q.dtype == "float16":
        options["softmax_precision"] = TensorProto.FLOAT
    bias = _additive(g, mask, q.dtype)
    if key is None or value is None:
        return [g.op("Attention", q, k, v, bias, **options), None, None]
    return g.op("Attention", q, k, v, bias, key, value, n=3, **options)


def _attend_in_steps(
    g: Graph, q: Value, k: Value, v: Value, mask: Value, key: Cached, value: Cached, n: int, scale: float
) -> Any:
    """The same in operators that ONNX Runtime before 1.23 has, too; the softmax in float32."""
    bias = _additive(g, mask, q.dtype)
    heads = g.constant([0, 0, n, -1])
    q = g.op("Mul", q, g.constant(scale, q.dtype))
    q, k, v = (g.op("Transpose", g.op("Reshape", x, heads), perm=[0, 2, 1, 3]) for x in (q, k, v))  # (B, H, T, D)
    keys = k if key is None else g.op("Concat", key, k, axis=2)  # (B, H, P + T, D)
    values = v if value is None else g.op("Concat", value, v, axis=2)
    scores = g.op("MatMul", q, g.op("Transpose", keys, perm=[0, 1, 3, 2]))  # (B, H, T, P + T)
    scores = g.op("Add", scores, bias)
    probabilities = g.cast(g.op("Softmax", g.cast(scores, "float32"), axis=-1), q.dtype)
    y = g.op("Transpose", g.op("MatMul", probabilities, values), perm=[0, 2, 1, 3])
    return [g.op("Reshape", y, g.constant([0, 0, -1])), keys, values]


def _additive(g: Graph, mask: Value, dtype: str) -> Value:
    """A boolean mask as numbers to add to scores. All layers share it: a runtime would convert it once for each."""
    allowed, not_allowed = (g.constant(number, dtype) for number in (0.0, float(np.finfo(dtype).min)))
    return g.once(f"additive {mask.name}", lambda: g.op("Where", mask, allowed, not_allowed, dtype=dtype))


class InPlaceAttention:
    """``GroupQueryAttention``, which writes new keys and values into the buffer of the cache. It takes q, k and v as
    one tensor, and instead of a mask the number of tokens in each row.

    Args:
        scales: of keys and values in each layer, for an int8 cache.
    """

    def __init__(self, n_embd: int, scales: Sequence[Scales] | None) -> None:
        self.n_embd = n_embd
        self.scales = None if scales is None else iter(scales)

    def __call__(
        self, g: Graph, q: Value, k: Value, v: Value, mask: Value, key: Value, value: Value, n: int, scale: float
    ) -> Any:
        ends, total = _lengths(g)
        qkv = k.source  # the output of c_attn
        assert qkv is not None
        nothing = Value("", "")
        heads: dict[str, Any] = {"num_heads": n, "kv_num_heads": n, "scale": scale}
        arguments = [qkv, nothing, nothing, key, value, ends, total]
        if self.scales is not None:
            arguments += [nothing] * 5  # no rotation, positions, bias or sink
            arguments += [
                g.inline(f"{g.scope}.{name}_scale", array, "float32")
                for name, array in zip(("key", "value"), next(self.scales), strict=True)
            ]
            heads |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        y, *present = g.op("GroupQueryAttention", *arguments, n=3, domain=MICROSOFT, **heads)
        g.shapes[y.name] = (y.dtype, (contract.BATCH, contract.NEW, self.n_embd))
        # With only the last logits, q is a slice of its chunk; this operator has computed all positions.
        is_slice = q.source != qkv
        return [_narrow(g, y, 1, -1, 1) if is_slice else y, *present]


def _lengths(g: Graph) -> tuple[Value, Value]:
    """The index of each row's last token, (B,), and the longest row's length; both int32, shared by all layers."""
    seen, one = Value("attention_mask", "int64"), g.constant(1)
    counts = g.once("counts", lambda: g.op("ReduceSum", seen, g.constant([1]), keepdims=0))
    ends = g.once("ends", lambda: g.op("Cast", g.op("Sub", counts, one), dtype="int32", to=TensorProto.INT32))
    width = g.once("width", lambda: g.op("Squeeze", g.op("Shape", seen, start=1, end=2)))
    total = g.once("total", lambda: g.op("Cast", width, dtype="int32", to=TensorProto.INT32))
    return ends, total


# --------------------------------------------------------------------------------------------------------- the table

# torch's operator (a function, a method's name, or the class of a module) -> ONNX's. An operator that is neither here
# nor among those that depend on the precision and the cache stops the export.
OPERATORS: dict[Any, Operator] = {
    getattr: _attribute,
    operator.getitem: _item,
    operator.sub: _same("Sub"),
    operator.mul: _same("Mul"),
    operator.truediv: _same("Div"),
    operator.le: _same("LessOrEqual", "bool"),
    operator.eq: _same("Equal", "bool"),
    operator.ne: lambda g, *pair: g.op("Not", g.op("Equal", *g.values(*pair), dtype="bool")),
    operator.or_: _same("Or"),
    operator.and_: _same("And"),
    torch.arange: _range,
    torch.erf: _same("Erf"),
    torch.sigmoid: _same("Sigmoid"),
    torch.sqrt: _same("Sqrt"),
    torch.tanh: _same("Tanh"),
    "unsqueeze": lambda g, x, axis: g.op("Unsqueeze", x, g.constant([axis])),
    "chunk": _chunk,
    "narrow": _narrow,
    "squeeze": lambda g, x, axis: g.op("Squeeze", x, g.constant([axis])),
    "cumsum": _cumulative,
    "sum": _sum,
    "clamp": _at_least,
    "argmax": _first_maximum,
    "expand": _expand,
    "gather": lambda g, x, axis, index: g.op("GatherElements", x, index, axis=axis),
    "long": lambda g, x: g.cast(x, "int64"),
    "float": _same_type,
    "to": _same_type,
    nn.Dropout: lambda g, module, x: x,
    nn.GELU: _gelu,
    nn.Hardswish: lambda g, module, x: g.op("HardSwish", x),
    nn.Hardtanh: _clip,
    nn.LeakyReLU: lambda g, module, x: g.op("LeakyRelu", x, alpha=module.negative_slope),
    nn.Mish: _mish,
    nn.ReLU: lambda g, module, x: g.op("Relu", x),
    nn.ReLU6: _clip,
    nn.Sigmoid: lambda g, module, x: g.op("Sigmoid", x),
    nn.SiLU: lambda g, module, x: g.op("Mul", x, g.op("Sigmoid", x)),
    nn.Softplus: lambda g, module, x: g.op("Softplus", x),
    nn.Tanh: lambda g, module, x: g.op("Tanh", x),
    nn.Identity: lambda g, module, x: x,
    nn.LayerNorm: _normalize,
}


class LowRank:
    """The translation of a projection, ``x @ weight + bias``. If there are inputs for its factors A and B, (x A) B is added.

    An input that has an initializer, too, is optional. Here it has rank 0, and (x A) B is then zero. It is added after the
    bias: ONNX Runtime fuses the bias into the product of a quantized weight.

    Args:
        factors: the inputs.
    """

    def __init__(self, precision: Precision, factors: Mapping[str, Slot]) -> None:
        self.precision = precision
        self.factors = factors
        self.changes: dict[str, Value] = {}  # name of a bias -> what is added after it

    def product(self, g: Graph, x: Value, weight: Weight) -> Any:
        """``x @ weight``."""
        y = self.precision.product(g, x, weight)
        module = weight.name.removesuffix(".weight")
        names = contract.factor_names(module)
        if names[0] in self.factors:
            a, b = (g.inline(name, _empty(self.factors[name]), self.factors[name].dtype) for name in names)
            self.changes[f"{module}.bias"] = g.op("MatMul", g.op("MatMul", g.cast(x, a.dtype), a), b)
        return y

    def add(self, g: Graph, left: Any, right: Any) -> Any:
        """``left + right``, and after a projection's bias its change."""
        y = g.op("Add", *g.values(left, right))
        change = self.changes.pop(right.name, None) if isinstance(right, Weight) else None
        return y if change is None else g.op("Add", y, g.cast(change, y.dtype))


def _empty(slot: Slot) -> NDArray[np.float32]:
    """Factors of rank 0."""
    return np.zeros([size if isinstance(size, int) else 0 for size in slot.shape], np.float32)


def _operators_of(precision: Precision, low_rank: LowRank) -> dict[Any, Operator]:
    """The operators on weights, which a precision translates."""
    return {
        operator.matmul: low_rank.product,
        operator.add: low_rank.add,
        F.embedding: lambda g, ids, table, **_: precision.look_up(g, ids, table),
        F.linear: precision.logits,
    }


def translate(
    traced: fx.GraphModule, g: Graph, operators: Mapping[Any, Operator], takes: Mapping[str, Slot], gives: list[str]
) -> None:
    """Append the nodes of a traced model to a graph.

    Args:
        operators: torch's operator -> its translation.
        takes: the model's inputs.
        gives: the names of its outputs.

    Raises:
        NotImplementedError: for an operator without a translation.
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
            values[node] = _operator(operators, type(module), node)(g, module, *arguments, **options)
        else:
            values[node] = _operator(operators, node.target, node)(g, *arguments, **options)
    renamed = {value.name: name for value, name in zip(results, gives, strict=True)}
    for made in g.nodes:
        made.input[:] = [renamed.get(name, name) for name in made.input]
        made.output[:] = [renamed.get(name, name) for name in made.output]
    _drop_unused(g, set(gives))


def _drop_unused(g: Graph, used: set[str]) -> None:
    """Remove what no output depends on, such as the mask if attention takes none."""
    kept = []
    for node in reversed(g.nodes):
        if used.intersection(node.output):
            kept.append(node)
            used.update(node.input)
    g.nodes = kept[::-1]
    g.initializers = {name: tensor for name, tensor in g.initializers.items() if name in used}


def _flat(results: Any) -> list[Value]:
    if isinstance(results, Value):
        return [results]
    parts = results.values() if isinstance(results, Mapping) else results
    return [value for part in parts for value in _flat(part)]


def _operator(operators: Mapping[Any, Operator], target: Any, node: fx.Node) -> Operator:
    if target not in operators:
        raise NotImplementedError(f"{target} (in {_module_of(node) or 'GPT2'}) has no translation to ONNX")
    return operators[target]


def _module_of(node: fx.Node) -> str:
    """The module that a node comes from, such as ``h.0.attn.c_attn``."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack), "")
    return path.removeprefix("model").removeprefix(".")
