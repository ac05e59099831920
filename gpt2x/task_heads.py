"""Which heads of a checkpoint a task needs, and the checkpoint and the ``config.json`` of a model for it. Imports neither torch
nor numpy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from converters import Checkpoint, LazyTensor
from converters.config import to_hf
from converters.head_config import Labels, choice_activation, labels_of
from converters.heads import Layer, head_layers
from converters.spec import LM_HEAD

from .tasks import EXTRAS, GENERATION, LOGITS, TASKS


@dataclass(frozen=True)
class HeadPart:
    """A head that computes an output from the final hidden states: its layers, and the activation after the last one."""

    layers: tuple[Layer, ...]
    activation: str | None = None


@dataclass(frozen=True)
class TaskHeads:
    """The heads that an export needs: output -> head, and the labels of a classifier."""

    parts: dict[str, HeadPart]
    labels: Labels | None = None

    @property
    def layers(self) -> list[Layer]:
        """The layers of all heads, in the order of the outputs."""
        return list(itertools.chain.from_iterable(part.layers for part in self.parts.values()))

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """Their tensors, as the file names them: ``score.weight``."""
        found = {}
        for layer in self.layers:
            found[f"{layer.name}.weight"] = layer.weight
            if layer.bias is not None:
                found[f"{layer.name}.bias"] = layer.bias
        return found


def heads_of(checkpoint: Checkpoint, task: str = GENERATION, outputs: Sequence[str] = (LOGITS,)) -> TaskHeads:
    """The heads that a task and its outputs need. Names, shapes and settings are checked; no tensor is read.

    Raises:
        CheckpointError: if the checkpoint has no such head, or one of another form.
        ConfigError: if the settings of a head are invalid.
    """
    where, width = checkpoint.origin, checkpoint.config.n_embd
    kind = TASKS[task].head
    if kind is not None:
        layers = head_layers(checkpoint.heads, kind, width, where)
        labels = labels_of(checkpoint.head_settings, layers[-1].weight.shape[0], where)
        return TaskHeads({LOGITS: HeadPart(layers)}, labels)
    parts = {}
    for name in outputs:
        extra = EXTRAS.get(name)
        if extra is not None:
            layers = head_layers(checkpoint.heads, extra, width, where)
            is_choice = extra == "multiple_choice"
            activation = choice_activation(checkpoint.head_settings, where) if is_choice else None
            parts[name] = HeadPart(layers, activation)
    return TaskHeads(parts)


def body_of(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without an ``lm_head``, which no task but text generation uses."""
    config = replace(checkpoint.config, tie_word_embeddings=True)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name != LM_HEAD}
    return replace(checkpoint, config=config, tensors=tensors)


def config_json(checkpoint: Checkpoint, task: str, labels: Labels | None) -> dict[str, Any]:
    """The ``config.json`` of a model for a task, as transformers' class reads it."""
    facts = {**to_hf(checkpoint.config), "architectures": [TASKS[task].architecture]}
    return facts if labels is None else {**facts, **labels.to_hf()}
