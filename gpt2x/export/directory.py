"""The directory around an ONNX model: one that ONNX Runtime, onnxruntime-genai, optimum, transformers.js and
transformers all load as it is, with one copy of the weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters import Checkpoint, DestinationError, TokenizerError, find_tokenizer
from converters.config import to_hf
from converters.dialects import HF
from converters.files import File, check_free, check_tree, new_directory, new_file
from converters.formats import Progress, Warn, hf_companions, rivals, to_json, watched, write_small
from converters.safetensors_file import write_safetensors
from converters.spec import GPT2Config
from converters.tensors import F32, LazyTensor
from gpt2x import __version__, contract

from .card import model_card
from .onnx import Place, to_onnx

INDEX = "model.safetensors.index.json"
NO_TOKENIZER = """no tokenizer beside {source}. Without one, onnxruntime-genai and transformers.js do not load the directory, \
and every other client must bring its own.
Say where one is: --tokenizer DIR. Or go on without: --no-tokenizer"""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    bytes: int
    files: tuple[str, ...]


def export_onnx(
    checkpoint: Checkpoint,
    path: str | Path,
    *,
    last: bool = False,
    force: bool = False,
    need_tokenizer: bool = True,
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> Exported:
    """Write a checkpoint as a directory with an ONNX model in float32. It appears whole, or not at all.

    Into the directory of the source itself, only ``onnx/`` and what is missing beside it are added.

    Args:
        last: compute the logits of the last position only.
        force: replace what is there.
        need_tokenizer: refuse a checkpoint without one.
        progress: called with the number of tensor bytes read, as they are read.
        warn: called with a sentence where a tensor holds NaN or infinity.

    Raises:
        TokenizerError: if there is no tokenizer and one is needed.
        DestinationError: if the destination exists or cannot be written.
        ConversionError: if the source turns out to be damaged.
    """
    path = Path(path)
    if need_tokenizer and checkpoint.tokenizer is None:
        raise TokenizerError(NO_TOKENIZER.format(source=checkpoint.source or "the model"))
    at_home = _is_source(path, checkpoint)
    if at_home:
        _check_home(path, checkpoint)
    else:
        check_free(path, force, directory=True)
    small = _small_files(checkpoint, path, last, at_home)
    names = [*small, contract.MODEL, f"onnx/{contract.WEIGHTS}"]
    if at_home:
        small = {n: data for n, data in small.items() if n.startswith("onnx/") or not os.path.lexists(path / n)}
        there = (name for name in names if name.startswith("onnx/") and os.path.lexists(path / name))
        if not force and (name := next(there, None)):
            raise DestinationError(f"{path / name}: exists already; --force replaces it")
    check_tree(path, [Path(name) for name in names if name in small or name.startswith("onnx/")])
    with ThreadPoolExecutor(1) as pool:
        checksums = pool.submit(_checksums, checkpoint)
        with new_directory(path, force or at_home, None if at_home else _rivals) as stage:
            (stage / "onnx").mkdir()
            write_small(stage, small)
            _write_model(stage, watched(checkpoint.cast(F32), progress, warn), last, checksums)
            written = [file for file in stage.rglob("*") if file.is_file()]
            total = sum(file.stat().st_size for file in written)
            files = tuple(sorted(str(file.relative_to(stage)) for file in written))
    return Exported(path, total, files)


def _is_source(path: Path, checkpoint: Checkpoint) -> bool:
    return checkpoint.source is not None and path.is_dir() and checkpoint.source.parent.resolve() == path.resolve()


def _check_home(path: Path, checkpoint: Checkpoint) -> None:
    """Refuse to change what the source is: its weights, which may lie where the model's go, and its tokenizer."""
    weights = path / "onnx" / contract.WEIGHTS
    own = any(file.exists() and weights.exists() and file.samefile(weights) for file in checkpoint.files)
    if own and (checkpoint.left_out or any(tensor.dtype != F32 for tensor in checkpoint.tensors.values())):
        raise DestinationError(
            f"{weights}: is the source itself, and would become another; export to another directory"
        )
    here, wanted = find_tokenizer(path), checkpoint.tokenizer
    if here and wanted and here.vocabulary() != wanted.vocabulary():
        raise DestinationError(f"{path}: has a tokenizer of its own, which is another; export to another directory")


