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

    Where the cache stays in place, a prompt joins as soon as others have ended (continuous batching). Otherwise, and for
    beam search, a batch ends as a whole. In both, a prompt is read once, however many texts continue it. A text does not
    depend on the others of its batch, nor on their number, but for rounding.

    Raises:
        InputError: if a control names a token outside the vocabulary.
    """
    check_tokens(decoder, config.sampling, end_tokens_of(decoder, tokenizer, config))
    alone = config.speculate is not None and batch == 1 and config.num_return_sequences == 1
    if isinstance(decoder, OnnxDecoder) and decoder.in_place and not alone and not config.beams:
        yield from _joining(decoder, tokenizer, iter(jobs), config, batch)
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
    most = batch * config.num_return_sequences  # texts at a time
    active: list[_Texts] = []
    with RunningBatch(decoder) as running:
        while True:
            free = most - sum(len(texts) for texts in active)
            taken = list(islice(jobs, free // config.num_return_sequences))
            if not taken and not active:
                return
            for job in taken:
                try:
                    prompt = _prompt(decoder, tokenizer, job)
                except PromptError as error:
                    yield Done(job.number, [], str(error))
                    continue
                texts = _Texts(job.number, prompt, decoder, tokenizer, config)
                texts.join(running)
                active.append(texts)
            for texts in active:
                texts.leave(running)
                if not texts:
                    yield texts.done()
            active = [texts for texts in active if texts]
            logits_of = running.step({key: token for texts in active for key, token in texts.last_tokens().items()})
            for texts in active:
                texts.take(logits_of)


class _Texts:
    """The texts of one prompt in a running batch. Its length is the number of those that go on."""

    def __init__(
        self, number: int, prompt: list[int], decoder: Decoder, tokenizer: TextTokenizer, config: GenerationConfig
    ) -> None:
        self.number = number
        self.prompt = prompt
        self.all = []
        for seed in _seeds(config, number):
            self.all.append(_Text(list(prompt), decoder, tokenizer, config, np.random.default_rng(seed)))
        self.active: dict[int, _Text] = {}  # by the number of its sequence in the batch

    def __len__(self) -> int:
        return len(self.active)

    def join(self, running: RunningBatch) -> None:
        """Read the prompt once for all texts, and choose the first token of each. Without room for one, do nothing."""
        if self.all[0].finish:
            return
        first, logits = running.join(self.prompt)
        sequences = [first, *(running.fork(first) for _ in self.all[1:])]
        self.active = dict(zip(sequences, self.all, strict=True))
        for text in self.all:
            text.take(logits)

    def last_tokens(self) -> dict[int, int]:
        """The last token of each sequence."""
        return {sequence: text.tokens[-1] for sequence, text in self.active.items()}

    def take(self, logits_of: dict[int, Logits]) -> None:
        """Choose the next token of each text, from the logits (V,) of its sequence."""
        for sequence, text in self.active.items():
            text.take(logits_of[sequence])

    def leave(self, running: RunningBatch) -> None:
        """Remove the sequences of texts that have ended."""
        for sequence, text in list(self.active.items()):
            if text.finish:
                running.leave(sequence)
                del self.active[sequence]

    def done(self) -> Done:
        """The result, once all have ended."""
        return Done(self.number, [text.done() for text in self.all])


class _Text:
    """A text that is continued in a running batch."""

    def __init__(
        self, prompt: list[int], decoder: Decoder, tokenizer: TextTokenizer, config: GenerationConfig,
        generator: np.random.Generator,
    ) -> None:  # fmt: skip
        self.tokens = prompt
        self.prompt_length = len(self.tokens)
        self.end_tokens = end_tokens_of(decoder, tokenizer, config)
        self.limit = config.new_tokens(self.prompt_length)
        self.n_ctx = decoder.n_ctx
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

    def done(self) -> Continuation:
        """The result, once it has ended."""
        assert self.finish
        text = self.text + self.pieces.push(None)
        return Continuation(text, self.tokens[self.prompt_length :], self.finish)
