"""The names and layouts of a GPT-2's parameters in each library, as tables.

A dialect maps each row of ``SPEC`` to a name, wrapped in a layout where the bytes or the shape differ from the
canonical ``[in, out]``. The same table reads and writes.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from .errors import CheckpointError
from .heads import Head, find_head, first_part, parents, paths_under
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

    def write(self, tensor: LazyTensor, config: GPT2Config) -> LazyTensor:
        """From the canonical layout to the dialect's: the inverse of ``read``."""
        return tensor


@dataclass(frozen=True)
class Lead1(Same):
    """A leading axis of length one, as in the kernel of a one-wide convolution: ``[1, in, out]``."""

    def read(self, tensor: LazyTensor) -> LazyTensor:
        if len(tensor.shape) < 2 or tensor.shape[0] != 1:
            raise CheckpointError(f"{self.name} is {list(tensor.shape)}; expected a leading axis of 1")
        return tensor.reshape(tensor.shape[1:])

    def write(self, tensor: LazyTensor, config: GPT2Config) -> LazyTensor:
        return tensor.reshape((1, *tensor.shape))


@dataclass(frozen=True)
class Transposed(Same):
    """A transposed matrix: ``[out, in]``, as in ``torch.nn.Linear``."""

    def read(self, tensor: LazyTensor) -> LazyTensor:
        if len(tensor.shape) != 2:
            raise CheckpointError(f"{self.name} is {list(tensor.shape)}; expected a matrix")
        return tensor.transposed()

    def write(self, tensor: LazyTensor, config: GPT2Config) -> LazyTensor:
        return tensor.transposed()


