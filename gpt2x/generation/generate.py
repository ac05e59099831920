"""Text in, text out, over any runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np

from ..runtimes.base import Decoder
from ..runtimes.opening import as_decoder
from .beams import beam_search
from .config import GenerationConfig
from .loop import Generation
from .prompts import Finish, check_ngram_size
from .stop_strings import StopStrings, cut
from .text import TextStream, TextTokenizer, text_tokenizer

Prompt = str | Sequence[int]
"""A text, or its token ids."""


@dataclass(frozen=True)
class Continuation:
    """One continuation of a prompt.

    Attributes:
        text: the new text, up to a stop string.
        tokens: the new token ids, without the token that ends the text, and with those of a stop string.
        finish: why it ended.
        score: of beam search: the sum of the log-probabilities over a power of the length.
    """

    text: str
    tokens: list[int]
    finish: Finish
    score: float | None = None


def continuations(
    decoder: Decoder,
    tokenizer: TextTokenizer,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    generators: Sequence[np.random.Generator] | None = None,
) -> list[list[Continuation]]:
    """Continue several prompts at once.

    Args:
        decoder: the model.
        tokenizer: its tokenizer.
        prompts: texts, or their token ids.
        config: the controls.
        generators: the random stream of each continuation, instead of those of the seed.

    Returns:
        For each prompt, ``config.num_return_sequences`` continuations; of beam search the best first, and fewer if it
        finds no more.

    Raises:
        PromptError: if a prompt is empty, longer than the context, or does not fit the model.
        InputError: if a control names a token outside the vocabulary, or rules out all of it.
    """
    if config.beams:
        return _beam_continuations(decoder, tokenizer, prompts, config)
    generation = new_generation(decoder, tokenizer, prompts, config, generators)
    streams = _streams(generation, tokenizer, config.stop_strings)
    tokens: list[list[int]] = [[] for _ in streams]
    texts = [""] * len(streams)
    for step, pieces in _steps(generation, streams):
        for row, token in enumerate(step):
            if token is not None:
                tokens[row].append(token)
            texts[row] += pieces[row]
    found = []
    for row, stream in enumerate(streams):
        finish = generation.finish[row]
        assert finish  # every row has ended
        found.append(Continuation(texts[row] + stream.push(None), tokens[row], finish))
    n = config.num_return_sequences
    return [found[start : start + n] for start in range(0, len(found), n)]


def new_generation(
    decoder: Decoder,
    tokenizer: TextTokenizer,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    generators: Sequence[np.random.Generator] | None = None,
) -> Generation:
    """A ``Generation`` of texts.

    Raises:
        PromptError: if a prompt is empty, longer than the context, or does not fit the model.
        InputError: if a control names a token outside the vocabulary.
    """
    ids = [_ids(tokenizer, prompt) for prompt in prompts]
    return Generation(
        decoder,
        ids,
        [config.new_tokens(len(prompt)) for prompt in ids],
        config.sampling,
        end_tokens_of(decoder, tokenizer, config),
        config.num_return_sequences,
        generators,
        config.speculate,
    )


def _ids(tokenizer: TextTokenizer, prompt: Prompt) -> Sequence[int]:
    return tokenizer.encode(prompt) if isinstance(prompt, str) else prompt


def end_tokens_of(decoder: Decoder, tokenizer: TextTokenizer, config: GenerationConfig) -> tuple[int, ...]:
    """The tokens that end a text: the configuration's, or the tokenizer's, or the model's."""
    return config.end_tokens(end_token_of(decoder, tokenizer))


def end_token_of(decoder: Decoder, tokenizer: TextTokenizer) -> int | None:
    """``<|endoftext|>``: the tokenizer's, or else the configuration's."""
    end = tokenizer.eos_token_id
    return decoder.config.eos_token_id if end is None else end


def _beam_continuations(
    decoder: Decoder, tokenizer: TextTokenizer, prompts: Sequence[Prompt], config: GenerationConfig
) -> list[list[Continuation]]:
    def hits_stop(tokens: Sequence[int]) -> bool:
        text = tokenizer.decode(list(tokens))
        return any(string in text for string in config.stop_strings)

    assert config.beams
    ids = [_ids(tokenizer, prompt) for prompt in prompts]
    found = beam_search(
        decoder,
        ids,
        [config.new_tokens(len(prompt)) for prompt in ids],
        config.beams,
        sampling=config.sampling,
        end_tokens=end_tokens_of(decoder, tokenizer, config),
        hits_stop=hits_stop if config.stop_strings else None,
    )
    results = []
    for hypotheses in found:
        of_prompt = []
        for best in hypotheses[: config.num_return_sequences]:
            text = cut(tokenizer.decode(best.tokens), config.stop_strings)
            of_prompt.append(Continuation(text, best.tokens, best.finish, best.score))
        results.append(of_prompt)
    return results


