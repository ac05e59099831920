"""Open a checkpoint: the steps from a path to a ``Checkpoint``, one module each."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ..checkpoint import Checkpoint
from ..io.reading import reading
from .adapter import merge_adapter, open_adapter
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
    tie: bool | None = None,
    prefix: str | None = None,
    adapter: str | Path | None = None,
    merged_dtype: str | None = None,
    entry: str | None = None,
    ignore_config_keys: Collection[str] = (),
) -> Checkpoint:
    """Open a GPT-2 checkpoint of any known format, recognised by its content. Only names and shapes are read.

    Args:
        path: a file of any of ``FORMATS``, or a directory that holds one.
        n_head: number of attention heads, if no configuration states it.
        n_vocab: truncate a padded vocabulary to this many rows of the token embedding.
        activation_function: the activation function, if no configuration states it.
        tokenizer: a directory or a GGUF file with the tokenizer, if it is neither in the file nor beside it.
        tie: drop (True) or keep (False) an ``lm_head`` that differs from the token embedding, if no configuration states
            ``tie_word_embeddings: false``. By default, it is refused. False also keeps the changes of an adapter to a tied
            pair apart, which are otherwise merged into the one matrix, as by peft's ``merge_and_unload``.
        prefix: prefix of the names of the GPT-2 to read, if the file has several.
        adapter: the directory of a PEFT adapter (LoRA), which is merged while tensors are read.
        merged_dtype: dtype of the tensors that the adapter changes, as in ``--dtype``; by default the base's.
        entry: the keys that lead to the tensors in a file of ``torch.save``, such as ``checkpoint.model``, if it holds
            several models.
        ignore_config_keys: keys to leave out of the configuration, such as unknown ones that do not change the arithmetic.

    Raises:
        ConversionError: if it is not a valid GPT-2 checkpoint. The message says what is wrong, and where.
    """
    source = find(path)
    with reading(source.path), explained(source.subject):
        container = open_container(source, entry)
    # From here on, a refusal is explained by the tensors of the file, no longer by its first bytes.
    with reading(source.path), explained(source.subject, container):
        opened = open_adapter(source, container, adapter)
        stated = read_configuration(source, opened.base, activation_function, ignore_config_keys)
        parameters = recognise(unwrap(opened.base), n_vocab, prefix)
        resolved = resolve(parameters, stated, n_head)
        checkpoint = assemble(parameters, resolved, tie)
        if opened.adapter:
            checkpoint = merge_adapter(
                checkpoint, opened.adapter, merged_dtype, tie=tie, is_truncated=n_vocab is not None
            )
            tokenizer = tokenizer or opened.tokenizer
        return add_tokenizer(checkpoint, stated, source, opened.base, tokenizer)


__all__ = ["open_checkpoint", "tokenizer_in"]
