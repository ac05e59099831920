"""GPT-2 weight files: any format in, any format out.

    from converters import open_checkpoint, save_checkpoint

    checkpoint = open_checkpoint("models/124M")
    save_checkpoint(checkpoint, "gpt2.safetensors")

A *container* turns bytes into named arrays; a *dialect* is a table of names; a format is a pair of the two. Nothing
here imports torch, TensorFlow or gpt2x, and nothing in a file is ever executed.
"""

from .checkpoint import Checkpoint
from .errors import (
    CheckpointError,
    ChecksumError,
    ConfigError,
    ConversionError,
    DestinationError,
    FormatError,
    TokenizerError,
    UnknownHeadsError,
    UnsafeError,
)
from .formats import FORMATS, WRITERS, Format
from .opening import open_checkpoint
from .saving import save_checkpoint
from .spec import GPT2Config
from .tensors import LazyTensor
from .tokenizer import find_tokenizer

__all__ = [
    "FORMATS",
    "WRITERS",
    "Checkpoint",
    "CheckpointError",
    "ChecksumError",
    "ConfigError",
    "ConversionError",
    "DestinationError",
    "Format",
    "FormatError",
    "GPT2Config",
    "LazyTensor",
    "TokenizerError",
    "UnknownHeadsError",
    "UnsafeError",
    "find_tokenizer",
    "open_checkpoint",
    "save_checkpoint",
]
