"""The files of a GPT-2 tokenizer, in OpenAI's layout and Hugging Face's.

``encoder.json`` and ``vocab.json`` are the same file, and so are ``vocab.bpe`` and ``merges.txt``: their bytes are
copied. ``tokenizer.json`` has the same content in the format of the ``tokenizers`` library.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConversionError, TokenizerError
from .io.json import read_json
from .io.reading import File

PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
EXTRA = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)  # Hugging Face's, copied as they are
MAX_FILE = 64 << 20
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer on disk: ``tokenizer.json``, or a vocabulary and its merges, or both; or ``inside`` a file of weights,
    which takes precedence over files beside it."""

    directory: Path
    vocab: Path | None
    merges: Path | None
    tokenizer_json: Path | None
    inside: Vocabulary | None = None

    @property
    def place(self) -> str:
        """Where it is, as text for the user."""
        return f"in the file, {len(self.inside.ids)} tokens" if self.inside else str(self.directory)

    def vocabulary(self) -> Vocabulary:
        """The vocabulary in the files, which are read once.

        Raises:
            TokenizerError: if this is not a byte-level BPE as GPT-2's is.
        """
        return self._vocabulary

    def end_of_text(self) -> int | None:
        """The id of ``<|endoftext|>``; None without one, or if the tokenizer is invalid, which whoever needs it reports."""
        try:
            return self.vocabulary().ids.get(END_OF_TEXT)
        except ConversionError:
            return None

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        if self.inside:
            return self.inside
        if self.tokenizer_json:
            return _from_tokenizer_json(read_json(self.tokenizer_json), self.tokenizer_json)
        assert self.vocab and self.merges
        added = self.directory / "added_tokens.json"
        extra = _ids(read_json(added), added) if added.is_file() else {}
        return Vocabulary(
            _ids({**_ids(read_json(self.vocab), self.vocab), **extra}, self.vocab),
            _merges(self.merges),
            _special(extra),
        )


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE: token -> id, the pairs to merge in order, and the added tokens."""

    ids: dict[str, int]
    merges: list[tuple[str, str]]
    added: tuple[str, ...] = ()
    add_prefix_space: bool = False


def find_tokenizer(directory: Path) -> TokenizerFiles | None:
    """The tokenizer in a directory, if there is one. In a KerasHub preset it is in a folder, and ``tokenizer.json`` is Keras's."""
    assets = directory / "assets" / "tokenizer"
    if (assets / "vocabulary.json").is_file() and (assets / "merges.txt").is_file():
        return TokenizerFiles(assets, assets / "vocabulary.json", assets / "merges.txt", None)
    present = {name: directory / name for pair in PAIRS for name in pair if (directory / name).is_file()}
    vocab, merges = next(((present[v], present[m]) for v, m in PAIRS if v in present and m in present), (None, None))
    whole = directory / "tokenizer.json"
    tokenizer_json = whole if whole.is_file() else None
    return TokenizerFiles(directory, vocab, merges, tokenizer_json) if tokenizer_json or vocab else None


def _from_tokenizer_json(raw: dict[str, Any], where: Path) -> Vocabulary:
    model, before = raw.get("model"), raw.get("pre_tokenizer")
    if not isinstance(model, dict) or not isinstance(before, dict) or not _is_gpt2s(raw, model, before):
        raise TokenizerError(f"{where}: not a byte-level BPE as GPT-2's is")
    added = _entries(raw.get("added_tokens"), where)
    ids = _ids({**_ids(model.get("vocab"), where), **added}, where)
    return Vocabulary(ids, _pairs(model.get("merges"), where), _special(added), bool(before.get("add_prefix_space")))


