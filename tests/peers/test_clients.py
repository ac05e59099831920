"""Clients that others wrote load what ``export`` wrote, unmodified, and give the tokens that gpt2x gives.

``make test-clients`` installs them all. One that is not installed is skipped, with its reason.
"""

import functools
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
from adapters import write_adapter
from checkpoints import random_checkpoint
from client_programs import CLIENTS, PACKAGES, clients, marks_of, needs_node
from paths import ROOT

from converters import GPT2Config, open_checkpoint
from gpt2x import SHAKESPEARE, Tokenizer, contract, from_pretrained, generate_text
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.generation.beams import Beams, beam_search
from gpt2x.generation.loop import Generation
from gpt2x.generation.sampling import Sampling
from gpt2x.precisions import PRECISIONS
from gpt2x.runtimes.onnxruntime import OnnxDecoder
from gpt2x.runtimes.torch import TorchDecoder

HEADERS = ROOT / ".venv-headers" / "usr" / "include" / "onnxruntime"
COUNT = 64
HANGS = 600  # seconds, after which a process is taken to have no end
# Of 4 and 7 tokens, and never nearer a tie than 0.015 in any precision: another version of ONNX Runtime chooses the same.
PROMPTS = ["My lord, I", "O, my good lord, not"]
EACH, TOGETHER = [[prompt] for prompt in PROMPTS], [PROMPTS]
# One thread of torch's, as in conftest.py; ONNX Runtime has its own.
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}

# A directory -> the precisions in it, of which the first is run. Where there is but one, no client can run another.
DIRECTORIES = {
    **{precision: (precision,) for precision in PRECISIONS},
    "all": ("int4", "fp32", "fp16", "int8", "w8a8"),
}

needs_headers = pytest.mark.skipif(
    shutil.which("g++") is None or not HEADERS.is_dir(),
    reason="no g++, or ONNX Runtime's headers are not here (make test-clients fetches them where there is apt)",
)
FAST = "onnxruntime", "growing"  # what is tried at every change; make test-clients tries all


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """``exported(cache, name)``: the path of one of the ``DIRECTORIES``."""
    folder = tmp_path_factory.mktemp("clients")

    @functools.cache
    def export(cache, name):
        options = ExportOptions(DIRECTORIES[name], cache, safetensors="fp32" in DIRECTORIES[name])
        export_onnx(open_checkpoint(SHAKESPEARE), folder / cache / name, options)
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


def run(client, models, batches, folder, **said):
    """A client's process, over models (directory, precision). It changes nothing in the directories."""
    named = [
        {"directory": str(d), "file": contract.model_file(p), "dtype": PRECISIONS[p].transformers_js} for d, p in models
    ]
    task = folder / "task.json"
    task.write_text(json.dumps({"models": named, "batches": batches, "count": COUNT, **said}))
    before = {path: path.read_bytes() for d, _ in models for path in d.rglob("*") if path.is_file()}
    command = [str(part) for part in (*CLIENTS[client], task, PACKAGES)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=ENVIRONMENT, timeout=HANGS)
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


ONNX = ("onnxruntime", "onnxruntime-genai", "optimum", "transformers.js", "onnxruntime-node")


@pytest.mark.parametrize("name", DIRECTORIES)
@pytest.mark.parametrize(
    ("client", "cache"),
    [
        pytest.param(client, cache, marks=[*marks_of(client), *([] if (client, cache) == FAST else [pytest.mark.slow])])
        for client in ONNX
        for cache in contract.CACHES
    ],
)
def test_a_client_gives_the_models_tokens_with_every_precision_and_cache(client, cache, name, given, wanted):
    rows = dict(zip(DIRECTORIES, rows_of(given(client, cache)), strict=True))[name]
    tokens = wanted(cache, DIRECTORIES[name][0])
    assert rows == [[tokens[text] for text in texts] for texts in batches_of(client, cache)]


