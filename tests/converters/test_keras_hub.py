"""KerasHub's presets and weights: files that KerasHub wrote, and damaged ones."""

import json
import shutil
import zipfile

import h5py
import numpy as np
import pytest
import torch
from checkpoints import assert_same_bytes
from commands import done
from paths import FIXTURES

from converters import CheckpointError, ConfigError, FormatError, GPT2Config, UnsafeError, open_checkpoint
from converters.formats.keras import from_keras_hub, to_keras_hub
from gpt2x import from_pretrained

PRESET, SHARDS = FIXTURES / "keras_hub", FIXTURES / "keras_hub_shards"
WEIGHTS = FIXTURES / "keras_hub_weights/gpt2.weights.h5"
INDEX = "model.weights.json"


@pytest.fixture
def preset(tmp_path):
    return shutil.copytree(PRESET, tmp_path / "preset")


@pytest.fixture
def shards(tmp_path):
    return shutil.copytree(SHARDS, tmp_path / "shards")


def changed(path, change):
    """Change a JSON file in place."""
    raw = json.loads(path.read_bytes())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize("path", [PRESET, PRESET / "model.weights.h5", SHARDS, SHARDS / INDEX, WEIGHTS, WEIGHTS.parent])
def test_what_keras_hub_wrote_has_the_weights_that_were_given_to_it(path):
    checkpoint = open_checkpoint(path)
    assert (checkpoint.format, checkpoint.dialect) == ("hdf5", "keras-hub")
    assert_same_bytes(open_checkpoint(FIXTURES / "tf_plain"), checkpoint)
    assert checkpoint.config.n_head == 2
    assert checkpoint.config.activation_function == "gelu_new"


def test_the_logits_are_keras_hubs():
    expected = np.load(FIXTURES / "keras_hub.npz")
    with torch.no_grad():
        logits = from_pretrained(PRESET)(torch.from_numpy(expected["ids"]).long())[0]
    np.testing.assert_allclose(logits.numpy(), expected["logits"], atol=1e-5, rtol=1e-5)


def test_the_tokenizer_of_a_preset_is_in_its_assets_and_is_converted(gpt2x, tmp_path):
    done(gpt2x("convert", PRESET, tmp_path / "hf"))
    vocabulary = open_checkpoint(tmp_path / "hf").tokenizer.vocabulary()
    assert vocabulary.ids["cd"] == 11
    assert vocabulary.merges == [("a", "b"), ("c", "d")]
    assert open_checkpoint(tmp_path / "hf").config.eos_token_id == 12


def test_the_state_of_the_optimizer_is_left_out():
    assert open_checkpoint(WEIGHTS).left_out == ("optimizer/vars/0", "optimizer/vars/1")


def test_every_file_of_weights_is_named():
    assert [file.name for file in open_checkpoint(SHARDS).files] == ["model_00000.weights.h5", "model_00001.weights.h5"]


