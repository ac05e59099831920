"""The server over real sockets: OpenAI's interface, its limits, and every error."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gzip
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import assert_refused
from live_server import LIMIT, held, in_process, in_thread
from paths import ROOT

from converters import open_checkpoint
from gpt2x import SHAKESPEARE
from gpt2x.export.onnx_directory import export_onnx
from gpt2x.generation.config import GenerationConfig
from gpt2x.generation.generate import continuations
from gpt2x.runtimes.batching import RunningBatch
from gpt2x.runtimes.onnxruntime import OnnxDecoder
from gpt2x.scoring.spans import Span, score_spans
from gpt2x.serving.access import parse_keys
from gpt2x.serving.chat import ChatTemplate
from gpt2x.serving.faults import FAULTS, ServingError
from gpt2x.serving.http import address_of, is_loopback, listen, most_connections
from gpt2x.serving.metrics import Metrics
from gpt2x.serving.openapi import PATHS, openapi
from gpt2x.serving.opening import EngineOptions, Wanted, open_models, wanted_models
from gpt2x.serving.settings import MAX_HEADERS

KEY = "secret-key-1"


@pytest.fixture(scope="module")
def models(exported):
    opened = open_models(
        [Wanted("gpt2", exported, "fp32"), Wanted("small/w8a8", exported, "w8a8")],
        EngineOptions(max_batch_size=4, max_queue=24, threads=1, cache_memory=1 << 26),
        Metrics(),
    )
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def decoder(exported):
    return OnnxDecoder(exported)


# ------------------------------------------------------------------------------------------------------- completions


def test_a_greedy_completion_is_the_text_of_generate(server, decoder, tokenizer):
    answer = server.complete(model="gpt2", prompt="ROMEO:", max_tokens=30, temperature=0)
    config = GenerationConfig.of(max_new_tokens=30, temperature=0)
    ((expected,),) = continuations(decoder, tokenizer, ["ROMEO:"], config)
    (choice,) = answer.json["choices"]
    assert answer.status == 200
    assert (choice["text"], choice["finish_reason"], choice["index"]) == (expected.text, "length", 0)
    assert answer.json["usage"]["completion_tokens"] == 30
    assert answer.json["model"] == "gpt2" and answer.json["object"] == "text_completion"


def test_prompts_as_text_tokens_and_lists_of_either_are_the_same(server, tokenizer):
    texts = ["ROMEO:", "The king"]
    ids = [tokenizer.encode(text) for text in texts]
    settings = {"max_tokens": 8, "seed": 4}
    listed = server.complete(prompt=texts, **settings).json["choices"]
    assert [choice["index"] for choice in listed] == [0, 1]
    assert server.complete(prompt=ids, **settings).json["choices"] == listed
    for number, text in enumerate(texts):
        for prompt in (text, ids[number]):
            (choice,) = server.complete(prompt=prompt, **settings).json["choices"]
            assert choice["text"] == listed[number]["text"]


def test_a_stream_has_the_same_text_and_ends_with_the_usage(server):
    settings = {"prompt": "ROMEO:", "max_tokens": 40, "seed": 1, "n": 2, "logprobs": 1, "echo": True}
    whole = server.complete(**settings).json
    answer = server.complete(stream=True, stream_options={"include_usage": True}, **settings)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.body.endswith(b"data: [DONE]\n\n")
    *pieces, last = answer.events
    for index in (0, 1):
        own = [choice for piece in pieces for choice in piece["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == whole["choices"][index]["text"]
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["length"]
        for field in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            found = [value for choice in own if choice["logprobs"] for value in choice["logprobs"][field]]
            assert found == whole["choices"][index]["logprobs"][field]
    assert all(piece["usage"] is None for piece in pieces)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 80


def test_a_stream_without_log_probabilities_is_json_for_every_character(server, tokenizer):
    bias = {
        str(token): 100
        for text in ('"', "\\", "\n", "\t", "/", "\x7f", "é", "\u2028")
        for token in tokenizer.encode(text)
    }
    settings = {"prompt": "x", "max_tokens": 60, "seed": 1, "n": 2, "temperature": 10, "logit_bias": bias}
    whole = server.complete(**settings).json["choices"]
    pieces = [piece["choices"][0] for piece in server.complete(stream=True, **settings).events]
    for choice in whole:
        own = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert {'"', "\\", "\n"} <= set(choice["text"])
        assert all(set(piece) == set(choice) and piece["logprobs"] is None for piece in own)


def test_the_log_probabilities_of_a_prompt_are_those_of_gpt2x_score(server, decoder, tokenizer):
    text = "O Romeo, Romeo! wherefore art thou Romeo?"
    answer = server.complete(prompt=text, max_tokens=0, echo=True, logprobs=2)
    (choice,) = answer.json["choices"]
    found = choice["logprobs"]
    ids = tokenizer.encode(text)
    (expected,) = score_spans(decoder, [Span(np.array(ids), 1)], 2)
    assert choice["text"] == text and "".join(found["tokens"]) == text
    assert [text[start:].startswith(token) for start, token in zip(found["text_offset"], found["tokens"], strict=True)]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    np.testing.assert_allclose(found["token_logprobs"][1:], expected.log_probabilities, atol=2e-5)
    best = [max(top, key=top.get) for top in found["top_logprobs"][1:]]
    assert best == [tokenizer.decode([int(row[0])]) for row in expected.alternatives.ids]


def test_a_character_of_several_tokens_is_one_piece_and_its_bytes_are_spelled(server, tokenizer):
    ids = tokenizer.encode("é🙂")
    bias = {str(token): 40 for token in ids}
    settings = {"prompt": "x", "max_tokens": 60, "seed": 1, "logit_bias": bias, "temperature": 1.5, "logprobs": 0}
    whole = server.complete(**settings).json["choices"][0]
    pieces = [piece["choices"][0] for piece in server.complete(stream=True, **settings).events]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert any(token.startswith("bytes:\\x") for token in whole["logprobs"]["tokens"])


def test_a_stop_string_ends_a_text_and_never_shows(server):
    free = server.complete(prompt="ROMEO:", max_tokens=60, temperature=0).json["choices"][0]["text"]
    stop = free[30:34]
    answer = server.complete(prompt="ROMEO:", max_tokens=60, temperature=0, stop=[stop, "never there"], stream=True)
    texts = [piece["choices"][0]["text"] for piece in answer.events]
    assert "".join(texts) == free[: free.index(stop)]
    assert answer.events[-1]["choices"][0]["finish_reason"] == "stop"


def test_best_of_returns_the_likeliest_texts(server):
    settings = {"prompt": "ROMEO:", "max_tokens": 6, "seed": 5, "logprobs": 0}
    every = server.complete(n=5, **settings).json["choices"]
    best = server.complete(n=2, best_of=5, **settings).json
    means = {choice["text"]: np.mean(choice["logprobs"]["token_logprobs"]) for choice in every}
    expected = sorted(means, key=means.get, reverse=True)[:2]
    assert [choice["text"] for choice in best["choices"]] == expected
    assert best["usage"]["completion_tokens"] == 30
    hidden = server.complete(n=2, best_of=5, **{**settings, "logprobs": None}).json["choices"]
    assert [choice["text"] for choice in hidden] == expected and hidden[0]["logprobs"] is None


def test_every_control_has_an_effect(server, tokenizer):
    base = {"prompt": "ROMEO:", "max_tokens": 40, "seed": 3, "temperature": 1.2}
    plain = server.complete(**base).json["choices"][0]["text"]
    comma = tokenizer.encode(",")[0]
    controls = (
        {"top_p": 0.3}, {"top_k": 2}, {"min_p": 0.5}, {"repetition_penalty": 3.0}, {"presence_penalty": 5},
        {"frequency_penalty": 5}, {"logit_bias": {str(comma): 30}}, {"seed": -4}, {"temperature": 0.1},
        {"stop_token_ids": [comma], "max_tokens": 200},
    )  # fmt: skip
    for control in controls:
        assert server.complete(**{**base, **control}).json["choices"][0]["text"] != plain, control
    least = server.complete(prompt="A", max_tokens=30, min_tokens=30, seed=1, logit_bias={"2047": 30}).json
    assert least["usage"]["completion_tokens"] == 30


def test_a_prompt_may_fill_the_context_and_still_gets_a_token(server):
    answer = server.complete(prompt=[5] * 256, max_tokens=1)
    assert answer.json["usage"] == {
        "prompt_tokens": 256,
        "completion_tokens": 1,
        "total_tokens": 257,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    again = server.complete(prompt=[5] * 256, max_tokens=1).json
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 192


# ---------------------------------------------------------------------------------------------------- other endpoints


def test_models_by_name(server):
    listed = server.get("/v1/models").json["data"]
    assert [(model["id"], model["precision"]) for model in listed] == [("gpt2", "fp32"), ("small/w8a8", "w8a8")]
    assert server.get("/v1/models/small/w8a8").json["id"] == "small/w8a8"
    texts = {
        name: server.complete(model=name, prompt="ROMEO:", max_tokens=40, seed=1).json["choices"][0]["text"]
        for name in ("gpt2", "small/w8a8")
    }
    assert len(set(texts.values())) == 2
    for refused in (server.complete(model="other", prompt="a"), server.get("/v1/models/other")):
        assert (refused.status, refused.code) == (404, "model_not_found")


def test_tokens_of_a_text_and_back(server, tokenizer):
    text = "Thou art, é🙂 <|endoftext|>"
    tokens = server.post("/tokenize", {"prompt": text}).json
    assert tokens == {"count": len(tokens["tokens"]), "max_model_len": 256, "tokens": tokenizer.encode(text)}
    assert server.post("/detokenize", {"tokens": tokens["tokens"]}).json == {"prompt": text}
    assert server.post("/detokenize", {"tokens": [99999]}).code == "invalid_value"
    refused = server.post("/tokenize", {"prompt": tokens["tokens"]})
    assert refused.json["error"]["message"] == "prompt: input should be a valid string"


def test_the_names_of_several_models():
    wanted = wanted_models(["a/gpt2-onnx", "x:y=b"], ["fp32", "w8a8"], None)
    assert [one.name for one in wanted] == ["gpt2-onnx-fp32", "gpt2-onnx-w8a8", "x:y-fp32", "x:y-w8a8"]
    assert [one.name for one in wanted_models(["a/b"], [], "gpt2")] == ["gpt2"]
    for sources, words in ((["a/b", "c/b"], "two models are called b"), (["é=b"], "no valid name")):
        with pytest.raises(ValueError, match=words):
            wanted_models(sources, [], None)
    mixed = wanted_models(["a=b/onnx/model_int8.onnx", "c/onnx/model.onnx", "d"], ["int8", "int4"], None)
    assert [(one.name, str(one.folder), one.precision) for one in mixed] == [
        ("a", "b", "w8a8"),
        ("c", "c", "fp32"),
        ("d-int8", "d", "int8"),
        ("d-int4", "d", "int4"),
    ]
    with pytest.raises(ValueError, match="--model-name is for one directory"):
        wanted_models(["a", "b"], [], "gpt2")


def test_health_readiness_and_metrics(server):
    assert server.get("/health").json == {"status": "alive"}
    assert server.get("/ready").json == {"status": "ready"}
    named = re.findall(r"`(gpt2x_\w+)`", (ROOT / "docs/serving.md").read_text())
    exposed = server.get("/metrics").body.decode()
    declared = {name for name in re.findall(r"^# TYPE (gpt2x_\w+)", exposed, re.MULTILINE) if "_created" not in name}
    assert len(named) > 12 and set(named) == declared


def test_the_description_of_the_interface_is_complete(server):
    described = server.get("/openapi.json").json
    assert described == json.loads(json.dumps(openapi()))
    text = json.dumps(described)
    for name in re.findall(r'"#/components/schemas/(\w+)"', text):
        assert name in described["components"]["schemas"]
    for path in PATHS:
        answer = server.send(path.method, path.path.replace("{model}", "gpt2"))
        assert answer.status == (415 if path.body else 200), path.path


def test_the_pages_load_nothing_from_other_hosts(server):
    for path in ("/", "/docs", "/page.js", "/docs.js", "/page.css"):
        answer = server.get(path)
        assert answer.status == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert not re.findall(rb"(?:https?:)?//[a-z]", answer.body.replace(b"// ", b"")), path


# ------------------------------------------------------------------------------------------------------------- chat


def chat_folder(exported, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(exported, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{{ message['role'] | upper }}:\n{{ message['content'] }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:\n{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_conversation_with_a_chat_template(exported, tmp_path):
    folder = chat_folder(exported, tmp_path)
    opened = open_models([Wanted("chat", folder, "fp32")], EngineOptions(2, threads=1, cache_memory=1 << 24), Metrics())
    messages = [{"role": "user", "content": [{"type": "text", "text": "Who is there?"}]}]
    settings = {"messages": messages, "max_tokens": 12, "seed": 1, "logprobs": True, "top_logprobs": 2}
    try:
        with in_thread(opened) as server:
            whole = server.post("/v1/chat/completions", settings).json
            (choice,) = whole["choices"]
            plain = server.complete(prompt="USER:\nWho is there?\n\nASSISTANT:\n", max_tokens=12, seed=1).json
            assert choice["message"]["content"] == plain["choices"][0]["text"]
            assert whole["object"] == "chat.completion"
            scores = choice["logprobs"]["content"]
            assert "".join(entry["token"] for entry in scores) == choice["message"]["content"]
            assert [len(entry["top_logprobs"]) for entry in scores] == [2] * 12
            events = server.post("/v1/chat/completions", {**settings, "stream": True}).events
            deltas = [event["choices"][0]["delta"] for event in events]
            assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
            assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]
            again = [*messages, choice["message"], {"role": "user", "content": "And then?"}]
            assert server.post("/v1/chat/completions", {**settings, "messages": again}).status == 200
            for body, code in (
                ({"messages": [{**choice["message"], "tool_calls": []}]}, "invalid_value"),
                ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_chat_template"),
                ({"messages": messages, "top_logprobs": 2}, "invalid_value"),
                ({"messages": messages, "tools": []}, "unsupported_value"),
                ({"messages": []}, "invalid_value"),
            ):
                assert server.post("/v1/chat/completions", body).code == code
    finally:
        opened.close()


def test_a_chat_template_that_reaches_for_more_than_the_messages_is_refused():
    for source in (
        "{{ messages.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(99999999) %}x{% endfor %}",
        "{% for i in range(90000) %}{{ 'x' * 100 }}{% endfor %}",
    ):
        with pytest.raises(ServingError, match="the chat template refuses the messages"):
            ChatTemplate(source, {}).render([{"role": "user", "content": "a"}])


# ------------------------------------------------------------------------------------------------------------- errors

WRONG = [
    ({}, "invalid_value", "prompt is missing"),
    ([], "invalid_value", "the body must be a JSON object"),
    ({"prompt": 5}, "invalid_value", "prompt must be text"),
    ({"prompt": []}, "invalid_value", "prompt must be text"),
    ({"prompt": ["a", 1]}, "invalid_value", "prompt must be text"),
    ({"prompt": [[]]}, "invalid_value", "the prompt is empty"),
    ({"prompt": ""}, "invalid_value", "the prompt is empty"),
    ({"prompt": [99999]}, "invalid_value", "token id 99999 is outside the model's vocabulary"),
    ({"prompt": [10**30]}, "invalid_value", "prompt must be text"),
    ({"prompt": "a", "max_tokens": "5"}, "invalid_value", "max_tokens: input should be a valid integer"),
    ({"prompt": "a", "max_tokens": -1}, "invalid_value", "max_tokens"),
    ({"prompt": "a", "max_tokens": 10**6}, "context_length_exceeded", "max_tokens can be 256 at most"),
    ({"prompt": [1] * 257}, "context_length_exceeded", "the prompt has 257 tokens"),
    ({"prompt": "a", "temperature": -1}, "invalid_value", "temperature"),
    ({"prompt": "a", "top_p": 1.1}, "invalid_value", "top_p"),
    ({"prompt": "a", "n": 10**9}, "invalid_value", "n: input should be less than or equal to 128"),
    ({"prompt": ["a"] * 20, "n": 20}, "invalid_value", "a request has 128 texts at most"),
    ({"prompt": ["a"] * 129}, "invalid_value", "prompt must be text"),
    ({"prompt": "a", "n": 3, "best_of": 2}, "invalid_value", "best_of is 2, less than n, 3"),
    ({"prompt": "a", "best_of": 2, "stream": True}, "invalid_value", "best_of cannot be streamed"),
    ({"prompt": "a", "stream_options": {}}, "invalid_value", "stream_options needs stream"),
    ({"prompt": "a", "logprobs": 21}, "invalid_value", "logprobs"),
    ({"prompt": "a", "stop": ""}, "invalid_value", "stop must be a string of 1 to 256 characters"),
    ({"prompt": "a", "stop": ["x"] * 17}, "invalid_value", "stop must be"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "invalid_value", "'x' is no token id"),
    ({"prompt": "a", "logit_bias": {"1": 1e308}}, "invalid_value", "logit_bias.1: input should be less than"),
    ({"prompt": "a", "logit_bias": {"99999": 1}}, "invalid_value", "a control names token id 99999"),
    ({"prompt": "a", "logit_bias": {str(i): 1 for i in range(1025)}}, "invalid_value", "logit_bias"),
    (
        {"prompt": "a", "stop_token_ids": [99999]},
        "invalid_value",
        "eos_token_id or stop_token_ids names token id 99999",
    ),
    ({"prompt": "a", "min_tokens": 20, "max_tokens": 10}, "invalid_value", "min_tokens is 20, more than max_tokens"),
    ({"prompt": "a", "repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
    ({"prompt": "a", "max_new_tokens": 5}, "invalid_value", "unknown field: max_new_tokens"),
    ({"prompt": "a", "suffix": "b"}, "unsupported_value", "suffix is not supported"),
    ({"prompt": "a", "logprobs": True}, "invalid_value", "logprobs: input should be a valid integer"),
    ({"prompt": [True]}, "invalid_value", "prompt must be text"),
    ({"prompt": "a", "seed": 1 << 63}, "invalid_value", "seed: input should be less than"),
]


@pytest.mark.parametrize(("body", "code", "words"), WRONG)
def test_a_request_that_is_wrong_is_refused_in_openais_form(server, body, code, words):
    answer = server.post("/v1/completions", body)
    assert answer.status == FAULTS[code].status == 400
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["type"]) == (code, "invalid_request_error")
    assert words in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b'{"prompt": "a"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}",
    ],
)  # fmt: skip
def test_json_that_is_damaged_or_hostile_is_refused(server, body):
    answer = server.post("/v1/completions", body)
    assert answer.status == 400 and answer.code in ("invalid_json", "invalid_value")


def test_paths_methods_and_bodies_that_there_are_not(server):
    assert (server.get("/nothing").status, server.get("/nothing").code) == (404, "not_found")
    for method in ("GET", "POST"):  # and no redirection, which would follow the Host header
        refused = server.send(method, "/v1/completions/")
        assert (refused.status, refused.code) == (404, "not_found")
    refused = server.send("DELETE", "/v1/completions")
    assert (refused.status, refused.code) == (405, "method_not_allowed")
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refused = server.send("POST", "/v1/completions", b'{"prompt": "a"}', Content_Type=kind)
        assert (refused.status, refused.code) == (415, "unsupported_media_type")
    refused = server.post("/v1/completions", gzip.compress(b'{"prompt": "a"}'), Content_Encoding="gzip")
    assert (refused.status, refused.code) == (415, "unsupported_media_type")
    assert server.post("/v1/completions", {"prompt": "a"}, Content_Encoding="identity").status == 200
    refused = server.post("/v1/embeddings", {"input": "a"})
    assert (refused.status, refused.code) == (404, "not_exported")
    refused = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
    assert (refused.status, refused.code) == (400, "no_chat_template")


def test_a_body_that_is_too_large_is_refused_before_it_was_read(models):
    with in_thread(models, max_body=1000) as server:
        answer = server.post("/v1/completions", {"prompt": "a" * 1000})
        assert (answer.status, answer.code) == (413, "request_too_large")
        with server.connect() as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n" + b"200\r\n" + b"a" * 512 + b"\r\n200\r\n" + b"a" * 512 + b"\r\n"
            )
            assert client.recv(1000).startswith(b"HTTP/1.1 413")


def test_keys(models):
    with in_thread(models, keys=(b"other-key-0", KEY.encode())) as server:
        for header in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": KEY},
            {"Authorization": f"Basic {KEY}"},
        ):
            for refused in (server.get("/v1/models", **header), server.post("/tokenize", {"prompt": "a"}, **header)):
                assert (refused.status, refused.code) == (401, "invalid_api_key")
                assert refused.headers["www-authenticate"] == "Bearer"
        assert server.get("/v1/models", Authorization=f"Bearer {KEY}").status == 200
        for path in ("/", "/health", "/ready", "/metrics"):
            assert server.get(path).status == 200


def test_a_file_of_keys():
    assert parse_keys(f"# ours\n\n  {KEY} \nother-key-0\n") == (KEY.encode(), b"other-key-0")
    for text, words in (
        ("", "no key in it"),
        ("short\n", "line 1: the key has fewer"),
        ("\nü" + KEY, "line 2"),
        ("two words", "line 1"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_keys(text)


def test_keys_are_compared_in_constant_time(models, monkeypatch):
    compared = []

    def compare(a, b):
        compared.append((a, b))
        return a == b

    monkeypatch.setattr("gpt2x.serving.access.hmac.compare_digest", compare)
    with in_thread(models, keys=(KEY.encode(), b"other-key-0")) as server:
        server.get("/v1/models", Authorization=f"Bearer {KEY}")
    assert compared == [(KEY.encode(), KEY.encode()), (KEY.encode(), b"other-key-0")]


def test_a_local_server_answers_only_to_its_own_hosts(models):
    with in_thread(models, allowed_hosts=frozenset({"localhost", "::1"})) as server:
        for host in ("localhost", "localhost:8000", "[::1]:80", "LOCALHOST"):
            assert server.get("/health", Host=host).status == 200
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
            refused = server.get("/health", Host=host)
            assert (refused.status, refused.code) == (403, "host_not_allowed")


@pytest.fixture
def slow_steps(monkeypatch):
    """A step takes 20 ms or more, so that 250 of them take 5 seconds or more on any machine."""
    step = RunningBatch.step

    def slow_step(self, tokens):
        time.sleep(0.02)
        return step(self, tokens)

    monkeypatch.setattr(RunningBatch, "step", slow_step)


def test_a_full_queue_is_429_with_retry_after(server, models):
    engine = models.find("gpt2").engine
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with held(engine):
            first = pool.submit(server.complete, prompt=[1, 2], max_tokens=3, n=28, seed=1)
            server.wait_for(lambda: engine._running)
            refused = server.complete(prompt="a", n=28)
        assert (refused.status, refused.code) == (429, "queue_full")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert first.result().status == 200


@pytest.mark.usefixtures("slow_steps")
def test_texts_that_are_not_complete_in_time(models):
    with in_thread(models, generation_timeout=1) as server:
        refused = server.complete(prompt="a", max_tokens=250, n=10)
        assert (refused.status, refused.code) == (504, "generation_timeout")
        streamed = server.complete(prompt="a", max_tokens=250, n=10, stream=True)
        # On a slow machine it may end before the first event, and is then no stream.
        error = streamed.events[-1] if streamed.status == 200 else streamed.json
        assert error["error"]["code"] == "generation_timeout"
        assert b"[DONE]" not in streamed.body


def test_what_fails_in_the_model_is_500_and_the_next_request_is_served(server, models, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("gpt2x.serving.sequence.score_tokens", lambda *_: _fail())
        refused = server.complete(prompt="a", logprobs=1)
        assert (refused.status, refused.code) == (500, "model_failed")
    with monkeypatch.context() as patch:
        patch.setattr("gpt2x.serving.app.prepare_completion", lambda *_: 1 / 0)
        refused = server.complete(prompt="a")
        assert (refused.status, refused.code) == (500, "model_failed")
        assert "ZeroDivision" not in refused.body.decode()
    assert server.complete(prompt="a").status == 200


def _fail():
    from converters import CheckpointError

    raise CheckpointError("the logits contain NaN")


# ------------------------------------------------------------------------------------------------ sockets and clients


def raw_request(body):
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


@pytest.mark.usefixtures("slow_steps")
def test_a_client_that_goes_away_frees_its_rows(server, models):
    engine = models.find("gpt2").engine
    for stream in (True, False):
        with server.connect() as client:
            client.sendall(raw_request({"prompt": "a", "max_tokens": 250, "n": 24, "stream": stream}))
            server.wait_for(lambda: engine._running)
        server.wait_for(lambda: engine.idle and not engine._running and not engine._waiting)
    assert server.complete(prompt="a").status == 200


@pytest.mark.slow
def test_a_client_that_reads_nothing_is_cut_off(models, monkeypatch):
    engine = models.find("gpt2").engine
    monkeypatch.setattr("gpt2x.serving.http.listen", listen_with_small_buffers)
    with in_thread(models, write_timeout=0.2) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.settimeout(LIMIT)
        client.connect(("127.0.0.1", server.port))
        client.sendall(raw_request({"prompt": "a", "max_tokens": 250, "n": 24, "stream": True, "logprobs": 20}))
        server.wait_for(lambda: engine._running)
        server.wait_for(lambda: engine.idle)
        # The connection that asks for the metric is the only one.
        server.wait_for(lambda: server.metric("gpt2x_open_connections") == 1)
        # What was sent before the cut is still read, and not the end of the answer.
        answer = read_all(client)
        assert answer.startswith(b"HTTP/1.1 200") and b"[DONE]" not in answer


def listen_with_small_buffers(host, port):
    """A socket whose connections hold a few kilobytes that the client has not read. The answer is longer."""
    listener = listen(host, port)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return listener


SLOW = (b"", b"GET /health HTTP/1.1\r\nX-a: b\r\n", raw_request({"prompt": "a"})[:-3])


@contextlib.contextmanager
def slow_clients(server):
    """Clients that send nothing, a line, and no whole body."""
    with contextlib.ExitStack() as resources:
        clients = []
        for data in SLOW:
            client = resources.enter_context(server.connect())
            client.sendall(data)
            clients.append(client)
        yield clients


def test_others_are_served_while_headers_and_bodies_arrive_slowly(models):
    with in_thread(models, header_timeout=LIMIT, body_timeout=LIMIT) as server, slow_clients(server):
        assert server.complete(prompt="a").status == 200


def test_headers_and_bodies_that_arrive_too_slowly(models):
    limits = {"header_timeout": 0.3, "body_timeout": 0.3}
    with in_thread(models, **limits) as server, slow_clients(server) as clients:
        for client in clients:
            answer = read_all(client)
            assert answer.startswith(b"HTTP/1.1 408") and b"request_timeout" in answer


def test_an_idle_connection_may_begin_another_request_which_has_the_same_time(models, monkeypatch):
    monkeypatch.setattr("gpt2x.serving.http.KEEP_ALIVE", LIMIT)
    with in_thread(models, header_timeout=0.3) as server, idle_client(server) as client:
        time.sleep(0.5)
        client.sendall(b"GET /health")
        assert b"request_timeout" in read_all(client)


def idle_client(server):
    """A connection that got its first answer. A machine under load may be too slow at first."""
    end = time.monotonic() + LIMIT
    while True:
        client = server.connect()
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = client.recv(1000)
        if answer.startswith(b"HTTP/1.1 200"):
            return client
        client.close()
        assert b"request_timeout" in answer and time.monotonic() < end


def read_all(client):
    """What a client gets until the server closes the connection, or resets it as it has closed it before."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := client.recv(4096):
            data += chunk
    return data


