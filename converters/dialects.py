"""The names and layouts of a GPT-2's parameters in each library, as tables.

A dialect maps each row of ``SPEC`` to a name, wrapped in a layout where the bytes or the shape differ from the
canonical ``[in, out]``. The same table reads and writes.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from .errors import CheckpointError
from .spec import LM_HEAD, SPEC, SWITCHES, GPT2Config, rows
from .tensors import LazyTensor

NUMBER = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]{0,4})(?![0-9])")  # without leading zeros


@dataclass(frozen=True)
class Same:
    """The canonical layout under another name."""

    name: str

    def read(self, tensor: LazyTensor) -> LazyTensor:
        """From the dialect's layout to the canonical one."""
        return tensor

    def write(self, tensor: LazyTensor) -> LazyTensor:
        """From the canonical layout to the dialect's: the inverse of ``read``."""
        return tensor


@dataclass(frozen=True)
class Lead1(Same):
    """A leading axis of length one, as in the kernel of a one-wide convolution: ``[1, in, out]``."""

    def read(self, tensor: LazyTensor) -> LazyTensor:
        if len(tensor.shape) < 2 or tensor.shape[0] != 1:
            raise CheckpointError(f"{self.name} is {list(tensor.shape)}; expected a leading axis of 1")
        return tensor.reshape(tensor.shape[1:])

    def write(self, tensor: LazyTensor) -> LazyTensor:
        return tensor.reshape((1, *tensor.shape))


@dataclass(frozen=True)
class Transposed(Same):
    """A transposed matrix: ``[out, in]``, as in ``torch.nn.Linear``."""

    def read(self, tensor: LazyTensor) -> LazyTensor:
        if len(tensor.shape) != 2:
            raise CheckpointError(f"{self.name} is {list(tensor.shape)}; expected a matrix")
        return tensor.transposed()

    def write(self, tensor: LazyTensor) -> LazyTensor:
        return tensor.transposed()


MAX_PREFIXES = 4  # that are tried; a model has one
MAX_REMEMBERED = 100  # characters of a name whose templates are remembered


@dataclass
class ReadModel:
    """What a dialect finds in the tensors of a file.

    Args:
        parameters: canonical name -> tensor in canonical layout.
        left_out: known tensors that are not parameters.
        faults: everything that is wrong, one line each.
        n_layer: number of layers.
        zero_biases: whether zeros stand for missing biases.
    """

    parameters: dict[str, LazyTensor] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    n_layer: int = 1
    zero_biases: bool = False


