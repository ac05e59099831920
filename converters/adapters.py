"""PEFT's adapters of a GPT-2: tensors and ``adapter_config.json`` -> factors, rows and whole tensors.

It reads what an adapter states. ``lora.py`` merges it into a model.

Sources: ``LoraLayer``, ``TrainableTokensLayer`` and ``get_peft_model_state_dict`` of peft 0.21; ``MergedLinear`` of 0.2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .adapter_config import AdapterConfig
from .checkpoint import same_bytes
from .dialects import HF
from .errors import CheckpointError, short
from .heads import Head, find_head
from .tensors import F64, LazyTensor

MAX_NAME = 256

# The parts of a name that tell what a tensor is. What follows them is an adapter's name, and "weight" or "bias".
FACTORS = {"lora_A": "a", "lora_B": "b", "lora_embedding_A": "a", "lora_embedding_B": "b", "lora_magnitude_vector": "magnitude"}  # fmt: skip
SAVED, ORIGINAL = "modules_to_save", "original_module"
MARKS = {**FACTORS, "trainable_tokens_delta": "rows", SAVED: "saved", ORIGINAL: "original"}
# Parts that PEFT, DataParallel, FSDP and torch.compile put into names.
WRAPPERS = ("base_layer", "token_adapter", "module", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class LowRank:
    """A change of one matrix: scale * B A, [out, in].

    Args:
        a: [rank, in]
        b: [out, rank]
        scale: the factor of the product.
        magnitude: DoRA: the length of each output's weights after the change, [out].
        bias: a change of the bias, before it is scaled, [out].
    """

    a: LazyTensor
    b: LazyTensor
    scale: float
    magnitude: LazyTensor | None = None
    bias: LazyTensor | None = None

    @property
    def rank(self) -> int:
        """The rank of the product, at most."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """[in, out], the layout of a projection and of an embedding."""
        return self.a.shape[1], self.b.shape[0]


@dataclass(frozen=True)
class Rows:
    """Rows of an embedding that are replaced: their indices, and their values, [rows, C]."""

    indices: tuple[int, ...]
    values: LazyTensor


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter, under the canonical names of the parameters that it changes.

    Args:
        path: what the user gave.
        files: its files.
        config: its configuration.
        factors: name -> a change of low rank.
        rows: name of an embedding -> rows that are replaced.
        replaced: name -> a tensor that replaces the base's (``modules_to_save``, biases, saved embeddings).
        copies: names of those in ``replaced`` that are ``modules_to_save``, which PEFT copies before it trains them, so
            that a tied one has a matrix of its own. A saved embedding is the base's, and stays tied.
        left_out: names of tensors that a language model does not have.
        heads: those of the tensors in ``left_out`` that are heads, which replace the base's.
    """

    path: Path
    files: tuple[Path, ...]
    config: AdapterConfig
    factors: Mapping[str, LowRank] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    replaced: Mapping[str, LazyTensor] = field(default_factory=dict)
    copies: frozenset[str] = frozenset()
    left_out: tuple[str, ...] = ()
    heads: tuple[Head, ...] = ()

    @property
    def touched(self) -> set[str]:
        """The names of the parameters that it changes."""
        biases = {name.removesuffix("weight") + "bias" for name, change in self.factors.items() if change.bias}
        return {*self.factors, *self.rows, *self.replaced, *biases}

    def summary(self) -> str:
        """What it changes, in a few words."""
        parts = []
        if self.factors:
            ranks = sorted({change.rank for change in self.factors.values()})
            parts.append(f"{len(self.factors)} matrices of rank {', '.join(map(str, ranks))}")
        if self.rows:
            parts.append(f"{sum(len(rows.indices) for rows in self.rows.values())} rows of embeddings")
        if self.replaced:
            parts.append(f"{len(self.replaced)} whole tensors")
        return ", ".join(parts)


@dataclass(frozen=True)
class _Part:
    """What the name of a tensor says.

    Args:
        name: the module, or of a whole tensor the parameter, without ``transformer.``.
        role: a field of LowRank, "rows", or of a whole tensor "saved", "original" or "whole".
        adapter: the adapter's name, which only the state dict of a model with adapters has.
        path: the module as PEFT names it, with ``transformer.`` if it has that.
    """

    name: str
    role: str
    adapter: str = ""
    path: str = ""

    @property
    def module(self) -> str:
        """The module of a whole parameter."""
        return self.name.rpartition(".")[0]

    @property
    def is_whole(self) -> bool:
        """Whether the tensor is a whole parameter."""
        return self.role in ("saved", "original", "whole")


