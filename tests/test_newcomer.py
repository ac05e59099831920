"""Roads that people take: fine-tuned directories, wrapped models, half precision, pipes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.numpy
from checkpoints import arrays_of, assert_same_bytes, gentle, random_checkpoint
from commands import assert_refused, done

from converters import CheckpointError, open_checkpoint, save_checkpoint
from gpt2x import GPT2, SHAKESPEARE, Tokenizer, checkpoint_of, from_pretrained, load_model


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_a_file_of_any_number_format_is_verified_alone(gpt2x, dtype):
    save_checkpoint(gentle(), "m.safetensors")
    done(gpt2x("convert", "m.safetensors", "half", "--dtype", dtype))
    assert "against transformers" in done(gpt2x("verify", "half")).stdout


def fine_tuned():
    """A directory as transformers and its users leave one behind."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    save_checkpoint(open_checkpoint(SHAKESPEARE), "base")
    model, tokenizer = GPT2LMHeadModel.from_pretrained("base"), AutoTokenizer.from_pretrained("base")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.update(do_sample=True, temperature=0.7, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained("tuned")
    tokenizer.save_pretrained("tuned")
    Path("tuned/chat_template.jinja").write_text("{{ messages }}")
    Path("tuned/training_args.bin").write_bytes(b"not weights")


def test_a_fine_tuned_directory_keeps_what_belongs_to_it(gpt2x):
    fine_tuned()
    done(gpt2x("convert", "tuned", "out"))
    settings = json.loads(Path("out/generation_config.json").read_text())
    assert (settings["do_sample"], settings["temperature"], settings["pad_token_id"]) == (True, 0.7, 2048)
    assert json.loads(Path("out/config.json").read_text())["pad_token_id"] == 2048
    assert Path("out/chat_template.jinja").read_text() == "{{ messages }}"
    assert Tokenizer.from_pretrained("out").encode("ROMEO:[PAD]")[-1] == 2048
    done(gpt2x("verify", "tuned", "out"))


def test_added_tokens_that_openais_layout_cannot_mark_are_said(gpt2x):
    fine_tuned()
    assert (
        "OpenAI's code reads added tokens as plain text; gpt2x reads them from tokenizer_config.json: [PAD]"
        in done(gpt2x("convert", "tuned", "tf", "--to", "tf")).stdout
    )
    assert "added tokens" not in done(gpt2x("convert", SHAKESPEARE, "tf2", "--to", "tf")).stdout


def test_a_tuned_model_is_saved_with_its_tokenizer():
    save_checkpoint(checkpoint_of(from_pretrained(SHAKESPEARE), tokenizer=SHAKESPEARE), "tuned", "hf")
    assert Tokenizer.from_pretrained("tuned").encode("ROMEO:") == Tokenizer.from_pretrained(SHAKESPEARE).encode(
        "ROMEO:"
    )


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_what_torch_wraps_around_a_model_is_taken_off(tiny, wrapper, prefix):
    arrays = {f"{wrapper}{prefix}{name}": array for name, array in arrays_of(tiny).items()}
    arrays[f"{wrapper}lm_head.weight"] = arrays[f"{wrapper}{prefix}wte.weight"].copy()
    safetensors.numpy.save_file(arrays, "m.safetensors")
    assert_same_bytes(tiny, open_checkpoint("m.safetensors", n_head=2))


def test_weights_that_were_not_read_are_said(gpt2x):
    save_checkpoint(random_checkpoint(), "d")
    save_checkpoint(random_checkpoint(), "d/pytorch_model.bin")
    assert "d also holds pytorch_model.bin, which was not read" in done(gpt2x("inspect", "d")).stdout


def test_every_difference_of_a_wrong_model_is_listed():
    with pytest.raises(CheckpointError, match=r"n_vocab is 2048, not 50257\n.*\n.*n_embd is 192, not 768"):
        load_model(GPT2(50257, 768, 1, 12, 3072, 1024), SHAKESPEARE)


def test_a_wrong_path_is_blamed_not_the_tokenizer(gpt2x):
    assert_refused(gpt2x("generate", "nowhere", "ROMEO:"), "nowhere: no such file")
    assert_refused(
        gpt2x("generate", SHAKESPEARE, "ROMEO:", "--tokenizer", "nowhere"), "nowhere: no such file or directory"
    )


def test_an_empty_name_is_not_the_current_directory(gpt2x):
    save_checkpoint(random_checkpoint(), "pytorch_model.bin")
    assert_refused(gpt2x("convert", "", "out"), "the source path is empty")
    assert_refused(gpt2x("convert", SHAKESPEARE, ""), "the destination path is empty")


def test_a_suffix_is_known_in_any_case(gpt2x):
    done(gpt2x("convert", SHAKESPEARE, "X.SAFETENSORS"))
    assert Path("X.SAFETENSORS").is_file()
    assert_refused(gpt2x("convert", SHAKESPEARE, "model.ckpt"), "--to tf writes OpenAI's layout")


def test_a_report_is_replaced_where_the_user_says_so(gpt2x):
    save_checkpoint(random_checkpoint(), "a.safetensors")
    done(gpt2x("verify", "a.safetensors", "--json", "r.json"))
    assert_refused(gpt2x("verify", "a.safetensors", "--json", "r.json"), "already exists; pass --force to replace it")
    done(gpt2x("verify", "a.safetensors", "--json", "r.json", "--force"))


@pytest.mark.parametrize("option", [["--temperature", "nan"], ["--temperature", "inf"], ["--top-p", "nan"]])
def test_a_setting_that_is_no_number_is_wrong_usage(gpt2x, option):
    assert gpt2x("generate", SHAKESPEARE, "ROMEO:", *option).exit_code == 2


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m gpt2x inspect {SHAKESPEARE} --tensors | head -1"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    result = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
    assert result.stderr == ""
