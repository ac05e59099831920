"""The ONNX directory: its exact contract, one copy of the weights, reproducible bytes."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from checkpoints import SWITCHES, TINY, assert_same_bytes, random_checkpoint
from commands import assert_refused, done
from paths import RELEASE, files_of, needs_shared

from converters import GPT2Config, LazyTensor, open_checkpoint, save_checkpoint
from converters.tensors import F16
from gpt2x import SHAKESPEARE, contract
from gpt2x._version import __version__
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.export.onnx_graph import to_onnx, trace
from gpt2x.load import model_of
from gpt2x.precisions import FP32
from gpt2x.precisions.stored import Piece
from gpt2x.runtimes.onnxruntime import OnnxDecoder

FILES = [
    "README.md",
    "config.json",
    "genai_config.json",
    "generation_config.json",
    "merges.txt",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
]


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory):
    """The shipped model, exported."""
    folder = tmp_path_factory.mktemp("onnx") / "shakespeare"
    export_onnx(open_checkpoint(SHAKESPEARE), folder)
    return folder


def tiny_onnx(folder, config=TINY, seed=0, **options):
    checkpoint = random_checkpoint(config, seed)
    export_onnx(checkpoint, folder, ExportOptions(**options), need_tokenizer=False)
    return checkpoint


def pieces_of(config):
    """Places of weights in a file that does not exist."""
    shapes = enumerate(config.shapes().items())
    return {name: Piece("float32", shape, 8 * i, 8) for i, (name, shape) in shapes}


# ------------------------------------------------------------------------------------------------------- the contract


def test_the_directory_is_as_documented(shakespeare):
    assert files_of(shakespeare) == sorted(FILES)
    assert json.loads((shakespeare / "tokenizer_config.json").read_text())["tokenizer_class"] == "GPT2Tokenizer"
    config = json.loads((shakespeare / "config.json").read_text())
    assert config["transformers.js_config"] == {"use_external_data_format": True}


def test_the_graph_has_exactly_the_inputs_and_outputs_of_the_contract(shakespeare):
    graph = onnx.load(shakespeare / "onnx/model.onnx", load_external_data=False).graph

    def slots(values):
        return {
            v.name: (
                onnx.TensorProto.DataType.Name(v.type.tensor_type.elem_type),
                [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            )
            for v in values
        }

    total = "past_sequence_length + sequence_length"
    caches = [f"{i}.{part}" for i in range(4) for part in ("key", "value")]
    assert slots(graph.input) == {
        "input_ids": ("INT64", ["batch_size", "sequence_length"]),
        "attention_mask": ("INT64", ["batch_size", total]),
        "position_ids": ("INT64", ["batch_size", "sequence_length"]),
        **{f"past_key_values.{c}": ("FLOAT", ["batch_size", 6, "past_sequence_length", 32]) for c in caches},
    }
    assert slots(graph.output) == {
        "logits": ("FLOAT", ["batch_size", "sequence_length", 2048]),
        **{f"present.{c}": ("FLOAT", ["batch_size", 6, total, 32]) for c in caches},
    }


def test_the_model_passes_the_checker_and_has_standard_operators_only(shakespeare):
    path = shakespeare / "onnx/model.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert model.ir_version == 9
    assert {node.domain for node in model.graph.node} == {""}
    assert path.stat().st_size < 40_000
    assert {node.op_type for node in model.graph.node} >= {"Softmax", "Gelu", "LayerNormalization", "MatMul"}


def test_nodes_are_named_after_the_modules_they_come_from(shakespeare):
    nodes = onnx.load(shakespeare / "onnx/model.onnx", load_external_data=False).graph.node
    names = [node.name for node in nodes]
    assert len(set(names)) == len(names)
    assert {
        "wte/Gather",
        "h.0.attn.c_attn/MatMul",
        "h.3.mlp.act/Gelu",
        "h.2.attn/Softmax",
        "ln_f/LayerNormalization",
    } <= set(names)


def test_weights_are_stored_once_and_the_graph_has_their_offsets(shakespeare):
    checkpoint = open_checkpoint(SHAKESPEARE)
    model = onnx.load(shakespeare / "onnx/model.onnx", load_external_data=False)
    external = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data}
    assert set(external) == set(checkpoint.tensors)
    data = (shakespeare / "onnx/model.onnx_data").read_bytes()
    for name, tensor in checkpoint.tensors.items():
        where = external[name]
        assert where["location"] == "model.onnx_data"
        begin, size = int(where["offset"]), int(where["length"])
        assert begin % 4 == 0
        assert data[begin : begin + size] == tensor.read().tobytes(), name
    total = sum((shakespeare / file).stat().st_size for file in FILES)
    assert total < 1.02 * checkpoint.nbytes


def test_the_metadata_has_the_contract_and_the_source(shakespeare):
    import hashlib

    metadata = OnnxDecoder(shakespeare).metadata
    data = "model.ckpt.data-00000-of-00001"
    digest = hashlib.sha256((SHAKESPEARE / data).read_bytes()).hexdigest()
    assert json.loads(metadata.pop("gpt2x.source_sha256")) == {data: digest}
    config = json.loads(metadata.pop("gpt2x.config"))
    assert (config["n_layer"], config["n_head"], config["vocab_size"]) == (4, 6, 2048)
    assert metadata == {
        "gpt2x.source": "model.ckpt",
        "gpt2x.version": __version__,
        "gpt2x.contract": "1",
        "gpt2x.precision": "fp32",
        "gpt2x.cache": "growing",
        "gpt2x.logits": "all",
        "gpt2x.onnxruntime": "1.17.0",
    }


@pytest.mark.parametrize("options", [{"last": True}, pytest.param({}, marks=pytest.mark.slow)])
def test_two_exports_are_byte_identical_and_hold_no_path(shakespeare, tmp_path, options):
    away = tmp_path / "elsewhere" / "model"
    shutil.copytree(SHAKESPEARE, away)
    first, second = tmp_path / "a", tmp_path / "b"
    export_onnx(open_checkpoint(SHAKESPEARE), first, ExportOptions(**options))
    code = f"from converters import open_checkpoint; from gpt2x.export.onnx_directory import ExportOptions, export_onnx; export_onnx(open_checkpoint('elsewhere/model'), 'b', ExportOptions(**{options}))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert files_of(first) == files_of(second) == sorted(FILES)
    for name in FILES:
        data = (first / name).read_bytes()
        assert data == (second / name).read_bytes(), name
        for path in (str(tmp_path), str(SHAKESPEARE.parent), "site-packages", sys.prefix):
            assert path.encode() not in data, (name, path)


# ----------------------------------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: ", ".join(f"{k}={v}" for k, v in s.items()) or "plain")
def test_every_configuration_has_the_models_logits_however_it_is_run(tmp_path, switches):
    from gpt2x.runtimes.opening import gpt2x_model
    from gpt2x.verify.sample_text import sample_ids
    from gpt2x.verify.scenarios import compare_runs

    config = GPT2Config(**{**vars(TINY), "n_inner": None, **switches})
    checkpoint = tiny_onnx(tmp_path / "m", config)
    onnx.checker.check_model(tmp_path / "m/onnx/model.onnx", full_check=True)
    checks = compare_runs(gpt2x_model(checkpoint), OnnxDecoder(tmp_path / "m"), sample_ids(config, None)[0])
    assert [(c.name, c.result) for c in checks if c.passed is False] == []
    assert len(checks) == 9


def test_the_exported_attention_is_torchs(tmp_path):
    """One replaceable function: ONNX's operator against scaled_dot_product_attention, masked rows and all."""
    checkpoint = tiny_onnx(tmp_path / "m")
    rng = np.random.default_rng(0)
    past = [tuple(rng.normal(size=(2, 2, 4, 3)).astype(np.float32) for _ in "kv") for _ in range(2)]
    ids, positions = rng.integers(13, size=(2, 3)), np.array([[4, 5, 6], [1, 2, 3]])
    mask = np.array([[1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1, 1]])
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    feed |= {f"past_key_values.{i}.{p}": kv[j] for i, kv in enumerate(past) for j, p in enumerate(("key", "value"))}
    logits, *present = ort.InferenceSession(tmp_path / "m/onnx/model.onnx").run(None, feed)
    tensors = [tuple(map(torch.from_numpy, kv)) for kv in past]
    with torch.no_grad():
        expected, cache = model_of(checkpoint)(*map(torch.from_numpy, (ids, mask, positions)), tensors)
    np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=1e-5 * abs(expected).max().item())
    for found, right in zip(present, (t.numpy() for kv in cache for t in kv), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4)


