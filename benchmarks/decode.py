"""Measure prefill, decoding and memory of gpt2x's ONNX exports, next to transformers, optimum's graph, CTranslate2 and
llama.cpp. ``make bench`` runs it.

The models have GPT-2 small's shape and random weights. Each runs in its own process, in its own environment. The processes
stay loaded and take turns: while one works, the others wait. All use two threads, and the measured time includes greedy
sampling. It prints medians and ratios of medians. A MB is 10^6 bytes.

llama.cpp's cache has half precision, its default; the other caches are float32. CTranslate2 does not expose single steps.
There, a step is the time for 32 more tokens, divided by 32.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import click
from convert import make
from export import QUIET

from gpt2x.bench import machine, streaming
from gpt2x.contract import data_file

THREADS = 2

# gpt2x's models: name, options of the directory, precision.
IN_PLACE, IN_BYTES, GROWING = ("--cache", "inplace"), ("--cache", "inplace-int8"), ("--cache", "growing")
IN_PLACE_128 = (*IN_PLACE, "--block-size", "128")
VARIANTS = (
    ("gpt2x fp32", IN_PLACE, "fp32"),
    ("gpt2x int8", IN_PLACE, "int8"),
    ("gpt2x w8a8", IN_PLACE, "w8a8"),
    ("gpt2x int4", IN_PLACE, "int4"),
    ("gpt2x int8, blocks of 128", IN_PLACE_128, "int8"),
    ("gpt2x int4, blocks of 128", IN_PLACE_128, "int4"),
    ("gpt2x int8, 8-bit cache", IN_BYTES, "int8"),
    ("gpt2x w8a8, 8-bit cache", IN_BYTES, "w8a8"),
    ("gpt2x fp32, growing cache", GROWING, "fp32"),
    ("gpt2x int8, growing cache", GROWING, "int8"),
)
QUANTIZED = ("F32", "Q8_0", "Q4_0")  # llama.cpp's


class Task(NamedTuple):
    """Decode ``new`` tokens after a prompt of ``prompt`` tokens, for ``batch`` sequences at once."""

    prompt: int
    new: int = 32
    batch: int = 1


SHORT, LONG, BATCH, FULL = Task(128), Task(900), Task(128, batch=16), Task(128, new=1024 - 128)
IN_BATCHES = (
    "gpt2x fp32",
    "gpt2x int8",
    "gpt2x w8a8",
    "gpt2x w8a8, 8-bit cache",
    "gpt2x int8, blocks of 128",
    "CTranslate2 fp32",
    "CTranslate2 int8",
)
IN_FULL = ("gpt2x int8", "gpt2x w8a8", "gpt2x int8, 8-bit cache", "CTranslate2 int8", "llama.cpp Q8_0")

# Which decoding speeds are compared: label, task, gpt2x's model, the peer's.
RATIOS = (
    ("fp32", SHORT, "gpt2x fp32", "llama.cpp F32"),
    ("fp32", SHORT, "gpt2x fp32", "transformers, eager"),
    ("int8", SHORT, "gpt2x int8", "llama.cpp Q8_0"),
    ("int8", SHORT, "gpt2x int8", "CTranslate2 int8"),
    ("int8", LONG, "gpt2x int8", "llama.cpp Q8_0"),
    ("int8", LONG, "gpt2x int8", "CTranslate2 int8"),
    ("int4", SHORT, "gpt2x int4", "llama.cpp Q4_0"),
    ("int8", BATCH, "gpt2x int8", "CTranslate2 int8"),
    ("w8a8", SHORT, "gpt2x w8a8", "llama.cpp Q8_0"),
    ("w8a8", SHORT, "gpt2x w8a8", "CTranslate2 int8"),
    ("w8a8", LONG, "gpt2x w8a8", "llama.cpp Q8_0"),
    ("w8a8", LONG, "gpt2x w8a8", "CTranslate2 int8"),
    ("w8a8", BATCH, "gpt2x w8a8", "CTranslate2 int8"),
    ("w8a8, 8-bit cache", SHORT, "gpt2x w8a8, 8-bit cache", "llama.cpp Q8_0"),
    ("w8a8, 8-bit cache", SHORT, "gpt2x w8a8, 8-bit cache", "CTranslate2 int8"),
    ("w8a8, 8-bit cache", BATCH, "gpt2x w8a8, 8-bit cache", "CTranslate2 int8"),
    ("int8, blocks of 128", SHORT, "gpt2x int8, blocks of 128", "llama.cpp Q8_0"),
    ("int8, blocks of 128", SHORT, "gpt2x int8, blocks of 128", "CTranslate2 int8"),
    ("int4, blocks of 128", SHORT, "gpt2x int4, blocks of 128", "llama.cpp Q4_0"),
    ("int8, blocks of 128", BATCH, "gpt2x int8, blocks of 128", "CTranslate2 int8"),
    ("int8, 8-bit cache", SHORT, "gpt2x int8, 8-bit cache", "llama.cpp Q8_0"),
    ("int8, 8-bit cache", LONG, "gpt2x int8, 8-bit cache", "llama.cpp Q8_0"),
    ("int8, 8-bit cache", LONG, "gpt2x int8, 8-bit cache", "CTranslate2 int8"),
)

# -------------------------------------------------------------------------------------------------- code of the workers

# A worker's code is BEGIN, the peer's code, and END. The peer's code defines PACKAGES and either Peer or measure().
BEGIN = f"""
import json, sys, time
import numpy as np
THREADS, VOCABULARY = {THREADS}, 50257
"""

END = """
def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024 / 1e6

