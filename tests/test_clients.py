"""Clients that others wrote load what ``export`` wrote, unmodified, and give the torch model's greedy tokens.

``make test-clients`` installs them all. One that is not installed is skipped, with its reason.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import onnxruntime
import pytest

from converters import open_checkpoint
from gpt2x import SHAKESPEARE, Tokenizer, from_pretrained, generate_text
from gpt2x.export.directory import Options, export_onnx
from gpt2x.generate import Generation, Sampling
from gpt2x.torch_runtime import TorchDecoder

ROOT = Path(__file__).parents[1]
CLIENTS = ROOT / "tests" / "clients"
PACKAGES = ROOT / "examples"  # where npm installed
HUGGING_FACE = [CLIENTS / "transformers_client.py"]
OPTIMUM = ROOT / ".venv-optimum" / "bin" / "python"
HEADERS = ROOT / ".venv-headers" / "usr" / "include" / "onnxruntime"
COUNT = 64
PROMPTS = ["ROMEO:", "The king is a good man and"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients") / "shakespeare"
    export_onnx(open_checkpoint(SHAKESPEARE), folder)
    return folder


@pytest.fixture(scope="module")
def expected():
    """The torch model's greedy tokens for each prompt, none of them an end of text."""
    decoder, tokenizer = TorchDecoder(from_pretrained(SHAKESPEARE)), Tokenizer.from_pretrained(SHAKESPEARE)
    rows = [[t for (t,) in Generation(decoder, [tokenizer.encode(p)], COUNT, Sampling(temperature=0))] for p in PROMPTS]
    assert all(len(set(row)) > 8 for row in rows)  # words, not one token again and again
    assert not any(tokenizer.eos_token_id in row for row in rows)
    return rows


def needs_module(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not (PACKAGES / "node_modules" / "onnxruntime-node").is_dir(),
    reason="the packages for Node are not installed (make test-clients)",
)
needs_optimum = pytest.mark.skipif(not OPTIMUM.exists(), reason="optimum is not installed (make test-clients)")
needs_headers = pytest.mark.skipif(
    shutil.which("g++") is None or not HEADERS.is_dir(),
    reason="no g++, or ONNX Runtime's headers are not here (make test-clients fetches them where there is apt)",
)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param([sys.executable, CLIENTS / "onnxruntime_client.py"], id="onnxruntime"),
        pytest.param([sys.executable, *HUGGING_FACE, "transformers", "AutoModelForCausalLM"], id="transformers", marks=needs_module("transformers")),
        pytest.param([sys.executable, CLIENTS / "genai_client.py"], id="onnxruntime-genai", marks=needs_module("onnxruntime_genai")),
        pytest.param([OPTIMUM, *HUGGING_FACE, "optimum.onnxruntime", "ORTModelForCausalLM"], id="optimum", marks=needs_optimum),
        pytest.param(["node", CLIENTS / "transformersjs_client.mjs"], id="transformers.js", marks=needs_node),
        pytest.param(["node", CLIENTS / "onnxruntime_node_client.mjs"], id="onnxruntime-node", marks=needs_node),
    ],
)  # fmt: skip
def test_a_client_gives_the_torch_models_tokens(command, directory, expected, tmp_path):
    (tmp_path / "task.json").write_text(json.dumps({"prompts": PROMPTS, "count": COUNT}))
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    arguments = [str(part) for part in (*command, directory, tmp_path / "task.json", PACKAGES)]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, timeout=300)
    assert result.returncode == 0, result.stderr
    given = json.loads(result.stdout.splitlines()[-1])
    assert given == {"single": expected[0], "batch": expected}
    assert before == {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("command", "batches"),
    [
        pytest.param([sys.executable, CLIENTS / "onnxruntime_client.py"], True, id="onnxruntime"),
        pytest.param([sys.executable, CLIENTS / "genai_client.py"], False, id="onnxruntime-genai", marks=needs_module("onnxruntime_genai")),
        pytest.param(["node", CLIENTS / "transformersjs_client.mjs"], True, id="transformers.js", marks=needs_node),
    ],
)  # fmt: skip
def test_a_client_takes_the_logits_of_the_last_slot_alone(command, batches, expected, tmp_path):
    """genai pads batches on the right, where the last slot is padding: the model card says so."""
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "last", Options(last=True))
    (tmp_path / "task.json").write_text(json.dumps({"prompts": PROMPTS, "count": COUNT}))
    arguments = [str(part) for part in (*command, tmp_path / "last", tmp_path / "task.json", PACKAGES)]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, timeout=300)
    given = json.loads(result.stdout.splitlines()[-1])
    assert given["single"] == expected[0]
    assert not batches or given["batch"] == expected


