"""The adapters of a directory, and pairs of precisions, as models of the server."""

from __future__ import annotations

import pytest
from adapters import write_adapter
from live_server import in_process, in_thread

from converters import ConversionError, open_checkpoint
from gpt2x import SHAKESPEARE
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.generation.generate import generate_text
from gpt2x.runtimes.onnxruntime import OnnxDecoder
from gpt2x.serving.metrics import Metrics
from gpt2x.serving.opening import EngineOptions, Wanted, open_models

NAMES = ("gpt2", "gpt2:one", "gpt2:two")
PAIR = "w8a8+int4"
OPTIONS = EngineOptions(max_batch_size=2, threads=1, cache_memory=1 << 26)
# Longer than two pieces of a prompt, so that the prefix cache keeps it.
PROMPT = "ROMEO: But, soft! what light through yonder window breaks? It is the east, and Juliet is the sun. " * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export of the model that ships with gpt2x, with two adapters."""
    root = tmp_path_factory.mktemp("adapters")
    base = open_checkpoint(SHAKESPEARE)
    adapters = {
        "one": write_adapter(root / "lora-one", base, size=0.2, rank=2),
        "two": write_adapter(root / "lora-two", base, size=0.25, rank=4),
    }
    options = ExportOptions(("fp32", "w8a8", "int4"), "inplace", adapters=adapters)
    export_onnx(base, root / "onnx", options)
    return root / "onnx"


@pytest.fixture(scope="module")
def models(folder):
    opened = open_models([Wanted("gpt2", folder, "fp32")], OPTIONS, Metrics())
    yield opened
    opened.close()


def expected_text(folder, tokenizer, adapter, prompt="ROMEO:", precision="fp32"):
    decoder = OnnxDecoder(folder, precision=precision, threads=1, adapter=adapter)
    return generate_text(decoder, tokenizer, prompt, 30, 0).removeprefix(prompt)


def text_of(server, model, prompt="ROMEO:"):
    answer = server.complete(model=model, prompt=prompt, max_tokens=30, temperature=0)
    assert answer.status == 200, answer.body
    return answer.json["choices"][0]["text"]


def test_each_adapter_is_a_model_with_the_text_that_generate_has(server, folder, tokenizer):
    listed = server.get("/v1/models").json["data"]
    assert [(model["id"], model["adapter"]) for model in listed] == list(zip(NAMES, (None, "one", "two"), strict=True))
    texts = {name: text_of(server, name) for name in NAMES}
    assert len(set(texts.values())) == 3
    for name, adapter in zip(NAMES, (None, "one", "two"), strict=True):
        assert texts[name] == expected_text(folder, tokenizer, adapter)
        assert server.get(f"/v1/models/{name}").json["id"] == name


def test_an_unknown_adapter_is_an_unknown_model(server):
    refused = server.complete(model="gpt2:other", prompt="a")
    assert (refused.status, refused.code) == (404, "model_not_found")
    assert "gpt2:one" in refused.json["error"]["message"]


def test_no_adapter_reads_the_prefix_cache_of_another(server, folder, tokenizer):
    prompt = tokenizer.decode(tokenizer.encode(PROMPT)[:150])
    for name, adapter in zip(NAMES, (None, "one", "two"), strict=True):
        expected = expected_text(folder, tokenizer, adapter, prompt)
        for cached in (0, 128):
            answer = server.complete(model=name, prompt=prompt, max_tokens=30, temperature=0).json
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
            assert answer["choices"][0]["text"] == expected


def test_adapters_share_the_memory_of_one_model_and_divide_that_of_the_caches(models):
    base, *others = models
    assert all(other.engine.decoder._model is base.engine.decoder._model for other in others)
    for model in models:
        plan = model.engine.plan
        assert plan.rows * plan.row_bytes + plan.prefix_bytes <= (1 << 26) // 3


def test_an_engine_that_is_closed_leaves_those_that_share_its_model_open(folder, tokenizer):
    opened = open_models([Wanted("gpt2", folder, "fp32")], OPTIONS, Metrics())
    try:
        for closed, left in (("gpt2", "gpt2:one"), ("gpt2:two", "gpt2:one")):
            opened.text_model(closed).engine.close()
            with in_thread(opened) as server:
                assert text_of(server, left) == expected_text(folder, tokenizer, "one")
    finally:
        opened.close()
    opened.close()
    for name in NAMES:
        engine = opened.text_model(name).engine
        assert not engine.alive
        assert engine.decoder._model.session is None


def test_what_was_opened_is_closed_if_two_models_get_one_name_or_the_budget_is_too_small(folder, monkeypatch):
    closed = []
    monkeypatch.setattr(OnnxDecoder, "close", lambda self: closed.append(self))
    twice = [Wanted("gpt2", folder, "fp32"), Wanted("gpt2:one", folder, "fp32")]
    with pytest.raises(ConversionError, match="two models are called gpt2:one"):
        open_models(twice, OPTIONS, Metrics())
    assert len(closed) == 2
    small = EngineOptions(max_batch_size=2, threads=1, cache_memory=1 << 21)
    with pytest.raises(ConversionError, match="raise --cache-memory"):
        open_models(twice[:1], small, Metrics())
    assert len(closed) == 3


def test_a_pair_of_precisions_is_served_with_its_adapters(folder, tokenizer):
    with in_process(folder, "--precision", PAIR, "--precision", "fp32", "--cache-memory", "64M") as server:
        listed = server.get("/v1/models").json["data"]
        base = [(model["id"], model["precision"]) for model in listed if model["adapter"] is None]
        assert base == [(f"onnx-{PAIR}", PAIR), ("onnx-fp32", "fp32")]
        for adapter in (None, "one"):
            name = f"onnx-{PAIR}" + (f":{adapter}" if adapter else "")
            assert text_of(server, name) == expected_text(folder, tokenizer, adapter, precision=PAIR)
            assert server.get(f"/v1/models/{name}").json["precision"] == PAIR


def test_an_unknown_pair_of_precisions_is_refused(gpt2x, folder):
    refused = gpt2x("serve", folder, "--port", 0, "--precision", "w8a8+int3")
    assert refused.exit_code == 2
    assert "'w8a8+int3' is not one of" in refused.stderr