def _rivals(path: Path) -> list[str]:
    """What would be read together with the new files; other precisions of another model among them."""
    models = (path / "onnx").glob("*.onnx") if (path / "onnx").is_dir() else []
    return [*rivals(path), *sorted(f"onnx/{file.name}" for file in models)]


def _small_files(checkpoint: Checkpoint, path: Path, last: bool, at_home: bool) -> dict[str, bytes]:
    config = checkpoint.config
    fp32 = checkpoint.cast(F32)
    has_tokenizer = checkpoint.tokenizer is not None
    card = model_card(config, last=last, tokenizer=has_tokenizer, source=_name(checkpoint), at_home=at_home)
    files = hf_companions(fp32)
    files["genai_config.json"] = to_json(genai_config(config))
    files[_card_place(path) if at_home else "README.md"] = card.encode()
    if not at_home:
        files[INDEX] = to_json(_index(HF.write(fp32.tensors, config)))
    return files


def _card_place(home: Path) -> str:
    """Where the card goes in the source's own directory: not over a README that is somebody else's."""
    readme = home / "README.md"
    if not os.path.lexists(readme):
        return "README.md"
    ours = readme.is_file() and b"Written by gpt2x" in readme.read_bytes()[: 1 << 16]
    return "README.md" if ours else "onnx/README.md"


def _index(tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    where = f"onnx/{contract.WEIGHTS}"
    return {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": dict.fromkeys(sorted(tensors), where),
    }


def _name(checkpoint: Checkpoint) -> str:
    return checkpoint.source.name if checkpoint.source else "memory"


def _checksums(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of each file of weights, by base name: what model hubs show, and ``sha256sum`` prints."""
    return {file.name: _sha256(file) for file in checkpoint.files}


def _sha256(path: Path) -> str:
    digest, file = hashlib.sha256(), File(path)
    for chunk in file.chunks(0, file.size):
        digest.update(chunk)
    return digest.hexdigest()


def _write_model(stage: Path, checkpoint: Checkpoint, last: bool, checksums: Future[dict[str, str]]) -> None:
    config = checkpoint.config
    tensors = HF.write(checkpoint.tensors, config)
    with new_file(stage / "onnx" / contract.WEIGHTS) as out:
        spans = write_safetensors(out, tensors, to_hf(config))
    places = {
        name: Place(tensor.shape, spans[HF.layout(name)[0]][0], tensor.nbytes)
        for name, tensor in checkpoint.tensors.items()
    }
    model = to_onnx(config, places, metadata(checkpoint, checksums.result(), last), last=last)
    with new_file(stage / contract.MODEL) as out:
        out.write(model.SerializeToString(deterministic=True))


def metadata(checkpoint: Checkpoint, checksums: Mapping[str, str], last: bool) -> dict[str, str]:
    """The model's ``metadata_props``: what it is, and what it came from."""
    return {
        contract.CONTRACT: contract.VERSION,
        contract.WRITER: __version__,
        contract.SOURCE: _name(checkpoint),
        contract.CHECKSUMS: json.dumps(checksums, sort_keys=True),
        contract.CONFIG: json.dumps(to_hf(checkpoint.config), sort_keys=True),
        contract.PRECISION: "fp32",
        contract.CACHE: "growing",
        contract.LOGITS: "last" if last else "all",
    }


def genai_config(config: GPT2Config) -> dict[str, Any]:
    """The ``genai_config.json`` of onnxruntime-genai, which refuses unknown keys."""
    end = config.eos_token_id if config.eos_token_id is not None else config.n_vocab - 1
    begin = config.bos_token_id if config.bos_token_id is not None else end
    pad = config.pad_token_id if config.pad_token_id is not None else end
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": contract.MODEL,
        "head_size": config.head_dim,
        "hidden_size": config.n_embd,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head,
        "num_hidden_layers": config.n_layer,
        "inputs": {
            **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    tokens = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad, "vocab_size": config.n_vocab}
    return {
        "model": {"type": "decoder", **tokens, "context_length": config.n_ctx, "decoder": decoder},
        "search": {"max_length": config.n_ctx, "num_beams": 1, "past_present_share_buffer": False},
    }
