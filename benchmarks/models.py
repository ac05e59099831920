"""The models of several benchmarks."""

from __future__ import annotations

import json
from itertools import islice, product
from pathlib import Path

import numpy as np

from converters import Checkpoint, GPT2Config, LazyTensor
from converters.tokenizer import TokenizerFiles, find_tokenizer

MERGES = 50_000  # of GPT-2's vocabulary
LETTERS = "ĠabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"  # Ġ is the space


def random_model(config: GPT2Config | None = None, tokenizer: TokenizerFiles | None = None) -> Checkpoint:
    """Return a model with random weights, by default of GPT-2 small's shape."""
    config = config or GPT2Config()
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in config.shapes().items():
        tensors[name] = LazyTensor.of(rng.standard_normal(shape, np.float32) * np.float32(0.02))
    return Checkpoint(config=config, tensors=tensors, tokenizer=tokenizer)


def tokenizer_in(folder: Path | None, work: Path) -> TokenizerFiles:
    """Return the tokenizer of a folder, or one of GPT-2's size that is written to ``work``."""
    if folder is None:
        folder = work / "tokenizer"
        write_tokenizer(folder)
    found = find_tokenizer(folder)
    if found is None:
        raise SystemExit(f"{folder}: no tokenizer")
    return found


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE with 50,257 tokens: all bytes, pairs of letters, and triples as far as they fit."""
    pairs = [(a, b) for a, b in product(LETTERS, repeat=2)]
    triples = ((a + b, c) for (a, b), c in product(pairs, LETTERS))
    merges = [*pairs, *islice(triples, MERGES - len(pairs))]
    words = [*byte_letters(), *(a + b for a, b in merges), "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    lines = [f"{a} {b}" for a, b in merges]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")


def byte_letters() -> list[str]:
    """Return GPT-2's letters for the 256 bytes, in the order of its vocabulary."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(shown)
    return [chr(code) for code in [*shown, *range(256, 256 + others)]]