def prompts(prompt, batch):
    return np.random.default_rng(0).integers(VOCABULARY, size=(batch, prompt))

def measure_peer(prompt, new, batch):
    # returns the median seconds of three prefills, and the seconds of each step after the last one
    ids, prefills, steps = prompts(prompt, batch), [], []
    for _ in range(3):
        peer.cache = None  # free the memory before the next prefill
        start = time.perf_counter()
        tokens = peer.step(ids, 0).argmax(-1)
        prefills.append(time.perf_counter() - start)
    for i in range(new):
        start = time.perf_counter()
        tokens = peer.step(tokens[:, None], prompt + i).argmax(-1)
        steps.append(time.perf_counter() - start)
    return sorted(prefills)[1], steps

if "measure" not in globals():
    peer, measure = Peer(*sys.argv[1:]), measure_peer
print(*PACKAGES, flush=True)
for line in sys.stdin:
    prefill, steps = measure(**json.loads(line))
    print(json.dumps({"prefill": prefill, "step": steps, "rss_mb": memory("VmRSS"), "peak_mb": memory("VmHWM")}), flush=True)
"""

# step() below takes ids (B, T) and the number of cached tokens, and returns the last logits (B, V).
GPT2X = """
from gpt2x.runtimes.onnxruntime import OnnxDecoder
PACKAGES = ["gpt2x", "onnxruntime"]

class Peer:
    def __init__(self, path, precision):
        self.decoder = OnnxDecoder(path, precision=precision, threads=THREADS)
    def step(self, ids, seen):
        B, T = ids.shape
        logits, self.cache = self.decoder.step(ids, None, np.tile(np.arange(seen, seen + T), (B, 1)), self.cache)
        return logits
"""

TRANSFORMERS = """
import inspect
import torch
from transformers import GPT2LMHeadModel
PACKAGES = ["transformers", "torch"]

class Peer:
    def __init__(self, path):
        torch.set_num_threads(THREADS)
        self.model = GPT2LMHeadModel.from_pretrained(path, attn_implementation="eager").eval()
        known = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.options = {"use_cache": True, **({"logits_to_keep": 1} if known else {})}
    def step(self, ids, seen):
        with torch.inference_mode():
            out = self.model(torch.from_numpy(ids), past_key_values=self.cache, **self.options)
        self.cache = out.past_key_values
        return out.logits[:, -1].numpy()
"""

OPTIMUM = """
import onnxruntime as ort
PACKAGES = ["optimum-onnx", "onnxruntime"]

class Peer:
    # the plain loop: session.run, numpy in and numpy out
    def __init__(self, path):
        options = ort.SessionOptions()
        options.intra_op_num_threads = THREADS
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.caches = {i.name: i.shape for i in self.session.get_inputs() if i.name.startswith("past_key_values.")}
        self.outputs = ["logits"] + [name.replace("past_key_values", "present") for name in self.caches]
    def step(self, ids, seen):
        B, T = ids.shape
        past = self.cache or {n: np.zeros((B, shape[1], 0, shape[3]), np.float32) for n, shape in self.caches.items()}
        positions = np.tile(np.arange(seen, seen + T), (B, 1))
        feed = {"input_ids": ids, "attention_mask": np.ones((B, seen + T), np.int64), "position_ids": positions}
        logits, *present = self.session.run(self.outputs, {**feed, **past})
        self.cache = dict(zip(self.caches, present))
        return logits[:, -1]
