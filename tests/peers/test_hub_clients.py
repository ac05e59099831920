"""Clients load an export from a Hub with no options, and give the tokens that gpt2x gives. The Hub is hub_server's.

``make test-clients`` installs the clients. One that is not installed is skipped, with its reason.
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
from hub_server import running
from paths import ROOT

from converters import open_checkpoint
from gpt2x import SHAKESPEARE, Tokenizer, contract, from_pretrained
from gpt2x.export.model_card import DTYPES
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.generation.loop import Generation
from gpt2x.generation.sampling import Sampling
from gpt2x.runtimes.onnxruntime import OnnxDecoder
from gpt2x.runtimes.torch import TorchDecoder

# No token is nearer a tie than 0.014. After the second prompt int8 has other tokens than fp32, and has the same ones
# whether activations are rounded to 8 bits (Python, Node) or not (ONNX Runtime in a browser).
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
# A profile of its own, no services of its own, and no host but this machine.
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
    """What the Hub holds: an export with its weights beside the models, one with them inside, and an old one."""
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
    """An export as gpt2x 0.1.0 wrote it: the float32 weights are ``onnx/model.safetensors``, which an index names."""
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
def environment(hub, tmp_path):
    """Of a client that finds this Hub, and has cached nothing."""
    kept = {key: value for key, value in os.environ.items() if not key.lower().startswith(("hf_", "hugging_face_"))}
    kept = {key: value for key, value in kept.items() if not key.lower().endswith("_proxy")}
    return {
        **kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf-home"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


@pytest.fixture
def run(environment, tmp_path):
    """Run a client's process, and return what it prints."""

    def run(*command):
        words = [str(word) for word in command]
        result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture(scope="module")
def expected(root):
    """Precision -> prompt -> its tokens: of fp32 the torch model's, of int8 those of gpt2x's decoder."""
    quantized = OnnxDecoder(root / "me/external", precision="int8")
    decoders = {"fp32": TorchDecoder(from_pretrained(SHAKESPEARE)), "int8": quantized}
    tokens = {precision: {p: tokens_after(p, decoder) for p in PROMPTS} for precision, decoder in decoders.items()}
    assert tokens["fp32"][PROMPTS[1]] != tokens["int8"][PROMPTS[1]]  # so a client that took the other would be seen
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
    """The files below ``onnx/`` that were downloaded of a repository."""
    pattern = re.compile(rf"/{repository}/resolve/\w+/(onnx/.+)")
    paths = [pattern.fullmatch(request.path) for request in hub.requests if request.method == "GET"]
    return {match[1] for match in paths if match}


# ------------------------------------------------------------------------------------------------------- Python


def run_client(run, client, models, folder):
    """One of the clients of test_clients, over models (directory, precision): for each, the tokens after the prompts."""
    named = [{"directory": str(d), "file": contract.model_file(p), "dtype": DTYPES[p]} for d, p in models]
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
    dtypes = [DTYPES[precision] for precision in PRECISIONS]
    return json.dumps({"hub": hub.url, "names": repositories, "dtypes": dtypes, "prompts": PROMPTS, "count": COUNT})


def check_pipelines(answer, hub, expected):
    """What hub_pipeline.mjs returned: the text and the tokens of each repository and dtype."""
    assert set(answer) == set(NEW_LAYOUTS)
    for repository, precision in itertools.product(NEW_LAYOUTS, PRECISIONS):
        tokens = rows(expected, precision)
        texts = [text_of(prompt, row) for prompt, row in zip(PROMPTS, tokens, strict=True)]
        assert answer[repository][DTYPES[precision]] == {"texts": texts, "tokens": tokens}
    for repository in NEW_LAYOUTS:
        assert fetched(hub, repository) == NAMES[repository]


@needs_node
def test_transformers_js_loads_every_dtype_in_node(hub, run, expected, tmp_path):
    task = task_of(hub, *NEW_LAYOUTS)
    answer = run("node", PROGRAMS / "hub_node.mjs", task, PACKAGES, tmp_path / "cache")
    check_pipelines(json.loads(answer), hub, expected)


@needs_node
def test_a_client_that_cannot_load_a_repository_is_seen(hub, run, tmp_path):
    """transformers.js does not know the name that the float32 weights have in the old layout."""
    with pytest.raises(AssertionError, match="External data path does not exist.*model.safetensors"):
        run("node", PROGRAMS / "hub_node.mjs", task_of(hub, "me/old"), PACKAGES, tmp_path / "cache")
    assert fetched(hub, "me/old") == {"onnx/model.onnx"}


class PageServer(ThreadingHTTPServer):
    def __init__(self, *args):
        super().__init__(*args)
        self.answers: queue.Queue = queue.Queue()


class PageHandler(SimpleHTTPRequestHandler):
    """The files of this project, and what a page sends back."""

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
    """A server of pages, whose ``answers`` are a queue."""
    with PageServer(("127.0.0.1", 0), PageHandler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def browser(address, folder, ended):
    """Headless Chromium on a page. ``ended`` is called when its process has ended."""
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
        return answers.get(timeout=120)
    except queue.Empty:
        return {"error": "the page sent nothing for two minutes"}


@needs_browser
def test_transformers_js_loads_every_dtype_in_a_browser(hub, expected, tmp_path):
    task = task_of(hub, *NEW_LAYOUTS)
    answer = answer_of_page("hub_browser.html", {"task": task, "packages": "/examples/node_modules"}, tmp_path)
    check_pipelines(answer, hub, expected)


# -------------------------------------------------------------------------------------------------------- gpt2x


@needs_module("huggingface_hub")
def test_gpt2x_runs_inspects_and_converts_every_layout(hub, run, expected, tmp_path):
    """All in one process, which takes less time."""
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
def test_a_conversion_downloads_the_float32_model_alone(hub, run):
    run(sys.executable, "-m", "gpt2x", "convert", "hf://me/external", "out.safetensors")
    assert fetched(hub, "me/external") == {"onnx/model.onnx", "onnx/model.onnx_data"}
