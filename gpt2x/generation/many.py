"""Many prompts: they join a batch as others end, where the model's cache allows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ..runtimes.base import Decoder, Logits, PromptError
from ..runtimes.batching import RunningBatch
from ..runtimes.onnxruntime import OnnxDecoder
from .config import GenerationConfig
from .generate import Continuation, TextPieces, continuations, end_tokens_of
from .prompts import Finish, check_prompts, check_tokens
from .sampling import Chooser
from .text import TextTokenizer


@dataclass(frozen=True)
class Job:
    """A prompt, and its number, which is also part of its random seed."""

    number: int
    prompt: str


@dataclass(frozen=True)
class Done:
    """The result of a job: continuations, or the reason why the prompt cannot be continued."""

    number: int
    continuations: list[Continuation]
    error: str | None = None


def continue_many(
    decoder: Decoder, tokenizer: TextTokenizer, jobs: Iterable[Job], config: GenerationConfig, batch: int
) -> Iterator[Done]:
    """Continue any number of prompts, ``batch`` at a time. Results come as they are complete.

    Where the cache stays in place, a prompt joins as soon as another one ends (continuous batching). Otherwise, and for
    beam search, a batch ends as a whole. A text does not depend on the others of its batch, nor on their number, but for
    rounding.

    Raises:
        InputError: if a control names a token outside the vocabulary.
    """
    check_tokens(decoder, config.sampling, end_tokens_of(decoder, tokenizer, config))
    joins = isinstance(decoder, OnnxDecoder) and decoder.in_place
    alone = config.speculate is not None and batch == 1
    if joins and not alone and not config.beams and config.num_return_sequences == 1:
        yield from _joining(decoder, tokenizer, iter(jobs), config, batch)  # type: ignore[arg-type]
        return
    remaining = iter(jobs)
    while group := list(islice(remaining, batch)):
        yield from _together(decoder, tokenizer, group, config)


def _together(decoder: Decoder, tokenizer: TextTokenizer, group: list[Job], config: GenerationConfig) -> Iterator[Done]:
    prompts: dict[int, list[int]] = {}
    errors: dict[int, str] = {}
    for job in group:
        try:
            prompts[job.number] = _prompt(decoder, tokenizer, job)
        except PromptError as error:
            errors[job.number] = str(error)
    seeds = [seed for number in prompts for seed in _seeds(config, number)]
    generators = [np.random.default_rng(seed) for seed in seeds]
    found = continuations(decoder, tokenizer, list(prompts.values()), config, generators)
    results = dict(zip(prompts, found, strict=True))
    for job in group:
        yield Done(job.number, results.get(job.number, []), errors.get(job.number))


def _seeds(config: GenerationConfig, number: int) -> list[np.random.SeedSequence]:
    seed = seed_of(config, number)
    n = config.num_return_sequences
    return [seed] if n == 1 else seed.spawn(n)


def _prompt(decoder: Decoder, tokenizer: TextTokenizer, job: Job) -> list[int]:
    """The tokens of a prompt.

    Raises:
        PromptError: if it cannot be continued.
    """
    tokens = tokenizer.encode(job.prompt)
    check_prompts(decoder, [tokens])
    return tokens


def seed_of(config: GenerationConfig, number: int) -> np.random.SeedSequence:
    """The random seed of a job: the same in any batch."""
    return np.random.SeedSequence(config.sampling.seed, spawn_key=(number,))


# --------------------------------------------------------------------------------------------- continuous batching


def _joining(
    decoder: OnnxDecoder, tokenizer: TextTokenizer, jobs: Iterator[Job], config: GenerationConfig, batch: int
) -> Iterator[Done]:
    active: dict[int, _Text] = {}  # by the number of its sequence in the batch
    with RunningBatch(decoder) as running:
        while True:
            taken = list(islice(jobs, batch - len(active)))
            if not taken and not active:
                return
            for job in taken:
                try:
                    prompt = _prompt(decoder, tokenizer, job)
                except PromptError as error:
                    yield Done(job.number, [], str(error))
                    continue
                text = _Text(job.number, prompt, decoder, tokenizer, config)
                if text.finish:
                    yield text.done()
                    continue
                sequence, logits = running.join(text.tokens)
                text.take(logits)
                active[sequence] = text
            for sequence in [number for number, text in active.items() if text.finish]:
                running.leave(sequence)
                yield active.pop(sequence).done()
            logits_of = running.step({sequence: text.tokens[-1] for sequence, text in active.items()})
            for sequence, text in active.items():
                text.take(logits_of[sequence])


class _Text:
    """A text that is continued in a running batch."""

    def __init__(
        self, number: int, prompt: list[int], decoder: Decoder, tokenizer: TextTokenizer, config: GenerationConfig
    ) -> None:
        self.number = number
        self.tokens = prompt
        self.prompt_length = len(self.tokens)
        self.end_tokens = end_tokens_of(decoder, tokenizer, config)
        self.limit = config.new_tokens(self.prompt_length)
        self.n_ctx = decoder.n_ctx
        generator = np.random.default_rng(seed_of(config, number))
        self.choose = Chooser(config.sampling, self.prompt_length, self.end_tokens, generator)
        self.pieces = TextPieces(tokenizer, config.stop_strings)
        self.text = ""
        self.finish: Finish | None = None
        self._check_length()

    def take(self, logits: Logits) -> None:
        """Choose the next token from the logits (V,) after the last one."""
        token = self.choose(self.tokens, logits)
        if token in self.end_tokens:
            self.finish = "stop"
            return
        self.tokens.append(token)
        self.text += self.pieces.push(token)
        if self.pieces.stopped:
            self.finish = "stop"
            return
        self._check_length()

    def _check_length(self) -> None:
        if len(self.tokens) - self.prompt_length >= self.limit:
            self.finish = "length"
        elif len(self.tokens) >= self.n_ctx:
            self.finish = "context"

    def done(self) -> Done:
        """The result, once it has ended."""
        assert self.finish
        text = self.text + self.pieces.push(None)
        return Done(self.number, [Continuation(text, self.tokens[self.prompt_length :], self.finish)])
