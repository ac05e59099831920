"""Hugging Face directories of small GPT-2 models, with the tokenizer files that people have."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

END = "<|endoftext|>"
MERGES = [("t", "h"), ("th", "e"), ("a", "n")]


@functools.cache
def vocabulary() -> dict[str, int]:
    """The 256 bytes, three merges and the end of text: 260 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(a + b for a, b in MERGES), END]
    return {token: i for i, token in enumerate(tokens)}


N = 260
CONFIG = {
    "bos_token": END,
    "eos_token": END,
    "unk_token": END,
    "add_prefix_space": False,
    "model_max_length": 1024,
    "tokenizer_class": "GPT2Tokenizer",
}


def pair(vocab: Mapping[str, int] | None = None) -> dict[str, Any]:
    """``vocab.json`` and ``merges.txt``."""
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES)
    return {"vocab.json": dict(vocab or vocabulary()), "merges.txt": merges}


def stated(content: str, **flags: bool) -> dict[str, Any]:
    """A token with all its flags, as Hugging Face's files have it."""
    unset = dict.fromkeys(("special", "normalized", "lstrip", "rstrip", "single_word"), False)
    return {"content": content, **unset, **flags}


def tokenizer_json(*added: dict[str, Any]) -> dict[str, Any]:
    """The ``tokenizer.json`` that the ``tokenizers`` library writes, with these added tokens, each with its ``id``."""
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocabulary()), merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw: dict[str, Any] = json.loads(tokenizer.to_str())
    return {**raw, "decoder": raw["pre_tokenizer"], "added_tokens": list(added)}


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    """Write files: bytes and text as they are, anything else as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def save_model(folder: Path, rows: int, end: int = N - 1) -> None:
    """Write a model with random weights with transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(6)
    sizes: dict[str, Any] = {"n_positions": 32, "n_embd": 4, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=rows, bos_token_id=end, eos_token_id=end, **sizes))
    model.save_pretrained(folder)


def logits_of(folder: Path, ids: list[int]) -> np.ndarray:
    """transformers' logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([ids])).logits.numpy()
    return logits


# ------------------------------------------------------------------------------------------------------ added tokens

TEXTS = (
    "the covid  remdesivir",
    "a<sep>b <sep> c",
    "an  <mask>  an",
    "covids covid, Covid anticovid covid",
    f"one{END}two {END} three",
    "<s>a [PAD] é<pad></s>",
    "newyork New York new york",
)
ENDS = {"id": N - 1, **stated(END, special=True)}
TOKENS = [stated("covid", normalized=True), stated("remdesivir", normalized=True), stated("<sep>", special=True)]
WORDS = [{"id": N + i, **token} for i, token in enumerate(TOKENS)]
TRAINED = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]

# What people have: the files of their tokenizer.
SITUATIONS: dict[str, dict[str, Any]] = {
    # llama.cpp#15842: tokenizer.add_tokens(["covid"]), as GPT2Tokenizer saved it from 2019 to 2023.
    "added_tokens.json": {
        **pair(),
        "added_tokens.json": {"covid": N, "remdesivir": N + 1, "<sep>": N + 2},
        "special_tokens_map.json": {"bos_token": END, "eos_token": END, "unk_token": END, "sep_token": "<sep>"},
        "tokenizer_config.json": {**CONFIG, "sep_token": "<sep>"},
    },
    # The same in a tokenizer.json.
    "tokenizer.json": {
        "tokenizer.json": tokenizer_json(ENDS, *WORDS),
        "tokenizer_config.json": {**CONFIG, "tokenizer_class": "PreTrainedTokenizerFast"},
    },
    "tokenizer.json alone": {"tokenizer.json": tokenizer_json(ENDS, *WORDS)},
    # llama.cpp#5838: tokens that only tokenizer_config.json states; transformers 4.34 and later, without a tokenizer.json.
    "added_tokens_decoder": {
        **pair(),
        "tokenizer_config.json": {
            **CONFIG,
            "added_tokens_decoder": {
                str(N - 1): stated(END, special=True, normalized=True),
                **{str(N + i): token for i, token in enumerate(TOKENS)},
            },
        },
    },
    # transformers, pull request 5287: <mask> takes the space before it, as in RoBERTa; with all other flags beside it.
    "all flags": {
        "tokenizer.json": tokenizer_json(
            ENDS,
            {"id": N, **stated("<mask>", special=True, lstrip=True)},
            {"id": N + 1, **stated("<sep>", rstrip=True)},
            {"id": N + 2, **stated("covid", single_word=True, normalized=True)},
            {"id": N + 3, **stated("New York", lstrip=True, rstrip=True)},
        ),
        "tokenizer_config.json": CONFIG,
    },
    # stefan-it/german-gpt2#3: special tokens that are in the trained vocabulary, here with roles.
    "in the vocabulary": {
        **pair(
            {**{token: i for i, token in enumerate(TRAINED)}, **{t: i + 5 for t, i in vocabulary().items() if t != END}}
        ),
        "special_tokens_map.json": {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "mask_token": stated("<mask>", lstrip=True, normalized=True),
        },
    },
    # transformers#9542: a padding token that has a name and no id, as the model was not resized.
    "a padding token without an id": {
        **pair(),
        "special_tokens_map.json": {"bos_token": END, "eos_token": END, "unk_token": END, "pad_token": "[PAD]"},
        "tokenizer_config.json": CONFIG,
    },
    # transformers#9246: added_tokens.json states ids that are in the vocabulary.
    "ids in the vocabulary": {
        **pair({**vocabulary(), "<pad>": N, "<mask>": N + 1}),
        "added_tokens.json": {"<pad>": N, "<mask>": N + 1},
        "special_tokens_map.json": {"pad_token": "<pad>", "mask_token": "<mask>"},
        "tokenizer_config.json": CONFIG,
    },
    # A merged fine-tune: the same token twice. The last flags count, as in tokenizers.
    "a token twice": {
        "tokenizer.json": tokenizer_json(ENDS, WORDS[0], {"id": N + 1, **stated("covid", special=True)}),
        "tokenizer_config.json": CONFIG,
    },
    # A role makes a token special that tokenizer.json calls ordinary (pad_token = "covid").
    "an ordinary token with a role": {
        "tokenizer.json": tokenizer_json(ENDS, *WORDS),
        "tokenizer_config.json": {**CONFIG, "pad_token": "covid"},
    },
}
