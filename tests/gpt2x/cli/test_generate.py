"""``gpt2x generate`` and ``gpt2x demo`` as users run them."""

import shutil
from pathlib import Path

import pytest
from commands import assert_refused, done

from converters import open_checkpoint, save_checkpoint
from gpt2x import SHAKESPEARE, Tokenizer, from_pretrained, generate_text


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_text_is_that_of_the_library(gpt2x):
    options = ["--max-new-tokens", "30", "--temperature", "0.8", "--top-k", "40", "--top-p", "0.9", "--seed", "7"]
    text = done(gpt2x("generate", SHAKESPEARE, "ROMEO:", *options)).stdout
    model, tokenizer = from_pretrained(SHAKESPEARE), Tokenizer.from_pretrained(SHAKESPEARE)
    assert text == generate_text(model, tokenizer, "ROMEO:", 30, 0.8, 40, 0.9, seed=7) + "\n"


@pytest.mark.parametrize("target", ["m.safetensors", "m.bin", "hf", "tf"])
def test_every_format_says_the_same_words(gpt2x, target):
    save_checkpoint(open_checkpoint(SHAKESPEARE), target, "tf" if target == "tf" else None)
    options = ["--max-new-tokens", 40, "--temperature", 0, "--tokenizer", SHAKESPEARE]
    expected = done(gpt2x("generate", SHAKESPEARE, "JULIET:", *options)).stdout
    assert done(gpt2x("generate", target, "JULIET:", *options)).stdout == expected


def test_a_missing_tokenizer_names_the_option(gpt2x):
    save_checkpoint(open_checkpoint(SHAKESPEARE), "m.safetensors")
    assert_refused(
        gpt2x("generate", "m.safetensors", "ROMEO:"),
        "m.safetensors: no tokenizer in it or beside it",
        "--tokenizer DIR",
    )


def test_a_full_context_is_said_on_stderr_and_nowhere_else(gpt2x):
    result = done(gpt2x("generate", SHAKESPEARE, "ROMEO:", "--max-new-tokens", 300, "--seed", 1))
    assert result.stderr == "Stopped: the context of 256 tokens is full.\n"
    assert "Stopped" not in result.stdout
    assert done(gpt2x("generate", SHAKESPEARE, "ROMEO:", "--max-new-tokens", 3, "--seed", 1)).stderr == ""


def test_a_prompt_longer_than_the_context_is_refused(gpt2x):
    assert_refused(gpt2x("generate", SHAKESPEARE, "O " * 600), "the model's context is 256")


def test_an_empty_prompt_is_refused(gpt2x):
    assert_refused(gpt2x("generate", SHAKESPEARE, ""), "the prompt is empty")


def test_the_tokenizer_of_another_model_is_refused(gpt2x):
    shutil.copytree(SHAKESPEARE, "other")
    vocab = Path("other/encoder.json").read_text().replace(": 2047}", ": 50256}")
    Path("other/encoder.json").write_text(vocab)
    assert_refused(
        gpt2x("generate", SHAKESPEARE, "<|endoftext|>", "--tokenizer", "other"), "outside the model's vocabulary"
    )


@pytest.mark.parametrize("option", [["--temperature", -1], ["--top-p", 2], ["--top-k", -1], ["--max-new-tokens", "x"]])
def test_an_option_that_means_nothing_is_wrong_usage(gpt2x, option):
    assert gpt2x("generate", SHAKESPEARE, "ROMEO:", *option).exit_code == 2


def test_without_torch_the_line_to_type_is_named(gpt2x, monkeypatch):
    import sys

    for name in [n for n in sys.modules if n.startswith("gpt2x.load") or n.startswith("gpt2x.runtimes.torch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_refused(gpt2x("generate", SHAKESPEARE, "ROMEO:"), "this needs torch: pip install 'gpt2x[torch]'")


def test_the_demo_walks_the_main_road_and_leaves_nothing_behind(gpt2x):
    result = done(gpt2x("demo"))
    for line in (
        "$ gpt2x convert",
        "52 checksums verified",
        "52 of 52 tensors bit-identical",
        "200 of 200 tokens the same",
        "ROMEO:",
    ):
        assert line in result.stdout
    assert list(Path().iterdir()) == []
