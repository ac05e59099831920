"""Heads: what a GPT-2 may have besides, or in place of, the output of a language model.

Sources: ``modeling_gpt2.py`` of transformers; ``modeling_value_head.py`` of trl; ``reward_model.py`` of DeepSpeed-Chat.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from .errors import CheckpointError
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
# Kind -> the tensors of each form of a head, without the first part of their names, and their shapes in symbols: N labels,
# C width. A matrix is [out, in], as in torch's Linear.
FORMS: dict[str, tuple[dict[str, tuple[str, ...]], ...]] = {
    "sequence_classification": ({"weight": ("N", "C")},),
    "token_classification": ({"weight": ("N", "C"), "bias": ("N",)},),
    "multiple_choice": ({"summary.weight": ("1", "C"), "summary.bias": ("1",)},),
    "value": (
        {"summary.weight": ("1", "C"), "summary.bias": ("1",)},  # trl
        {"weight": ("1", "C")},  # DeepSpeed-Chat, OpenRLHF
        {"weight": ("1", "C"), "bias": ("1",)},
        {"0.weight": ("2C", "C"), "0.bias": ("2C",), "2.weight": ("1", "2C"), "2.bias": ("1",)},  # trlx
    ),
}
WORDS = {  # kind -> what it is called in messages
    "sequence_classification": "head for text classification (score.weight)",
    "token_classification": "head for token classification (classifier.weight and classifier.bias)",
    "multiple_choice": "multiple-choice head (multiple_choice_head.summary.weight and .bias)",
    "value": "value head (v_head.summary.weight and .bias)",
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


@dataclass(frozen=True)
class Layer:
    """A linear layer of a head: weight [out, in], and bias [out] or None. Between two layers is a ReLU.

    ``name`` is what the file calls it, such as ``v_head.summary``.
    """

    name: str
    weight: LazyTensor
    bias: LazyTensor | None = None


def head_layers(heads: Iterable[Head], kind: str, n_embd: int, where: str) -> tuple[Layer, ...]:
    """The layers of the head of a kind, in order. Their shapes are checked; nothing is read.

    Args:
        heads: those of a checkpoint.
        kind: a key of ``FORMS``.
        n_embd: the width of the GPT-2.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: if there is no such head, or its names, shapes or dtypes are not those of a known form.
    """
    tensors = next((head.tensors for head in heads if head.kind == kind), None)
    if tensors is None:
        raise CheckpointError(f"{where}: has no {WORDS[kind]}")
    bare = {_without_first(path): tensor for path, tensor in tensors.items()}
    form = next((form for form in FORMS[kind] if form.keys() == bare.keys()), None)
    if form is None or len(bare) < len(tensors):
        found = ", ".join(path[:60] for path in tensors)
        raise CheckpointError(f"{where}: gpt2x does not know this {kind} head: it has {found[:300]}")
    stem = first_part(next(iter(tensors)))
    _check_shapes(bare, form, n_embd, f"{where}: {kind} head: {stem}")
    return tuple(_layer(stem, name, bare) for name in form if name.endswith("weight"))


def _layer(stem: str, name: str, tensors: Mapping[str, LazyTensor]) -> Layer:
    """The layer whose weight has this name, such as ``summary.weight``, in a head with the first part ``stem``."""
    place = name.removesuffix("weight")
    return Layer(f"{stem}.{place}".rstrip("."), tensors[name], tensors.get(f"{place}bias"))


def _check_shapes(
    tensors: Mapping[str, LazyTensor], form: Mapping[str, tuple[str, ...]], n_embd: int, where: str
) -> None:
    """Compare the shapes of a head with those of its form; the number of labels is that of the weight's rows."""
    first = tensors[next(iter(form))].shape
    sizes = {"N": first[0] if first else 0, "C": n_embd, "2C": 2 * n_embd, "1": 1}
    for name, symbols in form.items():
        tensor, expected = tensors[name], [sizes[symbol] for symbol in symbols]
        if list(tensor.shape) != expected or not tensor.size:
            raise CheckpointError(f"{where}.{name} is {list(tensor.shape)}; expected {_in_words(symbols, n_embd)}")
        if not tensor.dtype.is_float:
            raise CheckpointError(f"{where}.{name} is {tensor.dtype}; a parameter must be float")


def _in_words(symbols: tuple[str, ...], n_embd: int) -> str:
    """A shape for messages, such as ``[num_labels, 768]``."""
    words = {"N": "num_labels", "C": str(n_embd), "2C": str(2 * n_embd), "1": "1"}
    return f"[{', '.join(words[symbol] for symbol in symbols)}]"


def _without_first(path: str) -> str:
    """``summary.weight`` of ``v_head/summary/weight``."""
    return ".".join(SEPARATOR.split(path)[1:])


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
        # A head is a module, so that its tensors have a name after its own.
        if kind and path != first_part(path):
            return kind, path
    return None