def _is_gpt2s(raw: dict[str, Any], model: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` has only settings that GPT-2's tokenizer has."""
    off = (
        raw.get("normalizer"),
        model.get("dropout"),
        model.get("continuing_subword_prefix"),
        model.get("end_of_word_suffix"),
    )
    plain = (
        model.get("type", "BPE") == "BPE"
        and not any(off)
        and not model.get("byte_fallback")
        and not model.get("ignore_merges")
    )
    return plain and before.get("type") == "ByteLevel" and before.get("use_regex", True) is True


def _special(added: dict[str, int]) -> tuple[str, ...]:
    """The added tokens except ``<|endoftext|>``, which every GPT-2 tokenizer has."""
    return tuple(token for token in added if token != END_OF_TEXT)


def _entries(raw: Any, where: Path) -> dict[str, int]:
    entries = raw if raw is not None else []
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("content"), str) for e in entries
    ):
        raise TokenizerError(f"{where}: invalid added_tokens")
    return _ids({e["content"]: e.get("id") for e in entries}, where) if entries else {}


def _pairs(raw: Any, where: Path) -> list[tuple[str, str]]:
    pairs = [m.split(" ") if isinstance(m, str) else m for m in raw] if isinstance(raw, list) else [[]]
    if not all(
        isinstance(p, list) and len(p) == 2 and all(isinstance(t, str) and _is_text(t) for t in p) for p in pairs
    ):
        raise TokenizerError(f"{where}: invalid merges: not pairs of tokens")
    return [(a, b) for a, b in pairs]


def _is_text(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _ids(raw: Any, where: Path) -> dict[str, int]:
    sound = isinstance(raw, dict) and raw and all(type(i) is int and i >= 0 for i in raw.values())
    if not sound:
        raise TokenizerError(f"{where}: not a valid table of tokens and ids")
    if len(set(raw.values())) != len(raw):
        raise TokenizerError(f"{where}: duplicate token id")
    if max(raw.values()) >= 1_000_000:
        raise TokenizerError(f"{where}: a token id of {max(raw.values())}, which exceeds the limit of 1000000")
    return dict(raw)


def _merges(path: Path) -> list[tuple[str, str]]:
    lines = _text(path).split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if wrong := next((p for p in pairs if len(p) != 2), None):
        raise TokenizerError(f"{path}: {' '.join(wrong)[:60]!r} is not a merge of two tokens")
    return [(a, b) for a, b in pairs]


def _bytes(path: Path) -> bytes:
    file = File(path)
    if file.size > MAX_FILE:
        raise TokenizerError(f"{path}: {file.size} bytes exceed the limit of {MAX_FILE} for a tokenizer")
    return file.read(0, file.size)


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise TokenizerError(f"{path}: not UTF-8") from None


def hf_files(found: TokenizerFiles, n_ctx: int) -> dict[str, bytes]:
    """Name -> contents of the files that transformers, tokenizers and transformers.js load."""
    vocabulary = found.vocabulary()
    files = _pair(found, vocabulary, "vocab.json", "merges.txt")
    if not found.inside:
        files |= {name: _bytes(found.directory / name) for name in EXTRA if (found.directory / name).is_file()}
    files["tokenizer.json"] = (
        _bytes(found.tokenizer_json) if found.tokenizer_json else build(vocabulary).to_str().encode()
    )
    defaults = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": n_ctx,
        "add_prefix_space": vocabulary.add_prefix_space,
        "clean_up_tokenization_spaces": False,
    }
    if END_OF_TEXT in vocabulary.ids:
        defaults |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    files.setdefault("tokenizer_config.json", _json(defaults))
    return files


def openai_files(found: TokenizerFiles) -> dict[str, bytes]:
    """Name -> contents of the files that OpenAI's code loads."""
    return _pair(found, found.vocabulary(), "encoder.json", "vocab.bpe")


def _pair(found: TokenizerFiles, vocabulary: Vocabulary, first: str, second: str) -> dict[str, bytes]:
    if found.vocab and found.merges:
        return {first: _bytes(found.vocab), second: _bytes(found.merges)}
    lines = "".join(f"{a} {b}\n" for a, b in vocabulary.merges)
    return {first: json.dumps(vocabulary.ids).encode(), second: f"#version: 0.2\n{lines}".encode()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def build(vocabulary: Vocabulary) -> Any:
    """GPT-2's tokenizer as a ``tokenizers.Tokenizer``: OpenAI's ``encoder.py``, with ``<|endoftext|>`` one token.

    It is always built from the vocabulary, never loaded from an untrusted ``tokenizer.json`` with other settings.

    Raises:
        TokenizerError: if the merges and the vocabulary do not match.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=vocabulary.merges))
    except Exception as error:  # the library raises Exception itself
        raise TokenizerError(f"the tokenizer's vocabulary and merges do not match: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=vocabulary.add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    added = dict.fromkeys([*([END_OF_TEXT] if END_OF_TEXT in vocabulary.ids else []), *vocabulary.added])
    tokenizer.add_special_tokens([AddedToken(token, normalized=True, special=True) for token in added])
    return tokenizer
