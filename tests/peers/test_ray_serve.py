"""The application of examples/ray_serve on a local Ray cluster of two nodes, which loses a replica and a node. ``make test-ray``."""

import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from paths import ROOT

from converters import open_checkpoint
from gpt2x import SHAKESPEARE, ExportOptions, OnnxDecoder, Tokenizer, export_onnx, generate_text

ray = pytest.importorskip("ray", reason="Ray is not installed (make test-ray installs it)")
serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed (make test-ray installs it)")
pytest.importorskip("uvicorn", reason="the server's packages are not installed (make test-ray installs them)")

pytestmark = pytest.mark.filterwarnings("default")  # those of Ray and its libraries are not ours

EXAMPLE = ROOT / "examples" / "ray_serve"
SMALL = {"object_store_memory": 100 << 20, "num_cpus": 4}
WAIT = 180  # seconds
CLIENTS = 6
PROMPT, TOKENS = "ROMEO:", 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("ray") / "model"
    export_onnx(open_checkpoint(SHAKESPEARE), path, ExportOptions(cache="inplace"))
    return path


@pytest.fixture(scope="module")
def expected(model):
    decoder = OnnxDecoder(model)
    text = generate_text(decoder, Tokenizer.from_pretrained(model), PROMPT, TOKENS, temperature=0)
    return text.removeprefix(PROMPT)


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes. Only the first may run the gateway."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLE), str(ROOT), *sys.path]))
    monkeypatch.syspath_prepend(str(EXAMPLE))
    head = {**SMALL, "resources": {"gateway": 1}, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        made.add_node(**SMALL)
        ray.init(address=made.address, log_to_driver=False)
        yield made
    finally:
        serve.shutdown()
        ray.shutdown()
        made.shutdown()
        sys.modules.pop("app", None)


def start(application: Any) -> str:
    """Run an application. Returns its address."""
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(application)
    return f"http://127.0.0.1:{port}/v1/completions"


def post(address: str, **values: Any) -> Any:
    body = json.dumps({"prompt": PROMPT, "temperature": 0, **values}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=WAIT)


def wait_until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {WAIT} seconds"
        time.sleep(0.1)


def replicas() -> list[str]:
    """The names of the actors of all replicas of the model."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if "#model#" in actor["name"]]


def running() -> int:
    states = serve.status().applications["default"].deployments["model"].replica_states
    return int(states.get("RUNNING", 0))


class Load:
    """Clients that ask for a text again and again, and keep every answer."""

    def __init__(self, address: str):
        self.address = address
        self.answers: list[tuple[int, str]] = []
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self.work) for _ in range(CLIENTS)]

    def work(self):
        while not self.ended.is_set():
            try:
                with post(self.address, max_tokens=TOKENS) as answer:
                    self.answers.append((answer.status, json.load(answer)["choices"][0]["text"]))
            except urllib.error.HTTPError as error:
                with error:
                    self.answers.append((error.code, error.read().decode()))
            except Exception as error:
                self.answers.append((0, repr(error)))

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def wait_for_more(self, count):
        goal = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= goal, f"{count} more answers")


def events_of(stream) -> list[Any]:
    lines = [line.decode().removeprefix("data: ").strip() for line in stream if line.strip()]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def streams_across(address: str, loss: Callable[[], None]) -> list[list[Any]]:
    """The last parts of streams that had begun before a loss."""
    streams = [post(address, max_tokens=240, stream=True) for _ in range(8)]
    for stream in streams:
        stream.readline()
    loss()
    found = [events_of(stream) for stream in streams]
    for stream in streams:
        stream.close()
    return found


def test_no_request_is_lost_with_a_replica_or_a_node_and_streams_that_were_cut_say_so(cluster, model, expected):
    import app

    (other,) = cluster.worker_nodes
    address = start(app.build({"model": str(model), "replicas": "2", "replicas_per_node": "1"}))
    wait_until(lambda: running() == 2, "two replicas")
    streams = []
    with Load(address) as load:
        load.wait_for_more(2 * CLIENTS)

        def kill_one():
            ray.kill(ray.get_actor(replicas()[0], namespace="serve"))

        streams += streams_across(address, kill_one)
        load.wait_for_more(2 * CLIENTS)
        wait_until(lambda: running() == 2, "the replica's replacement")
        load.wait_for_more(2 * CLIENTS)
        streams += streams_across(address, lambda: cluster.remove_node(other, allow_graceful=False))
        load.wait_for_more(4 * CLIENTS)
    assert {answer for answer in load.answers if answer != (200, expected)} == set()
    cut = [events for events in streams if events[-1] != "[DONE]"]
    assert {events[-1]["error"]["code"] for events in cut} <= {"replica_lost"}
    assert len(streams) == 16
    assert cut


def test_load_adds_replicas(cluster, model):
    import app

    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1, "upscale_delay_s": 0.5}
    options = {"threads": 1, "cache_memory": 1 << 28}
    deployment = app.Model.options(autoscaling_config=scaling)
    address = start(app.Gateway.bind(deployment.bind(str(model), "gpt2", options)))
    assert running() == 1
    with Load(address) as load:
        wait_until(lambda: running() == 2, "a second replica")
    assert {status for status, _ in load.answers} == {200}


def test_errors_are_those_of_the_server(cluster, model):
    import app

    address = start(app.build({"model": str(model), "replicas": "1"}))
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(address, max_tokens=600)
    with caught.value as answer:
        assert answer.code == 400
        assert json.load(answer)["error"]["code"] == "context_length_exceeded"
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(address, user="a" * (1 << 20))
    with caught.value as answer:
        assert answer.code == 413
