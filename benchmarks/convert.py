"""Measure speed and memory of ``gpt2x convert``, next to ``cp`` and ``sync`` of the same file. ``make bench`` runs it.

Whole processes are timed, alternately, with a warm page cache. It prints medians and ratios. Peak memory is the kernel's
number for the process (ru_maxrss).
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from converters import Checkpoint, GPT2Config, LazyTensor, open_checkpoint, save_checkpoint
from converters.dialects import FLAX, KERAS
from converters.tensors import F32

SIZES = {"124M": GPT2Config(), "1558M": GPT2Config(n_layer=48, n_embd=1600, n_head=25)}
ENVIRONMENT = {
    k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"
}  # as for an installed package: bytecode is cached


def random_tensor(name: str, shape: tuple[int, ...]) -> LazyTensor:
    """Return random small floats, different for each name. They are generated in chunks, so 6 GB need little memory."""
    size = math.prod(shape)

    def stream():  # type: ignore[no-untyped-def]
        import numpy as np

        rng = np.random.default_rng(zlib.crc32(name.encode()))
        for start in range(0, size, 1 << 18):
            yield (rng.random(min(1 << 18, size - start), np.float32) * np.float32(0.04)).tobytes()

    return LazyTensor(F32, shape, stream)


def make(size: str, folder: Path) -> Path:
    """Write a checkpoint of a published shape in OpenAI's layout, and return its path.

    It runs in a forked process, because the memory of this process would count as peak memory of the processes it starts.
    """
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        return folder / size
    config = SIZES[size]
    tensors = {name: random_tensor(name, shape) for name, shape in config.shapes().items()}
    save_checkpoint(Checkpoint(config=config, tensors=tensors), folder / size, "tf")
    os._exit(0)


def run(command: list[str]) -> tuple[float, float]:
    """Run one process. Return its seconds and its peak memory in MB."""
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
    """Run the jobs alternately. Return median seconds and maximum memory of each, without the first round."""
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


def conversions(gpt2x: list[str], source: Path, folder: Path, rounds: int) -> None:
    data = source / "model.ckpt.data-00000-of-00001"
    safetensors = folder / "m.safetensors"
    subprocess.run([*gpt2x, "convert", str(source), str(safetensors)], check=True, stdout=subprocess.DEVNULL)

    def convert(path: Path, *options: str) -> Callable[[Path], list[str]]:
        return lambda target: [*gpt2x, "convert", str(path), str(target), *options]

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


def every_format(gpt2x: list[str], source: Path, folder: Path, rounds: int) -> None:
    """Measure each reader with safetensors as output, and each writer with safetensors as input."""
    print("\nAll formats, the same weights\n")
    folder = folder / "formats"
    folder.mkdir()
    model = folder / "m.safetensors"
    written = {"bin": "m.bin", "nanogpt": "ckpt.pt", "llmc": "m.llmc", "gguf": "m.gguf"}

    def convert(path: Path, *options: str) -> Callable[[Path], list[str]]:
        return lambda target: [*gpt2x, "convert", str(path), str(target), *options]

    subprocess.run([*gpt2x, "convert", str(source), str(model)], check=True, stdout=subprocess.DEVNULL)
    jobs = {"cp and sync": lambda target: copy(model, target)}
    for kind, name in written.items():
        path = folder / name
        subprocess.run([*gpt2x, "convert", str(model), str(path), "--to", kind], check=True, stdout=subprocess.DEVNULL)
        jobs[f"safetensors -> {kind}"] = convert(model, "--to", kind)
        jobs[f"{kind} -> safetensors"] = convert(path, "--to", "safetensors")
    jobs["safetensors -> shards"] = convert(model, "--to", "hf", "--max-shard-size", "100MB")
    subprocess.run([*gpt2x, "convert", str(model), str(folder / "hf"), "--max-shard-size", "100MB"], check=True)
    jobs["shards -> safetensors"] = convert(folder / "hf", "--to", "safetensors")
    jobs["nanogpt -> llmc"] = convert(folder / "ckpt.pt", "--to", "llmc")
    for name, make_file in (("legacy bin", legacy), ("HDF5", hdf5), ("msgpack", msgpack), ("ONNX", onnx)):
        path = folder / name.split()[-1].lower()
        in_a_process(make_file, model, path)
        jobs[f"{name} -> safetensors"] = convert(path, "--to", "safetensors")
    table(alternate(jobs, folder / "out", rounds), "cp and sync")
    shutil.rmtree(folder)


def in_a_process(make_file: Callable[[Path, Path], None], model: Path, path: Path) -> None:
    """Make a file in a forked process, so that its memory does not count as that of the measured processes."""
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        return
    make_file(model, path)
    os._exit(0)


def legacy(model: Path, path: Path) -> None:
    import torch

    state = {name: torch.from_numpy(tensor.read()) for name, tensor in open_checkpoint(model).tensors.items()}
    torch.save(state, path, _use_new_zipfile_serialization=False)


def hdf5(model: Path, path: Path) -> None:
    import h5py

    checkpoint = open_checkpoint(model)
    with h5py.File(path, "w") as file:
        for name, tensor in KERAS.write(checkpoint.tensors, checkpoint.config).items():
            file.create_dataset(name, data=tensor.read())


def msgpack(model: Path, path: Path) -> None:
    """Write a file as Flax does."""
    import msgpack as library

    checkpoint = open_checkpoint(model)
    tree: dict[str, Any] = {}
    for name, tensor in FLAX.write(checkpoint.tensors, checkpoint.config).items():
        *above, leaf = name.split("/")
        here = tree
        for key in above:
            here = here.setdefault(key, {})
        array = tensor.read()
        here[leaf] = library.ExtType(1, library.packb((array.shape, array.dtype.name, array.tobytes())))
    path.write_bytes(library.packb(tree))


def onnx(model: Path, path: Path) -> None:
    """Write one file with a transposed copy of the token embedding as ``lm_head``, as optimum does."""
    import onnx as library

    graph = library.GraphProto(name="weights")
    tensors = {name: tensor.read() for name, tensor in open_checkpoint(model).tensors.items()}
    for name, array in {**tensors, "onnx::MatMul_1": tensors["wte.weight"].T}.items():
        graph.initializer.append(library.numpy_helper.from_array(array, name))
    path.write_bytes(library.helper.make_model(graph).SerializeToString())


def start_up(gpt2x: list[str], python: Path, rounds: int) -> None:
    times = [run([*gpt2x, "--help"])[0] for _ in range(rounds + 1)][1:]
    print(f"\n`gpt2x --help`: {statistics.median(times):.3f} s (python -c pass: ", end="")
    print(f"{statistics.median([run([str(python), '-c', 'pass'])[0] for _ in range(rounds)]):.3f} s)")


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
@click.option("--rounds", default=7, show_default=True, help="Rounds to take medians over.")
@click.option("--folder", type=click.Path(path_type=Path), help="Working folder (default: a temporary folder).")
@click.option("--small", is_flag=True, help="Skip the 6.2 GB checkpoint.")
@click.option("--formats", is_flag=True, help="Measure only the table of all formats.")
@click.option(
    "--gpt2x",
    "program",
    type=click.Path(path_type=Path),
    help="gpt2x program to measure (default: the one of this Python).",
)
def main(rounds: int, folder: Path | None, small: bool, formats: bool, program: Path | None) -> None:
    """Measure gpt2x convert next to cp and sync."""
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"
    )
    program = program or Path(sys.executable).with_name("gpt2x")
    gpt2x = [str(program)]
    with tempfile.TemporaryDirectory(dir=folder, prefix="gpt2x-bench-") as name:
        work = Path(name)
        source = make("124M", work)
        if formats:
            every_format(gpt2x, source, work, rounds)
            return
        conversions(gpt2x, source, work, rounds)
        model = work / "m.safetensors"
        subprocess.run([*gpt2x, "convert", str(source), str(model)], check=True, stdout=subprocess.DEVNULL)
        print(
            subprocess.run([sys.executable, "-c", LOAD, str(model)], check=True, capture_output=True, text=True).stdout,
            end="",
        )
        every_format(gpt2x, source, work, rounds)
        start_up(gpt2x, program.with_name("python"), rounds)
        shutil.rmtree(source)
        model.unlink()
        if not small:
            conversions(gpt2x, make("1558M", work), work, 1)


if __name__ == "__main__":
    main()
