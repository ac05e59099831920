"""Step 5: recognise the dialect, and put the parameters into canonical names and layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import not_gpt2
from ..containers.container import Container
from ..dialects import NANOGPT, Dialect
from ..dialects import recognise as recognise_dialect
from ..errors import CheckpointError
from ..formats.nanogpt import dialect_of
from ..spec import LM_HEAD
from ..tensors import LazyTensor


@dataclass(frozen=True)
class Parameters:
    """Every parameter of a GPT-2; their shapes are not checked yet.

    Args:
        container: where they come from.
        dialect: the dialect of its names.
        tensors: canonical name -> tensor in canonical layout.
        n_layer: number of layers.
        n_vocab: the number of rows that the token embedding was truncated to, if it was.
        left_out: names of the tensors that are not parameters.
        zero_biases: rows of SPEC for which zeros stand, as the file has no such biases.
    """

    container: Container
    dialect: Dialect
    tensors: dict[str, LazyTensor]
    n_layer: int
    n_vocab: int | None
    left_out: tuple[str, ...]
    zero_biases: tuple[str, ...]


def recognise(container: Container, n_vocab: int | None = None) -> Parameters:
    """Find every parameter of a GPT-2 in a container.

    Args:
        container: with tensors whose names have no wrapper's prefix.
        n_vocab: truncate the token embedding to this many rows.

    Raises:
        CheckpointError: if they are not a GPT-2's. The message lists everything that is wrong.
    """
    dialect, prefix = recognise_dialect(container.tensors)
    found = dialect.read(container.tensors, prefix)
    if not found.parameters:
        raise _nothing_known(container)
    if dialect is NANOGPT:
        dialect = dialect_of(container)
    if found.faults:
        raise not_gpt2(container.path, dialect.name, found.faults)
    tensors = found.parameters
    if n_vocab:
        tensors = _truncated(tensors, n_vocab, container.path)
    return Parameters(container, dialect, tensors, found.n_layer, n_vocab, tuple(found.left_out), found.zero_biases)


# A part of a tensor's name -> the program that uses it, and what to do.
OTHERS = {
    "query_key_value.weight": (
        "a checkpoint of Megatron-LM or GPT-NeoX, whose queries, keys and values are interleaved; "
        "convert it to Hugging Face's layout with that project's script"
    ),
    "blocks.0.attn.W_Q": (
        "a HookedTransformer of TransformerLens, whose weights are usually folded and centered; "
        "convert the model that it was made from"
    ),
    "sa.heads.0.key.weight": (
        "the model of the lecture 'Let's build GPT', whose heads and lm_head bias GPT-2 does not have"
    ),
}


def _nothing_known(container: Container) -> CheckpointError:
    for part, what in OTHERS.items():
        if any(part in name for name in container.tensors):
            return CheckpointError(f"{container.path}: {what}")
    first = next(iter(container.tensors))[:100]
    return CheckpointError(
        f"{container.path}: not a GPT-2: none of its {len(container.tensors)} tensors has a name of a GPT-2 parameter (the first is {first!r})"
    )


def _truncated(tensors: dict[str, LazyTensor], n_vocab: int, path: Path) -> dict[str, LazyTensor]:
    """The same tensors with the first rows of the vocabulary only."""
    result = dict(tensors)
    for name in ("wte.weight", LM_HEAD):
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if not tensor.shape or tensor.shape[0] < n_vocab:
            raise CheckpointError(f"{path}: {name} is {list(tensor.shape)}: fewer than the {n_vocab} rows of --n-vocab")
        result[name] = tensor.first_rows(n_vocab)
    return result
