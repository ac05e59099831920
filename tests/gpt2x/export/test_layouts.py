"""The forms of an exported directory: weights beside the model or in it, for transformers too, of any opset, and as gpt2x
0.1.0 wrote it."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from checkpoints import assert_same_bytes, random_checkpoint
from commands import assert_refused, done

from converters import ConversionError, FormatError, GPT2Config, open_checkpoint
from gpt2x import SHAKESPEARE, Generation, Sampling, contract
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.export.single_file import MAX_SINGLE_FILE
from gpt2x.precisions import PRECISIONS
from gpt2x.runtimes.batching import RunningBatch
from gpt2x.runtimes.onnx_model import check_runtime
from gpt2x.runtimes.onnxruntime import OnnxDecoder
from gpt2x.verify.report import verify_export

ALL = tuple(PRECISIONS)
PROMPT = [813, 25, 198]
# Heads of a multiple of 8, as a cache in place wants them.
SMALL = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_ctx=32, n_vocab=50, bos_token_id=0, eos_token_id=0)


def greedy(decoder, n=12):
    (tokens,) = zip(*Generation(decoder, [PROMPT], n, Sampling(temperature=0)), strict=True)
    return list(tokens)


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts") / "shakespeare"
    export_onnx(open_checkpoint(SHAKESPEARE), folder, ExportOptions(ALL))
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts") / "single"
    export_onnx(open_checkpoint(SHAKESPEARE), folder, ExportOptions(ALL, single_file=True))
    return folder


# -------------------------------------------------------------------------------------------------------- one file


@pytest.mark.parametrize("precision", ALL)
def test_a_single_file_gives_the_same_tokens_from_its_path_and_from_bytes(shakespeare, single, precision):
    path = single / contract.model_file(precision)
    onnx.checker.check_model(path, full_check=True)
    assert [f.name for f in path.parent.iterdir() if f.name.endswith("_data")] == []
    expected = greedy(OnnxDecoder(shakespeare, precision=precision))
    assert greedy(OnnxDecoder(single, precision=precision)) == expected
    session = ort.InferenceSession(path.read_bytes())
    assert greedy_with(session, len(expected)) == expected


def greedy_with(session, n):
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), types[i.type]) for i in session.get_inputs()[3:]}
    ids, seen, made = np.array([PROMPT]), 0, []
    while len(made) < n:
        places, seen = np.arange(seen, seen + ids.shape[1])[None], seen + ids.shape[1]
        feed = {"input_ids": ids, "attention_mask": np.ones((1, seen), np.int64), "position_ids": places}
        logits, *present = session.run(None, feed | past)
        past, ids = dict(zip(past, present, strict=True)), logits[:, -1:].argmax(-1)
        made.append(int(ids[0, 0]))
    return made


@pytest.mark.slow
def test_single_files_are_verified_read_as_weights_and_byte_identical(single, tmp_path):
    source = open_checkpoint(SHAKESPEARE)
    assert_same_bytes(source, open_checkpoint(single))
    for precision in ("fp32", "int4"):
        assert verify_export(source, single, precision=precision).passed
    export_onnx(source, tmp_path / "again", ExportOptions(("int4",), single_file=True))
    name = contract.model_file("int4")
    assert (single / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_external_weights_can_be_given_as_bytes_too(shakespeare):
    """What docs/export.md and the model card show."""
    options = ort.SessionOptions()
    data = (shakespeare / "onnx/model.onnx_data").read_bytes()
    options.add_external_initializers_from_files_in_memory(["model.onnx_data"], [data], [len(data)])
    session = ort.InferenceSession((shakespeare / "onnx/model.onnx").read_bytes(), options)
    assert greedy_with(session, 5) == greedy(OnnxDecoder(shakespeare), 5)


def test_a_single_file_above_2_gb_is_refused_before_anything_is_written(tmp_path, monkeypatch, gpt2x):
    monkeypatch.setattr("gpt2x.export.onnx_plan.MAX_SINGLE_FILE", 1_000_000)
    monkeypatch.chdir(tmp_path)
    refused = gpt2x("export", SHAKESPEARE, "--onnx", "d", "--single-file", "--precision", "fp32,int8")
    assert_refused(refused, "onnx/model.onnx: would be 0.0 GB, and one ONNX file holds 2 GB: remove --single-file")
    assert list(Path().iterdir()) == []
    monkeypatch.setattr("gpt2x.export.onnx_plan.MAX_SINGLE_FILE", MAX_SINGLE_FILE)
    monkeypatch.setattr("gpt2x.export.single_file.MAX_SINGLE_FILE", 1_000_000)  # found out when it is written
    assert_refused(gpt2x("export", SHAKESPEARE, "--onnx", "d", "--single-file"), "one ONNX file holds 2 GB")
    assert list(Path().iterdir()) == []


def test_the_1558m_model_is_refused_as_a_single_file_by_its_size():
    from gpt2x.export.onnx_plan import check_size

    large: Any = SimpleNamespace(parameters=1_557_611_200)
    with pytest.raises(ConversionError, match=r"would be 6.2 GB, and one ONNX file holds 2 GB"):
        check_size(large, ExportOptions(single_file=True))
    check_size(large, ExportOptions(("int8",), single_file=True))


# ------------------------------------------------------------------------------------- what clients read of config.json


def transformers_js(folder):
    return json.loads((folder / "config.json").read_text()).get("transformers.js_config")


def test_config_json_tells_transformers_js_where_the_weights_are(tmp_path, shakespeare, single):
    assert transformers_js(shakespeare) == {"use_external_data_format": True, "kv_cache_dtype": {"fp16": "float16"}}
    assert transformers_js(single) == {"kv_cache_dtype": {"fp16": "float16"}}
    source = open_checkpoint(SHAKESPEARE)
    export_onnx(source, tmp_path / "d", ExportOptions(("fp32",)))
    export_onnx(source, tmp_path / "d", ExportOptions(("int4",), single_file=True))
    assert transformers_js(tmp_path / "d") == {"use_external_data_format": {"model.onnx": True}}
    export_onnx(source, tmp_path / "d", ExportOptions(("int8",)))
    files = {"model.onnx": True, "model_quantized.onnx": True}
    assert transformers_js(tmp_path / "d") == {"use_external_data_format": files}


def test_a_config_json_of_the_source_keeps_everything_else(tmp_path, gpt2x):
    done(gpt2x("convert", SHAKESPEARE, tmp_path / "m"))
    config = json.loads((tmp_path / "m/config.json").read_text())
    config = {"task_specific_params": {"x": 1}, **config, "transformers.js_config": {"dtype": "q8"}}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    done(gpt2x("export", tmp_path / "m", "--onnx", tmp_path / "m", "--no-verify"))
    found = json.loads((tmp_path / "m/config.json").read_text())
    assert found["transformers.js_config"] == {"dtype": "q8", "use_external_data_format": True}
    assert {k: v for k, v in found.items() if k != "transformers.js_config"} == {
        k: v for k, v in config.items() if k != "transformers.js_config"
    }


def test_safetensors_for_transformers_are_added_when_asked_for(tmp_path, gpt2x):
    done(gpt2x("export", SHAKESPEARE, "--onnx", tmp_path / "d", "--safetensors", "--precision", "int8"))
    assert (tmp_path / "d/model.safetensors").is_file()
    assert_same_bytes(open_checkpoint(SHAKESPEARE), open_checkpoint(tmp_path / "d"))
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    assert sum(parameter.numel() for parameter in model.parameters()) == open_checkpoint(SHAKESPEARE).parameters
    for source, precision in ((tmp_path / "d", "w8a8"), (SHAKESPEARE, "fp32")):  # which are there already, and stay
        options = ("--safetensors", "--precision", precision, "--no-verify")
        done(gpt2x("export", source, "--onnx", tmp_path / "d", *options))
    assert "AutoModelForCausalLM" in (tmp_path / "d/README.md").read_text()


# -------------------------------------------------------------------------------------- found by an adversarial review


def test_another_models_config_json_is_replaced_and_a_broken_one_too(tmp_path, gpt2x):
    for i, text in enumerate(('{"model_type": "gpt2", "n_layer": 99}', "not JSON")):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "config.json").write_text(text)
        done(gpt2x("export", SHAKESPEARE, "--onnx", folder, "--force", "--no-verify"))
        assert json.loads((folder / "config.json").read_text())["n_layer"] == 4


def test_a_second_export_into_the_source_keeps_its_config_json(tmp_path, gpt2x):
    done(gpt2x("convert", SHAKESPEARE, tmp_path / "m"))
    config = {**json.loads((tmp_path / "m/config.json").read_text()), "task_specific_params": {"x": 1}}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    for options in ((), ("--force",), ("--force", "--single-file")):
        done(gpt2x("export", tmp_path / "m", "--onnx", tmp_path / "m", "--no-verify", *options))
        assert json.loads((tmp_path / "m/config.json").read_text())["task_specific_params"] == {"x": 1}


def test_a_transformers_js_config_that_is_not_an_object_is_refused(tmp_path, gpt2x):
    done(gpt2x("convert", SHAKESPEARE, tmp_path / "m"))
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, "transformers.js_config": "x"}))
    assert_refused(gpt2x("export", tmp_path / "m", "--onnx", tmp_path / "m"), "transformers.js_config is not an object")


def test_force_removes_weights_that_no_model_uses_any_more(tmp_path, gpt2x):
    done(gpt2x("export", SHAKESPEARE, "--onnx", tmp_path / "d", "--no-verify"))
    done(gpt2x("export", SHAKESPEARE, "--onnx", tmp_path / "d", "--single-file", "--force", "--no-verify"))
    assert not (tmp_path / "d/onnx/model.onnx_data").exists()
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "old")
    as_0_1_0(tmp_path / "old")
    done(gpt2x("export", SHAKESPEARE, "--onnx", tmp_path / "old", "--precision", "int8", "--no-verify"))
    assert transformers_js(tmp_path / "old") == {"use_external_data_format": {"model_quantized.onnx": True}}
    assert "its weights are in `onnx/model.safetensors`" in (tmp_path / "old/README.md").read_text()
    done(gpt2x("export", SHAKESPEARE, "--onnx", tmp_path / "old", "--force", "--no-verify"))
    assert not (tmp_path / "old/onnx/model.safetensors").exists()
    assert not (tmp_path / "old/model.safetensors.index.json").exists()
    assert greedy(OnnxDecoder(tmp_path / "old"), 3) == greedy(OnnxDecoder(tmp_path / "d"), 3)


def test_files_that_no_replaced_model_uses_are_never_removed(tmp_path, gpt2x):
    """A file of the old name that is somebody's own, and an external file that a hostile model names outside its folder."""
    done(gpt2x("convert", SHAKESPEARE, tmp_path / "m"))
    (tmp_path / "m/onnx").mkdir()
    (tmp_path / "m/onnx/model.safetensors").write_text("mine")
    done(gpt2x("export", tmp_path / "m", "--onnx", tmp_path / "m", "--no-verify"))
    assert (tmp_path / "m/onnx/model.safetensors").read_text() == "mine"
    (tmp_path / "mine.txt").write_text("mine")
    path = tmp_path / "m/onnx/model.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../../mine.txt" if entry.key == "location" else entry.value
    path.write_bytes(model.SerializeToString())
    (tmp_path / "m/model.safetensors.index.json").write_text('{"weight_map": [{}]}')
    done(gpt2x("export", tmp_path / "m", "--onnx", tmp_path / "m", "--no-verify", "--force"))
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_stale_file_beside_a_single_file_is_not_read(tmp_path):
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "a")
    export_onnx(open_checkpoint(tmp_path / "a"), tmp_path / "b", ExportOptions(single_file=True))
    (tmp_path / "b/onnx/model.onnx_data").write_text("junk")
    assert greedy(OnnxDecoder(tmp_path / "b"), 3) == greedy(OnnxDecoder(tmp_path / "a"), 3)


