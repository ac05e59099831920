"""Sampling and the decode loop, once for every runtime: anything that has ``step`` and ``n_ctx``. numpy only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from converters import CheckpointError

from .memory import give_back

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
Finish = Literal["stop", "length", "context"]

NOT_NUMBERS = "the model's logits are not numbers: its weights are damaged, or too large for their number format"
EMPTY = "the prompt is empty: give at least one token (<|endoftext|> starts a new text)"


class InputError(ValueError):
    """Tokens, a mask, positions or a cache that do not fit the model or one another."""


class PromptError(InputError):
    """A prompt that the model cannot take."""


class Decoder(Protocol):
    """A model as one step of decoding."""

    n_ctx: int
    n_vocab: int

    def step(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """Feed new tokens.

        Args:
            input_ids: (B, T).
            attention_mask: (B, P + T), 0 for padding, or None where there is none.
            position_ids: (B, T).
            cache: what the step before returned; None at first.

        Returns:
            The logits of the last position (B, V), and the cache.
        """
        ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature, then top-k, then top-p.

    Args:
        temperature: 0 is greedy.
        top_k: keep the k likeliest (and those tied with the last of them); None or 0 is off.
        top_p: keep the likeliest whose probabilities first reach p; None or 1 is off.
        seed: makes the choice repeatable; row i of a batch has a stream of its own.

    Raises:
        ValueError: for a value that means nothing.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be a finite number of 0 or more")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be between 0 and 1 (off)")

    def generators(self, n: int) -> list[np.random.Generator]:
        """One stream of random numbers a row."""
        seeds = np.random.SeedSequence(self.seed).spawn(n)
        return [np.random.default_rng(seed) for seed in seeds]

    def choose(self, logits: Logits, generator: np.random.Generator) -> int:
        """One token id out of one row of logits (V,).

        Raises:
            CheckpointError: if the logits are not numbers.
        """
        best = int(logits.argmax())  # of a NaN, where there is one
        if not np.isfinite(logits[best]):
            raise CheckpointError(NOT_NUMBERS)
        if self.temperature == 0:
            return best
        p = self.probabilities(logits)
        return int(generator.choice(len(p), p=p))

    def probabilities(self, logits: Logits) -> NDArray[np.float64]:
        """The distribution that is sampled from, (V,)."""
        x: NDArray[np.float64] = logits.astype(np.float64)
        x = (x - x.max()) / max(self.temperature, 1e-300)
        if self.top_k and self.top_k < len(x):
            x[x < np.partition(x, -self.top_k)[-self.top_k]] = -np.inf
        p: NDArray[np.float64] = np.exp(x)
        p /= p.sum()
        if self.top_p is not None and self.top_p < 1:
            order = np.argsort(-p, kind="stable")
            before = np.cumsum(p[order]) - p[order]
            p[order[1:][before[1:] >= self.top_p]] = 0  # the likeliest always stays
            p /= p.sum()
        return p


@dataclass
class Generation:
    """A run of the decode loop over a batch of prompts of any lengths. Iterate over it once.

    Each item is the new token of every row, None for rows that have ended. ``finish`` then says why each ended:
    "stop" (``<|endoftext|>``, which is not among the items), "length", or "context".

    Args:
        decoder: the model.
        prompts: token ids, at least one a row.
        max_new_tokens: at most so many a row.
        eos_token_id: ends a row; None for never.

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
            if not len(prompt):
                raise PromptError(EMPTY)
            if len(prompt) > self.decoder.n_ctx:
                raise PromptError(f"the prompt has {len(prompt)} tokens; the model's context is {self.decoder.n_ctx}")
            if wrong := [i for i in prompt if not 0 <= i < self.decoder.n_vocab]:
                raise PromptError(
                    f"token id {wrong[0]} is outside the model's vocabulary of {self.decoder.n_vocab}: is the tokenizer another model's?"
                )

    def __iter__(self) -> Iterator[list[int | None]]:
        try:
            yield from self._steps()
        finally:
            give_back()  # the cache, whose sizes are of this batch alone: memory would grow with each new one

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
                return
            logits, cache = self.decoder.step(ids, mask if padded else None, positions, cache)
            tokens = [self._next(row, logits[row], generators[row]) for row in range(len(lengths))]
            yield tokens
            ids = np.array([[0 if token is None else token] for token in tokens])
            positions = np.minimum(lengths, self.decoder.n_ctx - 1)[:, None]
            mask = np.concatenate((mask, np.ones_like(ids)), axis=1)
            lengths = lengths + 1

    def _end_at(self, lengths: NDArray[Any], step: int) -> None:
        for row, length in enumerate(lengths):
            if self.finish[row] is None and step >= self.max_new_tokens:
                self.finish[row] = "length"
            elif self.finish[row] is None and length >= self.decoder.n_ctx:
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


