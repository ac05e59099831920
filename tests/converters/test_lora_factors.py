"""The factors of adapters that are applied at run time, and the adapters that can only be merged."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from paths import FIXTURES

from converters import CheckpointError, ConversionError, open_checkpoint
from converters.lora_factors import run_time_factors
from converters.opening.adapter import adapter_in, merge_adapter

ADAPTERS = FIXTURES / "adapters"


@pytest.fixture(scope="module")
def base():
    return open_checkpoint(ADAPTERS / "base")


@pytest.mark.parametrize("name", ["c_attn", "all_linear", "one_layer", "patterns", "rslora", "named"])
def test_a_weight_plus_the_product_of_its_factors_is_the_merged_weight(base, name):
    adapter = adapter_in(ADAPTERS / name)
    factors = run_time_factors(base, adapter)
    merged = merge_adapter(base, adapter)
    changed = [key for key in base.tensors if not np.array_equal(base.tensors[key].read(), merged.tensors[key].read())]
    assert [f"{projection}.weight" for projection in factors] == changed
    for projection, pair in factors.items():
        weight = base.tensors[f"{projection}.weight"].read()
        whole = weight + pair.a.read().astype(np.float64) @ pair.b.read()
        assert np.allclose(whole, merged.tensors[f"{projection}.weight"].read(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bias_all", "it replaces h.0.attn.c_attn.bias"),
        ("bias_lora_only", "it replaces h.0.attn.c_attn.bias"),
        ("lora_bias", "it changes h.0.attn.c_attn.bias"),
        ("dora", "it changes h.0.attn.c_attn.weight by DoRA"),
        ("dora_embeddings", "it changes"),
        ("embeddings", "it changes w"),
        ("lm_head", "it changes lm_head.weight"),
        ("tied_pair", "it changes"),
        ("saved_head", "it replaces l"),
        ("saved_embedding", "it replaces wte.weight"),
        ("saved_pair", "it replaces"),
        ("resized", "it replaces"),
        ("tokens", "it replaces rows of wte.weight"),
        ("tokens_alone", "it replaces rows of"),
    ],
)
def test_an_adapter_that_changes_more_than_projections_is_refused_with_what_to_do(base, name, said):
    with pytest.raises(CheckpointError) as raised:
        run_time_factors(base, adapter_in(ADAPTERS / name))
    message = str(raised.value)
    assert said in message and "Merge the adapter" in message and "\n" not in message


def with_factors(folder, change):
    """The adapter ``c_attn``, with its tensors changed."""
    shutil.copytree(ADAPTERS / "c_attn", folder)
    file = folder / "adapter_model.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(file)), file)
    return folder


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_in_a_factor_are_refused(base, tmp_path, value):
    def spoiled(tensors):
        return {name: np.full_like(array, value) for name, array in tensors.items()}

    factors = run_time_factors(base, adapter_in(with_factors(tmp_path / "x", spoiled)))
    with pytest.raises(ConversionError, match="the adapter holds NaN or infinity"):
        factors["h.0.attn.c_attn"].b.read()


def test_factors_in_half_precision_are_read_as_float32(base, tmp_path):
    def half(tensors):
        return {name: array.astype(np.float16) for name, array in tensors.items()}

    pair = run_time_factors(base, adapter_in(with_factors(tmp_path / "x", half)))["h.0.attn.c_attn"]
    exact = run_time_factors(base, adapter_in(ADAPTERS / "c_attn"))["h.0.attn.c_attn"]
    assert pair.b.read().dtype == np.float32
    assert np.allclose(pair.b.read(), exact.b.read(), rtol=1e-3, atol=1e-4)


def test_an_adapter_of_another_width_is_refused(base, tmp_path):
    def wider(tensors):
        return {name: np.ones((4, 32) if "lora_A" in name else (96, 4), np.float32) for name in tensors}

    with pytest.raises(CheckpointError, match=r"does not fit .*it changes a \[32, 96\] h.0.attn.c_attn.weight"):
        run_time_factors(base, adapter_in(with_factors(tmp_path / "x", wider)))


def test_the_scale_is_in_the_second_factor(base, tmp_path):
    folder = with_factors(tmp_path / "x", lambda tensors: tensors)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 3 * config["lora_alpha"]}))
    tripled = run_time_factors(base, adapter_in(folder))["h.0.attn.c_attn"]
    once = run_time_factors(base, adapter_in(ADAPTERS / "c_attn"))["h.0.attn.c_attn"]
    assert np.allclose(tripled.b.read(), 3 * once.b.read(), rtol=1e-6, atol=0)
    assert np.array_equal(tripled.a.read(), once.a.read())
