"""The contract of an exported ONNX model: its inputs and outputs with dtypes and shapes, and the keys of its metadata.

The names are those that optimum, onnxruntime-genai and transformers.js expect of a decoder with a KV cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from converters.spec import GPT2Config

from .precisions import DEFAULT, PRECISIONS
from .tasks import GENERATION, TASKS
from .tasks import LOGITS as LOGITS_OUTPUT

BATCH, NEW, PAST = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{PAST} + {NEW}"

# Kind of cache -> version of the contract.
CACHES = {
    "growing": "1",  # each run returns a longer cache; any padding works
    "inplace": "2",  # if past and present share a buffer, a run writes new keys and values into it; right padding only
    "inplace-int8": "2",  # the same with int8 keys and values, and a scale for each head and channel
}

OLD_WEIGHTS = "model.safetensors"  # the name of fp32 weights beside the model in exports of gpt2x 0.1.0

# Keys of metadata_props.
CONTRACT = "gpt2x.contract"
WRITER = "gpt2x.version"
CONFIG = "gpt2x.config"  # Hugging Face's config.json
SOURCE = "gpt2x.source"  # base name
CHECKSUMS = "gpt2x.source_sha256"  # base name of each file of weights -> SHA-256, as JSON
PRECISION = "gpt2x.precision"
CACHE = "gpt2x.cache"
LOGITS = "gpt2x.logits"
BLOCK = "gpt2x.block_size"  # how many weights share a scale, in precisions with a choice
ROUNDING = "gpt2x.rounding"  # of quantized precisions: "nearest", or "calibrated" on a text
PAIRS = "gpt2x.pair_sums"  # of integer products: the largest sum of two adjacent weights; up to 128, int16 holds it
LORA = "gpt2x.lora"  # the projections that adapters change, as a JSON list; left out if there are none
RUNTIME = "gpt2x.onnxruntime"  # the first version of ONNX Runtime that runs the model

TASK = "gpt2x.task"  # absent for text generation
OUTPUTS = "gpt2x.outputs"  # of text generation, separated by commas; absent if there are only logits
OF_TASKS = "3"  # the version of the contract of every other task: no cache; any padding works

# The first version of ONNX Runtime that has an opset, and that has the attention of a kind of cache. Precisions may
# need a later one. ``make test-versions`` measures them all.
OF_OPSET = {17: (1, 12), 18: (1, 14), 19: (1, 15), 20: (1, 17), 21: (1, 18), 22: (1, 21), 23: (1, 23)}
OF_CACHE = {"growing": (1, 17), "inplace": (1, 18), "inplace-int8": (1, 28)}  # 1.27 gives wrong results in a batch

OF_LORA = (1, 20)  # the first with LoraAdapter; before, a product over a rank of 0 is an error

# The first version of each client that loads a model with a kind of cache, in any precision.
CLIENTS = {
    "onnxruntime-genai": {"growing": "0.6.0", "inplace": "0.6.0", "inplace-int8": "0.6.0"},
    "optimum": {"growing": "1.25.0", "inplace": "2.0.0", "inplace-int8": "2.0.0"},
}
# transformers.js brings its own ONNX Runtime: the first version that a model needs -> the first transformers.js that loads it.
TRANSFORMERS_JS = {(1, 25): "4.3.0", (1, 22): "4.0.0", (0, 0): "3.4.2"}

ONNX_SUFFIX = ".onnx"
ADAPTER_SUFFIX = ".onnx_adapter"
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

VERSION = re.compile(r"\d{1,4}\.\d{1,4}\.\d{1,4}")


class Slot(NamedTuple):
    """The dtype (numpy's name) and shape of an input or output. A size is a number or a symbol."""

    dtype: str
    shape: tuple[int | str, ...]


def model_file(precision: str = DEFAULT) -> str:
    """The path of a precision's ONNX file in an exported directory."""
    return PRECISIONS[precision].model_file


def data_file(precision: str = DEFAULT) -> str:
    """The name of the file of weights beside it."""
    return PRECISIONS[precision].data_file


def lora_file(model: str) -> str:
    """The name of the graph beside a model that also has inputs for adapters: ``model_lora.onnx`` for ``model.onnx``.

    Both use the same file of weights.
    """
    return f"{model.removesuffix(ONNX_SUFFIX)}_lora{ONNX_SUFFIX}"


def inputs(config: GPT2Config, precision: str = DEFAULT, cache: str = "growing") -> dict[str, Slot]:
    """The model's inputs, in order."""
    past = Slot(cache_type(precision, cache), (BATCH, config.n_head, PAST, config.head_dim))
    return {
        "input_ids": Slot("int64", (BATCH, NEW)),
        "attention_mask": Slot("int64", (BATCH, TOTAL if cache == "growing" else "total_sequence_length")),
        "position_ids": Slot("int64", (BATCH, NEW)),
        **dict.fromkeys(past_names(config.n_layer), past),
    }


def outputs(
    config: GPT2Config,
    last: bool = False,
    precision: str = DEFAULT,
    cache: str = "growing",
    names: Sequence[str] = (LOGITS_OUTPUT,),
) -> dict[str, Slot]:
    """The model's outputs, in order.

    Args:
        names: the logits, and outputs of ``tasks.EXTRAS``, which come last.
    """
    total = TOTAL if cache == "growing" else "present_sequence_length"
    present = Slot(cache_type(precision, cache), (BATCH, config.n_head, total, config.head_dim))
    logits = Slot("float32", (BATCH, 1 if last else NEW, config.n_vocab))
    extras = {name: _extra(config, name, last) for name in names if name != LOGITS_OUTPUT}
    return {LOGITS_OUTPUT: logits, **dict.fromkeys(present_names(config.n_layer), present), **extras}


def _extra(config: GPT2Config, name: str, last: bool) -> Slot:
    places = (BATCH, 1 if last else NEW)
    return Slot("float32", (*places, config.n_embd) if name == "hidden_states" else places)


def outputs_in(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The outputs of text generation that a model's metadata name."""
    return tuple(metadata.get(OUTPUTS, LOGITS_OUTPUT).split(","))


def task_inputs() -> dict[str, Slot]:
    """The inputs of a model for a task other than text generation, in order."""
    return dict.fromkeys(("input_ids", "attention_mask"), Slot("int64", (BATCH, NEW)))


def task_outputs(task: str, config: GPT2Config, labels: int | str = "num_labels") -> dict[str, Slot]:
    """The outputs of a model for a task other than text generation, in order.

    Args:
        labels: the number of labels of a classifier, or a symbol.
    """
    assert task in TASKS and task != GENERATION
    if task == "feature-extraction":
        embedding = Slot("float32", (BATCH, config.n_embd))
        states = Slot("float32", (BATCH, NEW, config.n_embd))
        return {"last_hidden_state": states, "mean_embedding": embedding, "last_token_embedding": embedding}
    places: tuple[int | str, ...] = (BATCH,) if task == "text-classification" else (BATCH, NEW)
    return {LOGITS_OUTPUT: Slot("float32", (*places, labels))}


def factor_names(projection: str) -> tuple[str, str]:
    """The optional inputs with the factors A and B of an adapter, for a projection such as ``h.0.attn.c_attn``."""
    return f"{projection}.lora_A.weight", f"{projection}.lora_B.weight"


def factor_slots(config: GPT2Config, projections: Iterable[str]) -> dict[str, Slot]:
    """The optional inputs of these projections, in order: A is [in, rank], B is [rank, out], in every precision.

    Their default is of rank 0, which changes nothing. The rank may differ from projection to projection.
    """
    shapes = config.shapes()
    slots = {}
    for projection in projections:
        inputs, outputs = shapes[f"{projection}.weight"]
        a, b = factor_names(projection)
        rank = f"{projection}.rank"
        slots[a] = Slot("float32", (inputs, rank))
        slots[b] = Slot("float32", (rank, outputs))
    return slots


def has_int8_cache(cache: str) -> bool:
    """Whether a kind of cache holds 8-bit keys and values."""
    return cache == "inplace-int8"


def cache_type(precision: str, cache: str = "growing") -> str:
    """The dtype of keys and values."""
    return "int8" if has_int8_cache(cache) else PRECISIONS[precision].cache_dtype


def runtime_version(precision: str, cache: str, opset: int, *, lora: bool = False) -> str:
    """The first version of ONNX Runtime that runs a model; ``lora`` if it has optional inputs for adapters."""
    needed = [OF_OPSET[opset], OF_CACHE[cache], *PRECISIONS[precision].runtimes(cache, opset)]
    if lora:
        needed.append(OF_LORA)
    major, minor = max(needed)
    return f"{major}.{minor}.0"


def client_version(client: str, cache: str, runtime: str) -> str:
    """The first version of a client that loads a model.

    Args:
        client: one of ``CLIENTS``, or transformers.js.
        cache: the kind of the model's cache.
        runtime: the first version of ONNX Runtime that runs the model.
    """
    if client in CLIENTS:
        return CLIENTS[client][cache]
    needed = numbers(runtime)
    return next(version for first, version in TRANSFORMERS_JS.items() if needed >= first)


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, which can be compared."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def stays(cache: str) -> bool:
    """Whether a cache of this kind stays in place."""
    return CACHES.get(cache) == "2"


def past_names(n_layer: int) -> list[str]:
    """The inputs of the cache: key and value of each layer in turn."""
    return _cache_names("past_key_values", n_layer)


def present_names(n_layer: int) -> list[str]:
    """The outputs of the cache, in the order of ``past_names``."""
    return _cache_names("present", n_layer)


def _cache_names(start: str, n_layer: int) -> list[str]:
    names = []
    for i in range(n_layer):
        names += [f"{start}.{i}.key", f"{start}.{i}.value"]
    return names


def has_onnx(path: str | Path) -> bool:
    """Whether a path is an ONNX file, or a directory that holds one."""
    return Path(path).suffix == ".onnx" or bool(models_in(Path(path)))


def models_in(directory: Path) -> dict[str, Path]:
    """Precision -> ONNX file, for each model that a directory holds: in ``onnx/``, or else in the directory itself."""
    for folder in (directory / "onnx", directory):
        found = {}
        for name, precision in PRECISIONS.items():
            file = folder / f"model{precision.suffix}.onnx"
            if file.is_file():
                found[name] = file
        if found:
            return found
    return {}


def check_adapter_names(names: Iterable[str]) -> None:
    """Refuse names of adapters that cannot be those of files.

    Raises:
        ValueError: if one is no file name on every system, or two are the same there.
    """
    known: set[str] = set()
    for name in names:
        if not ADAPTER_NAME.fullmatch(name):
            raise ValueError(
                f"{name[:100]!r} cannot be the name of an adapter: up to 100 letters, digits, dots, hyphens and underscores, "
                "beginning with a letter or digit"
            )
        if name.casefold() in known:
            raise ValueError(f"two adapters are called {name}: capital letters make no other file name on every system")
        known.add(name.casefold())


def adapters_in(folder: Path) -> dict[str, Path]:
    """Name -> file of each adapter that a model's folder holds, in the order of names."""
    files = sorted(folder.glob(f"*{ADAPTER_SUFFIX}")) if folder.is_dir() else []
    return {file.stem: file for file in files if file.is_file()}


def adapters_of(path: Path) -> dict[str, Path]:
    """The same for an ONNX file, or for a directory that holds one."""
    if path.suffix == ".onnx":
        return adapters_in(path.parent)
    models = models_in(path)
    return adapters_in(next(iter(models.values())).parent) if models else {}
