"""Real clients of OpenAI's interface on a real server: ``make test-serve``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import BROWSER, browser
from client_programs import PROGRAMS
from live_server import in_process

from converters import open_checkpoint
from gpt2x import SHAKESPEARE, ExportOptions, OnnxTask, Tokenizer, export_onnx, pad_rows

openai = pytest.importorskip("openai", reason="OpenAI's package is not installed (make test-serve installs it)")

pytestmark = pytest.mark.filterwarnings("default")  # those of the clients are not ours

NODE_PACKAGES = Path(sys.prefix) / "node"
TEXT = (SHAKESPEARE.parent / "coriolanus.txt").read_text(encoding="utf-8")
SETTINGS = {"model": "gpt2", "prompt": "ROMEO:", "max_tokens": 30, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("served") / "model"
    export_onnx(open_checkpoint(SHAKESPEARE), home, ExportOptions(("fp32",), "inplace"))
    return home


@pytest.fixture(scope="module")
def server(folder):
    with in_process(folder, "--model-name", "gpt2", "--max-queue", 1000) as address:
        yield address


@pytest.fixture(scope="module")
def expected(server):
    """The text of ``SETTINGS``."""
    return server.complete(**SETTINGS).json["choices"][0]["text"]


# -------------------------------------------------------------------------------------------------------------- OpenAI


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_openais_package_for_python(client, expected):
    assert [model.id for model in client.models.list()] == ["gpt2"]
    whole = client.completions.create(**SETTINGS, logprobs=2)
    assert whole.choices[0].text == expected
    assert "".join(whole.choices[0].logprobs.tokens) == expected
    with client.completions.create(**SETTINGS, stream=True, stream_options={"include_usage": True}) as stream:
        pieces = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == expected
    assert pieces[-1].usage.completion_tokens == 30
    extended = client.completions.create(**SETTINGS, extra_body={"top_k": 1, "min_tokens": 30})
    assert len(extended.choices[0].text) > 30


def test_errors_are_those_that_openais_package_knows(client):
    for wrong, kind, code in (
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "context_length_exceeded"),
        ({"temperature": -1}, openai.BadRequestError, "invalid_value"),
    ):
        with pytest.raises(kind) as error:
            client.completions.create(**{**SETTINGS, **wrong})
        assert error.value.code == code
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="gpt2", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.NotFoundError, match="exported for text-generation"):
        client.embeddings.create(model="gpt2", input="a")


def test_embeddings_by_openais_package_are_those_of_the_model(tmp_path):
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "embed", ExportOptions(task="feature-extraction"))
    task, tokenizer = OnnxTask(tmp_path / "embed"), Tokenizer.from_pretrained(tmp_path / "embed")
    texts = ["ROMEO:", "O, my good lord"]
    expected = task.run(*pad_rows([tokenizer.encode(text) for text in texts]))["mean_embedding"]
    with (
        in_process(tmp_path / "embed") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        for settings in ({}, {"encoding_format": "float"}):  # without it, the package asks for base64
            answer = client.embeddings.create(model="embed", input=texts, **settings)
            assert answer.usage.prompt_tokens == sum(len(tokenizer.encode(text)) for text in texts)
            np.testing.assert_allclose([one.embedding for one in answer.data], expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(openai.BadRequestError, match="dimensions is not supported"):
            client.embeddings.create(model="embed", input="a", dimensions=5)


def test_a_stream_that_openais_package_gives_up(client, server):
    with client.completions.create(**{**SETTINGS, "max_tokens": 200}, n=100, stream=True) as stream:
        next(iter(stream))
    server.wait_for(lambda: server.metric("gpt2x_cancelled_requests_total") >= 1)
    server.wait_for(lambda: server.metric("gpt2x_running_texts") + server.metric("gpt2x_queue_texts") == 0)


@pytest.mark.skipif(
    shutil.which("node") is None or not (NODE_PACKAGES / "node_modules/openai").is_dir(),
    reason="node or OpenAI's package for it is not installed (make test-serve)",
)
def test_openais_package_for_javascript(server, expected):
    command = ["node", str(PROGRAMS / "openai_client.mjs"), str(NODE_PACKAGES), f"{server.url}/v1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["whole"] == found["streamed"] == "".join(found["tokens"]) == expected
    assert found["usage"]["completion_tokens"] == 30 and found["models"] == ["gpt2"]
    codes = [{"code": code, "known": True} for code in ("model_not_found", "context_length_exceeded")]
    assert found["errors"] == codes


# ---------------------------------------------------------------------------------------------------------- other clients


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_shows_a_stream(server, expected):
    body = json.dumps({**SETTINGS, "stream": True})
    command = ["curl", "-sSN", f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    events = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line]
    assert events.pop() == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == expected


def test_langchains_class_of_openai(server, expected):
    langchain = pytest.importorskip("langchain_openai", reason="LangChain is not installed (make test-serve)")
    model = langchain.OpenAI(
        model="gpt2", base_url=f"{server.url}/v1", api_key="none", max_tokens=30, seed=1, temperature=1, max_retries=0
    )
    assert model.invoke("ROMEO:") == expected
    assert "".join(model.stream("ROMEO:")) == expected
    stopped = model.invoke("ROMEO:", stop=[expected[10:14]])
    assert stopped == expected[: expected.index(expected[10:14])]


PAIRS = [
    ("ROMEO:", " What say you"),
    ("", "First Citizen:"),
    ("a space at the end ", "of the context"),
    (TEXT[:3000], " is longer than the context"),
    ("JULIET:", TEXT[:600]),
    ("caf\u00e9", " \u65e5\u672c"),
]


def requests_of(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def harness(server, folder):
    """lm-evaluation-harness's model for servers, and gpt2x's own adapter."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (make test-serve)")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from gpt2x.lm_eval import GPT2XLM

    theirs = LocalCompletionsAPI(
        model="gpt2", base_url=f"{server.url}/v1/completions", tokenizer=str(folder), tokenizer_backend="huggingface",
        max_length=257, num_concurrent=1, batch_size=4, max_retries=1,
    )  # fmt: skip
    # Theirs keeps a token of its length for the answer, and another of every text is a target alone.
    return theirs, GPT2XLM(str(folder), batch_size=2, max_length=255)