"""

CTRANSLATE2 = """
import ctranslate2
PACKAGES = ["ctranslate2"]
path, kind = sys.argv[1:]
generator = ctranslate2.Generator(path, device="cpu", intra_threads=THREADS, inter_threads=1, compute_type=kind)
words = [str(i) for i in range(VOCABULARY - 1)] + ["<|endoftext|>"]

def seconds(texts, n):
    start = time.perf_counter()
    found = generator.generate_batch(
        texts, max_length=n, min_length=n, beam_size=1, sampling_topk=1, include_prompt_in_result=False)
    took = time.perf_counter() - start
    assert all(len(one.sequences_ids[0]) == n for one in found)
    return took

def measure(prompt, new, batch):
    texts = [[words[i] for i in row] for row in prompts(prompt, batch).tolist()]
    prefill = sorted(seconds(texts, 1) for _ in range(3))[1]
    return prefill, [(seconds(texts, 1 + new) - prefill) / new]
"""

LLAMA = """
import llama_cpp
PACKAGES = ["llama-cpp-python"]

class Peer:
    def __init__(self, path):
        self.model = llama_cpp.Llama(
            path, n_ctx=1024, n_batch=1024, n_ubatch=512, n_threads=THREADS, n_threads_batch=THREADS,
            logits_all=False, verbose=False)
    def step(self, ids, seen):
        assert len(ids) == 1
        if not seen:
            self.model.reset()
        self.model.eval(ids[0].tolist())
        return np.ctypeslib.as_array(self.model._ctx.get_logits_ith(-1), (1, VOCABULARY))
"""

# CTranslate2's converter needs a tokenizer. This one has one word for each id.
TO_CTRANSLATE2 = """
import json, sys
from pathlib import Path
from ctranslate2.converters import TransformersConverter
source, folder, *targets = map(Path, sys.argv[1:])
folder.mkdir()
for name in ("config.json", "model.safetensors"):
    (folder / name).symlink_to(source / name)
words = {**{str(i): i for i in range(50256)}, "<|endoftext|>": 50256}
(folder / "vocab.json").write_text(json.dumps(words))
(folder / "merges.txt").write_text("#version: 0.2\\n")
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
for target, kind in zip(targets, ("float32", "int8")):
    TransformersConverter(str(folder)).convert(str(target), quantization=kind)
"""


# -------------------------------------------------------------------------------------------------------------- workers


class Peer(NamedTuple):
    """A model to measure: the Python that runs it, the code, and the code's arguments."""

    python: Path
    code: str
    arguments: tuple[str, ...]


class Answer(TypedDict):
    prefill: float
    step: list[float]
    rss_mb: float
    peak_mb: float


class Result(NamedTuple):
    prefill_ms: float
    decode_tokens_per_s: float  # of all rows together
    rss_mb: float
    peak_mb: float


class Bound(NamedTuple):
    size: int  # bytes
    tokens_per_s: float


