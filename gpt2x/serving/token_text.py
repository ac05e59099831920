"""The text of single tokens, for log-probabilities."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from converters.tokenizer import BYTES

from ..tokenizer import Tokenizer


class TokenTexts:
    """The text of each token of a tokenizer, as OpenAI spells it: ``bytes:\\xf0\\x9f`` where it is no whole character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def text(self, token: int) -> str:
        """The text of a token."""
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def raw(self, token: int) -> bytes:
        """The bytes of a token. An id that the tokenizer does not have, as in a padded vocabulary, has none."""
        spelled = self.tokenizer.token(token)
        if spelled is None:
            return b""
        if all(character in BYTES for character in spelled):
            return bytes(BYTES[character] for character in spelled)
        return spelled.encode()  # an added token

    def offsets(self, tokens: Sequence[int]) -> list[int]:
        """Where each token begins in the text of all, in characters."""
        found = []
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        characters = 0
        for token in tokens:
            found.append(characters)
            characters += len(decoder.decode(self.raw(token)))
        return found