@dataclass(frozen=True)
class Dialect:
    """The names of one library. ``{i}`` stands for the layer.

    Args:
        table: row of SPEC -> name and layout.
        lm_head: names of an untied ``lm_head``; the first one is written. Empty if the dialect has none.
        also: other names that some versions use -> the name in the table.
        prefixes: possible prefixes of every name except ``lm_head``; the first one is written.
        under_any: whether any other prefix is possible, if every name has the same one.
        extras: known tensors that are not parameters.
        slots: suffixes of an optimizer's slots, after the name of a parameter.
        assumes: the configuration of its code, if no file states another.
        computes: switch -> the values that its code supports; any value, if a switch is not listed.
        any_width: whether its code supports a feed-forward width other than 4 x n_embd.
        head_untied: whether an ``lm_head`` that differs from the token embedding is enough to be untied.
        copies_wte: whether its code always ties ``lm_head``, and yet requires it under its own name.
        biasless: whether all biases may be missing, in which case they are zeros.
    """

    name: str
    table: Mapping[str, Same]
    _: KW_ONLY
    lm_head: tuple[Same, ...] = ()
    also: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ("",)
    under_any: bool = False
    extras: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    assumes: Mapping[str, Any] = field(default_factory=dict)
    computes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    any_width: bool = True
    head_untied: bool = False
    copies_wte: bool = False
    biasless: bool = False

    def locate(self, name: str, prefix: str = "") -> tuple[str, int] | None:
        """The row of SPEC and the layer (-1 outside the blocks) of a name; None if it is not a parameter."""
        if self.head_layout(name):
            return LM_HEAD, -1
        if not name.startswith(prefix):
            return None
        places = places_of(name[len(prefix) :])
        return next(((self._rows[place], layer) for place, layer in places if place in self._rows), None)

    @functools.cached_property
    def _rows(self) -> dict[str, str]:
        rows = {layout.name: row for row, layout in self.table.items()}
        return rows | {other: rows[name] for other, name in self.also.items()}

    def head_layout(self, name: str) -> Same | None:
        """The layout of ``lm_head``, if the name is one of its names."""
        if not self._heads:
            return None
        return next((self._heads[place] for place, _ in places_of(name) if place in self._heads), None)

    @functools.cached_property
    def _heads(self) -> dict[str, Same]:
        return {layout.name: layout for layout in self.lm_head}

    def prefixes_in(self, names: Iterable[str]) -> tuple[str, ...]:
        """The prefixes to try: the known ones, or those of the last norm's name."""
        if not self.under_any:
            return self.prefixes
        end = self.table["ln_f.weight"].name
        found = dict.fromkeys(name.removesuffix(end) for name in names if name.endswith(end))
        return tuple(found)[:MAX_PREFIXES] or self.prefixes

    def is_extra(self, name: str, prefix: str) -> bool:
        """Whether a name is that of a known tensor that is not a parameter."""
        bare = name.removeprefix(prefix)
        stems = (name.removesuffix(slot) for slot in self.slots if name.endswith(slot))
        return any(place in self.extras for place, _ in places_of(bare)) or any(self.locate(s, prefix) for s in stems)

    def layout(self, canonical: str) -> tuple[str, Same]:
        """The name (without prefix) that a canonical name has here, and its layout."""
        if canonical == LM_HEAD:
            if not self.lm_head:
                raise CheckpointError(f"an untied lm_head cannot be written as {self.name}")
            return self.lm_head[0].name, self.lm_head[0]
        row, layer = _row_of(canonical)
        layout = self.table[row]
        return layout.name.replace("{i}", str(layer)), layout

    def read(self, tensors: Mapping[str, LazyTensor], prefix: str) -> ReadModel:
        """A whole model under canonical names and in canonical layout: the inverse of ``write``."""
        model = ReadModel()
        for name, tensor in tensors.items():
            place = self.locate(name, prefix)
            if place is not None:
                self._add_parameter(model, name, tensor, place)
            elif self.is_extra(name, prefix):
                model.left_out.append(name)
            else:
                model.faults.append(f"unknown   {name[:200]}")
        self._check_layers(model)
        self._fill(model, prefix)
        return model

    def _add_parameter(self, model: ReadModel, name: str, tensor: LazyTensor, place: tuple[str, int]) -> None:
        row, layer = place
        canonical = row.replace("{i}", str(layer))
        layout = self.head_layout(name) or self.table[row]
        if not tensor.dtype.is_float:
            model.faults.append(f"integers  {name} is {tensor.dtype}; a parameter must be float")
            return
        if canonical in model.parameters:
            model.faults.append(f"duplicate {name} is {canonical}, and so is another tensor")
        try:
            model.parameters[canonical] = layout.read(tensor)
        except CheckpointError as error:
            model.parameters[canonical] = tensor
            model.faults.append(f"shape     {error}")

    def _check_layers(self, model: ReadModel) -> None:
        """Count the layers; a gap between them is a fault."""
        layers = sorted({int(name.split(".")[1]) for name in model.parameters if name.startswith("h.")})
        model.n_layer = max(len(layers), 1)
        for i, layer in enumerate(layers):
            if layer != i:
                model.faults.append(f"gap       layer {i} is missing, but there is a layer {layers[-1]}")
                model.n_layer = max(i, 1)
                return

    def _fill(self, model: ReadModel, prefix: str) -> None:
        """Put zeros for biases, if the dialect may lack them all; what else is missing is a fault."""
        expected = {prefix + self.layout(name)[0]: name for _, _, name in rows(model.n_layer)}
        if self.biasless:
            zeros = _zero_biases(model.parameters, expected.values())
            model.parameters |= zeros
            model.zero_biases = bool(zeros)
        missing = [f"missing   {name}" for name, canonical in expected.items() if canonical not in model.parameters]
        model.faults = missing + model.faults

    def write(self, tensors: Mapping[str, LazyTensor], config: GPT2Config) -> dict[str, LazyTensor]:
        """A whole model in this dialect's names and layouts.

        Raises:
            CheckpointError: if the dialect cannot represent the model.
        """
        faults = [f for name, values in self.computes.items() if (f := config.beyond(name, values))]
        if not self.any_width and config.n_inner != 4 * config.n_embd:
            faults.append(f"n_inner is {config.n_inner}, not 4 x n_embd")
        if faults:
            tanh = config.activation_function == "gelu" and "gelu_new" in self.computes.get("activation_function", ())
            advice = "If no configuration states the activation function, and it is the tanh form, pass --activation-function gelu_new"
            raise CheckpointError.listing(
                f"this model cannot be written as {self.name}, whose code computes something else",
                faults,
                advice if tanh else "",
            )
        if self.copies_wte:
            if LM_HEAD in tensors:
                raise CheckpointError(
                    f"an untied lm_head cannot be written as {self.name}, whose code ties it to the token embedding"
                )
            tensors = {**tensors, LM_HEAD: tensors["wte.weight"]}
        written = {}
        for canonical, tensor in tensors.items():
            name, layout = self.layout(canonical)
            written[name if canonical == LM_HEAD else self.prefixes[0] + name] = layout.write(tensor)
        return written