def test_models_that_lie_in_the_directory_itself_are_not_added_to(tmp_path, gpt2x):
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "a")
    shutil.copytree(tmp_path / "a/onnx", tmp_path / "flat")
    result = gpt2x("export", SHAKESPEARE, "--onnx", tmp_path / "flat", "--precision", "int8")
    assert_refused(result, "its models lie in it, not in its folder onnx/")


def test_hostile_metadata_do_not_reach_the_card(tmp_path):
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "d")
    path = tmp_path / "d/onnx/model.onnx"
    model = onnx.load(path, load_external_data=False)
    for prop in model.metadata_props:
        prop.value = "1.17 |\n\n# forged\n" if prop.key == contract.RUNTIME else prop.value
    path.write_bytes(model.SerializeToString())
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "d", ExportOptions(("int8",)))
    assert "forged" not in (tmp_path / "d/README.md").read_text()


def test_an_empty_name_to_push_to_is_refused(tmp_path, gpt2x):
    assert_refused(gpt2x("export", SHAKESPEARE, "--onnx", tmp_path / "d", "--push", ""), "not a valid repository name")
    assert not (tmp_path / "d").exists()


# -------------------------------------------------------------------------------------------------------------- opsets


@pytest.mark.parametrize("cache", ["growing", "inplace", "inplace-int8"])
@pytest.mark.parametrize("precision", ALL)
def test_each_graph_has_the_lowest_opset_and_ir_version_that_its_operators_need(tmp_path, precision, cache):
    export_onnx(random_checkpoint(SMALL), tmp_path / "d", ExportOptions((precision,), cache), need_tokenizer=False)
    path = tmp_path / "d" / contract.model_file(precision)
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(path, full_check=True)
    opset = {"int8": 21, "int4": 21}.get(precision, 20)
    assert (model.opset_import[0].version, model.ir_version) == (opset, {20: 9, 21: 10}[opset])
    model.opset_import[0].version = opset - 1
    with pytest.raises((onnx.checker.ValidationError, onnx.shape_inference.InferenceError)):
        onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("opset", [20, 21, 22, 23])
