"""Which container a path holds, and which writer a destination asks for: the two verbs, open and save."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import safetensors_file, tf_bundle
from .checkpoint import Checkpoint, assemble
from .config import from_hf, from_hparams, to_hf, to_hparams
from .container import Container
from .dialects import HF, OPENAI
from .errors import CheckpointError, DestinationError, FormatError
from .files import File, check_name, new_directory, new_file, read_json, reading
from .shard_index import open_shards
from .tensors import LazyTensor, all_finite, whole_items
from .tokenizer_files import EXTRA, PAIRS, find_tokenizer, hf_files, openai_files

# What a directory is searched for, the first found being meant.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

# Names that ask for a file which is not written (a directory of such a name would surprise).
FOREIGN_SUFFIXES = (".ckpt", ".gguf", ".h5", ".json", ".msgpack", ".npz", ".onnx", ".pt", ".pth", ".zip")

Progress = Callable[[int], None]
Warn = Callable[[str], None]


# ------------------------------------------------------------------------------------------------------- opening


def open_checkpoint(path: str | Path, *, n_head: int | None = None, tie: bool = False) -> Checkpoint:
    """Open a GPT-2 checkpoint of any known format, recognised by its content. Nothing is read but names and shapes.

    Args:
        path: OpenAI's TensorFlow checkpoint (directory, prefix, ``.index`` or ``.data``), a ``.bin``, a
            ``.safetensors``, a shard index, or a directory that holds one of them.
        n_head: the number of attention heads, where nothing beside the weights says it.
        tie: drop an ``lm_head`` that differs from the token embedding.

    Raises:
        ConversionError: if it cannot be read as a GPT-2; the message says what is wrong and where.
    """
    if not str(path):
        raise FormatError("the source is an empty name")
    path = Path(path)
    check_name(path)
    with reading(path):
        container = _open_directory(path) if path.is_dir() else _open_path(path)
        directory = path if path.is_dir() else path.parent
        stated, stated_in = _configuration(container, directory, from_directory=path.is_dir())
        checkpoint = assemble(container, stated, stated_in, n_head=n_head, tie=tie)
        unread = [n for n in WEIGHTS if path.is_dir() and n != container.path.name and (path / n).is_file()]
        notes = tuple(f"{path} also holds {name}, which was not read" for name in unread)
        return replace(checkpoint, tokenizer=find_tokenizer(directory), notes=(*checkpoint.notes, *notes))


def _open_directory(path: Path) -> Container:
    for name in WEIGHTS:
        if (path / name).is_file():
            return _open_path(path / name)
    if prefix := tf_bundle.find_prefix(path):
        return tf_bundle.open_bundle(prefix)
    others = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth") and p.is_file())
    if len(others) == 1:
        return _open_path(others[0])
    if others:
        raise FormatError(f"{path}: several weight files ({', '.join(p.name for p in others[:5])}); name one of them")
    raise FormatError(f"{path}: no weights in this directory (looked for {', '.join(WEIGHTS)}, *.index)")


def _open_path(path: Path) -> Container:
    if prefix := tf_bundle.prefix_of(path):
        return tf_bundle.open_bundle(prefix)
    file = File(path)
    head = file.read(0, min(file.size, 512))
    if path.name.endswith(".index.json"):
        return open_shards(path, _open_path)
    if safetensors_file.looks_like(head, file.size):
        return safetensors_file.open_safetensors(path)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02\x8a\x0a")):
        return _open_torch(path, zipped=head.startswith(b"PK"))
    if fault := _not_weights(file, head):
        raise FormatError(f"{path}: {fault}")
    if path.suffix == ".safetensors":
        return safetensors_file.open_safetensors(path)
    raise FormatError(
        f"{path}: not a format that gpt2x knows (no TensorFlow index, zip, PyTorch pickle or safetensors)"
    )


def _open_torch(path: Path, zipped: bool) -> Container:
    from . import torch_legacy, torch_zip  # here, because no other format needs zipfile and pickletools

    return torch_zip.open_torch_zip(path) if zipped else torch_legacy.open_torch_legacy(path)


def _not_weights(file: File, head: bytes) -> str | None:
    """What a file is that people take for weights."""
    text = head.lstrip()[:64].lower()
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run 'git lfs pull' where it came from"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not weights; the download went to a page that shows the file"
    if head[257:262] == b"ustar" or head.startswith((b"\x1f\x8b", b"BZh")):
        return "a tar or a compressed archive; unpack it first"
    if file.size >= tf_bundle.FOOTER and file.read(file.size - 8, 8) == tf_bundle.MAGIC.to_bytes(8, "little"):
        return tf_bundle.V1
    if head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5:
        return "a pickle, but not one of torch.save: refused"
    return None


def _configuration(container: Container, directory: Path, from_directory: bool) -> tuple[dict[str, Any], str]:
    """What is stated about the model, and where: a lone file's own word first, a directory's files first."""
    inside = from_hf(container.config, f"{container.path}: its metadata") if container.config else {}
    beside, name = _beside(directory) if from_directory or not inside else ({}, "")
    _agree(directory, inside, container.path.name, beside, name)
    return {**inside, **beside}, name or ("its metadata" if inside else "")


def _beside(directory: Path) -> tuple[dict[str, Any], str]:
    stated: dict[str, Any] = {}
    names = []
    for name, parse in (("config.json", from_hf), ("hparams.json", from_hparams)):
        if (directory / name).is_file():
            here = parse(read_json(directory / name, 1 << 20), str(directory / name))
            _agree(directory, stated, "config.json", here, name)
            stated = {**here, **stated}
            names.append(name)
    return stated, " and ".join(names)


def _agree(directory: Path, a: Mapping[str, Any], name_a: str, b: Mapping[str, Any], name_b: str) -> None:
    clash = [key for key in a if key in b and b[key] != a[key] and not key.endswith("token_id")]
    if clash:
        facts = [f"{key} is {a[key]!r} in {name_a}, {b[key]!r} in {name_b}" for key in clash]
        advice = "Remove the wrong one, or convert the file alone."
        raise CheckpointError.listing(f"{directory}: two configurations that disagree", facts, advice)


# ------------------------------------------------------------------------------------------------------- saving


@dataclass(frozen=True)
class Saved:
    """What was written."""

    path: Path
    format: str
    bytes: int


def save_checkpoint(
    checkpoint: Checkpoint,
    path: str | Path,
    to: str | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> Saved:
    """Write a checkpoint. The destination appears whole, or not at all.

    Args:
        checkpoint: what to write; its checksums are verified on the way.
        path: the destination. Without ``to``, its suffix says the format; no known suffix is a directory in Hugging
            Face's layout.
        to: one of ``WRITERS``.
        force: replace what is there.
        progress: called with the number of tensor bytes read, as they are read.
        warn: called with a sentence where a tensor holds NaN or infinity.

    Raises:
        DestinationError: if the destination exists or cannot be written.
        ConversionError: if the source turns out to be damaged, or the format cannot hold the model.
    """
    if not str(path):
        raise DestinationError("the destination is an empty name")
    path = Path(path)
    kind = to or format_of(path)
    if kind not in WRITERS:
        raise DestinationError(f"unknown format {kind!r}; known are {', '.join(WRITERS)}")
    files = WRITERS[kind](watched(checkpoint, progress, warn), path, force)
    return Saved(path, kind, sum(file.stat().st_size for file in files))


def format_of(path: Path) -> str:
    """The format that a destination's suffix asks for."""
    suffix = path.suffix.lower()
    if suffix in FOREIGN_SUFFIXES:
        raise DestinationError(
            f"{path}: gpt2x does not write {suffix}. Name it .safetensors or .bin, or a directory (and --to tf for OpenAI's layout)"
        )
    return {".safetensors": "safetensors", ".bin": "bin"}.get(suffix, "hf")