def test_the_names_that_keras_2_gave_are_read(tmp_path):
    """Keras 2.13 had another name for the group of layers."""
    shutil.copy(PRESET / "model.weights.h5", tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5", "a") as file:
        file.move("layers", "_layer_checkpoint_dependencies")
    assert_same_bytes(open_checkpoint(PRESET), open_checkpoint(tmp_path / "m.h5"))


# ----------------------------------------------------------------------------------------------------- configuration


def test_a_configuration_is_read_as_it_is_written():
    config = GPT2Config(n_layer=3, n_head=2, n_embd=6, n_ctx=10, n_vocab=13, n_inner=11, resid_pdrop=0.2)
    fields = from_keras_hub(to_keras_hub(config), "x")
    assert {name: getattr(config, name) for name in fields} == {**fields, "embd_pdrop": 0.1, "attn_pdrop": 0.1}


def test_the_configuration_of_a_task_states_its_backbone(preset):
    """As in an unpacked .keras archive."""
    shutil.copy(preset / "task.json", preset / "config.json")
    assert open_checkpoint(preset).config == open_checkpoint(PRESET).config


REFUSED = {
    "another model": (lambda raw: raw.update(class_name="BertBackbone"), "a Keras configuration of 'BertBackbone'"),
    "no arguments": (lambda raw: raw.update(config=[]), "a Keras configuration of 'GPT2Backbone'"),
    "an unknown argument": (lambda raw: raw["config"].update(rope=1), "rope is '1': GPT2Backbone has no such argument"),
    "another width": (lambda raw: raw["config"].update(hidden_dim=8), "n_embd is 6 in the tensors, 8 in config.json"),
    "other heads": (lambda raw: raw["config"].update(num_heads=3), "n_head is 2 in model.weights.h5, 3 in config.json"),
    "heads that are a text": (lambda raw: raw["config"].update(num_heads="2"), "n_head is 2 in model.weights.h5, '2'"),
    "more layers": (lambda raw: raw["config"].update(num_layers=3), "n_layer is 2 in the tensors, 3 in config.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_configuration_that_does_not_fit_is_refused(preset, case):
    change, words = REFUSED[case]
    changed(preset / "config.json", change)
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        open_checkpoint(preset)
    assert words in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ damage


def without(name):
    def change(file):
        del file[name]

    return change


def other_shape(name, shape):
    def change(file):
        values = np.zeros(shape, np.float32)
        del file[name]
        file[name] = values

    return change


QUERY = "layers/transformer_decoder_1/_self_attention_layer/query_dense/vars/0"
OUTPUT = "layers/transformer_decoder/_self_attention_layer/output_dense/vars/0"
BROKEN = {
    "no query": (without(QUERY), "missing"),
    "a query of other heads": (other_shape(QUERY, (6, 3, 2)), "query_dense/vars/0 has 3"),
    "an output of other heads": (other_shape(OUTPUT, (3, 2, 6)), "output_dense/vars/0 has 3"),
    "a query of a matrix": (other_shape(QUERY, (6, 6)), "query_dense"),
    "an output that is a matrix": (other_shape(OUTPUT, (6, 6)), "expected [heads, head_dim, out]"),
    "an unknown tensor": (lambda file: file.create_dataset("layers/x", (3,), "f4", data=np.ones(3)), "unknown   layers/x"),
    "no last norm": (without("layers/layer_normalization/vars/0"), "missing   layers/layer_normalization/vars/0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_of_weights_is_refused(preset, case):
    change, words = BROKEN[case]
    with h5py.File(preset / "model.weights.h5", "a") as file:
        change(file)
    with pytest.raises((CheckpointError, FormatError)) as caught:
        open_checkpoint(preset)
    assert words in str(caught.value)


def test_a_layer_under_two_names_is_refused(preset):
    with h5py.File(preset / "model.weights.h5", "a") as file:
        file.copy("layers/transformer_decoder", "layers/transformer_decoder_0")
    with pytest.raises(FormatError, match="are the same layer"):
        open_checkpoint(preset)


def test_an_archive_of_keras_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        for name in ("config.json", "model.weights.h5"):
            archive.write(PRESET / name, name)
    with pytest.raises(FormatError, match=r"a \.keras archive; unzip it, and pass the folder"):
        open_checkpoint(tmp_path / "m.keras")


# ------------------------------------------------------------------------------------------------------------ shards

GROUP = "/layers/layer_normalization/vars"
BAD_INDEX = {
    "no map": (lambda raw: raw.pop("weight_map"), FormatError, "no valid weight_map"),
    "an empty map": (lambda raw: raw.update(weight_map={}), FormatError, "no valid weight_map"),
    "a number": (lambda raw: raw["weight_map"].update({GROUP: 3}), FormatError, "no valid weight_map"),
    "an empty list": (lambda raw: raw["weight_map"].update({GROUP: []}), FormatError, "no valid weight_map"),
    "a list of numbers": (lambda raw: raw["weight_map"].update({GROUP: [1]}), FormatError, "no valid weight_map"),
    "a missing group": (lambda raw: raw["weight_map"].pop(GROUP), FormatError, "but the index states otherwise"),
    "a group too many": (lambda raw: raw["weight_map"].update({"/x": ["model_00000.weights.h5"]}), FormatError, "x is in none of its files"),
    "another file": (lambda raw: raw["weight_map"].update({GROUP: ["model_00000.weights.h5"]}), FormatError, "but the index states otherwise"),
    "an absent file": (lambda raw: raw["weight_map"].update({GROUP: ["a.h5", "model_00001.weights.h5"]}), FormatError, "a.h5: no such file"),
    "another folder": (lambda raw: raw["weight_map"].update({GROUP: "../a.h5"}), UnsafeError, "not a file beside it"),
    "an absolute path": (lambda raw: raw["weight_map"].update({GROUP: "/etc/passwd"}), UnsafeError, "not a file beside it"),
    "itself": (lambda raw: raw["weight_map"].update({GROUP: [INDEX]}), FormatError, ""),
    "too many files": (lambda raw: raw["weight_map"].update({GROUP: [f"{i}.h5" for i in range(1001)]}), FormatError, "exceeds the limit of 1000"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INDEX)
def test_an_index_that_does_not_fit_its_files_is_refused(shards, case):
    change, error, words = BAD_INDEX[case]
    changed(shards / INDEX, change)
    with pytest.raises(error) as caught:
        open_checkpoint(shards)
    assert words in str(caught.value)


def test_a_tensor_in_two_files_is_refused(shards):
    name = "layers/layer_normalization/vars/0"
    with h5py.File(shards / "model_00000.weights.h5", "a") as file:
        file[name] = np.ones(6, np.float32)
    changed(shards / INDEX, lambda raw: raw["weight_map"][GROUP].insert(0, "model_00000.weights.h5"))
    with pytest.raises(FormatError, match="duplicate tensor"):
        open_checkpoint(shards)
