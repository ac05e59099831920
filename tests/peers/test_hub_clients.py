"""Clients load an export from a Hub without options, and return gpt2x's tokens. The Hub is that of hub_server.

``make test-clients`` installs the clients. Tests of a client that is not installed are skipped.
"""

import itertools
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode

import onnx
import pytest
from checkpoints import assert_same_bytes
from client_programs import CLIENTS, PACKAGES, PROGRAMS, clients, needs_module, needs_node
from commands import SEVERAL, Done, done
from hub_server import HANGS, environment, running, serving
from paths import ROOT

from converters import open_checkpoint
from gpt2x import SHAKESPEARE, Tokenizer, contract, from_pretrained, precisions
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.generation.loop import Generation
from gpt2x.generation.sampling import Sampling
from gpt2x.runtimes.onnxruntime import OnnxDecoder
from gpt2x.runtimes.torch import TorchDecoder

# The gap between the two likeliest tokens is at least 0.014. After the second prompt, the tokens of int8 differ from those of
# fp32. They are the same whether activations are rounded to 8 bits (Python, Node) or not (ONNX Runtime in a browser).
PROMPTS = ["My lord, I", "kingly-crowned"]
COUNT = 16
PRECISIONS = "fp32", "int8"
GRAPHS = {f"onnx/{Path(contract.model_file(precision)).name}" for precision in PRECISIONS}
NAMES = {  # repository -> the files of its models
    "me/external": GRAPHS | {f"onnx/{contract.data_file(precision)}" for precision in PRECISIONS},
    "me/single": GRAPHS,
    "me/old": GRAPHS | {"onnx/model.safetensors", "onnx/model_quantized.onnx_data"},
}
NEW_LAYOUTS = "me/external", "me/single"
BROWSER = shutil.which("chromium")
# An own profile, no background services, and no host except this machine.
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--disable-breakpad", "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]  # fmt: skip

needs_browser = pytest.mark.skipif(
    BROWSER is None or not (PACKAGES / "node_modules" / "onnxruntime-web").is_dir(),
    reason="chromium or the packages for Node are not installed (make test-clients)",
)

pytestmark = pytest.mark.slow  # make test-clients and CI run these


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The Hub's repositories: an export with external weights, one with the weights in the models, and an old one."""
    folder = tmp_path_factory.mktemp("repositories")
    checkpoint = open_checkpoint(SHAKESPEARE)
    export_onnx(checkpoint, folder / "me/external", ExportOptions(PRECISIONS))
    export_onnx(checkpoint, folder / "me/single", ExportOptions(PRECISIONS, single_file=True))
    write_old_layout(folder / "me/external", folder / "me/old")
    for repository, names in NAMES.items():
        directory = folder / repository
        assert {path.relative_to(directory).as_posix() for path in directory.glob("onnx/*")} == names
    return folder


def write_old_layout(export, directory):
    """Write an export as gpt2x 0.1.0 did: the float32 weights are ``onnx/model.safetensors``, which an index names."""
    shutil.copytree(export, directory)
    (directory / "onnx/model.onnx_data").rename(directory / "onnx/model.safetensors")
    graph = onnx.load(directory / "onnx/model.onnx", load_external_data=False)
    external = [tensor for tensor in graph.graph.initializer if tensor.external_data]
    for entry in (entry for tensor in external for entry in tensor.external_data if entry.key == "location"):
        entry.value = "model.safetensors"
    onnx.save(graph, directory / "onnx/model.onnx")
    weight_map = dict.fromkeys(sorted(tensor.name for tensor in external), "onnx/model.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((directory / "config.json").read_text())
    del config["transformers.js_config"]
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture
def hub(root):
    with running(root) as hub:
        yield hub


@pytest.fixture
def run(hub, tmp_path):
    """Run a client that uses this Hub, with an empty cache, and return what it prints."""
    client = environment(hub.url, tmp_path / "hf-home", OMP_NUM_THREADS="1")

    def run(*command):
        words = [str(word) for word in command]
        result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=client, timeout=HANGS)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture(scope="module")
