"""What can be chosen about an ONNX export, and its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import contract
from ..precisions import BLOCK, BLOCKS, DEFAULT, PRECISIONS, Precision
from ..task_heads import TaskHeads
from ..tasks import GENERATION, LOGITS, TASKS, check_outputs
from .onnx_graph import OPSETS, Target


@dataclass(frozen=True)
class Exported:
    """What was written: the directory, its size, and the files that are new in it."""

    path: Path
    bytes: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class ExportOptions:
    """What kind of model is written.

    Args:
        precisions: names of ``gpt2x.precisions.PRECISIONS``, a model for each; onnxruntime-genai runs the first.
        cache: one of ``contract.CACHES``, of text generation.
        last: compute the logits of the last position only.
        calibration: token ids for GPTQ and for the scales of an int8 cache. By default weights are rounded to nearest,
            and the scales are chosen on a scene of Shakespeare's.
        block: how many weights share a scale, in precisions with a choice.
        opset: the ONNX opset; by default the lowest that has all operators.
        single_file: put the weights into each ``.onnx`` file, instead of into a file beside it.
        task: one of ``TASKS``; those besides text generation have no cache.
        outputs: of text generation: ``logits`` and any of ``EXTRAS``.
        safetensors: add ``model.safetensors``, a second copy of the weights, for ``transformers``.
        adapters: name -> directory of a PEFT adapter (LoRA) that is not merged, but can be chosen for each run.

    Raises:
        ValueError: if an option is out of range.
        ConfigError: if the task has no such outputs.
    """

    precisions: tuple[str, ...] = (DEFAULT,)
    cache: str = "growing"
    last: bool = False
    calibration: Sequence[int] | None = None
    block: int = BLOCK
    opset: int | None = None
    single_file: bool = False
    safetensors: bool = False
    adapters: Mapping[str, str | Path] = field(default_factory=dict)
    task: str = GENERATION
    outputs: tuple[str, ...] = (LOGITS,)

    def __post_init__(self) -> None:
        is_list = isinstance(self.precisions, tuple | list) and bool(self.precisions)
        if not is_list or len(set(self.precisions) & PRECISIONS.keys()) != len(self.precisions):
            known = ", ".join(PRECISIONS)
            raise ValueError(f"precisions is {self.precisions!r}; it must list one or more of {known}, each once")
        if self.cache not in tuple(contract.CACHES):
            raise ValueError(f"cache is {self.cache!r}; it must be one of {', '.join(contract.CACHES)}")
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; it must be one of {', '.join(TASKS)}")
        if self.task != GENERATION and (self.cache != "growing" or self.last):
            raise ValueError(f"{self.task} has no cache, and no logits of the last position only")
        if self.task != GENERATION and self.adapters:
            raise ValueError(f"{self.task} takes no adapters at run time: merge one")
        object.__setattr__(self, "outputs", check_outputs(self.outputs, self.task))
        if self.block not in BLOCKS or not isinstance(self.block, int):
            raise ValueError(f"block is {self.block!r}; it must be one of {', '.join(map(str, BLOCKS))}")
        if self.opset is not None and self.opset not in OPSETS:
            raise ValueError(f"opset is {self.opset!r}; it must be {OPSETS[0]} to {OPSETS[-1]}")
        contract.check_adapter_names(list(self.adapters))
        if self.calibration is not None:
            object.__setattr__(self, "calibration", [int(i) for i in self.calibration])

    @property
    def chosen(self) -> list[Precision]:
        """The precisions as objects."""
        return [PRECISIONS[name] for name in self.precisions]

    def target(self, heads: TaskHeads) -> Target:
        """What each model computes.

        Args:
            heads: those that the task and its outputs need.
        """
        return Target(self.task, self.outputs, heads, self.last, self.cache)

    def location(self, precision: Precision) -> str | None:
        """The name of the file that holds a new model's weights; None if the model holds them itself."""
        return None if self.single_file else precision.data_file


DEFAULT_OPTIONS = ExportOptions()
