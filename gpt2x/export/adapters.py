"""LoRA adapters that an exported model takes at run time: opened before the work, and written as ``.onnx_adapter`` files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters import Checkpoint, ConversionError
from converters.adapters import Adapter
from converters.checkpoint import same_bytes
from converters.containers.onnx_adapter import open_onnx_adapter, write_onnx_adapter
from converters.io.publishing import new_file
from converters.lora_factors import Factors, run_time_factors
from converters.opening.adapter import adapter_in
from converters.spec import projections
from converters.tensors import LazyTensor

from ..contract import ADAPTER_SUFFIX
from ..runtimes.adapter_files import named_factors


@dataclass(frozen=True)
class RunTimeAdapter:
    """An adapter that fits the model, under the name by which it is chosen."""

    name: str
    adapter: Adapter
    factors: Mapping[str, Factors]

    @property
    def file(self) -> str:
        """Its path in an exported directory: beside the models, which share it."""
        return f"onnx/{self.name}{ADAPTER_SUFFIX}"

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """Name of an input of the model -> factor."""
        return named_factors(self.factors)

    def is_in(self, file: Path) -> bool:
        """Whether a file holds exactly this adapter."""
        if not file.is_file():
            return False
        try:
            found = open_onnx_adapter(file).tensors
        except ConversionError:  # another program's file, which can hold anything
            return False
        ours = self.tensors
        return found.keys() == ours.keys() and all(same_bytes(found[name], ours[name]) for name in ours)

    def write(self, folder: Path) -> None:
        """Write it into an exported directory.

        Raises:
            ConversionError: if a value is NaN or infinite, or does not fit into float32.
        """
        with new_file(folder / self.file) as out:
            write_onnx_adapter(out, self.tensors)


def open_adapters(checkpoint: Checkpoint, paths: Mapping[str, str | Path]) -> list[RunTimeAdapter]:
    """Open adapters of PEFT by their names.

    Raises:
        CheckpointError: if one does not fit the checkpoint, or changes more than its projections.
        ConfigError: if one has no valid configuration, or is of a type that is not LoRA.
        FormatError: if its files are not valid.
    """
    adapters = []
    for name, path in paths.items():
        adapter = adapter_in(path)
        adapters.append(RunTimeAdapter(name, adapter, run_time_factors(checkpoint, adapter)))
    return adapters


def changed_projections(checkpoint: Checkpoint, adapters: Sequence[RunTimeAdapter]) -> list[str]:
    """The projections that at least one adapter changes, in the order of the model."""
    changed = {projection for adapter in adapters for projection in adapter.factors}
    return [name for name in projections(checkpoint.config.n_layer) if name in changed]