def test_what_is_not_http_or_has_headers_without_end(server):
    endless = b"GET / HTTP/1.1\r\nX: ".ljust(MAX_HEADERS + 1, b"a")  # no more: what is not read resets the connection
    for data in (b"\x16\x03\x01\x02\x00" * 10 + b"\r\n\r\n", endless):
        with server.connect() as client:
            client.sendall(data)
            answer = read_all(client)
        assert answer.startswith(b"HTTP/1.1 400") and b"invalid_http" in answer


def test_a_body_whose_end_is_stated_twice_is_refused_and_nothing_after_it_is_read(server):
    hidden = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\nContent-Length: %d\r\n\r\n" % (5 + len(hidden))
    )
    with server.connect() as client:
        client.sendall(head + b"0\r\n\r\n" + hidden)
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 400") and b"invalid_http" in answer
    assert answer.count(b"HTTP/1.1") == 1


def test_more_connections_than_the_limit_are_refused_and_others_go_on(models):
    with in_thread(models, max_connections=20, header_timeout=LIMIT) as server:
        clients = [server.connect() for _ in range(20)]
        with server.connect() as late:
            answer = read_all(late)
        assert answer.startswith(b"HTTP/1.1 503") and b"too_many_connections" in answer and b"retry-after" in answer
        clients[0].sendall(raw_request({"prompt": "a"}))
        assert clients[0].recv(1000).startswith(b"HTTP/1.1 200")
        for client in clients:
            client.close()
        server.wait_for(lambda: server.get("/health").status == 200)