def test_every_opset_gives_the_same_logits(tmp_path, opset):
    precisions = tuple(p for p in ALL if p != "int4" or opset > 20)
    checkpoint = random_checkpoint(SMALL)
    export_onnx(checkpoint, tmp_path / "a", ExportOptions(precisions), need_tokenizer=False)
    export_onnx(checkpoint, tmp_path / "b", ExportOptions(precisions, opset=opset), need_tokenizer=False)
    ids = np.arange(20)[None]
    for precision in precisions:
        first, second = (
            OnnxDecoder(tmp_path / name, precision=precision).run(ids, None, ids, None)[0] for name in "ab"
        )
        bound = {"fp32": 1e-5, "fp16": 1e-2}.get(precision, 5e-2)
        np.testing.assert_allclose(first, second, rtol=0, atol=bound * abs(first).max())
    model = onnx.load(tmp_path / "b/onnx/model.onnx", load_external_data=False)
    assert any(node.op_type == "Attention" for node in model.graph.node) == (opset == 23)


def test_an_opset_without_a_precisions_operators_is_refused(tmp_path, gpt2x):
    result = gpt2x("export", SHAKESPEARE, "--onnx", tmp_path / "d", "--precision", "fp32,int4", "--opset", 20)
    assert_refused(result, "opset 20 is too low for int4 with --cache growing: 21 to 23 are supported")
    result = gpt2x("export", SHAKESPEARE, "--onnx", tmp_path / "d", "--opset", 19)
    assert_refused(result, "opset 19 is too low for fp32 with --cache growing: 20 to 23 are supported")
    assert not (tmp_path / "d").exists()
    with pytest.raises(ValueError, match="opset is 24; it must be 17 to 23"):
        ExportOptions(opset=24)


