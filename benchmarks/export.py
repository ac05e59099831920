"""Measure exporting GPT-2 and running the exported models, next to optimum and mobius-onnx. ``make bench`` runs it.

The models have GPT-2 small's shape and random weights. Exports are whole processes, run alternately. For decoding, each model
stays loaded in its own process; while one works, the others wait. It prints medians and ratios of medians.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from convert import make, run

QUIET = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

# One model in one process. It reads lines "prompt new", and answers with the median seconds of three prefills and the seconds
# of each step after the last one.
WORKER = """
import json, sys, time
import numpy as np
kind, path = sys.argv[1:3]
THREADS = 2

def onnx_loop(path):
    # the plain loop: session.run, numpy in and numpy out
    import onnxruntime as ort
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    caches = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
    names = [i.name for i in caches]
    outputs = ["logits"] + [name.replace("past_key_values", "present") for name in names]
    def step(ids, seen, cache):
        past = cache or {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in caches}
        total = seen + ids.shape[1]
        feed = {"input_ids": ids, "attention_mask": np.ones((1, total), np.int64), "position_ids": np.arange(seen, total)[None]}
        logits, *present = session.run(outputs, {**feed, **past})
        return logits[:, -1], dict(zip(names, present))
    return step

def gpt2x_runtime(path):
    from gpt2x.runtimes.onnxruntime import OnnxDecoder
    decoder = OnnxDecoder(path, threads=THREADS)
    return lambda ids, seen, cache: decoder.step(ids, None, np.arange(seen, seen + ids.shape[1])[None], cache)

def torch_loop(decoder):
    import torch
    torch.set_num_threads(THREADS)
    return lambda ids, seen, cache: decoder.step(ids, None, np.arange(seen, seen + ids.shape[1])[None], cache)

def eager(path):
    from gpt2x.load import from_pretrained
    from gpt2x.runtimes.torch import TorchDecoder
    return torch_loop(TorchDecoder(from_pretrained(path)))

def torchscript(path):
    from gpt2x.runtimes.torch import ModuleDecoder
    return torch_loop(ModuleDecoder.from_torchscript(path))

step = {"onnx": onnx_loop, "runtime": gpt2x_runtime, "eager": eager, "torchscript": torchscript}[kind](path)
print("ready", flush=True)
for line in sys.stdin:
    prompt, new = map(int, line.split())
    ids, cache, seen, seconds, prefill = np.random.default_rng(0).integers(50257, size=(1, prompt)), None, 0, [], []
    for _ in range(3):
        start = time.perf_counter()
        step(ids, 0, None)
        prefill.append(time.perf_counter() - start)
    for _ in range(new + 1):
        start = time.perf_counter()
        logits, cache = step(ids, seen, cache)
        seconds.append(time.perf_counter() - start)
        seen += ids.shape[1]
        ids = logits.argmax(-1)[:, None]
    print(json.dumps([sorted(prefill)[1], *seconds[1:]]), flush=True)
"""


class Worker:
    """A process that holds one model."""

    def __init__(self, kind: str, path: Path) -> None:
        command = [sys.executable, "-W", "ignore", "-c", WORKER, kind, str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout and self.process.stdin
        self.out, self.into = self.process.stdout, self.process.stdin
        assert self.out.readline() == "ready\n"

    def __call__(self, prompt: int, new: int) -> list[float]:
        """Return the seconds of the prefill, then of each step."""
        print(prompt, new, file=self.into, flush=True)
        result: list[float] = json.loads(self.out.readline())
        return result

    def close(self) -> None:
        self.into.close()
        self.out.close()
        self.process.wait()


def alternate(workers: dict[str, Worker], prompt: int, new: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Run the workers alternately. Return median seconds of prefill and step, without the first round."""
    seen: dict[str, list[list[float]]] = {name: [] for name in workers}
    for i in range(rounds + 1):
        for name, worker in workers.items():
            result = worker(prompt, new)
            if i:
                seen[name].append(result)
    return {
        name: (statistics.median(r[0] for r in runs), statistics.median(s for r in runs for s in r[1:]))
        for name, runs in seen.items()
    }


