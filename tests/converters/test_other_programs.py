"""Files of programs that are GPT-2 under other names: the logits are those that the program itself computed.

``tests/fixtures/make_others.py`` made the files and the logits with the programs' own code.
"""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoints import TINY, assert_same_bytes, random_checkpoint
from commands import assert_refused, done
from paths import FIXTURES

from converters import CheckpointError, ConfigError, open_checkpoint, save_checkpoint
from converters.config import to_hf
from converters.dialects import FLASH_ATTN, HF, LLMS_FROM_SCRATCH
from gpt2x.load import model_of

# folder of the fixture, its file, its dialect, whether the file states the number of heads
PROGRAMS = [
    ("llms_from_scratch", "model.pth", "llms-from-scratch", False),
    ("llms_from_scratch_no_qkv_bias", "model.pth", "llms-from-scratch", False),
    ("mingpt", "model.pt", "mingpt", False),
    ("mingpt_2020", "model.pt", "mingpt-2020", False),
    ("build_nanogpt", "model_19072.pt", "build-nanogpt", True),
]
programs = pytest.mark.parametrize(
    ("folder", "file", "dialect", "states_heads"), PROGRAMS, ids=[p[0] for p in PROGRAMS]
)


def logits(checkpoint, ids):
    with torch.no_grad():
        return model_of(checkpoint)(torch.from_numpy(ids))[0].numpy()


@programs
def test_a_file_of_another_program_gives_the_logits_of_that_program(folder, file, dialect, states_heads):
    expected = np.load(FIXTURES / folder / "expected.npz")
    checkpoint = open_checkpoint(FIXTURES / folder / file, n_head=None if states_heads else 2)
    assert checkpoint.dialect == dialect
    found = logits(checkpoint, expected["ids"])
    assert np.abs(found - expected["logits"]).max() < 1e-5 * np.abs(expected["logits"]).max()


@programs
def test_it_gives_them_in_transformers_after_a_conversion(folder, file, dialect, states_heads, tmp_path):
    from transformers import GPT2LMHeadModel

    expected = np.load(FIXTURES / folder / "expected.npz")
    save_checkpoint(open_checkpoint(FIXTURES / folder / file, n_head=None if states_heads else 2), tmp_path / "hf")
    with torch.no_grad():
        found = (
            GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()(torch.from_numpy(expected["ids"])).logits.numpy()
        )
    assert np.abs(found - expected["logits"]).max() < 1e-5 * np.abs(expected["logits"]).max()


@programs
def test_inspect_names_the_program(gpt2x, folder, file, dialect, states_heads):
    result = done(gpt2x("inspect", FIXTURES / folder / file))
    assert f"dialect {dialect}" in result.stdout


def test_the_activation_of_build_nanogpt_is_the_tanh_form_and_can_be_overruled():
    """karpathy/build-nanogpt, train_gpt2.py: nn.GELU(approximate='tanh')."""
    path = FIXTURES / "build_nanogpt/model_19072.pt"
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.activation_function == "gelu_new"
    assert "activation_function is gelu_new, as in build-nanogpt's code" in checkpoint.notes
    assert open_checkpoint(path, activation_function="gelu").config.activation_function == "gelu"


def test_a_nanogpt_file_says_which_activation_is_assumed_and_how_to_change_it(gpt2x, tmp_path):
    """karpathy/nanoGPT, pull request 274 (June 2023): nn.GELU in place of the tanh form."""
    path = FIXTURES / "nanogpt/ckpt.pt"
    assert open_checkpoint(path).config.activation_function == "gelu"
    result = done(gpt2x("convert", path, tmp_path / "m.safetensors"))
    assert "pass --activation-function gelu_new" in result.stdout
    changed = done(gpt2x("convert", path, tmp_path / "new.safetensors", "--activation-function", "gelu_new"))
    assert "--activation-function" not in changed.stdout
    assert open_checkpoint(tmp_path / "new.safetensors").config.activation_function == "gelu_new"


def test_a_config_object_with_a_field_that_gptconfig_does_not_have_is_refused_until_it_is_ignored(tmp_path):
    saved = torch.load(FIXTURES / "build_nanogpt/model_19072.pt", weights_only=True)
    saved["config"]["n_experts"] = 4
    torch.save(saved, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="--ignore-config-key n_experts"):
        open_checkpoint(tmp_path / "model.pt")
    assert open_checkpoint(tmp_path / "model.pt", ignore_config_keys=["n_experts"]).config.n_head == 2


def test_a_config_with_dropout_and_bias_is_nanogpts_and_states_the_heads(tmp_path):
    """Forks of nanoGPT save their GPTConfig under ``config``; the activation is then nanoGPT's."""
    saved = torch.load(FIXTURES / "build_nanogpt/model_19072.pt", weights_only=True)
    saved["config"] |= {"dropout": 0.2, "bias": True}
    torch.save(saved, tmp_path / "model.pt")
    read = open_checkpoint(tmp_path / "model.pt")
    assert (read.dialect, read.config.n_head, read.config.activation_function) == ("nanogpt", 2, "gelu")