def expected(root):
    """Precision -> prompt -> tokens: for fp32 from the torch model, for int8 from gpt2x's decoder."""
    quantized = OnnxDecoder(root / "me/external", precision="int8")
    decoders = {"fp32": TorchDecoder(from_pretrained(SHAKESPEARE)), "int8": quantized}
    tokens = {precision: {p: tokens_after(p, decoder) for p in PROMPTS} for precision, decoder in decoders.items()}
    assert tokens["fp32"][PROMPTS[1]] != tokens["int8"][PROMPTS[1]]  # so a client that loads the wrong one fails
    assert tokens["int8"] == {p: tokens_after(p, quantized.unoptimized()) for p in PROMPTS}  # activations not rounded
    return tokens


def tokens_after(prompt, decoder):
    ids = Tokenizer.from_pretrained(SHAKESPEARE).encode(prompt)
    return [token for (token,) in Generation(decoder, [ids], COUNT, Sampling(temperature=0))]


def rows(expected, precision):
    return [expected[precision][prompt] for prompt in PROMPTS]


def text_of(prompt, tokens):
    tokenizer = Tokenizer.from_pretrained(SHAKESPEARE)
    return tokenizer.decode([*tokenizer.encode(prompt), *tokens])


def fetched(hub, repository):
    """Return the files in ``onnx/`` of a repository that were downloaded."""
    pattern = re.compile(rf"/{repository}/resolve/\w+/(onnx/.+)")
    paths = [pattern.fullmatch(request.path) for request in hub.requests if request.method == "GET"]
    return {match[1] for match in paths if match}


# ------------------------------------------------------------------------------------------------------- Python


def run_client(run, client, models, folder):
    """Run a client of test_clients on models (directory, precision). Return the tokens after the prompts, for each."""
    named = [
        {"directory": str(d), "file": contract.model_file(p), "dtype": precisions.PRECISIONS[p].transformers_js}
        for d, p in models
    ]
    task = folder / "task.json"
    task.write_text(json.dumps({"models": named, "batches": [[prompt] for prompt in PROMPTS], "count": COUNT}))
    answer = json.loads(run(*CLIENTS[client], task).splitlines()[-1])
    return [[tokens for batch in batches for tokens in batch] for batches in answer]


@clients("optimum")
def test_optimum_loads_every_precision(client, hub, run, expected, tmp_path):
    models = list(itertools.product(NEW_LAYOUTS, PRECISIONS))
    assert run_client(run, client, models, tmp_path) == [rows(expected, precision) for _, precision in models]
    for repository in NEW_LAYOUTS:
        assert fetched(hub, repository) == NAMES[repository]


@clients("onnxruntime-genai")
@needs_module("huggingface_hub")
def test_genai_loads_a_download_of_the_repository(client, hub, run, expected, tmp_path):
    code = "import sys, huggingface_hub as hub; print(*map(hub.snapshot_download, sys.argv[1:]), sep='\\n')"
    directories = run(sys.executable, "-c", code, *NEW_LAYOUTS).splitlines()
    models = [(directory, "fp32") for directory in directories]
    assert run_client(run, client, models, tmp_path) == [rows(expected, "fp32")] * len(NEW_LAYOUTS)
    assert Path(directories[0], "onnx/model.onnx_data").is_symlink()  # as that library's cache has it


# ---------------------------------------------------------------------------------------------- transformers.js


def task_of(hub, *repositories):
    dtypes = [precisions.PRECISIONS[precision].transformers_js for precision in PRECISIONS]
    return json.dumps({"hub": hub.url, "names": repositories, "dtypes": dtypes, "prompts": PROMPTS, "count": COUNT})


def check_pipelines(answer, hub, expected):
    """Check what hub_pipeline.mjs returned: the texts and the tokens of each repository and dtype."""
    assert set(answer) == set(NEW_LAYOUTS)
    for repository, precision in itertools.product(NEW_LAYOUTS, PRECISIONS):
        tokens = rows(expected, precision)
        texts = [text_of(prompt, row) for prompt, row in zip(PROMPTS, tokens, strict=True)]
        assert answer[repository][precisions.PRECISIONS[precision].transformers_js] == {
            "texts": texts,
            "tokens": tokens,
        }
    for repository in NEW_LAYOUTS:
        assert fetched(hub, repository) == NAMES[repository]


@needs_node
def test_transformers_js_loads_every_dtype_in_node(hub, run, expected, tmp_path):
    task = task_of(hub, *NEW_LAYOUTS)
    answer = run("node", PROGRAMS / "hub_node.mjs", task, PACKAGES, tmp_path / "cache")
    check_pipelines(json.loads(answer), hub, expected)


