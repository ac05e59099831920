"""Open a checkpoint: the steps from a path to a ``Checkpoint``, one module each."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import Checkpoint
from ..io.reading import reading
from .assemble import assemble
from .find import find
from .open import open_container
from .read_configuration import read_configuration
from .recognise_dialect import recognise
from .resolve import resolve
from .situations import explained
from .tokenizer import add_tokenizer, tokenizer_in
from .unwrap import unwrap


def open_checkpoint(
    path: str | Path,
    *,
    n_head: int | None = None,
    n_vocab: int | None = None,
    activation_function: str | None = None,
    tokenizer: str | Path | None = None,
    tie: bool = False,
) -> Checkpoint:
    """Open a GPT-2 checkpoint of any known format, recognised by its content. Only names and shapes are read.

    Args:
        path: a file of any of ``FORMATS``, or a directory that holds one.
        n_head: number of attention heads, if no configuration states it.
        n_vocab: truncate a padded vocabulary to this many rows of the token embedding.
        activation_function: the activation function, if no configuration states it.
        tokenizer: a directory or a GGUF file with the tokenizer, if it is neither in the file nor beside it.
        tie: drop an untied ``lm_head``.

    Raises:
        ConversionError: if it is not a valid GPT-2 checkpoint. The message says what is wrong, and where.
    """
    source = find(path)
    with reading(source.path), explained(source.subject):
        container = open_container(source)
    with reading(source.path), explained(source.subject, container):
        stated = read_configuration(source, container, activation_function)
        parameters = recognise(unwrap(container), n_vocab)
        resolved = resolve(parameters, stated, n_head)
        checkpoint = assemble(parameters, resolved, tie)
        return add_tokenizer(checkpoint, stated, source, container, tokenizer)


__all__ = ["open_checkpoint", "tokenizer_in"]