def exports(programs: dict[str, list[str]], target: Path, rounds: int) -> None:
    """Measure whole export processes."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    sizes: dict[str, int] = {}
    for i in range(rounds + 1):
        for name, command in programs.items():
            result = run(command)
            if i:
                seen[name].append(result)
            sizes[name] = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
            shutil.rmtree(target)
    base = statistics.median(s for s, _ in seen["optimum"]) if "optimum" in seen else None
    print(
        "\n| export to ONNX | seconds | relative to optimum | peak memory, MB | size, MB |\n| --- | --- | --- | --- | --- |"
    )
    for name, results in seen.items():
        seconds, memory = statistics.median(s for s, _ in results), max(m for _, m in results)
        ratio = f"{seconds / base:.2f}" if base else "-"
        print(f"| {name} | {seconds:.1f} | {ratio} | {memory:.0f} | {sizes[name] / 1e6:.0f} |")


def decoding(workers: dict[str, Worker], base: str, rounds: int, prompts: tuple[int, ...] = (128, 900)) -> None:
    """Measure prefill and decoding of every worker, and the speedup over one of them."""
    print("\n| | prompt | prefill, ms | speedup | decode, tokens/s | speedup |\n" + "| --- " * 6 + "|")
    for prompt in prompts:
        results = alternate(workers, prompt, 32, rounds)
        for name, (prefill, step) in results.items():
            ratios = results[base][0] / prefill, results[base][1] / step
            print(
                f"| {name} | {prompt} | {prefill * 1e3:.0f} | {ratios[0]:.2f} | {1 / step:.1f} | {ratios[1]:.2f} |",
                flush=True,
            )


@click.command()
@click.option("--rounds", default=7, show_default=True, help="Rounds to take medians over.")
@click.option("--folder", type=click.Path(path_type=Path), help="Working folder (default: a temporary folder).")
@click.option("--gpt2x", "program", type=click.Path(path_type=Path), default=Path(sys.executable).with_name("gpt2x"))
@click.option("--optimum", type=click.Path(path_type=Path), help="optimum-cli, in its own environment.")
@click.option("--mobius", type=click.Path(path_type=Path), help="mobius, in its own environment.")
@click.option("--small", is_flag=True, help="Skip the 1558M shape.")
def main(
    rounds: int, folder: Path | None, program: Path, optimum: Path | None, mobius: Path | None, small: bool
) -> None:
    """Measure exports, and the exported models."""
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"
    )
    os.environ.update(QUIET)
    gpt2x = str(program)
    with tempfile.TemporaryDirectory(dir=folder, prefix="gpt2x-bench-") as name:
        work = Path(name)
        source, out = work / "hf", work / "out"
        subprocess.run([gpt2x, "convert", str(make("124M", work)), str(source)], check=True, stdout=subprocess.DEVNULL)
        options = ["--no-tokenizer", "--no-verify"]
        commands = {"gpt2x": [gpt2x, "export", str(source), "--onnx", str(out), *options]}
        if optimum:
            task = ["--task", "text-generation-with-past"]
            commands["optimum"] = [str(optimum), "export", "onnx", "--model", str(source), *task, str(out)]
        if mobius:
            commands["mobius-onnx"] = [str(mobius), "build", "--model", str(source), str(out)]
        exports(commands, out, max(2, rounds // 2))
        run([gpt2x, "export", str(source), "--onnx", str(work / "ours"), *options])
        run([gpt2x, "export", str(source), "--onnx", str(work / "last"), "--logits", "last", *options])
        workers = {
            "gpt2x, plain loop": Worker("onnx", work / "ours/onnx/model.onnx"),
            "gpt2x, OnnxDecoder, --logits last": Worker("runtime", work / "last"),
        }
        if optimum:
            run([*commands["optimum"][:-1], str(work / "optimum")])
            workers["optimum, plain loop"] = Worker("onnx", work / "optimum/model.onnx")
        decoding(workers, list(workers)[-1], rounds)
        for worker in workers.values():
            worker.close()
        run([gpt2x, "export", str(source), "--torchscript", str(work / "m.pt"), "--no-verify"])
        workers = {"TorchScript": Worker("torchscript", work / "m.pt"), "eager": Worker("eager", source)}
        decoding(workers, "eager", rounds)
        for worker in workers.values():
            worker.close()
        for path in list(work.iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not small:
            large = make("1558M", work)
            seconds, memory = run([gpt2x, "export", str(large), "--onnx", str(out), *options])
            size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
            print(f"\nThe 1558M shape: {seconds:.1f} s, {memory:.0f} MB of memory, {size:,} bytes.")


if __name__ == "__main__":
    main()
