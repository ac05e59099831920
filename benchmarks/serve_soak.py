"""Send thousands of requests to ``gpt2x serve``, many of them from clients that misbehave, and check what is left.

    python benchmarks/serve_soak.py [--requests 20000] [--seed 0]

The server runs the model that ships with gpt2x, in a process of its own. Some clients go away in the middle of an answer or of a
body, some send bodies that are not valid, and some read slowly. It checks that

- the server's memory grows by at most 10% after long prompts and a fifth of the requests,
- no text runs or waits at the end, no connection is open, and the server is healthy,
- every hundredth text is the one that ``generate`` finds,
- every answer has the expected status, and every error OpenAI's form and the expected code.

Exit code 1 if one of them does not hold. The requests depend on the seed alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from converters import open_checkpoint
from gpt2x import SHAKESPEARE, ExportOptions, export_onnx
from gpt2x.generation.config import GenerationConfig
from gpt2x.generation.generate import continuations
from gpt2x.runtimes.onnxruntime import OnnxDecoder
from gpt2x.tokenizer import Tokenizer
from gpt2x.verify.sample_text import default_text

CLIENTS = 16
OPTIONS = ("--threads", "1", "--max-batch-size", "8", "--cache-memory", "32M")
CHECKED = 100  # each such request is compared
LONG = 64  # long prompts before all others
WARM = 5  # one part of so many requests, before memory should not grow
GROWTH = 1.10
SETTLE = 60.0  # seconds that the server has to end what is left
SHARES = {"whole": 0.5, "stream": 0.25, "leave": 0.1, "invalid": 0.1, "slow": 0.05}

# Bodies that are refused, and the code of each.
INVALID: Sequence[tuple[bytes, str]] = (
    (b"", "invalid_json"),
    (b"{", "invalid_json"),
    (b"\xff\xfe", "invalid_json"),
    (b"[" * 5000, "invalid_json"),
    (b"[]", "invalid_value"),
    (b"{}", "invalid_value"),
    (b'{"prompt": 1.5}', "invalid_value"),
    (b'{"prompt": "a", "temprature": 1}', "invalid_value"),
    (b'{"prompt": "a", "max_tokens": -1}', "invalid_value"),
    (b'{"prompt": [999999]}', "invalid_value"),
    (b'{"prompt": "a", "max_tokens": 100000}', "context_length_exceeded"),
    (b'{"prompt": "a", "model": "none"}', "model_not_found"),
    (b'{"prompt": "a", "logit_bias": {"0": 101}}', "invalid_value"),
)


# --------------------------------------------------------------------------------------------------------------- clients


@dataclass
class Answer:
    """What came back, up to where the client read."""

    data: bytes

    @property
    def status(self) -> int:
        found = re.match(rb"HTTP/1.1 (\d{3}) ", self.data)
        return int(found[1]) if found else 0

    @property
    def body(self) -> Any:
        return json.loads(self.data.partition(b"\r\n\r\n")[2])

    @property
    def events(self) -> list[Any]:
        """The data of server-sent events."""
        return [json.loads(line[6:]) for line in self.data.splitlines() if line.startswith(b"data: {")]

    @property
    def complete(self) -> bool:
        return b"data: [DONE]" in self.data


@dataclass
class Tally:
    """What was seen."""

    kinds: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    wrong_texts: list[str] = field(default_factory=list)
    checked: int = 0
    memory: list[float] = field(default_factory=list)  # MB, after each hundredth of the requests

    @property
    def done(self) -> int:
        return sum(self.kinds.values())


class Soak:
    """Clients of a server.

    Args:
        port: the server's.
        seed: of the requests.
        greedy: the greedy text after a prompt, of so many tokens.
        tally: where what is seen is counted.
    """

    def __init__(self, port: int, seed: int, greedy: Greedy, tally: Tally) -> None:
        self.port = port
        self.seed = seed
        self.greedy = greedy
        self.tally = tally
        self.words = default_text().split()

    async def request(self, number: int) -> None:
        """Send a request, which depends on its number and the seed alone, and check the answer."""
        rng = np.random.default_rng((self.seed, number))
        kind = str(rng.choice(list(SHARES), p=list(SHARES.values())))
        if number % CHECKED == 0:
            kind = "checked"
        await getattr(self, kind)(rng, number)
        self.tally.kinds[kind] += 1

    async def warm_up(self) -> None:
        """Send as many long prompts as fill all rows and the prefix cache."""
        rng = np.random.default_rng(self.seed)
        for _ in range(LONG // CLIENTS):
            prompts = rng.integers(1000, size=(CLIENTS, 200)).tolist()
            bodies = [json.dumps({"prompt": prompt, "max_tokens": 50}) for prompt in prompts]
            await asyncio.gather(*(self.send(body.encode()) for body in bodies))

    def completion(self, rng: np.random.Generator) -> dict[str, Any]:
        """A valid request."""
        prompt = " ".join(rng.choice(self.words, int(rng.integers(1, 40))))
        body = {"prompt": prompt, "max_tokens": int(rng.integers(1, 24)), "seed": int(rng.integers(1000))}
        controls: Sequence[dict[str, Any]] = ({}, {"temperature": 0}, {"top_p": 0.9}, {"n": 2}, {"logprobs": 2})
        return body | controls[int(rng.integers(len(controls)))]

    async def checked(self, rng: np.random.Generator, number: int) -> None:
        body = self.completion(rng) | {"temperature": 0}
        answer = await self.send(json.dumps(body).encode())
        if answer.status != 200:
            self.fault(number, f"status {answer.status}")
            return
        found = answer.body["choices"][0]["text"]
        expected = await asyncio.to_thread(self.greedy, body["prompt"], body["max_tokens"])
        self.tally.checked += 1
        if found != expected:
            self.tally.wrong_texts.append(f"request {number}: {found!r} and not {expected!r}")

    async def whole(self, rng: np.random.Generator, number: int) -> None:
        body = self.completion(rng)
        answer = await self.send(json.dumps(body).encode())
        if answer.status != 200 or len(answer.body["choices"]) != body.get("n", 1):
            self.fault(number, f"status {answer.status}")

    async def stream(self, rng: np.random.Generator, number: int, pause: float = 0) -> None:
        body = self.completion(rng) | {"stream": True}
        answer = await self.send(json.dumps(body).encode(), pause)
        ends = [choice["finish_reason"] for event in answer.events for choice in event.get("choices", ())]
        texts = len([reason for reason in ends if reason])
        if answer.status != 200 or not answer.complete or texts != body.get("n", 1):
            self.fault(number, f"status {answer.status}, {texts} texts in a stream")

    async def slow(self, rng: np.random.Generator, number: int) -> None:
        """Read a little at a time."""
        await self.stream(rng, number, pause=0.01)

    async def leave(self, rng: np.random.Generator, number: int) -> None:
        """Go away in the middle of the answer, or of the body."""
        body = json.dumps(self.completion(rng) | {"stream": True, "max_tokens": 100}).encode()
        reader, writer = await self.open(body)
        if rng.integers(4):
            writer.write(body)
            await reader.read(int(rng.integers(1, 2000)))
        else:
            writer.write(body[: len(body) // 2])
        writer.transport.abort()

    async def invalid(self, rng: np.random.Generator, number: int) -> None:
        body, code = INVALID[int(rng.integers(len(INVALID)))]
        answer = await self.send(body)
        if answer.status < 400:
            self.fault(number, f"status {answer.status} for {body[:50]!r}")
            return
        error = answer.body
        if set(error) != {"error"} or set(error["error"]) != {"message", "type", "param", "code"}:
            self.fault(number, f"not OpenAI's form of an error: {error}")
        elif error["error"]["code"] != code:
            self.fault(number, f"{error['error']['code']}, not {code}, for {body[:50]!r}")
        self.tally.codes[error["error"]["code"]] += 1

    async def open(self, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection on which the head of a request was sent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 12)
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" \
               f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"  # fmt: skip
        writer.write(head.encode())
        return reader, writer

    async def send(self, body: bytes, pause: float = 0) -> Answer:
        """Send a request and read the whole answer, with a pause before each part."""
        reader, writer = await self.open(body)
        writer.write(body)
        data = b""
        try:
            while part := await reader.read(512 if pause else 1 << 16):
                data += part
                await asyncio.sleep(pause)
        finally:
            writer.close()
        return Answer(data)

    def fault(self, number: int, what: str) -> None:
        self.tally.faults.append(f"request {number}: {what}")


class Greedy:
    """The greedy text after a prompt, without the server."""

    def __init__(self, folder: Path) -> None:
        self.decoder = OnnxDecoder(folder, threads=1)
        self.tokenizer = Tokenizer.from_pretrained(folder)

    def __call__(self, prompt: str, new: int) -> str:
        config = GenerationConfig.of(max_new_tokens=new, temperature=0)
        ((found,),) = continuations(self.decoder, self.tokenizer, [prompt], config)
        return found.text


async def soak(clients: Soak, server: Server, requests: int) -> None:
    """Send all requests, from several clients at once, after those that fill the caches."""
    await clients.warm_up()
    numbers = iter(range(requests))
    every = max(1, requests // 100)

    async def client() -> None:
        for number in numbers:
            try:
                await clients.request(number)
            except (OSError, ValueError, KeyError) as error:
                clients.fault(number, f"{type(error).__name__}: {error}")
            if number % every == 0:
                clients.tally.memory.append(server.memory())

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


# ---------------------------------------------------------------------------------------------------------------- server


@dataclass(frozen=True)
class Server:
    """A server in a process of its own."""

    port: int
    process: subprocess.Popen[str]

    def memory(self) -> float:
        """Return its resident memory in MB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return str(answer.read().decode())

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        return sum(map(float, found))

    def left(self) -> dict[str, float]:
        """Return what has not ended. The connection that asks is not counted."""
        return {
            "running": self.metric("gpt2x_running_texts"),
            "waiting": self.metric("gpt2x_queue_texts"),
            "connections": self.metric("gpt2x_open_connections") - 1,
        }


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Server]:
    """Start a server, and end it."""
    command = [sys.executable, "-m", "gpt2x", "serve", str(folder), "--port", "0", *OPTIONS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            for line in process.stdout:
                if found := re.search(r"Listening on http://127.0.0.1:(\d+)", line):
                    yield Server(int(found[1]), process)
                    return
            raise click.ClickException("the server did not start")
        finally:
            process.send_signal(signal.SIGTERM)


def settled(server: Server) -> dict[str, float]:
    """Wait until nothing is left. Returns what is left after a minute."""
    end = time.monotonic() + SETTLE
    while any((left := server.left()).values()) and time.monotonic() < end:
        time.sleep(0.2)
    return left


# ---------------------------------------------------------------------------------------------------------------- checks


class Checks:
    """Prints a line for each check, and remembers whether one has failed."""

    def __init__(self) -> None:
        self.failed = False

    def __call__(self, holds: bool, what: str, examples: Sequence[str] = ()) -> None:
        print(f"{'ok    ' if holds else 'FAILED'} {what}", flush=True)
        for example in examples[:5]:
            print(f"       {example}")
        self.failed = self.failed or not holds


def check(server: Server, tally: Tally) -> bool:
    """Print what was found. Returns whether everything is as it should be."""
    checks = Checks()
    left = settled(server)
    checks(not any(left.values()), "nothing left: " + ", ".join(f"{n:g} {name}" for name, n in left.items()))
    checks("alive" in server.get("/health"), "healthy")
    warm = max(tally.memory[: 1 + len(tally.memory) // WARM])
    most = max(tally.memory)
    checks(most <= GROWTH * warm, f"memory: {warm:.1f} MB after the warm-up, {most:.1f} at most, "
                                  f"{server.memory():.1f} at the end")  # fmt: skip
    checks(not tally.wrong_texts and tally.checked > 0, f"{tally.checked} texts compared", tally.wrong_texts)
    codes = ", ".join(f"{n} {code}" for code, n in sorted(tally.codes.items()))
    checks(not tally.faults, f"answers as expected; refused: {codes}", tally.faults)
    return not checks.failed


@click.command()
@click.option("--requests", type=click.IntRange(min=1), default=20_000, show_default=True, help="Number of requests.")
@click.option("--seed", default=0, show_default=True, help="Seed of the requests.")
def main(requests: int, seed: int) -> None:
    """Send requests to a server, and check what is left."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="gpt2x-soak-") as name:
        folder = Path(name) / "model"
        export_onnx(open_checkpoint(SHAKESPEARE), folder, ExportOptions(cache="inplace"))
        greedy = Greedy(folder)
        with started(folder) as server:
            start = time.perf_counter()
            asyncio.run(soak(Soak(server.port, seed, greedy, tally), server, requests))
            kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(tally.kinds.items()))
            print(f"{tally.done} requests in {time.perf_counter() - start:.0f} s: {kinds}")
            good = check(server, tally)
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