def places_of(name: str) -> Iterable[tuple[str, int]]:
    """The templates that may match a name, each with its layer: the name itself (-1), and with each number as ``{i}``."""
    # Each dialect asks for the same names. Longer ones are no parameter's, and may have very many templates.
    return _remembered_places(name) if len(name) <= MAX_REMEMBERED else _places(name)


@functools.lru_cache(maxsize=2048)
def _remembered_places(name: str) -> tuple[tuple[str, int], ...]:
    return tuple(_places(name))


def _places(name: str) -> Iterator[tuple[str, int]]:
    yield name, -1
    for number in NUMBER.finditer(name):
        yield f"{name[: number.start()]}{{i}}{name[number.end() :]}", int(number[0])


def _row_of(canonical: str) -> tuple[str, int]:
    return next((place, layer) for place, layer in places_of(canonical) if place in SPEC)


C_ATTN = "h.{i}.attn.c_attn.weight"
PUBLISHED = {switch: (getattr(GPT2Config, switch),) for switch in SWITCHES}
MASKS = ("h.{i}.attn.bias", "h.{i}.attn.masked_bias")  # buffers of causal attention

# OpenAI's gpt-2/src/model.py; verified against the index of the 117M release.
OPENAI = Dialect(
    "openai",
    {
        "wte.weight": Same("model/wte"),
        "wpe.weight": Same("model/wpe"),
        "h.{i}.ln_1.weight": Same("model/h{i}/ln_1/g"),
        "h.{i}.ln_1.bias": Same("model/h{i}/ln_1/b"),
        "h.{i}.attn.c_attn.weight": Lead1("model/h{i}/attn/c_attn/w"),
        "h.{i}.attn.c_attn.bias": Same("model/h{i}/attn/c_attn/b"),
        "h.{i}.attn.c_proj.weight": Lead1("model/h{i}/attn/c_proj/w"),
        "h.{i}.attn.c_proj.bias": Same("model/h{i}/attn/c_proj/b"),
        "h.{i}.ln_2.weight": Same("model/h{i}/ln_2/g"),
        "h.{i}.ln_2.bias": Same("model/h{i}/ln_2/b"),
        "h.{i}.mlp.c_fc.weight": Lead1("model/h{i}/mlp/c_fc/w"),
        "h.{i}.mlp.c_fc.bias": Same("model/h{i}/mlp/c_fc/b"),
        "h.{i}.mlp.c_proj.weight": Lead1("model/h{i}/mlp/c_proj/w"),
        "h.{i}.mlp.c_proj.bias": Same("model/h{i}/mlp/c_proj/b"),
        "ln_f.weight": Same("model/ln_f/g"),
        "ln_f.bias": Same("model/ln_f/b"),
    },
    extras=("global_step", "beta1_power", "beta2_power"),
    slots=("/Adam", "/Adam_1", "/Momentum"),
    computes=PUBLISHED,
    any_width=False,
)

# transformers' GPT2LMHeadModel; the canonical names are its own. The official file has them without a prefix.
HF = Dialect(
    "hf",
    {row: Same(row) for row in SPEC},
    # torch's exporter to ONNX folds the transpose of the output into a constant without a name of its own.
    lm_head=(Same(LM_HEAD), Transposed("onnx::MatMul_{i}")),
    prefixes=("", "transformer."),
    extras=MASKS,
)

# The same names over torch.nn.Linear: nanoGPT's model.py, and mlx-lm's gpt2.py.
LINEAR = {
    row: Transposed(row) if row.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else Same(row)
    for row in SPEC
}
# nanoGPT has nn.GELU, the exact one; it had the tanh form until the middle of 2023, and its files do not say which.
NANOGPT = Dialect(
    "nanogpt",
    LINEAR,
    lm_head=(Same(LM_HEAD),),
    prefixes=("transformer.", ""),
    extras=MASKS,
    assumes={"activation_function": "gelu"},
    computes={**PUBLISHED, "activation_function": ("gelu", "gelu_new")},
    any_width=False,
    copies_wte=True,
    biasless=True,
)
MLX = Dialect("mlx", LINEAR, prefixes=("model.",), extras=MASKS)

