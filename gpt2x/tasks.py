"""The tasks of an export, with optimum's names, and the outputs that text generation may have. Imports no other package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    from converters import ConfigError  # the command line's help needs the names only

    known = (LOGITS, *EXTRAS)
    for name in outputs:
        if name not in known:
            raise ConfigError(f"unknown output {name!r}; known are {', '.join(known)}")
    if LOGITS not in outputs or len(set(outputs)) != len(outputs):
        raise ConfigError(f"outputs must be {LOGITS} and any of {', '.join(EXTRAS)}, each once")
    if task != GENERATION and tuple(outputs) != (LOGITS,):
        raise ConfigError(f"outputs can be chosen for {GENERATION} only, not for {task}")
    return tuple(name for name in known if name in outputs)
