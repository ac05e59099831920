"""The ONNX Runtime decoder: the same loop, the same text, no torch; and one clear error for whatever does not fit."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from checkpoints import TINY, gentle, random_checkpoint
from commands import assert_refused, done
from onnx import TensorProto, helper

from converters import CheckpointError, ConfigError, ConversionError, FormatError, open_checkpoint, save_checkpoint
from gpt2x import SHAKESPEARE, Tokenizer, from_pretrained, generate_text
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.generation.loop import Generation
from gpt2x.generation.sampling import Sampling
from gpt2x.runtimes.base import InputError, PromptError
from gpt2x.runtimes.onnx_run import GrowingRun
from gpt2x.runtimes.onnxruntime import OnnxDecoder


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runtime") / "shakespeare"
    export_onnx(open_checkpoint(SHAKESPEARE), folder)
    return folder


@pytest.fixture
def small(tmp_path):
    """A small model's export, beside its weights, ``small.safetensors``."""
    save_checkpoint(gentle(), tmp_path / "small.safetensors")
    export_onnx(gentle(), tmp_path / "m", need_tokenizer=False)
    return tmp_path / "small.safetensors"


@pytest.fixture
def tiny(tmp_path):
    """The tiny model's directory."""
    export_onnx(random_checkpoint(), tmp_path / "tiny", need_tokenizer=False)
    return tmp_path / "tiny"


# ------------------------------------------------------------------------------------------------------ the same loop


