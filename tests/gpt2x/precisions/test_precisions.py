"""Exports in fp16, int8, w8a8 and int4: what they store, their errors against the source, and that verification sees faults."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from checkpoints import SMALL, TINY, gentle, random_checkpoint
from commands import assert_refused, done
from paths import files_of

import gpt2x as gpt2x_package
from converters import ConversionError, LazyTensor, open_checkpoint, save_checkpoint
from converters.errors import DestinationError, FormatError
from converters.spec import ACTIVATIONS
from gpt2x import SHAKESPEARE, contract
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.precisions import PRECISIONS
from gpt2x.precisions.quantize import RANGES, dequantize, pack4, quantize, unpack4
from gpt2x.runtimes.onnxruntime import OnnxDecoder
from gpt2x.verify.metrics import CACHE8
from gpt2x.verify.report import verify_export
from gpt2x.verify.scenarios import feed, one_pass

ALL = ("fp32", "fp16", "int8", "w8a8", "int4")
QUANTISED = ("int8", "w8a8", "int4")


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precisions") / "shakespeare"
    export_onnx(open_checkpoint(SHAKESPEARE), folder, ExportOptions(ALL))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model's weights, ``m.safetensors``, and beside them its export in every precision, ``onnx``."""
    folder = tmp_path_factory.mktemp("small")
    save_checkpoint(gentle(), folder / "m.safetensors")
    export_onnx(gentle(), folder / "onnx", ExportOptions(ALL), need_tokenizer=False)
    return folder


# ------------------------------------------------------------------------------------------------------------ rounding


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("K", [1, 16, 33, 96])
def test_the_rounding_error_of_a_column_is_bounded_by_half_a_step(bits, block, K):
    x = np.random.default_rng(K).normal(size=(K, 5)).astype(np.float32)
    q, scale = quantize(x, bits, block)
    assert q.shape == x.shape and scale.shape == (-(-K // block), 5)
    assert q.min() >= RANGES[bits][0] and q.max() <= RANGES[bits][1]
    plain = np.abs(x).max(0) / (127 if bits == 8 else 8)  # at least as good as a scale that covers everything
    lost = ((dequantize(q, scale, block) - x) ** 2).sum(0)
    assert (lost <= (plain / 2) ** 2 * K * (1 if bits == 8 else 4) + 1e-9).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 3e-39, -0.7, 1e30])
