"""Speculative decoding beside plain decoding, text by text in alternation, in one process.

    python benchmarks/speculate.py FOLDER [--draft MODEL] [--precision fp32,int8,w8a8] [--texts 50] [--new 100]
    python benchmarks/speculate.py FOLDER --peers MODEL [--draft MODEL]

FOLDER is an export with its tokenizer. Three kinds of prompts are made from a text, by default gpt2x/coriolanus.txt: *quotes*
hold a passage and the start of the same passage again; *free* ones are passages; *loops* repeat a few lines. (The text from
which the shipped model was trained begins with this scene.) Prints the ratio of the times (above 1: speculative decoding is
faster), tokens a run, the share of guesses that were right, and whether all greedy texts are equal.

``--peers`` measures other programs on MODEL, the same model as gpt2x's input, instead: transformers in float32, and llama.cpp
if llama-cpp-python is installed, each beside its own plain decoding. Their times include the prompt.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from converters import open_checkpoint, save_checkpoint
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
        ratio = f"{self.plain / self.guessing:5.2f}  {statistics.median(self.ratios):6.2f}  {min(self.ratios):5.2f}"
        counts = f"{'-':>10}  {'-':>8}"
        if self.runs:
            counts = f"{self.tokens / self.runs:10.2f}  {self.right / max(1, self.guesses):8.0%}"
        return f"{ratio}  {counts}  {self.same}/{len(self.ratios)}"


Timed = tuple[list[int | None], float, Counts]
Decode = Callable[[list[int]], Timed]
"""A prompt -> the new tokens, the seconds for them, and what was counted."""


def prompts_of(tokens: Sequence[int], count: int, n_ctx: int, new: int) -> dict[str, list[list[int]]]:
    """Prompts of each kind, short enough for the context."""
    passage = min(PASSAGE, (n_ctx - new) // 2)
    stride = max(1, (len(tokens) - passage) // count)
    passages = [list(tokens[i * stride : i * stride + passage]) for i in range(count)]
    quotes = [text + text[: passage // 6] for text in passages]
    loops = [text[: passage // 4] * 4 for text in passages]
    return {"quotes": quotes, "free": passages, "loops": loops}


def timed(decoder: Decoder, new: int, speculate: Speculate | None, prompt: list[int]) -> Timed:
    """The new tokens, and the seconds after the first of them: the prompt is not part of it."""
    generation = Generation(decoder, [prompt], new, GREEDY, speculate=speculate)
    steps = iter(generation)
    first = next(steps)
    start = time.perf_counter()
    tokens = [*first, *(token for (token,) in steps)]
    return tokens, time.perf_counter() - start, generation.speculation


def compare(prompts: Sequence[list[int]], decode: Decode, speculate: Decode) -> Sum:
    """Decode each prompt both ways, and each way first in turn."""
    total = Sum()
    for number, prompt in enumerate(prompts):
        if number % 2:
            guessed, guessing, counts = speculate(prompt)
            tokens, plain, _ = decode(prompt)
        else:
            tokens, plain, _ = decode(prompt)
            guessed, guessing, counts = speculate(prompt)
        total.add(plain, guessing, counts, tokens == guessed)
    return total


# ----------------------------------------------------------------------------------------------------- other programs


def in_transformers(path: str, draft: str | None, new: int, threads: int | None) -> tuple[Decode, dict[str, Decode]]:
    """Plain decoding, and each way of guessing."""
    import torch
    from transformers import GPT2LMHeadModel

    if threads:
        torch.set_num_threads(threads)

    def opened(source: str) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(open_checkpoint(source), Path(folder, "hf"), "hf")
            found = GPT2LMHeadModel.from_pretrained(Path(folder, "hf")).eval()
        found.generation_config.eos_token_id = None
        found.generation_config.pad_token_id = 0
        return found

    model = opened(path)

    def generate(prompt: list[int], **options: Any) -> Timed:
        start = time.perf_counter()
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, **options)
        return ids[0, len(prompt) :].tolist(), time.perf_counter() - start, Counts()

    ways = {"lookup": partial(generate, prompt_lookup_num_tokens=PromptLookup.guesses)}
    if draft:
        ways["draft"] = partial(generate, assistant_model=opened(draft))
    return generate, ways


def in_llama(path: str, new: int, threads: int | None) -> tuple[Decode, dict[str, Decode]]:
    """The same in llama.cpp, whose Python package guesses by prompt lookup."""
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    def opened(file: Path, **options: Any) -> Any:
        return Llama(str(file), n_ctx=256, n_threads=threads, n_threads_batch=threads, verbose=False, **options)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.gguf")
        save_checkpoint(open_checkpoint(path), file)
        plain = opened(file)
        lookup = LlamaPromptLookupDecoding(num_pred_tokens=PromptLookup.guesses)
        guessing = opened(file, draft_model=lookup, logits_all=True)

    def generate(model: Any, prompt: list[int]) -> Timed:
        start = time.perf_counter()
        model.reset()
        tokens = []
        for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
            tokens.append(token)
            if len(tokens) == new:
                break
        return tokens, time.perf_counter() - start, Counts()

    return partial(generate, plain), {"lookup": partial(generate, guessing)}


def peers(options: argparse.Namespace, prompts: dict[str, list[list[int]]]) -> None:
    """Print the lines of the other programs."""
    programs = {"transformers": in_transformers(options.peers, options.draft, options.new, options.threads)}
    if find_spec("llama_cpp"):
        programs["llama.cpp"] = in_llama(options.peers, options.new, options.threads)
    for program, (plain, ways) in programs.items():
        for kind, texts in prompts.items():
            for name, guessing in ways.items():
                print(f"{program:<14}  {name:<7}  {kind:<7}  {compare(texts, plain, guessing)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--draft")
    parser.add_argument("--draft-precision")
    parser.add_argument("--peers")
    parser.add_argument("--precision", default="fp32,int8,w8a8")
    parser.add_argument("--text", type=Path, default=SHAKESPEARE.parent / "coriolanus.txt")
    parser.add_argument("--texts", type=int, default=50)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    tokens = Tokenizer.from_pretrained(options.folder).encode(options.text.read_text())
    print("precision       guesses  prompts  ratio  median  worst  tokens/run  accepted  equal texts")
    if options.peers:
        peers(options, prompts_of(tokens, options.texts, 256, options.new))
        return
    guessers: dict[str, Speculate] = {"lookup": PromptLookup()}
    if options.draft:
        draft = open_decoder(options.draft, precision=options.draft_precision, threads=1)
        guessers["draft"] = Draft(draft)
    for precision in options.precision.split(","):
        decoder = OnnxDecoder(Path(options.folder), precision=precision, threads=options.threads)
        plain = partial(timed, decoder, options.new, None)
        for kind, prompts in prompts_of(tokens, options.texts, decoder.n_ctx, options.new).items():
            for name, guesser in guessers.items():
                total = compare(prompts, plain, partial(timed, decoder, options.new, guesser))
                print(f"{precision:<14}  {name:<7}  {kind:<7}  {total}", flush=True)


if __name__ == "__main__":
    main()
