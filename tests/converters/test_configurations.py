"""config.json files as they are on the Hub: what transformers loads is loaded, and computes the same."""

import codecs
import json
import subprocess
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import TINY, arrays_of, random_checkpoint
from commands import assert_refused, done

from converters import ConfigError, FormatError, open_checkpoint
from converters.config import to_hf
from gpt2x.load import model_of

IDS = torch.arange(10)[None]


def directory(folder, *, drop: tuple[str, ...] = (), **changes):
    """A Hugging Face directory of a tiny model with a changed configuration."""
    folder.mkdir()
    raw = {key: value for key, value in to_hf(TINY).items() if key not in drop}
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))
    # not safetensors: gpt2x's own has a second configuration inside
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays_of(random_checkpoint()).items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def logits(checkpoint):
    with torch.no_grad():
        return model_of(checkpoint)(IDS)[0].numpy()


# What public repositories have beside the sizes.
REAL = {
    "gpt2 of 2019, with the settings of a task": {
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "summary_type": "cls_index", "summary_use_proj": True, "summary_activation": None,
    },
    "distilgpt2, of the first versions": {
        "_num_labels": 1, "output_past": True, "torchscript": False, "pruned_heads": {}, "use_bfloat16": False,
        "finetuning_task": None, "num_labels": 1, "is_decoder": True, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
        "xla_device": None, "n_special": 0, "predict_special_tokens": True,
    },
    "rinna/japanese-gpt2: the width of the feed-forward layer is stated": {
        "n_inner": 24, "_name_or_path": "rinna/japanese-gpt2-medium", "gradient_checkpointing": False, "use_cache": True,
    },
    "CDial-GPT (thu-coai/CDial-GPT issue 100): n_ctx is smaller than n_positions": {"n_ctx": 9},
    "transformers 2.3 to 4.9: n_ctx stays 1024": {"n_ctx": 1024},
    "a classifier": {
        "architectures": ["GPT2ForSequenceClassification"], "problem_type": "single_label_classification", "pad_token_id": 3,
    },
    "two heads": {"architectures": ["GPT2DoubleHeadsModel"]},
    "a trainer's own keys": {"wandb_run": "abc", "train_args": {"lr": 1e-3}, "attention_dropout": 0.1, "hidden_dropout": 0.1},
    "transformers 5's dtype, and several tokens that end a text": {"dtype": "float32", "eos_token_id": [12, 3]},
    "plain attention in the words of other models": {"num_key_value_heads": 2, "head_dim": 3, "hidden_act": "gelu_new"},
    "code for the tokenizer only": {"auto_map": {"AutoTokenizer": ["tokenization.Own", None]}},
    "cross-attention that is not in the file": {"add_cross_attention": True, "is_decoder": True},
    "cross-attention to an encoder of another width": {"add_cross_attention": True, "cross_attention_hidden_size": 4},
    "cross-attention, of no class": {"add_cross_attention": True, "architectures": None},
    "absolute positions": {"position_embedding_type": "absolute", "rotary_dim": None},
}  # fmt: skip


@pytest.mark.parametrize("changes", REAL.values(), ids=REAL)
def test_what_transformers_loads_is_loaded_and_gives_the_same_logits(tmp_path, changes):
    from transformers import GPT2LMHeadModel

    folder = directory(tmp_path / "hf", **changes)
    with torch.no_grad():
        theirs = GPT2LMHeadModel.from_pretrained(folder).eval()(IDS).logits.numpy()
    ours = logits(open_checkpoint(folder))
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_the_names_of_other_models_for_the_sizes_are_those_of_transformers(tmp_path):
    """GPT2Config.attribute_map."""
    folder = directory(
        tmp_path / "hf",
        drop=("n_embd", "n_layer", "n_head", "n_positions", "n_ctx"),
        hidden_size=6, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=10,
    )  # fmt: skip
    assert open_checkpoint(folder).config == TINY


@pytest.mark.parametrize("name", ["swish", "gelu_python", "gelu_accurate"])
def test_another_name_of_an_activation_is_the_same_function(tmp_path, name):
    """ACT2FN of transformers."""
    from transformers.activations import ACT2FN

    folder = directory(tmp_path / "hf", activation_function=name)
    ours = open_checkpoint(folder).config.activation_function
    x = torch.linspace(-4, 4, 101)
    assert torch.allclose(ACT2FN[ours](x), ACT2FN[name](x), atol=1e-6)


@pytest.mark.parametrize("n_ctx", [9, 1024])
def test_n_positions_decides_and_the_difference_is_said(tmp_path, n_ctx):
    read = open_checkpoint(directory(tmp_path / "hf", n_ctx=n_ctx))
    assert read.config.n_ctx == 10
    assert any(f"n_ctx is {n_ctx}, but n_positions is 10" in note for note in read.notes)


