"""The registry of formats. Nothing else lists formats: every other list is a view of ``FORMATS``."""

from __future__ import annotations

from collections.abc import Callable

from .flax import MSGPACK
from .format import EXPORTED, FIRST, LATER, Codec, Embedded, Format, Job, Opener, Written
from .gguf import GGUF
from .huggingface import HF, SHARDS
from .keras import HDF5
from .llmc import LLMC
from .nanogpt import NANOGPT
from .npz import NPZ
from .onnx import ONNX
from .safetensors import SAFETENSORS
from .tensorflow import TF
from .torch import BIN

# In the order in which a file's first bytes are compared with them; those that are uncertain come last.
FORMATS = (TF, HF, SHARDS, SAFETENSORS, NPZ, BIN, NANOGPT, LLMC, GGUF, HDF5, ONNX, MSGPACK)
BY_NAME = {entry.name: entry for entry in FORMATS}

WRITERS: dict[str, Callable[[Job], Written]] = {entry.name: entry.write for entry in FORMATS if entry.write}
INDEXES = {suffix: open_index for entry in FORMATS for suffix, open_index in entry.indexes.items()}


def _codecs(name: str) -> tuple[Codec, ...]:
    found = [entry.codec for entry in FORMATS if entry.config_file == name and entry.codec]
    # A codec that takes any spelling comes last, as it would hide those after it.
    return tuple(sorted(found, key=lambda codec: codec.applies is None))


# Name of a file that states a configuration -> how it may be spelled. The first that applies is read; the last always does.
CONFIG_FILES = {entry.config_file: _codecs(entry.config_file) for entry in FORMATS if entry.config_file}


def _file_names(turn: int) -> tuple[str, ...]:
    return tuple(name for entry in FORMATS if entry.turn == turn for name in entry.file_names)


# Where the weights of a directory are: the first of these, else a TensorFlow checkpoint, else the first of the others.
WEIGHTS = _file_names(FIRST)
OTHERS = _file_names(LATER)
MODELS = _file_names(EXPORTED)
SUFFIXES = tuple(dict.fromkeys(suffix for entry in FORMATS for suffix in entry.suffixes))
WRITE_SUFFIXES = {suffix: entry.name for entry in FORMATS for suffix in entry.write_suffixes}

__all__ = [
    "BY_NAME",
    "CONFIG_FILES",
    "FORMATS",
    "INDEXES",
    "MODELS",
    "OTHERS",
    "SUFFIXES",
    "WEIGHTS",
    "WRITERS",
    "WRITE_SUFFIXES",
    "Codec",
    "Embedded",
    "Format",
    "Job",
    "Opener",
    "Written",
]
