"""nanoGPT's ``ckpt.pt``: a file of PyTorch's that has the tensors under ``model``, and ``model_args`` beside them.

build-nanogpt and minGPT use the same names of tensors, and other files. Sources: ``train.py`` and ``model.py`` of
karpathy/nanoGPT, ``train_gpt2.py`` of karpathy/build-nanogpt, ``mingpt/model.py`` of karpathy/minGPT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import how_to_ignore, is_foreign, to_hf
from ..containers.container import Container
from ..dialects import BUILD_NANOGPT, MINGPT, Dialect
from ..dialects import NANOGPT as NANOGPT_DIALECT
from ..errors import ConfigError, FormatError
from ..io.json import parse_json
from ..io.publishing import new_file
from ..spec import GPT2Config, renamed, spelled, with_inner
from ..values import all_are
from .format import FLOATS, LATER, Codec, Embedded, Format, Job, Written
from .huggingface import CODEC as HF_CODEC

MODEL_ARGS = "model_args"
CONFIG = "config"  # where build-nanogpt puts its GPTConfig, and nanoGPT the settings of its training
CONFIG_KEY = "gpt2x_config"  # Hugging Face's config.json, as text: it states more than model_args can
PLAIN = (str, int, float, type(None))  # the types that a value of model_args may have

# GPTConfig of nanoGPT and of build-nanogpt -> GPT2Config
KEYS = {
    "block_size": "n_ctx",
    "vocab_size": "n_vocab",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
INERT = ("dropout", "bias")
# Keys under which training scripts keep the configuration of their model. An object there is not constructed: its plain
# fields are read. Of a class of the script's own, as karpathy/build-nanogpt's GPTConfig, those of KEYS are.
RUN_KEYS = (MODEL_ARGS, "config", "model_config", "gpt_config", "args", "hparams", "hyper_parameters", "cfg")
INNER_KEYS = (*RUN_KEYS, "model", "gpt", "network")  # in those of a run, as Hydra's and Lightning's
REQUIRED = frozenset(["n_layer", "n_head", "n_embd"])
HF_CLASS = "GPT2Config"


def from_model_args(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The GPT2Config fields that a ``GPTConfig`` of nanoGPT or build-nanogpt states.

    Raises:
        ConfigError: if a key is set that it does not have.
    """
    unknown = [key for key, value in raw.items() if key not in KEYS and key not in INERT and value]
    if unknown:
        faults = [f"{str(key)[:60]} is {str(raw[key])[:60]!r}" for key in unknown]
        raise ConfigError.listing(
            f"{where}: keys that nanoGPT's GPTConfig does not have", faults, how_to_ignore(unknown)
        )
    fields = renamed(raw, KEYS)
    dropout = raw.get("dropout")
    if isinstance(dropout, float | int):
        fields |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return with_inner(fields)


def to_model_args(config: GPT2Config) -> dict[str, Any]:
    """nanoGPT's ``model_args`` of a configuration."""
    return {**spelled(config, KEYS), "bias": True, "dropout": 0.0}


CODEC = Codec(from_model_args, to_model_args)


@dataclass(frozen=True)
class Beside:
    """A configuration that lies beside the tensors of a file of PyTorch's.

    Args:
        key: the key that it is under.
        embedded: the configuration.
        ignored: the names of fields that were set and not read.
    """

    key: str
    embedded: Embedded
    ignored: tuple[str, ...] = ()


def embedded(container: Container) -> Embedded | None:
    """The configuration that lies beside the tensors of a file of PyTorch's, if there is one.

    Raises:
        FormatError: if it is invalid.
    """
    found = configuration_beside(container)
    return found.embedded if found else None


def configuration_beside(container: Container) -> Beside | None:
    """The configuration that lies beside the tensors, and where: gpt2x's, nanoGPT's, or else one that a run left.

    Raises:
        FormatError: if it is invalid.
    """
    text = container.metadata.get(CONFIG_KEY)
    if isinstance(text, str):
        raw = parse_json(text.encode(), f"{container.path}: {CONFIG_KEY}")
        return Beside(CONFIG_KEY, Embedded(raw, HF_CODEC))
    arguments = container.metadata.get(MODEL_ARGS)
    if isinstance(arguments, dict) and all_are(arguments, str):
        _check_plain(arguments, container.path)
        return Beside(MODEL_ARGS, Embedded(arguments, CODEC, complete=False))
    for key in RUN_KEYS:
        found = _left_by_a_run(key, container.metadata.get(key))
        if found:
            return found
    return None