def version_of(python: Path, package: str) -> str:
    """Return a package's version. Another process reads it, so that it does not add to the worker's memory."""
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return subprocess.run([python, "-P", "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


class Worker:
    """A process that holds one model."""

    def __init__(self, peer: Peer) -> None:
        code = BEGIN + peer.code + END
        command = [str(peer.python), "-P", "-W", "ignore", "-c", code, *peer.arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout and self.process.stdin
        self.out, self.into = self.process.stdout, self.process.stdin
        packages = self.out.readline().split()
        assert packages, f"{peer.arguments}: the process ended before it was ready"
        self.arguments = peer.arguments
        self.version = ", ".join(f"{name} {version_of(peer.python, name)}" for name in packages)

    def __call__(self, task: Task) -> Answer:
        print(json.dumps(task._asdict()), file=self.into, flush=True)
        line = self.out.readline()
        assert line, f"{self.arguments}: the process ended with {self.process.wait()}"
        answer: Answer = json.loads(line)
        return answer

    def close(self) -> None:
        self.into.close()
        self.out.close()
        self.process.wait()


def alternate(
    workers: dict[str, Worker], task: Task, rounds: int, last: Callable[[], None] = lambda: None
) -> dict[str, Result]:
    """Run the workers alternately, and ``last`` after each round. Return a summary of each, without the first round."""
    seen: dict[str, list[Answer]] = {name: [] for name in workers}
    for i in range(rounds + 1):
        for name, worker in workers.items():
            answer = worker(task)
            if i:
                seen[name].append(answer)
        last()
    return {name: summary(answers, task) for name, answers in seen.items()}


def summary(answers: list[Answer], task: Task) -> Result:
    return Result(
        prefill_ms=1e3 * statistics.median(a["prefill"] for a in answers),
        decode_tokens_per_s=task.batch / statistics.median(step for a in answers for step in a["step"]),
        rss_mb=statistics.median(a["rss_mb"] for a in answers),
        peak_mb=max(a["peak_mb"] for a in answers),
    )


# --------------------------------------------------------------------------------------------------------- measurements


def quietly(command: list[Any]) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def gpt2x_peers(program: Path, source: Path, work: Path) -> dict[str, Peer]:
    """Export every variant. Variants with the same options share a directory."""
    folders: dict[tuple[str, ...], Path] = {}
    for _, options, _ in VARIANTS:
        if options not in folders:
            folders[options] = work / f"gpt2x-{len(folders)}"
            kinds = ",".join(precision for _, others, precision in VARIANTS if others == options)
            how = ["--precision", kinds, *options, "--logits", "last", "--no-tokenizer", "--no-verify"]
            quietly([program, "export", source, "--onnx", folders[options], *how])
    python = program.with_name("python")
    return {name: Peer(python, GPT2X, (str(folders[how]), precision)) for name, how, precision in VARIANTS}


def optimum_peers(python: Path, source: Path, work: Path) -> dict[str, Peer]:
    cli, task, target = python.with_name("optimum-cli"), "text-generation-with-past", work / "optimum"
    quietly([cli, "export", "onnx", "--model", source, "--task", task, target])
    return {"optimum's graph": Peer(python, OPTIMUM, (str(target / "model.onnx"),))}


def ctranslate2_peers(python: Path, source: Path, work: Path) -> dict[str, Peer]:
    kinds = {"fp32": "float32", "int8": "int8"}
    paths = [work / f"ctranslate2-{kind}" for kind in kinds]
    quietly([python, "-P", "-W", "ignore", "-c", TO_CTRANSLATE2, source, work / "ctranslate2-hf", *paths])
    return {
        f"CTranslate2 {kind}": Peer(python, CTRANSLATE2, (str(path), kinds[kind]))
        for kind, path in zip(kinds, paths, strict=True)
    }


def llama_peers(python: Path, source: Path, work: Path) -> dict[str, Peer]:
    peers = {}
    for kind in QUANTIZED:
        path = work / f"{kind}.gguf"
        quietly([python, Path(__file__).with_name("to_gguf.py"), source, path, kind])
        peers[f"llama.cpp {kind}"] = Peer(python, LLAMA, (str(path),))
    return peers


class Bounds:
    """Measures how long it takes to read as many bytes from memory as each of gpt2x's weight files has."""

    def __init__(self, peers: dict[str, Peer]) -> None:
        files = {name: Path(peers[name].arguments[0]) / "onnx" / data_file(kind) for name, _, kind in VARIANTS}
        self.sizes = {name: file.stat().st_size for name, file in files.items()}
        self.seconds: dict[int, list[float]] = {size: [] for size in self.sizes.values()}

    def read(self) -> None:
        """Measure every size once."""
        for size, seconds in self.seconds.items():
            seconds.append(streaming(size, THREADS))

    def found(self) -> dict[str, Bound]:
        """Return the bound of every variant, without the first round."""
        return {name: Bound(size, 1 / statistics.median(self.seconds[size][1:])) for name, size in self.sizes.items()}


def full_context(peers: dict[str, Peer]) -> dict[str, Result]:
    """Measure a full context, each model in a new process, one after another."""
    results = {}
    for name in IN_FULL:
        if name in peers:
            worker = Worker(peers[name])
            results[name] = summary([worker(FULL)], FULL)
            worker.close()
    return results


class Ratio(NamedTuple):
    """Speed or memory of gpt2x, divided by the peer's."""

    what: str
    gpt2x: str
    peer: str
    ratio: float


def is_ours(name: str) -> bool:
    return name.startswith("gpt2x")


def ratios(results: dict[Task, dict[str, Result]], full: dict[str, Result]) -> list[Ratio]:
    """Return the ratios of all pairs that were measured."""
    found = []
    for what, task, ours, theirs in RATIOS:
        if {ours, theirs} <= results[task].keys():
            speeds = [results[task][name].decode_tokens_per_s for name in (ours, theirs)]
            found.append(Ratio(f"decode {what}, {said(task)}", ours, theirs, speeds[0] / speeds[1]))
    for task in (SHORT, LONG):
        names = sorted(results[task], key=lambda name: results[task][name].prefill_ms)
        ours = next(filter(is_ours, names))
        for theirs in [name for name in names if not is_ours(name)][:1]:
            times = results[task][theirs].prefill_ms / results[task][ours].prefill_ms
            found.append(Ratio(f"prefill, the fastest of each, {said(task)}", ours, theirs, times))
    for ours in filter(is_ours, full):
        for theirs in (name for name in full if not is_ours(name)):
            found.append(Ratio("peak memory", ours, theirs, full[ours].peak_mb / full[theirs].peak_mb))
            found.append(Ratio("resident memory", ours, theirs, full[ours].rss_mb / full[theirs].rss_mb))
    return found


# --------------------------------------------------------------------------------------------------------------- output


def said(task: Task) -> str:
    return f"prompt {task.prompt}" + (f", batch {task.batch}" if task.batch > 1 else "")


def show(title: str, head: str, rows: list[str]) -> None:
    """Print a Markdown table."""
    print(f"\n{title}\n\n| {head} |\n" + "| --- " * (head.count("|") + 1) + "|")
    print("\n".join(f"| {row} |" for row in rows), flush=True)


def show_speed(task: Task, results: dict[str, Result]) -> None:
    rows = [
        f"{name} | {r.prefill_ms:.0f} | {r.decode_tokens_per_s:.1f} | {r.rss_mb:.0f}" for name, r in results.items()
    ]
    show(f"{said(task).capitalize()}, {task.new} new tokens", "| prefill, ms | decode, tokens/s | resident, MB", rows)


def show_bounds(found: dict[str, Bound], results: dict[str, Result]) -> None:
    rows = []
    for name, (size, bound) in found.items():
        share = results[name].decode_tokens_per_s / bound
        rows.append(f"{name} | {size / 1e6:.0f} | {size * bound / 1e9:.1f} | {bound:.1f} | {share:.2f}")
    head = "| weights, MB | memory bandwidth, GB/s | bound, tokens/s | utilization, decode at prompt 128"
    show("Memory-bandwidth bound: every byte of gpt2x's weights is read once per token", head, rows)


def show_memory(full: dict[str, Result]) -> None:
    rows = [f"{name} | {r.peak_mb:.0f} | {r.rss_mb:.0f}" for name, r in full.items()]
    show(f"A new process: prompt {FULL.prompt}, then decoding until 1024 tokens", "| peak, MB | resident, MB", rows)


def show_ratios(found: list[Ratio]) -> None:
    rows = [f"{what} | {mine} | {theirs} | {ratio:.2f}" for what, mine, theirs, ratio in found]
    show(
        "gpt2x / peer: speed (above 1: gpt2x is faster), memory (below 1: gpt2x needs less)",
        "| gpt2x's | peer's | ratio",
        rows,
    )


def plot(results: dict[Task, dict[str, Result]], found: dict[str, Bound], path: Path) -> None:
    """Plot the decoding speeds of one row after both prompts, and gpt2x's memory-bandwidth bounds."""
    from matplotlib.figure import Figure

    names = list(results[SHORT])[::-1]
    figure = Figure(figsize=(8, 1 + 0.42 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for task, shift, strength in ((SHORT, 0.2, 1.0), (LONG, -0.2, 0.5)):
        speeds = [results[task][name].decode_tokens_per_s for name in names]
        colors = ["tab:blue" if is_ours(name) else "tab:gray" for name in names]
        places = [i + shift for i in range(len(names))]
        bars = axes.barh(places, speeds, 0.4, color=colors, alpha=strength)
        axes.bar_label(bars, [f"{speed:.0f}" for speed in speeds], padding=3, fontsize=8)
    for name, bound in found.items():
        row = names.index(name)
        axes.plot([bound.tokens_per_s] * 2, [row - 0.4, row + 0.4], color="tab:red")
    axes.set_yticks(range(len(names)), names)
    axes.margins(x=0.1)
    axes.set_xlabel("tokens/s")
    title = f"Decoding, GPT-2 small, {THREADS} threads: after {SHORT.prompt} tokens (pale: after {LONG.prompt})"
    axes.set_title(title + "\nred: memory-bandwidth bound", fontsize=10)
    figure.savefig(path, dpi=120)


def write_json(
    path: Path, about: dict[str, Any], results: dict[Task, dict[str, Result]], found: dict[str, Bound],
    full: dict[str, Result], compared: list[Ratio],
) -> None:  # fmt: skip
    runs = [
        {"name": name, **task._asdict(), **result._asdict()}
        for task, of in results.items()
        for name, result in of.items()
    ]
    answer = {
        **about,
        "runs": runs,
        "bounds": {name: bound._asdict() for name, bound in found.items()},
        "full_context": {name: result._asdict() for name, result in full.items()},
        "ratios": [ratio._asdict() for ratio in compared],
    }
    path.write_text(json.dumps(answer, indent=2) + "\n")


PATH = click.Path(path_type=Path)


@click.command()
@click.option("--rounds", default=7, show_default=True, help="Rounds to take medians over.")
@click.option("--folder", type=PATH, help="Working folder (default: a temporary folder).")
@click.option(
    "--gpt2x", "program", type=PATH, default=Path(sys.executable).with_name("gpt2x"), help="gpt2x program to measure."
)
@click.option("--transformers", type=PATH, help="Python with torch and transformers.")
@click.option("--optimum", type=PATH, help="Python with optimum and onnxruntime; optimum-cli in the same folder.")
@click.option("--ctranslate2", type=PATH, help="Python with ctranslate2, torch and transformers < 5.")
@click.option("--llama", type=PATH, help="Python with llama-cpp-python, gguf and safetensors.")
@click.option("--plot", "picture", type=PATH, help="Plot the decoding speeds to this PNG.")
@click.option("--json", "answer", type=PATH, help="Write all results to this file.")
def main(
    rounds: int, folder: Path | None, program: Path, transformers: Path | None, optimum: Path | None,
    ctranslate2: Path | None, llama: Path | None, picture: Path | None, answer: Path | None,
) -> None:  # fmt: skip
    """Measure prefill, decoding and memory. Programs without an option are skipped."""
    os.environ.update(QUIET)
    about: dict[str, Any] = {"machine": machine(THREADS), "rounds": rounds}
    print(", ".join(f"{name} {value}" for name, value in about["machine"].items() if name != "onnxruntime"))
    with tempfile.TemporaryDirectory(dir=folder, prefix="gpt2x-bench-") as name:
        work = Path(name).absolute()
        source = work / "hf"
        quietly([program, "convert", make("124M", work), source])
        peers = gpt2x_peers(program, source, work)
        if transformers:
            peers["transformers, eager"] = Peer(transformers, TRANSFORMERS, (str(source),))
        if optimum:
            peers |= optimum_peers(optimum, source, work)
        if ctranslate2:
            peers |= ctranslate2_peers(ctranslate2, source, work)
        if llama:
            peers |= llama_peers(llama, source, work)

        bounds = Bounds(peers)
        workers = {name: Worker(peer) for name, peer in peers.items()}
        about["versions"] = {name: worker.version for name, worker in workers.items()}
        print("\n".join(dict.fromkeys(about["versions"].values())))
        results: dict[Task, dict[str, Result]] = {}
        for task in (SHORT, LONG, BATCH):
            some = {name: worker for name, worker in workers.items() if task != BATCH or name in IN_BATCHES}
            results[task] = alternate(some, task, rounds, bounds.read if task == SHORT else lambda: None)
            show_speed(task, results[task])
        found = bounds.found()
        show_bounds(found, results[SHORT])
        for worker in workers.values():
            worker.close()
        full = full_context(peers)
    show_memory(full)
    compared = ratios(results, full)
    show_ratios(compared)
    if picture:
        plot(results, found, picture)
    if answer:
        write_json(answer, about, results, found, full, compared)


if __name__ == "__main__":
    main()
