"""GPT-2's tokenizer: text <-> ids. The ``tokenizers`` library does the byte-level BPE."""

from __future__ import annotations

from collections.abc import Sequence
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
        valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return list(self._backend.encode(valid, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids. Bytes that are not valid UTF-8 become U+FFFD.

        Args:
            skip_special_tokens: leave out the special tokens, such as ``<|endoftext|>``.
        """
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))
