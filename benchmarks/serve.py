"""Measure ``gpt2x serve`` under load, next to llama.cpp's server (of xllamacpp) and CTranslate2 behind FastAPI.

    python benchmarks/serve.py --tokenizer DIR --llama PYTHON --ctranslate2 PYTHON
    python benchmarks/serve.py --tokenizer DIR --prefix

The model has GPT-2 small's shape and random weights. Clients send prompts of 16 to 700 tokens, each one after the other, and
read greedy texts of 8 to 48 tokens as a stream. The requests are the same for all servers, and differ only by the
number of clients, so that no prefix cache helps. One server runs at a time, with two threads. A MB is 10^6 bytes.

``RunningBatch`` is gpt2x's batch without HTTP: it does the same work in the same pieces in a plain loop, so the difference is
the cost of HTTP, scheduling and the clients, whose own CPU time is printed. gpt2x's models are exported with ``--logits last``, as
decoding needs no others. llama.cpp's server batches up to 16 texts. CTranslate2 has no server; FastAPI runs one text at a time.

``--prefix`` measures the time to the first token of prompts that begin with the same 600 tokens, cached and not, of gpt2x alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from models import random_model, tokenizer_in

from converters import save_checkpoint
from gpt2x import ExportOptions, export_onnx
from gpt2x.bench import machine
from gpt2x.tokenizer import Tokenizer
from gpt2x.verify.sample_text import default_text

THREADS = 2
ROWS = 32  # of gpt2x's batch, its default
PROMPT = (16, 700)  # tokens
NEW = (8, 48)
CLIENTS = (1, 4, 16, 64)
PREFIX = 600  # tokens
GOAL_COST = 1.10  # of HTTP and scheduling
GOAL_PREFIX = 3.0
READY = 120.0  # seconds that a server may take to start
CONTEXT = 1024
SLOTS = 16  # of llama.cpp's server, which takes memory for all of them

# ------------------------------------------------------------------------------------------------- code of the processes

# Arguments: directory, precision. Reads requests as JSON, and prints the seconds that they took.
ALONE = f"""
import json, sys, time
from collections import deque
from gpt2x.runtimes.batching import RunningBatch
from gpt2x.runtimes.onnxruntime import OnnxDecoder
from gpt2x.serving.prefix_cache import PIECE

decoder = OnnxDecoder(sys.argv[1], precision=sys.argv[2], threads={THREADS})

def run(requests, rows):
    waiting, last, left, reading = deque(requests), {{}}, {{}}, None
    with RunningBatch(decoder) as batch:
        batch.reserve(rows, {CONTEXT})
        start = time.perf_counter()
        while waiting or left or reading:
            if reading is None and waiting and len(left) < rows:
                prompt, new = waiting.popleft()
                reading = batch.begin()
            if reading is not None:
                logits = reading.read(prompt[reading.length : reading.length + PIECE])
                if reading.length == len(prompt):
                    sequence, reading = batch.finish(reading), None
                    last[sequence], left[sequence] = int(logits[-1].argmax()), new - 1
            for sequence in [one for one in left if not left[one]]:
                batch.leave(sequence)
                del last[sequence], left[sequence]
            for sequence, logits in batch.step(last).items():
                last[sequence] = int(logits.argmax())
                left[sequence] -= 1
        return time.perf_counter() - start

run([([1, 2, 3], 3)], 1)
print("ready", flush=True)
for line in sys.stdin:
    print(run(**json.loads(line)), flush=True)
"""

# Arguments: model, tokenizer.json, port.
FASTAPI = f"""
import json, sys
import ctranslate2, uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from tokenizers import Tokenizer

generator = ctranslate2.Generator(sys.argv[1], intra_threads={THREADS}, inter_threads=1, compute_type="int8")
tokenizer = Tokenizer.from_file(sys.argv[2])
app = FastAPI()

class Completion(BaseModel):
    prompt: str
    max_tokens: int

def events(body):
    ids, shown, n = [], "", body.max_tokens
    prompt = tokenizer.encode(body.prompt).tokens
    for step in generator.generate_tokens(prompt, max_length=n, min_length=n, sampling_topk=1):
        ids.append(step.token_id)
        text = tokenizer.decode(ids)
        if not text.endswith("\\ufffd") and len(text) > len(shown):
            yield event(text[len(shown):], None)
            shown = text
    yield event("", "length" if len(ids) == n else "stop")
    yield "data: [DONE]\\n\\n"

def event(text, reason):
    return "data: " + json.dumps({{"choices": [{{"text": text, "finish_reason": reason}}]}}) + "\\n\\n"

@app.get("/v1/models")
def models():
    return {{}}

