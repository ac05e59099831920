"""The ONNX model's contract: every input and output with its type and shape, and the keys of its metadata.

These are the names that optimum, onnxruntime-genai and transformers.js expect of a decoder with a KV cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from converters.spec import GPT2Config

BATCH, NEW, PAST = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{PAST} + {NEW}"

VERSION = "1"  # left padding, right padding and holes in the mask are all right; the cache grows by concatenation
MODEL = "onnx/model.onnx"  # where it lies in its directory
PLACES = (MODEL, "model.onnx")  # where a directory is searched for it
WEIGHTS = "model.safetensors"  # beside it

# Keys of metadata_props.
CONTRACT = "gpt2x.contract"
WRITER = "gpt2x.version"
CONFIG = "gpt2x.config"  # Hugging Face's config.json
SOURCE = "gpt2x.source"  # base name
CHECKSUMS = "gpt2x.source_sha256"  # base name of each file of weights -> SHA-256, as JSON
PRECISION = "gpt2x.precision"
CACHE = "gpt2x.cache"
LOGITS = "gpt2x.logits"


class Slot(NamedTuple):
    """The type (numpy's name) and shape of an input or output; a size is a number or a symbol."""

    dtype: str
    shape: tuple[int | str, ...]


def inputs(config: GPT2Config) -> dict[str, Slot]:
    """What the model takes, in order."""
    cache = Slot("float32", (BATCH, config.n_head, PAST, config.head_dim))
    return {
        "input_ids": Slot("int64", (BATCH, NEW)),
        "attention_mask": Slot("int64", (BATCH, TOTAL)),
        "position_ids": Slot("int64", (BATCH, NEW)),
        **dict.fromkeys(past_names(config.n_layer), cache),
    }


def outputs(config: GPT2Config, last: bool = False) -> dict[str, Slot]:
    """What the model gives, in order."""
    cache = Slot("float32", (BATCH, config.n_head, TOTAL, config.head_dim))
    logits = Slot("float32", (BATCH, 1 if last else NEW, config.n_vocab))
    return {"logits": logits, **dict.fromkeys(present_names(config.n_layer), cache)}


def past_names(n_layer: int) -> list[str]:
    """The inputs that take the cache: key and value of each layer in turn."""
    return [f"past_key_values.{i}.{part}" for i in range(n_layer) for part in ("key", "value")]


def present_names(n_layer: int) -> list[str]:
    """The outputs that give the cache back, in the order of ``past_names``."""
    return [f"present.{i}.{part}" for i in range(n_layer) for part in ("key", "value")]


def has_onnx(path: str | Path) -> bool:
    """Whether a path is an ONNX file, or a directory with one."""
    path = Path(path)
    return path.suffix == ".onnx" or any((path / name).is_file() for name in PLACES)
