"""Clients that others wrote load what ``export`` wrote, unmodified, and give the tokens that gpt2x gives.

``make test-clients`` installs them all. One that is not installed is skipped, with its reason.
"""

import functools
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
from gpt2x import SHAKESPEARE, Tokenizer, contract, from_pretrained, generate_text
from gpt2x.export.card import DTYPES
from gpt2x.export.directory import ExportOptions, export_onnx
from gpt2x.generate import Generation, Sampling
from gpt2x.runtime import OnnxDecoder
from gpt2x.torch_runtime import TorchDecoder

ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / "tests" / "clients"
PACKAGES = ROOT / "examples"  # where npm installed
HUGGING_FACE = PROGRAMS / "transformers_client.py"
OPTIMUM = ROOT / ".venv-optimum" / "bin" / "python"
HEADERS = ROOT / ".venv-headers" / "usr" / "include" / "onnxruntime"
COUNT = 64
# Of 4 and 7 tokens, and never nearer a tie than 0.015 in any precision: another version of ONNX Runtime chooses the same.
PROMPTS = ["My lord, I", "O, my good lord, not"]
EACH, TOGETHER = [[prompt] for prompt in PROMPTS], [PROMPTS]
# One thread of torch's, as in conftest.py; ONNX Runtime has its own.
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}

# A directory -> the precisions in it, of which the first is run. Where there is but one, no client can run another.
DIRECTORIES = {
    **{precision: (precision,) for precision in contract.SUFFIXES},
    "all": ("int4", "fp32", "fp16", "int8", "w8a8"),
}

CLIENTS = {
    "onnxruntime": [sys.executable, PROGRAMS / "onnxruntime_client.py"],
    "onnxruntime-genai": [sys.executable, PROGRAMS / "genai_client.py"],
    "optimum": [OPTIMUM, HUGGING_FACE, "optimum.onnxruntime", "ORTModelForCausalLM"],
    "transformers": [sys.executable, HUGGING_FACE, "transformers", "AutoModelForCausalLM"],
    "transformers.js": ["node", PROGRAMS / "transformersjs_client.mjs"],
    "onnxruntime-node": ["node", PROGRAMS / "onnxruntime_node_client.mjs"],
}


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
NEEDS = {
    "onnxruntime-genai": needs_module("onnxruntime_genai"),
    "optimum": needs_optimum,
    "transformers": needs_module("transformers"),
    "transformers.js": needs_node,
    "onnxruntime-node": needs_node,
}


def clients(*names):
    return pytest.mark.parametrize("client", [pytest.param(name, marks=NEEDS.get(name, ())) for name in names])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """``exported(cache, name)``: the path of one of the ``DIRECTORIES``."""
    folder = tmp_path_factory.mktemp("clients")

    @functools.cache
    def export(cache, name):
        export_onnx(open_checkpoint(SHAKESPEARE), folder / cache / name, ExportOptions(DIRECTORIES[name], cache))
        return folder / cache / name

    return export


@pytest.fixture(scope="module")
def directory(exported):
    return exported("growing", "fp32")


def greedy(decoder):
    """Each prompt and the tokens after it, none of them an end of text."""
    tokenizer = Tokenizer.from_pretrained(SHAKESPEARE)
    runs = {p: Generation(decoder, [tokenizer.encode(p)], COUNT, Sampling(temperature=0)) for p in PROMPTS}
    made = {prompt: [token for (token,) in generation] for prompt, generation in runs.items()}
    assert all(len(set(tokens)) > 8 for tokens in made.values())  # words, not one token again and again
    assert not any(tokenizer.eos_token_id in tokens for tokens in made.values())
    return made


@pytest.fixture(scope="module")
def expected():
    """The torch model's tokens after each prompt."""
    return greedy(TorchDecoder(from_pretrained(SHAKESPEARE)))


@pytest.fixture(scope="module")
def wanted(exported, expected):
    """``wanted(cache, precision)``: the torch model's tokens where all is fp32, else those of gpt2x's decoder."""

    @functools.cache
    def want(cache, precision):
        exact = precision == "fp32" and contract.cache_type(precision, cache) == "float32"
        return expected if exact else greedy(OnnxDecoder(exported(cache, precision)))

    return want


def run(client, models, batches, folder):
    """A client's process, over models (directory, precision). It changes nothing in the directories."""
    named = [{"directory": str(d), "file": contract.model_file(p), "dtype": DTYPES[p]} for d, p in models]
    task = folder / "task.json"
    task.write_text(json.dumps({"models": named, "batches": batches, "count": COUNT}))
    before = {path: path.read_bytes() for d, _ in models for path in d.rglob("*") if path.is_file()}
    command = [str(part) for part in (*CLIENTS[client], task, PACKAGES)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=ENVIRONMENT, timeout=300)
    assert before == {path: path.read_bytes() for d, _ in models for path in d.rglob("*") if path.is_file()}
    return result


def rows_of(result):
    """For each model and batch, the tokens after each text."""
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def batches_of(client, cache):
    """A cache in place takes padding on the right alone; genai pads there, the others on the left."""
    return EACH + TOGETHER if cache == "growing" or client == "onnxruntime-genai" else EACH


@pytest.fixture(scope="module")
def given(exported, tmp_path_factory):
    """``given(client, cache)``: one process of a client, over the first precision of each of the ``DIRECTORIES``."""

    @functools.cache
    def give(client, cache):
        models = [(exported(cache, name), precisions[0]) for name, precisions in DIRECTORIES.items()]
        return run(client, models, batches_of(client, cache), tmp_path_factory.mktemp("task"))

    return give


@pytest.mark.parametrize("name", DIRECTORIES)
@pytest.mark.parametrize("cache", contract.CACHES)
@clients("onnxruntime", "onnxruntime-genai", "optimum", "transformers.js", "onnxruntime-node")
def test_a_client_gives_the_models_tokens_with_every_precision_and_cache(client, cache, name, given, wanted):
    rows = dict(zip(DIRECTORIES, rows_of(given(client, cache)), strict=True))[name]
    tokens = wanted(cache, DIRECTORIES[name][0])
    assert rows == [[tokens[text] for text in texts] for texts in batches_of(client, cache)]


@pytest.mark.parametrize("cache", contract.CACHES)
def test_a_client_that_took_fp32_for_int4_would_be_seen(cache, wanted):
    assert all(wanted(cache, "int4")[prompt] != wanted(cache, "fp32")[prompt] for prompt in PROMPTS)


@clients("transformers")
def test_transformers_gives_the_torch_models_tokens(client, directory, expected, tmp_path):
    """It runs no ONNX: it reads the weights that fp32 has."""
    (rows,) = rows_of(run(client, [(directory, "fp32")], EACH + TOGETHER, tmp_path))
    assert rows == [[expected[text] for text in texts] for texts in EACH + TOGETHER]


@clients("onnxruntime", "onnxruntime-genai", "transformers.js")
def test_a_client_takes_the_logits_of_the_last_slot_alone(client, expected, tmp_path):
    """genai pads batches on the right, where the last slot is padding: the model card says so."""
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "last", ExportOptions(last=True))
    batches = EACH if client == "onnxruntime-genai" else EACH + TOGETHER
    (rows,) = rows_of(run(client, [(tmp_path / "last", "fp32")], batches, tmp_path))
    assert rows == [[expected[text] for text in texts] for texts in batches]


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

    assert [int(i) for i in run(COUNT, 0, 0, 1).stdout.split()] == expected[PROMPTS[0]]
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
