"""Checkpoints written: what each destination asks for, what lies beside the weights, and what a format cannot hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .config import to_gguf, to_hf, to_hparams, to_llmc, to_model_args
from .containers import safetensors, tf_bundle
from .dialects import GGUF, HF, LLMC, NANOGPT, OPENAI
from .dtypes import whole_items
from .errors import CheckpointError, DestinationError
from .formats import FORMATS, MODELS, OTHERS, WEIGHTS
from .io.json import read_json
from .io.publishing import new_directory, new_file
from .tensors import BF16, DTYPES, F32, LazyTensor, all_finite
from .tokenizer import END_OF_TEXT, EXTRA, PAIRS, hf_files, openai_files

Progress = Callable[[int], None]
Warn = Callable[[str], None]

# Suffix -> the format that it asks for; none of these is a directory in Hugging Face's layout.
SUFFIXES = {".safetensors": "safetensors", ".bin": "bin", ".gguf": "gguf"}
# Suffixes that do not say which format is meant, or whose format is not written -> what to do instead.
OTHER_SUFFIXES = {
    ".pt": "say which format is meant: --to nanogpt, or --to bin for a state dict",
    ".pth": "say which format is meant: --to bin for a state dict",
    ".ckpt": "--to tf writes OpenAI's layout, a directory",
    ".onnx": "'gpt2x export SRC --onnx DIR' writes ONNX",
    ".pt2": "'gpt2x export SRC --pt2 FILE' writes it",
    **dict.fromkeys(
        (".h5", ".index", ".json", ".msgpack", ".npz", ".ot", ".tflite", ".zip"), "'gpt2x formats' lists what it writes"
    ),
}
TORCH_NAMES = {"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16"}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Saved:
    """What was written."""

    path: Path
    format: str
    bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Job:
    """What a writer is to write, and where."""

    checkpoint: Checkpoint
    path: Path
    force: bool
    dtype: str | None  # of GGUF alone; any other checkpoint is cast by now
    max_shard_size: int | None


def save_checkpoint(
    checkpoint: Checkpoint,
    path: str | Path,
    to: str | None = None,
    *,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
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
        dtype: number format of the weights: F64, F32, F16, BF16, or of GGUF Q8_0; by default each tensor's own. In GGUF it
            is that of the matrices, for llama.cpp wants positions, biases and norms in float32.
        max_shard_size: of a directory in Hugging Face's layout: start another file before one would be larger. Bytes, or
            text such as "5GB" or "500MiB".
        force: replace what is there.
        progress: called with the number of tensor bytes read, as they are read.
        warn: called with a sentence where a tensor holds NaN or infinity.

    Raises:
        DestinationError: if the destination exists or cannot be written, or the format has no such option.
        ConversionError: if the source turns out to be damaged, or the format cannot hold the model.
    """
    path, kind = check_destination(path, to, dtype, max_shard_size)
    if force:
        _check_source(checkpoint, path)
    if dtype and kind != "gguf":
        checkpoint = checkpoint.cast(DTYPES[dtype])
    size = size_of(max_shard_size) if max_shard_size is not None else None
    job = _Job(watched(checkpoint, progress, warn), path, force, dtype, size)
    files, notes = WRITERS[kind](job)
    return Saved(path, kind, sum(file.stat().st_size for file in files), tuple(notes))


def check_destination(
    path: str | Path, to: str | None = None, dtype: str | None = None, max_shard_size: str | int | None = None
) -> tuple[Path, str]:
    """The destination and its format.

    Raises:
        DestinationError: if there is no such format, or it has no such option.
    """
    if str(path) in ("", "-"):
        raise DestinationError(
            f"the destination is {'an empty name' if not str(path) else 'no file: there is no writing to a pipe'}"
        )
    path = Path(path)
    kind = to or format_of(path)
    if kind not in WRITERS:
        raise DestinationError(f"{kind!r} is not a format that is written; those are {', '.join(WRITERS)}")
    writes = next(f.writes for f in FORMATS if f.name == kind)
    if dtype and dtype not in writes:
        advice = f"; name it {path.stem}.gguf, or say --to gguf" if dtype == "Q8_0" else ""
        raise DestinationError(f"{path}: {kind} holds {', '.join(writes)}, not {dtype}{advice}")
    if max_shard_size is not None:
        size_of(max_shard_size)
        if kind != "hf":
            raise DestinationError(f"{path}: only a directory in Hugging Face's layout is written in several files")
    return path, kind


def _check_source(checkpoint: Checkpoint, path: Path) -> None:
    """Refuse to replace one of several files that the source is made of, for the others are worth nothing without it.

    Raises:
        DestinationError: if ``path`` is one of them, by the same name in the same folder.
    """
    source = [checkpoint.source, Path(f"{checkpoint.source}.index")] if checkpoint.source else []
    parts = {part.parent.resolve() / part.name for part in (*checkpoint.files, *source) if part.is_file()}
    if len(parts) > 1 and path.parent.resolve() / path.name in parts:
        raise DestinationError(
            f"{path}: is a part of the source, which is not replaced by the whole; choose another name"
        )


