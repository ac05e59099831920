"""Compare ONNX Runtime's tiled attention with its other one, in models with a float32 cache in place: prompts, decoding, a few
tokens at once and a batch. GPT-2 small's shape with random weights.

    python benchmarks/kernels.py [--precision fp32,w8a8] [--threads 2] [--rounds 7] [--cpu-time]

One process has a session of each kind, and runs them alternately. It prints medians in ms, and the median of the speed ratio in
each round: above 1, tiled attention is faster. Also w8a8 with a growing cache, as a share of the same prompts in place. On a busy
machine, use ``--threads 1 --cpu-time``. With two threads it takes about three minutes.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
from models import random_model

from gpt2x import ExportOptions, OnnxDecoder, export_onnx
from gpt2x.runtimes.kv_cache import RowCache
from gpt2x.runtimes.processor import TILES_OFF

PROMPTS = (128, 900)
FEW = 4  # tokens that speculative decoding checks at once
BATCH = np.arange(16, 1016, 63)  # lengths of 16 sequences
NEW = 16  # tokens that a round decodes
Clock = Callable[[], float]


@dataclass
class Task:
    """Something to measure, and what it took with each kind of attention."""

    name: str
    run: Callable[[OnnxDecoder, Clock], float]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def row(self, ours: str, other: str) -> str:
        """A row of the table. The ratio is that of the other to ours, in each round."""
        a, b = self.seconds[ours], self.seconds[other]
        ratio = statistics.median(y / x for x, y in zip(a, b, strict=True))
        return f"| {self.name} | {statistics.median(a) * 1e3:.1f} | {statistics.median(b) * 1e3:.1f} | {ratio:.3f} |"


def tokens(decoder: OnnxDecoder, n: int) -> np.ndarray:
    """Random tokens (n,)."""
    return np.random.default_rng(1).integers(0, decoder.n_vocab, n)


def filled(decoder: OnnxDecoder, lengths: np.ndarray) -> RowCache:
    """A cache whose rows have these lengths. Its values do not change how long a step takes."""
    cache = decoder.row_cache(len(lengths))
    cache.reserve(len(lengths), decoder.n_ctx)
    cache.lengths[:] = lengths
    return cache


def prompt(n: int) -> Task:
    """Read a prompt of n tokens."""

    def run(decoder: OnnxDecoder, clock: Clock) -> float:
        start = clock()
        decoder.step(tokens(decoder, n)[None], None, np.arange(n)[None], None)
        return clock() - start

    return Task(f"prompt of {n}", run)


def median_step(clock: Clock, step: Callable[[], object]) -> float:
    """Repeat a step after one to warm up. The median time."""
    step()
    times = []
    for _ in range(NEW):
        start = clock()
        step()
        times.append(clock() - start)
    return statistics.median(times)


def decoding(name: str, lengths: np.ndarray) -> Task:
    """Add a token to each row of these lengths. The median step of a round."""

    def run(decoder: OnnxDecoder, clock: Clock) -> float:
        in_place, cache = decoder.in_place_run(), filled(decoder, lengths)
        ids = tokens(decoder, len(lengths))
        return median_step(clock, lambda: in_place.advance(ids, lengths, cache))

    return Task(name, run)


def few(past: int) -> Task:
    """Check a few tokens at once after so many others."""

    def run(decoder: OnnxDecoder, clock: Clock) -> float:
        in_place, cache = decoder.in_place_run(), filled(decoder, np.array([past]))
        ids, positions = tokens(decoder, FEW), np.arange(past, past + FEW)
        return median_step(clock, lambda: in_place.several(ids, positions, cache))

    return Task(f"{FEW} tokens after {past}", run)


def opened(path: Path, precision: str, threads: int, tiled: bool) -> OnnxDecoder:
    """A model with or without tiled attention."""
    os.environ[TILES_OFF] = "0" if tiled else "1"
    return OnnxDecoder(path, precision=precision, threads=threads)


def measure(tasks: list[Task], decoders: dict[str, OnnxDecoder], rounds: int, clock: Clock) -> None:
    """Run every task with each decoder in turn. The first round is a warm-up."""
    names = list(decoders)
    for turn in range(rounds + 1):
        for task in tasks:
            for name in names if turn % 2 else names[::-1]:
                took = task.run(decoders[name], clock)
                if turn:
                    task.seconds.setdefault(name, []).append(took)


def compare_attention(path: Path, precision: str, threads: int, rounds: int, clock: Clock) -> None:
    """Print the table of one precision."""
    decoders = {name: opened(path, precision, threads, name == "tiled") for name in ("tiled", "not tiled")}
    tasks = [prompt(n) for n in PROMPTS]
    tasks += [decoding(f"a token after {n}", np.array([n])) for n in PROMPTS]
    tasks += [few(PROMPTS[-1]), decoding("a token of each of 16", BATCH)]
    measure(tasks, decoders, rounds, clock)
    print(f"\n| {precision}, in place | tiled, ms | not tiled, ms | speed ratio |\n| --- | --- | --- | --- |")
    for task in tasks:
        print(task.row("tiled", "not tiled"), flush=True)
    for decoder in decoders.values():
        decoder.close()


def compare_caches(in_place: Path, growing: Path, threads: int, rounds: int, clock: Clock) -> None:
    """Print how long a prompt takes with each kind of cache, in w8a8."""
    os.environ.pop(TILES_OFF, None)
    decoders = {
        "in place": OnnxDecoder(in_place, precision="w8a8", threads=threads),
        "growing": OnnxDecoder(growing, precision="w8a8", threads=threads),
    }
    tasks = [prompt(n) for n in PROMPTS]
    measure(tasks, decoders, rounds, clock)
    print("\n| w8a8 | in place, ms | growing, ms | speed ratio |\n| --- | --- | --- | --- |")
    for task in tasks:
        print(task.row("in place", "growing"), flush=True)


@click.command()
@click.option("--precision", default="fp32,w8a8", show_default=True, help="Precisions to compare.")
@click.option("--threads", default=2, show_default=True, help="Threads.")
@click.option("--rounds", default=7, show_default=True, help="Rounds to take medians over.")
@click.option("--cpu-time", is_flag=True, help="Measure processor time instead of time.")
def main(precision: str, threads: int, rounds: int, cpu_time: bool) -> None:
    """Compare ONNX Runtime's two kinds of attention."""
    precisions = tuple(precision.split(","))
    clock = time.process_time if cpu_time else time.perf_counter
    with tempfile.TemporaryDirectory(prefix="gpt2x-kernels-") as name:
        in_place, growing, model = Path(name, "in-place"), Path(name, "growing"), random_model()
        export_onnx(model, in_place, ExportOptions(precisions, cache="inplace", last=True), need_tokenizer=False)
        for each in precisions:
            compare_attention(in_place, each, threads, rounds, clock)
        if "w8a8" in precisions:
            export_onnx(model, growing, ExportOptions(("w8a8",), last=True), need_tokenizer=False)
            compare_caches(in_place, growing, threads, rounds, clock)
    print(f"\nload average: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
