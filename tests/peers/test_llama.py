"""llama.cpp itself loads the GGUF that gpt2x writes, tokenizer and all. ``make test-llama`` builds it; it takes minutes."""

import json
import subprocess

import pytest
import torch
from client_programs import PROGRAMS
from commands import done
from paths import ROOT

from gpt2x import SHAKESPEARE, Tokenizer, from_pretrained

PYTHON = ROOT / ".venv-llama/bin/python"
CLIENT = PROGRAMS / "llama_client.py"
PROMPT = "ROMEO: But soft! what light through yonder window breaks?<|endoftext|>JULIET:"
COUNT = 64

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="llama-cpp-python is not here; make test-llama builds it")


def llama(path):
    command = [str(PYTHON), str(CLIENT), str(path), PROMPT, str(COUNT)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_llama_cpp_reads_added_tokens_as_transformers_does(tmp_path):
    """llama.cpp#15842, PR 8228: an ordinary added token is one token in any text, and is not dropped with the special ones.

    llama.cpp matches special tokens only if it is asked to, and shows them only then.
    """
    from tokenizer_folders import SITUATIONS, TEXTS, N, save_model, write
    from transformers import AutoTokenizer

    from converters import open_checkpoint, save_checkpoint

    for name in ("added_tokens.json", "tokenizer.json", "added_tokens_decoder", "an ordinary token with a role"):
        folder = write(tmp_path / name, SITUATIONS[name])
        save_model(folder, N + 3)
        save_checkpoint(open_checkpoint(folder), folder / "m.gguf")
        source = AutoTokenizer.from_pretrained(folder)
        command = [str(PYTHON), str(PROGRAMS / "llama_tokenizer_client.py"), str(folder / "m.gguf"), *TEXTS]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for text, (ids, shown, without_special) in zip(TEXTS, found, strict=True):
            assert ids == source.encode(text), (name, text)
            assert shown == source.decode(ids), (name, text)
            assert without_special == source.decode(ids, skip_special_tokens=True), (name, text)


@pytest.fixture(scope="module")
def expected():
    """The prompt's ids, and the greedy ids after it, of the from-scratch model."""
    model, ids = from_pretrained(SHAKESPEARE), Tokenizer.from_pretrained(SHAKESPEARE).encode(PROMPT)
    greedy: list[int] = []
    with torch.no_grad():
        for _ in range(COUNT):
            greedy.append(int(model(torch.tensor([ids + greedy]))[0][0, -1].argmax()))
    return ids, greedy


@pytest.mark.parametrize("options", [[], ["--dtype", "fp16"], ["--dtype", "bf16"]], ids=["fp32", "fp16", "bf16"])
def test_llama_cpp_gives_our_ids_and_our_greedy_tokens(gpt2x, tmp_path, expected, options):
    done(gpt2x("convert", SHAKESPEARE, tmp_path / "m.gguf", *options))
    found = llama(tmp_path / "m.gguf")
    assert found["prompt"] == expected[0]
    same = COUNT if not options else 16  # what is rounded may come to a near tie
    assert found["greedy"][:same] == expected[1][:same]
    assert found["text"] == Tokenizer.from_pretrained(SHAKESPEARE).decode(found["greedy"])


def test_llama_cpp_loads_q8_0(gpt2x, tmp_path, expected):
    done(gpt2x("convert", SHAKESPEARE, tmp_path / "m.gguf", "--dtype", "q8_0"))
    assert llama(tmp_path / "m.gguf")["greedy"][:8] == expected[1][:8]


def test_llama_cpp_loads_an_output_of_its_own(gpt2x, tmp_path):
    """output.weight, where the model is untied."""
    from dataclasses import replace

    from converters import LazyTensor, open_checkpoint, save_checkpoint

    tied = open_checkpoint(SHAKESPEARE)
    head = LazyTensor.of(-tied.tensors["wte.weight"].read())
    config = replace(tied.config, tie_word_embeddings=False)
    save_checkpoint(replace(tied, config=config, tensors={**tied.tensors, "lm_head.weight": head}), tmp_path / "m.gguf")
    ids = Tokenizer.from_pretrained(SHAKESPEARE).encode(PROMPT)
    with torch.no_grad():
        first = int(from_pretrained(tmp_path / "m.gguf")(torch.tensor([ids]))[0][0, -1].argmax())
    assert llama(tmp_path / "m.gguf")["greedy"][0] == first