def test_a_model_without_gelu_needs_an_older_opset(tmp_path):
    checkpoint = random_checkpoint(replace(SMALL, activation_function="relu"))
    export_onnx(checkpoint, tmp_path / "d", need_tokenizer=False)
    assert OnnxDecoder(tmp_path / "d").metadata[contract.RUNTIME] == "1.17.0"
    model = onnx.load(tmp_path / "d/onnx/model.onnx", load_external_data=False)
    assert model.opset_import[0].version == 18


# ------------------------------------------------------------------------------------------------- versions of runtimes


def test_the_error_for_an_old_runtime_names_both_versions(tmp_path, gpt2x, monkeypatch):
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "d")
    monkeypatch.setattr(ort, "__version__", "1.16.3")
    words = "needs ONNX Runtime 1.17.0 or newer; 1.16.3 is installed"
    with pytest.raises(FormatError, match=words):
        OnnxDecoder(tmp_path / "d")
    assert_refused(gpt2x("generate", tmp_path / "d", "x"), words, "pip install 'onnxruntime>=1.17.0'")


@pytest.mark.parametrize("said", ["", "newest", "1.99", "1" * 5000, "9.9.9.9"])
def test_an_invalid_version_is_ignored(said):
    check_runtime(Path("m.onnx"), {contract.RUNTIME: said})


