"""``--adapter``: a LoRA adapter, from its directory to merged weights, ONNX and text."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from adapters import write_adapter
from commands import assert_refused, done
from paths import FIXTURES

from converters import open_checkpoint, save_checkpoint
from gpt2x import SHAKESPEARE, OnnxDecoder

ADAPTERS = FIXTURES / "adapters"
BASE = ADAPTERS / "base"
EXPECTED = dict(np.load(ADAPTERS / "expected.npz"))
GREEDY = ["--max-new-tokens", 20, "--temperature", 0]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def lora(tmp_path):
    """An adapter of the model that ships with gpt2x."""
    return write_adapter(tmp_path / "lora", open_checkpoint(SHAKESPEARE), size=0.2)


def test_the_merged_weights_are_written_and_verified(gpt2x):
    result = done(gpt2x("convert", BASE, "out", "--adapter", ADAPTERS / "dora"))
    assert f"note: merged a LoRA adapter, {ADAPTERS / 'dora'}: 8 matrices of rank 4" in result.stdout
    report = done(gpt2x("verify", BASE, "out", "--adapter", ADAPTERS / "dora")).stdout
    assert f"{BASE / 'model.safetensors'} + {ADAPTERS / 'dora'} against out" in report
    assert "28 of 28 tensors bit-identical" in report
    assert gpt2x("verify", BASE, "out").exit_code == 1
    assert gpt2x("verify", BASE, "out", "--adapter", ADAPTERS / "c_attn").exit_code == 1


def test_transformers_loads_the_merged_model(gpt2x):
    import torch
    from transformers import GPT2LMHeadModel

    done(gpt2x("convert", BASE, "out", "--adapter", ADAPTERS / "saved_head"))
    with torch.no_grad():
        logits = GPT2LMHeadModel.from_pretrained("out")(torch.from_numpy(EXPECTED["ids"])).logits.numpy()
    expected = EXPECTED["saved_head_merged"]
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_another_dtype_is_the_merged_model_rounded_once(gpt2x, dtype):
    done(gpt2x("convert", BASE, "half", "--dtype", "fp16"))
    done(gpt2x("convert", "half", "out.safetensors", "--dtype", dtype, "--adapter", ADAPTERS / "all_linear"))
    options = ["--rounded", "--adapter", ADAPTERS / "all_linear"]
    assert "28 of 28 tensors bit-identical" in done(gpt2x("verify", "half", "out.safetensors", *options)).stdout


@pytest.mark.parametrize(("option", "expected"), [([], "embeddings_merged"), (["--untie"], "embeddings")])
def test_the_merged_model_is_exported_verified_and_compared_again(gpt2x, option, expected):
    options = ["--adapter", ADAPTERS / "embeddings", *option]
    done(gpt2x("export", BASE, "--onnx", "onnx-dir", "--no-tokenizer", *options))
    done(gpt2x("verify", BASE, "onnx-dir", *options))
    assert gpt2x("verify", BASE, "onnx-dir").exit_code == 1
    decoder = OnnxDecoder("onnx-dir")
    assert decoder.metadata["gpt2x.source"] == "model.safetensors + embeddings"
    checksums = json.loads(decoder.metadata["gpt2x.source_sha256"])
    assert set(checksums) == {"model.safetensors", "adapter_model.safetensors", "adapter_config.json"}
    positions = np.broadcast_to(np.arange(12), (2, 12))
    logits, _ = decoder.run(EXPECTED["ids"], np.ones((2, 12), np.int64), positions, None)
    assert np.abs(logits - EXPECTED[expected]).max() <= 1e-5 * np.abs(EXPECTED[expected]).max()


@pytest.mark.parametrize(("option", "expected"), [([], "lm_head_merged"), (["--untie"], "lm_head")])
def test_a_change_of_lm_head_is_merged_into_the_tied_matrix_or_with_untie_kept_apart(gpt2x, option, expected):
    import torch
    from transformers import GPT2LMHeadModel

    options = ["--adapter", ADAPTERS / "lm_head", *option]
    printed = done(gpt2x("convert", BASE, "out", *options)).stdout
    assert ("the model with its adapter computes something else" in printed) == (not option)
    done(gpt2x("verify", BASE, "out", *options))
    with torch.no_grad():
        logits = GPT2LMHeadModel.from_pretrained("out")(torch.from_numpy(EXPECTED["ids"])).logits.numpy()
    assert np.abs(logits - EXPECTED[expected]).max() <= 1e-5 * np.abs(EXPECTED[expected]).max()


def test_a_format_without_an_untied_lm_head_holds_the_merged_matrix(gpt2x):
    options = ["--to", "llmc", "--adapter", ADAPTERS / "lm_head"]
    done(gpt2x("convert", BASE, "out.bin", *options))
    assert gpt2x("convert", BASE, "apart.bin", *options, "--untie").exit_code == 1


def test_the_text_is_that_of_the_conversion_with_the_same_option(gpt2x, lora):
    tensors = safetensors.numpy.load_file(lora / "adapter_model.safetensors")
    rows, columns = open_checkpoint(SHAKESPEARE).tensors["wte.weight"].shape
    rng = np.random.default_rng(3)
    for part, shape in (("A", (4, columns)), ("B", (rows, 4))):
        tensors[f"base_model.model.lm_head.lora_{part}.weight"] = rng.normal(0, 0.2, shape).astype(np.float32)
    safetensors.numpy.save_file(tensors, lora / "adapter_model.safetensors")
    texts = []
    for option in ([], ["--untie"]):
        done(gpt2x("convert", SHAKESPEARE, f"tuned{option}", "--adapter", lora, *option))
        text = done(gpt2x("generate", SHAKESPEARE, "ROMEO:", *GREEDY, "--adapter", lora, *option)).stdout
        assert done(gpt2x("generate", f"tuned{option}", "ROMEO:", *GREEDY)).stdout == text
        texts.append(text)
    assert texts[0] != texts[1]


def test_the_merged_model_alone_is_compared_with_transformers(gpt2x):
    assert done(gpt2x("verify", BASE, "--adapter", ADAPTERS / "lm_head")).stdout.endswith("The same.\n")


def test_the_export_does_not_join_the_models_of_the_base(gpt2x):
    shutil.copytree(BASE, "base")
    done(gpt2x("export", "base", "--onnx", "base", "--no-tokenizer"))
    options = ["--no-tokenizer", "--precision", "fp16", "--adapter", ADAPTERS / "c_attn"]
    assert_refused(gpt2x("export", "base", "--onnx", "base", *options), "its source is another")


def test_the_text_is_that_of_the_merged_model(gpt2x, lora):
    done(gpt2x("convert", SHAKESPEARE, "tuned", "--adapter", lora))
    expected = done(gpt2x("generate", "tuned", "ROMEO:", *GREEDY)).stdout
    assert done(gpt2x("generate", SHAKESPEARE, "ROMEO:", *GREEDY, "--adapter", lora)).stdout == expected
    assert done(gpt2x("generate", SHAKESPEARE, "ROMEO:", *GREEDY)).stdout != expected


def test_the_tokenizer_of_the_adapter_is_used(gpt2x, lora):
    save_checkpoint(open_checkpoint(SHAKESPEARE), "alone.safetensors")
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(SHAKESPEARE / name, lora)
    done(gpt2x("generate", "alone.safetensors", "ROMEO:", *GREEDY, "--adapter", lora))
    done(gpt2x("convert", "alone.safetensors", "tuned", "--adapter", lora))
    done(gpt2x("generate", "tuned", "ROMEO:", *GREEDY))


def test_an_adapter_is_described(gpt2x):
    text = done(gpt2x("inspect", ADAPTERS / "patterns")).stdout
    assert "PEFT LORA: 8 matrices of rank 2, 4, 6" in text
    assert "me/tiny" in text
    assert "h.0.mlp.c_proj.weight, rank 2, scale 16" in text
    facts = json.loads(done(gpt2x("inspect", ADAPTERS / "patterns", "--json")).stdout)
    assert facts["changes"]["h.1.attn.c_attn.weight"] == {"rank": 6, "scale": 5 / 6}


def test_an_adapter_that_is_not_lora_is_described(gpt2x):
    shutil.copytree(ADAPTERS / "c_attn", "prefix")
    config = json.loads((ADAPTERS / "c_attn" / "adapter_config.json").read_text())
    with open("prefix/adapter_config.json", "w") as file:
        json.dump({**config, "peft_type": "PREFIX_TUNING"}, file)
    assert "PEFT PREFIX_TUNING: It cannot be merged" in done(gpt2x("inspect", "prefix")).stdout


def test_a_merged_model_is_described(gpt2x):
    text = done(gpt2x("inspect", BASE, "--adapter", ADAPTERS / "saved_head")).stdout
    assert "tie_word_embeddings false" in text
    assert "merged a LoRA adapter" in text


@pytest.mark.parametrize("command", [["convert", ADAPTERS / "c_attn", "out"], ["generate", ADAPTERS / "c_attn", "hi"]])
def test_an_adapter_without_its_base_says_what_to_type(gpt2x, command):
    assert_refused(gpt2x(*command), "a LoRA adapter", "gpt2x convert hf://me/tiny OUT --adapter")


def test_an_adapter_of_another_base_leaves_nothing(gpt2x, tmp_path, lora):
    assert_refused(gpt2x("convert", BASE, "out", "--adapter", lora), "does not fit")
    assert {path.name for path in tmp_path.iterdir()} == {"lora"}


def test_an_onnx_model_takes_no_adapter(gpt2x):
    done(gpt2x("export", BASE, "--onnx", "onnx-dir", "--no-tokenizer", "--no-verify"))
    options = ["--adapter", ADAPTERS / "c_attn"]
    for precision in (["--runtime", "onnx"], ["--precision", "fp32"]):
        refused = gpt2x("generate", "onnx-dir", "hi", "--tokenizer", SHAKESPEARE, *precision, *options)
        assert_refused(refused, "an adapter is merged into weights, and this would be run as ONNX")
    assert_refused(gpt2x("verify", "onnx-dir/onnx/model.onnx", BASE, *options), "and this is ONNX")
