"""GPT-2's tokenizer: text <-> ids. The byte-level BPE itself is the ``tokenizers`` library's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from converters.opening import tokenizer_in
from converters.tokenizer import END_OF_TEXT, TokenizerFiles, Vocabulary, build


class Tokenizer:
    """Byte-level BPE with ``<|endoftext|>`` as one token. Equal to transformers' ``GPT2Tokenizer``, id for id.

    Args:
        vocab: token -> id, tokens written in GPT-2's byte alphabet.
        merges: the pairs to merge, most urgent first.

    Raises:
        TokenizerError: if the two do not fit together.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
        self._use(Vocabulary(vocab, merges))

    def _use(self, vocabulary: Vocabulary) -> None:
        self._backend = build(vocabulary)
        self.eos_token_id: int | None = vocabulary.ids.get(END_OF_TEXT)
        self.vocab_size = len(vocabulary.ids)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Tokenizer:
        """The tokenizer in a directory, beside a weight file, or in it (GGUF).

        ``tokenizer.json`` goes before ``vocab.json`` with ``merges.txt``, and these before ``encoder.json`` with
        ``vocab.bpe``.

        Raises:
            TokenizerError: if there is none, or it is damaged.
        """
        return cls.from_files(tokenizer_in(Path(path)))

    @classmethod
    def from_files(cls, found: TokenizerFiles) -> Tokenizer:
        """The tokenizer of files that ``find_tokenizer`` found."""
        tokenizer = cls.__new__(cls)
        tokenizer._use(found.vocabulary())
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of a text. A lone surrogate, which is no text, becomes U+FFFD."""
        sound = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return list(self._backend.encode(sound, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Bytes that are no UTF-8 become U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))
