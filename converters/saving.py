"""Write a checkpoint: check the destination, choose the writer, watch what passes through it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .checkpoint import Checkpoint
from .dtypes import NAMES, whole_items
from .errors import DestinationError, OtherTokenizerError
from .formats import BY_NAME, CONFIG_FILES, MODELS, OTHERS, WEIGHTS, WRITE_SUFFIXES, WRITERS, Format, Job
from .formats.huggingface import hf_companions
from .formats.notes import not_stored
from .io.json import to_json
from .io.publishing import write_small
from .tensors import DTYPES, LazyTensor, all_finite
from .tokenizer import NAMES as TOKENIZER_NAMES

Progress = Callable[[int], None]
Warn = Callable[[str], None]

# Suffixes that name no single format, or one that is not written -> what to do instead.
OTHER_SUFFIXES = {
    ".pt": "choose a format: --to nanogpt, or --to bin for a state dict",
    ".pth": "choose a format: --to bin for a state dict",
    ".ckpt": "--to tf writes OpenAI's layout, a directory",
    ".onnx": "'gpt2x export SRC --onnx DIR' writes ONNX",
    ".pt2": "'gpt2x export SRC --pt2 FILE' writes it",
    **dict.fromkeys(
        (".h5", ".index", ".json", ".msgpack", ".npz", ".ot", ".tflite", ".zip"), "'gpt2x formats' lists what it writes"
    ),
}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Saved:
    """What was written: where, in which format, how many bytes, and what the user should know."""

    path: Path
    format: str
    bytes: int
    notes: tuple[str, ...] = ()


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
        checkpoint: the checkpoint; its checksums are verified while it is read.
        path: the destination. Without ``to``, its suffix selects the format; any unknown suffix is a directory in
            Hugging Face's layout.
        to: one of ``WRITERS``.
        dtype: dtype of the weights, as in ``--dtype``: fp64, fp32, fp16, bf16, or q8_0 for GGUF; safetensors' names, such
            as F32, are accepted, too. Default: each tensor's own. For GGUF it is the dtype of the matrices, as llama.cpp
            requires positions, biases and norms in float32.
        max_shard_size: split the weights of a Hugging Face directory into files of at most this size: bytes, or text
            such as "5GB" or "500MiB".
        force: replace what is there.
        progress: called with the number of tensor bytes read, as they are read.
        warn: called with a sentence for each tensor with NaN or infinity.

    Raises:
        DestinationError: if the destination exists or cannot be written, or the format lacks an option.
        ConversionError: if the source turns out to be damaged, or the format cannot store the model.
    """
    path, kind = check_destination(path, to, dtype, max_shard_size)
    dtype = _file_name_of(dtype)
    entry = BY_NAME[kind]
    if force:
        _check_source(checkpoint, path)
    if dtype and not entry.casts:
        checkpoint = checkpoint.cast(DTYPES[dtype])
    size = size_of(max_shard_size) if max_shard_size is not None else None
    job = Job(watched(checkpoint, progress, warn), path, force, dtype, size, rivals)
    written = WRITERS[kind](job)
    notes = (*written.notes, *_weights_only_notes(checkpoint, entry))
    return Saved(path, kind, sum(file.stat().st_size for file in written.files), notes)


def _weights_only_notes(checkpoint: Checkpoint, entry: Format) -> list[str]:
    """The note on a tokenizer of another kind, for formats without a tokenizer. GPT-2's own is found elsewhere."""
    found = checkpoint.tokenizer
    has_tokenizer = entry.is_directory or entry.vocabulary is not None
    if found is None or has_tokenizer or not isinstance(found.fault, OtherTokenizerError):
        return []
    return [not_stored(found, entry.name)]


