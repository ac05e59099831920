"""Two steps, if there is an adapter: open it, apart from its base; and merge it into the assembled checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..adapter_config import (
    CONFIG_FILE,
    WEIGHT_FILES,
    AdapterConfig,
    adapter_folder,
    described,
    how_to_merge,
    is_merged,
    not_a_model,
    read_adapter_config,
)
from ..adapters import MARKS, MAX_NAME, Adapter, read_adapter, split
from ..checkpoint import Checkpoint
from ..containers.container import Container
from ..dtypes import DTYPES, NAMES
from ..errors import CheckpointError, ConfigError, FormatError
from ..io.reading import check_name, files_in
from ..lora import changed
from ..spec import LM_HEAD
from ..tokenizer import find_tokenizer
from ..values import any_ends_with
from .adapted_embeddings import WTE, merge_embeddings, with_shared_matrix
from .find import Source
from .open import open_file

BASE = (WTE, "wpe.weight", "h.0.mlp.c_fc.weight")  # a state dict with these holds a whole model


@dataclass(frozen=True)
class Opened:
    """A container with the base alone, and the adapter to merge into it.

    ``tokenizer`` is the adapter's directory, if it has a tokenizer.
    """

    base: Container
    adapter: Adapter | None = None
    tokenizer: Path | None = None


def open_adapter(source: Source, container: Container, path: str | Path | None) -> Opened:
    """Open the adapter that the user names, or the one in the same state dict as its base.

    Raises:
        CheckpointError: if the source is an adapter without its base, or the adapter is not one of a GPT-2.
        ConfigError: if the adapter has no valid configuration, or is of a type that is not merged.
        FormatError: if its files are not valid.
    """
    folder = _folder(path) if path is not None else None
    if _holds_adapter(container):
        return _apart(source, container, folder)
    if container.path.name in WEIGHT_FILES and not any_ends_with(container.tensors, WTE):
        raise not_a_model(source.path, _configuration(source.home))
    if folder is None:
        return Opened(container)
    return Opened(container, adapter_in(folder), tokenizer_beside(folder))


def _holds_adapter(container: Container) -> bool:
    """Whether tensors have the names of an adapter's, alone or with its base in one state dict."""
    return any(part in MARKS for name in container.tensors for part in name[:MAX_NAME].split("."))


def _apart(source: Source, container: Container, folder: Path | None) -> Opened:
    """The base and the adapter of one state dict, with the configuration in ``folder``, or else beside the weights."""
    base, parts = split(container.tensors)
    if not all(name in base for name in BASE):
        raise not_a_model(source.path, _configuration(source.home))
    config = _configuration(folder or source.home, f"{source.path}: a model and its LoRA adapter, not merged")
    adapter = read_adapter(source.path, (config.path,), parts, config)
    return Opened(replace(container, tensors=base), adapter)


def adapter_in(path: str | Path) -> Adapter:
    """The LoRA adapter in a directory.

    Raises:
        CheckpointError: if it is not one of a GPT-2.
        ConfigError: if it has no valid configuration, or is of a type that is not merged.
        FormatError: if its files are not valid.
    """
    folder = _folder(path)
    config = _configuration(folder)
    file = next(iter(files_in(folder, WEIGHT_FILES).values()), None)
    if file is None:
        raise FormatError(f"{folder}: no weights of an adapter (looked for {' and '.join(WEIGHT_FILES)})")
    return read_adapter(folder, (file, config.path), open_file(file).tensors, config)


def tokenizer_beside(path: str | Path) -> Path | None:
    """The directory of an adapter, if it has a tokenizer: the one of its training, which may have more tokens."""
    folder = _folder(path)
    return folder if find_tokenizer(folder) else None


def _folder(path: str | Path) -> Path:
    """The directory of the adapter that a path stands for."""
    if "://" in str(path):
        raise FormatError(f"{path}: a URL, not a path; use gpt2x.fetch to download it")
    path = Path(path)
    check_name(path)
    if not path.exists():
        raise FormatError(f"{path}: no such file or directory")
    folder = adapter_folder(path if path.is_dir() else path.parent)
    if folder is None:
        raise ConfigError(f"{path}: no {CONFIG_FILE}, so not an adapter of PEFT; pass the directory that has one")
    return folder


