"""The tokens that were added to a tokenizer after it was trained, each with its own flags.

They are stated in up to four files, which are combined as transformers 5 does it (``_from_pretrained`` in
``tokenization_utils_base.py``, ``TokenizersBackend.__init__`` in ``tokenization_utils_tokenizers.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import TokenizerError
from .io.json import read_json
from .values import are_sizes, is_list_of

CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
DECODER = "added_tokens_decoder"  # a key of tokenizer_config.json
END_OF_TEXT = "<|endoftext|>"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")
# Ids are below this. GPT-2 has 50,257 tokens, and the largest vocabularies in use about 260,000.
MAX_ID = 1_000_000


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the text before BPE splits it.

    Args:
        special: whether decoding with ``skip_special_tokens`` drops it.
        normalized: whether it is matched after the tokens that are not. GPT-2 has no normalizer.
        lstrip: whether it also takes the whitespace before it.
        rstrip: whether it also takes the whitespace after it.
        single_word: whether it is matched as a whole word only.
    """

    content: str
    special: bool
    normalized: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    def flags(self) -> dict[str, bool]:
        """The flags by the names that Hugging Face's files give them."""
        return {key: value for key, value in vars(self).items() if key != "content"}

    def with_flags(self, flags: Mapping[str, bool]) -> AddedToken:
        """The same token with some flags changed."""
        return AddedToken(self.content, **{**self.flags(), **flags})


def usual_token(content: str, special: bool) -> AddedToken:
    """A token with the flags that transformers assumes if a file does not state them.

    ``<|endoftext|>`` is special, and normalized as in the ``tokenizer.json`` of OpenAI's GPT-2.
    """
    is_end = content == END_OF_TEXT
    return AddedToken(content, special or is_end, normalized=is_end or not special)


def read_token(entry: Any) -> AddedToken | None:
    """A token as Hugging Face's files state it: its text, or an object with ``content`` and flags; else None."""
    if isinstance(entry, str):
        return usual_token(entry, special=True) if entry else None
    if not isinstance(entry, dict):
        return None
    content = entry.get("content")
    if not isinstance(content, str) or not content:
        return None
    token = usual_token(content, special=entry.get("special", True) is True)
    return token.with_flags({key: entry[key] is True for key in token.flags() if key in entry})


class _Collection:
    """The vocabulary and the added tokens that were read so far."""

    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        self.ids = dict(vocabulary)
        self.tokens: dict[str, AddedToken] = {}
        self._next = max(self.ids.values(), default=-1) + 1

    def add(self, token: AddedToken, id: int | None = None) -> None:
        """Add a token, or change its flags. A token that has an id keeps it; without one it gets the next."""
        self.tokens[token.content] = token
        if token.content not in self.ids:
            self.ids[token.content] = self._next if id is None else id
            self._next = max(self._next, self.ids[token.content] + 1)

    def add_named(self, token: AddedToken) -> None:
        """Add a token that has a role, such as ``pad_token``: it is special, and keeps the flags it was added with."""
        self.add(replace(self.tokens.get(token.content, token), special=True))


def read_added_tokens(
    vocabulary: Mapping[str, int], directory: Path, entries: Any = None, where: Path | None = None
) -> tuple[dict[str, int], tuple[AddedToken, ...]]:
    """Combine what the files of a tokenizer state of added tokens.

    Ids are those that the files state, even with gaps, except that a token of the vocabulary keeps its own. transformers
    5 does not read the ids, but numbers the tokens in their order. Without gaps this is the same.

    Args:
        vocabulary: token -> id, without added tokens.
        directory: where ``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json`` are.
        entries: ``added_tokens`` of a ``tokenizer.json``.
        where: the ``tokenizer.json``, for messages.

    Returns:
        Token -> id with the added tokens, and these in the order of their ids.

    Raises:
        TokenizerError: if a token has no valid id.
        FormatError: if a file is not valid JSON.
    """
    found = _Collection(vocabulary)
    # The order of the files is transformers': what a later one states of a token's flags counts.
    for entry in _list_of(entries, where):
        _add_stated(found, entry, entry.get("id"), f"{where}: invalid added_tokens")
    config = _read(directory / CONFIG)
    if isinstance(config.get(DECODER), dict):
        _add_decoder(found, config[DECODER], directory / CONFIG)
    else:  # before transformers 4.34
        config |= _read(directory / SPECIAL_MAP)
        _add_unflagged(found, _read(directory / ADDED), config, directory / ADDED)
    for token in _named(config):
        found.add_named(token)
    for token in _listed(config):
        if token.content not in found.tokens:
            found.add(token)
    if END_OF_TEXT in found.ids:
        found.add_named(usual_token(END_OF_TEXT, special=True))
    return found.ids, tuple(sorted(found.tokens.values(), key=lambda token: found.ids[token.content]))


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _list_of(entries: Any, where: Path | None) -> list[dict[str, Any]]:
    if entries is None:
        return []
    if not is_list_of(entries, dict):
        raise TokenizerError(f"{where}: invalid added_tokens")
    return entries


def _add_stated(found: _Collection, entry: Any, id: Any, fault: str) -> None:
    """Add a token with flags and an id. Flags that are missing are false, as the ``tokenizers`` library reads them."""
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise TokenizerError(fault)
    if type(id) is not int or not 0 <= id < MAX_ID:
        raise TokenizerError(f"{fault}: {entry['content'][:60]!r} has the id {str(id)[:20]}")
    token = read_token({"special": False, **entry})
    if token:
        found.add(token, id)


def _add_decoder(found: _Collection, decoder: Mapping[str, Any], where: Path) -> None:
    """``added_tokens_decoder``: id -> token with flags."""
    fault = f"{where}: invalid {DECODER}"
    # int() alone would take " 1" and "1_0", too.
    if not all(key.isdecimal() and len(key) < 10 for key in decoder):
        raise TokenizerError(fault)
    for key in sorted(decoder, key=int):
        _add_stated(found, decoder[key], int(key), fault)


def _add_unflagged(found: _Collection, added: Mapping[str, Any], config: Mapping[str, Any], where: Path) -> None:
    """``added_tokens.json``: token -> id. A token is special if another file names it as such."""
    if not are_sizes(added.values(), MAX_ID):
        raise TokenizerError(f"{where}: not a valid table of tokens and ids")
    special = {token.content for token in (*_named(config), *_listed(config))}
    for content in sorted(added, key=lambda text: int(added[text])):
        if content and content not in found.tokens:
            found.add(usual_token(content, content in special), added[content])


def _named(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    """The tokens that have a role."""
    others = [key for key in config if key.endswith("_token") and key not in NAMED]
    for key in (*NAMED, *others):
        token = read_token(config.get(key))
        if token:
            yield replace(token, special=True)


def _listed(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    """The tokens that are called special without a role."""
    for key in LISTS:
        listed = config.get(key)
        if isinstance(listed, dict):
            listed = list(listed.values())
        for entry in listed if isinstance(listed, list) else []:
            token = read_token(entry)
            if token:
                yield token
