"""Compare the speed of scoring: ONNX Runtime (float32, a growing cache and one in place) and transformers, on the same CPU.
GPT-2 small's shape with random weights, a random text, the sliding window of transformers' documentation.

    python benchmarks/score.py [--threads 2] [--rounds 5] [--tokens 3072] [--stride 512]

One process measures all of them alternately, in several rounds, after one that is not counted. It prints medians in tokens of
the text for each second, and the median of the speed ratio to transformers in each round. Above 1, gpt2x is faster. It also
prints the share of the time that turns logits into log-probabilities, the only part in numpy.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from models import random_model

from converters import GPT2Config, save_checkpoint
from gpt2x import ExportOptions, OnnxDecoder, export_onnx
from gpt2x.scoring import spans
from gpt2x.scoring.score import Encoded, score_encoded

CACHES = ("growing", "inplace")
Perplexity = Callable[[], float]


def of_transformers(folder: Path, ids: Any, stride: int) -> Perplexity:
    """The loop of transformers' documentation."""
    import torch
    from transformers import GPT2LMHeadModel

    model: Any = GPT2LMHeadModel.from_pretrained(folder).eval()
    tokens = torch.from_numpy(ids)[None]

    def perplexity() -> float:
        total, count, previous = 0.0, 0, 0
        for begin in range(0, len(ids), stride):
            end = min(begin + model.config.n_positions, len(ids))
            inputs = tokens[:, begin:end]
            labels = inputs.clone()
            labels[:, : previous - end] = -100
            with torch.no_grad():
                loss = float(model(inputs, labels=labels).loss)
            counted = int((labels != -100).sum()) - 1
            total += loss * counted
            count += counted
            previous = end
            if end == len(ids):
                break
        return math.exp(total / count)

    return perplexity


def of_gpt2x(decoder: OnnxDecoder, ids: Any, stride: int) -> Perplexity:
    """The same with gpt2x."""
    encoded = Encoded(ids, len(ids))

    def perplexity() -> float:
        (found,) = score_encoded(decoder, [encoded], stride)
        assert found.perplexity
        return found.perplexity

    return perplexity


class Stopwatch:
    """The seconds that a function takes in all its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        result = self.function(*args)
        self.seconds += time.perf_counter() - start
        return result


@click.command()
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--rounds", type=int, default=5, show_default=True)
@click.option("--tokens", type=int, default=3072, show_default=True)
@click.option("--stride", type=int, default=512, show_default=True)
def main(threads: int, rounds: int, tokens: int, stride: int) -> None:
    """Measure and print the table."""
    import torch

    torch.set_num_threads(threads)
    ids = np.random.default_rng(1).integers(0, GPT2Config().n_vocab, tokens)
    watch = Stopwatch(spans.score_tokens)
    spans.score_tokens = watch
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = random_model()
        save_checkpoint(checkpoint, folder / "hf")
        contenders = {"transformers": of_transformers(folder / "hf", ids, stride)}
        for cache in CACHES:
            export_onnx(checkpoint, folder / cache, ExportOptions(cache=cache), need_tokenizer=False)
            decoder = OnnxDecoder(folder / cache, threads=threads)
            contenders[f"gpt2x, {cache} cache"] = of_gpt2x(decoder, ids, stride)
        print(f"load average {os.getloadavg()[0]:.2f}, {threads} threads, {tokens} tokens, stride {stride}")
        measure(contenders, rounds, tokens, watch)


def measure(contenders: dict[str, Perplexity], rounds: int, tokens: int, watch: Stopwatch) -> None:
    """Run all in turn, and print a table."""
    expected = contenders["transformers"]()
    for name, perplexity in contenders.items():
        found = perplexity()
        assert abs(found / expected - 1) < 1e-5, (name, found, expected)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    shares: dict[str, float] = {}
    for turn in range(rounds):
        for name in list(contenders) if turn % 2 else list(contenders)[::-1]:
            before = watch.seconds
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
            shares[name] = (watch.seconds - before) / seconds[name][-1]
    print("| | tokens/s | to transformers | log-probabilities |\n| --- | --- | --- | --- |")
    for name, times in seconds.items():
        ratios = [theirs / own for own, theirs in zip(times, seconds["transformers"], strict=True)]
        speed = tokens / statistics.median(times)
        print(f"| {name} | {speed:.0f} | {statistics.median(ratios):.2f} | {100 * shares[name]:.1f}% |")


if __name__ == "__main__":
    main()
