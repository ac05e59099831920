"""Models for tasks other than text generation in torch: the weights in gpt2x's own module, TorchScript, and ``.pt2``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from converters import Checkpoint, FormatError, GPT2Config
from converters.head_config import Labels

from ..contract import task_outputs
from ..model import GPT2
from ..task_heads import TaskHeads, body_of, heads_of
from ..task_models import task_model, task_module
from ..tasks import GENERATION
from .base import Ids
from .task_model import Outputs, TaskModel, check_rows
from .torch import load_program, one_line


class TorchTask(TaskModel):
    """A module of ``gpt2x.task_models`` as a runtime."""

    def __init__(self, module: nn.Module, task: str, config: GPT2Config, labels: Labels | None = None) -> None:
        self.module = module
        self.task = task
        self.config = config
        self.labels = labels
        self.runtime = f"the weights in gpt2x's model, in torch {torch.__version__}"

    @classmethod
    def of(cls, checkpoint: Checkpoint, task: str) -> TorchTask:
        """The model of a checkpoint.

        Raises:
            CheckpointError: if the checkpoint does not have the head of the task.
        """
        body = body_of(checkpoint)
        return cls(task_model(body, task), task, body.config, heads_of(checkpoint, task).labels)

    @classmethod
    def around(cls, model: GPT2, task: str, heads: TaskHeads) -> TorchTask:
        """The model of a task around a ``GPT2``, which may compute in another precision."""
        return cls(task_module(model, task, heads).eval(), task, model.config, heads.labels)

    @torch.inference_mode()
    def run(self, input_ids: Ids, attention_mask: Ids | None = None) -> Outputs:
        """As ``TaskModel.run``.

        Raises:
            InputError: if the arguments do not fit the model or one another.
        """
        ids, mask = check_rows(input_ids, attention_mask, self.config)
        return _named(self.task, self.config, self.module(torch.from_numpy(ids), torch.from_numpy(mask)))


class ModuleTask(TaskModel):
    """A TorchScript or ``.pt2`` file that ``gpt2x export --task`` wrote.

    Such a file is a program: load one only if you trust where it comes from.

    Raises:
        FormatError: if torch cannot load it, gpt2x did not export it, or it is one for text generation.
    """

    path: Path

    def __init__(self, path: str | Path, kind: str) -> None:
        program = load_program(path, kind)
        if program.task == GENERATION:
            raise FormatError(f"{path}: a model for text generation; open it with ModuleDecoder")
        self.module = program.module
        self.task = program.task
        self.config = program.config
        self.labels = program.labels
        self.path = Path(path)
        self.runtime = f"{self.path.name} in torch {torch.__version__}"

    @torch.inference_mode()
    def run(self, input_ids: Ids, attention_mask: Ids | None = None) -> Outputs:
        """As ``TaskModel.run``.

        Raises:
            InputError: if the arguments do not fit the model or one another.
            FormatError: if the program fails, or returns something else.
        """
        ids, mask = check_rows(input_ids, attention_mask, self.config)
        try:
            return _named(self.task, self.config, self.module(torch.from_numpy(ids), torch.from_numpy(mask)))
        except Exception as error:  # the program comes from the file, and raises anything
            raise FormatError(f"{self.path}: torch cannot run it: {one_line(error)}") from None


def _named(task: str, config: GPT2Config, found: Any) -> Outputs:
    """The outputs of a module by their names."""
    tensors = [found] if isinstance(found, torch.Tensor) else found
    return {name: tensor.numpy() for name, tensor in zip(task_outputs(task, config), tensors, strict=True)}
