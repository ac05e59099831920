"""What a ``config.json`` says of heads: labels, and how a multiple-choice head computes.

Source: ``PretrainedConfig`` and ``GPT2Config`` of transformers 4 and 5; ``GPT2SequenceSummary`` in ``modeling_gpt2.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError
from .values import all_are

# Keys of config.json that a checkpoint keeps for its heads. They are checked when a head is used.
KEYS = (
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
)
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def head_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of heads in a ``config.json``, as they are there."""
    return {key: raw[key] for key in KEYS if raw.get(key) is not None}


@dataclass(frozen=True)
class Labels:
    """The labels of a classifier.

    Args:
        names: of each label, in order.
        ids: name -> number, as ``label2id`` states it.
        problem_type: one of ``PROBLEM_TYPES``, or None if it is not stated.
    """

    names: tuple[str, ...]
    ids: Mapping[str, int]
    problem_type: str | None = None

    def to_hf(self) -> dict[str, Any]:
        """Their keys in a ``config.json``."""
        facts: dict[str, Any] = {
            "id2label": {str(i): name for i, name in enumerate(self.names)},
            "label2id": {**self.ids},
        }
        return {**facts, "problem_type": self.problem_type} if self.problem_type else facts


def labels_of(settings: Mapping[str, Any], count: int, where: str) -> Labels:
    """The labels of a classifier with so many outputs. Those without a name are called ``LABEL_0``, as in transformers.

    Raises:
        ConfigError: if the settings are invalid, or state another number of labels.
    """
    stated = settings.get("num_labels", count)
    if type(stated) is not int or stated != count:
        raise ConfigError(f"{where}: the head has {count} outputs, but num_labels is {str(stated)[:50]!r}")
    names = _names(settings.get("id2label"), count, where)
    ids = settings.get("label2id", {name: i for i, name in enumerate(names)})
    if not isinstance(ids, Mapping) or any(type(number) is not int for number in ids.values()):
        raise ConfigError(f"{where}: label2id is not an object of numbers")
    problem = settings.get("problem_type")
    if problem is not None and problem not in PROBLEM_TYPES:
        raise ConfigError(f"{where}: problem_type is {str(problem)[:50]!r}; expected one of {', '.join(PROBLEM_TYPES)}")
    return Labels(names, ids, problem)


def _names(id2label: Any, count: int, where: str) -> tuple[str, ...]:
    """The names of ``id2label`` in order."""
    if id2label is None:
        return tuple(f"LABEL_{i}" for i in range(count))
    if not isinstance(id2label, Mapping) or not all_are(id2label.values(), str):
        raise ConfigError(f"{where}: id2label is not an object of names")
    if len(id2label) != count:
        raise ConfigError(f"{where}: the head has {count} outputs, but id2label has {len(id2label)} labels")
    names = [id2label.get(str(i)) for i in range(count)]
    if None in names:
        raise ConfigError(f"{where}: id2label does not have the keys 0 to {count - 1}")
    return tuple(str(name) for name in names)


def choice_activation(settings: Mapping[str, Any], where: str) -> str | None:
    """The activation after a multiple-choice head: "tanh", or None.

    Raises:
        ConfigError: if the head does not compute its score at each position by itself.
    """
    expected: dict[str, tuple[Any, ...]] = {
        "summary_type": ("cls_index", "last"),
        "summary_use_proj": (True,),
        "summary_proj_to_labels": (True,),
        "summary_activation": ("tanh", None),
    }
    for key, values in expected.items():
        # GPT2Config's defaults are the first values, but for the activation, which is None.
        value = settings.get(key, values[0] if key != "summary_activation" else None)
        if value not in values:
            raise ConfigError(f"{where}: {key} is {str(value)[:50]!r}; gpt2x supports {' and '.join(map(str, values))}")
    return settings.get("summary_activation")
