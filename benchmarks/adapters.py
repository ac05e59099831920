"""What LoRA adapters at run time cost: decoding with GPT-2 small's shape and random weights.

    python benchmarks/adapters.py [--threads 2] [--rounds 15] [--precision int8] [--cache inplace]

Four runs are measured alternately in one process: an export without adapters ("plain"), one with an adapter of rank 16 for
all 48 projections where none is chosen ("none"), the same in the graph that has inputs for adapters ("inputs"), which other
clients and a decoder that has changed adapters use, and with the adapter ("chosen"). Each round creates new sessions, because
two sessions of the same file can differ by a tenth, depending on where their weights are in memory. It prints medians of
tokens per second, and the medians of each round's speed relative to "plain". Below 1, it costs time.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from models import random_model

from converters import GPT2Config, LazyTensor
from converters.containers.safetensors import write_safetensors
from converters.io.publishing import new_file
from converters.spec import projections
from gpt2x import ExportOptions, OnnxDecoder, contract, export_onnx
from gpt2x.precisions import PRECISIONS

PROMPT, NEW, RANK = 128, 48, 16
NAME = "random"  # of the adapter


def write_models(folder: Path, precision: str, cache: str) -> dict[str, tuple[Path, str | None]]:
    """Export a model without and with an adapter. Returns the path and the adapter of each run."""
    model = random_model()
    write_adapter(folder / NAME, model.config)
    plain, adapted = folder / "plain", folder / "adapted"
    export_onnx(model, plain, ExportOptions((precision,), cache), need_tokenizer=False)
    options = ExportOptions((precision,), cache, adapters={NAME: folder / NAME})
    export_onnx(model, adapted, options, need_tokenizer=False)
    return {
        "plain": (plain, None),
        "none": (adapted, None),
        "inputs": (adapted / contract.lora_file(contract.model_file(precision)), None),
        "chosen": (adapted, NAME),
    }


def write_adapter(folder: Path, config: GPT2Config) -> None:
    """Write an adapter of PEFT with random factors for every projection."""
    rng = np.random.default_rng(2)
    factors = {}
    for name in projections(config.n_layer):
        inputs, outputs = config.shapes()[f"{name}.weight"]
        for letter, shape in {"A": (RANK, inputs), "B": (outputs, RANK)}.items():
            values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            factors[f"base_model.model.transformer.{name}.lora_{letter}.weight"] = LazyTensor.of(values)
    folder.mkdir()
    with new_file(folder / "adapter_model.safetensors") as out:
        write_safetensors(out, factors)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "fan_in_fan_out": True}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def decode(decoder: OnnxDecoder) -> float:
    """Run a prompt, then decode NEW tokens one at a time. Returns tokens per second of decoding."""
    ids = np.random.default_rng(1).integers(0, decoder.n_vocab, (1, PROMPT + NEW))
    places = np.arange(PROMPT + NEW)[None]
    _, cache = decoder.step(ids[:, :PROMPT], None, places[:, :PROMPT], None)
    start = time.perf_counter()
    for i in range(PROMPT, PROMPT + NEW):
        _, cache = decoder.step(ids[:, i : i + 1], None, places[:, i : i + 1], cache)
    return NEW / (time.perf_counter() - start)


def measure(runs: dict[str, tuple[Path, str | None]], threads: int | None, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each run in each round, in turns."""
    found: dict[str, list[float]] = {run: [] for run in runs}
    for turn in range(rounds):
        for run in list(runs) if turn % 2 else list(runs)[::-1]:
            path, adapter = runs[run]
            with OnnxDecoder(path, threads=threads, adapter=adapter) as decoder:
                decode(decoder)  # warm-up
                found[run].append(decode(decoder))
    return found


@click.command()
@click.option("--threads", type=int, help="Threads (default: one per core).")
@click.option("--rounds", default=15, show_default=True, help="Rounds to take medians over.")
@click.option("--precision", "precisions", type=click.Choice(list(PRECISIONS)), multiple=True, default=["fp32", "int8"])
@click.option("--cache", type=click.Choice(list(contract.CACHES)), default="inplace", show_default=True)
def main(threads: int | None, rounds: int, precisions: tuple[str, ...], cache: str) -> None:
    """Compare decoding with and without inputs for adapters."""
    print("| precision | plain, tokens/s | none / plain | inputs / plain | chosen / plain |\n" + "| --- " * 5 + "|")
    for precision in precisions:
        with tempfile.TemporaryDirectory(prefix="gpt2x-adapters-") as name:
            found = measure(write_models(Path(name), precision, cache), threads, rounds)
        cells = [f"{statistics.median(found['plain']):.1f}"]
        for run in ("none", "inputs", "chosen"):
            pairs = zip(found[run], found["plain"], strict=True)
            cells.append(f"{statistics.median(mine / plain for mine, plain in pairs):.3f}")
        print(f"| {precision} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