def test_a_row_of_only_padding_has_finite_logits(tmp_path):
    tiny_onnx(tmp_path / "m")
    decoder = OnnxDecoder(tmp_path / "m")
    ids = np.array([[1, 2, 3], [0, 0, 0]])
    logits, cache = decoder.run(ids, np.array([[1, 1, 1], [0, 0, 0]]), np.array([[0, 1, 2], [0, 0, 0]]), None)
    again, _ = decoder.run(ids[:, :1], np.array([[1, 1, 1, 1], [0, 0, 0, 0]]), np.array([[3], [0]]), cache)
    assert np.isfinite(logits).all()
    assert np.isfinite(again).all()


def test_the_last_position_of_the_context_works(tmp_path):
    checkpoint = tiny_onnx(tmp_path / "m")
    decoder, ids = OnnxDecoder(tmp_path / "m"), np.arange(10)[None]
    _, cache = decoder.run(ids[:, :9], None, ids[:, :9], None)
    logits, _ = decoder.run(ids[:, 9:], None, ids[:, 9:], cache)
    with torch.no_grad():
        expected = model_of(checkpoint)(torch.from_numpy(ids))[0][0, -1].numpy()
    np.testing.assert_allclose(logits[0, 0], expected, rtol=0, atol=1e-5 * abs(expected).max())


