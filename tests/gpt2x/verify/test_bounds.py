"""Bounds of quantized models: exact arithmetic passes them on every model, saturated products do not."""

from dataclasses import replace
from typing import Any

import pytest

from converters import LazyTensor, open_checkpoint
from gpt2x import SHAKESPEARE, contract
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.precisions import PRECISIONS, weights
from gpt2x.runtimes.onnxruntime import OnnxDecoder
from gpt2x.runtimes.opening import gpt2x_model
from gpt2x.runtimes.processor import saturates
from gpt2x.verify.exact_arithmetic import rounded_model
from gpt2x.verify.metrics import measure
from gpt2x.verify.report import verify_export
from gpt2x.verify.running import bounds_of
from gpt2x.verify.sample_text import sample_ids
from gpt2x.verify.scenarios import Text as RunText
from gpt2x.verify.scenarios import compare_logits, one_pass

QUANTISED = ("int8", "w8a8", "int4")


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bounds") / "shakespeare"
    export_onnx(open_checkpoint(SHAKESPEARE), folder, ExportOptions(QUANTISED))
    return folder


@pytest.fixture(scope="module")
def text():
    checkpoint = open_checkpoint(SHAKESPEARE)
    return RunText(gpt2x_model(checkpoint), sample_ids(checkpoint.config, checkpoint.tokenizer)[0])


def with_outliers(checkpoint, times=300.0):
    """The same function, whose activations are hard to quantize: one channel of each norm is large, its weights small."""
    tensors = dict(checkpoint.tensors)
    for i in range(checkpoint.config.n_layer):
        for norm, product in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
            for name in (f"h.{i}.{norm}.weight", f"h.{i}.{norm}.bias", f"h.{i}.{product}.weight"):
                array = tensors[name].read().copy()
                array[7] *= 1 / times if name.endswith(f"{product}.weight") else times
                tensors[name] = LazyTensor.of(array)
    return replace(checkpoint, tensors=tensors)


@pytest.mark.parametrize("precision", QUANTISED)
def test_exact_arithmetic_has_the_error_of_onnx_runtime(shakespeare, text, precision):
    checkpoint, decoder = open_checkpoint(SHAKESPEARE), OnnxDecoder(shakespeare, precision=precision)
    exact = one_pass(rounded_model(checkpoint, decoder), text.ids)
    found = one_pass(decoder, text.ids)
    from_source = measure(text.logits, found).kl_divergence
    assert measure(text.logits, exact).kl_divergence == pytest.approx(from_source, rel=0.1)
    assert measure(exact, found).kl_divergence < from_source / 2


@pytest.mark.parametrize("precision", QUANTISED)
def test_the_bounds_are_about_three_times_what_is_measured(shakespeare, text, precision):
    found = measure(text.logits, one_pass(OnnxDecoder(shakespeare, precision=precision), text.ids))
    assert 2 < PRECISIONS[precision].bounds.kl_divergence / found.kl_divergence < 4


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["w8a8", "int8"])
def test_a_model_that_is_hard_to_quantize_is_judged_by_exact_arithmetic(tmp_path, precision):
    checkpoint = with_outliers(open_checkpoint(SHAKESPEARE))
    export_onnx(checkpoint, tmp_path / "d", ExportOptions((precision,)))
    report = verify_export(checkpoint, tmp_path / "d")
    assert report.passed, [check.result for check in report.checks if check.passed is False]
    said = next(check.result for check in report.checks if check.name == "bounds")
    assert f"{precision} loses more on this model than on most: computed exactly, its KL divergence is" in said


def test_no_product_of_a_new_export_can_saturate(shakespeare):
    for name, numbers in stored_numbers(shakespeare / contract.model_file("w8a8")):
        pairs = numbers[: len(numbers) // 2 * 2].reshape(-1, 2, numbers.shape[1]).astype(int).sum(1)
        assert abs(pairs).max() <= 128, name
    assert OnnxDecoder(shakespeare, precision="w8a8").metadata[contract.PAIRS] == "128"


def stored_numbers(path):
    from gpt2x.verify.quantized_weights import read_stored

    found = read_stored(path, open_checkpoint(SHAKESPEARE).config.shapes())
    return [(name, stored.numbers) for name, stored in found if stored.scale is not None]


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A w8a8 model as gpt2x 0.1.0 wrote it: adjacent weights with any sum, and no metadata about them."""
    folder = tmp_path_factory.mktemp("old") / "d"
    patch = pytest.MonkeyPatch()
    writing: Any = weights
    quantize = writing.quantize
    patch.setattr(writing, "quantize", lambda *arguments, paired: quantize(*arguments))
    patch.setattr("gpt2x.export.onnx_directory.contract.PAIRS", "gpt2x.unknown")
    export_onnx(open_checkpoint(SHAKESPEARE), folder, ExportOptions(("w8a8",)))
    patch.undo()
    return folder


def test_an_old_w8a8_model_is_right_on_every_processor(old):
    assert verify_export(open_checkpoint(SHAKESPEARE), old).passed


@pytest.mark.skipif(
    not saturates(), reason="products do not saturate on this processor; make test-processors emulates one"
)
def test_verify_refuses_a_saturated_model(old, text, monkeypatch):
    monkeypatch.setattr("gpt2x.runtimes.onnx_model.EXACT", "session.not_asked_for")
    decoder = OnnxDecoder(old)
    check = compare_logits("full context", decoder, text, bounds_of(decoder))
    assert check.passed is False
    assert "kl_divergence is" in check.result
    assert not verify_export(open_checkpoint(SHAKESPEARE), old).passed
