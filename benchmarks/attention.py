"""Compare two graphs for attention with a growing cache: ONNX's ``Attention`` operator (opset 23), and ``MatMul`` with
``Softmax`` (the lowest opset, which older runtimes load). Prefill and decoding of GPT-2 small's shape with random weights.

    python benchmarks/attention.py [--threads 2] [--rounds 15]

One process measures both graphs alternately, in several rounds. Each round creates new sessions, because two sessions of the
same file can differ by a tenth, depending on where their weights are in memory. It prints medians, and the median of the speed
ratio of the lowest opset to opset 23 in each round. Above 1, the lowest opset is faster.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from models import random_model

from gpt2x import ExportOptions, OnnxDecoder, export_onnx

PRECISIONS = ("fp32", "int8")
PROMPTS = (128, 900)
NEW = 48
FORMS = {"lowest opset": None, "opset 23": 23}


class Times(NamedTuple):
    """The speed of one run."""

    prefill: float  # seconds
    decode: float  # tokens per second


def measure(decoder: OnnxDecoder, prompt: int) -> Times:
    """Run a prompt, then decode NEW tokens one at a time."""
    ids = np.random.default_rng(1).integers(0, decoder.n_vocab, (1, prompt + NEW))
    places = np.arange(prompt + NEW)[None]
    start = time.perf_counter()
    _, cache = decoder.step(ids[:, :prompt], None, places[:, :prompt], None)
    middle = time.perf_counter()
    for i in range(prompt, prompt + NEW):
        _, cache = decoder.step(ids[:, i : i + 1], None, places[:, i : i + 1], cache)
    return Times(middle - start, NEW / (time.perf_counter() - middle))


def rows(folder: Path, precision: str, threads: int | None, rounds: int) -> Iterator[str]:
    """Yield the table rows of one precision."""
    found: dict[tuple[str, int], list[Times]] = {(form, prompt): [] for form in FORMS for prompt in PROMPTS}
    for turn in range(rounds):
        for form in list(FORMS) if turn % 2 else list(FORMS)[::-1]:
            path = folder / form.replace(" ", "-")
            with OnnxDecoder(path, precision=precision, threads=threads) as decoder:
                measure(decoder, PROMPTS[0])  # warm-up
                for prompt in PROMPTS:
                    found[form, prompt].append(measure(decoder, prompt))
    for prompt in PROMPTS:
        lowest, newest = (found[form, prompt] for form in FORMS)
        pairs = list(zip(lowest, newest, strict=True))
        prefill = statistics.median(b.prefill / a.prefill for a, b in pairs)
        decode = statistics.median(a.decode / b.decode for a, b in pairs)
        cells = [
            f"{statistics.median(t.prefill for t in times) * 1000:.0f} ms, "
            f"{statistics.median(t.decode for t in times):.1f} tokens/s"
            for times in (lowest, newest)
        ]
        yield f"| {precision}, {prompt} | {' | '.join(cells)} | {prefill:.2f}, {decode:.2f} |"


@click.command()
@click.option("--threads", type=int, help="Threads (default: one per core).")
@click.option("--rounds", default=15, show_default=True, help="Rounds to take medians over.")
def main(threads: int | None, rounds: int) -> None:
    """Compare the speed of the two attention graphs."""
    with tempfile.TemporaryDirectory(prefix="gpt2x-attention-") as name:
        folder, model = Path(name), random_model()
        for form, opset in FORMS.items():
            options = ExportOptions(PRECISIONS, opset=opset)
            export_onnx(model, folder / form.replace(" ", "-"), options, need_tokenizer=False)
        print(
            "| precision, prompt | lowest opset | opset 23 | lowest / 23: prefill, decoding |\n| --- | --- | --- | --- |"
        )
        for precision in PRECISIONS:
            for row in rows(folder, precision, threads, rounds):
                print(row, flush=True)


if __name__ == "__main__":
    main()