def watched(checkpoint: Checkpoint, progress: Progress | None, warn: Warn | None) -> Checkpoint:
    """The same checkpoint, with an eye on every chunk that is read."""

    def watch(name: str, tensor: LazyTensor) -> LazyTensor:
        def stream() -> Iterator[Any]:
            finite = True
            for chunk in whole_items(tensor.chunks(), tensor.dtype.itemsize):
                finite = finite and all_finite(chunk, tensor.dtype)
                yield chunk
                if progress:
                    progress(len(chunk))
            if not finite and warn:
                warn(f"{name} holds NaN or infinity")

        return replace(tensor, stream=stream)

    return replace(checkpoint, tensors={name: watch(name, tensor) for name, tensor in checkpoint.tensors.items()})


def _save_safetensors(checkpoint: Checkpoint, path: Path, force: bool = False) -> list[Path]:
    tensors = HF.write(checkpoint.tensors, checkpoint.config)
    with new_file(path, force) as out:
        safetensors_file.write_safetensors(out, tensors, to_hf(checkpoint.config))
    return [path]


def _save_bin(checkpoint: Checkpoint, path: Path, force: bool) -> list[Path]:
    from . import torch_zip

    tensors = HF.write(checkpoint.tensors, checkpoint.config)
    with new_file(path, force) as out:
        torch_zip.write_torch_zip(out, tensors, to_hf(checkpoint.config))
    return [path]


