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