def test_a_constant_block_is_exact_and_a_block_of_zeros_stays_zero(bits, value):
    x = np.full((40, 3), value, np.float32)
    found = dequantize(*quantize(x, bits, 32), 32)
    np.testing.assert_allclose(found, x, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("bits", [8, 4])
def test_searching_the_scale_has_a_smaller_error_than_covering_the_largest_value(bits):
    x = np.random.default_rng(0).standard_t(4, size=(256, 64)).astype(np.float32)
    q, scale = quantize(x, bits, 32)
    blocks = x.reshape(8, 32, 64)
    cover = np.abs(blocks).max(1, keepdims=True) / (127 if bits == 8 else 7)
    nearest = (np.rint(blocks / cover) * cover).reshape(256, 64)
    assert ((dequantize(q, scale, 32) - x) ** 2).sum() < ((nearest - x) ** 2).sum()


@pytest.mark.parametrize("bits", [8, 4])
def test_gptq_has_a_smaller_error_of_the_product_than_rounding_to_nearest(bits):
    rng = np.random.default_rng(0)
    inputs = (rng.normal(size=(500, 24)) @ rng.normal(size=(24, 96)) + 0.1 * rng.normal(size=(500, 96))).astype("f4")
    w = rng.normal(size=(96, 40)).astype(np.float32)
    lost = [
        np.linalg.norm(inputs @ (dequantize(*quantize(w, bits, 32, hessian), 32) - w))
        for hessian in (None, inputs.T @ inputs)
    ]
    assert lost[1] < 0.6 * lost[0]


def test_compensating_errors_in_lazy_batches_gives_the_same_result(monkeypatch):
    rng = np.random.default_rng(0)
    inputs, w = rng.normal(size=(900, 300)).astype(np.float32), rng.normal(size=(300, 8)).astype(np.float32)
    lazy = quantize(w, 8, 300, inputs.T @ inputs)
    monkeypatch.setattr("gpt2x.precisions.quantize.LAZY", 300)
    at_once = quantize(w, 8, 300, inputs.T @ inputs)
    assert (lazy.scale == at_once.scale).all()
    assert (lazy.q != at_once.q).mean() < 0.01  # sums in another order


def test_gptq_works_with_a_singular_hessian():
    w = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
    for hessian in (np.zeros((32, 32), np.float32), np.ones((32, 32), np.float32)):
        q, scale = quantize(w, 8, 32, hessian)
        assert np.isfinite(scale).all() and np.abs(dequantize(q, scale, 32) - w).max() < 0.1


def test_int4_is_packed_as_onnx_packs_it():
    numbers = np.array([[-8, 7, 0], [1, -1, 3]], np.int8)
    ours = pack4(numbers).tobytes()
    assert ours == bytes([0x78, 0x10, 0x3F])
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.INT4, dims=(2, 3), raw_data=ours)
    assert (onnx.numpy_helper.to_array(tensor).astype(np.int8) == numbers).all()
    assert (unpack4(np.frombuffer(ours, np.uint8), (2, 3)) == numbers).all()
    assert (unpack4(pack4(numbers[:, :1]), (2, 1)) == numbers[:, :1]).all()


# ----------------------------------------------------------------------------------------------------------- the files


def test_the_files_have_transformers_js_names_and_each_model_passes_the_checker(shakespeare):
    names = {"", "_fp16", "_quantized", "_int8", "_q4"}
    assert {f.name for f in shakespeare.joinpath("onnx").glob("*.onnx")} == {f"model{n}.onnx" for n in names}
    for name in names:
        path = shakespeare / f"onnx/model{name}.onnx"
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert {node.domain for node in model.graph.node} == {""}, "standard operators only"
        assert path.stat().st_size < 45_000


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_tied_table_is_stored_once(shakespeare, precision):
    model = onnx.load(shakespeare / contract.model_file(precision), load_external_data=False)
    places = {
        t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.name.startswith("wte")
    }
    offsets = {(p["offset"], p["length"]) for p in places.values()}
    assert len(offsets) == 2  # numbers and scales
    data = shakespeare / "onnx" / contract.data_file(precision)
    assert data.stat().st_size < {"int8": 2.7e6, "w8a8": 2.5e6, "int4": 1.6e6}[precision]


def plain_products(graph):
    """Products with a weight that are computed in floating point."""
    weights = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and weights.intersection(node.input)]


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_onnx_runtime_fuses_every_quantized_product(shakespeare, tmp_path, precision):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "o.onnx"), 4
    ort.InferenceSession(shakespeare / contract.model_file(precision), options)
    graph = onnx.load(tmp_path / "o.onnx", load_external_data=False).graph
    assert [node.op_type for node in graph.node].count("MatMulNBits") == 4 * 4 + 1
    assert plain_products(graph) == []


def test_the_metadata_has_the_precision_and_the_rounding(shakespeare):
    for precision in ALL:
        decoder = OnnxDecoder(shakespeare, precision=precision)
        assert decoder.metadata["gpt2x.precision"] == decoder.precision == precision
        assert decoder.metadata.get("gpt2x.rounding") == ("nearest" if precision in QUANTISED else None)
        assert decoder.metadata.get("gpt2x.block_size") == ("32" if precision.startswith("int") else None)


