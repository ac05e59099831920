"""llm.c's ``.bin``: a header of 256 integers, then every array of the model, each for all layers.

Source: karpathy/llm.c, ``gpt2_build_from_checkpoint`` and ``fill_in_parameter_sizes`` of ``train_gpt2.c``, and
``write_model`` of ``train_gpt2.py``. Rows of the token embedding after the vocabulary are padding, which llm.c
excludes from its softmax.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import FormatError, truncated
from ..io.publishing import Output
from ..io.reading import File
from ..tensors import BF16, F32, DType, LazyTensor
from .container import Container

MAGIC = 20240326
HEADER = struct.Struct("<256i")
VERSIONS = {3: F32, 5: BF16}  # 1 and 2 came before the padded vocabulary
FIELDS = ("max_seq_len", "vocab_size", "num_layers", "num_heads", "channels", "padded_vocab_size")
MAX_LAYERS = 1000  # the largest of llm.c's models has 48
MULTIPLE = 128  # what llm.c pads the vocabulary to

# Array -> shape of one layer in symbols; V is the padded vocabulary. In the order of the file.
ARRAYS: dict[str, tuple[str, ...]] = {
    "wte": ("V", "C"),
    "wpe": ("T", "C"),
    "ln1w.{i}": ("C",),
    "ln1b.{i}": ("C",),
    "qkvw.{i}": ("3C", "C"),
    "qkvb.{i}": ("3C",),
    "attprojw.{i}": ("C", "C"),
    "attprojb.{i}": ("C",),
    "ln2w.{i}": ("C",),
    "ln2b.{i}": ("C",),
    "fcw.{i}": ("4C", "C"),
    "fcb.{i}": ("4C",),
    "fcprojw.{i}": ("C", "4C"),
    "fcprojb.{i}": ("C",),
    "lnfw": ("C",),
    "lnfb": ("C",),
}


def open_llmc(path: Path) -> Container:
    """Open a model of llm.c.

    Raises:
        FormatError: if the header is invalid, or the file does not have exactly the length that it needs.
    """
    file = File(path)
    config, dtype = _header(file)
    position = HEADER.size
    end = position + sum(math.prod(shape) for _, shape in _layout(config)) * dtype.itemsize
    fault = f"{file.size} bytes, but its header needs {end}"
    if file.size < end:
        raise truncated(path, fault)
    if file.size > end:
        raise FormatError(f"{path}: {fault}")
    tensors = {}
    for name, shape in _layout(config):
        tensors[name] = LazyTensor.in_file(file, position, dtype, shape)
        position += tensors[name].nbytes
    padding = tensors["wte"]
    tensors["wte"] = padding.first_rows(config["vocab_size"])
    behind = file.chunks(HEADER.size + tensors["wte"].nbytes, padding.nbytes - tensors["wte"].nbytes)
    used = any(chunk.count(0) != len(chunk) for chunk in behind)
    note = "the padding rows of the token embedding are not zero; they are dropped, as llm.c ignores them"
    return Container("llmc", path, tensors, config, notes=(note,) if used else ())


def _header(file: File) -> tuple[dict[str, int], DType]:
    """The sizes, and the dtype of all arrays.

    Raises:
        FormatError: if the header is invalid.
    """
    if file.size < HEADER.size:
        raise truncated(file.path, f"llm.c's header needs {HEADER.size} bytes, the file has {file.size}")
    magic, version, *numbers = HEADER.unpack(file.read(0, HEADER.size))
    if magic != MAGIC or version not in VERSIONS:
        known = ", ".join(f"{n} ({dtype})" for n, dtype in VERSIONS.items())
        raise FormatError(f"{file.path}: version {version} of llm.c's format; known are {known}")
    # The other numbers of the header are not used.
    config = dict(zip(FIELDS, numbers, strict=False))
    faults = [f"{name} is {n}" for name, n in config.items() if n <= 0]
    # Before the layers are enumerated, which would take memory for as many as a header claims.
    if config["num_layers"] > MAX_LAYERS or config["padded_vocab_size"] < config["vocab_size"]:
        faults += [f"{name} is {config[name]}" for name in ("num_layers", "vocab_size", "padded_vocab_size")]
    if faults:
        raise FormatError.listing(f"{file.path}: invalid header", faults)
    return config, VERSIONS[version]


def _layout(config: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each layer's part of each array, in the order of the file."""
    width = config["channels"]
    sizes = {"V": config["padded_vocab_size"], "T": config["max_seq_len"], "C": width, "3C": 3 * width, "4C": 4 * width}
    for name, shape in ARRAYS.items():
        sized = tuple(sizes[symbol] for symbol in shape)
        layers = range(config["num_layers"] if "{i}" in name else 1)
        for i in layers:
            yield name.replace("{i}", str(i)), sized


def write_llmc(out: Output, tensors: Mapping[str, LazyTensor], config: Mapping[str, int], dtype: DType) -> None:
    """Write a model of llm.c: ``tensors`` with the names of ``ARRAYS``, all of ``dtype``; ``config`` with those of ``FIELDS``."""
    version = next(number for number, kind in VERSIONS.items() if kind == dtype)
    rows = -(-config["vocab_size"] // MULTIPLE) * MULTIPLE
    values = [MAGIC, version, *({**config, "padded_vocab_size": rows}[name] for name in FIELDS)]
    out.write(HEADER.pack(*values, *[0] * (256 - len(values))))
    for name, shape in _layout({**config, "padded_vocab_size": rows}):
        for chunk in tensors[name].chunks():
            out.write(chunk)
        if name == "wte":
            out.write(bytes((rows - config["vocab_size"]) * shape[1] * dtype.itemsize))
