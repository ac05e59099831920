"""What writers tell the user, and what several of them refuse."""

from __future__ import annotations

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..tensors import F64

NO_TOKENIZER = "no tokenizer beside the source, so none is written; pass --tokenizer DIR to add one"


def tokenizer_notes(checkpoint: Checkpoint, *, keeps_prefix_space: bool) -> list[str]:
    """What is unusual about the checkpoint's tokenizer.

    Args:
        checkpoint: one with a tokenizer.
        keeps_prefix_space: whether the destination can store ``add_prefix_space``.
    """
    assert checkpoint.tokenizer
    vocabulary = checkpoint.tokenizer.vocabulary()
    n_vocab = checkpoint.config.n_vocab
    largest = max(vocabulary.ids.values())
    notes = []
    if largest >= n_vocab:
        notes.append(f"the tokenizer has a token id of {largest}, but the model's n_vocab is {n_vocab}")
    if vocabulary.add_prefix_space and not keeps_prefix_space:
        notes.append("the tokenizer adds a space before the text (add_prefix_space), which this format cannot store")
    return notes


def refuse_float64(checkpoint: Checkpoint, name: str) -> None:
    """Refuse float64 weights, which would be rounded without being asked for.

    Raises:
        CheckpointError: if there are any.
    """
    if any(tensor.dtype == F64 for tensor in checkpoint.tensors.values()):
        raise CheckpointError(f"{name} cannot store float64 weights; choose a dtype to round them to: --dtype fp32")