def _configuration(folder: Path, what: str = "") -> AdapterConfig:
    """The configuration of an adapter that can be merged.

    Args:
        what: what lacks it, for the message.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        what = what or f"{folder}: an adapter, not a whole model"
        raise ConfigError(
            f"{what}. Its scale (lora_alpha) is in {CONFIG_FILE}, which is not beside it; "
            "pass --adapter DIR with the directory that has one"
        )
    config = read_adapter_config(file)
    if not is_merged(config.kind):
        raise ConfigError(f"{folder}: {described(config.kind)}. {how_to_merge(config, folder)}")
    return config


# ------------------------------------------------------------------------------------------------------------ merge


def merge_adapter(
    checkpoint: Checkpoint,
    adapter: Adapter,
    merged_dtype: str | None = None,
    *,
    tie: bool | None = None,
    is_truncated: bool = False,
) -> Checkpoint:
    """The checkpoint with an adapter merged into it, lazily.

    Args:
        checkpoint: the base.
        adapter: the adapter.
        merged_dtype: dtype of the tensors that it changes; by default the base's.
        tie: whether an ``lm_head`` that differs from the token embedding is dropped (True). False keeps the changes of a
            tied pair apart, as in the model with its adapter; by default they are merged as by ``merge_and_unload``.
        is_truncated: whether the user asked for the number of rows of the base's token embedding, so that it stays.

    Raises:
        CheckpointError: if the adapter does not fit the base.
    """
    merged = with_shared_matrix(adapter) if checkpoint.config.tie_word_embeddings else adapter
    check_fits(checkpoint, merged, is_truncated)
    dtype = DTYPES[NAMES.get(merged_dtype, merged_dtype)] if merged_dtype else None
    tensors = dict(checkpoint.tensors)
    tensors.pop(LM_HEAD, None)
    for name in merged.touched:
        if name in tensors and name != WTE:
            tensors[name] = changed(name, tensors[name], merged, dtype)
    embeddings = merge_embeddings(checkpoint, merged, dtype, tie)
    tensors |= embeddings.tensors
    is_tied = LM_HEAD not in tensors
    heads = {head.kind: head for head in (*checkpoint.heads, *adapter.heads)}  # the adapter's replace the base's
    config = replace(checkpoint.config, n_vocab=tensors[WTE].shape[0], tie_word_embeddings=is_tied)
    note = f"merged {described(adapter.config.kind)}, {adapter.path}: {adapter.summary()}"
    return replace(
        checkpoint,
        config=config,
        tensors=tensors,
        files=(*checkpoint.files, *adapter.files),
        left_out=(*checkpoint.left_out, *adapter.left_out),
        heads=tuple(heads.values()),
        notes=(*checkpoint.notes, note, *embeddings.notes),
        adapter=adapter.path,
    )


def check_fits(checkpoint: Checkpoint, adapter: Adapter, is_truncated: bool = False) -> None:
    """Refuse an adapter of another base, in one line.

    Raises:
        CheckpointError: with the first difference.
    """
    faults = list(_misfits(checkpoint, adapter, is_truncated))
    if not faults:
        return
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    base = adapter.config.base
    advice = f"; its base is {base[:200]!r}" if base else ""
    raise CheckpointError(f"{adapter.path}: does not fit {checkpoint.source}: {faults[0]}{more}{advice}")


def _misfits(checkpoint: Checkpoint, adapter: Adapter, is_truncated: bool) -> Iterator[str]:
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    shapes.setdefault(LM_HEAD, shapes[WTE])
    for name in adapter.touched:
        if name not in shapes:
            yield f"it changes {name}, which the base with {checkpoint.config.n_layer} layers does not have"
    # Whole embeddings first: what else the adapter changes of them has their new number of rows.
    yield from _misfits_of_whole(adapter, shapes, is_truncated)
    yield from _misfits_of_factors(adapter, shapes)
    yield from _misfits_of_rows(adapter, shapes)


def _misfits_of_whole(adapter: Adapter, shapes: dict[str, tuple[int, ...]], is_truncated: bool) -> Iterator[str]:
    """Whole tensors of another shape. An embedding may have more rows, which ``shapes`` then has, too."""
    for name, tensor in adapter.replaced.items():
        expected = shapes.get(name)
        is_embedding = name in (WTE, LM_HEAD) and len(tensor.shape) == 2
        if is_embedding and not is_truncated and tensor.shape[1] == shapes[WTE][1]:
            shapes[name] = tensor.shape
        elif expected and tensor.shape != expected:
            yield f"its {name} is {list(tensor.shape)}, the base's is {list(expected)}"


def _misfits_of_factors(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name, change in adapter.factors.items():
        shape = change.shape[::-1] if name == LM_HEAD else change.shape
        if name in shapes and shape != shapes[name]:
            yield f"it changes a {list(shape)} {name}, the base's is {list(shapes[name])}"


def _misfits_of_rows(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name, rows in adapter.rows.items():
        if name not in shapes:
            continue
        shape, last = shapes[name], max(rows.indices, default=0)
        if rows.values.shape[1:] != shape[1:] or last >= shape[0]:
            yield f"it replaces rows of {name} up to {last}, the base's is {list(shape)}"
