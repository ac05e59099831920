"""Step 8: find the tokenizer, inside the weights or beside them, and the id of the end of text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..containers.container import Container
from ..containers.shard_index import without_later_parts
from ..dialects import OPENAI
from ..errors import TokenizerError
from ..formats import BY_NAME
from ..formats.gguf import GGUF
from ..io.reading import File
from ..spec import GPT2Config
from ..tokenizer import TokenizerFiles, find_tokenizer
from .find import Source
from .open import open_file
from .read_configuration import Stated
from .situations import HEAD

PADDED = 50304  # GPT-2's vocabulary of 50257, rounded up to a multiple of 64
PADDING = (
    "the vocabulary is padded to {rows} rows, which take part in the softmax; "
    "pass --n-vocab {tokens} to truncate it to the {tokens} tokens of its tokenizer"
)
PADDING_OF_UNKNOWN = (
    f"the vocabulary has {PADDED} rows, which GPT-2's is often padded to; the padding rows take part in the softmax. "
    "To truncate it, pass --n-vocab with the number of tokens of its tokenizer, added tokens included"
)


def add_tokenizer(
    checkpoint: Checkpoint, stated: Stated, source: Source, container: Container, tokenizer: str | Path | None = None
) -> Checkpoint:
    """The checkpoint with its tokenizer, the token ids that it gives, and what the user may want to know.

    Args:
        checkpoint: without a tokenizer.
        stated: the configuration that files state.
        source: where the checkpoint was found.
        container: the open file.
        tokenizer: a directory or a GGUF file with another tokenizer.

    Raises:
        TokenizerError: if there is none in ``tokenizer``.
    """
    remarks = _remarks(checkpoint, source, container)
    notes: list[str] = []
    if tokenizer:
        found: TokenizerFiles | None = tokenizer_in(Path(tokenizer))
    else:
        found, notes = _inside_or_beside(container, source.home)
    # The ids that no configuration states: the tokenizer's end of text, or else OpenAI's, which is the last token.
    end = checkpoint.config.eos_token_id
    if found:
        end = found.end_of_text()
    elif checkpoint.dialect == OPENAI.name:
        end = checkpoint.config.n_vocab - 1
    ids: dict[str, Any] = {key: end for key in ("bos_token_id", "eos_token_id") if key not in stated.fields}
    config = replace(checkpoint.config, **ids)
    notes = [*checkpoint.notes, *notes, *remarks, *_padding_remarks(config, found)]
    return replace(checkpoint, config=config, tokenizer=found, notes=tuple(notes))


def _remarks(checkpoint: Checkpoint, source: Source, container: Container) -> list[str]:
    read = {source.weights.name, *(file.name for file in container.files)}
    others = [f"{source.path} also holds {name}, which was not read" for name in source.candidates if name not in read]
    return [*source.notes, *others]


def _padding_remarks(config: GPT2Config, found: TokenizerFiles | None) -> list[str]:
    """How to truncate a padded vocabulary, without losing a row that a token or the configuration uses."""
    if found is None or found.fault:
        return [PADDING_OF_UNKNOWN] if config.n_vocab == PADDED else []
    stated = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    tokens = max([found.vocabulary().rows, *(id + 1 for id in stated if id is not None)])
    return [PADDING.format(rows=config.n_vocab, tokens=tokens)] if tokens < config.n_vocab else []


def _inside_or_beside(container: Container, directory: Path) -> tuple[TokenizerFiles | None, list[str]]:
    """The tokenizer in a file, or else that in a directory; and a note on one in the file that cannot be used."""
    entry = BY_NAME.get(container.format)
    read = entry.vocabulary(container) if entry and entry.vocabulary else None
    if read is None:
        return find_tokenizer(directory), []
    try:
        return TokenizerFiles(directory, None, None, None, read()), []
    except TokenizerError as error:
        return find_tokenizer(directory), [f"the tokenizer in it is not used: {error}"]


def tokenizer_in(path: Path) -> TokenizerFiles:
    """The tokenizer in a directory, beside a file of weights, or in a GGUF file.

    Raises:
        TokenizerError: if there is none.
        ConversionError: if a GGUF file is invalid.
    """
    if not path.exists() and not Path(f"{path}.index").exists():
        raise TokenizerError(f"{path}: no such file or directory")
    found = find_tokenizer(path if path.is_dir() else path.parent)
    file = _carrier(path)
    if file and not (found and path.is_dir()):
        found, _ = _inside_or_beside(open_file(file), file.parent)
    if found is None:
        where = "here" if path.is_dir() else "in it or beside it"
        raise TokenizerError(
            f"{path}: no tokenizer {where} (tokenizer.json, vocab.json with merges.txt, encoder.json with vocab.bpe, "
            "a SentencePiece model or vocab.txt).\n"
            "Pass --tokenizer DIR with a directory that has one"
        )
    return found


def _carrier(path: Path) -> Path | None:
    """The file itself, or the only one in a directory (the first part, if it was split), if it is a GGUF file."""
    files = [path] if path.is_file() else without_later_parts(list(path.glob("*.gguf")))
    if len(files) != 1:
        return None
    file = File(files[0])
    head = file.read(0, min(file.size, HEAD))
    return files[0] if GGUF.openers[0].matches(head, file.size) else None