class TextStream:
    """Tokens in, text out, as soon as whole characters are there."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.pending: list[int] = []

    def push(self, token: int | None) -> str:
        """The text that one more token completes; None flushes what is left."""
        if token is not None:
            self.pending.append(token)
        text = decode(self.tokenizer, self.pending) if self.pending else ""
        if token is not None and text.endswith("\ufffd"):  # perhaps the beginning of a character
            return ""
        self.pending = []
        return text


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids from gpt2x's tokenizer, transformers' or a bare ``tokenizers.Tokenizer``."""
    ids = tokenizer.encode(text)
    return list(getattr(ids, "ids", ids))


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Text, exactly: transformers may be set to tidy the spaces before punctuation."""
    if hasattr(tokenizer, "clean_up_tokenization_spaces"):
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return str(tokenizer.decode(ids))


def end_of(tokenizer: Any, model: Any) -> int | None:
    """The id that ends a text: the tokenizer's word, else the model's."""
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None:
        end = getattr(getattr(model, "config", None), "eos_token_id", None)
    return end if isinstance(end, int) else None


def as_decoder(model: Any) -> Decoder:
    """A runtime as it is; a torch ``GPT2`` as a runtime."""
    if hasattr(model, "step"):
        return model  # type: ignore[no-any-return]
    from .torch_runtime import TorchDecoder

    return TorchDecoder(model)


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
        tokenizer: gpt2x's ``Tokenizer``, or GPT-2's from transformers or tokenizers.
        input_text: a prompt, or a list of prompts of any lengths.
        max_len: new tokens at most. A row ends earlier at ``<|endoftext|>`` or when the context is full.
        temperature: 0 is greedy.
        top_k: None or 0 is off.
        top_p: None or 1 is off.
        seed: makes the result repeatable.
        stream: give an iterator over the pieces of the same text, the prompt first (a list of pieces a step for a
            list of prompts).

    Returns:
        Prompt and continuation; a list for a list.

    Raises:
        PromptError: if a prompt is empty, longer than the context, or does not fit the model.
        ValueError: if ``temperature``, ``top_k``, ``top_p`` or ``max_len`` mean nothing.
    """
    prompts = [input_text] if isinstance(input_text, str) else list(input_text)
    if max_len < 0:
        raise ValueError(f"max_len is {max_len}; it must be 0 or more")
    sampling = Sampling(temperature, top_k, top_p, seed)
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    generation = Generation(as_decoder(model), ids, max_len, sampling, end_of(tokenizer, model))
    pieces = stream_text(generation, tokenizer, prompts)
    if isinstance(input_text, str):
        single = (step[0] for step in pieces)
        return single if stream else "".join(single)
    return pieces if stream else ["".join(row) for row in zip(*pieces, strict=True)]


def stream_text(generation: Generation, tokenizer: Any, prompts: list[str]) -> Iterator[list[str]]:
    """The text of a generation, piece by piece: the prompts first, then a piece a row and step."""
    yield list(prompts)
    streams = [TextStream(tokenizer) for _ in prompts]
    for tokens in generation:
        yield ["" if token is None else stream.push(token) for stream, token in zip(streams, tokens, strict=True)]
    yield [stream.push(None) for stream in streams]