@needs_node
def test_transformers_js_fails_on_the_old_layout(hub, run, tmp_path):
    """It does not know the file name of the float32 weights there, so the other tests can fail."""
    with pytest.raises(AssertionError, match="External data path does not exist.*model.safetensors"):
        run("node", PROGRAMS / "hub_node.mjs", task_of(hub, "me/old"), PACKAGES, tmp_path / "cache")
    assert fetched(hub, "me/old") == {"onnx/model.onnx"}


class PageServer(ThreadingHTTPServer):
    def __init__(self, *args):
        super().__init__(*args)
        self.answers: queue.Queue = queue.Queue()


class PageHandler(SimpleHTTPRequestHandler):
    """Serves this project's files, and receives the answers of pages."""

    server: PageServer

    def __init__(self, *args):
        super().__init__(*args, directory=ROOT)

    def log_message(self, *args):
        pass

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        self.server.answers.put(json.loads(data))


@contextmanager
def page_server():
    """A server for pages, with a queue of ``answers``."""
    with serving(PageServer(("127.0.0.1", 0), PageHandler)) as server:
        yield server


@contextmanager
def browser(address, folder, ended):
    """Open a page in headless Chromium. ``ended`` is called when the process ends."""
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", address]
    with open(folder / "chromium.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    watcher = threading.Thread(target=lambda: (process.wait(), ended()))
    watcher.start()
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        watcher.join()


def answer_of_page(page, query, folder):
    """What a page in tests/peers/clients sends back from Chromium."""
    with page_server() as server:
        address = f"http://127.0.0.1:{server.server_port}/tests/peers/clients/{page}?{urlencode(query)}"
        with browser(address, folder, lambda: server.answers.put({"error": "Chromium has ended"})):
            answer = first_of(server.answers)
    assert "error" not in answer, f"{answer['error']}\n{(folder / 'chromium.log').read_text(errors='replace')}"
    return answer


def first_of(answers):
    try:
        return answers.get(timeout=HANGS)
    except queue.Empty:
        return {"error": f"the page sent nothing for {HANGS} seconds"}


@needs_browser
def test_transformers_js_loads_every_dtype_in_a_browser(hub, expected, tmp_path):
    task = task_of(hub, *NEW_LAYOUTS)
    answer = answer_of_page("hub_browser.html", {"task": task, "packages": "/examples/node_modules"}, tmp_path)
    check_pipelines(answer, hub, expected)


# -------------------------------------------------------------------------------------------------------- gpt2x


@needs_module("huggingface_hub")
def test_gpt2x_runs_inspects_and_converts_every_layout(hub, run, expected, tmp_path):
    """It runs them in one process, which takes less time."""
    commands = [command for repository in NAMES for command in commands_on(repository)]
    answers = json.loads(run(sys.executable, "-c", SEVERAL, json.dumps(commands)))
    printed = [done(Done(answer)).stdout for answer in answers]
    for repository in NAMES:
        *texts, facts, _ = printed[: len(commands_on(repository))]
        printed = printed[len(commands_on(repository)) :]
        ran = ("fp32", "int8", "fp32", "fp32")
        assert texts == [text_of(PROMPTS[1], expected[precision][PROMPTS[1]]) + "\n" for precision in ran]
        assert json.loads(facts)["path"] == f"hf://{repository}"
        assert_same_bytes(open_checkpoint(SHAKESPEARE), open_checkpoint(tmp_path / f"{repository}.safetensors"))
        assert fetched(hub, repository) == NAMES[repository]


def commands_on(repository):
    source = f"hf://{repository}"
    generate = ["generate", source, PROMPTS[1], "--max-new-tokens", str(COUNT), "--temperature", "0"]
    runs = [[*generate, "--precision", precision] for precision in PRECISIONS]
    runs += [generate, [*generate, "--runtime", "torch"]]
    return [*runs, ["inspect", source, "--json"], ["convert", source, f"{repository}.safetensors"]]


@needs_module("huggingface_hub")
def test_a_conversion_downloads_only_the_float32_model(hub, run):
    run(sys.executable, "-m", "gpt2x", "convert", "hf://me/external", "out.safetensors")
    assert fetched(hub, "me/external") == {"onnx/model.onnx", "onnx/model.onnx_data"}