def check_destination(
    path: str | Path, to: str | None = None, dtype: str | None = None, max_shard_size: str | int | None = None
) -> tuple[Path, str]:
    """The destination and its format.

    Raises:
        DestinationError: if there is no such format, or it lacks an option.
    """
    if not str(path):
        raise DestinationError("the destination path is empty")
    if str(path) == "-":
        raise DestinationError("the destination is '-', but gpt2x cannot write to a pipe; pass a file name")
    path = Path(path)
    kind = to or format_of(path)
    if kind not in WRITERS:
        raise DestinationError(f"{kind!r} is not a format that gpt2x writes; it writes {', '.join(WRITERS)}")
    entry = BY_NAME[kind]
    dtype = _file_name_of(dtype)
    if dtype and dtype not in entry.writes:
        raise _no_such_dtype(path, entry, dtype)
    if max_shard_size is not None:
        size_of(max_shard_size)
        if not entry.shards:
            raise DestinationError(
                f"{path}: --max-shard-size: only a directory in Hugging Face's layout can be written in several files"
            )
    return path, kind


def _file_name_of(dtype: str | None) -> str | None:
    """The name of a dtype in files: F32 of fp32."""
    return None if dtype is None else NAMES.get(dtype, dtype)


def _no_such_dtype(path: Path, entry: Format, dtype: str) -> DestinationError:
    advice = f"; name it {path.stem}.gguf, or pass --to gguf" if dtype == "Q8_0" else ""
    return DestinationError(f"{path}: {entry.name} can store {', '.join(entry.writes)}, not {dtype}{advice}")


def _check_source(checkpoint: Checkpoint, path: Path) -> None:
    """Refuse to replace one of several files of the source, as the others are useless without it.

    Raises:
        DestinationError: if ``path`` is one of them, by the same name in the same directory.
    """
    candidates = list(checkpoint.files)
    if checkpoint.source:
        candidates += [checkpoint.source, Path(f"{checkpoint.source}.index")]
    parts = {part.parent.resolve() / part.name for part in candidates if part.is_file()}
    if len(parts) > 1 and path.parent.resolve() / path.name in parts:
        raise DestinationError(f"{path}: is one of several files of the source, which needs it; choose another name")


def format_of(path: Path) -> str:
    """The format that a destination's suffix selects."""
    suffix = path.suffix.lower()
    if suffix in OTHER_SUFFIXES:
        raise DestinationError(f"{path}: gpt2x convert does not write {suffix}; {OTHER_SUFFIXES[suffix]}")
    return WRITE_SUFFIXES.get(suffix, WRITE_SUFFIXES[""])


def size_of(text: str | int) -> int:
    """The number of bytes in text such as "5GB" or "500MiB".

    Raises:
        DestinationError: if it is not a size.
    """
    size = text if isinstance(text, int) else _parse_size(text)
    if size <= 0:
        raise DestinationError(f"{text!r} is not a size; write 5GB, 1.5GB or 200MiB")
    return size


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?)\s*([KMG]I?B)", text.strip().upper())
    return int(float(match[1]) * UNITS[match[2]]) if match else 0


def watched(checkpoint: Checkpoint, progress: Progress | None, warn: Warn | None) -> Checkpoint:
    """The same checkpoint; ``progress`` and ``warn`` are called while its tensors are read."""
    tensors = {name: _watched(name, tensor, progress, warn) for name, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors)


def _watched(name: str, tensor: LazyTensor, progress: Progress | None, warn: Warn | None) -> LazyTensor:
    def stream() -> Iterator[bytes]:
        finite = True
        for chunk in whole_items(tensor.chunks(), tensor.dtype.itemsize):
            finite = finite and all_finite(chunk, tensor.dtype)
            yield chunk
            if progress:
                progress(len(chunk))
        if not finite and warn:
            warn(f"{name} holds NaN or infinity")

    # A format of the other layout reads the tensor that this one is the transpose of.
    origin = _watched(name, tensor.transpose_of, progress, warn) if tensor.transpose_of else None
    return replace(tensor, stream=stream, transpose_of=origin)


def rivals(path: Path) -> list[str]:
    """The files of a directory that ``open_checkpoint`` would take for weights, configuration or tokenizer."""
    weights = {*WEIGHTS, *OTHERS, *MODELS, "checkpoint"}
    names = {*weights, *CONFIG_FILES, *TOKENIZER_NAMES}
    return sorted(file.name for file in path.iterdir() if file.name in names or file.suffix == ".index")


__all__ = [
    "Progress",
    "Saved",
    "Warn",
    "check_destination",
    "format_of",
    "hf_companions",
    "rivals",
    "save_checkpoint",
    "size_of",
    "to_json",
    "watched",
    "write_small",
]