def format_of(path: Path) -> str:
    """The format that a destination's suffix asks for."""
    suffix = path.suffix.lower()
    if suffix in OTHER_SUFFIXES:
        raise DestinationError(f"{path}: gpt2x convert does not write {suffix}; {OTHER_SUFFIXES[suffix]}")
    return SUFFIXES.get(suffix, "hf")


def size_of(text: str | int) -> int:
    """A number of bytes, as "5GB" or "500MiB" say it.

    Raises:
        DestinationError: if it is not one.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?)\s*([KMG]I?B)", str(text).strip().upper())
    size = text if isinstance(text, int) else int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size <= 0:
        raise DestinationError(f"{text!r} is not a size; write 5GB, 1.5GB or 200MiB")
    return size


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

        origin = watch(name, tensor.transpose_of) if tensor.transpose_of else None
        return replace(tensor, stream=stream, transpose_of=origin)

    return replace(checkpoint, tensors={name: watch(name, tensor) for name, tensor in checkpoint.tensors.items()})


# ------------------------------------------------------------------------------------------------------ writers


def _save_safetensors(job: _Job) -> tuple[list[Path], list[str]]:
    tensors = HF.write(job.checkpoint.tensors, job.checkpoint.config)
    with new_file(job.path, job.force) as out:
        safetensors.write_safetensors(out, tensors, to_hf(job.checkpoint.config))
    return [job.path], []


def _save_bin(job: _Job) -> tuple[list[Path], list[str]]:
    from .containers import torch_zip

    tensors = HF.write(job.checkpoint.tensors, job.checkpoint.config)
    with new_file(job.path, job.force) as out:
        torch_zip.write_torch_zip(out, tensors, to_hf(job.checkpoint.config))
    return [job.path], []


def _save_nanogpt(job: _Job) -> tuple[list[Path], list[str]]:
    from .containers import torch_zip

    config = job.checkpoint.config
    tensors = NANOGPT.write(job.checkpoint.tensors, config)
    with new_file(job.path, job.force) as out:
        torch_zip.write_torch_zip(out, tensors, to_hf(config), to_model_args(config))
    exact = config.activation_function == "gelu"
    note = "nanoGPT's model.py computes the exact GELU since 2023, and this model wants the tanh form: there, nn.GELU(approximate='tanh')"
    return [job.path], [] if exact else [note]


def _save_llmc(job: _Job) -> tuple[list[Path], list[str]]:
    from .containers import llmc

    config = job.checkpoint.config
    kinds = {tensor.dtype.name for tensor in job.checkpoint.tensors.values()}
    dtype = BF16 if kinds == {"BF16"} else F32
    _check_widening(kinds, "llmc")
    tensors = LLMC.write(job.checkpoint.cast(dtype).tensors, config)
    with new_file(job.path, job.force) as out:
        llmc.write_llmc(out, tensors, to_llmc(config), dtype)
    return [job.path], []


def _save_gguf(job: _Job) -> tuple[list[Path], list[str]]:
    from .containers import gguf

    checkpoint = job.checkpoint
    dtype = DTYPES.get(job.dtype) if job.dtype else None
    if not job.dtype:
        _check_widening({tensor.dtype.name for tensor in checkpoint.tensors.values()}, "gguf")
    tensors: dict[str, LazyTensor] = {}
    matrices = []
    for name, tensor in checkpoint.tensors.items():
        matrix = len(tensor.shape) == 2 and name != "wpe.weight"
        wanted = (dtype or (F32 if job.dtype else tensor.dtype)) if matrix else F32
        tensors[name] = tensor.cast(wanted, name)
        matrices += [GGUF.layout(name)[0]] if matrix else []
    written = GGUF.write(tensors, checkpoint.config)
    quantised = [n for n in matrices if job.dtype == "Q8_0" and written[n].shape[-1] % gguf.BLOCK == 0]
    kind = "Q8_0" if quantised else tensors["wte.weight"].dtype.name
    vocabulary = checkpoint.tokenizer.vocabulary() if checkpoint.tokenizer else None
    tokenizer = gguf.tokenizer_metadata(vocabulary, checkpoint.config.n_vocab) if vocabulary else gguf.NO_TOKENIZER
    metadata = {
        "general.architecture": gguf.ARCHITECTURE,
        "general.file_type": gguf.FILE_TYPES[kind],
        **({"general.quantization_version": 2} if quantised else {}),
        **to_gguf(checkpoint.config),
        **tokenizer,
    }
    with new_file(job.path, job.force) as out:
        gguf.write_gguf(out, written, metadata, quantised)
    notes = [f"{NO_TOKENIZER}. Without one, llama.cpp takes token ids only"] if not vocabulary else []
    notes += _tokenizer_notes(checkpoint, prefix=False) if vocabulary else []
    if job.dtype == "Q8_0":
        whole = (
            f"; {len(matrices) - len(quantised)} whose rows are not of 32 are written in F32"
            if len(quantised) < len(matrices)
            else ""
        )
        notes.append(f"Q8_0 is lossy: {len(quantised)} matrices are rounded to 8 bits{whole}")
    return [job.path], notes


def _check_widening(kinds: set[str], form: str) -> None:
    if "F64" in kinds:
        raise CheckpointError(
            f"{form} holds no float64 weights; say which format they are to be rounded to: --dtype fp32"
        )


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


def _save_hf(job: _Job) -> tuple[list[Path], list[str]]:
    checkpoint = job.checkpoint
    small = hf_companions(checkpoint)
    tensors = HF.write(checkpoint.tensors, checkpoint.config)
    with new_directory(job.path, job.force, rivals) as stage:
        write_small(stage, small)
        _write_shards(stage, _sharded(tensors, job.max_shard_size), to_hf(checkpoint.config))
        files = [job.path / file.name for file in stage.iterdir()]
    said = [NO_TOKENIZER] if not checkpoint.tokenizer else _tokenizer_notes(checkpoint)
    limit, (most, name) = job.max_shard_size, max((tensor.nbytes, name) for name, tensor in tensors.items())
    notes = [f"{name} alone has {most:,} bytes, more than {limit:,}"] if limit and most > limit else []
    return files, notes + said


def _tokenizer_notes(checkpoint: Checkpoint, prefix: bool = True) -> list[str]:
    """What is odd about the tokenizer that goes along; ``prefix``: whether the result can say ``add_prefix_space``."""
    assert checkpoint.tokenizer
    vocabulary, n_vocab = checkpoint.tokenizer.vocabulary(), checkpoint.config.n_vocab
    most = max(vocabulary.ids.values())
    notes = [f"the tokenizer has a token {most}, the model only {n_vocab}"] if most >= n_vocab else []
    if vocabulary.add_prefix_space and not prefix:
        notes.append("the tokenizer puts a space before a text (add_prefix_space), which the result cannot say")
    return notes


def _sharded(tensors: Mapping[str, LazyTensor], limit: int | None) -> list[dict[str, LazyTensor]]:
    """The tensors in order, cut where a file would be larger than ``limit``; a larger tensor has a file of its own."""
    shards: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if limit is not None and shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_shards(stage: Path, shards: list[dict[str, LazyTensor]], config: dict[str, Any]) -> None:
    """One file, or several with the index that says what lies where; as ``save_pretrained`` names them."""
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, tensors in zip(names, shards, strict=True):
        with new_file(stage / name) as out:
            safetensors.write_safetensors(out, tensors, config)
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
        places = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        write_small(stage, {"model.safetensors.index.json": to_json(index)})


def _save_tf(job: _Job) -> tuple[list[Path], list[str]]:
    checkpoint = job.checkpoint
    tensors = OPENAI.write(checkpoint.tensors, checkpoint.config)
    small = {
        "hparams.json": to_json(to_hparams(checkpoint.config)),
        "checkpoint": b'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n',
    }
    notes = [] if checkpoint.tokenizer else [NO_TOKENIZER]
    if checkpoint.tokenizer:
        small |= openai_files(checkpoint.tokenizer)
        notes = _tokenizer_notes(checkpoint, prefix=False)
        vocabulary = checkpoint.tokenizer.vocabulary()
        if vocabulary.added:
            notes += [
                f"OpenAI's layout cannot mark added tokens, which will be read as text: {', '.join(vocabulary.added)}"
            ]
        if vocabulary.ids.get(END_OF_TEXT) != checkpoint.config.eos_token_id:
            notes += [
                f"OpenAI's layout has no place for token ids; that of the end, {checkpoint.config.eos_token_id}, is lost"
            ]
    with new_directory(job.path, job.force, rivals) as stage:
        write_small(stage, small)
        tf_bundle.write_bundle(stage / "model.ckpt", tensors)
        return [job.path / file.name for file in stage.iterdir()], notes


def rivals(path: Path) -> list[str]:
    """The files of a directory that ``open_checkpoint`` would take for weights, configuration or tokenizer."""
    weights = {*WEIGHTS, *OTHERS, *MODELS}
    names = {*weights, "config.json", "hparams.json", "checkpoint", "tokenizer.json", *sum(PAIRS, ()), *EXTRA}
    return sorted(p.name for p in path.iterdir() if p.name in names or p.suffix == ".index")


def write_small(stage: Path, files: Mapping[str, bytes]) -> None:
    """Write files of these names and contents."""
    for name, data in files.items():
        with new_file(stage / name) as out:
            out.write(data)


def to_json(value: Mapping[str, Any]) -> bytes:
    """A JSON file for people to read."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


NO_TOKENIZER = "no tokenizer beside the source, so none in the result; --tokenizer DIR says where one is"

WRITERS: dict[str, Callable[[_Job], tuple[list[Path], list[str]]]] = {
    "safetensors": _save_safetensors,
    "bin": _save_bin,
    "hf": _save_hf,
    "tf": _save_tf,
    "nanogpt": _save_nanogpt,
    "llmc": _save_llmc,
    "gguf": _save_gguf,
}
