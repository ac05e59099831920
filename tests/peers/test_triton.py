"""Triton Inference Server serves what ``gpt2x export --triton`` writes. ``make test-triton``.

The server is that of nvidia-pytriton's wheel. It has the Python backend, and no ONNX Runtime backend. So the step runs in
the process of the text model, or in a stand-in for the ONNX Runtime backend with the same inputs and outputs.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import open_checkpoint
from gpt2x import SHAKESPEARE, ExportOptions, OnnxDecoder, Tokenizer, generate_text
from gpt2x.export.triton import export_triton

http = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed (make test-triton installs it)")
grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed (make test-triton installs it)")

pytestmark = pytest.mark.filterwarnings("default")  # those of Triton's libraries are not ours

PACKAGE = importlib.util.find_spec("pytriton")
if PACKAGE is None:
    pytest.skip("nvidia-pytriton is not installed (make test-triton installs it)", allow_module_level=True)

SITE = Path(PACKAGE.origin).parents[1]
HOME = SITE / "pytriton/tritonserver"
STUB = HOME / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}"
MODELS = ["gpt2_step", "gpt2", "gpt2_stream"]

# Runs the ONNX model where Triton has no ONNX Runtime backend.
STAND_IN = """
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.session = onnxruntime.InferenceSession(args["model_repository"] + "/1/model.onnx")

    def execute(self, requests):
        return [self.run(request) for request in requests]

    def run(self, request):
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        names = [output.name for output in self.session.get_outputs()]
        found = self.session.run(names, inputs)
        return pb_utils.InferenceResponse([pb_utils.Tensor(*pair) for pair in zip(names, found)])
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    path = tmp_path_factory.mktemp("triton") / "repository"
    export_triton(open_checkpoint(SHAKESPEARE), path)
    return path