def test_fp16_has_its_cache_in_float16_and_norms_and_logits_in_float32(shakespeare):
    decoder = OnnxDecoder(shakespeare, precision="fp16")
    assert decoder.inputs["past_key_values.0.key"].dtype == "float16"
    assert decoder.outputs["logits"].dtype == "float32"
    model = onnx.load(shakespeare / "onnx/model_fp16.onnx", load_external_data=False)
    types = {t.name: t.data_type for t in model.graph.initializer}
    assert types["h.0.attn.c_attn.weight"] == onnx.TensorProto.FLOAT16
    assert types["h.0.ln_1.weight"] == onnx.TensorProto.FLOAT
    shapes = onnx.shape_inference.infer_shapes(model).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in shapes.value_info}
    softmax = [node.output[0] for node in model.graph.node if node.op_type == "Softmax"]
    assert [kinds[name] for name in softmax] == [onnx.TensorProto.FLOAT] * 4


def test_fp32_weights_are_written_only_with_precision_fp32(tmp_path):
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "d", ExportOptions(("int8",)))
    found = files_of(tmp_path / "d")
    assert "onnx/model.safetensors" not in found and "model.safetensors.index.json" not in found
    assert json.loads((tmp_path / "d/genai_config.json").read_text())["model"]["decoder"]["filename"] == (
        "onnx/model_quantized.onnx"
    )
    assert OnnxDecoder(tmp_path / "d").precision == "int8"  # the only one