# karpathy/llm.c: ParameterTensors in train_gpt2.c, whose arrays hold all layers; here each layer has its own name.
LLMC = Dialect(
    "llmc",
    {
        "wte.weight": Same("wte"),
        "wpe.weight": Same("wpe"),
        "h.{i}.ln_1.weight": Same("ln1w.{i}"),
        "h.{i}.ln_1.bias": Same("ln1b.{i}"),
        "h.{i}.attn.c_attn.weight": Transposed("qkvw.{i}"),
        "h.{i}.attn.c_attn.bias": Same("qkvb.{i}"),
        "h.{i}.attn.c_proj.weight": Transposed("attprojw.{i}"),
        "h.{i}.attn.c_proj.bias": Same("attprojb.{i}"),
        "h.{i}.ln_2.weight": Same("ln2w.{i}"),
        "h.{i}.ln_2.bias": Same("ln2b.{i}"),
        "h.{i}.mlp.c_fc.weight": Transposed("fcw.{i}"),
        "h.{i}.mlp.c_fc.bias": Same("fcb.{i}"),
        "h.{i}.mlp.c_proj.weight": Transposed("fcprojw.{i}"),
        "h.{i}.mlp.c_proj.bias": Same("fcprojb.{i}"),
        "ln_f.weight": Same("lnfw"),
        "ln_f.bias": Same("lnfb"),
    },
    computes=PUBLISHED,
    any_width=False,
)

# llama.cpp: the architecture "gpt2" of gguf-py's constants.py and of llama-model.cpp.
GGUF = Dialect(
    "gguf",
    {
        "wte.weight": Same("token_embd.weight"),
        "wpe.weight": Same("position_embd.weight"),
        "h.{i}.ln_1.weight": Same("blk.{i}.attn_norm.weight"),
        "h.{i}.ln_1.bias": Same("blk.{i}.attn_norm.bias"),
        "h.{i}.attn.c_attn.weight": Transposed("blk.{i}.attn_qkv.weight"),
        "h.{i}.attn.c_attn.bias": Same("blk.{i}.attn_qkv.bias"),
        "h.{i}.attn.c_proj.weight": Transposed("blk.{i}.attn_output.weight"),
        "h.{i}.attn.c_proj.bias": Same("blk.{i}.attn_output.bias"),
        "h.{i}.ln_2.weight": Same("blk.{i}.ffn_norm.weight"),
        "h.{i}.ln_2.bias": Same("blk.{i}.ffn_norm.bias"),
        "h.{i}.mlp.c_fc.weight": Transposed("blk.{i}.ffn_up.weight"),
        "h.{i}.mlp.c_fc.bias": Same("blk.{i}.ffn_up.bias"),
        "h.{i}.mlp.c_proj.weight": Transposed("blk.{i}.ffn_down.weight"),
        "h.{i}.mlp.c_proj.bias": Same("blk.{i}.ffn_down.bias"),
        "ln_f.weight": Same("output_norm.weight"),
        "ln_f.bias": Same("output_norm.bias"),
    },
    lm_head=(Same("output.weight"),),
    computes={name: values for name, values in PUBLISHED.items() if name != "layer_norm_epsilon"},
    head_untied=True,
)

# transformers 4's modeling_tf_gpt2.py. What stands before the names differs from version to version.
KERAS = Dialect(
    "keras",
    {
        "wte.weight": Same("wte/weight:0"),
        "wpe.weight": Same("wpe/embeddings:0"),
        "h.{i}.ln_1.weight": Same("h_._{i}/ln_1/gamma:0"),
        "h.{i}.ln_1.bias": Same("h_._{i}/ln_1/beta:0"),
        "h.{i}.attn.c_attn.weight": Same("h_._{i}/attn/c_attn/weight:0"),
        "h.{i}.attn.c_attn.bias": Lead1("h_._{i}/attn/c_attn/bias:0"),
        "h.{i}.attn.c_proj.weight": Same("h_._{i}/attn/c_proj/weight:0"),
        "h.{i}.attn.c_proj.bias": Lead1("h_._{i}/attn/c_proj/bias:0"),
        "h.{i}.ln_2.weight": Same("h_._{i}/ln_2/gamma:0"),
        "h.{i}.ln_2.bias": Same("h_._{i}/ln_2/beta:0"),
        "h.{i}.mlp.c_fc.weight": Same("h_._{i}/mlp/c_fc/weight:0"),
        "h.{i}.mlp.c_fc.bias": Lead1("h_._{i}/mlp/c_fc/bias:0"),
        "h.{i}.mlp.c_proj.weight": Same("h_._{i}/mlp/c_proj/weight:0"),
        "h.{i}.mlp.c_proj.bias": Lead1("h_._{i}/mlp/c_proj/bias:0"),
        "ln_f.weight": Same("ln_f/gamma:0"),
        "ln_f.bias": Same("ln_f/beta:0"),
    },
    also={"wte/embeddings:0": "wte/weight:0", "wpe/weight:0": "wpe/embeddings:0"},
    prefixes=("transformer/tfgp_t2lm_head_model/transformer/",),
    under_any=True,
)

