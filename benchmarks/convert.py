"""Speed and memory of ``gpt2x convert``, beside ``cp`` and ``sync`` of the same file, in one run. ``make bench``.

Whole processes are timed, in turn, on a warm cache; medians and ratios are printed. Peak memory is the kernel's own
figure for the process (ru_maxrss).
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from converters import Checkpoint, GPT2Config, LazyTensor, save_checkpoint
from converters.tensors import F32

SIZES = {"124M": GPT2Config(), "1558M": GPT2Config(n_layer=48, n_embd=1600, n_head=25)}
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # as installed: compiled once
GPT2X = [sys.executable, "-m", "gpt2x"]


def random_tensor(shape: tuple[int, ...]) -> LazyTensor:
    """Random small floats, made in chunks so that 6 GB need no memory."""
    size = int(np.prod(shape))

    def stream():  # type: ignore[no-untyped-def]
        rng = np.random.default_rng(size)
        for start in range(0, size, 1 << 18):
            yield rng.random(min(1 << 18, size - start), np.float32).view(np.uint8)

    return LazyTensor(F32, shape, stream)


def make(size: str, folder: Path) -> Path:
    """A checkpoint of a published shape in OpenAI's layout."""
    config = SIZES[size]
    tensors = {name: random_tensor(shape) for name, shape in config.shapes().items()}
    save_checkpoint(Checkpoint(config=config, tensors=tensors), folder / size, "tf")
    return folder / size


def run(command: list[str]) -> tuple[float, float]:
    """Seconds, and peak memory in MB, of one process."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return seconds, usage.ru_maxrss / 1000


def copy(source: Path, target: Path) -> list[str]:
    return ["sh", "-c", f"cp '{source}' '{target}' && sync '{target}'"]


def alternate(
    jobs: dict[str, Callable[[Path], list[str]]], target: Path, rounds: int
) -> dict[str, tuple[float, float]]:
    """The median seconds and the greatest memory of each job, the jobs taking turns; the first round is not counted."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for i in range(rounds + 1):
        for name, command in jobs.items():
            result = run(command(target))
            if i:
                seen[name].append(result)
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    return {name: (statistics.median(s for s, _ in r), max(m for _, m in r)) for name, r in seen.items()}


def table(results: dict[str, tuple[float, float]], base: str) -> None:
    print("| | seconds | ratio | peak memory, MB |\n| --- | --- | --- | --- |")
    for name, (seconds, memory) in results.items():
        print(f"| {name} | {seconds:.2f} | {seconds / results[base][0]:.2f} | {memory:.0f} |")


def conversions(source: Path, folder: Path, rounds: int) -> None:
    data = source / "model.ckpt.data-00000-of-00001"
    safetensors = folder / "m.safetensors"
    subprocess.run([*GPT2X, "convert", str(source), str(safetensors)], check=True, stdout=subprocess.DEVNULL)

    def convert(path: Path, *options: str) -> Callable[[Path], list[str]]:
        return lambda target: [*GPT2X, "convert", str(path), str(target), *options]

    print(f"\n{source.name}: {data.stat().st_size:,} bytes\n")
    jobs = {
        "cp and sync": lambda target: copy(data, target),
        "TF -> safetensors": convert(source, "--to", "safetensors"),
        "safetensors -> bin": convert(safetensors, "--to", "bin"),
        "safetensors -> TF": convert(safetensors, "--to", "tf"),
        "TF -> HF directory": convert(source, "--to", "hf"),
    }
    table(alternate(jobs, folder / "out", rounds), "cp and sync")
    safetensors.unlink()


def start_up(rounds: int) -> None:
    times = [run([*GPT2X, "--help"])[0] for _ in range(rounds + 1)][1:]
    print(f"\n`gpt2x --help`: {statistics.median(times):.3f} s (python -c pass: ", end="")
    print(f"{statistics.median([run([sys.executable, '-c', 'pass'])[0] for _ in range(rounds)]):.3f} s)")


LOAD = """
import sys, time, torch
from gpt2x.load import from_pretrained
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1000
before, start = anonymous(), time.perf_counter()
model = from_pretrained(sys.argv[1])
print(f"\\nLoading safetensors into the model: {time.perf_counter() - start:.2f} s, {anonymous() - before:.0f} MB copied")
"""


@click.command()
@click.option("--rounds", default=7, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to work; a temporary folder by default.")
@click.option("--small", is_flag=True, help="Leave out the 6.2 GB checkpoint.")
def main(rounds: int, folder: Path | None, small: bool) -> None:
    """Measure gpt2x convert beside cp and sync."""
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"
    )
    with tempfile.TemporaryDirectory(dir=folder, prefix="gpt2x-bench-") as name:
        work = Path(name)
        source = make("124M", work)
        conversions(source, work, rounds)
        model = work / "m.safetensors"
        subprocess.run([*GPT2X, "convert", str(source), str(model)], check=True, stdout=subprocess.DEVNULL)
        print(
            subprocess.run([sys.executable, "-c", LOAD, str(model)], check=True, capture_output=True, text=True).stdout,
            end="",
        )
        start_up(rounds)
        shutil.rmtree(source)
        model.unlink()
        if not small:
            conversions(make("1558M", work), work, 1)


if __name__ == "__main__":
    main()