def test_a_precision_is_added_without_force_and_the_card_then_has_both(gpt2x, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export = ("export", small / "m.safetensors", "--onnx", "d", "--no-tokenizer", "--precision")
    done(gpt2x(*export, "int8", "--no-verify"))
    before = {n: Path("d", n).read_bytes() for n in files_of(Path("d"))}
    done(gpt2x(*export, "int4,fp32", "--no-verify"))
    changed = {n for n in before if Path("d", n).read_bytes() != before[n]}
    assert changed == {"README.md"}
    card = Path("d/README.md").read_text()
    assert all(f"| {p} |" in card for p in ("fp32", "int8", "int4")) and "fp16" not in card
    assert_refused(
        gpt2x(*export, "int8,fp16"),
        "d/onnx/model_quantized.onnx: already exists; pass --force to replace it",
    )
    assert "onnx/model_fp16.onnx" not in files_of(Path("d"))
    done(gpt2x(*export, "int8,fp16,w8a8", "--force", "--no-verify"))
    assert {p: f.name for p, f in contract.models_in(Path("d")).items()}.keys() == set(ALL)
    done(gpt2x("verify", small / "m.safetensors", "d"))


def test_more_precisions_can_be_exported_from_an_export(gpt2x, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done(gpt2x("export", small / "m.safetensors", "--onnx", "d", "--no-tokenizer", "--no-verify"))
    done(gpt2x("export", "d", "--onnx", "d", "--no-tokenizer", "--precision", "int8"))
    done(gpt2x("verify", small / "m.safetensors", "d", "--precision", "int8"))


def test_one_directory_holds_one_model_and_one_kind_of_cache(tmp_path):
    source = open_checkpoint(SHAKESPEARE)
    export_onnx(source, tmp_path / "d")
    with pytest.raises(DestinationError, match="its cache is growing, this export's inplace"):
        export_onnx(source, tmp_path / "d", ExportOptions(("int8",), cache="inplace"))
    with pytest.raises(DestinationError, match="its logits are all, this export's last"):
        export_onnx(source, tmp_path / "d", ExportOptions(("int8",), last=True))
    with pytest.raises(DestinationError, match="its configuration is another; its source is another"):
        export_onnx(gentle(), tmp_path / "d", ExportOptions(("int8",)), need_tokenizer=False)
    with pytest.raises(DestinationError, match="its configuration is another; its source is another"):
        export_onnx(gentle(), tmp_path / "d", ExportOptions(("int8",)), need_tokenizer=False, force=True)
    assert not list(tmp_path.rglob("*quantized*"))


def test_the_error_for_a_missing_precision_lists_those_that_exist(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done(gpt2x("export", SHAKESPEARE, "--onnx", "d", "--precision", "int8,int4", "--no-verify"))
    with pytest.raises(FormatError, match="no fp16 model in this directory; it holds int8, int4"):
        OnnxDecoder("d", precision="fp16")
    assert_refused(gpt2x("generate", "d", "ROMEO:"), "several models", "it holds int8, int4: choose one (--precision")
    assert_refused(gpt2x("verify", SHAKESPEARE, "d", "--precision", "fp32"), "no fp32 model", "int8, int4")
    done(gpt2x("generate", "d", "ROMEO:", "--precision", "int4", "--max-new-tokens", "3"))
    out = done(gpt2x("inspect", "d")).stdout
    assert "1: int8, growing cache" in out and "precisions int8, int4" in out and "of 32, rounded to nearest" in out
    assert "1: int4, growing cache" in done(gpt2x("inspect", "d", "--precision", "int4")).stdout


@pytest.mark.parametrize("options", [("--precision", "int9"), ("--precision", "fp32,"), ("--calibrate", "x"),
                                     ("--block-size", "64"), ("--block-size", "33", "--precision", "int8")])  # fmt: skip
def test_wrong_usage(gpt2x, tmp_path, options):
    assert gpt2x("export", SHAKESPEARE, "--onnx", tmp_path / "d", *options).exit_code == 2
    assert not (tmp_path / "d").exists()


# -------------------------------------------------------------------------------------------------------- the numbers


# A kind of arithmetic each, and every cache. Other tests of `make test` run the others on a smaller model.
QUICK = {("fp16", "growing"), ("int4", "growing"), *(("int8", cache) for cache in contract.CACHES)}


@pytest.mark.parametrize(
    ("precision", "cache"),
    [
        pytest.param(precision, cache, marks=() if (precision, cache) in QUICK else pytest.mark.slow)
        for precision in ALL
        for cache in contract.CACHES
    ],
)
def test_every_precision_is_within_its_bounds_however_it_is_run(shakespeare, tmp_path, precision, cache):
    source, path = open_checkpoint(SHAKESPEARE), shakespeare
    if cache != "growing":
        path = tmp_path / "d"
        export_onnx(source, path, ExportOptions((precision,), cache))
    report = verify_export(source, path, precision=precision)
    assert [(c.name, c.result) for c in report.checks if c.passed is False] == []
    assert len([c for c in report.checks if c.passed]) >= 10
    decoder = OnnxDecoder(path, precision=precision)
    assert decoder.inputs["past_key_values.0.key"].dtype == contract.cache_type(precision, cache)


@pytest.mark.parametrize("switch", [{}, {"tie_word_embeddings": False}, {"n_embd": 48, "n_head": 3}, {"n_inner": 50}])
@pytest.mark.parametrize("precision", ["fp16", *QUANTISED])
def test_models_whose_sizes_are_not_multiples_of_the_block(tmp_path, precision, switch):
    config = replace(SMALL, **switch)
    checkpoint = gentle(config)
    export_onnx(checkpoint, tmp_path / "d", ExportOptions((precision,)), need_tokenizer=False)
    report = verify_export(checkpoint, tmp_path / "d")
    assert [(c.name, c.result) for c in report.checks if c.passed is False] == []


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_table_of_an_odd_width_is_right(tmp_path, precision):
    checkpoint = gentle(replace(SMALL, n_embd=33, n_head=3))
    export_onnx(checkpoint, tmp_path / "d", ExportOptions((precision,)), need_tokenizer=False)
    assert verify_export(checkpoint, tmp_path / "d").passed


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_prompt_in_chunks_has_the_logits_of_one_pass(shakespeare, precision):
    decoder = OnnxDecoder(shakespeare, precision=precision)
    ids = np.random.default_rng(0).integers(2048, size=256).tolist()
    expected = one_pass(decoder, ids)
    for sizes in ([128, 128], [64] * 4, [100, 100, 56]):
        found = np.concatenate(list(feed(decoder, ids, sizes)))
        assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


@pytest.mark.slow
def test_calibration_has_a_smaller_error_and_is_reported(gpt2x, tmp_path, monkeypatch, shakespeare):
    from gpt2x.verify.sample_text import default_text

    monkeypatch.chdir(tmp_path)
    Path("text").write_text(default_text())
    for kind in ("int8", "int4"):  # of w8a8, most that is lost is in the activations
        options = ("--precision", kind, "--calibrate", "text", "--json")
        said = json.loads(done(gpt2x("export", SHAKESPEARE, "--onnx", kind, *options)).stdout)
        assert said["verify"][0]["passed"]
        assert "rounded with calibration text" in done(gpt2x("inspect", kind)).stdout
        source = open_checkpoint(SHAKESPEARE)
        text = "It is not in our stars to hold our destiny, but in ourselves, my lord; for we are underlings. " * 9
        kl = [
            next(c for c in verify_export(source, path, text, kind).checks if c.name == "ORT_DISABLE_ALL").details
            for path in (kind, shakespeare)
        ]
        assert kl[0]["kl_divergence"] < 0.9 * kl[1]["kl_divergence"]


def test_calibrating_needs_a_tokenizer_and_a_text(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(gentle(), "m.safetensors")
    Path("text").write_text("")
    options = ("--onnx", "d", "--precision", "int8", "--calibrate", "text")
    assert_refused(gpt2x("export", "m.safetensors", *options), "--calibrate needs a tokenizer")
    assert_refused(gpt2x("export", SHAKESPEARE, *options), "text: the file is empty; --calibrate needs some text")
    assert not Path("d").exists()


def test_two_exports_are_byte_identical(shakespeare, tmp_path):
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "again", ExportOptions(ALL))
    assert files_of(shakespeare) == files_of(tmp_path / "again")
    for name in files_of(shakespeare):
        assert (shakespeare / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


# ----------------------------------------------------------------------------------------------- 8 bits by 8 bits


def test_every_product_of_w8a8_is_an_integer_product(shakespeare):
    model = onnx.load(shakespeare / contract.model_file("w8a8"), load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMulInteger") == 4 * 4 + 1
    assert plain_products(model.graph) == []


@pytest.mark.parametrize("cache", ["growing", "inplace"])
def test_w8a8_logits_do_not_depend_on_chunks_or_optimizations(tmp_path, cache):
    """Integers are summed exactly, and each row has its own scale."""
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "d", ExportOptions(("w8a8",), cache))
    decoder, plain = (OnnxDecoder(tmp_path / "d", optimize=optimize) for optimize in (True, False))
    ids = np.random.default_rng(0).integers(2048, size=64).tolist()
    largest = np.abs(expected := one_pass(decoder, ids)).max()
    for other in (
        one_pass(plain, ids),
        *(np.concatenate(list(feed(decoder, ids, n))) for n in ([32] * 2, [1] * 64)),
    ):
        apart = np.abs(other - expected).max(1)
        assert np.median(apart) <= 1e-5 * largest  # attention's own sums may turn a rounding here and there
        assert apart.max() <= 5e-3 * largest


def test_rows_of_zeros_and_huge_rows_are_right_in_w8a8(tmp_path):
    checkpoint = gentle()
    tensors = dict(checkpoint.tensors)
    for part in ("weight", "bias"):
        shape = tensors[f"h.0.ln_1.{part}"].shape
        tensors[f"h.0.ln_1.{part}"] = LazyTensor.of(np.zeros(shape, np.float32))  # c_attn is given nothing but zeros
    tensors["h.1.ln_2.weight"] = LazyTensor.of(np.full(64, 1e30, np.float32))
    tensors["h.1.mlp.c_fc.weight"] = LazyTensor.of(tensors["h.1.mlp.c_fc.weight"].read() * np.float32(1e-30))
    checkpoint = replace(checkpoint, tensors=tensors)
    export_onnx(checkpoint, tmp_path / "d", ExportOptions(("w8a8",)), need_tokenizer=False)
    assert verify_export(checkpoint, tmp_path / "d").passed


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_w8a8_is_within_its_bounds_with_every_activation(tmp_path, activation):
    checkpoint = gentle(replace(SMALL, activation_function=activation))
    export_onnx(checkpoint, tmp_path / "d", ExportOptions(("w8a8",)), need_tokenizer=False)
    assert verify_export(checkpoint, tmp_path / "d").passed


def test_a_w8a8_sum_that_could_overflow_int32_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2x.precisions.w8a8.LONGEST", 255)
    with pytest.raises(
        ConversionError, match="h.0.mlp.c_proj.weight: w8a8 sums at most 255 products, this matrix has 256"
    ):
        export_onnx(gentle(), tmp_path / "d", ExportOptions(("w8a8",)), need_tokenizer=False)


def test_the_commands_know_every_precision():
    from gpt2x.cli.source import PRECISION

    assert list(PRECISION.choices) == list(PRECISIONS) == list(ALL)


def test_only_the_registry_compares_precision_names():
    package = Path(gpt2x_package.__file__).parent
    found = []
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Compare) or "precisions" in file.parts:
                continue
            names = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            if names & PRECISIONS.keys():
                found.append(f"{file.name}:{node.lineno}")
    assert found == []


def test_the_registry_loads_no_numpy_onnx_or_torch():
    code = "import sys, gpt2x.precisions; print([name for name in ('numpy', 'onnx', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("q8", "did you mean int8?"), ("F16", "did you mean fp16?"), ("int9", "known are fp32, fp16, int8, w8a8, int4")],
)
def test_the_error_for_an_unknown_precision_has_a_hint(gpt2x, tmp_path, typed, hint):
    result = gpt2x("export", SHAKESPEARE, "--onnx", tmp_path / "d", "--precision", typed)
    assert result.exit_code == 2
    assert f"unknown precision {typed!r}" in result.stderr and hint in " ".join(result.stderr.split())


# ------------------------------------------------------------------------------------------------------------ the gate


def broken(small, tmp_path, precision, name, change):
    """A copy of the export of which one initializer's bytes are changed."""
    shutil.copytree(small / "onnx", tmp_path / "b")
    model = onnx.load(tmp_path / "b" / contract.model_file(precision), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    place = {e.key: e.value for e in tensor.external_data}
    with open(tmp_path / "b/onnx" / place["location"], "r+b") as file:
        file.seek(int(place["offset"]))
        data = change(bytearray(file.read(int(place["length"]))))
        file.seek(int(place["offset"]))
        file.write(data)
    return tmp_path / "b"


def scaled(data, which, factor):
    scales = np.frombuffer(data, np.float32).copy()
    scales[which] *= factor
    return scales.tobytes()


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_single_broken_scale_is_seen(small, tmp_path, precision, gpt2x):
    path = broken(small, tmp_path, precision, "h.1.mlp.c_fc.weight_scale", lambda d: scaled(d, 77, 2))
    result = gpt2x("verify", small / "m.safetensors", path, "--precision", precision)
    assert result.exit_code == 1
    assert re.search(r"h.1.mlp.c_fc.weight has a block with a relative error of (9|10)\d%", result.stdout)


def test_broken_scales_are_seen_in_the_logits_too(small, tmp_path):
    path = broken(small, tmp_path, "int8", "wte.weight_scale", lambda d: scaled(d, slice(0, 30), 1.5))
    report = verify_export(gentle(), path, precision="int8")
    failed = {check.name for check in report.checks if check.passed is False}
    assert {"weights", "full context", "ORT_DISABLE_ALL"} <= failed


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("name", ["h.0.ln_1.weight", "h.1.attn.c_attn.bias", "wpe.weight"])
def test_a_changed_weight_that_is_not_quantized_is_seen(small, tmp_path, precision, name):
    path = broken(small, tmp_path, precision, name, lambda d: d[:1] + bytes([d[1] ^ 1]) + d[2:])
    report = verify_export(gentle(), path, precision=precision)
    assert f"{name} differs from the source" in next(c.result for c in report.checks if c.name == "weights")


@pytest.mark.parametrize("precision", ["fp16", *QUANTISED])
def test_fewer_bits_have_wider_bounds(precision):
    in_order = [
        CACHE8 if name == "cache" else PRECISIONS[name].bounds for name in ("fp32", "fp16", "cache", *QUANTISED)
    ]
    bounds = PRECISIONS[precision].bounds
    before = in_order[in_order.index(bounds) - 1]
    assert all(value > vars(before)[name] for name, value in vars(bounds).items())


@pytest.mark.parametrize("precision", QUANTISED)
def test_calibration_works_with_blocks_of_zeros_and_short_blocks(tmp_path, precision):
    checkpoint = gentle(replace(SMALL, n_embd=66))
    tensors = dict(checkpoint.tensors)
    array = tensors["h.0.mlp.c_fc.weight"].read().copy()
    array[32:64, ::3] = 0
    tensors["h.0.mlp.c_fc.weight"] = LazyTensor.of(array)
    checkpoint = replace(checkpoint, tensors=tensors)
    ids = np.random.default_rng(0).integers(97, size=800).tolist()
    export_onnx(checkpoint, tmp_path / "d", ExportOptions((precision,), calibration=ids), need_tokenizer=False)
    checks = verify_export(checkpoint, tmp_path / "d").checks
    assert next(check for check in checks if check.name == "weights").passed


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("value", ["abc", "0", "-3", "9" * 40, ""])
def test_a_block_size_that_makes_no_sense_is_one_clear_error(tmp_path, gpt2x, value):
    export_onnx(gentle(), tmp_path / "d", ExportOptions(("int8",)), need_tokenizer=False)
    path = tmp_path / "d/onnx/model_quantized.onnx"
    model = onnx.load(path, load_external_data=False)
    next(e for e in model.metadata_props if e.key == contract.BLOCK).value = value
    path.write_bytes(model.SerializeToString())
    assert_refused(gpt2x("inspect", path), "gpt2x.block_size is")


def test_a_model_that_says_it_is_of_another_precision_is_refused(tmp_path):
    export_onnx(gentle(), tmp_path / "d", ExportOptions(("fp32", "int8")), need_tokenizer=False)
    path = tmp_path / "d/onnx/model_quantized.onnx"
    model = onnx.load(path, load_external_data=False)
    next(e for e in model.metadata_props if e.key == contract.PRECISION).value = "fp32"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match="its metadata says fp32, not int8"):
        OnnxDecoder(tmp_path / "d", precision="int8")


def test_genai_config_follows_when_an_export_is_replaced_in_the_sources_own_directory(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(open_checkpoint(SHAKESPEARE), "m", "hf")
    done(gpt2x("export", "m", "--onnx", "m", "--no-verify"))
    done(gpt2x("export", "m", "--onnx", "m", "--no-verify", "--cache", "inplace", "--force"))
    assert json.loads(Path("m/genai_config.json").read_text())["search"]["past_present_share_buffer"] is True
    assert_refused(gpt2x("export", "m", "--onnx", "m/onnx", "--no-verify"), "m/onnx: holds models itself")


def spoiled(value, name="h.1.mlp.c_fc.weight"):
    checkpoint = gentle()
    array = checkpoint.tensors[name].read().copy()
    array.flat[5] = value
    return replace(checkpoint, tensors={**checkpoint.tensors, name: LazyTensor.of(array)})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["h.1.mlp.c_fc.weight", "wte.weight", "ln_f.bias"])
@pytest.mark.parametrize("precision", ["fp16", *QUANTISED])
def test_nan_and_infinity_are_refused_and_leave_no_file(tmp_path, precision, value, name):
    with pytest.raises(ConversionError, match=f"{name} holds NaN or infinity, which {precision} cannot represent"):
        export_onnx(spoiled(value, name), tmp_path / "d", ExportOptions((precision,)), need_tokenizer=False)
    assert not list(tmp_path.iterdir())


def test_weights_that_overflow_in_fp16_are_refused(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(spoiled(70000.0), "m.safetensors")
    result = gpt2x("export", "m.safetensors", "--onnx", "d", "--precision", "fp16", "--no-tokenizer")
    assert_refused(result, "h.1.mlp.c_fc.weight holds 70000, beyond fp16's largest value 65504")
    assert not Path("d").exists()


def test_activations_that_overflow_in_fp16_are_refused(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = gentle()
    tensors = dict(checkpoint.tensors)
    name = "h.0.mlp.c_fc.weight"
    tensors[name] = LazyTensor.of(tensors[name].read() * np.float32(1.2e5))
    save_checkpoint(replace(checkpoint, tensors=tensors), "m.safetensors")
    result = gpt2x("export", "m.safetensors", "--onnx", "d", "--precision", "fp16", "--no-tokenizer", "--no-verify")
    assert_refused(
        result, "h.0.mlp.c_fc: activations reach", "fp16's largest value 65504. Export this model as fp32 or int8."
    )
    assert not Path("d").exists()
    done(gpt2x("export", "m.safetensors", "--onnx", "e", "--no-tokenizer"))


def test_all_zero_and_constant_weights_are_right(tmp_path):
    checkpoint = gentle()
    tensors = dict(checkpoint.tensors)
    tensors["h.0.attn.c_proj.weight"] = LazyTensor.of(np.zeros((64, 64), np.float32))
    tensors["h.1.attn.c_proj.weight"] = LazyTensor.of(np.full((64, 64), 0.05, np.float32))
    checkpoint = replace(checkpoint, tensors=tensors)
    export_onnx(checkpoint, tmp_path / "d", ExportOptions(QUANTISED), need_tokenizer=False)
    for precision in QUANTISED:
        assert verify_export(checkpoint, tmp_path / "d", precision=precision).passed


@pytest.mark.parametrize("precision", ["fp16", *QUANTISED])
def test_a_truncated_file_of_weights_is_one_clear_error(shakespeare, tmp_path, gpt2x, precision):
    shutil.copytree(shakespeare, tmp_path / "b")
    data = tmp_path / "b/onnx" / contract.data_file(precision)
    data.write_bytes(data.read_bytes()[:-1000])
    assert_refused(gpt2x("generate", tmp_path / "b", "ROMEO:", "--precision", precision), "model")


def test_an_unknown_precision_of_a_newer_gpt2x_is_refused(tmp_path):
    export_onnx(gentle(), tmp_path / "d", need_tokenizer=False)
    path = tmp_path / "d/onnx/model.onnx"
    model = onnx.load(path, load_external_data=False)
    next(e for e in model.metadata_props if e.key == contract.PRECISION).value = "int2"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ConversionError, match="unknown kind of model"):
        OnnxDecoder(path)


def test_a_tiny_model_whose_blocks_are_never_full(tmp_path):
    export_onnx(random_checkpoint(TINY), tmp_path / "d", ExportOptions(ALL), need_tokenizer=False)
    ids = np.arange(9)[None]
    expected, _ = OnnxDecoder(tmp_path / "d").run(ids, None, ids, None)
    for precision in ("fp16", "int8"):
        found, _ = OnnxDecoder(tmp_path / "d", precision=precision).run(ids, None, ids, None)
        assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_a_quantized_model_given_first_is_compared_with_the_weights_given_second(gpt2x, small):
    out = done(gpt2x("verify", small / "onnx", small / "m.safetensors", "--precision", "int8")).stdout
    assert "weights         within bounds 28 of 28 tensors, worst block" in out
    assert f"against {small / 'onnx'} (int8)\n" in out
    assert out.endswith("Within the bounds of its precision.\n")
