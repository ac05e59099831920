"""GPT-2's tokenizer: text <-> ids. The ``tokenizers`` library does the byte-level BPE."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from converters import TokenizerError
from converters.added_tokens import END_OF_TEXT
from converters.errors import OtherTokenizerError
from converters.opening import tokenizer_in
from converters.tokenizer import TokenizerFiles, Vocabulary, build

OTHERS = (
    "gpt2x cannot encode text with it: pass token ids, or the tokenizer of transformers to gpt2x.generate_text, "
    "or --tokenizer DIR with a byte-level BPE"
)

PIECE = 1 << 16  # characters
# Python's \s has every character of Unicode's White_Space, which is what GPT-2's pattern means, and a few more.
BOUNDARY = re.compile(r"\S[ \n]")
SPACE = re.compile(r"\S ")


class Tokenizer:
    """Byte-level BPE with added tokens, of which ``<|endoftext|>`` is one. It returns the same ids, and the same text, as
    transformers' ``GPT2Tokenizer``.

    Args:
        vocab: token -> id, tokens written in GPT-2's byte alphabet.
        merges: the pairs to merge, in order of priority.

    Raises:
        TokenizerError: if the two do not fit together.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
        self._use(Vocabulary(vocab, merges))

    def _use(self, vocabulary: Vocabulary) -> None:
        self._backend = build(vocabulary)
        self.eos_token_id: int | None = vocabulary.ids.get(END_OF_TEXT)
        self.vocab_size = len(vocabulary.ids)
        # A space that is added before a text must not be added before a piece of it.
        self._boundary: re.Pattern[str] | None = SPACE if vocabulary.add_prefix_space else BOUNDARY
        # A boundary may be within such a token, or between it and the spaces that belong to it.
        if any(token.lstrip or token.rstrip or re.search(r"\s", token.content) for token in vocabulary.added):
            self._boundary = None

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Tokenizer:
        """Load the tokenizer in a directory, beside a weight file, or inside it (GGUF).

        ``tokenizer.json`` takes precedence over ``vocab.json`` with ``merges.txt``, and these over ``encoder.json`` with
        ``vocab.bpe``.

        Raises:
            TokenizerError: if there is none, it is damaged, or it is not a byte-level BPE.
        """
        return cls.from_files(tokenizer_in(Path(path)))

    @classmethod
    def from_files(cls, found: TokenizerFiles) -> Tokenizer:
        """Load the tokenizer that ``find_tokenizer`` found.

        Raises:
            TokenizerError: if it is damaged, or it is not a byte-level BPE.
        """
        if isinstance(found.fault, OtherTokenizerError):
            raise TokenizerError(f"{found.fault}. {OTHERS}")
        tokenizer = cls.__new__(cls)
        tokenizer._use(found.vocabulary())
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. A lone surrogate, which is not valid text, becomes U+FFFD."""
        ids: list[int] = []
        # ``tokenizers`` needs 200 bytes of memory for each character of what it encodes at once.
        for piece in _pieces(text, self._boundary):
            valid = piece.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids += self._backend.encode(valid, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids. Bytes that are not valid UTF-8 become U+FFFD.

        Args:
            skip_special_tokens: leave out the special tokens, such as ``<|endoftext|>``.
        """
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token(self, number: int) -> str | None:
        """Return a token as the vocabulary spells it, in GPT-2's byte alphabet; None if there is no such id."""
        spelled: str | None = self._backend.id_to_token(number)
        return spelled


def _pieces(text: str, boundary: re.Pattern[str] | None) -> Iterator[str]:
    """A text in pieces of ``PIECE`` characters or more, which are encoded as the whole text is.

    A piece begins with a space or newline after a character that is none. There, GPT-2's pattern always begins a new word,
    and what follows does not change the words before it: the pattern looks ahead only in whitespace.
    """
    start = 0
    found = boundary.search(text, PIECE) if boundary else None
    while boundary and found:
        end = found.start() + 1
        yield text[start:end]
        start = end
        found = boundary.search(text, start + PIECE)
    yield text[start:]
