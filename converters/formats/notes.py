"""What several writers need of a checkpoint, tell the user, and refuse."""

from __future__ import annotations

from ..checkpoint import Checkpoint
from ..errors import CheckpointError, OtherTokenizerError, TokenizerError
from ..spec import GPT2Config
from ..tensors import F64
from ..tokenizer import TokenizerFiles, Vocabulary

NO_TOKENIZER = "no tokenizer is written: the source has none, or it was left out; pass --tokenizer DIR to add one"


def vocabulary_of(found: TokenizerFiles | None) -> Vocabulary | None:
    """The vocabulary that a format of byte-level BPE stores; None without a tokenizer, or with one of another kind.

    Raises:
        ConversionError: if the tokenizer is damaged.
    """
    if found is None or isinstance(found.fault, OtherTokenizerError):
        return None
    if found.fault:
        raise TokenizerError(f"{found.fault}\nTo convert the weights without the tokenizer, pass --no-tokenizer")
    return found.vocabulary()


def token_roles(config: GPT2Config) -> dict[str, int | None]:
    """``bos_token`` and the like -> the id that the configuration states."""
    return {"bos_token": config.bos_token_id, "eos_token": config.eos_token_id, "pad_token": config.pad_token_id}


def not_stored(found: TokenizerFiles, what: str) -> str:
    """The note on a tokenizer that a format cannot store."""
    return f"the tokenizer is not written: {what} cannot store its kind, {found.kind}"


def tokenizer_notes(checkpoint: Checkpoint, *, keeps_prefix_space: bool) -> list[str]:
    """What is unusual about the checkpoint's tokenizer.

    Args:
        checkpoint: one with a tokenizer that is a byte-level BPE.
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
