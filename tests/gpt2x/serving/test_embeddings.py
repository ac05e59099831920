"""``/v1/embeddings``: the numbers of the exported model, in OpenAI's form, with its limits and errors."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import threading
import time

import numpy as np
import pytest
from commands import assert_refused
from live_server import LIMIT, in_process, in_thread, wait_for
from task_models import TASKS, task_model

from converters import CheckpointError, open_checkpoint
from gpt2x import SHAKESPEARE
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.runtimes.onnx_task import OnnxTask
from gpt2x.runtimes.task_model import pad_rows
from gpt2x.serving.faults import FAULTS, ServingError
from gpt2x.serving.metrics import Metrics
from gpt2x.serving.opening import EngineOptions, Wanted, open_models

TEXTS = ["ROMEO:", "O, my good lord, what shall we do?", "Exeunt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export of the model that ships with gpt2x for feature extraction."""
    path = tmp_path_factory.mktemp("embeddings") / "embed"
    export_onnx(open_checkpoint(SHAKESPEARE), path, ExportOptions(("fp32", "w8a8"), task="feature-extraction"))
    return path


@pytest.fixture(scope="module")
def models(folder, exported):
    opened = open_models(
        [Wanted("gpt2", exported, "fp32"), Wanted("embed", folder, "fp32")],
        EngineOptions(max_batch_size=4, max_queue=10, threads=1, cache_memory=1 << 24),
        Metrics(),
    )
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def task(folder):
    return OnnxTask(folder, threads=1)


@pytest.fixture
def held(models, monkeypatch):
    """Runs of the model wait until this event is set."""
    go_on = threading.Event()
    model = models.embedding_model("embed").embedder.model
    run = model.run

    def waiting_run(ids, mask):
        assert go_on.wait(LIMIT)
        return run(ids, mask)

    monkeypatch.setattr(model, "run", waiting_run)
    yield go_on
    go_on.set()


def embed(server, given, **body):
    return server.post("/v1/embeddings", {"model": "embed", "input": given, **body})


def vectors_of(answer):
    assert answer.status == 200, answer.body
    assert [one["index"] for one in answer.json["data"]] == list(range(len(answer.json["data"])))
    return np.array([one["embedding"] for one in answer.json["data"]], np.float32)


def assert_same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pooling", "output"), [("mean", "mean_embedding"), ("last", "last_token_embedding")])
def test_the_embedding_of_each_text_is_that_of_the_text_alone(server, task, tokenizer, pooling, output):
    found = vectors_of(embed(server, TEXTS, pooling=pooling))
    expected = [task.run(*pad_rows([tokenizer.encode(text)]))[output][0] for text in TEXTS]
    assert_same(found, expected)


def test_the_answer_has_openais_form(server, tokenizer):
    answer = embed(server, TEXTS, user="me", encoding_format="float").json
    tokens = sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert set(answer) == {"object", "data", "model", "usage"}
    assert (answer["object"], answer["model"]) == ("list", "embed")
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert {one["object"] for one in answer["data"]} == {"embedding"}


def test_text_tokens_and_lists_of_either_are_the_same(server, tokenizer):
    ids = [tokenizer.encode(text) for text in TEXTS]
    expected = vectors_of(embed(server, TEXTS))
    assert_same(vectors_of(embed(server, ids)), expected)
    for given in (TEXTS[1], ids[1]):
        assert_same(vectors_of(embed(server, given)), expected[1:2])


def test_base64_is_float32_and_the_same_bits(server):
    answer = embed(server, TEXTS, encoding_format="base64").json
    found = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in answer["data"]]
    np.testing.assert_array_equal(found, vectors_of(embed(server, TEXTS)))


def test_many_texts_of_any_length_are_returned_in_their_order(server, task):
    random = np.random.default_rng(1)
    rows = [random.integers(2000, size=size).tolist() for size in random.integers(1, 256, 40)]
    found = vectors_of(embed(server, rows))
    assert_same(found, [task.run(*pad_rows([row]))["mean_embedding"][0] for row in rows])


def test_no_run_is_larger_than_its_limit(server, models, monkeypatch):
    model = models.embedding_model("embed").embedder.model
    run, shapes = model.run, []

    def watched_run(ids, mask):
        shapes.append(ids.shape)
        return run(ids, mask)

    monkeypatch.setattr(model, "run", watched_run)
    monkeypatch.setattr("gpt2x.serving.embedder.MAX_RUN_TOKENS", 300)
    vectors_of(embed(server, [[1] * size for size in (3, 256, 5, 140, 150, 2, 1, 4)]))
    assert shapes == [(1, 256), (2, 150), (4, 5), (1, 1)]