@pytest.mark.parametrize("cache", ["growing", "inplace-int8"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_the_configurations_are_those_of_tritons_own_schema(tmp_path, precision, cache):
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    export_triton(open_checkpoint(SHAKESPEARE), tmp_path / "r", ExportOptions((precision,), cache=cache))
    found = {}
    for name in MODELS:
        found[name] = text_format.Parse((tmp_path / "r" / name / "config.pbtxt").read_text(), ModelConfig())
        assert found[name].name == name
        assert found[name].max_batch_size == 0
    step, text, stream = (found[name] for name in MODELS)
    assert (step.backend, text.backend, stream.backend) == ("onnxruntime", "python", "python")
    assert (text.model_transaction_policy.decoupled, stream.model_transaction_policy.decoupled) == (False, True)
    assert [slot.name for slot in step.input][:4] == [
        "input_ids", "attention_mask", "position_ids", "past_key_values.0.key",
    ]  # fmt: skip
    assert list(step.input[3].dims) == [-1, 6, -1, 32]
    assert [slot.name for slot in text.input if not slot.optional] == ["text"]
    assert text.parameters["step"].string_value == "triton"


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """A tritonserver over a repository."""

    def __init__(self, home: Path, repository: Path, models: list[str]):
        self.port, self.grpc_port = free_port(), free_port()
        backend = home / "backends/python"
        shutil.copytree(HOME / "backends/python", backend)
        shutil.copy(STUB / "triton_python_backend_stub", backend)
        loaded = [f"--load-model={name}" for name in models]
        libraries = SITE / "nvidia_pytriton.libs"
        self.log = home / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    str(HOME / "bin/tritonserver"), f"--model-repository={repository}",
                    f"--backend-directory={home / 'backends'}", "--model-control-mode=explicit", *loaded,
                    f"--http-port={self.port}", f"--grpc-port={self.grpc_port}", "--allow-metrics=false",
                    "--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--exit-timeout-secs=5",
                ],
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "LD_LIBRARY_PATH": str(libraries),
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                },
            )  # fmt: skip

    def wait(self):
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v2/health/ready", timeout=10):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise TimeoutError(self.log.read_text()[-4000:])

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def post(self, path, **values):
        """The bodies of the answer's events, or its only one."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v2/models/{path}", json.dumps(values).encode())
        with urllib.request.urlopen(request, timeout=120) as answer:
            lines = answer.read().decode().splitlines()
        return [json.loads(line.removeprefix("data: ")) for line in lines if line]


@pytest.fixture(scope="module", params=["onnxruntime", "triton"])
def server(request, repository, tmp_path_factory):
    home = tmp_path_factory.mktemp(request.param)
    copy = home / "repository"
    shutil.copytree(repository, copy)
    if request.param == "triton":
        change(copy / "gpt2_step/config.pbtxt", 'backend: "onnxruntime"', 'backend: "python"')
        (copy / "gpt2_step/1/model.py").write_text(STAND_IN)
    else:
        for name in ("gpt2", "gpt2_stream"):
            change(copy / name / "config.pbtxt", 'string_value: "triton"', 'string_value: "onnxruntime"')
    running = Server(home, copy, MODELS if request.param == "triton" else MODELS[1:])
    try:
        running.wait()
        yield running
    finally:
        running.stop()


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def inputs_of(module, text, **controls):
    values: dict[str, Any] = {"text": (text.encode(), "BYTES", np.object_)}
    types: dict[type, Any] = {int: ("INT32", np.int32), float: ("FP32", np.float32)}
    for name, value in controls.items():
        values[name] = (value, "INT64", np.int64) if name == "seed" else (value, *types[type(value)])
    inputs = []
    for name, (value, triton_type, dtype) in values.items():
        one = module.InferInput(name, [1], triton_type)
        one.set_data_from_numpy(np.array([value], dtype))
        inputs.append(one)
    return inputs


def expected_text(repository, prompt, tokens, **controls):
    decoder = OnnxDecoder(repository / "gpt2_step/1/model.onnx")
    whole = generate_text(decoder, Tokenizer.from_pretrained(SHAKESPEARE), prompt, tokens, **controls)
    return whole.removeprefix(prompt)


@pytest.mark.parametrize("controls", [{"temperature": 0.0}, {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 5}])
def test_tritonclient_gets_the_text_of_gpt2x(repository, server, controls):
    client = http.InferenceServerClient(f"127.0.0.1:{server.port}", network_timeout=120)
    answer = client.infer("gpt2", inputs_of(http, "ROMEO:", max_tokens=40, **controls))
    assert answer.as_numpy("text")[0].decode() == expected_text(repository, "ROMEO:", 40, **controls)


def test_the_stream_of_grpc_has_the_same_text_in_pieces(repository, server):
    import queue

    answers = queue.SimpleQueue()
    client = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer(
        "gpt2_stream", inputs_of(grpc, "ROMEO:", max_tokens=20, temperature=0.0), enable_empty_final_response=True
    )
    pieces = []
    while True:
        result, error = answers.get(timeout=120)
        assert error is None
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
        pieces.append(result.as_numpy("text")[0].decode())
    client.stop_stream()
    assert len(pieces) > 10
    assert "".join(pieces) == expected_text(repository, "ROMEO:", 20, temperature=0.0)


def test_the_stream_of_http_has_the_same_text_in_pieces(repository, server):
    events = server.post("gpt2_stream/generate_stream", text="ROMEO:", max_tokens=20, temperature=0)
    assert "".join(event["text"] for event in events) == expected_text(repository, "ROMEO:", 20, temperature=0.0)
    assert len(events) > 10


def test_what_is_out_of_range_is_an_error_and_the_server_goes_on(server):
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post("gpt2/generate", text="ROMEO:", max_tokens=600)
    message = json.loads(caught.value.read())["error"]
    assert "text has 2 tokens and max_tokens is 600; together they exceed the context of 256" in message
    assert len(server.post("gpt2/generate", text="ROMEO:", max_tokens=3)) == 1