def test_a_byte_order_mark_is_refused_until_the_typed_command_removes_it(tmp_path):
    """transformers refuses it, too (JSONDecodeError)."""
    from transformers import GPT2LMHeadModel

    folder = directory(tmp_path / "a model's folder")
    config = folder / "config.json"
    config.write_bytes(codecs.BOM_UTF8 + config.read_bytes())
    with pytest.raises(OSError, match="valid JSON"):
        GPT2LMHeadModel.from_pretrained(folder)
    with pytest.raises(FormatError, match="a UTF-8 byte order mark before the JSON") as error:
        open_checkpoint(folder)
    subprocess.run(str(error.value).split("`")[1], shell=True, check=True)
    assert open_checkpoint(folder).config == TINY
    assert (folder / "config.json.bom").read_bytes().startswith(codecs.BOM_UTF8)


def test_keys_that_are_passed_over_are_named_in_one_note(tmp_path):
    read = open_checkpoint(directory(tmp_path / "hf", wandb_run="abc", seed=1))
    [note] = [note for note in read.notes if "ignored keys" in note]
    assert note.endswith("as transformers ignores them: wandb_run, seed")


ARITHMETIC: list[dict[str, Any]] = [
    {"quantization_config": {"bits": 4}},
    {"pruned_heads": {"0": [1]}},
    {"rotary_dim": 64},
    {"rope_theta": 10000.0},
    {"position_embedding_type": "rotary"},
    {"hidden_act": "relu"},
    {"layer_norm_eps": 1e-6},
    {"num_key_value_heads": 1},
    {"num_experts": 8},
    {"use_bias": False},
    {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}},
]


@pytest.mark.parametrize("changes", ARITHMETIC, ids=[next(iter(changes)) for changes in ARITHMETIC])
def test_a_key_that_changes_the_arithmetic_is_refused_even_where_the_class_is_stock(tmp_path, changes):
    folder = directory(tmp_path / "hf", **changes)
    [key] = changes
    with pytest.raises(ConfigError, match=f"{key} is .*it changes the arithmetic") as error:
        open_checkpoint(folder)
    assert f"pass --ignore-config-key {key}" in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [{"architectures": ["OwnGPT2"]}, {"architectures": None}, {"architectures": ["GPT2LMHeadModel", "OwnGPT2"]}],
)
def test_an_unknown_key_of_another_class_is_refused_until_the_typed_option_ignores_it(gpt2x, tmp_path, changes):
    folder = directory(tmp_path / "hf", own_switch=3, second_switch=True, **changes)
    refused = gpt2x("convert", folder, tmp_path / "m.safetensors")
    assert_refused(refused, "own_switch is unknown to gpt2x")
    options = refused.stderr.split(", pass ")[1].split()
    assert options == ["--ignore-config-key", "own_switch", "--ignore-config-key", "second_switch"]
    result = done(gpt2x("convert", folder, tmp_path / "m.safetensors", *options))
    assert "own_switch is ignored, as --ignore-config-key asks" in result.stdout
    assert np.array_equal(logits(open_checkpoint(tmp_path / "m.safetensors")), logits(random_checkpoint()))


@pytest.mark.parametrize(
    "command",
    [("inspect",), ("generate", "--max-new-tokens", "1"), ("verify",), ("export", "--no-tokenizer", "--no-verify")],
)
def test_the_option_is_there_wherever_weights_are_read(gpt2x, tmp_path, command):
    folder = directory(tmp_path / "hf", architectures=["OwnGPT2"], own_switch=3)
    name, *options = command
    words = {"generate": ["a"], "export": ["--pt2", tmp_path / "m.pt2"]}.get(name, [])
    refused = gpt2x(name, folder, *words, *options)
    let_pass = gpt2x(name, folder, *words, *options, "--ignore-config-key", "own_switch")
    assert "own_switch is unknown" not in let_pass.stderr
    if name != "generate":  # which misses a tokenizer first
        assert_refused(refused, "own_switch")


def test_a_vocabulary_that_grew_after_the_configuration_is_read_with_the_option_that_the_error_names(tmp_path):
    """``resize_token_embeddings``, and the configuration of the base copied over the new one."""
    directory(tmp_path / "m", vocab_size=TINY.n_vocab - 2)
    with pytest.raises(ConfigError, match=r"If the tensors are right, pass --ignore-config-key vocab_size$"):
        open_checkpoint(tmp_path / "m")
    assert open_checkpoint(tmp_path / "m", ignore_config_keys=["vocab_size"]).config.n_vocab == TINY.n_vocab


def test_a_model_type_of_its_own_is_read_with_the_option_that_the_error_names(tmp_path):
    directory(tmp_path / "m", model_type="gpt2-custom")
    with pytest.raises(ConfigError, match=r"pass --ignore-config-key model_type$"):
        open_checkpoint(tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m", ignore_config_keys=["model_type"])
    assert checkpoint.config.n_vocab == TINY.n_vocab