@app.post("/v1/completions")
def complete(body: Completion):
    return StreamingResponse(events(body), media_type="text/event-stream")

uvicorn.run(app, port=int(sys.argv[3]), log_level="error")
"""

# Arguments: model, port.
LLAMA = f"""
import sys, time
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_parallel = {SLOTS}
params.n_ctx = {SLOTS} * {CONTEXT}
params.n_gpu_layers = 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = {THREADS}
params.port = int(sys.argv[2])
params.verbosity = -1
server = xllamacpp.Server(params)
while True:
    time.sleep(60)
"""

TO_CTRANSLATE2 = """
import sys
from ctranslate2.converters import TransformersConverter
TransformersConverter(sys.argv[1]).convert(sys.argv[2], quantization="int8")
"""


# -------------------------------------------------------------------------------------------------------------- requests


@dataclass(frozen=True)
class Ask:
    """A prompt, as text and as tokens, and how many tokens continue it."""

    text: str
    tokens: Sequence[int]
    new: int


@dataclass
class Heard:
    """When the pieces of an answer came, in seconds after it was asked for."""

    pieces: list[float]

    @property
    def first(self) -> float:
        return self.pieces[0]

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.pieces, self.pieces[1:], strict=False)]


class Prompts:
    """Makes prompts of random words.

    Args:
        tokenizer: the model's.
        seed: of the lengths and the words.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.words = default_text().split()

    def asks(self, n: int, key: int) -> list[Ask]:
        """Return n requests. Their lengths are the same for every key, and their words differ."""
        lengths = np.random.default_rng(self.seed)
        words = np.random.default_rng((self.seed, key))
        found = []
        for _ in range(n):
            prompt, new = int(lengths.integers(*PROMPT)), int(lengths.integers(*NEW))
            found.append(self.ask(prompt, new, words))
        return found

    def ask(self, length: int, new: int, rng: np.random.Generator, start: str = "") -> Ask:
        """Return a request of about so many tokens."""
        text = start + " ".join(rng.choice(self.words, length))
        tokens = self.tokenizer.encode(text)[:length]
        text = self.tokenizer.decode(tokens)
        return Ask(text, self.tokenizer.encode(text), new)


# --------------------------------------------------------------------------------------------------------------- servers


@dataclass(frozen=True)
class Peer:
    """A server to measure: a command that listens on the port that is added to it."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Running:
    """A server that takes requests."""

    peer: Peer
    port: int
    process: subprocess.Popen[bytes]

    def peak_mb(self) -> float:
        """Return its largest resident memory so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6


@contextlib.contextmanager
def started(peer: Peer) -> Iterator[Running]:
    """Start a server, wait until it answers, and end it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen([*peer.command, str(port)], stdout=subprocess.DEVNULL, env=os.environ) as process:
        try:
            if not ready(process, port):
                raise click.ClickException(f"{peer.name}: the server did not start")
            yield Running(peer, port, process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def ready(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until a server answers. Returns False if it ends before, or takes too long."""
    end = time.monotonic() + READY
    while process.poll() is None and time.monotonic() < end:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/v1/models")
            if connection.getresponse().status == 200:
                return True
        except OSError:
            time.sleep(0.1)
        finally:
            connection.close()
    return False


async def heard(server: Running, ask: Ask) -> Heard:
    """Send a request, and note when the pieces of its text come."""
    body = {"prompt": ask.text, "max_tokens": ask.new, "temperature": 0, "stream": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" \
           f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"  # fmt: skip
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head.encode() + data)
    events = []
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            events.append((time.perf_counter() - start, line[6:]))
    writer.close()
    choices = [(at, json.loads(event)["choices"][0]) for at, event in events]
    if not choices or choices[-1][1]["finish_reason"] != "length":
        raise click.ClickException(f"{server.peer.name}: the answer did not end with its {ask.new} tokens")
    return Heard([at for at, choice in choices if choice["text"]] or [choices[-1][0]])


@dataclass(frozen=True)
class Load:
    """What a server did with a number of clients.

    Attributes:
        clients: their number.
        seconds: for all requests.
        new: tokens that were generated.
        tokens: with those of the prompts.
        heard: one for each request.
        cpu: seconds of CPU time that the clients took of the cores that they share with the server.
    """

    clients: int
    seconds: float
    new: int
    tokens: int
    heard: Sequence[Heard]
    cpu: float


async def load(server: Running, asks: Sequence[Ask], clients: int) -> Load:
    """Send requests from so many clients; each sends its next when an answer is complete."""
    waiting = iter(asks)
    found: list[Heard] = []

    async def client() -> None:
        for ask in waiting:
            found.append(await heard(server, ask))

    start, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(clients)))
    return loaded(asks, clients, time.perf_counter() - start, found, time.process_time() - cpu)


