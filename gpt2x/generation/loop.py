"""The decode loop for every runtime. numpy only."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from ..memory import give_back
from ..runtimes.base import EMPTY, Decoder, Ids, Logits, PromptError
from ..runtimes.opening import as_decoder
from .sampling import Sampling
from .text import TextStream, text_tokenizer

log = logging.getLogger(__name__)

Finish = Literal["stop", "length", "context"]


@dataclass
class Generation:
    """A run of the decode loop over a batch of prompts of any lengths. Iterate over it once.

    Each item is the new token of every row, None for rows that have ended. ``finish`` then holds the reason for each row:
    "stop" (``<|endoftext|>``, which is not among the items), "length", or "context".

    Args:
        decoder: the model.
        prompts: token ids, at least one for each row.
        max_new_tokens: the limit for each row.
        sampling: how the next token is chosen.
        eos_token_id: the token that ends a row; None for no such token.

    Raises:
        PromptError: if a prompt is empty, longer than the context, or holds an id outside the vocabulary.
    """

    decoder: Decoder
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        self.finish: list[Finish | None] = [None] * len(self.prompts)
        for prompt in self.prompts:
            self._check(prompt)

    def _check(self, prompt: Sequence[int]) -> None:
        n_ctx, n_vocab = self.decoder.n_ctx, self.decoder.n_vocab
        if not len(prompt):
            raise PromptError(EMPTY)
        if len(prompt) > n_ctx:
            raise PromptError(f"the prompt has {len(prompt)} tokens; the model's context is {n_ctx}")
        for token in prompt:
            if not 0 <= token < n_vocab:
                raise PromptError(
                    f"token id {token} is outside the model's vocabulary of {n_vocab}: does the tokenizer belong to "
                    "another model?"
                )

    def __iter__(self) -> Iterator[list[int | None]]:
        try:
            yield from self._steps()
        finally:
            give_back()  # the cache's memory: its sizes fit this batch alone, and the next would need new memory

    def _steps(self) -> Iterator[list[int | None]]:
        lengths = np.array([len(prompt) for prompt in self.prompts])  # (B,)
        ids, mask = _left_pad(self.prompts)  # (B, T) each
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        padded = bool((mask == 0).any())
        generators = self.sampling.generators(len(self.prompts))
        cache: Any = None
        for step in range(self.max_new_tokens + 1):
            self._end_at(lengths, step)
            if all(self.finish):
                log.info("ended after %d steps: %s", step, ", ".join(map(str, self.finish)))
                return
            seen = mask if padded else None
            logits, cache = self.decoder.step(ids, seen, positions, cache)
            if step == 0:
                log.info("%d prompts of up to %d tokens were read", *ids.shape)
            tokens = [self._next(row, logits[row], generators[row]) for row in range(len(lengths))]
            yield tokens
            ids = np.array([[0 if token is None else token] for token in tokens])
            positions = np.minimum(lengths, self.decoder.n_ctx - 1)[:, None]
            mask = np.concatenate((mask, np.ones_like(ids)), axis=1)
            lengths = lengths + 1

    def _end_at(self, lengths: NDArray[Any], step: int) -> None:
        for row, length in enumerate(lengths):
            if self.finish[row] is not None:
                continue
            if step >= self.max_new_tokens:
                self.finish[row] = "length"
            elif length >= self.decoder.n_ctx:
                self.finish[row] = "context"

    def _next(self, row: int, logits: Logits, generator: np.random.Generator) -> int | None:
        if self.finish[row]:
            return None
        token = self.sampling.choose(logits, generator)
        if token == self.eos_token_id:
            self.finish[row] = "stop"
            return None
        return token


def _left_pad(prompts: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
    width = max(map(len, prompts), default=0)
    ids = np.zeros((len(prompts), width), np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, mask


@overload
def generate_text(
    model: Any,
    tokenizer: Any,
    input_text: str,
    max_len: int,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    *,
    seed: int | None = ...,
    stream: Literal[False] = ...,
) -> str: ...
@overload
def generate_text(
    model: Any,
    tokenizer: Any,
    input_text: list[str],
    max_len: int,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    *,
    seed: int | None = ...,
    stream: Literal[False] = ...,
) -> list[str]: ...
@overload
def generate_text(
    model: Any,
    tokenizer: Any,
    input_text: str,
    max_len: int,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    *,
    seed: int | None = ...,
    stream: Literal[True],
) -> Iterator[str]: ...
@overload
def generate_text(
    model: Any,
    tokenizer: Any,
    input_text: list[str],
    max_len: int,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    *,
    seed: int | None = ...,
    stream: Literal[True],
) -> Iterator[list[str]]: ...
def generate_text(
    model: Any,
    tokenizer: Any,
    input_text: str | list[str],
    max_len: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    *,
    seed: int | None = None,
    stream: bool = False,
) -> Any:
    """Continue a text, or several at once.

    Args:
        model: a ``GPT2``, or any other runtime of gpt2x.
        tokenizer: gpt2x's ``Tokenizer``, or GPT-2's of transformers, tokenizers or tiktoken.
        input_text: a prompt, or a list of prompts of any lengths.
        max_len: the maximum number of new tokens. A row ends earlier at ``<|endoftext|>`` or when the context is full.
        temperature: 0 for greedy decoding.
        top_k: None or 0 to disable.
        top_p: None or 1 to disable.
        seed: makes the result reproducible.
        stream: return an iterator over the pieces of the same text, the prompt first (for a list of prompts, each item
            is a list of pieces).

    Returns:
        Prompt and continuation; a list for a list.

    Raises:
        PromptError: if a prompt is empty, longer than the context, or does not fit the model.
        ValueError: if ``temperature``, ``top_k``, ``top_p`` or ``max_len`` is out of range.
    """
    prompts = [input_text] if isinstance(input_text, str) else list(input_text)
    if max_len < 0:
        raise ValueError(f"max_len is {max_len}; it must be 0 or more")
    sampling = Sampling(temperature, top_k, top_p, seed)
    texts = text_tokenizer(tokenizer)
    decoder = as_decoder(model)
    ids = [texts.encode(prompt) for prompt in prompts]
    end = texts.eos_token_id
    if end is None:
        end = decoder.config.eos_token_id
    generation = Generation(decoder, ids, max_len, sampling, end)
    pieces = stream_text(generation, texts, prompts)
    if isinstance(input_text, str):
        single = (step[0] for step in pieces)
        return single if stream else "".join(single)
    return pieces if stream else ["".join(row) for row in zip(*pieces, strict=True)]


def stream_text(generation: Generation, tokenizer: Any, prompts: list[str]) -> Iterator[list[str]]:
    """Yield the text of a generation in pieces: the prompts first, then one piece for each row and step."""
    yield list(prompts)
    streams = [TextStream(tokenizer) for _ in prompts]
    for tokens in generation:
        yield ["" if token is None else stream.push(token) for stream, token in zip(streams, tokens, strict=True)]
    yield [stream.push(None) for stream in streams]