def test_an_address_that_others_reach_is_known_as_such():
    for host, local in (("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)):
        with listen(host, 0) as listener:
            assert is_loopback(listener) == local
            assert address_of(listener).startswith("http://")


def test_the_limit_of_connections_leaves_descriptors_for_files(monkeypatch):
    import resource

    changed = []
    monkeypatch.setattr("gpt2x.serving.http.resource.getrlimit", lambda _: (256, 1024))
    monkeypatch.setattr("gpt2x.serving.http.resource.setrlimit", lambda _, limits: changed.append(limits))
    assert most_connections(100) == 100 and not changed
    assert most_connections(10_000) == 1024 - 64 and changed == [(1024, 1024)]
    assert resource.RLIM_INFINITY != 0


# --------------------------------------------------------------------------------------------- a process of its own


def test_sigterm_under_load_loses_nothing_that_was_admitted(exported):
    options = ("--max-batch-size", 2, "--cache-memory", "64M", "--model-name", "gpt2", "--precision", "fp32")
    with in_process(exported, *options) as server, concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert server.get("/v1/models").json["data"][0]["id"] == "gpt2"
        if Path("/proc").is_dir():
            assert "torch" not in Path(f"/proc/{server.process.pid}/maps").read_text()
        jobs = [pool.submit(server.complete, prompt="a", max_tokens=120, seed=i) for i in range(12)]
        admitted = ("gpt2x_running_texts", "gpt2x_queue_texts", "gpt2x_texts_total")
        server.wait_for(lambda: sum(map(server.metric, admitted)) >= 12)
        server.terminate()
        answers = [job.result() for job in jobs]
        assert [answer.status for answer in answers] == [200] * 12
        assert all(answer.json["usage"]["completion_tokens"] > 0 for answer in answers)
        assert server.wait() == 0
        with pytest.raises(OSError):
            server.get("/health")


@pytest.mark.slow
def test_draining_has_a_limit(exported):
    with in_process(exported, "--max-batch-size", 1, "--drain-timeout", 0.5) as server:
        with server.connect() as client:
            client.sendall(raw_request({"prompt": "a", "max_tokens": 250, "n": 128, "stream": True}))
            assert client.recv(100)
            server.terminate()
            assert b"shutting_down" in read_all(client)
        assert server.wait() == 0


@pytest.mark.slow
def test_a_client_that_is_killed_in_mid_stream(exported):
    with in_process(exported, "--max-batch-size", 2) as server:
        program = (
            "import socket, sys, time; client = socket.create_connection(('127.0.0.1', int(sys.argv[1])));"
            "client.sendall(sys.stdin.buffer.read()); print(client.recv(10), flush=True); time.sleep(60)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", program, str(server.port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as client:
            client.stdin.write(raw_request({"prompt": "a", "max_tokens": 250, "n": 128, "stream": True}))
            client.stdin.close()
            assert client.stdout.readline()
            client.kill()
        server.wait_for(lambda: server.metric("gpt2x_cancelled_requests_total") == 1)
        server.wait_for(lambda: server.metric("gpt2x_running_texts") + server.metric("gpt2x_queue_texts") == 0)


@pytest.mark.slow
def test_a_directory_that_vanishes_while_it_is_served(exported, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    with in_process(folder) as server:
        before = server.complete(prompt="ROMEO:", max_tokens=200, seed=1).json["choices"]
        shutil.rmtree(folder)
        assert server.complete(prompt="ROMEO:", max_tokens=200, seed=1).json["choices"] == before
        assert server.get("/ready").status == 200


@pytest.mark.slow
def test_ten_thousand_open_sockets(exported):
    wanted = most_connections(10_000)
    with in_process(exported, "--header-timeout", 86_400) as server:
        clients = [server.connect() for _ in range(min(wanted, 9_900))]
        try:
            assert server.metric("gpt2x_open_connections") > len(clients)
            assert server.complete(prompt="ROMEO:", max_tokens=20).status == 200
        finally:
            for client in clients:
                client.close()
        server.wait_for(lambda: server.metric("gpt2x_open_connections") < 10)


def test_a_directory_or_budget_that_cannot_be_served_is_named(gpt2x, exported, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(
        gpt2x("serve", tmp_path / "empty", "--port", 0), "not a directory with an ONNX model", "--cache inplace"
    )
    small = ("--cache-memory", "100K")
    assert_refused(gpt2x("serve", exported, "--port", 0, *small), "needs 1.6 MB of cache", "raise --cache-memory")
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "growing")
    assert_refused(gpt2x("serve", tmp_path / "growing", "--port", 0), "its cache grows", "with --cache inplace")
    keys = tmp_path / "keys"
    keys.write_text("short\n")
    assert_refused(
        gpt2x("serve", exported, "--port", 0, "--api-key", keys), f"{keys}: line 1: the key has fewer than 8"
    )
    keys.write_bytes(b"key-of-ours\n\xff")
    assert_refused(gpt2x("serve", exported, "--port", 0, "--api-key", keys), f"{keys}: not UTF-8 at byte 12")
    keys.write_text("key-of-ours\n" * (1 << 17))
    assert_refused(
        gpt2x("serve", exported, "--port", 0, "--api-key", keys), f"{keys}: exceeds the limit of 1048576 bytes"
    )
    assert_refused(gpt2x("serve", exported, "--port", 0, "--api-key", tmp_path / "none"), "none", "No such file")
    assert_refused(gpt2x("serve", exported, "--host", "256.0.0.1", "--port", 0), "256.0.0.1")


@pytest.mark.parametrize("size", ["0", "0M", "5X", "1.5G", "-1", "", "9" * 16])
def test_what_is_not_a_size_is_refused(gpt2x, exported, size):
    for option in ("--cache-memory", "--max-body"):
        refused = gpt2x("serve", exported, option, size)
        assert refused.exit_code == 2
        assert f"Invalid value for '{option}': {size!r} is not a size: write 512M or 4G" in refused.stderr


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_table_of_faults_is_that_of_the_code(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import make_serving

    text = make_serving.PAGE.read_text()
    assert text == make_serving.page(text), "run python docs/make_serving.py"
    code = "".join(file.read_text() for file in (ROOT / "gpt2x/serving").glob("*.py") if file.name != "faults.py")
    assert [name for name in FAULTS if f'"{name}"' not in code] == []
    assert set(re.findall(r'ServingError\(\s*"(\w+)"', code)) <= set(FAULTS)
    del sys.modules["make_serving"]
