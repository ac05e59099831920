"""The speed, memory and memory-bandwidth utilization of an ONNX model on this machine.

Decoding a token reads every weight once, so memory bandwidth limits it: as many bytes are read with as many threads in the
same run. Each combination is measured in its own process, which loads only one model.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from converters import ConversionError

from .generation.guesses import Speculate
from .generation.loop import Generation
from .generation.sampling import Sampling
from .precisions import precisions_in
from .runtimes.onnx_providers import CPU, checked_providers
from .runtimes.onnxruntime import OnnxDecoder

ROUNDS = 5  # of prefill, and of reading memory

Run = dict[str, Any]


def bench(
    path: str | Path, precisions: Sequence[str | None], prompt: int, new: int, batches: Sequence[int], threads: int,
    show: Callable[[Run], None] = lambda run: None, provider: str = CPU,
) -> dict[str, Any]:  # fmt: skip
    """Measure the models of a directory.

    Args:
        precisions: the models, or pairs such as ``w8a8+int4``; None for the default one.
        prompt: number of prompt tokens, which are random.
        new: number of new tokens.
        batches: batch sizes.
        threads: number of threads.
        show: called with each result.
        provider: ONNX Runtime's execution provider, as in ``OnnxDecoder``.

    Returns:
        ``{"machine": {...}, "runs": [...]}``. A run has ``precision``, ``cache``, ``prompt``, ``new``, ``batch``;
        ``load_s``, the time to load the model; ``ttft_ms``, the time to the first token in a new process; ``prefill_ms``,
        the same after warm-up; ``decode_tokens_per_s``, of all rows together; ``rss_mb``, the peak memory of the
        process; ``bandwidth_share``, the time to read as many bytes as the weights have, divided by the time of a step. It is
        null for another provider than the CPU: that memory is not measured.

    Raises:
        ConversionError: if a model cannot be opened or run.
        InputError: if this ONNX Runtime has no such provider.
    """
    checked_providers(provider)
    runs: list[Run] = []
    for precision in precisions:
        for batch in batches:
            task = {"path": str(path), "precision": precision, "prompt": prompt, "new": new, "batch": batch}
            runs.append(_in_a_process({**task, "threads": threads, "provider": provider}))
            show(runs[-1])
    return {"machine": {**machine(threads), "provider": provider}, "runs": runs}


def machine(threads: int) -> dict[str, Any]:
    """The machine that was measured."""
    import onnxruntime

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _in_a_process(task: dict[str, Any]) -> Run:
    done = subprocess.run([sys.executable, "-m", __name__, json.dumps(task)], capture_output=True, text=True)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ConversionError(f"{task['path']}: measuring failed: {last[0]}") from None
    if "error" in answer:
        raise ConversionError(answer["error"])
    run: Run = answer
    return run


def measure(path: str, precision: str | None, prompt: int, new: int, batch: int, threads: int, provider: str) -> Run:
    """Measure one run in this process."""
    start = time.perf_counter()
    decoder = OnnxDecoder(path, precision=precision, threads=threads, providers=provider)
    load = time.perf_counter() - start
    ids = np.random.default_rng(0).integers(decoder.n_vocab, size=(batch, prompt))
    positions = np.tile(np.arange(prompt), (batch, 1))
    prefills = []
    for _ in range(1 + ROUNDS):
        cache = None  # free it before the next prefill
        start = time.perf_counter()
        logits, cache = decoder.step(ids, None, positions, None)
        tokens = logits.argmax(-1)[:, None]
        prefills.append(time.perf_counter() - start)
    steps = []
    for i in range(new):
        start = time.perf_counter()
        logits, cache = decoder.step(tokens, None, np.full((batch, 1), prompt + i), cache)
        tokens = logits.argmax(-1)[:, None]
        steps.append(time.perf_counter() - start)
    step, peak = statistics.median(steps), _peak_memory()
    return {
        "precision": decoder.precision,
        "cache": decoder.cache_kind,
        "prompt": prompt,
        "new": new,
        "batch": batch,
        "prefill_ms": round(1e3 * statistics.median(prefills[1:]), 2),
        "decode_tokens_per_s": round(batch / step, 2),
        "ttft_ms": round(1e3 * prefills[0], 2),
        "rss_mb": round(peak / 1e6, 1),
        "load_s": round(load, 3),
        "bandwidth_share": bandwidth_share(decoder, threads, step) if provider == CPU else None,
    }


def speculation(
    path: str | Path,
    precision: str | None,
    prompt: int,
    new: int,
    threads: int,
    speculate: Speculate,
    provider: str = CPU,
) -> Run:
    """Measure greedy speculative decoding beside plain decoding, in alternation and in this process.

    The prompt is random, and its first half is there twice, so that there are n-grams to look up.

    Returns:
        ``precision``; ``plain_tokens_per_s`` and ``tokens_per_s``, medians after the prompt; ``tokens_per_run``;
        ``accepted``, the share of guesses that were right.

    Raises:
        ConversionError: if the model cannot be opened or run.
        InputError: if it cannot decode speculatively.
    """
    decoder = OnnxDecoder(path, precision=precision, threads=threads, providers=provider)
    half = np.random.default_rng(0).integers(decoder.n_vocab, size=(prompt + 1) // 2).tolist()
    ids = (half + half)[:prompt]
    speeds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for guesses in (False, True):
            generation = Generation(
                decoder, [ids], new, Sampling(temperature=0), speculate=speculate if guesses else None
            )
            steps = iter(generation)
            next(steps)
            start = time.perf_counter()
            tokens = sum(1 for _ in steps)
            speeds[guesses].append(tokens / (time.perf_counter() - start))
    counts = generation.speculation
    return {
        "precision": decoder.precision,
        "plain_tokens_per_s": round(statistics.median(speeds[False]), 2),
        "tokens_per_s": round(statistics.median(speeds[True]), 2),
        "tokens_per_run": round(counts.tokens / max(1, counts.runs), 2),
        "accepted": round(counts.right / max(1, counts.guesses), 3),
    }


def bandwidth_share(decoder: OnnxDecoder, threads: int, step: float) -> float:
    """The time to read as many bytes as the weights have, as a share of the seconds of a step."""
    return round(streaming(weights_of(decoder), threads) / step, 3)


def weights_of(decoder: OnnxDecoder) -> int:
    """The size of the file of weights that decoding reads, in bytes."""
    data = decoder.path.parent / precisions_in(decoder.precision)[-1].data_file
    return (data if data.is_file() else decoder.path).stat().st_size


def streaming(size: int, threads: int) -> float:
    """The seconds to read so many bytes of memory, split among the threads."""
    values = np.ones(max(1, size // 4), np.float32)
    parts, seconds = np.array_split(values, threads), []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(2 * ROUNDS):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[ROUNDS:])


def _peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource  # missing on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def plot(result: dict[str, Any]) -> bytes:
    """Plot the decoding speed of every run as a PNG: a group for each batch size, a bar for each precision. Needs matplotlib."""
    import io

    from matplotlib.figure import Figure

    runs = result["runs"]
    kinds = list(dict.fromkeys(run["precision"] for run in runs))
    batches = list(dict.fromkeys(run["batch"] for run in runs))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        mine = [run for run in runs if run["precision"] == kind]
        places = [batches.index(run["batch"]) + (i - (len(kinds) - 1) / 2) * width for run in mine]
        bars = axes.bar(places, [run["decode_tokens_per_s"] for run in mine], width, label=kind)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    first = runs[0]
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.set_ylabel("tokens/s, all rows together")
    axes.set_title(f"Decoding {first['new']} tokens after {first['prompt']}, {first['cache']} cache", fontsize=10)
    axes.legend()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _child() -> None:
    try:
        answer = measure(**json.loads(sys.argv[1]))
    except ConversionError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    _child()