def _part_of(name: str) -> _Part:
    """What a name of PEFT's says: ``base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight``."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    # get_peft_model wraps a model once more each time it is called.
    while parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    for i, part in enumerate(parts):
        if part in MARKS:
            return _marked(parts[:i], part, parts[i + 1 :])
    return _Part(_bare(parts), "whole")


def _marked(module: list[str], mark: str, rest: list[str]) -> _Part:
    """A name that is divided at one of ``MARKS``."""
    end = rest[-1] if rest and rest[-1] in ("weight", "bias") else ""
    adapter = ".".join(rest[:-1] if end else rest)
    if mark in (SAVED, ORIGINAL):
        return _Part(_bare([*module, end]), "saved" if mark == SAVED else "original", adapter)
    role = "bias" if mark == "lora_B" and end == "bias" else MARKS[mark]
    return _Part(_bare(module), role, adapter, ".".join(module))


def _bare(parts: list[str]) -> str:
    return ".".join(parts).removeprefix("transformer.")


def split(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """The base's tensors, under their names before PEFT wrapped them, and the adapter's, of one state dict.

    Raises:
        CheckpointError: if two different tensors had the same name.
    """
    base: dict[str, LazyTensor] = {}
    adapter: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        part = _part_of(name)
        if part.role in ("whole", "original"):
            if part.name in base and not same_bytes(base[part.name], tensor):
                raise CheckpointError(f"{name[:MAX_NAME]}: another tensor for the same parameter has other values")
            base[part.name] = tensor
        else:
            adapter[name] = tensor
    return base, adapter


def read_adapter(
    path: Path, files: tuple[Path, ...], tensors: Mapping[str, LazyTensor], config: AdapterConfig
) -> Adapter:
    """The adapter that tensors and a configuration state. Its shapes are not compared with a base yet.

    Raises:
        CheckpointError: if a tensor is unknown, or a factor is missing or has another rank. The message lists all faults.
        ConfigError: if a pattern of the configuration is not supported.
    """
    found = _Reading(config)
    for name, tensor in tensors.items():
        found.add(name, tensor)
    adapter = Adapter(
        path=path,
        files=files,
        config=config,
        factors=dict(found.factors()),
        rows=dict(found.rows()),
        replaced=found.replaced,
        copies=frozenset(found.copies),
        left_out=tuple(found.left_out),
        heads=tuple(itertools.starmap(Head, found.heads.items())),
    )
    if len(found.adapters) > 1:
        names = ", ".join(sorted(name[:60] for name in found.adapters))
        raise CheckpointError(f"{path}: holds several adapters ({names}); save one of them alone")
    if found.faults:
        raise CheckpointError.listing(f"{path}: not an adapter of a GPT-2 that gpt2x reads", short(found.faults))
    if not adapter.factors and not adapter.rows and not adapter.replaced:
        raise CheckpointError(f"{path}: an adapter without tensors, which changes nothing")
    return adapter


class _Reading:
    """An adapter while its tensors are sorted; every fault is collected."""

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config
        self.parts: dict[str, dict[str, LazyTensor]] = {}  # canonical name -> field of LowRank, or "rows" -> tensor
        self.paths: dict[str, str] = {}  # canonical name -> the module as PEFT names it
        self.replaced: dict[str, LazyTensor] = {}
        self.copies: set[str] = set()
        self.left_out: list[str] = []
        self.heads: dict[str, dict[str, LazyTensor]] = {}  # kind -> name in the head -> tensor
        self.adapters: set[str] = set()
        self.faults: list[str] = []

    def add(self, name: str, tensor: LazyTensor) -> None:
        """Sort one tensor."""
        part = _part_of(name[:MAX_NAME])
        # A saved module has a copy of the base's weights beside its own, which PEFT does not compute with.
        if part.role == "original":
            return
        head = find_head(part.name, "")
        if head:
            self._put_head(*head, part, name, tensor)
        if head or HF.is_extra(part.name, ""):
            self.left_out.append(name)
            return
        canonical = _canonical(part.name if part.is_whole else f"{part.name}.weight")
        if canonical is None:
            self.faults.append(f"unknown   {name[:MAX_NAME]}")
        elif not tensor.dtype.is_float:
            self.faults.append(f"integers  {name} is {tensor.dtype}; a parameter must be float")
        elif tensor.size == 0:
            self.faults.append(f"empty     {name}: DeepSpeed ZeRO-3 or FSDP saved it without gathering the weights")
        else:
            self._put(canonical, part, name, tensor)

    def _put(self, canonical: str, part: _Part, name: str, tensor: LazyTensor) -> None:
        if part.is_whole:
            place, key = self.replaced, canonical
            if part.role == "saved" or self.config.is_copied(part.module):
                self.copies.add(canonical)
        else:
            place, key = self.parts.setdefault(canonical, {}), part.role
            self.paths[canonical] = part.path
        self._store(place, key, part, name, tensor)

    def _put_head(self, kind: str, path: str, part: _Part, name: str, tensor: LazyTensor) -> None:
        """Keep a tensor of a head. A change of low rank has a name that no known form of a head has."""
        key = path if part.is_whole else f"{path}.{part.role}"
        self._store(self.heads.setdefault(kind, {}), key, part, name, tensor)

    def _store(self, place: dict[str, LazyTensor], key: str, part: _Part, name: str, tensor: LazyTensor) -> None:
        # A tensor may stand under two names, such as with and without the part of a wrapper.
        if key in place and not same_bytes(place[key], tensor):
            self.faults.append(f"duplicate {name}: another tensor for the same parameter has other values")
        place[key] = tensor
        if part.adapter:
            self.adapters.add(part.adapter)

    def factors(self) -> Iterator[tuple[str, LowRank]]:
        """The changes of low rank; one that is not complete, or does not fit itself, is a fault."""
        for canonical, parts in self.parts.items():
            if parts.keys() == {"rows"}:
                continue
            if "a" not in parts or "b" not in parts:
                self.faults.append(f"missing   lora_{'A' if 'a' not in parts else 'B'} of {canonical}")
                continue
            rank = self.config.rank_of(self.paths[canonical])
            scale = self.config.scale_of(self.paths[canonical])
            change = LowRank(parts["a"], parts["b"], scale, parts.get("magnitude"), parts.get("bias"))
            if self.config.enabled:
                change = _with_all_outputs(change, self.config.enabled)
                rank *= sum(self.config.enabled)
            fault = _fault_of(change, rank, self.config.has_magnitudes)
            if fault:
                self.faults.append(f"shape     {canonical}: {fault}")
            else:
                yield canonical, change

    def rows(self) -> Iterator[tuple[str, Rows]]:
        """The rows that are replaced; indices that do not fit are a fault."""
        for canonical, parts in self.parts.items():
            values = parts.get("rows")
            if values is None:
                continue
            indices = _indices(self.config.token_indices, self.paths[canonical])
            if indices is None or len(values.shape) != 2 or values.shape[0] != len(indices):
                self.faults.append(
                    f"rows      {canonical}: {list(values.shape)} trained rows; {self.config.path.name} does not list as many tokens"
                )
            else:
                yield canonical, Rows(indices, values)


def _canonical(name: str) -> str | None:
    """The canonical name of a parameter; None if a GPT-2 has none of that name."""
    place = HF.locate(name)
    return place.canonical if place else None


def _fault_of(change: LowRank, rank: int, has_magnitudes: bool) -> str | None:
    a, b = change.a.shape, change.b.shape
    if len(a) != 2 or len(b) != 2:
        return f"lora_A is {list(a)} and lora_B is {list(b)}; expected two matrices"
    if a[0] != rank or b[1] != rank:
        return f"lora_A is {list(a)} and lora_B is {list(b)}, but the configuration states rank {rank}"
    if has_magnitudes != (change.magnitude is not None):
        state = "true, but it has no" if has_magnitudes else "false, but it has a"
        return f"use_dora is {state} lora_magnitude_vector"
    for name, tensor in (("lora_magnitude_vector", change.magnitude), ("the bias of lora_B", change.bias)):
        if tensor is not None and tensor.size != b[0]:
            return f"{name} is {list(tensor.shape)}; expected [{b[0]}]"
    return None


def _indices(stated: Any, path: str) -> tuple[int, ...] | None:
    """The rows that a configuration lists for an embedding: one list, or one for each name.

    A tied ``lm_head`` has those of ``wte``, under whose name alone they are listed.
    """
    if isinstance(stated, dict):
        names = [name for name in stated if path == name or path.endswith(f".{name}")]
        stated = stated[names[0]] if names else next(iter(stated.values()), None)
    # type, not isinstance: True would be the index 1.
    if not isinstance(stated, list) or not all(type(index) is int and index >= 0 for index in stated):
        return None
    return tuple(stated) if len(set(stated)) == len(stated) else None


def _with_all_outputs(change: LowRank, enabled: tuple[bool, ...]) -> LowRank:
    """peft before 0.3: factors of two of query, key and value, as factors of all outputs.

    A is [2 rank, in], B is [2 n, rank, 1] for parts of n outputs. The result's B is [3 n, 2 rank], with blocks of zeros.
    """
    a, b = change.a.shape, change.b.shape
    count = sum(enabled)
    is_known = len(a) == 2 and len(b) == 3 and b[2] == 1 and a[0] == count * b[1] and b[0] % count == 0
    # As it is, so that the fault names the shapes of the file.
    if not is_known:
        return change
    rank, outputs = b[1], b[0] // count
    source = change.b

    def stream() -> Iterator[bytes]:
        from .lora_arrays import spread

        yield spread(source, enabled, outputs, rank)

    return replace(change, b=LazyTensor(F64, (len(enabled) * outputs, count * rank), stream, None, source.checksummed))
