"""Hugging Face's directory (``config.json``, ``model.safetensors``, tokenizer), whole or in shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..config import from_hf, notes_on_hf, to_hf
from ..dialects import HF as DIALECT
from ..io.json import MAX_CONFIG, read_json, to_json
from ..io.publishing import new_directory, new_file, write_small
from ..tensors import LazyTensor
from ..tokenizer import hf_files
from .format import FLOATS, Codec, Format, Job, Written
from .notes import NO_TOKENIZER, token_roles, tokenizer_notes, vocabulary_of

TORCH_NAMES = {"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16"}

CODEC = Codec(from_hf, to_hf, notes=notes_on_hf)


def hf_companions(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Name -> contents of the files beside the weights in Hugging Face's layout: configuration and tokenizer."""
    config = checkpoint.config
    files = {
        "config.json": to_json(
            {**to_hf(config), "torch_dtype": TORCH_NAMES[checkpoint.tensors["wte.weight"].dtype.name]}
        ),
        "generation_config.json": to_json(_generation_config(checkpoint)),
    }
    if checkpoint.tokenizer:
        vocabulary_of(checkpoint.tokenizer)  # refuses a damaged one
        files |= hf_files(checkpoint.tokenizer, config.n_ctx, token_roles(config))
    return files


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's own, or else one made from the configuration."""
    if checkpoint.source:
        own = checkpoint.source.parent / "generation_config.json"
        if own.is_file():
            return read_json(own, MAX_CONFIG)
    config = checkpoint.config
    # transformers marks a file with this key that it made from config.json itself.
    return {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "_from_model_config": True}


def _write(job: Job) -> Written:
    checkpoint = job.checkpoint
    companions = hf_companions(checkpoint)
    tensors = DIALECT.write(checkpoint.tensors, checkpoint.config)
    with new_directory(job.path, job.force, job.rivals) as stage:
        write_small(stage, companions)
        _write_shards(stage, _split(tensors, job.max_shard_size), to_hf(checkpoint.config))
        files = [job.path / file.name for file in stage.iterdir()]
    return Written(files, _size_notes(tensors, job.max_shard_size) + _notes(checkpoint))


def _size_notes(tensors: Mapping[str, LazyTensor], limit: int | None) -> list[str]:
    largest, name = max((tensor.nbytes, name) for name, tensor in tensors.items())
    if limit is None or largest <= limit:
        return []
    return [f"{name} alone has {largest:,} bytes, more than --max-shard-size ({limit:,})"]


def _notes(checkpoint: Checkpoint) -> list[str]:
    if not checkpoint.tokenizer:
        return [NO_TOKENIZER]
    if checkpoint.tokenizer.fault:
        return [f"the tokenizer is copied as it is: {checkpoint.tokenizer.kind}"]
    return tokenizer_notes(checkpoint, keeps_prefix_space=True)


def _split(tensors: Mapping[str, LazyTensor], limit: int | None) -> list[dict[str, LazyTensor]]:
    """The tensors in order, in shards of at most ``limit`` bytes. A larger tensor gets a shard of its own."""
    shards: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        is_full = limit is not None and size + tensor.nbytes > limit
        if is_full and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_shards(stage: Path, shards: list[dict[str, LazyTensor]], config: dict[str, Any]) -> None:
    """Write one file, or several and their index, under the names that ``save_pretrained`` gives them."""
    from ..containers.safetensors import write_safetensors

    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    size = 0
    weight_map: dict[str, str] = {}
    for name, tensors in zip(names, shards, strict=True):
        with new_file(stage / name) as out:
            write_safetensors(out, tensors, config)
        size += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_small(stage, {"model.safetensors.index.json": to_json(index)})


HF = Format(
    name="hf",
    what="Hugging Face's directory",
    files="`config.json`, `model.safetensors`, tokenizer",
    dialect="hf",
    reads=FLOATS,
    writes=FLOATS,
    ask="a name without a known suffix",
    configuration="`config.json`",
    tokenizer="in the directory",
    config_file="config.json",
    codec=CODEC,
    write=_write,
    write_suffixes=("",),
    is_directory=True,
    shards=True,
)

SHARDS = Format(
    name="shards",
    what="one checkpoint in several files",
    files="`*.index.json`",
    dialect="hf",
    reads=FLOATS,
    writes=FLOATS,
    ask="`--max-shard-size 5GB`",
    configuration="`config.json` beside it",
    checksums="those of its files",
    codec=CODEC,
)
