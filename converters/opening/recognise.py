"""Step 4: recognise the dialect, and put the parameters into canonical names, layout and number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint import not_gpt2
from ..containers.container import Container
from ..dialects import Dialect, expected_names
from ..dialects import recognise as recognise_dialect
from ..errors import CheckpointError
from ..spec import LM_HEAD
from ..tensors import LazyTensor


@dataclass(frozen=True)
class Parameters:
    """Every parameter of a GPT-2 by canonical name, in canonical layout; their shapes are not checked yet.

    Args:
        container: where they come from.
        dialect: the dialect of its names.
        tensors: canonical name -> tensor.
        sizes: what the shapes state of the configuration: fields of GPT2Config.
        n_vocab: the number of rows that the token embedding was truncated to, if it was.
        left_out: names of the tensors that are not parameters.
        zero_biases: whether zeros stand for missing biases.
    """

    container: Container
    dialect: Dialect
    tensors: dict[str, LazyTensor]
    sizes: dict[str, int]
    n_vocab: int | None
    left_out: tuple[str, ...]
    zero_biases: bool

    @property
    def path(self) -> Path:
        """The file that holds them."""
        return self.container.path


@dataclass
class _Sorted:
    """Tensors sorted into parameters, known others, and faults."""

    parameters: dict[str, LazyTensor] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def recognise(container: Container, n_vocab: int | None = None) -> Parameters:
    """Find every parameter of a GPT-2 in a container.

    Args:
        container: with tensors whose names have no wrapper's prefix.
        n_vocab: truncate the token embedding to this many rows.

    Raises:
        CheckpointError: if they are not a GPT-2's. The message lists everything that is wrong.
    """
    dialect, prefix = recognise_dialect(container.tensors)
    found = _sort(container.tensors, dialect, prefix)
    if not found.parameters:
        raise _nothing_known(container)
    depth = _depth(found)
    names = expected_names(dialect, prefix, depth)
    zeros = _zero_biases(found.parameters, names.values()) if dialect.biasless else {}
    tensors = {**found.parameters, **zeros}
    missing = [f"missing   {name}" for name, canonical in names.items() if canonical not in tensors]
    if missing or found.faults:
        raise not_gpt2(container.path, dialect.name, missing + found.faults)
    if n_vocab:
        tensors = _truncated(tensors, n_vocab, container.path)
    sizes = _sizes(tensors, depth, container.path)
    return Parameters(container, dialect, tensors, sizes, n_vocab, tuple(found.left_out), bool(zeros))


def _nothing_known(container: Container) -> CheckpointError:
    first = next(iter(container.tensors))[:100]
    return CheckpointError(
        f"{container.path}: not a GPT-2: none of its {len(container.tensors)} tensors has a name of a GPT-2 parameter (the first is {first!r})"
    )


def _sort(tensors: Mapping[str, LazyTensor], dialect: Dialect, prefix: str) -> _Sorted:
    found = _Sorted()
    for name, tensor in tensors.items():
        place = dialect.locate(name, prefix)
        if place is not None:
            row, layer = place
            _add_parameter(found, name, tensor, row.replace("{i}", str(layer)), dialect, prefix)
        elif dialect.is_extra(name, prefix):
            found.left_out.append(name)
        else:
            found.faults.append(f"unknown   {name[:200]}")
    return found


def _add_parameter(
    found: _Sorted, name: str, tensor: LazyTensor, canonical: str, dialect: Dialect, prefix: str
) -> None:
    if not tensor.dtype.is_float:
        found.faults.append(f"integers  {name} is {tensor.dtype}; a parameter must be float")
        return
    if canonical in found.parameters:
        found.faults.append(f"duplicate {name} is {canonical}, and so is another tensor")
    try:
        found.parameters[canonical] = dialect.read(name, prefix, tensor)
    except CheckpointError as error:
        found.parameters[canonical] = tensor
        found.faults.append(f"shape     {error}")


def _depth(found: _Sorted) -> int:
    """The number of layers; a gap between them is a fault."""
    layers = sorted({int(name.split(".")[1]) for name in found.parameters if name.startswith("h.")})
    for i, layer in enumerate(layers):
        if layer != i:
            found.faults.append(f"gap       layer {i} is missing, but there is a layer {layers[-1]}")
            return max(i, 1)
    return max(len(layers), 1)


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


def _truncated(tensors: dict[str, LazyTensor], n_vocab: int, path: Path) -> dict[str, LazyTensor]:
    """The same tensors with the first rows of the vocabulary only."""
    result = dict(tensors)
    for name in ("wte.weight", LM_HEAD):
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if not tensor.shape or tensor.shape[0] < n_vocab:
            raise CheckpointError(f"{path}: {name} is {list(tensor.shape)}: fewer than the {n_vocab} rows of --n-vocab")
        result[name] = tensor.first_rows(n_vocab)
    return result


def _sizes(tensors: Mapping[str, LazyTensor], depth: int, path: Path) -> dict[str, int]:
    """What the shapes alone state of the configuration."""
    wte = tensors["wte.weight"].shape  # (V, C)
    wpe = tensors["wpe.weight"].shape  # (T, C)
    fc = tensors["h.0.mlp.c_fc.weight"].shape  # (C, F)
    if not len(wte) == len(wpe) == len(fc) == 2:
        raise CheckpointError(
            f"{path}: wte, wpe and mlp.c_fc must be matrices, not {list(wte)}, {list(wpe)} and {list(fc)}"
        )
    return {"n_vocab": wte[0], "n_embd": wte[1], "n_ctx": wpe[0], "n_inner": fc[1], "n_layer": depth}
