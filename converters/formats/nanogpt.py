"""nanoGPT's ``ckpt.pt``: a file of PyTorch's that has the tensors under ``model``, and ``model_args`` beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..config import to_hf
from ..containers.container import Container
from ..dialects import NANOGPT as DIALECT
from ..errors import ConfigError, FormatError
from ..io.json import parse_json
from ..io.publishing import new_file
from ..spec import GPT2Config, with_inner
from .format import FLOATS, LATER, Codec, Embedded, Format, Job, Written
from .huggingface import CODEC as HF_CODEC

MODEL_ARGS = "model_args"
CONFIG_KEY = "gpt2x_config"  # Hugging Face's config.json, as text: it states more than model_args can
PLAIN = (str, int, float, type(None))  # the types that a value of model_args may have

# nanoGPT's GPTConfig -> GPT2Config
KEYS = {
    "block_size": "n_ctx",
    "vocab_size": "n_vocab",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
INERT = ("dropout", "bias")


def from_model_args(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The GPT2Config fields that nanoGPT's ``model_args`` (its ``GPTConfig``) state.

    Raises:
        ConfigError: if a key is set that nanoGPT does not have.
    """
    unknown = [key for key, value in raw.items() if key not in KEYS and key not in INERT and value]
    if unknown:
        faults = [f"{str(key)[:60]} is {str(raw[key])[:60]!r}" for key in unknown]
        raise ConfigError.listing(f"{where}: model_args that nanoGPT does not have", faults)
    fields = {name: raw[key] for key, name in KEYS.items() if key in raw}
    dropout = raw.get("dropout")
    if isinstance(dropout, float | int):
        fields |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return with_inner(fields)


def to_model_args(config: GPT2Config) -> dict[str, Any]:
    """nanoGPT's ``model_args`` of a configuration."""
    sizes = {key: getattr(config, name) for key, name in KEYS.items()}
    return {**sizes, "bias": True, "dropout": 0.0}


CODEC = Codec(from_model_args, to_model_args)


def embedded(container: Container) -> Embedded | None:
    """The configuration that lies beside the tensors of a file of PyTorch's, if there is one.

    Raises:
        FormatError: if it is invalid.
    """
    text = container.metadata.get(CONFIG_KEY)
    if isinstance(text, str):
        return Embedded(parse_json(text.encode(), f"{container.path}: {CONFIG_KEY}"), HF_CODEC)
    arguments = container.metadata.get(MODEL_ARGS)
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        return None
    for key, value in arguments.items():
        if not isinstance(value, PLAIN):
            raise FormatError(f"{container.path}: {key[:100]!r} in {MODEL_ARGS} is not a string, a number or None")
    return Embedded(arguments, CODEC, complete=False)


def _write(job: Job) -> Written:
    from ..containers.torch_zip import write_torch_zip

    config = job.checkpoint.config
    tensors = DIALECT.write(job.checkpoint.tensors, config)
    beside = {MODEL_ARGS: to_model_args(config), CONFIG_KEY: json.dumps(to_hf(config))}
    with new_file(job.path, job.force) as out:
        write_torch_zip(out, tensors, beside=beside)
    notes = []
    if config.activation_function != "gelu":
        notes.append(
            "nanoGPT's model.py computes the exact GELU since 2023, and this model needs the tanh form: "
            "use nn.GELU(approximate='tanh') there"
        )
    return Written([job.path], notes)


NANOGPT = Format(
    name="nanogpt",
    what="nanoGPT's train.py",
    files="`ckpt.pt`",
    dialects=("nanogpt",),
    reads=FLOATS,
    writes=FLOATS,
    ask="`--to nanogpt`",
    configuration="`model_args` in it",
    checksums="CRC-32 of every member",
    untied=False,
    file_names=("ckpt.pt",),
    turn=LATER,
    codec=CODEC,
    write=_write,
)