def test_the_first_model_that_fits_is_used_where_a_request_names_none(server):
    answer = server.post("/v1/embeddings", {"input": "a"})
    assert (answer.status, answer.json["model"]) == (200, "embed")
    assert server.complete(prompt="a").json["model"] == "gpt2"


def test_a_model_for_the_other_task_is_not_exported(server):
    message = {"messages": [{"role": "user", "content": "a"}]}
    for refused in (
        server.complete(model="embed", prompt="a"),
        server.post("/v1/chat/completions", {"model": "embed", **message}),
        server.post("/v1/embeddings", {"model": "gpt2", "input": "a"}),
    ):
        assert (refused.status, refused.code) == (404, "not_exported")
        assert "gpt2x export --task" in refused.json["error"]["message"]
    unknown = server.post("/v1/embeddings", {"model": "other", "input": "a"})
    assert (unknown.status, unknown.code) == (404, "model_not_found")


def test_what_else_a_server_tells_of_the_model(server, tokenizer):
    listed = {model["id"]: model for model in server.get("/v1/models").json["data"]}
    assert (listed["embed"]["task"], listed["embed"]["max_model_len"]) == ("feature-extraction", 256)
    assert listed["gpt2"]["task"] == "text-generation"
    body = {"prompt": "Exeunt", "model": "embed"}
    assert server.post("/tokenize", body).json["tokens"] == tokenizer.encode("Exeunt")
    assert server.post("/detokenize", {"tokens": [99999], "model": "embed"}).code == "invalid_value"


WRONG = [
    ({}, "invalid_value", "input is missing"),
    ({"input": ""}, "invalid_value", "the input is empty"),
    ({"input": []}, "invalid_value", "input must be text"),
    ({"input": [[]]}, "invalid_value", "the input is empty"),
    ({"input": ["a", 1]}, "invalid_value", "input must be text"),
    ({"input": ["a"] * 2049}, "invalid_value", "a list of up to 2048"),
    ({"input": [99999]}, "invalid_value", "token id 99999 is outside"),
    ({"input": [1] * 257}, "context_length_exceeded", "the input has 257 tokens; the context is 256"),
    ({"input": [[1] * 256] * 1200}, "invalid_value", "the inputs have 307200 tokens; a request has 300000 at most"),
    ({"input": "a", "dimensions": 5}, "unsupported_value", "dimensions is not supported"),
    ({"input": "a", "encoding_format": "int8"}, "invalid_value", "encoding_format"),
    ({"input": "a", "pooling": "max"}, "invalid_value", "pooling"),
    ({"input": "a", "normalize": True}, "invalid_value", "unknown field: normalize"),
]


@pytest.mark.parametrize(("body", "code", "words"), WRONG)
def test_a_request_that_is_wrong_is_refused_in_openais_form(server, body, code, words):
    answer = server.post("/v1/embeddings", {"model": "embed", **body})
    assert answer.status == FAULTS[code].status == 400
    assert (answer.code, answer.json["error"]["type"]) == (code, "invalid_request_error")
    assert words in answer.json["error"]["message"]


def test_a_full_queue_is_429_and_a_request_of_more_is_taken_alone(server, models, held):
    embedder = models.embedding_model("embed").embedder
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(embed, server, ["a"] * 20)
        server.wait_for(lambda: not embedder.idle)
        refused = embed(server, ["a"] * 10)
        held.set()
        assert (refused.status, refused.code) == (429, "queue_full")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert len(vectors_of(first.result())) == 20


def test_a_short_request_waits_for_one_run_of_a_long_one(models, held):
    embedder = models.embedding_model("embed").embedder
    ends, order = time.monotonic() + LIMIT, []
    for name, texts in (("long", 9), ("short", 1)):
        result = embedder.submit([[1, 2]] * texts, "mean", ends)
        result.add_done_callback(lambda _, name=name: order.append(name))
    held.set()
    wait_for(lambda: len(order) == 2)
    assert order == ["short", "long"]


def test_embeddings_that_are_not_complete_in_time(models, monkeypatch):
    model = models.embedding_model("embed").embedder.model
    run = model.run

    def slow_run(ids, mask):
        time.sleep(0.1)  # so that ten runs take longer than the limit on any machine
        return run(ids, mask)

    monkeypatch.setattr(model, "run", slow_run)
    with in_thread(models, generation_timeout=0.5) as server:
        refused = embed(server, ["a"] * 40)
    assert (refused.status, refused.code) == (504, "generation_timeout")


