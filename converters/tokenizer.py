"""The files of a tokenizer, in OpenAI's layout and Hugging Face's.

``encoder.json`` and ``vocab.json`` are the same file, and so are ``vocab.bpe`` and ``merges.txt``: their bytes are
copied. ``tokenizer.json`` has the same content in the format of the ``tokenizers`` library. A tokenizer of another kind than
GPT-2's is copied file by file.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from .added_tokens import (
    ADDED,
    CONFIG,
    DECODER,
    END_OF_TEXT,
    MAX_ID,
    SPECIAL_MAP,
    AddedToken,
    read_added_tokens,
    usual_token,
)
from .errors import ConversionError, OtherTokenizerError, TokenizerError
from .io.json import read_json
from .io.reading import File, files_in
from .values import are_sizes, is_list_of

PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
EXTRA = (CONFIG, SPECIAL_MAP, ADDED, "chat_template.jinja")  # Hugging Face's, copied as they are
# Files of tokenizers that are not byte-level BPE, by the names that transformers gives them: copied as they are.
OTHERS = {
    "spiece.model": "SentencePiece",
    "tokenizer.model": "SentencePiece",
    "sentencepiece.bpe.model": "SentencePiece",
    "sentencepiece.model": "SentencePiece",
    "spm.model": "SentencePiece",
    "vocab.txt": "WordPiece",
}
HF_NAMES = ("tokenizer.json", *PAIRS[0], *EXTRA, *OTHERS)
NAMES = ("tokenizer.json", *PAIRS[0], *PAIRS[1], *EXTRA, *OTHERS)
MODELS = ("BPE", "WordPiece", "WordLevel", "Unigram")  # of a tokenizer.json
MAX_FILE = 64 << 20
PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))
# The characters of GPT-2's vocabulary, and the bytes that they stand for: ``bytes_to_unicode`` in OpenAI's encoder.py.
BYTES = {chr(byte): byte for byte in PRINTABLE}
BYTES |= {chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can state one without its other half, which no UTF-8 can


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer on disk: ``tokenizer.json``, or a vocabulary and its merges, or both, or a file of another kind of
    tokenizer; or ``inside`` a file of weights, which takes precedence over files beside it."""

    directory: Path
    vocab: Path | None
    merges: Path | None
    tokenizer_json: Path | None
    inside: Vocabulary | None = None
    other: Path | None = None

    @property
    def place(self) -> str:
        """Where it is, as text for the user."""
        return f"in the file, {len(self.inside.ids)} tokens" if self.inside else str(self.directory)

    @property
    def kind(self) -> str:
        """What kind of tokenizer it is, as text for the user."""
        if isinstance(self.fault, OtherTokenizerError):
            return self.fault.kind
        if self.fault:
            return "damaged"
        vocabulary = self.vocabulary()
        added = len(vocabulary.added_by_user)
        text = f"byte-level BPE, {len(vocabulary.ids) - added} tokens"
        return f"{text} + {added} added" if added else text

    @property
    def files(self) -> list[Path]:
        """The files that it was read from, without those that only state added tokens and settings."""
        return list(filter(None, (self.tokenizer_json, self.vocab, self.merges, self.other)))

    @functools.cached_property
    def fault(self) -> ConversionError | None:
        """Why ``vocabulary`` fails: an OtherTokenizerError if this is another kind of tokenizer; None if it does not."""
        try:
            self.vocabulary()
        except ConversionError as error:
            return error
        return None

    def vocabulary(self) -> Vocabulary:
        """The vocabulary in the files, which are read once.

        Raises:
            OtherTokenizerError: if this is not a byte-level BPE as GPT-2's is.
            TokenizerError: if it is damaged.
        """
        return self._vocabulary

    def end_of_text(self) -> int | None:
        """The id of ``<|endoftext|>``; None without one, or if the tokenizer is invalid, which whoever needs it reports."""
        return None if self.fault else self.vocabulary().ids.get(END_OF_TEXT)

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        if self.inside:
            return self.inside
        if self.tokenizer_json:
            return _from_tokenizer_json(read_json(self.tokenizer_json), self.tokenizer_json)
        if self.vocab and self.merges:
            return _from_pair(self.vocab, self.merges)
        assert self.other
        raise _not_gpt2s(self.other, OTHERS[self.other.name])


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE: token -> id, the pairs to merge in order, and the added tokens in the order of their ids.

    ``<|endoftext|>`` is an added token wherever it is in the vocabulary, as every GPT-2 tokenizer has it.
    """

    ids: dict[str, int]
    merges: list[tuple[str, str]]
    added: tuple[AddedToken, ...] = ()
    add_prefix_space: bool = False

    def __post_init__(self) -> None:
        if END_OF_TEXT in self.ids and all(token.content != END_OF_TEXT for token in self.added):
            added = (*self.added, usual_token(END_OF_TEXT, special=True))
            object.__setattr__(self, "added", tuple(sorted(added, key=lambda token: self.ids[token.content])))

    @property
    def added_by_user(self) -> tuple[AddedToken, ...]:
        """The added tokens except ``<|endoftext|>``."""
        return tuple(token for token in self.added if token.content != END_OF_TEXT)

    @property
    def rows(self) -> int:
        """The number of rows that the token embedding needs: the largest id, and one."""
        return max(self.ids.values(), default=-1) + 1


def find_tokenizer(directory: Path) -> TokenizerFiles | None:
    """The tokenizer in a directory, if there is one. A byte-level BPE takes precedence over other kinds.

    In a KerasHub preset it is in a folder, and ``tokenizer.json`` is Keras's.
    """
    assets = directory / "assets" / "tokenizer"
    if (assets / "vocabulary.json").is_file() and (assets / "merges.txt").is_file():
        return TokenizerFiles(assets, assets / "vocabulary.json", assets / "merges.txt", None)
    present = files_in(directory, NAMES)
    vocab, merges = _pair_in(present)
    tokenizer_json = present.get("tokenizer.json")
    other = next(filter(None, map(present.get, OTHERS)), None)
    if not (tokenizer_json or vocab or other):
        return None
    return TokenizerFiles(directory, vocab, merges, tokenizer_json, other=other)


def _pair_in(present: Mapping[str, Path]) -> tuple[Path, Path] | tuple[None, None]:
    """The vocabulary and its merges, if both are there."""
    for vocab, merges in PAIRS:
        if vocab in present and merges in present:
            return present[vocab], present[merges]
    return None, None


def same_tokenizer(a: TokenizerFiles, b: TokenizerFiles) -> bool:
    """Whether two tokenizers have the same vocabulary, merges and added tokens; or files, if gpt2x cannot read them.

    ``normalized`` is not compared: GPT-2 has no normalizer, and programs differ in what they write there.
    """
    if a.fault or b.fault:
        return list(map(_bytes, a.files)) == list(map(_bytes, b.files))
    x, y = a.vocabulary(), b.vocabulary()
    if (x.ids, x.merges, x.add_prefix_space) != (y.ids, y.merges, y.add_prefix_space):
        return False
    return _comparable(x) == _comparable(y)


def _comparable(vocabulary: Vocabulary) -> list[AddedToken]:
    return [replace(token, normalized=False) for token in vocabulary.added]


def _not_gpt2s(where: Path, kind: str) -> OtherTokenizerError:
    return OtherTokenizerError(f"{where}: {kind}, not a byte-level BPE as GPT-2's is", f"{kind} ({where.name})")


def _from_pair(vocab: Path, merges: Path) -> Vocabulary:
    pairs = _merges(merges)
    if not _is_byte_level(pairs):
        raise _not_gpt2s(vocab, "character-level BPE")
    ids, added = read_added_tokens(_ids(read_json(vocab), vocab), vocab.parent)
    return Vocabulary(_ids(ids, vocab), pairs, added)


def _is_byte_level(merges: list[tuple[str, str]]) -> bool:
    """Whether merges begin with single characters, each of which stands for a byte.

    GPT-1's and CTRL's, which have files of the same names, begin with characters that end a word: ``e</w>``, ``e@@``.
    """
    known = {*map("".join, merges), *BYTES}
    return known.issuperset(itertools.chain.from_iterable(merges))


def _from_tokenizer_json(raw: dict[str, Any], where: Path) -> Vocabulary:
    model, before = raw.get("model"), raw.get("pre_tokenizer")
    if not isinstance(model, dict) or not isinstance(before, dict) or not _is_gpt2s(raw, model, before):
        kind = model.get("type") if isinstance(model, dict) else None
        raise _not_gpt2s(where, kind if kind in MODELS else "an unknown kind of tokenizer")
    ids, added = read_added_tokens(_ids(model.get("vocab"), where), where.parent, raw.get("added_tokens"), where)
    merges = read_pairs(model.get("merges"), where)
    return Vocabulary(_ids(ids, where), merges, added, bool(before.get("add_prefix_space")))


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


def read_pairs(raw: Any, where: Path | str) -> list[tuple[str, str]]:
    """The pairs to merge, of a list of texts ``"a b"`` or of lists ``["a", "b"]``.

    Raises:
        TokenizerError: if that is not what ``raw`` is.
    """
    pairs = []
    for merge in raw if isinstance(raw, list) else [None]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not _is_pair(pair):
            raise TokenizerError(f"{where}: invalid merges: not pairs of tokens")
        pairs.append((pair[0], pair[1]))
    return pairs


def _is_pair(value: Any) -> TypeGuard[list[str]]:
    return is_list_of(value, str) and len(value) == 2 and not SURROGATE.search(value[0] + value[1])


def _ids(raw: Any, where: Path) -> dict[str, int]:
    if not isinstance(raw, dict) or not raw or not are_sizes(raw.values()):
        raise TokenizerError(f"{where}: not a valid table of tokens and ids")
    if len(set(raw.values())) != len(raw):
        raise TokenizerError(f"{where}: duplicate token id")
    if max(raw.values()) >= MAX_ID:
        raise TokenizerError(f"{where}: a token id of {max(raw.values())}, which exceeds the limit of {MAX_ID}")
    return dict(raw)


def _merges(path: Path) -> list[tuple[str, str]]:
    lines = _text(path).replace("\r\n", "\n").split("\n")
    pairs = []
    for line in lines:
        if not line or line.startswith("#version"):
            continue
        first, *rest = line.split(" ")
        if len(rest) != 1:
            raise TokenizerError(f"{path}: {line[:60]!r} is not a merge of two tokens")
        pairs.append((first, rest[0]))
    return pairs


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


def hf_files(found: TokenizerFiles, n_ctx: int, roles: Mapping[str, int | None]) -> dict[str, bytes]:
    """Name -> contents of the files that transformers, tokenizers and transformers.js load.

    Files that exist are copied as they are. Those that are missing are made, except for another kind of tokenizer.

    Args:
        roles: ``bos_token`` and the like -> the id that the configuration states.

    Raises:
        ConversionError: if the tokenizer is damaged.
    """
    if isinstance(found.fault, OtherTokenizerError):
        return _copies(found, HF_NAMES)
    vocabulary = found.vocabulary()
    files = _pair(found, vocabulary, "vocab.json", "merges.txt")
    if not found.inside:
        files |= _copies(found, (*EXTRA, *OTHERS))
    files["tokenizer.json"] = (
        _bytes(found.tokenizer_json) if found.tokenizer_json else build(vocabulary).to_str().encode()
    )
    files.setdefault(CONFIG, _json(_config(vocabulary, n_ctx, roles)))
    return files


def _config(vocabulary: Vocabulary, n_ctx: int, roles: Mapping[str, int | None]) -> dict[str, Any]:
    """A ``tokenizer_config.json`` for a tokenizer that has none."""
    config: dict[str, Any] = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": n_ctx,
        "add_prefix_space": vocabulary.add_prefix_space,
        "clean_up_tokenization_spaces": False,
    }
    if END_OF_TEXT in vocabulary.ids:
        return {**config, "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    return {**config, **_roles(vocabulary, roles)}


def _roles(vocabulary: Vocabulary, ids: Mapping[str, int | None]) -> dict[str, str | None]:
    """The tokens with a role where there is no ``<|endoftext|>``, which ``GPT2Tokenizer`` would add if they were missing."""
    special = {vocabulary.ids[token.content]: token.content for token in vocabulary.added if token.special}
    roles: dict[str, str | None] = {"bos_token": None, "eos_token": None, "unk_token": None}
    for role, id in ids.items():
        if id is not None and id in special:
            roles[role] = special[id]
    return roles


def openai_files(found: TokenizerFiles, n_ctx: int, roles: Mapping[str, int | None]) -> dict[str, bytes]:
    """Name -> contents of the files that OpenAI's code loads, and of one that states the added tokens, if there are any.

    Args:
        roles: ``bos_token`` and the like -> the id that the configuration states.

    Raises:
        ConversionError: if it is not a byte-level BPE.
    """
    vocabulary = found.vocabulary()
    files = _pair(found, vocabulary, "encoder.json", "vocab.bpe")
    if vocabulary.added_by_user:
        files[CONFIG] = _json({**_config(vocabulary, n_ctx, roles), DECODER: _decoder(vocabulary)})
    return files


def _decoder(vocabulary: Vocabulary) -> dict[str, Any]:
    """The added tokens as ``added_tokens_decoder`` states them."""
    return {
        str(vocabulary.ids[token.content]): {"content": token.content, **token.flags()} for token in vocabulary.added
    }


def _copies(found: TokenizerFiles, names: Iterable[str]) -> dict[str, bytes]:
    """Name -> contents of the files that exist."""
    return {name: _bytes(path) for name, path in files_in(found.directory, names).items()}


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
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    try:
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary.ids, merges=vocabulary.merges))
    except Exception as error:  # the library raises Exception itself
        raise TokenizerError(f"the tokenizer's vocabulary and merges do not match: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=vocabulary.add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    added = [tokenizers.AddedToken(token.content, **token.flags()) for token in vocabulary.added]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    return tokenizer
