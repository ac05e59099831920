"""The files of a GPT-2 tokenizer, in OpenAI's layout and Hugging Face's, to and from each other.

``encoder.json`` and ``vocab.json`` are one file under two names, and so are ``vocab.bpe`` and ``merges.txt``; their
bytes are copied. ``tokenizer.json`` says the same once more, in the form of the ``tokenizers`` library.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import TokenizerError
from .files import File, read_json

PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
EXTRA = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # Hugging Face's, copied as they are
MAX_FILE = 64 << 20
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as it lies on disk: ``tokenizer.json``, or a vocabulary and its merges, or both."""

    directory: Path
    vocab: Path | None
    merges: Path | None
    tokenizer_json: Path | None

    def vocabulary(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """Token -> id, and the merges in order.

        Raises:
            TokenizerError: if this is not a byte-level BPE of GPT-2's kind.
        """
        if self.vocab and self.merges:
            return _vocab(read_json(self.vocab), self.vocab), _merges(self.merges)
        assert self.tokenizer_json
        raw = read_json(self.tokenizer_json)
        model = raw.get("model")
        if (
            not isinstance(model, dict)
            or model.get("type", "BPE") != "BPE"
            or "ByteLevel" not in json.dumps(raw.get("pre_tokenizer"))
        ):
            raise TokenizerError(f"{self.tokenizer_json}: not a byte-level BPE")
        vocab = _vocab(model.get("vocab"), self.tokenizer_json)
        added = {token["content"]: token["id"] for token in raw.get("added_tokens") or []}
        pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model.get("merges") or []]
        return {**vocab, **added}, [(a, b) for a, b in pairs]


def find_tokenizer(directory: Path) -> TokenizerFiles | None:
    """The tokenizer beside the weights, if there is one."""
    present = {name: directory / name for pair in PAIRS for name in pair if (directory / name).is_file()}
    vocab, merges = next(((present[v], present[m]) for v, m in PAIRS if v in present and m in present), (None, None))
    whole = directory / "tokenizer.json"
    tokenizer_json = whole if whole.is_file() else None
    return TokenizerFiles(directory, vocab, merges, tokenizer_json) if tokenizer_json or vocab else None


def _vocab(raw: Any, where: Path) -> dict[str, int]:
    if not isinstance(raw, dict) or not raw or not all(isinstance(i, int) and 0 <= i < 2**31 for i in raw.values()):
        raise TokenizerError(f"{where}: not a table of tokens and their ids")
    if len(set(raw.values())) != len(raw):
        raise TokenizerError(f"{where}: two tokens have one id")
    return raw


def _merges(path: Path) -> list[tuple[str, str]]:
    lines = _text(path).split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if wrong := next((p for p in pairs if len(p) != 2), None):
        raise TokenizerError(f"{path}: {' '.join(wrong)[:60]!r} is not a merge of two tokens")
    return [(a, b) for a, b in pairs]


def _bytes(path: Path) -> bytes:
    file = File(path)
    if file.size > MAX_FILE:
        raise TokenizerError(f"{path}: {file.size} bytes is too large for a tokenizer")
    return file.read(0, file.size)


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise TokenizerError(f"{path}: not UTF-8") from None


def hf_files(found: TokenizerFiles, n_ctx: int) -> dict[str, bytes]:
    """Name -> contents of the files that transformers, tokenizers and transformers.js load."""
    vocab, merges = found.vocabulary()
    files = _pair(found, vocab, merges, "vocab.json", "merges.txt")
    files |= {name: _bytes(found.directory / name) for name in EXTRA if (found.directory / name).is_file()}
    files["tokenizer.json"] = (
        _bytes(found.tokenizer_json) if found.tokenizer_json else build(vocab, merges).to_str().encode()
    )
    defaults = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": n_ctx,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    if END_OF_TEXT in vocab:
        defaults |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    files.setdefault("tokenizer_config.json", _json(defaults))
    return files


def openai_files(found: TokenizerFiles) -> dict[str, bytes]:
    """Name -> contents of the files that OpenAI's code loads."""
    return _pair(found, *found.vocabulary(), "encoder.json", "vocab.bpe")


def _pair(
    found: TokenizerFiles, vocab: dict[str, int], merges: list[tuple[str, str]], first: str, second: str
) -> dict[str, bytes]:
    if found.vocab and found.merges:
        return {first: _bytes(found.vocab), second: _bytes(found.merges)}
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    return {first: json.dumps(vocab).encode(), second: f"#version: 0.2\n{lines}".encode()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def build(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """GPT-2's tokenizer as a ``tokenizers.Tokenizer``: OpenAI's ``encoder.py``, with ``<|endoftext|>`` one token.

    Raises:
        TokenizerError: if the merges and the vocabulary do not fit together.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the library raises Exception itself
        raise TokenizerError(f"the tokenizer's vocabulary and merges do not fit together: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if END_OF_TEXT in vocab:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=True, special=True)])
    return tokenizer
