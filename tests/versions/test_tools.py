"""Tools of others work on exported files: ONNX's checker and shape inference, ONNX Runtime's symbolic shape inference and
quantization, onnxslim, onnxsim, and optimum's quantizer. ``make test-versions`` installs them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import install
import measure
import pytest
from measure import DEFAULT, Kind

GRAPHS = [*DEFAULT, Kind("growing", "fp32", 23), Kind("growing", "int8", 23)]
FP32 = [Kind(cache, "fp32") for cache in ("growing", "inplace", "inplace-int8")]
TOOLS = ("onnxslim==0.1.98", "onnxsim==0.8.1", "sympy==1.14.0", "mpmath==1.3.0", "flatbuffers==25.12.19")
LOSSLESS = 1e-9  # of KL divergence
QUANTIZED = 1e-3
# What a tool does not know of the graph; not a fault of the file.
# ONNX Runtime's symbolic shape inference cannot infer ReduceMax with its axes as an input, and takes ONNX's Attention, which
# only --opset 23 uses, for its own operator of that name.
NOT_SYMBOLIC = {Kind(cache, "w8a8") for cache in ("growing", "inplace", "inplace-int8")} | {
    Kind("growing", "fp32", 23),
    Kind("growing", "int8", 23),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return measure.Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def found(models, tmp_path_factory):
    """What ``run_tools.py`` found: kind -> tool -> result."""
    packages = [install.python_packages(*TOOLS), *install.onnxruntime(install.NEWEST)]
    folder = tmp_path_factory.mktemp("tools")
    task = models.task(models=[models.file(kind) for kind in GRAPHS], folder=str(folder))
    results = install.run("run_tools.py", task, folder, packages)
    return {kind: results[models.file(kind)] for kind in GRAPHS}


@pytest.mark.parametrize("kind", GRAPHS, ids=str)
def test_the_full_checker_passes(kind, found):
    assert found[kind]["checker"] == "passed"


@pytest.mark.parametrize("kind", GRAPHS, ids=str)
def test_shape_inference_knows_every_value(kind, found):
    assert found[kind]["infer_shapes"] == found[kind]["infer_shapes_path"] == []


@pytest.mark.parametrize("kind", GRAPHS, ids=str)
def test_symbolic_shape_inference_knows_every_value_but_behind_operators_it_lacks(kind, found):
    result = found[kind]["symbolic"]
    assert result == [] if kind not in NOT_SYMBOLIC else "Error" in result


@pytest.mark.parametrize("tool", ["onnxslim", "onnxsim"])
@pytest.mark.parametrize("kind", GRAPHS, ids=str)
def test_a_simplified_model_is_the_same_model(kind, tool, found):
    result = found[kind][tool]
    assert result["tokens"] == found[kind]["tokens"]
    assert result["kl"] < LOSSLESS


@pytest.mark.parametrize("kind", FP32, ids=str)
@pytest.mark.parametrize("tool", ["quantize_dynamic", "quantize_dynamic per channel"])
def test_a_model_can_be_quantized_dynamically(kind, tool, found):
    result = found[kind][tool]
    assert result["kl"] < QUANTIZED
    assert result["bytes"] < 0.3 * found[kind]["bytes"]


@pytest.mark.parametrize("kind", FP32[:2], ids=str)
def test_a_model_can_be_preprocessed_and_quantized(kind, found):
    assert found[kind]["quant_pre_process"]["kl"] < LOSSLESS
    assert found[kind]["quant_pre_process"]["tokens"] == found[kind]["tokens"]
    assert found[kind]["preprocessed and quantized"]["kl"] < QUANTIZED


@pytest.mark.parametrize("kind", FP32[:2], ids=str)
def test_optimums_quantizer_makes_a_model_that_optimum_loads(kind, models, tmp_path):
    packages = os.pathsep.join(map(str, install.optimum("2.1.0")))
    task = tmp_path / "task.json"
    task.write_text(json.dumps(models.task(model=str(models.paths[kind]), folder=str(tmp_path / "quantized"))))
    program = Path(__file__).with_name("run_quantizer.py")
    environment = {**os.environ, "PYTHONPATH": packages, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([sys.executable, program, task], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for tokens in results["tokens"]:
        assert len(set(tokens)) > 8  # words, not one token again and again
    assert results["same"] >= 0.9
    assert results["bytes"] < 0.3 * results["before"]