def test_the_harness_scores_texts_as_with_its_direct_adapter(harness):
    theirs, ours = harness
    found = theirs.loglikelihood(requests_of("loglikelihood", *PAIRS), disable_tqdm=True)
    expected = ours.loglikelihood(requests_of("loglikelihood", *PAIRS))
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], rel=1e-5)
    assert [one[1] for one in found] == [one[1] for one in expected]


def test_the_harness_scores_long_texts_as_with_its_direct_adapter(harness):
    theirs, ours = harness
    texts = [(TEXT[:2500],), ("ROMEO:",)]
    found = theirs.loglikelihood_rolling(requests_of("loglikelihood_rolling", *texts), disable_tqdm=True)
    expected = ours.loglikelihood_rolling(requests_of("loglikelihood_rolling", *texts))
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_harness_continues_texts_as_with_its_direct_adapter(harness):
    theirs, ours = harness
    settings = {"max_gen_toks": 20, "until": ["\n\n"]}
    arguments = [(context, settings) for context in ("ROMEO:", "To be, or not to be")]
    found = theirs.generate_until(requests_of("generate_until", *arguments), disable_tqdm=True)
    assert found == ours.generate_until(requests_of("generate_until", *arguments))


# ------------------------------------------------------------------------------------------------------------- the page


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")
def test_the_page_streams_a_text_and_shows_probabilities(server, expected, tmp_path):
    with browser(tmp_path / "profile") as page:
        page.open(server.url)
        page.wait_for("document.querySelector('#model')?.value === 'gpt2'")
        page.run(
            "for (const [id, value] of Object.entries({max_tokens: 30, temperature: 1, top_p: 1, seed: 1, prompt: 'ROMEO:'}))"
            " document.getElementById(id).value = value"
        )
        page.run("document.querySelector('#start').click()")
        page.wait_for("!document.querySelector('#start').disabled && document.querySelectorAll('.token').length > 0")
        assert page.run("document.querySelector('#text').textContent") == "ROMEO:" + expected
        assert "30 tokens" in page.run("document.querySelector('#status').textContent")
        assert "tokens/s" in page.run("document.querySelector('#status').textContent")
        assert page.run("document.querySelectorAll('.token').length") == 30
        page.hover(".token:nth-of-type(4)")
        page.wait_for("!document.querySelector('#details').hidden")
        details = page.run("document.querySelector('#details').textContent").splitlines()
        assert 5 <= len(details) <= 6 and all("%" in line for line in details)
        assert sum(line.startswith("→") for line in details) == 1
        assert page.requested and all(url.startswith((server.url, "data:")) for url in page.requested)


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")
def test_the_page_shows_an_error_and_stops_a_text(server, tmp_path):
    with browser(tmp_path / "profile") as page:
        page.open(server.url)
        page.wait_for("document.querySelector('#model')?.value === 'gpt2'")
        page.run("document.getElementById('max_tokens').value = 99999")
        page.run("document.querySelector('#start').click()")
        page.wait_for("document.querySelector('#status').className === 'error'")
        assert "the context is 256" in page.run("document.querySelector('#status').textContent")
        before = server.metric("gpt2x_cancelled_requests_total")
        page.run("document.getElementById('max_tokens').value = 250")
        page.run("document.getElementById('prompt').value = 'ROMEO'")
        page.run("document.querySelector('#start').click()")
        page.wait_for(
            "document.querySelectorAll('.token').length > 2 || document.querySelector('#start').disabled === false"
        )
        page.run("document.querySelector('#cancel').click()")
        page.wait_for("!document.querySelector('#start').disabled")
        assert server.metric("gpt2x_cancelled_requests_total") >= before
        page.open(f"{server.url}/docs")
        page.wait_for("document.querySelectorAll('table').length >= 4")
        assert "POST /v1/completions" in page.run("document.body.textContent")