def test_a_client_that_goes_away_ends_its_request(server, models, held):
    embedder = models.embedding_model("embed").embedder
    data = json.dumps({"model": "embed", "input": ["a"] * 40}).encode()
    with server.connect() as client:
        client.sendall(
            b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        server.wait_for(lambda: not embedder.idle)
        job = embedder._jobs[0]
    server.wait_for(job.result.cancelled)
    held.set()
    server.wait_for(lambda: embedder.idle)
    assert job.left  # the rest was not run


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (CheckpointError("x"), 500, "model_failed"),
        (MemoryError(), 503, "out_of_memory"),
        (ZeroDivisionError("y"), 500, "model_failed"),
        (None, 500, "model_failed"),
    ],
)
def test_what_fails_in_the_model_fails_its_request_alone(server, models, monkeypatch, error, status, code):
    model = models.embedding_model("embed").embedder.model

    def failing_run(ids, mask):
        if error:
            raise error
        return {"mean_embedding": np.full((len(ids), model.config.n_embd), np.nan)}

    with monkeypatch.context() as patch:
        patch.setattr(model, "run", failing_run)
        refused = embed(server, "a")
    assert (refused.status, refused.code) == (status, code)
    assert "y" not in refused.json["error"]["message"].split()
    assert embed(server, "a").status == 200


def test_the_metrics_count_texts_and_tokens(folder):
    metrics = Metrics()
    opened = open_models([Wanted("embed", folder, "fp32")], EngineOptions(threads=1), metrics)
    try:
        opened.embedding_model("embed").embedder.submit([[1, 2, 3], [4]], "mean", time.monotonic() + LIMIT).result(
            LIMIT
        )
    finally:
        opened.close()
    text = metrics.text().decode()
    assert 'gpt2x_prompt_tokens_total{model="embed"} 4.0' in text
    assert 'gpt2x_texts_total{model="embed"} 2.0' in text


def test_a_model_that_is_closed_fails_what_waits(folder, monkeypatch):
    opened = open_models([Wanted("embed", folder, "fp32")], EngineOptions(threads=1), Metrics())
    model = opened.embedding_model("embed").embedder.model
    started, go_on = threading.Event(), threading.Event()

    def waiting_run(ids, mask):
        started.set()
        assert go_on.wait(LIMIT)
        return {"mean_embedding": np.zeros((len(ids), model.config.n_embd))}

    monkeypatch.setattr(model, "run", waiting_run)
    embedder = opened.embedding_model("embed").embedder
    result = embedder.submit([[1]] * 40, "mean", time.monotonic() + LIMIT)
    assert started.wait(LIMIT)
    closing = threading.Thread(target=opened.close)
    closing.start()
    wait_for(lambda: embedder._stopped)
    go_on.set()
    closing.join(LIMIT)
    with pytest.raises(ServingError, match="shut down"):
        result.result(LIMIT)
    assert not opened.alive


def test_a_server_with_embeddings_alone_answers_and_ends_in_order(folder):
    with in_process(folder, "--precision", "w8a8", "--max-context", 100) as server:
        assert server.get("/ready").status == 200
        (listed,) = server.get("/v1/models").json["data"]
        assert (listed["id"], listed["precision"], listed["max_model_len"]) == ("embed", "w8a8", 100)
        assert vectors_of(embed(server, TEXTS)).shape[0] == 3
        assert embed(server, [1] * 101).code == "context_length_exceeded"
        assert server.complete(prompt="a").code == "not_exported"
        with concurrent.futures.ThreadPoolExecutor() as pool:
            job = pool.submit(embed, server, [[7] * 100] * 200)
            server.wait_for(lambda: server.metric("gpt2x_queue_texts") > 0 or job.done())
            server.terminate()
            assert len(vectors_of(job.result())) == 200
        assert server.wait() == 0


def test_a_model_for_another_task_is_refused(gpt2x, tmp_path):
    (task,) = [name for name in TASKS if name.startswith("text")]
    task_model(task).save_pretrained(tmp_path / "model")
    export_onnx(open_checkpoint(tmp_path / "model"), tmp_path / "x", ExportOptions(task=task), need_tokenizer=False)
    assert_refused(
        gpt2x("serve", tmp_path / "x", "--port", 0), f"a model for {task}", "feature-extraction can be served"
    )