# transformers 4's modeling_flax_gpt2.py, whose FlaxConv1D keeps [out, in].
FLAX = Dialect(
    "flax",
    {
        "wte.weight": Same("wte/embedding"),
        "wpe.weight": Same("wpe/embedding"),
        "h.{i}.ln_1.weight": Same("h/{i}/ln_1/scale"),
        "h.{i}.ln_1.bias": Same("h/{i}/ln_1/bias"),
        "h.{i}.attn.c_attn.weight": Transposed("h/{i}/attn/c_attn/kernel"),
        "h.{i}.attn.c_attn.bias": Same("h/{i}/attn/c_attn/bias"),
        "h.{i}.attn.c_proj.weight": Transposed("h/{i}/attn/c_proj/kernel"),
        "h.{i}.attn.c_proj.bias": Same("h/{i}/attn/c_proj/bias"),
        "h.{i}.ln_2.weight": Same("h/{i}/ln_2/scale"),
        "h.{i}.ln_2.bias": Same("h/{i}/ln_2/bias"),
        "h.{i}.mlp.c_fc.weight": Transposed("h/{i}/mlp/c_fc/kernel"),
        "h.{i}.mlp.c_fc.bias": Same("h/{i}/mlp/c_fc/bias"),
        "h.{i}.mlp.c_proj.weight": Transposed("h/{i}/mlp/c_proj/kernel"),
        "h.{i}.mlp.c_proj.bias": Same("h/{i}/mlp/c_proj/bias"),
        "ln_f.weight": Same("ln_f/scale"),
        "ln_f.bias": Same("ln_f/bias"),
    },
    lm_head=(Transposed("lm_head/kernel"),),
    prefixes=("transformer/", ""),
)

DIALECTS = (OPENAI, HF, NANOGPT, MLX, LLMC, GGUF, KERAS, FLAX)


def recognise(tensors: Mapping[str, LazyTensor]) -> tuple[Dialect, str]:
    """The dialect and prefix that match most names, and among these the most matrices' orientations.

    c_attn shows the orientation: [in, out] is three times as wide as it is high. Only the first 2000 tensors are compared
    (GPT-2's 1558M has 580).
    """
    tensors = dict(itertools.islice(tensors.items(), 2000))

    def score(candidate: tuple[Dialect, str]) -> tuple[int, int]:
        dialect, prefix = candidate
        places = {name: dialect.locate(name, prefix) for name in tensors}
        c_attn = [tensors[name] for name, place in places.items() if place and place[0] == C_ATTN]
        upright = sum(_is_wide(dialect.table[C_ATTN], tensor) for tensor in c_attn)
        return sum(place is not None for place in places.values()), upright

    return max(((d, prefix) for d in DIALECTS for prefix in d.prefixes_in(tensors)), key=score)


def _is_wide(layout: Same, c_attn: LazyTensor) -> bool:
    try:
        shape = layout.read(c_attn).shape
    except CheckpointError:
        return False
    return len(shape) == 2 and shape[1] == 3 * shape[0]


def _zero_biases(tensors: Mapping[str, LazyTensor], names: Iterable[str]) -> dict[str, LazyTensor]:
    """Zeros for every bias, if there is not a single one. Each has the length of the last axis of its weight."""
    zeros = {}
    for name in names:
        if not name.endswith(".bias"):
            continue
        weight = tensors.get(name.removesuffix("bias") + "weight")
        if name in tensors or weight is None or not weight.shape:
            return {}
        zeros[name] = LazyTensor.zeros(weight.dtype, weight.shape[-1:])
    return zeros
