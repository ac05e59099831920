"""Heads: what a GPT-2 may have besides, or in place of, the output of a language model.

Sources: ``modeling_gpt2.py`` of transformers; ``modeling_value_head.py`` of trl; ``reward_model.py`` of DeepSpeed-Chat.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .tensors import LazyTensor

# First part of a name -> kind of the head.
KINDS = {
    "v_head": "value",
    "value_head": "value",
    "multiple_choice_head": "multiple_choice",
    "score": "sequence_classification",
    "classifier": "token_classification",
    "qa_outputs": "question_answering",
}
SEPARATOR = re.compile(r"[./]")


@dataclass(frozen=True)
class Head:
    """A head that is no ``lm_head``, opened but not read.

    Args:
        kind: one of the values of ``KINDS``.
        tensors: name without a wrapper's prefix, such as ``v_head.summary.weight`` -> tensor in the layout of the file.
    """

    kind: str
    tensors: Mapping[str, LazyTensor]


def paths_under(name: str, prefix: str) -> Iterator[str]:
    """The name relative to a prefix and to each part of it from the left, the longest first; the last is the name."""
    for parent in parents(prefix):
        if name.startswith(parent):
            yield name[len(parent) :]


@functools.lru_cache(maxsize=64)
def parents(prefix: str) -> tuple[str, ...]:
    """A prefix and those that it begins with, the longest first: of ``a.b.`` these are ``a.b.``, ``a.`` and the empty one."""
    ends = [match.end() for match in SEPARATOR.finditer(prefix)]
    shorter = [prefix[:end] for end in reversed(ends) if end != len(prefix)]
    return tuple(dict.fromkeys((prefix, *shorter, "")))


def first_part(path: str) -> str:
    """What stands before the first separator of a name."""
    return SEPARATOR.split(path, maxsplit=1)[0]


def find_head(name: str, prefix: str) -> tuple[str, str] | None:
    """The kind of head that a tensor belongs to, and its name there; None if it belongs to none.

    Args:
        name: the name of a tensor.
        prefix: of the names of the GPT-2. A head is in the GPT-2, or in a module around it.
    """
    for path in paths_under(name, prefix):
        kind = KINDS.get(first_part(path))
        if kind and path != first_part(path):
            return kind, path
    return None