@clients("onnxruntime-node")
def test_a_single_file_is_loaded_from_its_bytes_in_node(client, exported, wanted, tmp_path):
    precisions = ("fp32", "int8", "int4")
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "one", ExportOptions(precisions, single_file=True))
    rows = rows_of(run(client, [(tmp_path / "one", p) for p in precisions], EACH, tmp_path, bytes=True))
    for precision, found in zip(precisions, rows, strict=True):
        tokens = wanted("growing", precision)
        assert found == [[tokens[text] for text in texts] for texts in EACH]


@pytest.mark.parametrize("cache", contract.CACHES)
def test_a_client_that_took_fp32_for_int4_would_be_seen(cache, wanted):
    assert all(wanted(cache, "int4")[prompt] != wanted(cache, "fp32")[prompt] for prompt in PROMPTS)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """``adapted(cache)``: an export with an adapter, and the path of the adapter's file."""
    folder = tmp_path_factory.mktemp("adapted")
    lora = write_adapter(folder / "lora", open_checkpoint(SHAKESPEARE), size=0.05)  # no token is a near tie

    @functools.cache
    def export(cache):
        export_onnx(open_checkpoint(SHAKESPEARE), folder / cache, ExportOptions(cache=cache, adapters={"a": lora}))
        return folder / cache

    return export


@clients("onnxruntime-genai")
@pytest.mark.parametrize("cache", ["growing", "inplace"])
def test_genai_takes_an_adapter_by_its_adapter_api(client, cache, adapted, expected, tmp_path):
    chosen = greedy(OnnxDecoder(adapted(cache), adapter="a"))
    assert chosen != expected
    for adapter, tokens in (("a", chosen), (None, expected)):
        result = run(client, [(adapted(cache), "fp32")], EACH + TOGETHER, tmp_path, adapter=adapter)
        assert rows_of(result) == [[[tokens[text] for text in texts] for texts in EACH + TOGETHER]]
        assert "optional" not in result.stderr and "Initializer" not in result.stderr  # no warning of each input


@pytest.mark.parametrize(
    ("client", "cache"),
    [
        pytest.param(client, cache, marks=[*marks_of(client), *([] if (client, cache) == FAST else [pytest.mark.slow])])
        for client in ONNX
        for cache in ("growing", "inplace")
    ],
)
def test_a_client_that_knows_no_adapters_runs_the_base_of_an_export_with_some(
    client, cache, adapted, expected, tmp_path
):
    batches = batches_of(client, cache)
    (rows,) = rows_of(run(client, [(adapted(cache), "fp32")], batches, tmp_path))
    assert rows == [[expected[text] for text in texts] for texts in batches]


@clients("transformers")
def test_transformers_gives_the_torch_models_tokens(client, directory, expected, tmp_path):
    """It runs no ONNX: it reads the weights that fp32 has."""
    (rows,) = rows_of(run(client, [(directory, "fp32")], EACH + TOGETHER, tmp_path))
    assert rows == [[expected[text] for text in texts] for texts in EACH + TOGETHER]


@pytest.mark.slow
@pytest.mark.parametrize(
    "search",
    [
        {"num_beams": 4},
        {"num_beams": 3, "length_penalty": 0.5},
        {"num_beams": 2, "length_penalty": 2.0, "early_stopping": True},
    ],
    ids=str,
)
@clients("onnxruntime-genai", "optimum")
def test_beam_search_of_others_gives_the_tokens_of_gpt2x(client, search, directory, tmp_path):
    """genai's beams take no cache in place."""
    (rows,) = rows_of(run(client, [(directory, "fp32")], EACH, tmp_path, search=search))
    tokenizer, decoder = Tokenizer.from_pretrained(SHAKESPEARE), OnnxDecoder(directory)
    found = beam_search(decoder, [tokenizer.encode(prompt) for prompt in PROMPTS], COUNT, Beams(**search))
    assert rows == [[list(best[0].tokens)] for best in found]