# ----------------------------------------------------------------------------------------------------------- streams


class TextPieces:
    """Tokens in, text out, up to a stop string."""

    def __init__(self, tokenizer: TextTokenizer, stop_strings: Sequence[str]) -> None:
        self.text = TextStream(tokenizer)
        self.stops = StopStrings(stop_strings)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.stops.stopped

    def push(self, token: int | None) -> str:
        """Return the text that one more token completes; None returns what is left."""
        shown = self.stops.push(self.text.push(token))
        return shown if token is not None else shown + self.stops.flush()


def _streams(generation: Generation, tokenizer: TextTokenizer, stop_strings: Sequence[str]) -> list[TextPieces]:
    return [TextPieces(tokenizer, stop_strings) for _ in range(generation.rows)]


def _steps(generation: Generation, streams: Sequence[TextPieces]) -> Iterator[tuple[list[int | None], list[str]]]:
    """The token and the text of each row, step by step. A row ends where its text holds a stop string."""
    for tokens in generation:
        pieces = []
        for row, token in enumerate(tokens):
            pieces.append("" if token is None else streams[row].push(token))
            if streams[row].stopped:
                generation.stop(row)
        yield tokens, pieces


def stream_text(
    generation: Generation, tokenizer: Any, prompts: Sequence[str], stop_strings: Sequence[str] = ()
) -> Iterator[list[str]]:
    """Yield the text of a generation in pieces: the prompts first, then one piece for each row and step.

    With stop strings, a row ends before the first of them, and no piece holds the start of one.
    """
    yield [prompt for prompt in prompts for _ in range(generation.num_return_sequences)]
    streams = _streams(generation, text_tokenizer(tokenizer), stop_strings)
    for _, pieces in _steps(generation, streams):
        yield pieces
    yield [stream.push(None) for stream in streams]


# ----------------------------------------------------------------------------------------------------- generate_text


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
    **controls: Any,
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
    **controls: Any,
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
    **controls: Any,
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
    **controls: Any,
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
    **controls: Any,
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
        controls: any other control of ``GenerationConfig``, ``Sampling`` or ``Beams`` by its name:
            ``repetition_penalty=1.2``, ``stop_strings=["\\n"]``, ``num_beams=4``.

    Returns:
        Prompt and continuation; a list for a list of prompts, or if ``num_return_sequences`` is more than 1.

    Raises:
        PromptError: if a prompt is empty, longer than the context, or does not fit the model.
        ValueError: if a control is unknown or out of range, or two of them contradict each other.
    """
    prompts = [input_text] if isinstance(input_text, str) else list(input_text)
    if max_len < 0:
        raise ValueError(f"max_len is {max_len}; it must be 0 or more")
    random = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    if controls.get("num_beams", 1) > 1:
        # The defaults of this function are no contradiction, what differs from them is.
        usual = {"temperature": 1.0, "top_k": None, "top_p": None, "seed": None}
        random = {name: value for name, value in random.items() if value != usual[name]}
    config = GenerationConfig.of(max_new_tokens=max_len, **random, **controls)
    if config.beams and stream:
        raise ValueError("stream is True, but beam search has its text only at the end: leave out stream or num_beams")
    texts = text_tokenizer(tokenizer)
    decoder = as_decoder(model)
    single = isinstance(input_text, str) and config.num_return_sequences == 1
    ids = [texts.encode(prompt) for prompt in prompts]
    check_ngram_size(config.sampling, [config.most_tokens(len(prompt)) for prompt in ids])
    if not stream:
        found = continuations(decoder, texts, ids, config)
        whole = [prompt + one.text for prompt, several in zip(prompts, found, strict=True) for one in several]
        return whole[0] if single else whole
    pieces = stream_text(new_generation(decoder, texts, ids, config), texts, prompts, config.stop_strings)
    return (step[0] for step in pieces) if single else pieces