def loaded(asks: Sequence[Ask], clients: int, seconds: float, found: Sequence[Heard], cpu: float = 0.0) -> Load:
    new = sum(ask.new for ask in asks)
    return Load(clients, seconds, new, new + sum(len(ask.tokens) for ask in asks), found, cpu)


# ---------------------------------------------------------------------------------------------------------- measurements


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        prompts: makes the requests.
        clients: how many send them.
        requests: at least so many, and one for each client.
    """

    prompts: Prompts
    clients: Sequence[int]
    requests: int

    def asks(self, clients: int) -> list[Ask]:
        return self.prompts.asks(max(self.requests, clients), clients)


def serve_loads(peer: Peer, plan: Plan) -> list[Load]:
    """Measure a server with each number of clients, and print the results."""
    loads = []
    with started(peer) as server:
        asyncio.run(heard(server, plan.prompts.asks(1, 0)[0]))
        for clients in plan.clients:
            loads.append(asyncio.run(load(server, plan.asks(clients), clients)))
            show(peer.name, loads[-1], server.peak_mb())
    return loads


def batch_loads(name: str, folder: Path, precision: str, plan: Plan) -> list[Load]:
    """Measure ``RunningBatch`` alone with the same requests, and print the results."""
    command = [sys.executable, "-c", ALONE, str(folder), precision]
    loads = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        for clients in plan.clients:
            asks = plan.asks(clients)
            task = {"requests": [(list(ask.tokens), ask.new) for ask in asks], "rows": min(clients, ROWS)}
            print(json.dumps(task), file=process.stdin, flush=True)
            loads.append(loaded(asks, clients, float(process.stdout.readline()), []))
            show(name, loads[-1], None)
        process.stdin.close()
    return loads


def measure_prefix(peer: Peer, prompts: Prompts, pairs: int) -> float:
    """Return how much longer the first token takes without the prefix cache than with it."""
    rng = np.random.default_rng(prompts.seed)
    times: dict[bool, list[float]] = {False: [], True: []}
    with started(peer) as server:
        asyncio.run(heard(server, prompts.ask(16, 2, rng)))
        for _ in range(pairs):
            start = prompts.ask(PREFIX, 1, rng)
            for cached in (False, True):
                end = prompts.ask(24, 2, rng).text
                ask = Ask(f"{start.text} {end}", (), 2)
                times[cached].append(asyncio.run(heard(server, ask)).first)
    medians = {cached: statistics.median(each) for cached, each in times.items()}
    print(f"{peer.name}, {PREFIX} tokens of {pairs} prompts: first token after {1e3 * medians[False]:.0f} ms, "
          f"cached {1e3 * medians[True]:.0f} ms")  # fmt: skip
    return medians[False] / medians[True]


# ---------------------------------------------------------------------------------------------------------------- output


HEAD = (
    f"| {'':26} | clients | requests | new tokens/s | all tokens/s | first token, ms: p50 |  p95 |  p99 "
    "| per token, ms: p50 |  p95 |  p99 | peak MB | seconds | clients' CPU |"
)


def show(name: str, found: Load, peak: float | None) -> None:
    """Print a row of the table."""
    firsts = percentiles([each.first for each in found.heard])
    gaps = percentiles([gap for each in found.heard for gap in each.gaps])
    requests = len(found.heard) or "same"
    speed = f"{found.new / found.seconds:12.1f} | {found.tokens / found.seconds:12.1f}"
    memory = "" if peak is None else f"{peak:.0f}"
    print(f"| {name:26} | {found.clients:7} | {requests:>8} | {speed} | {firsts[0]:>20} | {firsts[1]:>4} | {firsts[2]:>4} "
          f"| {gaps[0]:>18} | {gaps[1]:>4} | {gaps[2]:>4} | {memory:>7} "
          f"| {found.seconds:7.2f} | {found.cpu:12.2f} |", flush=True)  # fmt: skip


def percentiles(seconds: Sequence[float]) -> list[str]:
    """Return the median, p95 and p99 in milliseconds."""
    if not seconds:
        return ["", "", ""]
    return [f"{1e3 * value:.0f}" for value in np.percentile(seconds, (50, 95, 99))]


def verdict(what: str, ratio: float, goal: str, reached: bool) -> None:
    print(f"{what}: {ratio:.2f} (goal: {goal}){'' if reached else ': missed'}")


# ------------------------------------------------------------------------------------------------------------------ main


def quietly(command: Sequence[Any]) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def prepared(work: Path, tokenizer: Path | None, precisions: Sequence[str]) -> Tokenizer:
    """Write the model for gpt2x, and in Hugging Face's layout for the others. Returns its tokenizer."""
    checkpoint = random_model(tokenizer=tokenizer_in(tokenizer, work))
    save_checkpoint(checkpoint, work / "hf", "hf")
    options = ExportOptions(tuple(precisions), "inplace", last=True)
    export_onnx(checkpoint, work / "onnx", options)
    return Tokenizer.from_pretrained(work / "onnx")