def test_logits_of_the_last_position_only(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = done(gpt2x("export", SHAKESPEARE, "--onnx", "last", "--logits", "last"))
    assert "right padding   -" in result.stdout  # not asked, and the others are the same
    assert OnnxDecoder("last").metadata["gpt2x.logits"] == "last"
    assert OnnxDecoder("last").outputs["logits"].shape == ("batch_size", 1, 2048)
    assert (
        "for the last slot only, `[batch_size, 1, vocab_size]`: pad on the left or not at all"
        in Path("last/README.md").read_text()
    )
    onnx.checker.check_model("last/onnx/model.onnx", full_check=True)


def test_half_precision_weights_are_exported_in_float32(tmp_path):
    half = random_checkpoint().cast(F16)
    export_onnx(half, tmp_path / "m", need_tokenizer=False)
    from converters.tensors import F32

    assert_same_bytes(half.cast(F32), open_checkpoint(tmp_path / "m"))
    assert json.loads((tmp_path / "m/config.json").read_text())["torch_dtype"] == "float32"


def test_an_operator_without_translation_stops_the_export(monkeypatch):
    from gpt2x import model

    monkeypatch.setattr(model.MLP, "forward", lambda self, x: torch.erfinv(x))
    with pytest.raises(NotImplementedError, match=r"erfinv.*h.0.mlp.*has no translation to ONNX"):
        to_onnx(TINY, FP32, pieces_of(TINY), {})


def test_tracing_leaves_the_models_own_attention_in_place():
    from gpt2x import model

    before = model.attention
    trace(TINY)
    assert model.attention is before


# ------------------------------------------------------------------------------------------------------- the directory


def test_every_source_gives_the_same_model(tmp_path):
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "tf-onnx")
    for kind, name in (("hf", "hf"), ("safetensors", "m.safetensors"), ("bin", "m.bin")):
        save_checkpoint(open_checkpoint(SHAKESPEARE), tmp_path / name, kind)
        export_onnx(open_checkpoint(tmp_path / name), tmp_path / f"{kind}-onnx", need_tokenizer=False)
        first, second = (tmp_path / f"{k}-onnx/onnx/model.onnx_data" for k in ("tf", kind))
        assert first.read_bytes() == second.read_bytes()


def test_the_directory_is_read_back_as_weights(shakespeare, gpt2x, tmp_path):
    assert_same_bytes(open_checkpoint(SHAKESPEARE), open_checkpoint(shakespeare))
    done(gpt2x("convert", shakespeare, tmp_path / "again", "--to", "tf"))
    assert_same_bytes(open_checkpoint(SHAKESPEARE), open_checkpoint(tmp_path / "again"))


