"""Models over 2 GB, which protobuf alone could not hold. ``make test-all`` runs these, and 13 GB of disk are used."""

import math

import numpy as np
import onnx
import pytest
from commands import done

from converters import Checkpoint, GPT2Config, LazyTensor
from converters.tensors import F32
from gpt2x.export.onnx_directory import export_onnx
from gpt2x.load import from_pretrained
from gpt2x.runtimes.onnxruntime import OnnxDecoder
from gpt2x.runtimes.torch import TorchDecoder
from gpt2x.verify.metrics import measure
from gpt2x.verify.scenarios import feed, one_pass

XL = GPT2Config(n_layer=48, n_embd=1600, n_head=25)


def random_tensor(name, shape):
    """Random weights of a trained model's size, made as they are read."""
    size = math.prod(shape)

    def stream():
        rng = np.random.default_rng(size)
        for start in range(0, size, 1 << 18):
            values = rng.standard_normal(min(1 << 18, size - start), np.float32) * np.float32(0.02)
            yield (values + np.float32(name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")))).tobytes()

    return LazyTensor(F32, shape, stream)


@pytest.mark.huge
def test_the_1558m_shape_is_exported_runs_and_is_right(tmp_path, gpt2x):
    tensors = {name: random_tensor(name, shape) for name, shape in XL.shapes().items()}
    export_onnx(Checkpoint(config=XL, tensors=tensors), tmp_path / "xl", need_tokenizer=False)
    size = sum(file.stat().st_size for file in (tmp_path / "xl").rglob("*") if file.is_file())
    assert 6.2e9 < size < 1.02 * 6_230_444_800
    onnx.checker.check_model(tmp_path / "xl/onnx/model.onnx")
    assert "1,557,611,200 parameters" in done(gpt2x("inspect", tmp_path / "xl")).stdout
    ids = np.random.default_rng(0).integers(50257, size=12).tolist()
    expected = one_pass(TorchDecoder(from_pretrained(tmp_path / "xl")), ids)
    decoder = OnnxDecoder(tmp_path / "xl")
    assert measure(expected, one_pass(decoder, ids)).failures() == []
    pieces = np.concatenate(list(feed(decoder, ids, [5, 1, 1, 5])))
    assert measure(expected, pieces).failures() == []
