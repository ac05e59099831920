"""What optional inputs for LoRA adapters cost: decoding with GPT-2 small's shape and random weights.

    python benchmarks/adapters.py [--threads 2] [--rounds 15] [--precision int8] [--cache inplace]

Three models are measured alternately in one process: an export without adapters ("plain"), the same with inputs for all 48
projections where no adapter is chosen ("none"), and with an adapter of rank 16 chosen ("chosen"). Each round creates new
sessions, because two sessions of the same file can differ by a tenth, depending on where their weights are in memory. It
prints medians of tokens per second, and the medians of each round's speed relative to "plain". Below 1, the inputs cost time.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from models import random_model

from converters import GPT2Config, LazyTensor
from converters.containers.onnx_adapter import write_onnx_adapter
from converters.io.publishing import new_file
from converters.spec import projections
from converters.tensors import F32
from gpt2x import ExportOptions, OnnxDecoder, contract, export_onnx
from gpt2x.export.client_files import metadata
from gpt2x.export.onnx_graph import Target, to_onnx
from gpt2x.precisions import PRECISIONS

PROMPT, NEW, RANK = 128, 48, 16
RUNS = {"plain": None, "none": None, "chosen": "random"}  # model -> the adapter of its steps


def write_models(folder: Path, precision: str, cache: str) -> None:
    """Write an export, and beside its model a second one with optional inputs, which has the same weights."""
    model, options = random_model(), ExportOptions((precision,), cache)
    export_onnx(model, folder, options, need_tokenizer=False)
    chosen = PRECISIONS[precision]
    names = projections(model.config.n_layer)
    with tempfile.TemporaryDirectory() as scratch, new_file(Path(scratch, "weights")) as out:
        stored = chosen.store(out, model, options.block, None)
    facts = metadata(model, {}, chosen, options, names)
    graph = to_onnx(model.config, chosen, stored, facts, Target(cache=cache), lora=names)
    (folder / "onnx" / "with_inputs.onnx").write_bytes(graph.SerializeToString())
    with new_file(folder / "onnx" / f"random{contract.ADAPTER_SUFFIX}") as out:
        write_onnx_adapter(out, random_adapter(model.config, names))


def random_adapter(config: GPT2Config, names: list[str]) -> dict[str, LazyTensor]:
    """Return random factors for every projection."""
    rng = np.random.default_rng(2)
    factors = {}
    for name, slot in contract.factor_slots(config, names).items():
        shape = [size if isinstance(size, int) else RANK for size in slot.shape]
        factors[name] = LazyTensor.of(rng.standard_normal(shape, np.float32) * np.float32(0.02), F32)
    return factors


def decode(decoder: OnnxDecoder) -> float:
    """Run a prompt, then decode NEW tokens one at a time. Returns tokens per second of decoding."""
    ids = np.random.default_rng(1).integers(0, decoder.n_vocab, (1, PROMPT + NEW))
    places = np.arange(PROMPT + NEW)[None]
    _, cache = decoder.step(ids[:, :PROMPT], None, places[:, :PROMPT], None)
    start = time.perf_counter()
    for i in range(PROMPT, PROMPT + NEW):
        _, cache = decoder.step(ids[:, i : i + 1], None, places[:, i : i + 1], cache)
    return NEW / (time.perf_counter() - start)


def measure(folder: Path, precision: str, threads: int | None, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each run in each round, in turns."""
    files = {"plain": folder / contract.model_file(precision)}
    found: dict[str, list[float]] = {run: [] for run in RUNS}
    for turn in range(rounds):
        for run in list(RUNS) if turn % 2 else list(RUNS)[::-1]:
            path = files.get(run, folder / "onnx" / "with_inputs.onnx")
            with OnnxDecoder(path, threads=threads, adapter=RUNS[run]) as decoder:
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
    print(f"| precision | {' | '.join(RUNS)} | none / plain | chosen / plain |\n" + "| --- " * 6 + "|")
    for precision in precisions:
        with tempfile.TemporaryDirectory(prefix="gpt2x-adapters-") as name:
            write_models(Path(name) / "x", precision, cache)
            found = measure(Path(name) / "x", precision, threads, rounds)
        speeds = [f"{statistics.median(times):.1f} tokens/s" for times in found.values()]
        ratios = []
        for run in ("none", "chosen"):
            pairs = zip(found[run], found["plain"], strict=True)
            ratios.append(f"{statistics.median(mine / plain for mine, plain in pairs):.3f}")
        print(f"| {precision} | {' | '.join([*speeds, *ratios])} |", flush=True)


if __name__ == "__main__":
    main()
