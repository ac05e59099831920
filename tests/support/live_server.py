"""A running server, in this process or in one of its own, and a client that sends exactly what a test says."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

LIMIT = 60  # seconds that no test takes


def wait_for(holds):
    """Wait until a condition holds."""
    end = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


@contextlib.contextmanager
def held(engine, rows=1):
    """Steps of so many texts or more wait until the end of this block."""
    batch, go_on = engine._batch, threading.Event()
    step, own = batch.step, vars(batch).get("step")

    def waiting_step(tokens):
        assert len(tokens) < rows or go_on.wait(LIMIT)
        return step(tokens)

    batch.step = waiting_step
    try:
        yield
    finally:
        go_on.set()
        del batch.step  # so that the class's method is seen again
        if own:
            batch.step = own


@dataclasses.dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def code(self):
        return self.json["error"]["code"]

    @property
    def events(self):
        """The data of server-sent events."""
        *parts, rest = self.body.decode().split("\n\n")
        assert rest == ""
        data = [part.removeprefix("data: ") for part in parts]
        return [json.loads(one) for one in data if one != "[DONE]"]


@dataclasses.dataclass
class Address:
    """Where a server listens."""

    port: int

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT)

    def send(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path, **headers):
        return self.send("GET", path, **headers)

    def post(self, path, body, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", path, data, **{"Content-Type": "application/json", **headers})

    def complete(self, **body):
        return self.post("/v1/completions", body)

    def metric(self, name):
        """The sum of a metric over its labels."""
        found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", self.get("/metrics").body.decode(), re.MULTILINE)
        return sum(map(float, found))

    def wait_for(self, holds):
        """Wait until a condition holds."""
        wait_for(holds)


@contextlib.contextmanager
def in_thread(models, **settings):
    """A server of open models in a thread of this process. The models stay open."""
    from gpt2x.serving.app import Server
    from gpt2x.serving.http import listen, uvicorn_of
    from gpt2x.serving.metrics import Metrics
    from gpt2x.serving.settings import Settings

    listener = listen("127.0.0.1", 0)
    running = uvicorn_of(Server(models, Settings(**settings), Metrics()))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Address(listener.getsockname()[1])
    finally:
        running.should_exit = True
        thread.join()
        listener.close()


@dataclasses.dataclass
class Process(Address):
    """A server in a process of its own."""

    process: subprocess.Popen

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def wait(self):
        return self.process.wait(LIMIT)


@contextlib.contextmanager
def in_process(*arguments):
    """``gpt2x serve`` with arguments, on a free port."""
    command = [sys.executable, "-m", "gpt2x", "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = iter(process.stdout.readline, "")
            ports = (re.search(r"Listening on http://127.0.0.1:(\d+)", line) for line in lines)
            yield Process(int(next(filter(None, ports))[1]), process)
        finally:
            process.kill()