@clients("onnxruntime", "onnxruntime-genai", "transformers.js")
def test_a_client_takes_the_logits_of_the_last_slot_alone(client, expected, tmp_path):
    """genai pads batches on the right, where the last slot is padding: the model card says so."""
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "last", ExportOptions(last=True))
    batches = EACH if client == "onnxruntime-genai" else EACH + TOGETHER
    (rows,) = rows_of(run(client, [(tmp_path / "last", "fp32")], batches, tmp_path))
    assert rows == [[expected[text] for text in texts] for texts in batches]


# ----------------------------------------------------------------------------------------------------------- examples


SERVICES = {
    "Python": [sys.executable, ROOT / "examples" / "service.py"],
    "Node": ["node", ROOT / "examples" / "service.mjs"],
}
# What an example runs: a kind of cache, and the precision of the weights.
KINDS = [
    ("growing", "fp32"),
    *(
        pytest.param(cache, precision, marks=pytest.mark.slow)
        for cache, precision in (
            *(("growing", precision) for precision in PRECISIONS if precision != "fp32"),
            ("inplace", "fp32"),
            ("inplace", "int8"),
            ("inplace-int8", "fp32"),
            ("inplace-int8", "fp16"),
        )
    ),
]
GREEDY = {"max_new_tokens": COUNT, "temperature": 0}
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="nothing here counts a process's threads")

services = pytest.mark.parametrize("service", ["Python", pytest.param("Node", marks=needs_node)])
examples = pytest.mark.parametrize(
    "example", ["Python", pytest.param("Node", marks=needs_node), pytest.param("C++", marks=needs_headers)]
)


