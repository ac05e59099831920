"""The ONNX model's contract: every input and output with its type and shape, and the keys of its metadata.

These are the names that optimum, onnxruntime-genai and transformers.js expect of a decoder with a KV cache.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from converters.spec import GPT2Config

BATCH, NEW, PAST = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{PAST} + {NEW}"

# What a model does with its cache -> the version of its contract.
CACHES = {
    "growing": "1",  # each run returns a longer one; left padding, right padding and holes in the mask are all right
    "inplace": "2",  # new keys and values go where the cache lies, if past and present are one buffer; right padding only
    "inplace-int8": "2",  # and are 8-bit numbers there, with a scale for each head and channel
}

# Precision -> what transformers.js puts behind "model" for it.
SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_quantized", "w8a8": "_int8", "int4": "_q4"}
OLD_WEIGHTS = "model.safetensors"  # of fp32, beside the model, in directories that gpt2x 0.1.0 wrote

# Keys of metadata_props.
CONTRACT = "gpt2x.contract"
WRITER = "gpt2x.version"
CONFIG = "gpt2x.config"  # Hugging Face's config.json
SOURCE = "gpt2x.source"  # base name
CHECKSUMS = "gpt2x.source_sha256"  # base name of each file of weights -> SHA-256, as JSON
PRECISION = "gpt2x.precision"
CACHE = "gpt2x.cache"
LOGITS = "gpt2x.logits"
BLOCK = "gpt2x.block_size"  # how many weights of int8 and int4 share a scale
ROUNDING = "gpt2x.rounding"  # of int8, w8a8 and int4: "nearest", or "calibrated" on a text
PAIRS = "gpt2x.pair_sums"  # of w8a8: the largest sum of two neighbouring weights; 128 needs no more than 16 bits
RUNTIME = "gpt2x.onnxruntime"  # the first version of ONNX Runtime that runs the model


# The first version of ONNX Runtime that has an opset; that runs blocks of weights (int8, int4); that has the attention of
# a kind of cache, and of its fp16; and whose QuantizeLinear (w8a8) knows opset 23. ``make test-versions`` tries them all.
OF_OPSET = {17: (1, 12), 18: (1, 14), 19: (1, 15), 20: (1, 17), 21: (1, 18), 22: (1, 21), 23: (1, 23)}
OF_BLOCKS = (1, 19)
OF_CACHE = {"growing": (1, 17), "inplace": (1, 18), "inplace-int8": (1, 28)}  # 1.27 gives wrong rows in a batch
OF_FP16_INPLACE_INT8 = (1, 29)
OF_W8A8_OPSET_23 = (1, 24)

# The first version of each client that loads a model with a cache of each kind, whatever its precision.
CLIENTS = {
    "onnxruntime-genai": {"growing": "0.6.0", "inplace": "0.6.0", "inplace-int8": "0.6.0"},
    "optimum": {"growing": "1.25.0", "inplace": "2.0.0", "inplace-int8": "2.0.0"},
    "transformers.js": {"growing": "3.4.2", "inplace": "3.4.2", "inplace-int8": "4.3.0"},
}


VERSION = re.compile(r"\d{1,4}\.\d{1,4}\.\d{1,4}")


class Slot(NamedTuple):
    """The type (numpy's name) and shape of an input or output; a size is a number or a symbol."""

    dtype: str
    shape: tuple[int | str, ...]


def model_file(precision: str) -> str:
    """Where the ONNX file of a precision lies in its directory."""
    return f"onnx/model{SUFFIXES[precision]}.onnx"


def data_file(precision: str) -> str:
    """The name of the file of weights beside it: the only one that optimum and transformers.js fetch from a Hub."""
    return f"model{SUFFIXES[precision]}.onnx_data"


def inputs(config: GPT2Config, precision: str = "fp32", cache: str = "growing") -> dict[str, Slot]:
    """What the model takes, in order."""
    past = Slot(cache_type(precision, cache), (BATCH, config.n_head, PAST, config.head_dim))
    return {
        "input_ids": Slot("int64", (BATCH, NEW)),
        "attention_mask": Slot("int64", (BATCH, TOTAL if cache == "growing" else "total_sequence_length")),
        "position_ids": Slot("int64", (BATCH, NEW)),
        **dict.fromkeys(past_names(config.n_layer), past),
    }


def outputs(config: GPT2Config, last: bool = False, precision: str = "fp32", cache: str = "growing") -> dict[str, Slot]:
    """What the model gives, in order."""
    total = TOTAL if cache == "growing" else "present_sequence_length"
    present = Slot(cache_type(precision, cache), (BATCH, config.n_head, total, config.head_dim))
    logits = Slot("float32", (BATCH, 1 if last else NEW, config.n_vocab))
    return {"logits": logits, **dict.fromkeys(present_names(config.n_layer), present)}


def cache_type(precision: str, cache: str = "growing") -> str:
    """The type of the cache's numbers."""
    return "int8" if cache == "inplace-int8" else "float16" if precision == "fp16" else "float32"


def runtime_version(precision: str, cache: str, opset: int) -> str:
    """The first version of ONNX Runtime that runs a model."""
    needed = [OF_OPSET[opset], OF_CACHE[cache]]
    if precision in ("int8", "int4") and opset >= 21:
        needed.append(OF_BLOCKS)
    if (precision, cache) == ("fp16", "inplace-int8"):
        needed.append(OF_FP16_INPLACE_INT8)
    if precision == "w8a8" and opset >= 23:
        needed.append(OF_W8A8_OPSET_23)
    major, minor = max(needed)
    return f"{major}.{minor}.0"


def stays(cache: str) -> bool:
    """Whether a cache of this kind stays in place."""
    return CACHES.get(cache) == "2"


def past_names(n_layer: int) -> list[str]:
    """The inputs that take the cache: key and value of each layer in turn."""
    return [f"past_key_values.{i}.{part}" for i in range(n_layer) for part in ("key", "value")]


def present_names(n_layer: int) -> list[str]:
    """The outputs that give the cache back, in the order of ``past_names``."""
    return [f"present.{i}.{part}" for i in range(n_layer) for part in ("key", "value")]


def has_onnx(path: str | Path) -> bool:
    """Whether a path is an ONNX file, or a directory with one."""
    return Path(path).suffix == ".onnx" or bool(models_in(Path(path)))


def models_in(directory: Path) -> dict[str, Path]:
    """Precision -> the ONNX file, of all that a directory holds; in ``onnx/``, or else in itself."""
    for folder in (directory / "onnx", directory):
        files = {precision: folder / f"model{suffix}.onnx" for precision, suffix in SUFFIXES.items()}
        if found := {precision: file for precision, file in files.items() if file.is_file()}:
            return found
    return {}
