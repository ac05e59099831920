"""The ``.onnx_adapter`` files beside an ONNX model, checked against the inputs that the model has for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from converters import CheckpointError
from converters.containers.onnx_adapter import open_onnx_adapter
from converters.errors import short
from converters.lora_factors import Factors
from converters.tensors import F32, LazyTensor

from ..contract import Slot, factor_names


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that fits a model.

    Args:
        name: its file's name without the suffix.
        path: the file.
        tensors: name of an input -> factor, A [in, rank] or B [rank, out], in float32.
    """

    name: str
    path: Path
    tensors: Mapping[str, LazyTensor]

    @property
    def ranks(self) -> dict[str, int]:
        """Projection, such as ``h.0.attn.c_attn`` -> the rank of its change."""
        projections = dict.fromkeys(name.removesuffix(".weight").rpartition(".")[0] for name in self.tensors)
        return {projection: self.tensors[factor_names(projection)[0]].shape[1] for projection in projections}

    def summary(self) -> str:
        """What it changes: "c_attn, c_proj in 12 layers, rank 8"."""
        layers = {projection.split(".")[1] for projection in self.ranks}
        targets = dict.fromkeys(projection.split(".", 2)[2] for projection in self.ranks)
        ranks = sorted(set(self.ranks.values()))
        plural = "s" if len(layers) > 1 else ""
        return f"{', '.join(targets)} in {len(layers)} layer{plural}, rank {', '.join(map(str, ranks))}"


def named_factors(factors: Mapping[str, Factors]) -> dict[str, LazyTensor]:
    """Name of an input -> factor, of the factors of projections."""
    tensors: dict[str, LazyTensor] = {}
    for projection, pair in factors.items():
        a, b = factor_names(projection)
        tensors[a] = pair.a
        tensors[b] = pair.b
    return tensors


def open_adapter_file(path: Path, slots: Mapping[str, Slot]) -> AdapterFile:
    """Open an adapter. Its values are not read.

    Args:
        path: the file.
        slots: the model's optional inputs for factors (``contract.factor_slots``).

    Raises:
        FormatError: if the file is invalid.
        CheckpointError: if it does not fit the model; the message lists every fault.
    """
    tensors = open_onnx_adapter(path).tensors
    faults = list(_faults(tensors, slots))
    if faults:
        raise CheckpointError.listing(f"{path}: not an adapter for this model", short(faults))
    return AdapterFile(path.stem, path, tensors)


def _faults(tensors: Mapping[str, LazyTensor], slots: Mapping[str, Slot]) -> Iterator[str]:
    if not tensors:
        yield "empty     it has no parameters"
    for name, tensor in tensors.items():
        if name not in slots:
            yield f"unknown   {name[:100]!r}: the model has no such input"
        elif tensor.dtype != F32:
            yield f"dtype     {name} is {tensor.dtype}; F32 is needed"
        elif not _fits(tensor.shape, slots[name]):
            yield f"shape     {name} is {list(tensor.shape)}; [{', '.join(map(str, slots[name].shape))}] is needed"
    yield from _unpaired(tensors, list(slots))


def _unpaired(tensors: Mapping[str, LazyTensor], names: list[str]) -> Iterator[str]:
    """Faults of pairs; the names of A and B follow one another."""
    for a, b in zip(names[::2], names[1::2], strict=True):
        if (a in tensors) != (b in tensors):
            missing = b if a in tensors else a
            yield f"missing   {missing}"
        elif a in tensors and tensors[a].shape[1:] != tensors[b].shape[:1]:
            yield f"rank      {a} is {list(tensors[a].shape)}, but {b} is {list(tensors[b].shape)}"


def _fits(shape: tuple[int, ...], slot: Slot) -> bool:
    if len(shape) != len(slot.shape):
        return False
    return all(
        found == expected or isinstance(expected, str) for found, expected in zip(shape, slot.shape, strict=True)
    )