@contextmanager
def started(command, cwd, stdout=subprocess.PIPE):
    """A process that is ended at last."""
    process = subprocess.Popen([str(c) for c in command], stdout=stdout, text=True, cwd=cwd, env=ENVIRONMENT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(HANGS)
        if process.stdout:
            process.stdout.close()


@contextmanager
def running(service, directory, cwd, *options):
    """A service on a free port; gives its address."""
    with started([*SERVICES[service], directory, "--port", "0", *options], cwd) as process:
        yield process.stdout.readline().strip()


def post(address, body):
    return urllib.request.urlopen(urllib.request.Request(address, body), timeout=HANGS)


def ask(address, **question):
    return post(address, json.dumps(question).encode())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The client in C++."""
    folder = tmp_path_factory.mktemp("cpp")
    library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.1*"))
    (folder / "libonnxruntime.so.1").symlink_to(library)
    build = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", ROOT / "examples/client.cpp", "-isystem", HEADERS, "-L", folder, "-l:libonnxruntime.so.1", f"-Wl,-rpath,{folder}", "-o", folder / "client"]  # fmt: skip
    subprocess.run([str(part) for part in build], check=True)
    return folder / "client"


def refused(command, cwd):
    """The one line with which a program ends that refuses what it is given."""
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT)
    assert (result.returncode, result.stdout) == (1, ""), result.stderr
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture
def continuation(request, tmp_path):
    """``continuation(example, path, model)``: the text that an example generates after the first prompt."""
    tokenizer = Tokenizer.from_pretrained(SHAKESPEARE)

    def generate(example, directory, model=None):
        if example == "C++":
            path = directory / model if model else directory
            command = [request.getfixturevalue("compiled"), path, "--new", COUNT, "--temperature", 0, "--threads", 1]
            command += ["--", *tokenizer.encode(PROMPTS[0])]
            result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
            return tokenizer.decode([int(i) for i in result.stdout.split()])
        options = ["--model", model] if model else []
        with running(example, directory, tmp_path, "--threads", "1", *options) as address:
            return ask(address, prompt=PROMPTS[0], **GREEDY).read().decode()

    return generate


def text_of(tokens):
    return Tokenizer.from_pretrained(SHAKESPEARE).decode(tokens[PROMPTS[0]])


@pytest.mark.parametrize(("cache", "precision"), KINDS)
@examples
def test_an_example_runs_every_precision_and_cache(example, cache, precision, exported, wanted, continuation):
    assert continuation(example, exported(cache, precision)) == text_of(wanted(cache, precision))


@examples
def test_an_example_runs_a_model_that_gives_the_last_logits_only(example, expected, continuation, tmp_path):
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "last", ExportOptions(last=True))
    assert continuation(example, tmp_path / "last") == text_of(expected)


@examples
def test_an_example_runs_the_model_it_is_told_to_of_several_and_fp32_otherwise(example, exported, wanted, continuation):
    several = exported("growing", "all")
    assert continuation(example, several) == text_of(wanted("growing", "fp32"))
    assert continuation(example, several, contract.model_file("int4")) == text_of(wanted("growing", "int4"))


@needs_proc
@services
def test_a_service_uses_as_many_threads_as_it_is_told_to(service, directory, tmp_path):
    def threads(count):
        command = [*SERVICES[service], directory, "--port", "0", "--threads", count]
        with started(command, tmp_path) as process:
            assert process.stdout.readline()
            return len(list(Path(f"/proc/{process.pid}/task").iterdir()))

    assert threads(5) - threads(3) == threads(3) - threads(1) == 2


@needs_proc
@needs_headers
def test_the_client_in_cpp_uses_as_many_threads_as_it_is_told_to(compiled, directory, tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)  # and full: the clients wait with their first token

    def client(count):
        return started([compiled, directory, "--threads", count, "--", 1], tmp_path, writer)

    def threads(process):
        return len(list(Path(f"/proc/{process.pid}/task").iterdir()))

    with client(3) as some, client(5) as more:
        deadline = time.monotonic() + HANGS
        while threads(some) < 3 or threads(more) - threads(some) != 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    os.close(reader)
    os.close(writer)


@services
def test_a_service_refuses_a_directory_without_a_model_or_a_tokenizer(service, directory, tmp_path):
    def refusal(*options):
        return refused([*SERVICES[service], *options, "--port", "0"], tmp_path)

    assert "no onnx/model.onnx or onnx/model_quantized.onnx" in refusal(tmp_path / "missing")
    assert "no onnx/model.onnx or onnx/model_quantized.onnx" in refusal(tmp_path)
    assert "no onnx/model_q4.onnx" in refusal(directory, "--model", "onnx/model_q4.onnx")
    bare = tmp_path / "bare"
    shutil.copytree(directory / "onnx", bare / "onnx")
    assert f"{bare}: no tokenizer.json" in refusal(bare)
    shutil.copytree(directory, tmp_path / "damaged")
    (tmp_path / "damaged" / contract.model_file("fp32")).write_text("not a model")
    assert "failed:Protobuf parsing failed" in refusal(tmp_path / "damaged")


@needs_headers
def test_the_client_in_cpp_refuses_what_is_wrong(compiled, directory, tmp_path):
    assert "no model in onnx/" in refused([compiled, tmp_path, "--", 1], tmp_path)
    assert "File doesn't exist" in refused([compiled, directory / "onnx/model_q4.onnx", "--", 1], tmp_path)
    assert "idx=99999" in refused([compiled, directory, "--", 99999], tmp_path)
    for wrong in ([], [directory], [directory, "--"], [directory, "--cores", 2, "--", 1], [directory, "--top-k", -1, "--", 1]):  # fmt: skip
        result = subprocess.run([str(c) for c in (compiled, *wrong)], capture_output=True, text=True)
        assert (result.returncode, result.stderr.split()[0]) == (2, "usage:")


@services
def test_a_service_answers_and_samples(service, directory, tmp_path):
    prompt, tokenizer = PROMPTS[0], Tokenizer.from_pretrained(SHAKESPEARE)
    expected = generate_text(from_pretrained(SHAKESPEARE), tokenizer, prompt, COUNT, 0).removeprefix(prompt)
    with running(service, directory, tmp_path) as address:
        assert ask(address, prompt=prompt, max_new_tokens=COUNT, temperature=0).read().decode() == expected
        sampled = {ask(address, prompt=prompt, max_new_tokens=12, top_k=40, seed=i).read() for i in range(6)}
        assert len(sampled) > 1
        assert len({ask(address, prompt=prompt, max_new_tokens=12, top_k=1, seed=i).read() for i in range(3)}) == 1


@services
def test_a_service_gives_the_text_as_it_is_made(service, tmp_path):
    """It is killed at the first of very many words: it has not made them all by then."""
    config = GPT2Config(n_layer=1, n_head=1, n_embd=8, n_ctx=50_000, n_vocab=2048)
    talker = replace(random_checkpoint(config), tokenizer=open_checkpoint(SHAKESPEARE).tokenizer)
    export_onnx(talker, tmp_path / "d")
    said = json.loads((tmp_path / "d/config.json").read_text())
    (tmp_path / "d/config.json").write_text(json.dumps({**said, "eos_token_id": -1}))  # it goes on to the end
    with started([*SERVICES[service], tmp_path / "d", "--port", "0"], tmp_path) as process:
        address = process.stdout.readline().strip()
        with ask(address, prompt="My lord", max_new_tokens=config.n_ctx, temperature=0) as stream:
            text = stream.read(1)
            process.kill()
            try:
                text += stream.read()
            except http.client.IncompleteRead as error:
                text += error.partial
            except ConnectionError:
                pass
    assert 0 < len(text.split()) < config.n_ctx // 2


@services
def test_a_service_says_what_is_wrong_with_a_request(service, directory, tmp_path):
    def answer(address, body):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            post(address, body)
        with refusal.value as response:
            assert response.code == 400
            (line,) = response.read().decode().splitlines()
            return line

    with running(service, directory, tmp_path) as address:
        for body in ({}, {"prompt": None}, {"prompt": 5}, [], ["prompt"], None):
            assert 'a string "prompt"' in answer(address, json.dumps(body).encode())
        assert "the prompt has 0 tokens" in answer(address, b'{"prompt": ""}')
        assert "it must have 1 to 256" in answer(address, json.dumps({"prompt": "lord " * 300}).encode())
        for wrong in ({"temperature": -1}, {"temperature": "hot"}, {"top_k": -1}, {"max_new_tokens": None}):
            assert "must be numbers of at least 0" in answer(address, json.dumps({"prompt": "I", **wrong}).encode())
        assert answer(address, b"prompt")
        assert ask(address, prompt=PROMPTS[0], max_new_tokens=1).code == 200


def test_a_service_takes_the_port_as_its_second_argument_too(directory, tmp_path):
    with started([*SERVICES["Python"], directory, "0"], tmp_path) as process:
        assert re.fullmatch(r"http://127.0.0.1:\d+\n", process.stdout.readline())


@needs_headers
def test_the_client_in_cpp_samples(compiled, directory):
    def run(*options):
        command = [compiled, directory, "--new", 20, *options, "--", *Tokenizer.from_pretrained(SHAKESPEARE).encode(PROMPTS[0])]  # fmt: skip
        return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout

    options = "--temperature", 0.9, "--top-k", 40, "--seed"
    assert run(*options, 1) == run(*options, 1) != run(*options, 2)
    assert run("--top-k", 1) == run("--temperature", 0)


def test_every_example_is_a_page_and_needs_no_torch():
    for name in ("service.py", "service.mjs", "client.cpp"):
        text = (ROOT / "examples" / name).read_text()
        assert 50 <= len(text.splitlines()) <= 140, name
        assert not re.search(r"^\s*(import|from) (torch|gpt2x|converters|transformers)\b", text, re.M), name


def test_every_example_knows_the_models_of_all_precisions_and_no_file_of_weights():
    for name in ("service.py", "service.mjs", "client.cpp"):
        text = (ROOT / "examples" / name).read_text()
        order = [Path(contract.model_file(precision)).name for precision in ("fp32", "int8", "w8a8", "int4", "fp16")]
        assert re.findall(r"\bmodel\w*\.onnx\b", re.search(r"model\.onnx\".*", text)[0]) == order, name
        assert len(order) == len(PRECISIONS)
        assert not re.search("safetensors|onnx_data", text), name


def test_no_lock_file_and_no_registry_is_committed():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    assert "package-lock.json" not in files.stdout
