"""Measure the time to choose a token, for each control and for several rows.

    python benchmarks/sampling.py [--vocabulary 50257]

The logits are random: most of the mass is on a few dozen tokens, as in a text. Rows are chosen one after another, as in a
batch. It prints microseconds of processor time per row, the median of several rounds.
"""

from __future__ import annotations

import statistics
import time

import click
import numpy as np

from gpt2x.generation.sampling import Chooser, Sampling
from gpt2x.runtimes.base import Logits

CONTROLS = {
    "greedy": Sampling(temperature=0),
    "temperature 0.7": Sampling(temperature=0.7),
    "top_k 50": Sampling(top_k=50),
    "top_p 0.9": Sampling(top_p=0.9),
    "top_k 50, top_p 0.9": Sampling(top_k=50, top_p=0.9),
    "min_p 0.05": Sampling(min_p=0.05),
    "repetition_penalty 1.2, greedy": Sampling(temperature=0, repetition_penalty=1.2),
    "repetition_penalty 1.2, top_p 0.9": Sampling(repetition_penalty=1.2, top_p=0.9),
}
ROWS = (1, 8, 32)
LENGTH = 500  # tokens of the text so far
ROUNDS = 7


def random_logits(rows: int, vocabulary: int) -> Logits:
    """Return logits (rows, vocabulary), with twenty likely tokens in each row."""
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((rows, vocabulary)) * 2.5 - 30).astype(np.float32)
    for row in logits:
        row[rng.integers(0, vocabulary, 20)] += 12
    return logits


def microseconds(sampling: Sampling, logits: Logits) -> float:
    """Return the median time for a row."""
    rows, vocabulary = logits.shape
    tokens = np.random.default_rng(1).integers(0, vocabulary, LENGTH).tolist()
    choosers = [Chooser(sampling, 0, (), generator) for generator in sampling.generators(rows)]
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for choose, row in zip(choosers, logits, strict=True):
            choose(tokens, row)
        found.append((time.process_time() - start) / rows)
    return statistics.median(found) * 1e6


@click.command()
@click.option("--vocabulary", default=50257, show_default=True, help="Size of the vocabulary.")
def main(vocabulary: int) -> None:
    """Measure the time to choose a token."""
    header = "".join(f"{rows:>7} rows" for rows in ROWS)
    print(f"{'microseconds per row':36}{header}")
    for name, sampling in CONTROLS.items():
        times = [microseconds(sampling, random_logits(rows, vocabulary)) for rows in ROWS]
        print(f"{name:36}" + "".join(f"{each:12.0f}" for each in times), flush=True)


if __name__ == "__main__":
    main()