def _check_plain(arguments: Mapping[str, Any], path: Path) -> None:
    for key, value in arguments.items():
        if not isinstance(value, PLAIN):
            raise FormatError(f"{path}: {key[:100]!r} in {MODEL_ARGS} is not a string, a number or None")


def _left_by_a_run(key: str, value: Any) -> Beside | None:
    """A configuration that is the value of a key, or one level below it."""
    from ..containers.torch_values import fields_of

    found = _configuration(key, value)
    if found:
        return found
    inner = fields_of(value) or {}
    for name in INNER_KEYS:
        found = _configuration(f"{key}.{name}", inner.get(name))
        if found:
            return found
    return None


def _configuration(key: str, value: Any) -> Beside | None:
    """A configuration of transformers' or of a GPT like nanoGPT's: a dict, or an object whose fields are read."""
    from ..containers.torch_values import Opaque, plain_fields

    fields = plain_fields(value)
    if fields is None:
        return None
    class_name = value.name.rpartition(".")[2] if isinstance(value, Opaque) else ""
    if class_name == HF_CLASS or fields.get("model_type") == "gpt2":
        return Beside(key, Embedded(fields, HF_CODEC))
    if key == CONFIG and _is_gpt_config(fields):
        return Beside(key, Embedded(fields, CODEC, complete=False))  # unknown fields are refused
    if not fields.keys() >= REQUIRED:
        return None
    # What changes the arithmetic stays, to be refused; the other settings of a run do not concern the model.
    known = {name: item for name, item in fields.items() if name in (*KEYS, *INERT) or is_foreign(name, fields)}
    ignored = tuple(name for name, item in fields.items() if name not in known and item)
    return Beside(key, Embedded(known, CODEC, complete=False), ignored)


def _is_gpt_config(fields: Mapping[str, Any]) -> bool:
    """Whether these are the fields of a ``GPTConfig``, not of a training run, which lacks ``vocab_size`` or has a learning rate."""
    return fields.keys() >= KEYS.keys() and "learning_rate" not in fields


def _is_build_nanogpt(config: Any) -> bool:
    """Whether a value is build-nanogpt's ``GPTConfig``, or the fields of one."""
    from ..containers.torch_values import plain_fields

    fields = plain_fields(config)
    return fields is not None and _is_gpt_config(fields) and fields.keys().isdisjoint(INERT)


def dialect_of(container: Container, prefix: str) -> Dialect:
    """Which of the programs with nanoGPT's names wrote a file, by what it holds beside the parameters.

    nanoGPT has ``model_args``; build-nanogpt has ``config``, which lacks nanoGPT's ``bias`` and ``dropout``; minGPT saves
    a bare state dict, with masks and an ``lm_head`` of its own, where the other two tie it to the token embedding.
    """
    if MODEL_ARGS in container.metadata:
        return NANOGPT_DIALECT
    if _is_build_nanogpt(container.metadata.get(CONFIG)):
        return BUILD_NANOGPT
    tensors = container.tensors
    is_bare = container.format == "bin" and not container.metadata
    has_masks = f"{prefix}h.0.attn.bias" in tensors
    lm_head = NANOGPT_DIALECT.lm_head_name(tensors, prefix)
    has_own_head = lm_head is not None and tensors[lm_head] is not tensors.get(f"{prefix}wte.weight")
    if is_bare and has_masks and has_own_head:
        return MINGPT
    return NANOGPT_DIALECT


def _write(job: Job) -> Written:
    from ..containers.torch_zip import write_torch_zip

    config = job.checkpoint.config
    tensors = NANOGPT_DIALECT.write(job.checkpoint.tensors, config)
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
    dialect="nanogpt",
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