def test_an_untied_head_in_nanogpts_names_without_masks_is_not_taken_for_mingpts(tmp_path):
    state = torch.load(FIXTURES / "mingpt/model.pt", weights_only=True)
    torch.save(
        {name: tensor for name, tensor in state.items() if not name.endswith(".attn.bias")}, tmp_path / "model.pt"
    )
    with pytest.raises(CheckpointError, match="untied lm_head") as error:
        open_checkpoint(tmp_path / "model.pt", n_head=2)
    keep, drop = (str(error.value).index(word) for word in ("--untie", "--tie"))
    assert keep < drop


def test_the_book_wraps_its_state_dict_with_the_optimizers(tmp_path):
    """rasbt/LLMs-from-scratch, ch05.ipynb: model_and_optimizer.pth."""
    state = torch.load(FIXTURES / "llms_from_scratch/model.pth", weights_only=True)
    torch.save({"model_state_dict": state, "optimizer_state_dict": {"state": {}}}, tmp_path / "model_and_optimizer.pth")
    read = open_checkpoint(tmp_path / "model_and_optimizer.pth", n_head=2)
    assert_same_bytes(open_checkpoint(FIXTURES / "tf_plain"), read)


def test_a_book_model_in_safetensors_is_read_too(tmp_path):
    """The author publishes the weights on the Hub as safetensors as well."""
    state = torch.load(FIXTURES / "llms_from_scratch/model.pth", weights_only=True)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    read = open_checkpoint(tmp_path / "model.safetensors", n_head=2)
    assert (read.dialect, read.config.activation_function) == ("llms-from-scratch", "gelu_new")
    assert_same_bytes(open_checkpoint(FIXTURES / "tf_plain"), read)


def test_a_gpt2_trained_with_flash_attention_goes_back_to_hugging_faces_layout(tmp_path):
    """Dao-AILab/flash-attention, issue 460. The names are those of remap_state_dict_hf_gpt2."""
    tiny = random_checkpoint()
    written = FLASH_ATTN.write(tiny.tensors, tiny.config)
    assert written["transformer.layers.1.mixer.Wqkv.weight"].shape == (18, 6)
    tensors = {name: torch.from_numpy(tensor.read().copy()) for name, tensor in written.items()}
    tensors["lm_head.weight"] = tensors["transformer.embeddings.word_embeddings.weight"]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    read = open_checkpoint(tmp_path / "pytorch_model.bin", n_head=2)
    assert read.dialect == "flash-attn"
    assert_same_bytes(tiny, read)


@pytest.mark.parametrize(("weight", "bias"), [("g", "b"), ("gamma", "beta")])
def test_the_old_names_of_norms_are_read(tmp_path, weight, bias):
    """huggingface/transformers 4, modeling_utils.py (gamma, beta); pytorch-pretrained-bert, modeling_gpt2.py (g, b, w)."""
    tiny = random_checkpoint()
    tensors = {}
    for name, tensor in HF.write(tiny.tensors, tiny.config).items():
        is_norm = ".ln_" in f".{name}"
        stem, end = name.rsplit(".", 1)
        old = {"weight": weight, "bias": bias}[end] if is_norm else end
        tensors[f"transformer.{stem}.{old}"] = torch.from_numpy(tensor.read().copy())
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(to_hf(TINY)))
    read = open_checkpoint(tmp_path)
    assert_same_bytes(tiny, read)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("language_model.transformer.layers.0.attention.query_key_value.weight", "Megatron-LM"),
        ("blocks.0.attn.W_Q", "TransformerLens"),
        ("blocks.0.sa.heads.0.key.weight", "Let's build GPT"),
    ],
)
def test_a_relative_of_gpt2_that_is_not_read_is_named(tmp_path, name, words):
    """huggingface/transformers, issue 12004 (Megatron-LM's logits differ: its parameters are interleaved)."""
    torch.save({name: torch.zeros(2, 3)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / "model.pt")


def test_llmc_cuts_the_padded_vocabulary_to_the_one_in_its_header():
    """karpathy/llm.c, train_gpt2.py, pad_vocab and write_model: 50257 rows are padded to 50304."""
    assert open_checkpoint(FIXTURES / "llmc/gpt2.bin").tensors["wte.weight"].shape == (13, 6)


def test_a_dialect_that_is_read_only_in_parts_streams_to_gguf_without_a_transpose(tmp_path, monkeypatch):
    shutil.copy(FIXTURES / "llms_from_scratch/model.pth", tmp_path / "model.pth")
    opened = open_checkpoint(tmp_path / "model.pth", n_head=2)
    monkeypatch.setattr("converters.arrays.columns_of", None)
    save_checkpoint(opened, tmp_path / "m.gguf")
    assert LLMS_FROM_SCRATCH.names("h.0.attn.c_attn.weight")[0] == "trf_blocks.0.att.W_query.weight"


def test_the_heads_of_a_file_without_a_configuration_are_asked_for(gpt2x, tmp_path):
    result = gpt2x("convert", FIXTURES / "mingpt/model.pt", tmp_path / "hf")
    assert_refused(result, "--n-head")
