"""The tasks of an export, with optimum's names, and which head of a checkpoint each needs. Imports neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from converters import Checkpoint, ConfigError
from converters.config import to_hf
from converters.head_config import Labels, choice_activation, labels_of
from converters.heads import Layer, head_layers
from converters.spec import LM_HEAD

GENERATION = "text-generation"
LOGITS = "logits"


@dataclass(frozen=True)
class Task:
    """What a model is exported for.

    Args:
        name: as in ``--task``; optimum's.
        architecture: transformers' class, as in ``config.json``.
        head: the kind of head (``converters.heads.FORMS``) that computes ``logits``; None for none, or ``lm_head``.
    """

    name: str
    architecture: str
    head: str | None = None


TASKS = {
    task.name: task
    for task in (
        Task(GENERATION, "GPT2LMHeadModel"),
        Task("feature-extraction", "GPT2Model"),
        Task("text-classification", "GPT2ForSequenceClassification", "sequence_classification"),
        Task("token-classification", "GPT2ForTokenClassification", "token_classification"),
    )
}
# What --outputs can add to the logits of text generation -> the kind of head that computes it, if one does.
EXTRAS: dict[str, str | None] = {"hidden_states": None, "values": "value", "mc_logits": "multiple_choice"}


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


def task_of(raw: Mapping[str, Any]) -> str:
    """The task whose class a ``config.json`` names; text generation if it names none of them."""
    architectures = raw.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    return next((task.name for task in TASKS.values() if task.architecture in named), GENERATION)


def check_outputs(outputs: Sequence[str], task: str = GENERATION) -> tuple[str, ...]:
    """The outputs in their order.

    Raises:
        ConfigError: if one is unknown or given twice, ``logits`` is missing, or the task has no choice.
    """
    known = (LOGITS, *EXTRAS)
    for name in outputs:
        if name not in known:
            raise ConfigError(f"unknown output {name!r}; known are {', '.join(known)}")
    if LOGITS not in outputs or len(set(outputs)) != len(outputs):
        raise ConfigError(f"outputs must be {LOGITS} and any of {', '.join(EXTRAS)}, each once")
    if task != GENERATION and tuple(outputs) != (LOGITS,):
        raise ConfigError(f"outputs can be chosen for {GENERATION} only, not for {task}")
    return tuple(name for name in known if name in outputs)