def test_without_a_tokenizer_it_says_what_will_not_load_and_what_to_type(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(random_checkpoint(), "a.safetensors")
    refused = gpt2x("export", "a.safetensors", "--onnx", "d")
    assert_refused(refused, "onnxruntime-genai and transformers.js do not load", "--tokenizer DIR", "--no-tokenizer")
    assert not Path("d").exists()
    done(gpt2x("export", "a.safetensors", "--onnx", "d", "--no-tokenizer"))
    assert "tokenizer.json" not in files_of(Path("d"))
    assert_refused(gpt2x("export", "a.safetensors", "--onnx", "e", "--tokenizer", "."), "no tokenizer here")
    save_checkpoint(open_checkpoint(SHAKESPEARE), "s.safetensors")
    Path("alone").mkdir()
    shutil.move("s.safetensors", "alone")
    done(gpt2x("export", "alone", "--onnx", "e", "--tokenizer", SHAKESPEARE, "--no-verify"))
    assert files_of(Path("e")) == sorted(FILES)


def test_export_never_touches_an_existing_destination_without_force(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(random_checkpoint(), "a.safetensors")
    save_checkpoint(random_checkpoint(seed=1), "b.safetensors")
    options = ("--onnx", "d", "--no-tokenizer", "--no-verify")
    done(gpt2x("export", "a.safetensors", *options))
    Path("d/notes.txt").write_text("mine")
    before = {name: Path("d", name).read_bytes() for name in files_of(Path("d"))}
    assert_refused(gpt2x("export", "b.safetensors", *options), "d: already exists; pass --force to replace it")
    assert before == {name: Path("d", name).read_bytes() for name in files_of(Path("d"))}
    done(gpt2x("export", "b.safetensors", *options, "--force"))
    assert_same_bytes(random_checkpoint(seed=1), open_checkpoint("d"))
    assert files_of(Path("d")) == sorted(before)
    assert Path("d/notes.txt").read_text() == "mine"
    assert os.stat("d/onnx/model.onnx_data").st_nlink == 1  # onnx refuses files with several names


def test_files_that_would_be_read_together_with_the_new_ones_stop_it(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(random_checkpoint(), "a.safetensors")
    save_checkpoint(random_checkpoint(seed=1), "other")
    options = ("--no-tokenizer", "--no-verify", "--force")
    assert_refused(gpt2x("export", "a.safetensors", "--onnx", "other", *options), "other: holds model.safetensors")
    done(gpt2x("export", "a.safetensors", "--onnx", "d", *options))
    Path("d/onnx/model_quantized.onnx").write_text("another model's")
    assert_refused(
        gpt2x("export", "a.safetensors", "--onnx", "d", *options),
        "d/onnx/model_quantized.onnx: not a model that gpt2x wrote",
    )


@pytest.mark.parametrize("kind", ["hf", "tf"])
def test_an_export_into_the_source_itself_adds_the_onnx_folder_and_one_key(gpt2x, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(open_checkpoint(SHAKESPEARE), "m", kind)
    Path("m/README.md").write_text("mine")
    before = {name: Path("m", name).read_bytes() for name in files_of(Path("m"))}
    done(gpt2x("export", "m", "--onnx", "m"))
    after = files_of(Path("m"))
    config = json.loads(before.pop("config.json", b"{}"))
    now = json.loads(Path("m/config.json").read_text())
    assert now.pop("transformers.js_config") == {"use_external_data_format": True}
    assert kind == "tf" or (now, list(now)) == (config, list(config))
    assert {name: Path("m", name).read_bytes() for name in before} == before
    assert {
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        "onnx/README.md",
        "genai_config.json",
        "tokenizer.json",
    } <= set(after)
    assert_same_bytes(open_checkpoint(SHAKESPEARE), open_checkpoint("m"))
    assert_refused(
        gpt2x("export", "m", "--onnx", "m/"), "m/onnx/model.onnx: already exists; pass --force to replace it"
    )
    monkeypatch.chdir("m")
    done(gpt2x("export", ".", "--onnx", ".", "--force", "--no-verify"))
    assert files_of(Path()) == after


def test_an_export_of_an_export_onto_itself_is_not_lost(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done(gpt2x("export", SHAKESPEARE, "--onnx", "d", "--no-verify"))
    done(gpt2x("export", "d", "--onnx", "d", "--force", "--no-verify"))
    assert_same_bytes(open_checkpoint(SHAKESPEARE), open_checkpoint("d"))
    done(gpt2x("verify", SHAKESPEARE, "d"))


def test_a_damaged_source_leaves_nothing(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SHAKESPEARE, "m")
    with open("m/model.ckpt.data-00000-of-00001", "r+b") as file:
        file.seek(5_000_000)
        file.write(b"\xff")
    assert_refused(gpt2x("export", "m", "--onnx", "d"), "checksum is")
    assert sorted(p.name for p in Path().iterdir()) == ["m"]


def test_nan_is_warned_of_and_fails_verification(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = random_checkpoint()
    bad = tiny.tensors["h.0.mlp.c_fc.bias"].read().copy()
    bad[3] = np.nan
    save_checkpoint(replace(tiny, tensors={**tiny.tensors, "h.0.mlp.c_fc.bias": LazyTensor.of(bad)}), "a.safetensors")
    result = gpt2x("export", "a.safetensors", "--onnx", "d", "--no-tokenizer")
    assert "Warning: h.0.mlp.c_fc.bias holds NaN or infinity" in result.stderr
    assert result.exit_code == 1
    assert "logits contain NaN or infinity: nothing can be compared" in result.stdout


def test_an_export_that_is_out_of_bounds_is_exit_code_1_and_names_the_metric(gpt2x, tmp_path, monkeypatch):
    from gpt2x.export import onnx_graph as exporter

    monkeypatch.chdir(tmp_path)
    save_checkpoint(random_checkpoint(), "a.safetensors")
    monkeypatch.setitem(exporter.OPERATORS, torch.nn.GELU, lambda g, module, x: g.op("Relu", x))
    result = gpt2x("export", "a.safetensors", "--onnx", "d", "--no-tokenizer")
    assert result.exit_code == 1
    assert re.search(r"full context +DIFFERENT .*\n    max_abs_error is \d.*bound", result.stdout)
    assert gpt2x("export", "a.safetensors", "--onnx", "e", "--no-tokenizer", "--no-verify").exit_code == 0


@pytest.mark.parametrize("transpose", ["h.0.attn.c_proj.weight", "h.1.attn.c_proj.weight"])
def test_a_forgotten_transpose_of_the_square_projection_is_seen(tmp_path, transpose):
    from gpt2x.verify.report import verify_export

    tiny = random_checkpoint()
    turned = LazyTensor.of(np.ascontiguousarray(tiny.tensors[transpose].read().T))
    export_onnx(replace(tiny, tensors={**tiny.tensors, transpose: turned}), tmp_path / "d", need_tokenizer=False)
    failed = {c.name for c in verify_export(tiny, tmp_path / "d").checks if c.passed is False}
    assert {"weights", "full context", "one token", "token by token", "left padding"} <= failed


def test_wrong_usage_of_export_is_exit_code_2(gpt2x):
    assert gpt2x("export", SHAKESPEARE).exit_code == 2
    refused = gpt2x("export", SHAKESPEARE, "--onnx", "model.onnx")
    assert refused.exit_code == 2
    assert "takes a directory" in refused.stderr


@pytest.mark.parametrize(("missing", "named"), [(["torch", "onnx"], "torch and onnx"), (["onnx"], "onnx")])
def test_the_error_for_a_missing_package_has_the_install_command(gpt2x, monkeypatch, tmp_path, missing, named):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in missing else find(name, *a))
    for command in (["export", SHAKESPEARE, "--onnx", tmp_path / "d"], ["demo"]):
        assert_refused(gpt2x(*command), f"this needs {named}: pip install 'gpt2x[export]'")


def test_the_result_as_json(gpt2x, tmp_path):
    facts = json.loads(done(gpt2x("export", SHAKESPEARE, "--onnx", tmp_path / "d", "--json")).stdout)
    assert facts["exports"][0]["format"] == "onnx"
    assert facts["exports"][0]["bytes"] == sum((tmp_path / "d" / n).stat().st_size for n in FILES)
    assert facts["verify"][0]["passed"] is True


# ------------------------------------------------------------------------------------------------------ the model card


def test_the_client_of_the_model_card_runs_and_gives_the_models_text(shakespeare):
    from gpt2x import Tokenizer, from_pretrained, generate_text

    (program,) = re.findall(r"```python\n(.*?)```", (shakespeare / "README.md").read_text(), re.S)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=shakespeare)
    prompt = "Once upon a time"
    tokenizer = Tokenizer.from_pretrained(SHAKESPEARE)
    expected = generate_text(from_pretrained(SHAKESPEARE), tokenizer, prompt, 64, 0)
    assert result.stdout == expected.removeprefix(prompt) + "\n", result.stderr


def test_the_client_of_a_card_without_a_tokenizer_runs(tmp_path):
    tiny_onnx(tmp_path / "m", replace(TINY, n_ctx=80))
    (program,) = re.findall(r"```python\n(.*?)```", (tmp_path / "m/README.md").read_text(), re.S)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path / "m")
    ids = json.loads(result.stdout)
    assert len(ids) == 64 or ids[-1] == TINY.eos_token_id, result.stderr


def test_the_card_has_the_contract_and_escapes_the_sources_name(tmp_path):
    name = "a|`<b onclick=x>`\x1b[31m.safetensors"
    save_checkpoint(random_checkpoint(), tmp_path / name, "safetensors")
    export_onnx(open_checkpoint(tmp_path / name), tmp_path / "m", need_tokenizer=False)
    card = (tmp_path / "m/README.md").read_text()
    assert (
        "| input | `past_key_values.{i}.key`, `.value` | float32 | `[batch_size, 2, past_sequence_length, 3]` |" in card
    )
    assert "from `a&lt;b onclick=x&gt;[31m.safetensors`." in card
    assert "\x1b" not in card


def test_genai_config_is_the_documented_one(shakespeare):
    config = json.loads((shakespeare / "genai_config.json").read_text())
    assert config["model"]["context_length"] == config["search"]["max_length"] == 256
    assert config["model"]["eos_token_id"] == 2047
    assert config["model"]["decoder"]["head_size"] == 32
    assert config["model"]["decoder"]["filename"] == contract.model_file("fp32")


# ---------------------------------------------------------------------------------------------------------- large ones


def test_the_1558m_shape_is_traced_in_seconds_without_its_weights():
    config = GPT2Config(n_layer=48, n_embd=1600, n_head=25)
    model = to_onnx(config, FP32, pieces_of(config), {})
    assert len(model.graph.input) == 3 + 2 * 48
    assert len(model.SerializeToString()) < 300_000


@needs_shared
@pytest.mark.parametrize("options", [["--no-verify"], pytest.param([], marks=pytest.mark.slow)])
def test_openais_vocabulary_is_exported(tmp_path, gpt2x, options):
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2)
    save_checkpoint(random_checkpoint(config), tmp_path / "m.safetensors")
    done(gpt2x("export", tmp_path / "m.safetensors", "--onnx", tmp_path / "d", "--tokenizer", RELEASE, *options))
    assert (tmp_path / "d/vocab.json").read_bytes() == (RELEASE / "encoder.json").read_bytes()


# ------------------------------------------------------------------------------------- found by an adversarial review


def test_the_source_itself_is_never_written_over(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(random_checkpoint().cast(F16), "half", "hf")
    before = Path("half/model.safetensors").read_bytes()
    for option in ("--torchscript", "--pt2"):
        name = "half/model.safetensors" if option == "--torchscript" else "half/link.pt2"
        if option == "--pt2":
            Path(name).symlink_to("model.safetensors")
        assert_refused(gpt2x("export", "half", option, name, "--force", "--no-verify"), "is the source itself")
    assert Path("half/model.safetensors").read_bytes() == before
    for name in ("model.safetensors", "model.onnx_data"):  # as gpt2x 0.1.0 named it, and as it is named now
        folder = Path(f"of-{name}")
        (folder / "onnx").mkdir(parents=True)
        shutil.copy("half/model.safetensors", folder / "onnx" / name)
        shutil.copy("half/config.json", folder / "onnx")
        places = dict.fromkeys(random_checkpoint().tensors, f"onnx/{name}")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        assert_refused(gpt2x("export", folder, "--onnx", folder, "--force", "--no-tokenizer"), "is the source itself")
        assert (folder / "onnx" / name).read_bytes() == before


def test_a_symbolic_link_is_neither_followed_nor_replaced(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(random_checkpoint(), "h", "hf")
    Path("big").mkdir()
    Path("h/onnx").symlink_to(tmp_path / "big")
    assert_refused(gpt2x("export", "h", "--onnx", "h", "--no-tokenizer"), "h/onnx: is a symbolic link")
    assert Path("h/onnx").is_symlink()
    assert list(Path("big").iterdir()) == []


@pytest.mark.parametrize("inside", ["onnx", "onnx/model.onnx/"])
def test_a_file_or_directory_that_blocks_the_result_is_found_before_the_work(gpt2x, tmp_path, monkeypatch, inside):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(random_checkpoint(), "a.safetensors")
    Path("d").mkdir()
    Path("d", inside).mkdir(parents=True) if inside.endswith("/") else Path("d", inside).write_text("mine")
    monkeypatch.setattr("gpt2x.export.onnx_directory._write_model", None)
    assert_refused(gpt2x("export", "a.safetensors", "--onnx", "d", "--force", "--no-tokenizer"), "not replace by a")


def test_other_directories_keep_their_permissions_and_times(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(random_checkpoint(), "h", "hf")
    Path("h/private/deep").mkdir(parents=True)
    Path("h/private/deep/notes").write_text("mine")
    os.utime("h/private/deep", (1, 1))
    os.utime("h/private", (2, 2))
    Path("h/private").chmod(0o700)
    done(gpt2x("export", "h", "--onnx", "h", "--no-tokenizer", "--no-verify"))
    assert Path("h/private").stat().st_mode & 0o777 == 0o700
    assert [Path(p).stat().st_mtime for p in ("h/private", "h/private/deep")] == [2, 1]


def test_another_tokenizer_than_the_sources_own_is_not_put_into_its_directory(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SHAKESPEARE, "h")
    merges = Path("h/vocab.bpe").read_text().splitlines()
    merges[5], merges[6] = merges[6], merges[5]
    Path("h/vocab.bpe").write_text("\n".join(merges) + "\n")
    assert_refused(gpt2x("export", "h", "--onnx", "h", "--tokenizer", SHAKESPEARE), "h: has a tokenizer of its own")
    done(gpt2x("export", "h", "--onnx", "elsewhere", "--tokenizer", SHAKESPEARE, "--no-verify"))


def test_an_integer_epsilon_is_accepted(tmp_path, gpt2x):
    config = GPT2Config(**{**vars(TINY), "layer_norm_epsilon": 1})
    tiny_onnx(tmp_path / "m", config)
    assert OnnxDecoder(tmp_path / "m").config.layer_norm_epsilon == 1.0


def test_an_absurd_number_of_layers_is_not_believed(tmp_path):
    from converters import ConfigError

    with pytest.raises(ConfigError, match="n_layer is 1000000000, which exceeds the limit of 1000"):
        GPT2Config(n_layer=10**9)


def test_two_results_with_one_path_are_refused(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(random_checkpoint(), "a.safetensors")
    assert gpt2x("export", "a.safetensors", "--torchscript", "q.pt2", "--pt2", "q.pt2").exit_code == 2
    Path("q.pt2").write_text("mine")
    assert_refused(gpt2x("export", "a.safetensors", "--torchscript", "q.pt", "--pt2", "q.pt2"), "already exists")
    assert not Path("q.pt").exists()
    assert gpt2x("export", "a.safetensors", "--torchscript", "q.pt", "--logits", "last").exit_code == 2


@pytest.mark.parametrize(
    "options",
    [
        *({"precisions": given} for given in (("int3",), (), "int8", None, ("fp32", "fp32"))),
        *({"cache": given} for given in ("x", [], None)),
        *({"block": given} for given in (0, 33, 32.0, None)),
    ],
)
def test_invalid_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ExportOptions(**options)


def test_calibration_with_an_unknown_token_id_is_refused(tmp_path):
    with pytest.raises(ValueError, match="calibration has token id 13; the model's vocabulary is 13"):
        export_onnx(
            random_checkpoint(),
            tmp_path / "m",
            ExportOptions(("int8",), calibration=[1, 13]),
            need_tokenizer=False,
        )
    assert list(tmp_path.iterdir()) == []