def test_generate_runs_onnx_without_torch(shakespeare, tmp_path):
    code = f"""
import sys
from gpt2x.cli import main
main(["generate", {str(shakespeare)!r}, "ROMEO:", "--max-new-tokens", "20", "--temperature", "0"], standalone_mode=False)
assert not {{"torch", "onnx", "transformers"}} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    expected = generate_text(from_pretrained(SHAKESPEARE), Tokenizer.from_pretrained(SHAKESPEARE), "ROMEO:", 20, 0)
    assert result.stdout == expected + "\n", result.stderr


@pytest.mark.parametrize("options", [(0,), (0.8, 40), (1.0, None, 0.9), (0.7, 20, 0.8)])
def test_batches_of_unequal_prompts_give_the_torch_models_text(shakespeare, options):
    prompts = ["ROMEO:", "The king is a good man and", "O", "First Citizen:\nBefore we proceed"]
    tokenizer, model = Tokenizer.from_pretrained(shakespeare), from_pretrained(SHAKESPEARE)
    decoder = OnnxDecoder(shakespeare, threads=1)
    assert generate_text(decoder, tokenizer, prompts, 40, *options, seed=5) == generate_text(
        model, tokenizer, prompts, 40, *options, seed=5
    )


def test_streaming_and_the_end_of_the_context(shakespeare):
    tokenizer, decoder = Tokenizer.from_pretrained(shakespeare), OnnxDecoder(shakespeare)
    pieces = list(generate_text(decoder, tokenizer, "ROMEO:", 300, 0, stream=True))
    assert "".join(pieces) == generate_text(decoder, tokenizer, "ROMEO:", 300, 0)
    generation = Generation(decoder, [tokenizer.encode("ROMEO:")], 300, Sampling(temperature=0))
    assert len(list(generation)) == 256 - 2
    assert generation.finish == ["context"]


def test_the_runtime_is_chosen(gpt2x, shakespeare, tmp_path):
    texts = {
        name: done(gpt2x("generate", shakespeare, "ROMEO:", "--max-new-tokens", 9, "--seed", 3, *options)).stdout
        for name, options in {"": (), "onnx": ("--runtime", "onnx"), "torch": ("--runtime", "torch")}.items()
    }
    assert len(set(texts.values())) == 1
    by_file = gpt2x(
        "generate",
        shakespeare / "onnx/model.onnx",
        "ROMEO:",
        "--max-new-tokens",
        9,
        "--seed",
        3,
        "--tokenizer",
        shakespeare,
    )
    assert by_file.stdout == texts[""]
    assert_refused(gpt2x("generate", SHAKESPEARE, "x", "--runtime", "onnx"), "no ONNX model in this directory")
    assert_refused(
        gpt2x("generate", shakespeare / "onnx/model.onnx", "x", "--runtime", "torch"), "which torch does not run"
    )


def test_the_cache_stays_in_onnx_runtimes_buffers(tiny):
    decoder = OnnxDecoder(tiny)
    _, first = decoder.run(np.array([[1, 2]]), None, np.array([[0, 1]]), None)
    logits, second = decoder.run(np.array([[3]]), None, np.array([[2]]), first)
    assert [value.shape() for value in second] == [[1, 2, 3, 3]] * 4
    assert [value.shape() for value in first] == [[1, 2, 2, 3]] * 4  # not written to: a beam may go on from it again
    again, _ = decoder.run(np.array([[3]]), None, np.array([[2]]), first)
    np.testing.assert_array_equal(logits, again)


@pytest.mark.parametrize("last", [False, True])
def test_a_long_prompt_goes_in_pieces_and_gives_the_same_logits(shakespeare, tmp_path, monkeypatch, last):
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "m", ExportOptions(last=last))
    decoder = OnnxDecoder(tmp_path / "m")
    ids = np.random.default_rng(0).integers(2048, size=(2, 50))
    mask = np.ones_like(ids)
    mask[1, :20] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    expected, cache = decoder.step(ids, mask, positions, None)
    sizes, run = [], GrowingRun.run

    def counted(self, ids, *others):
        sizes.append(ids.shape[1])
        return run(self, ids, *others)

    monkeypatch.setattr("gpt2x.runtimes.onnx_run.CHUNK", 16)
    monkeypatch.setattr(GrowingRun, "run", counted)
    found, pieces = decoder.step(ids, mask, positions, None)
    assert sizes == [16, 16, 16, 2]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max())
    np.testing.assert_allclose(pieces[3].numpy(), cache[3].numpy(), rtol=0, atol=1e-5)


def test_an_onnx_file_alone_needs_no_gpt2x_metadata_where_config_json_is_near(tiny):
    path = tiny / "onnx/model.onnx"
    model = onnx.load(path, load_external_data=False)
    del model.metadata_props[:]
    path.write_bytes(model.SerializeToString())
    assert OnnxDecoder(path).config == TINY
    (tiny / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no configuration in its metadata, and no config.json"):
        OnnxDecoder(path)


def test_inspect_shows_the_contract_and_where_it_came_from(gpt2x, shakespeare):
    out = done(gpt2x("inspect", shakespeare)).stdout
    for words in (
        "onnx, dialect hf",
        "1: fp32, growing cache, logits of all",
        "from model.ckpt",
        "model.ckpt.data-00000-of-00001",
        "past_key_values.3.value     float32 [batch_size, 6, past_sequence_length, 32]",
        "logits                      float32 [batch_size, sequence_length, 2048]",
    ):
        assert words in out
    facts = json.loads(done(gpt2x("inspect", shakespeare, "--json")).stdout)["onnx"]
    assert (facts["precision"], facts["cache"], facts["contract"], facts["logits"]) == ("fp32", "growing", "1", "all")
    assert [len(facts["inputs"]), len(facts["outputs"])] == [11, 9]
    assert "input_ids" in done(gpt2x("inspect", shakespeare / "onnx/model.onnx")).stdout


# --------------------------------------------------------------------------------------------------------- bad models


def assert_all_refuse(gpt2x, path, *words):
    assert_refused(gpt2x("generate", path, "x", "--tokenizer", SHAKESPEARE), *words)
    assert_refused(gpt2x("inspect", path), *words)
    assert_refused(gpt2x("verify", SHAKESPEARE, path), *words)


def test_a_directory_without_a_model(gpt2x, tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(FormatError, match=r"no ONNX model in this directory \(looked for onnx/model.onnx, model.onnx"):
        OnnxDecoder(tmp_path / "d")
    assert_refused(gpt2x("generate", tmp_path / "d", "x"), "no weights in this directory")
    assert_refused(gpt2x("generate", tmp_path / "nothing", "x"), "no such file")
    assert_refused(gpt2x("generate", tmp_path / "nothing.onnx", "x"), "no such file")


@pytest.mark.parametrize("left", [0, 8, 100, 1000, -1, -4000])
def test_a_truncated_file_of_weights(gpt2x, tiny, left):
    weights = tiny / "onnx/model.onnx_data"
    weights.write_bytes(weights.read_bytes()[:left])
    assert_all_refuse(gpt2x, tiny, "model.onnx_data")


def test_a_missing_file_of_weights(gpt2x, tiny):
    (tiny / "onnx/model.onnx_data").unlink()
    assert_all_refuse(gpt2x, tiny, "model.onnx_data")


def test_truncated_external_data_of_another_name(gpt2x, tiny):
    path = tiny / "onnx/model.onnx"
    path.write_bytes(path.read_bytes().replace(b"model.onnx_data", b"weights.another"))
    data = (tiny / "onnx/model.onnx_data").read_bytes()
    (tiny / "onnx/model.onnx_data").unlink()
    (tiny / "onnx/weights.another").write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match=f"model.onnx: ONNX Runtime {onnxruntime.__version__} cannot load it"):
        OnnxDecoder(tiny)
    assert_all_refuse(gpt2x, tiny, "model.onnx: ")


@pytest.mark.parametrize("data", [b"", b"x", b"\x08\x0b\x12\x05gpt2x", bytes(1000), b"<html>"])
def test_an_onnx_file_that_is_none(gpt2x, tiny, data):
    (tiny / "onnx/model.onnx").write_bytes(data)
    assert_all_refuse(gpt2x, tiny, "model.onnx: ")


def test_a_truncated_onnx_file(gpt2x, tiny):
    path = tiny / "onnx/model.onnx"
    whole = path.read_bytes()
    for size in range(10, len(whole), 701):
        path.write_bytes(whole[:size])
        with pytest.raises((FormatError, CheckpointError)):
            OnnxDecoder(path)


def edited(tiny, edit):
    path = tiny / "onnx/model.onnx"
    model = onnx.load(path, load_external_data=False)
    edit(model.graph)
    path.write_bytes(model.SerializeToString())
    return tiny


def rename(old, new):
    def edit(graph):
        for value in (*graph.input, *graph.output):
            value.name = new if value.name == old else value.name
        for node in graph.node:
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]

    return edit


def with_extra_input(graph):
    graph.input.append(helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1]))


def without_output(graph):
    del graph.output[2]


def with_other_heads(graph):
    graph.input[3].type.tensor_type.shape.dim[1].dim_value = 4


def with_fixed_batch(graph):
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (rename("position_ids", "positions"), ("missing   input position_ids", "extra     input positions")),
        (with_extra_input, ("extra     input use_cache_branch",)),
        (without_output, ("missing   output present.0.value",)),
        (rename("present.1.key", "present_1_key"), ("missing   output present.1.key", "extra     output present_1_key")),
        (with_fixed_batch, ("input     input_ids is int64 [1, sequence_length], not int64 [batch_size, sequence_length]",)),
    ],
)  # fmt: skip
def test_a_model_of_another_contract_names_every_difference(gpt2x, tiny, edit, words):
    assert_all_refuse(gpt2x, edited(tiny, edit), "model.onnx: other inputs or outputs than gpt2x", *words)


def test_a_model_whose_sizes_are_not_its_configurations(gpt2x, tiny):
    path = tiny / "onnx/model.onnx"
    model = onnx.load(path, load_external_data=False)
    for prop in model.metadata_props:
        if prop.key == "gpt2x.config":
            prop.value = json.dumps({**json.loads(prop.value), "n_layer": 3, "n_head": 3})
    path.write_bytes(model.SerializeToString())
    words = ("missing   input past_key_values.2.key", "past_key_values.0.key is float32 [batch_size, 2")
    assert_all_refuse(gpt2x, tiny, *words)


@pytest.mark.parametrize(
    "config", ["not json", "[]", '{"n_layer": -1}', '{"model_type": "bert"}', '{"n_layer": 1e999}']
)
def test_metadata_that_make_no_sense(gpt2x, tiny, config):
    path = tiny / "onnx/model.onnx"
    model = onnx.load(path, load_external_data=False)
    for prop in model.metadata_props:
        if prop.key == "gpt2x.config":
            prop.value = config
    path.write_bytes(model.SerializeToString())
    assert_refused(gpt2x("generate", tiny, "x", "--tokenizer", SHAKESPEARE))


# ---------------------------------------------------------------------------------------------------------- bad input


def a(*shape):
    return np.zeros(shape, np.int64)


def test_an_empty_prompt_and_one_longer_than_the_context(gpt2x, shakespeare):
    assert_refused(gpt2x("generate", shakespeare, ""), "the prompt is empty")
    assert_refused(gpt2x("generate", shakespeare, "word " * 300), "the model's context is 256")
    decoder = OnnxDecoder(shakespeare)
    with pytest.raises(PromptError, match="outside the model's vocabulary of 2048"):
        Generation(decoder, [[2048]], 1)


@pytest.mark.parametrize("shape", [(1, 0), (0, 1), (0, 0)])
def test_no_token_at_all(tiny, shape):
    with pytest.raises(InputError, match="the prompt is empty"):
        OnnxDecoder(tiny).run(a(*shape), None, a(*shape), None)


@pytest.mark.parametrize("bad", [-1, 13, 2**40, -(2**60)])
def test_token_ids_out_of_range(tiny, bad):
    with pytest.raises(InputError, match=f"token id {bad} is outside the vocabulary of 13"):
        OnnxDecoder(tiny).run(np.array([[0, bad]]), None, np.array([[0, 1]]), None)


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_positions_out_of_range(tiny, bad):
    with pytest.raises(InputError, match=f"position {bad} is outside the context of 10"):
        OnnxDecoder(tiny).run(np.array([[0, 1]]), None, np.array([[0, bad]]), None)


def test_tokens_past_the_context(tiny):
    decoder = OnnxDecoder(tiny)
    _, cache = decoder.run(a(1, 10), None, np.arange(10)[None], None)
    with pytest.raises(InputError, match="position 10 is outside the context of 10"):
        decoder.run(a(1, 1), None, np.array([[10]]), cache)


@pytest.mark.parametrize(
    ("mask", "words"),
    [(a(1, 1), r"attention_mask has the shape \(1, 1\), but 0 cached and 2 new tokens need \(1, 2\)"), (a(2, 2), "attention_mask has the shape"), (a(2), "attention_mask has the shape")],
)  # fmt: skip
def test_a_mask_of_the_wrong_length(tiny, mask, words):
    with pytest.raises(InputError, match=words):
        OnnxDecoder(tiny).run(a(1, 2), mask, a(1, 2), None)


def test_a_mask_that_forgets_the_cache(tiny):
    decoder = OnnxDecoder(tiny)
    _, cache = decoder.run(a(1, 3), None, np.arange(3)[None], None)
    with pytest.raises(
        InputError, match=r"attention_mask has the shape \(1, 1\), but 3 cached and 1 new tokens need \(1, 4\)"
    ):
        decoder.run(a(1, 1), np.ones((1, 1), int), np.array([[3]]), cache)


@pytest.mark.parametrize("bad", [a(2), a(1, 2, 3), np.zeros((1, 2)), np.array([["a"]]), np.array([[None]])])
def test_tokens_of_the_wrong_kind(tiny, bad):
    with pytest.raises(InputError, match="input_ids"):
        OnnxDecoder(tiny).run(bad, None, a(1, 2), None)


def test_positions_of_another_shape(tiny):
    with pytest.raises(InputError, match="they must be the same"):
        OnnxDecoder(tiny).run(a(2, 2), None, a(1, 2), None)


def test_a_past_of_the_wrong_shape(tiny):
    import onnxruntime as ort

    decoder = OnnxDecoder(tiny)
    good = [np.zeros((1, 2, 4, 3), np.float32)] * 4

    def refuse(arrays, words):
        with pytest.raises(InputError, match=words):
            decoder.run(a(1, 1), None, a(1, 1), [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays])

    refuse(good[:3], "the cache has 3 tensors, the model takes 4")
    refuse(
        [*good[:3], np.zeros((1, 2, 5, 3), np.float32)], r"past_key_values.1.value is tensor\(float\) \(1, 2, 5, 3\)"
    )
    refuse([np.zeros((1, 3, 4, 2), np.float32), *good[1:]], r"past_key_values.0.key is tensor\(float\) \(1, 3, 4, 2\)")
    refuse([np.zeros((2, 4, 3), np.float32), *good[1:]], r"past_key_values.0.key is")
    refuse([np.zeros((2, 2, 4, 3), np.float32)] * 4, r"\(1, 2, 4, 3\) is needed")
    refuse([good[0].astype(np.float64), *good[1:]], r"past_key_values.0.key is tensor\(double\)")


def test_integers_of_other_widths_and_layouts_are_taken(tiny):
    decoder = OnnxDecoder(tiny)
    expected, _ = decoder.run(np.array([[1, 2], [3, 4]]), None, np.array([[0, 1], [0, 1]]), None)
    others: tuple[Any, ...] = (
        np.array([[1, 2], [3, 4]], np.int32),
        np.asfortranarray([[1, 2], [3, 4]]),
        [[1, 2], [3, 4]],
    )
    for ids in others:
        found, _ = decoder.run(ids, np.ones((2, 2), bool), np.array([[0, 1], [0, 1]], np.int32), None)
        np.testing.assert_array_equal(expected, found)


def test_a_model_with_another_vocabulary_than_its_tokenizers(gpt2x, tmp_path):
    export_onnx(random_checkpoint(replace(TINY, n_ctx=50)), tmp_path / "m", need_tokenizer=False)
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(SHAKESPEARE / name, tmp_path / "m")
    assert_refused(gpt2x("generate", tmp_path / "m", "ROMEO: hark"), "does the tokenizer belong to another model?")


def test_verify_sees_another_models_onnx(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_onnx(random_checkpoint(), "a", need_tokenizer=False)
    export_onnx(random_checkpoint(seed=1), "b", need_tokenizer=False)
    done(gpt2x("verify", "a", "a"))
    result = gpt2x("verify", "a", "b", "--json", "r.json", "--report", "r.html")
    assert result.exit_code == 1
    report = json.loads(Path("r.json").read_text())
    failed = {
        c["name"]: c["details"]["failures"]
        for c in report["checks"]
        if c["passed"] is False and c["details"].get("failures")
    }
    assert {
        "full context",
        "one token",
        "token by token",
        "chunks",
        "batch rows",
        "left padding",
        "right padding",
        "ORT_DISABLE_ALL",
    } == set(failed)
    page = Path("r.html").read_text()
    assert page.count("<svg") == 3
    assert '<span class="failed">different</span>' in page
    assert "a/onnx/model.onnx against" in done(gpt2x("verify", "a", "a", "--runtime", "torch")).stdout


# ------------------------------------------------------------------------------------- found by an adversarial review


def with_metadata(tiny, **changed):
    path = tiny / "onnx/model.onnx"
    model = onnx.load(path, load_external_data=False)
    for prop in model.metadata_props:
        prop.value = changed.get(prop.key.removeprefix("gpt2x."), prop.value)
    path.write_bytes(model.SerializeToString())
    return tiny


@pytest.mark.parametrize("checksums", ["{nope", "[1]", "[" * 100_000, '{"a": {"b": 1}}'])
def test_checksums_that_make_no_sense_do_not_stop_inspect(gpt2x, tiny, checksums):
    done(gpt2x("inspect", with_metadata(tiny, source_sha256=checksums)))


def test_metadata_that_are_no_text(gpt2x, tiny):
    path = tiny / "onnx/model.onnx"
    data = with_metadata(tiny, source="SOURCE").joinpath("onnx/model.onnx").read_bytes()
    path.write_bytes(data.replace(b"SOURCE", b"\xff\xfeURCE"))
    assert_refused(gpt2x("inspect", tiny), "is not UTF-8")


def test_metadata_cannot_forge_a_line(gpt2x, tiny):
    out = done(gpt2x("inspect", with_metadata(tiny, source="x\n  checksums  all verified\x1b[2J"))).stdout
    assert "\\n  checksums  all verified\\x1b[2J" in out


def test_an_absurd_number_of_layers_in_the_metadata(gpt2x, tiny):
    said = json.loads(OnnxDecoder(tiny).metadata["gpt2x.config"])
    assert_all_refuse(
        gpt2x, with_metadata(tiny, config=json.dumps({**said, "n_layer": 10**9})), "exceeds the limit of 1000"
    )
    many = gpt2x("inspect", with_metadata(tiny, config=json.dumps({**said, "n_layer": 999})))
    assert_refused(many, "and 3968 more")


def test_a_context_that_the_model_does_not_have(tiny):
    said = json.loads(OnnxDecoder(tiny).metadata["gpt2x.config"])
    decoder = OnnxDecoder(with_metadata(tiny, config=json.dumps({**said, "n_ctx": 99, "n_positions": 99})))
    with pytest.raises(FormatError, match=r"model.onnx: ONNX Runtime cannot run it"):
        decoder.run(a(1, 50), None, np.arange(50)[None], None)


def test_corrupted_models_are_one_clear_error_and_nothing_on_stdout(tiny, capfd):
    path, rng = tiny / "onnx/model.onnx", np.random.default_rng(0)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(60):
        broken = whole.copy()
        broken[rng.integers(len(whole), size=4)] = rng.integers(256, size=4)
        path.write_bytes(broken.tobytes())
        try:
            decoder = OnnxDecoder(tiny)
            decoder.run(a(1, 2), None, np.array([[0, 1]]), None)
        except (ConversionError, InputError):
            pass
    assert capfd.readouterr().out == ""


def test_positions_longer_than_the_tokens(tiny):
    with pytest.raises(InputError, match="they must be the same"):
        OnnxDecoder(tiny).step(np.array([[1]]), None, np.array([[0, 1]]), None)


@pytest.mark.parametrize(
    ("mask", "words"),
    [(np.full((1, 2), 0.5), "attention_mask is float64"), ([["a", "b"]], "attention_mask is"), ([[1], [1, 2]], "unequal lengths")],
)  # fmt: skip
def test_a_mask_of_the_wrong_kind(tiny, mask, words):
    with pytest.raises(InputError, match=words):
        OnnxDecoder(tiny).run(a(1, 2), mask, a(1, 2), None)


def test_a_cache_of_the_wrong_kind(tiny):
    for cache in (7, "past", [np.zeros((1, 2, 0, 3), np.float32)] * 4):
        with pytest.raises(InputError, match="not one that an earlier step returned"):
            OnnxDecoder(tiny).run(a(1, 2), None, a(1, 2), cache)


def test_numbers_that_64_bits_cannot_hold(tiny):
    with pytest.raises(InputError, match="int64 is needed"):
        OnnxDecoder(tiny).run(np.array([[2**63]], np.uint64), None, a(1, 1), None)


def test_verify_runs_the_onnx_on_whichever_side_it_is(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_onnx(random_checkpoint(), "bad", need_tokenizer=False)
    save_checkpoint(random_checkpoint(), "a.safetensors")
    export_onnx(random_checkpoint(), "good", need_tokenizer=False)
    edited(
        Path("bad"),
        lambda graph: (
            next(n for n in graph.node if n.op_type == "LayerNormalization")
            .attribute[0]
            .CopyFrom(helper.make_attribute("epsilon", 0.5))
        ),
    )
    for pair in (("a.safetensors", "bad"), ("bad", "a.safetensors"), ("bad", "bad"), ("good", "bad")):
        result = gpt2x("verify", *pair)
        assert result.exit_code == 1, pair
        assert "model.onnx in ONNX Runtime" in result.stdout
    assert "ONNX of the first -             not run" in done(gpt2x("verify", "bad", "good")).stdout


def test_the_tokenizer_of_a_bare_onnx_file_is_found_above_it(gpt2x, shakespeare):
    done(gpt2x("generate", shakespeare / "onnx/model.onnx", "ROMEO:", "--max-new-tokens", 3))


def test_verify_of_what_has_no_peer_asks_for_one(gpt2x, tiny):
    result = gpt2x("verify", tiny / "onnx/model.onnx")
    assert result.exit_code == 2
    assert "is ONNX: pass B, the model to compare it with" in result.stderr


def test_verify_without_torch_compares_onnx_with_the_float64_reference(gpt2x, tiny, monkeypatch):
    monkeypatch.setattr("gpt2x.verify.packages.installed", lambda module: False)
    monkeypatch.setattr("gpt2x.verify.running.gpt2x_model", None)
    out = done(gpt2x("verify", tiny, tiny)).stdout
    assert "model.onnx in ONNX Runtime" in out
    assert "against gpt2x's reference in float64" in out
    assert "greedy tokens   same" in out


# ---------------------------------------------------------------------------------- found by another adversarial review


def with_weights_elsewhere(folder, name):
    """The graph takes one weight out of a file of its own, where a number is a thousandth larger."""
    path = folder / "onnx/model.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    places = {entry.key: entry for entry in tensor.external_data}
    begin, size = int(places["offset"].value), int(places["length"].value)
    numbers = np.frombuffer((folder / "onnx/model.onnx_data").read_bytes()[begin : begin + size], "<f4").copy()
    numbers[7] += 1e-3
    (folder / "onnx/other.bin").write_bytes(numbers.tobytes())
    places["location"].value, places["offset"].value = "other.bin", "0"
    path.write_bytes(model.SerializeToString())


def test_verify_compares_the_weights_that_the_graph_takes(gpt2x, small, tmp_path):
    with_weights_elsewhere(tmp_path / "m", "h.1.attn.c_attn.weight")
    for given in (tmp_path / "m", tmp_path / "m/onnx/model.onnx"):
        result = gpt2x("verify", small, given)
        assert result.exit_code == 1
        assert "27 of 28 tensors bit-identical; h.1.attn.c_attn.weight differs in 1 values (by 0.001" in result.stdout


def test_verify_compares_the_weights_that_only_transformers_would_load(gpt2x, small, tmp_path):
    data = bytearray(small.read_bytes())
    data[-100] ^= 1
    (tmp_path / "m/model.safetensors").write_bytes(data)
    result = gpt2x("verify", small, tmp_path / "m")
    assert result.exit_code == 1
    assert "weights         same          28 of 28 tensors" in result.stdout
    assert "weights beside  DIFFERENT     27 of 28 tensors" in result.stdout


@pytest.mark.parametrize("damage", ["cut", "another"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_weights_beside_an_onnx_model_that_cannot_be_its_own_are_said(gpt2x, tmp_path, damage, precision):
    save_checkpoint(gentle(), tmp_path / "small.safetensors")
    export_onnx(gentle(), tmp_path / "m", ExportOptions((precision,)), need_tokenizer=False)
    beside = tmp_path / "m/model.safetensors"
    if damage == "cut":
        shutil.copy(tmp_path / "small.safetensors", beside)
        os.truncate(beside, beside.stat().st_size // 2)
    else:
        save_checkpoint(random_checkpoint(), beside)
    result = gpt2x("verify", tmp_path / "small.safetensors", tmp_path / "m")
    assert result.exit_code == 1
    assert "weights beside  DIFFERENT" in result.stdout
    assert result.stdout.endswith("DIFFERENT: weights beside.\n")


@pytest.mark.slow
def test_the_weights_of_two_onnx_files_are_compared(gpt2x, shakespeare, tmp_path):
    shutil.copytree(shakespeare, tmp_path / "m")
    path = tmp_path / "m/onnx/model.onnx_data"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    ours, other = shakespeare / "onnx/model.onnx", tmp_path / "m/onnx/model.onnx"
    for pair in ((ours, other), (other, ours), (other, SHAKESPEARE), (other, shakespeare)):
        result = gpt2x("verify", *pair)
        assert result.exit_code == 1
        assert "weights         DIFFERENT     51 of 52 tensors bit-identical" in result.stdout
    assert done(gpt2x("verify", ours, shakespeare)).stdout.endswith("The same.\n")


def test_logits_that_are_not_numbers_are_one_clear_error(gpt2x, shakespeare, tmp_path):
    shutil.copytree(shakespeare, tmp_path / "m")
    path = tmp_path / "m/onnx/model.onnx_data"
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:begin] + b"\xff" * (len(data) - begin))
    for temperature in (0, 1):
        options = ("--runtime", "onnx", "--temperature", temperature)
        assert_refused(gpt2x("generate", tmp_path / "m", "ROMEO:", *options), "the logits contain NaN or infinity")
    result = gpt2x("verify", tmp_path / "m", tmp_path / "m/onnx/model.onnx")
    assert result.exit_code == 1
    assert "greedy tokens   DIFFERENT     none: the first model's logits contain NaN or infinity" in result.stdout
    assert (
        "0 of 52 tensors bit-identical; wte.weight differs in 393216 values (by nan"
        in gpt2x("verify", SHAKESPEARE, tmp_path / "m").stdout
    )


@pytest.mark.parametrize(
    "options", [{"threads": 0}, {"threads": 10**6}, {"threads": "x"}, {"providers": ["NoProvider"]}]
)
def test_a_decoder_with_options_that_cannot_be(tiny, options):
    with pytest.raises(ValueError, match="threads is|has no NoProvider; it has"):
        OnnxDecoder(tiny, **options)
    threads: Any = np.int64(1)
    OnnxDecoder(tiny, threads=threads, providers=[("CPUExecutionProvider", {})])


@pytest.mark.parametrize("name", ["x" * 5000, "x/" * 5000, "a\0b"])
def test_a_name_that_no_file_can_have(gpt2x, name):
    assert_refused(gpt2x("verify", SHAKESPEARE, name), "not a valid file name" if "\0" in name else "...: too long")


def test_a_precision_for_the_weights_of_a_directory_with_onnx(gpt2x, shakespeare):
    result = gpt2x("generate", shakespeare, "x", "--precision", "fp32", "--runtime", "torch")
    assert_refused(result, "a precision is for ONNX, and this would be run as weights")


# ---------------------------------------------------------------------------------------------------------- logging


def test_the_log_shows_which_model_runs_with_which_session_options(shakespeare, caplog):
    with caplog.at_level("INFO", logger="gpt2x"):
        OnnxDecoder(shakespeare, threads=2)
    path = shakespeare / "onnx/model.onnx"
    assert f"{path}: fp32, growing cache" in caplog.messages
    (options,) = [message for message in caplog.messages if message.startswith("session options")]
    assert options.startswith("session options: 2 threads, optimizations on")


def test_the_log_shows_the_prompts_and_why_each_row_ended(tiny, caplog):
    with caplog.at_level("INFO", logger="gpt2x"):
        list(Generation(OnnxDecoder(tiny), [[1, 2, 3], [4]], 2, Sampling(temperature=0)))
    assert "2 prompts of up to 3 tokens were read" in caplog.messages
    assert "ended after 2 steps: length, length" in caplog.messages


def test_nothing_is_logged_to_the_terminal_by_default(shakespeare, tmp_path):
    code = f"""
import logging
from gpt2x import OnnxDecoder
OnnxDecoder({str(shakespeare)!r}, threads=1)
loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("gpt2x")]
assert loggers
assert not any(logger.handlers for logger in loggers)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
