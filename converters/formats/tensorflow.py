"""OpenAI's release: a TensorFlow checkpoint, with ``hparams.json`` and the tokenizer beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..added_tokens import CONFIG, END_OF_TEXT
from ..checkpoint import Checkpoint
from ..dialects import OPENAI as DIALECT
from ..errors import ConfigError
from ..io.json import to_json
from ..io.publishing import new_directory, write_small
from ..spec import GPT2Config, with_inner
from ..tokenizer import openai_files
from .format import FLOATS, Codec, Format, Job, Written
from .notes import NO_TOKENIZER, not_stored, token_roles, tokenizer_notes, vocabulary_of

HPARAMS_KEYS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
PREFIX = "model.ckpt"
# TensorFlow's CheckpointState as text, by which tf.train.latest_checkpoint finds the prefix.
STATE = f'model_checkpoint_path: "{PREFIX}"\nall_model_checkpoint_paths: "{PREFIX}"\n'


def from_hparams(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The GPT2Config fields that an ``hparams.json`` states.

    Raises:
        ConfigError: if a key is missing or not OpenAI's.
    """
    missing = sorted(set(HPARAMS_KEYS) - set(raw))
    unknown = sorted(set(raw) - set(HPARAMS_KEYS))
    faults = [f"{key} is missing" for key in missing]
    faults += [f"{key} is not a key of OpenAI's GPT-2" for key in unknown]
    if faults:
        raise ConfigError.listing(f"{where}: not the hparams of a GPT-2", faults)
    return with_inner({key: raw[key] for key in HPARAMS_KEYS})


def to_hparams(config: GPT2Config) -> dict[str, Any]:
    """The ``hparams.json`` of a configuration."""
    return {key: getattr(config, key) for key in HPARAMS_KEYS}


CODEC = Codec(from_hparams, to_hparams)


def _write(job: Job) -> Written:
    from ..containers.tf_bundle import write_bundle

    checkpoint = job.checkpoint
    tensors = DIALECT.write(checkpoint.tensors, checkpoint.config)
    companions = {"hparams.json": to_json(to_hparams(checkpoint.config)), "checkpoint": STATE.encode()}
    if checkpoint.tokenizer and vocabulary_of(checkpoint.tokenizer):
        companions |= openai_files(checkpoint.tokenizer, checkpoint.config.n_ctx, token_roles(checkpoint.config))
    notes = _notes(checkpoint)
    with new_directory(job.path, job.force, job.rivals) as stage:
        write_small(stage, companions)
        write_bundle(stage / PREFIX, tensors)
        files = [job.path / file.name for file in stage.iterdir()]
    return Written(files, notes)


def _notes(checkpoint: Checkpoint) -> list[str]:
    """What OpenAI's layout cannot store of a tokenizer."""
    if not checkpoint.tokenizer:
        return [NO_TOKENIZER]
    if checkpoint.tokenizer.fault:
        return [not_stored(checkpoint.tokenizer, "OpenAI's layout")]
    notes = tokenizer_notes(checkpoint, keeps_prefix_space=False)
    vocabulary = checkpoint.tokenizer.vocabulary()
    if vocabulary.added_by_user:
        names = ", ".join(token.content for token in vocabulary.added_by_user)
        notes.append(f"OpenAI's code reads added tokens as plain text; gpt2x reads them from {CONFIG}: {names}")
    end = checkpoint.config.eos_token_id
    if vocabulary.ids.get(END_OF_TEXT) != end:
        notes.append(f"OpenAI's layout cannot store token ids: eos_token_id ({end}) is lost")
    return notes


# It has no openers: a checkpoint is a prefix of several files, which opening/find.py looks for.
TF = Format(
    name="tf",
    what="OpenAI's TensorFlow checkpoint (V2)",
    files="directory, prefix, `.index` or `.data`",
    dialect="openai",
    reads=FLOATS,
    writes=FLOATS,
    ask="`--to tf`",
    configuration="`hparams.json` beside it",
    checksums="CRC-32C of every tensor and block",
    untied=False,
    config_file="hparams.json",
    codec=CODEC,
    write=_write,
    is_directory=True,
)
