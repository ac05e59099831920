"""HDF5, as Keras and transformers 4 wrote ``tf_model.h5``, and as Keras 3 and KerasHub write ``model.weights.h5``.

A KerasHub preset is a directory: ``config.json`` (the class and arguments of a ``GPT2Backbone``), ``model.weights.h5`` or
several files and ``model.weights.json``, and ``assets/tokenizer``. Sources: keras-hub's ``gpt2_backbone.py`` and
``preset_utils.py``; Keras's ``saving_lib.py`` for the names in the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import UNSUPPORTED
from ..containers.container import Container
from ..errors import ConfigError, FormatError
from ..spec import GPT2Config, renamed, spelled, with_inner
from ..tensors import LazyTensor
from .format import LATER, Codec, Embedded, Format, Opener, starts_with

BACKBONE = "GPT2Backbone"
INDEX = ".weights.json"
# GPT2Backbone's arguments -> GPT2Config
KEYS = {
    "vocabulary_size": "n_vocab",
    "max_sequence_length": "n_ctx",
    "hidden_dim": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "intermediate_dim": "n_inner",
}
INERT = ("name", "trainable", "dtype", "dropout")
# What the code of GPT2Backbone always computes.
CODE = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}

UNNUMBERED = re.compile(r"(?<![^/])transformer_decoder(?=/)")
STATE = re.compile(r"(^|/)(seed_generator|optimizer)/")  # of dropout, and of training
KERNEL = re.compile(
    r"/(query|key|value|output)_dense/vars/0$"
)  # [n_embd, n_head, head_dim]; output: [n_head, head_dim, n_embd]


# --------------------------------------------------------------------------------------------------- configuration


def from_keras_hub(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The GPT2Config fields that a KerasHub ``config.json`` states: of a backbone, or of a task that has one.

    Raises:
        ConfigError: if it is not a ``GPT2Backbone``'s, or has an unknown argument.
    """
    backbone = _backbone(raw)
    if backbone is None:
        raise ConfigError(f"{where}: a Keras configuration of {str(raw.get('class_name'))[:60]!r}, not of {BACKBONE!r}")
    unknown = [key for key in backbone if key not in KEYS and key not in INERT]
    if unknown:
        faults = [f"{key[:60]} is {str(backbone[key])[:60]!r}: {BACKBONE} has no such argument" for key in unknown]
        raise ConfigError.listing(f"{where}: {UNSUPPORTED}", faults)
    fields = renamed(backbone, KEYS)
    dropout = backbone.get("dropout")
    if isinstance(dropout, float | int):
        fields |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return with_inner({**fields, **CODE})


def _backbone(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The arguments of the backbone in the configuration of it, or of a task."""
    inner = raw.get("config")
    if not isinstance(inner, dict):
        return None
    if raw.get("class_name") == BACKBONE:
        return inner
    backbone = inner.get("backbone")
    if not isinstance(backbone, dict) or backbone.get("class_name") != BACKBONE:
        return None
    return _backbone(backbone)


def to_keras_hub(config: GPT2Config) -> dict[str, Any]:
    """The ``config.json`` of a ``GPT2Backbone``."""
    return {"class_name": BACKBONE, "config": {**spelled(config, KEYS), "dropout": config.resid_pdrop}}


def is_kerass(raw: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` states a class and its arguments, as Keras does."""
    return "class_name" in raw and "config" in raw


CODEC = Codec(from_keras_hub, to_keras_hub, applies=is_kerass)


def _embedded(container: Container) -> Embedded | None:
    """The number of heads, which the kernels of attention show.

    Raises:
        FormatError: if they do not have the same.
    """
    heads: dict[int, str] = {}
    for name, tensor in container.tensors.items():
        kernel = KERNEL.search(name)
        if kernel and len(tensor.shape) == 3:
            axis = 0 if kernel[1] == "output" else 1
            heads.setdefault(tensor.shape[axis], name)
    if len(heads) > 1:
        (first, name), (second, other) = [*heads.items()][:2]
        raise FormatError(f"{container.path}: {name[:100]} has {first} heads, but {other[:100]} has {second}")
    if not heads:
        return None
    return Embedded({"class_name": BACKBONE, "config": {"num_heads": next(iter(heads))}}, CODEC, complete=False)


# --------------------------------------------------------------------------------------------------------- opening


def _open(path: Path) -> Container:
    from ..containers.hdf5 import open_hdf5

    return _named(open_hdf5(path))


def _open_index(path: Path) -> Container:
    from ..containers.keras_shards import open_keras_shards

    return _named(open_keras_shards(path))


def _named(container: Container) -> Container:
    """The tensors without the state of dropout and of training; the first layer has the number 0.

    Keras counts the layers of a class from the second one on: ``transformer_decoder``, ``transformer_decoder_1``.
    """
    left_out = tuple(name for name in container.tensors if STATE.search(name))
    tensors = dict(_numbered(container))
    return replace(container, tensors=tensors, left_out=(*container.left_out, *left_out))


def _numbered(container: Container) -> Iterator[tuple[str, LazyTensor]]:
    for name, tensor in container.tensors.items():
        if STATE.search(name):
            continue
        numbered = UNNUMBERED.sub("transformer_decoder_0", name)
        if numbered != name and numbered in container.tensors:
            raise FormatError(f"{container.path}: {name[:100]!r} and {numbered[:100]!r} are the same layer")
        yield numbered, tensor


HDF5 = Format(
    name="hdf5",
    what="Keras, through transformers 4 and KerasHub",
    files="`tf_model.h5`, `.weights.h5`, `model.weights.json`",
    dialect="keras",
    reads=("F64", "F32", "F16"),
    untied=False,
    openers=(Opener(starts_with(b"\x89HDF\r\n\x1a\n"), _open),),
    indexes={INDEX: _open_index},
    file_names=("tf_model.h5", "model.weights.h5", f"model{INDEX}"),
    turn=LATER,
    suffixes=(".h5",),
    config_file="config.json",
    codec=CODEC,
    embedded=_embedded,
)