# ----------------------------------------------------------------------------------------------------------- examples


@contextmanager
def running(command, cwd):
    """A service of the examples, on a free port; gives its address."""
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, text=True, cwd=cwd, env=ENVIRONMENT)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()


def ask(address, **question):
    request = urllib.request.Request(address, json.dumps(question).encode())
    return urllib.request.urlopen(request, timeout=60)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param([sys.executable, ROOT / "examples" / "service.py"], id="Python"),
        pytest.param(["node", ROOT / "examples" / "service.mjs"], id="Node", marks=needs_node),
    ],
)
def test_a_service_of_the_examples_answers_streams_and_samples(command, directory, tmp_path):
    prompt, tokenizer = PROMPTS[0], Tokenizer.from_pretrained(SHAKESPEARE)
    expected = generate_text(from_pretrained(SHAKESPEARE), tokenizer, prompt, COUNT, 0).removeprefix(prompt)
    with running([*command, directory, "0"], tmp_path) as address:
        assert ask(address, prompt=prompt, max_new_tokens=COUNT, temperature=0).read().decode() == expected
        sampled = {ask(address, prompt=prompt, max_new_tokens=12, top_k=40, seed=i).read() for i in range(6)}
        assert len(sampled) > 1
        assert len({ask(address, prompt=prompt, max_new_tokens=12, top_k=1, seed=i).read() for i in range(3)}) == 1
        start = time.perf_counter()
        with ask(address, prompt=prompt, max_new_tokens=200, temperature=0) as stream:
            assert stream.read(1)
            first = time.perf_counter() - start
            stream.read()
        assert first < 0.7 * (time.perf_counter() - start)  # the text comes as it is made
        for wrong in ({}, {"prompt": ""}):
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask(address, **wrong)
            with refused.value:
                assert refused.value.code == 400


@needs_headers
def test_the_client_in_cpp_gives_the_torch_models_tokens_and_samples(directory, expected, tmp_path):
    library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.1*"))
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)
    build = ["g++", "-std=c++17", "-O1", ROOT / "examples/client.cpp", "-I", HEADERS, "-L", tmp_path, "-l:libonnxruntime.so.1", f"-Wl,-rpath,{tmp_path}", "-o", tmp_path / "client"]  # fmt: skip
    subprocess.run([str(part) for part in build], check=True)
    prompt = Tokenizer.from_pretrained(SHAKESPEARE).encode(PROMPTS[0])

    def run(*options, ids=prompt):
        command = [tmp_path / "client", directory / "onnx/model.onnx", *options, "--", *ids]
        return subprocess.run([str(part) for part in command], capture_output=True, text=True)

    assert [int(i) for i in run(COUNT, 0, 0, 1).stdout.split()] == expected[0]
    assert run(20, 0.9, 40, 1).stdout == run(20, 0.9, 40, 1).stdout != run(20, 0.9, 40, 2).stdout
    wrong = run(1, 0, 0, 1, ids=[99999])
    assert wrong.returncode == 1
    assert wrong.stderr


def test_every_example_is_a_page_and_needs_no_torch():
    for name in ("service.py", "service.mjs", "client.cpp"):
        text = (ROOT / "examples" / name).read_text()
        assert 50 <= len(text.splitlines()) <= 100, name
        assert not re.search(r"^\s*(import|from) (torch|gpt2x|converters|transformers)\b", text, re.M), name


def test_no_lock_file_and_no_registry_is_committed():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    assert "package-lock.json" not in files.stdout