def hf_companions(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Name -> contents of what lies beside the weights in Hugging Face's layout: configuration and tokenizer."""
    config = checkpoint.config
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    dtype = TORCH_NAMES[checkpoint.tensors["wte.weight"].dtype.name]
    small = {
        "config.json": to_json({**to_hf(config), "torch_dtype": dtype}),
        "generation_config.json": to_json({**ids, "_from_model_config": True}),
    }
    settings = checkpoint.source.parent / "generation_config.json" if checkpoint.source else None
    if settings and settings.is_file():
        small["generation_config.json"] = to_json(read_json(settings, 1 << 20))
    if checkpoint.tokenizer:
        small |= hf_files(checkpoint.tokenizer, config.n_ctx)
    return small


def _save_hf(checkpoint: Checkpoint, path: Path, force: bool) -> list[Path]:
    small = hf_companions(checkpoint)
    with new_directory(path, force, rivals) as stage:
        write_small(stage, small)
        _save_safetensors(checkpoint, stage / "model.safetensors")
        return [path / file.name for file in stage.iterdir()]


def _save_tf(checkpoint: Checkpoint, path: Path, force: bool) -> list[Path]:
    tensors = OPENAI.write(checkpoint.tensors, checkpoint.config)
    small = {
        "hparams.json": to_json(to_hparams(checkpoint.config)),
        "checkpoint": b'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n',
    }
    if checkpoint.tokenizer:
        small |= openai_files(checkpoint.tokenizer)
    with new_directory(path, force, rivals) as stage:
        write_small(stage, small)
        tf_bundle.write_bundle(stage / "model.ckpt", tensors)
        return [path / file.name for file in stage.iterdir()]


def rivals(path: Path) -> list[str]:
    """The files of a directory that ``open_checkpoint`` would take for weights, configuration or tokenizer."""
    names = {*WEIGHTS, "config.json", "hparams.json", "checkpoint", "tokenizer.json", *sum(PAIRS, ()), *EXTRA}
    return sorted(p.name for p in path.iterdir() if p.name in names or p.suffix == ".index")


def write_small(stage: Path, files: Mapping[str, bytes]) -> None:
    """Write files of these names and contents."""
    for name, data in files.items():
        with new_file(stage / name) as out:
            out.write(data)


def to_json(value: Mapping[str, Any]) -> bytes:
    """A JSON file for people to read."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


TORCH_NAMES = {"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16"}

WRITERS: dict[str, Callable[[Checkpoint, Path, bool], list[Path]]] = {
    "safetensors": _save_safetensors,
    "bin": _save_bin,
    "hf": _save_hf,
    "tf": _save_tf,
}
