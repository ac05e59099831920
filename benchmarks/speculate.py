"""Speculative decoding beside plain decoding, text by text in alternation, in one process.

    python benchmarks/speculate.py FOLDER [--draft MODEL] [--precision fp32,int8,w8a8] [--texts 50] [--new 100]

FOLDER is an export with its tokenizer. Three kinds of prompts are made from gpt2x/coriolanus.txt, which the shipped model has
not seen: *quotes* hold a passage and the start of the same passage again; *free* ones are passages; *loops* repeat a few lines.
Prints the ratio of the times (above 1: speculative decoding is faster), tokens a run, the share of guesses that were right, and
whether all greedy texts are equal.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpt2x import SHAKESPEARE, Draft, Generation, OnnxDecoder, PromptLookup, Sampling, Tokenizer
from gpt2x.generation.guesses import Speculate
from gpt2x.generation.speculate import Counts
from gpt2x.runtimes.base import Decoder
from gpt2x.runtimes.opening import open_decoder

GREEDY = Sampling(temperature=0)
PASSAGE = 60  # tokens of a passage


@dataclass
class Sum:
    """What a kind of prompts took."""

    ratios: list[float] = field(default_factory=list)
    plain: float = 0.0
    guessing: float = 0.0
    runs: int = 0
    tokens: int = 0
    guesses: int = 0
    right: int = 0
    same: int = 0

    def add(self, plain: float, guessing: float, counts: Counts, same: bool) -> None:
        self.ratios.append(plain / guessing)
        self.plain += plain
        self.guessing += guessing
        self.runs += counts.runs
        self.tokens += counts.tokens
        self.guesses += counts.guesses
        self.right += counts.right
        self.same += same

    def __str__(self) -> str:
        return (
            f"{self.plain / self.guessing:5.2f}  {statistics.median(self.ratios):6.2f}  {min(self.ratios):5.2f}  "
            f"{self.tokens / max(1, self.runs):10.2f}  {self.right / max(1, self.guesses):8.0%}  "
            f"{self.same}/{len(self.ratios)}"
        )


def prompts_of(tokens: Sequence[int], count: int, n_ctx: int, new: int) -> dict[str, list[list[int]]]:
    """Prompts of each kind, short enough for the context."""
    passage = min(PASSAGE, (n_ctx - new) // 2)
    stride = max(1, (len(tokens) - passage) // count)
    passages = [list(tokens[i * stride : i * stride + passage]) for i in range(count)]
    quotes = [text + text[: passage // 6] for text in passages]
    loops = [text[: passage // 4] * 4 for text in passages]
    return {"quotes": quotes, "free": passages, "loops": loops}


def timed(
    decoder: Decoder, prompt: list[int], new: int, speculate: Speculate | None
) -> tuple[list[int | None], float, Counts]:
    """The new tokens, and the seconds after the first of them: the prompt is not part of it."""
    generation = Generation(decoder, [prompt], new, GREEDY, speculate=speculate)
    steps = iter(generation)
    first = next(steps)
    start = time.perf_counter()
    tokens = [*first, *(token for (token,) in steps)]
    return tokens, time.perf_counter() - start, generation.speculation


def compare(decoder: Decoder, prompts: Sequence[list[int]], new: int, speculate: Speculate) -> Sum:
    """Decode each prompt both ways, and each way first in turn."""
    total = Sum()
    for number, prompt in enumerate(prompts):
        if number % 2:
            guessed, guessing, counts = timed(decoder, prompt, new, speculate)
            tokens, plain, _ = timed(decoder, prompt, new, None)
        else:
            tokens, plain, _ = timed(decoder, prompt, new, None)
            guessed, guessing, counts = timed(decoder, prompt, new, speculate)
        total.add(plain, guessing, counts, tokens == guessed)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--draft")
    parser.add_argument("--precision", default="fp32,int8,w8a8")
    parser.add_argument("--texts", type=int, default=50)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    text = (SHAKESPEARE.parent / "coriolanus.txt").read_text()
    tokens = Tokenizer.from_pretrained(options.folder).encode(text)
    guessers: dict[str, Speculate] = {"lookup": PromptLookup()}
    if options.draft:
        guessers["draft"] = Draft(open_decoder(options.draft, threads=options.threads))
    print("precision  guesses  prompts  ratio  median  worst  tokens/run  accepted  equal texts")
    for precision in options.precision.split(","):
        decoder = OnnxDecoder(Path(options.folder), precision=precision, threads=options.threads)
        for kind, prompts in prompts_of(tokens, options.texts, decoder.n_ctx, options.new).items():
            for name, guesser in guessers.items():
                total = compare(decoder, prompts, options.new, guesser)
                print(f"{precision:<9}  {name:<7}  {kind:<7}  {total}", flush=True)


if __name__ == "__main__":
    main()