@dataclass(frozen=True)
class HeadsLast(Same):
    """The last axis split into heads, as in Keras's ``EinsumDense``: ``[in, heads, head_dim]``, and ``[heads, head_dim]`` of a bias."""

    def read(self, tensor: LazyTensor) -> LazyTensor:
        if len(tensor.shape) not in (2, 3):
            raise CheckpointError(
                f"{self.name} is {list(tensor.shape)}; expected [in, heads, head_dim] or [heads, head_dim]"
            )
        *before, heads, width = tensor.shape
        return tensor.reshape((*before, heads * width))

    def write(self, tensor: LazyTensor, config: GPT2Config) -> LazyTensor:
        *before, width = tensor.shape
        return tensor.reshape((*before, config.n_head, width // config.n_head))


@dataclass(frozen=True)
class HeadsFirst(Same):
    """The first axis of a matrix split into heads, as in the output projection of Keras's attention: ``[heads, head_dim, out]``."""

    def read(self, tensor: LazyTensor) -> LazyTensor:
        if len(tensor.shape) != 3:
            raise CheckpointError(f"{self.name} is {list(tensor.shape)}; expected [heads, head_dim, out]")
        heads, width, out = tensor.shape
        return tensor.reshape((heads * width, out))

    def write(self, tensor: LazyTensor, config: GPT2Config) -> LazyTensor:
        width, out = tensor.shape
        return tensor.reshape((config.n_head, width // config.n_head, out))


@dataclass(frozen=True)
class Joined:
    """A parameter that is stored as several tensors of equal shape: query, key and value.

    In canonical layout they are side by side: ``[in, out]`` each, ``[in, parts x out]`` together; a bias is ``[parts x out]``.
    """

    parts: tuple[Same, ...]

    def read(self, tensors: Sequence[LazyTensor]) -> LazyTensor:
        """The canonical parameter, lazily. ``tensors`` are in the order of ``parts``.

        Parts that are stored as ``[out, in]`` are concatenated as they are, and nothing is transposed to write them so again.
        """
        canonical = [layout.read(tensor) for layout, tensor in zip(self.parts, tensors, strict=True)]
        first = canonical[0]
        for layout, tensor in zip(self.parts, canonical, strict=True):
            if (tensor.dtype, tensor.shape) != (first.dtype, first.shape):
                raise CheckpointError(
                    f"{layout.name} is {tensor.dtype} {list(tensor.shape)}, but {self.parts[0].name} is {first.dtype} {list(first.shape)}"
                )
        if len(first.shape) == 1:
            return LazyTensor.joined(canonical, (len(canonical) * first.shape[0],))
        if len(first.shape) != 2:
            raise CheckpointError(f"{self.parts[0].name} is {list(first.shape)}; expected a matrix or a vector")
        width, out = first.shape
        return LazyTensor.joined([part.transposed() for part in canonical], (len(canonical) * out, width)).transposed()

    def write(self, tensor: LazyTensor, config: GPT2Config) -> list[LazyTensor]:
        """The tensor of each part: the inverse of ``read``."""
        is_matrix = len(tensor.shape) == 2
        stored = tensor.transposed() if is_matrix else tensor
        size = stored.shape[0] // len(self.parts)
        written = []
        for i, layout in enumerate(self.parts):
            part = stored.rows(i * size, (i + 1) * size)
            written.append(layout.write(part.transposed() if is_matrix else part, config))
        return written


Layout = Same | Joined


def parts_of(layout: Layout) -> tuple[Same, ...]:
    """The layouts of the tensors that a parameter is stored as: one, or several that are joined."""
    return layout.parts if isinstance(layout, Joined) else (layout,)


@dataclass(frozen=True)
class Place:
    """Which parameter a name belongs to: the row of SPEC, the layer (-1 outside the blocks), and the part of a joined one."""

    row: str
    layer: int
    part: int = 0

    @property
    def canonical(self) -> str:
        """The canonical name."""
        return self.row.replace("{i}", str(self.layer))


MAX_PREFIXES = 8  # that are tried for a dialect, the most frequent ones
MAX_COMPARED = 2000  # tensors that are compared with a dialect; GPT-2's 1558M has 580
MAX_REMEMBERED = 100  # characters of a name whose templates are remembered


@dataclass
class ReadModel:
    """What a dialect finds in the tensors of a file.

    Args:
        parameters: canonical name -> tensor in canonical layout.
        left_out: known tensors that are not parameters.
        faults: everything that is wrong, one line each.
        n_layer: number of layers.
        zero_biases: rows of SPEC for which zeros stand.
        pieces: canonical name -> part -> tensor, of parameters that are stored as several tensors.
        is_complete: whether no parameter is missing.
        heads: heads other than ``lm_head``.
        rest: names of tensors outside the GPT-2: it is a part of a larger model.
        cross_attention: those of ``left_out`` that attend to the states of an encoder.
        lm_head_stem: how the names of the output layer begin.
        wte_is_lm_head: whether the file has a tied matrix under the name of ``lm_head`` only.
    """

    parameters: dict[str, LazyTensor] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    n_layer: int = 1
    zero_biases: tuple[str, ...] = ()
    pieces: dict[str, dict[int, LazyTensor]] = field(default_factory=dict)
    is_complete: bool = False
    heads: tuple[Head, ...] = ()
    rest: list[str] = field(default_factory=list)
    cross_attention: tuple[str, ...] = ()
    lm_head_stem: str = "lm_head"
    wte_is_lm_head: bool = False


@dataclass(frozen=True)
class Dialect:
    """The names of one library. ``{i}`` stands for the layer.

    Args:
        table: row of SPEC -> name and layout.
        formats: names of the formats that its files usually have, beside those that name it as theirs (``Format.dialect``): for
            ``gpt2x formats`` and the documents. It is read in every format.
        lm_head: names of an untied ``lm_head``; the first one is written. Empty if the dialect has none.
        also: other names that some versions use -> the name in the table.
        lm_head_also: other names of ``lm_head`` in the same layout. They count if the shape is the token embedding's.
        prefixes: its own prefixes of every name except ``lm_head``; the first one is written. Any other one is read, too.
        extras: known tensors that are not parameters.
        cross_attention: tensors that attend to the states of an encoder, and that a language model of its own does not use.
        slots: suffixes of an optimizer's slots, after the name of a parameter.
        assumes: the configuration of its code, if no file states another.
        unless: what to do where that does not hold, as a clause.
        computes: switch -> the values that its code supports; any value, if a switch is not listed.
        any_width: whether its code supports a feed-forward width other than 4 x n_embd.
        head_untied: whether an ``lm_head`` that differs from the token embedding is enough to be untied.
        copies_wte: whether its code always ties ``lm_head``, and yet requires it under its own name.
        biasless: rows of biases that may be missing, all of them together, in which case they are zeros.
    """

    name: str
    table: Mapping[str, Layout]
    _: KW_ONLY
    formats: tuple[str, ...] = ()
    lm_head: tuple[Same, ...] = ()
    lm_head_also: tuple[str, ...] = ()
    also: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ("",)
    extras: tuple[str, ...] = ()
    cross_attention: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    assumes: Mapping[str, Any] = field(default_factory=dict)
    unless: str = ""
    computes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    any_width: bool = True
    head_untied: bool = False
    copies_wte: bool = False
    biasless: tuple[str, ...] = ()

    def locate(self, name: str, prefix: str = "") -> Place | None:
        """The parameter that a name belongs to; None if it is none."""
        if self.head_layout(name, prefix):
            return Place(LM_HEAD, -1)
        if not name.startswith(prefix):
            return None
        for template, layer in places_of(name[len(prefix) :]):
            if template in self._rows:
                row, part = self._rows[template]
                return Place(row, layer, part)
        return None

    @functools.cached_property
    def _rows(self) -> dict[str, tuple[str, int]]:
        """Name in the table -> row of SPEC and part of a joined parameter."""
        rows = {}
        for row, layout in self.table.items():
            for i, part in enumerate(parts_of(layout)):
                rows[part.name] = (row, i)
        return rows | {other: rows[name] for other, name in self.also.items()}

    def head_layout(self, name: str, prefix: str = "") -> Same | None:
        """The layout of ``lm_head``, if the name is one of its names, in the GPT-2 or in a module around it."""
        if not self.lm_head:
            return None
        heads = {layout.name: layout for layout in self.lm_head}
        for path in paths_under(name, prefix):
            for place, _ in places_of(path):
                if place in heads:
                    return heads[place]
        return None

    def lm_head_name(self, names: Collection[str], prefix: str) -> str | None:
        """The name of ``lm_head``: in the GPT-2, or in the nearest module around it that has one."""
        for parent in parents(prefix):
            for layout in self.lm_head:
                if parent + layout.name in names:
                    return parent + layout.name
        return None

    def prefixes_in(self, names: Iterable[str]) -> tuple[str, ...]:
        """The prefixes to try: those that stand before the names outside the blocks, or else the dialect's own."""
        # Names in the blocks have a number, so that what is before them is not found by comparing ends.
        ends = tuple(place for place in self._rows if "{i}" not in place)
        found: Counter[str] = Counter()
        for name in names:
            if name.endswith(ends):
                found.update(_prefixes_before(name, ends))
        return tuple(dict(found.most_common(MAX_PREFIXES))) or self.prefixes

    def own_end(self, prefix: str) -> str | None:
        """The longest of the dialect's own prefixes that a prefix ends with, as whole parts of a name; None if there is none."""
        ends = [own for own in self.prefixes if prefix == own or prefix.endswith((f".{own}", f"/{own}"))]
        return max(ends, key=len, default=None)

    def is_whole(self, names: Collection[str], prefix: str) -> bool:
        """Whether names have every row of the table, in the first layer of those that are in layers."""
        have = {found for place, found in self._rows.items() if prefix + place.replace("{i}", "0") in names}
        if self.lm_head_name(names, prefix):
            have.add(("wte.weight", 0))  # one name of a tied pair is enough
        required = {(row, part) for row, part in self._rows.values() if row not in self.biasless}
        return required <= have

    def is_extra(self, name: str, prefix: str) -> bool:
        """Whether a name is that of a known tensor that is not a parameter."""
        if _has_place_in(self.extras, name.removeprefix(prefix)):
            return True
        return any(name.endswith(slot) and self.locate(name.removesuffix(slot), prefix) for slot in self.slots)

    def layout(self, canonical: str) -> Layout:
        """The layout that a canonical name has here."""
        if canonical != LM_HEAD:
            return self.table[_row_of(canonical)[0]]
        if not self.lm_head:
            raise CheckpointError(f"an untied lm_head cannot be written as {self.name}")
        return self.lm_head[0]

    def names(self, canonical: str) -> tuple[str, ...]:
        """The names (without prefix) of the tensors that hold a parameter here: one, or one for each part of a joined one."""
        layout = self.layout(canonical)
        layer = -1 if canonical == LM_HEAD else _row_of(canonical)[1]
        return tuple(part.name.replace("{i}", str(layer)) for part in parts_of(layout))

    def read(self, tensors: Mapping[str, LazyTensor], prefix: str) -> ReadModel:
        """A whole model under canonical names and in canonical layout: the inverse of ``write``."""
        model = ReadModel()
        others: dict[str, LazyTensor] = {}
        for name, tensor in tensors.items():
            place = self.locate(name, prefix)
            if place is not None:
                layout = self.head_layout(name, prefix) or self.table[place.row]
                self._add_parameter(model, name, tensor, place, layout)
            elif self.is_extra(name, prefix):
                model.left_out.append(name)
            else:
                others[name] = tensor
        self._find_other_lm_head(model, others, prefix)
        self._join(model)
        self._check_layers(model)
        self._fill(model, prefix)
        self._sort_others(model, others, prefix)
        return model

    def _add_parameter(self, model: ReadModel, name: str, tensor: LazyTensor, place: Place, layout: Layout) -> None:
        canonical = place.canonical
        if not tensor.dtype.is_float:
            model.faults.append(f"integers  {name} is {tensor.dtype}; a parameter must be float")
            return
        if isinstance(layout, Joined):
            pieces = model.pieces.setdefault(canonical, {})
            if place.part in pieces:
                model.faults.append(f"duplicate {name} is a part of {canonical}, and so is another tensor of this name")
            pieces[place.part] = tensor
            return
        if canonical in model.parameters:
            model.faults.append(f"duplicate {name} is {canonical}, and so is another tensor")
        try:
            model.parameters[canonical] = layout.read(tensor)
        except CheckpointError as error:
            model.parameters[canonical] = tensor
            model.faults.append(f"shape     {error}")

    def _join(self, model: ReadModel) -> None:
        """Join the parts of each parameter that is stored as several tensors, where all of them are there."""
        for canonical, pieces in model.pieces.items():
            layout = self.layout(canonical)
            if not isinstance(layout, Joined) or len(pieces) != len(layout.parts):
                continue
            tensors = [pieces[i] for i in range(len(pieces))]
            try:
                model.parameters[canonical] = layout.read(tensors)
            except CheckpointError as error:
                model.parameters[canonical] = tensors[0]
                model.faults.append(f"shape     {error}".replace("{i}", canonical.split(".")[1]))

    def _find_other_lm_head(self, model: ReadModel, others: dict[str, LazyTensor], prefix: str) -> None:
        """Take ``lm_head`` under one of its other names. A classifier may have the same name, but not the same shape."""
        wte = model.parameters.get("wte.weight")
        for name, tensor in list(others.items()):
            path = next((path for path in paths_under(name, prefix) if path in self.lm_head_also), None)
            if path is None or wte is None or LM_HEAD in model.parameters or tensor.shape != wte.shape:
                continue
            self._add_parameter(model, name, tensor, Place(LM_HEAD, -1), Same(path))
            model.lm_head_stem = first_part(path)
            del others[name]

    def _sort_others(self, model: ReadModel, others: Mapping[str, LazyTensor], prefix: str) -> None:
        """Tell heads, and the rest of a larger model, from tensors that may change the logits, which are faults."""
        heads: dict[str, dict[str, LazyTensor]] = {}
        crossing: list[str] = []
        for name, tensor in others.items():
            head = find_head(name, prefix)
            if head:
                kind, path = head
                heads.setdefault(kind, {})[path] = tensor
                model.left_out.append(name)
            elif model.is_complete and self._is_outside(name, prefix, model.lm_head_stem):
                model.rest.append(name)
            elif _has_place_in(self.cross_attention, name.removeprefix(prefix)):
                crossing.append(name)
            else:
                model.faults.append(f"unknown   {name[:200]}")
        model.heads = tuple(itertools.starmap(Head, heads.items()))
        self._sort_cross_attention(model, crossing, prefix)

    def _sort_cross_attention(self, model: ReadModel, names: Sequence[str], prefix: str) -> None:
        """Leave out cross-attention of a model of its own. As a part of a larger one, it changes the logits: a fault."""
        if model.rest or prefix not in self.prefixes:
            model.faults += [f"unknown   {name[:200]}" for name in names]
            return
        model.left_out += names
        model.cross_attention = tuple(names)

    def _is_outside(self, name: str, prefix: str, lm_head_stem: str) -> bool:
        """Whether a tensor is neither a part of the GPT-2, nor of its output layer, nor a parameter under a second prefix."""
        if name.startswith(prefix):
            return False
        for path in paths_under(name, prefix):
            if first_part(path) in ("lm_head", lm_head_stem) or _has_place_in(self._rows, path):
                return False
        return True

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
        """Fill in what a dialect or a tied matrix may lack; what else is missing is a fault."""
        # safetensors.torch.save_model keeps one name of a tied pair, the first in alphabetical order.
        if "wte.weight" not in model.parameters and LM_HEAD in model.parameters and not self.head_untied:
            model.parameters["wte.weight"] = model.parameters.pop(LM_HEAD)
            model.wte_is_lm_head = True
        expected = list(rows(model.n_layer))
        biases = [canonical for row, _, canonical in expected if row in self.biasless]
        zeros = _zero_biases(model.parameters, biases)
        if zeros and model.pieces.keys().isdisjoint(biases):
            model.parameters |= zeros
            model.zero_biases = self.biasless
        missing = []
        for _, _, canonical in expected:
            if canonical in model.parameters:
                continue
            pieces = model.pieces.get(canonical, {})
            names = self.names(canonical)
            missing += [f"missing   {prefix}{name}" for part, name in enumerate(names) if part not in pieces]
        model.faults = missing + model.faults
        model.is_complete = not missing

    def write(self, tensors: Mapping[str, LazyTensor], config: GPT2Config) -> dict[str, LazyTensor]:
        """A whole model in this dialect's names and layouts.

        Raises:
            CheckpointError: if the dialect cannot represent the model.
        """
        self._check_writable(config)
        if self.copies_wte:
            tensors = self._with_copied_wte(tensors)
        written = {}
        for canonical, tensor in tensors.items():
            # lm_head is beside the GPT-2, not in it.
            prefix = "" if canonical == LM_HEAD else self.prefixes[0]
            parts = self.layout(canonical).write(tensor, config)
            if isinstance(parts, LazyTensor):
                parts = [parts]
            for name, part in zip(self.names(canonical), parts, strict=True):
                written[prefix + name] = part
        return written

    def _check_writable(self, config: GPT2Config) -> None:
        """Refuse a model that the dialect's code would not compute."""
        faults = list(self._beyond(config))
        if not faults:
            return
        tanh = config.activation_function == "gelu" and "gelu_new" in self.computes.get("activation_function", ())
        advice = "If no configuration states the activation function, and it is the tanh form, pass --activation-function gelu_new"
        headline = f"this model cannot be written as {self.name}, whose code computes something else"
        raise CheckpointError.listing(headline, faults, advice if tanh else "")

    def _with_copied_wte(self, tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
        if LM_HEAD in tensors:
            raise CheckpointError(
                f"an untied lm_head cannot be written as {self.name}, whose code ties it to the token embedding"
            )
        return {**tensors, LM_HEAD: tensors["wte.weight"]}

    def _beyond(self, config: GPT2Config) -> Iterator[str]:
        """What the dialect's code does not compute, one line each."""
        for name, values in self.computes.items():
            fault = config.beyond(name, values)
            if fault:
                yield fault
        if not self.any_width and config.n_inner != 4 * config.n_embd:
            yield f"n_inner is {config.n_inner}, not 4 x n_embd"


def _prefixes_before(name: str, ends: Iterable[str]) -> Iterator[str]:
    """What stands before each of these ends of a name, if it is empty or ends with a separator."""
    for end in ends:
        prefix = name.removesuffix(end)
        if prefix != name and prefix[-1:] in ("", ".", "/"):
            yield prefix


def places_of(name: str) -> Iterable[tuple[str, int]]:
    """The templates that may match a name, each with its layer: the name itself (-1), and with each number as ``{i}``."""
    # Each dialect asks for the same names. Longer ones are no parameter's, and may have very many templates.
    return _remembered_places(name) if len(name) <= MAX_REMEMBERED else _places(name)


def _has_place_in(known: Container[str], name: str) -> bool:
    """Whether a name matches one of these templates."""
    return any(place in known for place, _ in places_of(name))


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
BIASES = tuple(row for row in SPEC if row.endswith(".bias"))
PUBLISHED = {switch: (getattr(GPT2Config, switch),) for switch in SWITCHES}
# Names of lm_head in other programs: pytorch-pretrained-bert and DialoGPT; a float32 cast around lm_head; others.
LM_HEAD_ALSO = (
    "lm_head.decoder.weight",
    "lm_head.0.weight",
    "head.weight",
    "output.weight",
    "output_layer.weight",
    "out_head.weight",
    "embed_out.weight",
    "to_logits.weight",
    "cls.weight",
)
MASKS = ("h.{i}.attn.bias", "h.{i}.attn.masked_bias")  # buffers of causal attention
AVERAGED = "n_averaged"  # the count of torch.optim.swa_utils.AveragedModel
BUFFERS = (*MASKS, AVERAGED)

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

# Layers of GPT2Block where add_cross_attention is true, with the masks that old versions of transformers stored.
CROSS_ATTENTION = (
    "h.{i}.crossattention.c_attn.weight",
    "h.{i}.crossattention.c_attn.bias",
    "h.{i}.crossattention.q_attn.weight",
    "h.{i}.crossattention.q_attn.bias",
    "h.{i}.crossattention.c_proj.weight",
    "h.{i}.crossattention.c_proj.bias",
    "h.{i}.crossattention.bias",
    "h.{i}.crossattention.masked_bias",
    "h.{i}.ln_cross_attn.weight",
    "h.{i}.ln_cross_attn.bias",
)
# Old names, which from_pretrained renamed: g, b and w in pytorch-pretrained-bert; gamma and beta in transformers until 4.
OLD_ENDS = {"weight": ("g", "w", "gamma"), "bias": ("b", "beta")}


def _old_names() -> Iterator[tuple[str, str]]:
    for row in SPEC:
        stem, _, end = row.rpartition(".")
        for old in OLD_ENDS[end]:
            yield f"{stem}.{old}", row


# transformers' GPT2LMHeadModel; the canonical names are its own. The official file has them without a prefix.
HF = Dialect(
    "hf",
    {row: Same(row) for row in SPEC},
    # torch's exporter to ONNX folds the transpose of the output into a constant without a name of its own.
    lm_head=(Same(LM_HEAD), Transposed("onnx::MatMul_{i}")),
    also=dict(_old_names()),
    lm_head_also=LM_HEAD_ALSO,
    prefixes=("", "transformer."),
    extras=BUFFERS,
    cross_attention=CROSS_ATTENTION,
)

# The same names over torch.nn.Linear: nanoGPT's model.py, and mlx-lm's gpt2.py.
LINEAR = {
    row: Transposed(row) if row.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else Same(row)
    for row in SPEC
}
# Three programs use these names over torch.nn.Linear; what tells their files apart is in formats/nanogpt.py.
# nanoGPT's model.py has nn.GELU, the exact one, since pull request 274 (June 2023); before, the tanh form. Its files do not say which.
NANOGPT = Dialect(
    "nanogpt",
    LINEAR,
    lm_head=(Same(LM_HEAD),),
    lm_head_also=LM_HEAD_ALSO,
    prefixes=("transformer.", ""),
    extras=BUFFERS,
    assumes={"activation_function": "gelu"},
    unless="if the model was trained with the tanh form, as in nanoGPT before June 2023, pass --activation-function gelu_new to convert",
    computes={**PUBLISHED, "activation_function": ("gelu", "gelu_new")},
    any_width=False,
    copies_wte=True,
    biasless=BIASES,
)
# karpathy/build-nanogpt: nn.GELU(approximate="tanh") in its train_gpt2.py.
BUILD_NANOGPT = replace(
    NANOGPT,
    name="build-nanogpt",
    formats=("nanogpt",),
    assumes={"activation_function": "gelu_new"},
    unless="",
    computes=PUBLISHED,
    biasless=(),
)
# karpathy/minGPT: NewGELU in mingpt/model.py. Its lm_head is never tied.
MINGPT = replace(BUILD_NANOGPT, name="mingpt", copies_wte=False, head_untied=True)
MLX = Dialect("mlx", LINEAR, formats=("safetensors",), prefixes=("model.",), extras=BUFFERS)

# rasbt/LLMs-from-scratch: GPTModel of ch04.py, with GELU in the tanh form. qkv_bias is false in the book's own training.
LLMS_FROM_SCRATCH = Dialect(
    "llms-from-scratch",
    {
        "wte.weight": Same("tok_emb.weight"),
        "wpe.weight": Same("pos_emb.weight"),
        "h.{i}.ln_1.weight": Same("trf_blocks.{i}.norm1.scale"),
        "h.{i}.ln_1.bias": Same("trf_blocks.{i}.norm1.shift"),
        "h.{i}.attn.c_attn.weight": Joined(
            (
                Transposed("trf_blocks.{i}.att.W_query.weight"),
                Transposed("trf_blocks.{i}.att.W_key.weight"),
                Transposed("trf_blocks.{i}.att.W_value.weight"),
            )
        ),
        "h.{i}.attn.c_attn.bias": Joined(
            (
                Same("trf_blocks.{i}.att.W_query.bias"),
                Same("trf_blocks.{i}.att.W_key.bias"),
                Same("trf_blocks.{i}.att.W_value.bias"),
            )
        ),
        "h.{i}.attn.c_proj.weight": Transposed("trf_blocks.{i}.att.out_proj.weight"),
        "h.{i}.attn.c_proj.bias": Same("trf_blocks.{i}.att.out_proj.bias"),
        "h.{i}.ln_2.weight": Same("trf_blocks.{i}.norm2.scale"),
        "h.{i}.ln_2.bias": Same("trf_blocks.{i}.norm2.shift"),
        "h.{i}.mlp.c_fc.weight": Transposed("trf_blocks.{i}.ff.layers.0.weight"),
        "h.{i}.mlp.c_fc.bias": Same("trf_blocks.{i}.ff.layers.0.bias"),
        "h.{i}.mlp.c_proj.weight": Transposed("trf_blocks.{i}.ff.layers.2.weight"),
        "h.{i}.mlp.c_proj.bias": Same("trf_blocks.{i}.ff.layers.2.bias"),
        "ln_f.weight": Same("final_norm.scale"),
        "ln_f.bias": Same("final_norm.shift"),
    },
    formats=("bin",),
    lm_head=(Same("out_head.weight"),),
    lm_head_also=LM_HEAD_ALSO,
    extras=("trf_blocks.{i}.att.mask", AVERAGED),
    head_untied=True,
    biasless=("h.{i}.attn.c_attn.bias",),
)

# karpathy/minGPT until June 2022, and what grew from it: exact GELU, lm_head never tied.
MINGPT_2020 = Dialect(
    "mingpt-2020",
    {
        "wte.weight": Same("tok_emb.weight"),
        "wpe.weight": Lead1("pos_emb"),
        "h.{i}.ln_1.weight": Same("blocks.{i}.ln1.weight"),
        "h.{i}.ln_1.bias": Same("blocks.{i}.ln1.bias"),
        "h.{i}.attn.c_attn.weight": Joined(
            (
                Transposed("blocks.{i}.attn.query.weight"),
                Transposed("blocks.{i}.attn.key.weight"),
                Transposed("blocks.{i}.attn.value.weight"),
            )
        ),
        "h.{i}.attn.c_attn.bias": Joined(
            (
                Same("blocks.{i}.attn.query.bias"),
                Same("blocks.{i}.attn.key.bias"),
                Same("blocks.{i}.attn.value.bias"),
            )
        ),
        "h.{i}.attn.c_proj.weight": Transposed("blocks.{i}.attn.proj.weight"),
        "h.{i}.attn.c_proj.bias": Same("blocks.{i}.attn.proj.bias"),
        "h.{i}.ln_2.weight": Same("blocks.{i}.ln2.weight"),
        "h.{i}.ln_2.bias": Same("blocks.{i}.ln2.bias"),
        "h.{i}.mlp.c_fc.weight": Transposed("blocks.{i}.mlp.0.weight"),
        "h.{i}.mlp.c_fc.bias": Same("blocks.{i}.mlp.0.bias"),
        "h.{i}.mlp.c_proj.weight": Transposed("blocks.{i}.mlp.2.weight"),
        "h.{i}.mlp.c_proj.bias": Same("blocks.{i}.mlp.2.bias"),
        "ln_f.weight": Same("ln_f.weight"),
        "ln_f.bias": Same("ln_f.bias"),
    },
    formats=("bin",),
    lm_head=(Same("head.weight"),),
    lm_head_also=LM_HEAD_ALSO,
    extras=("blocks.{i}.attn.mask", AVERAGED),
    assumes={"activation_function": "gelu"},
    head_untied=True,
)

# Dao-AILab/flash-attention: GPTLMHeadModel of flash_attn/models/gpt.py, as remap_state_dict_hf_gpt2 names it.
FLASH_ATTN = Dialect(
    "flash-attn",
    {
        "wte.weight": Same("embeddings.word_embeddings.weight"),
        "wpe.weight": Same("embeddings.position_embeddings.weight"),
        "h.{i}.ln_1.weight": Same("layers.{i}.norm1.weight"),
        "h.{i}.ln_1.bias": Same("layers.{i}.norm1.bias"),
        "h.{i}.attn.c_attn.weight": Transposed("layers.{i}.mixer.Wqkv.weight"),
        "h.{i}.attn.c_attn.bias": Same("layers.{i}.mixer.Wqkv.bias"),
        "h.{i}.attn.c_proj.weight": Transposed("layers.{i}.mixer.out_proj.weight"),
        "h.{i}.attn.c_proj.bias": Same("layers.{i}.mixer.out_proj.bias"),
        "h.{i}.ln_2.weight": Same("layers.{i}.norm2.weight"),
        "h.{i}.ln_2.bias": Same("layers.{i}.norm2.bias"),
        "h.{i}.mlp.c_fc.weight": Transposed("layers.{i}.mlp.fc1.weight"),
        "h.{i}.mlp.c_fc.bias": Same("layers.{i}.mlp.fc1.bias"),
        "h.{i}.mlp.c_proj.weight": Transposed("layers.{i}.mlp.fc2.weight"),
        "h.{i}.mlp.c_proj.bias": Same("layers.{i}.mlp.fc2.bias"),
        "ln_f.weight": Same("ln_f.weight"),
        "ln_f.bias": Same("ln_f.bias"),
    },
    formats=("bin",),
    lm_head=(Same(LM_HEAD),),
    lm_head_also=LM_HEAD_ALSO,
    prefixes=("transformer.", ""),
    extras=(AVERAGED,),
)

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
)

# keras-hub's GPT2Backbone, as Keras 3 saves weights: the path of a layer's attributes, then a number for each variable.
# Keras counts the layers of a class from the second one on; here the first one has the number 0 (see formats/keras.py).
KERAS_HUB = Dialect(
    "keras-hub",
    {
        "wte.weight": Same("reversible_embedding/vars/0"),
        "wpe.weight": Same("position_embedding/vars/0"),
        "h.{i}.ln_1.weight": Same("transformer_decoder_{i}/_self_attention_layer_norm/vars/0"),
        "h.{i}.ln_1.bias": Same("transformer_decoder_{i}/_self_attention_layer_norm/vars/1"),
        "h.{i}.attn.c_attn.weight": Joined(
            (
                HeadsLast("transformer_decoder_{i}/_self_attention_layer/query_dense/vars/0"),
                HeadsLast("transformer_decoder_{i}/_self_attention_layer/key_dense/vars/0"),
                HeadsLast("transformer_decoder_{i}/_self_attention_layer/value_dense/vars/0"),
            )
        ),
        "h.{i}.attn.c_attn.bias": Joined(
            (
                HeadsLast("transformer_decoder_{i}/_self_attention_layer/query_dense/vars/1"),
                HeadsLast("transformer_decoder_{i}/_self_attention_layer/key_dense/vars/1"),
                HeadsLast("transformer_decoder_{i}/_self_attention_layer/value_dense/vars/1"),
            )
        ),
        "h.{i}.attn.c_proj.weight": HeadsFirst("transformer_decoder_{i}/_self_attention_layer/output_dense/vars/0"),
        "h.{i}.attn.c_proj.bias": Same("transformer_decoder_{i}/_self_attention_layer/output_dense/vars/1"),
        "h.{i}.ln_2.weight": Same("transformer_decoder_{i}/_feedforward_layer_norm/vars/0"),
        "h.{i}.ln_2.bias": Same("transformer_decoder_{i}/_feedforward_layer_norm/vars/1"),
        "h.{i}.mlp.c_fc.weight": Same("transformer_decoder_{i}/_feedforward_intermediate_dense/vars/0"),
        "h.{i}.mlp.c_fc.bias": Same("transformer_decoder_{i}/_feedforward_intermediate_dense/vars/1"),
        "h.{i}.mlp.c_proj.weight": Same("transformer_decoder_{i}/_feedforward_output_dense/vars/0"),
        "h.{i}.mlp.c_proj.bias": Same("transformer_decoder_{i}/_feedforward_output_dense/vars/1"),
        "ln_f.weight": Same("layer_normalization/vars/0"),
        "ln_f.bias": Same("layer_normalization/vars/1"),
    },
    formats=("hdf5",),
    prefixes=("layers/",),
    computes=PUBLISHED,
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

DIALECTS = (OPENAI, HF, NANOGPT, MLX, LLMS_FROM_SCRATCH, MINGPT_2020, FLASH_ATTN, LLMC, GGUF, KERAS, KERAS_HUB, FLAX)
SAME_NAMES = (BUILD_NANOGPT, MINGPT)  # dialects with the names of another one, found by what else a file holds


@dataclass(frozen=True)
class Candidate:
    """A dialect and the prefix under which tensors may have its names."""

    dialect: Dialect
    prefix: str


def candidates(tensors: Mapping[str, LazyTensor]) -> list[Candidate]:
    """The best dialect of each prefix, the best candidate first."""
    pairs = [Candidate(dialect, prefix) for dialect in DIALECTS for prefix in dialect.prefixes_in(tensors)]
    scores = {(pair.dialect.name, pair.prefix): _score(pair, tensors) for pair in pairs}
    pairs.sort(key=lambda pair: scores[pair.dialect.name, pair.prefix], reverse=True)  # stable
    # Each prefix is one GPT-2, whatever number of dialects knows some of its names.
    best: dict[str, Candidate] = {}
    for pair in pairs:
        best.setdefault(pair.prefix, pair)
    return list(best.values())


def _score(candidate: Candidate, tensors: Mapping[str, LazyTensor]) -> tuple[int, int, int]:
    """How many names match; of these, how many c_attn have the orientation; and whether the prefix is the dialect's own.

    c_attn shows the orientation: [in, out] is three times as wide as it is high.
    """
    dialect, prefix = candidate.dialect, candidate.prefix
    names = itertools.islice((name for name in tensors if name.startswith(prefix)), MAX_COMPARED)
    found: set[str] = set()
    upright = 0
    for name in names:
        place = dialect.locate(name, prefix)
        if place:
            found.add(name)
            upright += place.row == C_ATTN and _is_wide(dialect.table[C_ATTN], tensors[name])
    lm_head = dialect.lm_head_name(tensors, prefix)
    if lm_head:
        found.add(lm_head)
    own = dialect.own_end(prefix)
    return len(found), upright, -1 if own is None else len(own)


def _is_wide(layout: Layout, c_attn: LazyTensor) -> bool:
    if isinstance(layout, Joined):  # its parts are square
        return False
    try:
        shape = layout.read(c_attn).shape
    except CheckpointError:
        return False
    return len(shape) == 2 and shape[1] == 3 * shape[0]


def _zero_biases(tensors: Mapping[str, LazyTensor], biases: Iterable[str]) -> dict[str, LazyTensor]:
    """Zeros for these biases, if there is not a single one. Each has the length of the last axis of its weight."""
    zeros = {}
    for name in biases:
        weight = tensors.get(name.removesuffix("bias") + "weight")
        if name in tensors or weight is None or not weight.shape:
            return {}
        zeros[name] = LazyTensor.zeros(weight.dtype, weight.shape[-1:])
    return zeros