def test_the_message_of_onnx_runtime_is_not_cut(tmp_path):
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "d")
    path = tmp_path / "d/onnx/model.onnx"
    model = onnx.load(path, load_external_data=False)
    model.opset_import[0].version = 999
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match=r"Current official support for domain ai.onnx is till opset \d+"):
        OnnxDecoder(tmp_path / "d")


# ------------------------------------------------------------------------------------------- as gpt2x 0.1.0 wrote them


def as_0_1_0(folder):
    """The float32 weights under their old name, and the index that transformers found them by."""
    path = folder / "onnx/model.onnx"
    model = onnx.load(path, load_external_data=False)
    names = []
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = contract.OLD_WEIGHTS
                names.append(tensor.name)
    kept = [prop for prop in model.metadata_props if prop.key not in (contract.RUNTIME, contract.PAIRS)]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    path.write_bytes(model.SerializeToString())
    (folder / "onnx/model.onnx_data").rename(folder / "onnx" / contract.OLD_WEIGHTS)
    index = {"weight_map": dict.fromkeys(names, f"onnx/{contract.OLD_WEIGHTS}")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers.js_config")
    (folder / "config.json").write_text(json.dumps(config))


def test_a_directory_that_gpt2x_0_1_0_wrote_is_read_run_verified_and_added_to(tmp_path, gpt2x, shakespeare):
    source = open_checkpoint(SHAKESPEARE)
    export_onnx(source, tmp_path / "d")
    as_0_1_0(tmp_path / "d")
    assert_same_bytes(source, open_checkpoint(tmp_path / "d"))
    assert greedy(OnnxDecoder(tmp_path / "d")) == greedy(OnnxDecoder(shakespeare))
    done(gpt2x("verify", SHAKESPEARE, tmp_path / "d"))
    done(gpt2x("inspect", tmp_path / "d"))
    done(gpt2x("export", tmp_path / "d", "--onnx", tmp_path / "d", "--precision", "int8"))
    assert greedy(OnnxDecoder(tmp_path / "d", precision="int8")) == greedy(OnnxDecoder(shakespeare, precision="int8"))
    os.truncate(tmp_path / "d/onnx" / contract.OLD_WEIGHTS, 100_000)
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        OnnxDecoder(tmp_path / "d", precision="fp32")


# ----------------------------------------------------------------------------------------------------------- bad names


@pytest.mark.skipif(os.name != "posix", reason="names that are not UTF-8 are POSIX's")
def test_a_path_that_is_not_utf8_is_one_line(tmp_path, gpt2x, monkeypatch, shakespeare):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"caf\xe9")
    for option, target in (("--onnx", name), ("--torchscript", name + ".pt"), ("--pt2", name + ".pt2")):
        assert_refused(gpt2x("export", SHAKESPEARE, option, target), "open only paths in UTF-8: choose another")
    assert list(Path().iterdir()) == []
    shutil.copytree(shakespeare, name)
    for command in (("generate", name, "x"), ("inspect", name), ("verify", SHAKESPEARE, name), ("bench", name)):
        result = gpt2x(*command)
        assert result.exit_code == 1, (command, result.output)
        assert "only paths in UTF-8: rename it" in result.stderr
        assert len(result.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------- closing


def test_a_decoder_is_closed_by_close_or_by_its_context_manager(shakespeare):
    with OnnxDecoder(shakespeare, precision="fp32") as decoder:
        expected = greedy(decoder, 3)
    with pytest.raises(ValueError, match="this decoder is closed"):
        greedy(decoder, 3)
    decoder.close()
    again = OnnxDecoder(shakespeare, precision="fp32")
    assert greedy(again, 3) == expected
    again.close()
    with pytest.raises(ValueError, match=r"model\.onnx: this decoder is closed"):
        again.step(np.array([[1]]), None, np.array([[0]]), None)


def test_closing_a_running_batch_removes_all_sequences(tmp_path):
    export_onnx(random_checkpoint(SMALL), tmp_path / "d", ExportOptions(cache="inplace"), need_tokenizer=False)
    decoder = OnnxDecoder(tmp_path / "d")
    with RunningBatch(decoder) as batch:
        number, logits = batch.join([1, 2, 3])
        assert len(batch) == 1
    assert (len(batch), batch.cache.nbytes) == (0, 0)
    again, same = batch.join([1, 2, 3])
    assert again != number
    np.testing.assert_array_equal(logits, same)