def gpt2x_peer(folder: Path, precision: str) -> Peer:
    options = ("--precision", precision, "--threads", str(THREADS), "--max-batch-size", str(ROWS))
    command = (sys.executable, "-m", "gpt2x", "serve", str(folder), *options, "--port")
    return Peer(f"gpt2x serve {precision}", command)


def llama_peer(python: Path, work: Path) -> Peer:
    file = work / "q8_0.gguf"
    quietly([sys.executable, "-m", "gpt2x", "convert", work / "hf", file, "--dtype", "q8_0"])
    return Peer("llama.cpp Q8_0", (str(python), "-P", "-c", LLAMA, str(file)))


def ctranslate2_peer(python: Path, work: Path) -> Peer:
    folder = work / "ctranslate2"
    quietly([python, "-P", "-W", "ignore", "-c", TO_CTRANSLATE2, work / "hf", folder])
    code = (str(python), "-P", "-W", "ignore", "-c", FASTAPI, str(folder), str(work / "hf" / "tokenizer.json"))
    return Peer("CTranslate2 int8, FastAPI", code)


PATH = click.Path(path_type=Path)


@click.command()
@click.option("--tokenizer", type=PATH, help="Directory with GPT-2's tokenizer (default: a made-up one of its size).")
@click.option("--precision", "precisions", multiple=True, default=("int8", "w8a8"), show_default=True, help="gpt2x's.")
@click.option("--llama", type=PATH, help="Python with xllamacpp.")
@click.option("--ctranslate2", type=PATH, help="Python with ctranslate2, fastapi, uvicorn, torch and transformers < 5.")
@click.option("--clients", type=int, multiple=True, default=CLIENTS, show_default=True, help="Numbers of clients.")
@click.option("--requests", default=16, show_default=True, help="Requests for each number of clients, at least.")
@click.option("--seed", default=0, show_default=True, help="Seed of the requests.")
@click.option("--prefix", is_flag=True, help="Measure prompts that begin alike, and nothing else.")
@click.option("--folder", type=PATH, help="Parent of the working folder (default: the system's temporary folder).")
def main(
    tokenizer: Path | None, precisions: tuple[str, ...], llama: Path | None, ctranslate2: Path | None,
    clients: tuple[int, ...], requests: int, seed: int, prefix: bool, folder: Path | None,
) -> None:  # fmt: skip
    """Measure servers under load. Programs without an option are skipped."""
    print(", ".join(f"{name} {value}" for name, value in machine(THREADS).items()))
    with tempfile.TemporaryDirectory(dir=folder, prefix="gpt2x-serve-") as name:
        work = Path(name)
        prompts = Prompts(prepared(work, tokenizer, precisions), seed)
        if prefix:
            for precision in precisions:
                ratio = measure_prefix(gpt2x_peer(work / "onnx", precision), prompts, requests)
                verdict("time to first token, not cached / cached", ratio, f"{GOAL_PREFIX:g}", ratio >= GOAL_PREFIX)
            return
        plan = Plan(prompts, clients, requests)
        print(HEAD + "\n" + "| --- " * HEAD[1:].count("|") + "|", flush=True)
        costs = [gpt2x_costs(work / "onnx", precision, plan) for precision in precisions]
        if llama:
            serve_loads(llama_peer(llama, work), plan)
        if ctranslate2:
            serve_loads(ctranslate2_peer(ctranslate2, work), plan)
    print("\nTime of gpt2x serve / RunningBatch alone")
    for precision, ratios in zip(precisions, costs, strict=True):
        for each, ratio in zip(clients, ratios, strict=True):
            verdict(f"{precision}, {each} clients", ratio, f"{GOAL_COST:.2f}", ratio <= GOAL_COST)


def gpt2x_costs(folder: Path, precision: str, plan: Plan) -> list[float]:
    """Measure gpt2x's server and its batch. Returns the ratios of the times for each number of clients."""
    served = serve_loads(gpt2x_peer(folder, precision), plan)
    alone = batch_loads(f"RunningBatch {precision}", folder, precision, plan)
    return [one.seconds / other.seconds for one, other in zip(served, alone, strict=True)]


if __name__ == "__main__":
    main()
