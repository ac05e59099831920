"""Which files an ONNX export writes, replaces and keeps. Whatever can be refused before the work is refused here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from converters import Checkpoint, ConfigError, ConversionError, DestinationError, TokenizerError, find_tokenizer
from converters.containers.onnx import external_files, read_metadata
from converters.formats import WEIGHTS
from converters.io.json import read_json
from converters.io.publishing import check_free, check_tree
from converters.saving import hf_companions, rivals, to_json
from converters.tensors import F32
from converters.tokenizer import same_tokenizer

from .. import contract
from ..contract import models_in
from ..precisions import FP32, PRECISIONS, Precision
from ..task_heads import TaskHeads, config_json, heads_of
from ..tasks import EXTRAS, GENERATION, LOGITS
from .adapters import RunTimeAdapter, changed_projections
from .client_files import Locations, genai_config, metadata, with_transformers_js
from .onnx_graph import unknown_opset
from .options import ExportOptions
from .single_file import MAX_SINGLE_FILE, too_large

README = "README.md"
CONFIG = "config.json"
GENAI = "genai_config.json"
GENERATION_CONFIG = "generation_config.json"
SAFETENSORS = "model.safetensors"
TOKENIZER = "tokenizer.json"
INDEX = "model.safetensors.index.json"
# Keys of the metadata that all models of a directory have in common -> what they are, for messages.
COMMON = {
    contract.TASK: "task is",
    contract.OUTPUTS: "outputs are",
    contract.CACHE: "cache is",
    contract.LOGITS: "logits are",
}
DEFAULTS = {contract.TASK: GENERATION, contract.OUTPUTS: LOGITS}  # of keys that may be absent
NO_TOKENIZER = """no tokenizer beside {source}. Without one, onnxruntime-genai and transformers.js do not load the directory, \
and every other client must bring its own.
Say where one is: --tokenizer DIR. Or export without one: --no-tokenizer"""


@dataclass(frozen=True)
class Request:
    """What is exported, how, and where.

    Args:
        force: replace existing files.
        need_tokenizer: refuse a checkpoint without a tokenizer.
        adapters: those of the options, opened.
    """

    checkpoint: Checkpoint
    path: Path
    options: ExportOptions
    force: bool = False
    need_tokenizer: bool = True
    adapters: Sequence[RunTimeAdapter] = ()

    @property
    def lora(self) -> list[str]:
        """The projections that take factors of adapters."""
        return changed_projections(self.checkpoint, self.adapters)

    def graphs(self, precision: Precision) -> dict[str, list[str]]:
        """The ONNX files of a precision -> the projections that have inputs for adapters.

        Without an adapter, these inputs would cost time at each token: the model itself has none, and a second graph has
        them. A file that also holds the weights is not written twice.
        """
        model = precision.model_file
        if self.options.single_file or not self.lora:
            return {model: self.lora}
        return {model: [], contract.lora_file(model): self.lora}

    def adapter_model(self, precision: str) -> str:
        """The ONNX file that takes adapters; the model itself if there are none."""
        return list(self.graphs(PRECISIONS[precision]))[-1]

    @cached_property
    def heads(self) -> TaskHeads:
        """The heads that the task and its outputs need.

        Raises:
            ConversionError: if the checkpoint does not have them, or their settings are invalid.
        """
        return heads_of(self.checkpoint, self.options.task, self.options.outputs)

    @property
    def is_home(self) -> bool:
        """Whether the destination is the source's own directory."""
        source = self.checkpoint.source
        is_changed = self.checkpoint.adapter is not None
        return (
            source is not None
            and not is_changed
            and self.path.is_dir()
            and source.parent.resolve() == self.path.resolve()
        )


@dataclass(frozen=True)
class Plan:
    """What is written into a directory.

    Args:
        others: precisions that are in the directory already, and stay.
        kept: whether all other files of the directory stay.
        small: name -> contents of the files that are known before the work.
        large: names of the models and of their weights, and of adapters.
        adapters: those that are not in the directory yet.
        card: the name of the model card; None if somebody else's README stays.
        superseded: files that only replaced models use, which are removed.
    """

    others: list[str]
    kept: bool
    small: dict[str, bytes]
    large: list[str]
    adapters: list[RunTimeAdapter]
    card: str | None
    superseded: list[str]

    def rivals(self, path: Path) -> list[str]:
        """Files that would stay and be read together with the new ones. Empty if all are meant to stay."""
        if self.kept:
            return []
        models = (path / "onnx").glob("*.onnx*") if (path / "onnx").is_dir() else []
        found = [*rivals(path), *sorted(f"onnx/{file.name}" for file in models)]
        return [name for name in found if name not in self.superseded]


def make_plan(request: Request, checksums: Future[dict[str, str]]) -> Plan:
    """Decide what is written.

    Args:
        checksums: of the source's files, which are computed meanwhile.

    Raises:
        TokenizerError: if there is no tokenizer and one is needed.
        DestinationError: if the destination cannot be written.
        ConversionError: if the options do not fit the model.
        ValueError: if calibration has a token id that is not the model's.
    """
    _check_model(request)
    there = models_in(request.path)
    others = [precision for precision in there if precision not in request.options.precisions]
    _check_others(request, {precision: there[precision] for precision in others}, checksums)
    kept = request.is_home or bool(others)
    if request.is_home:
        _check_home(request)
    elif not kept:
        check_free(request.path, request.force, directory=True)
    if any(there[precision].parent != request.path / "onnx" for precision in others):
        raise DestinationError(
            f"{request.path}: its models lie in it, not in its folder onnx/; export to another directory"
        )
    small = _small_files(request, others, kept)
    adapters = [adapter for adapter in request.adapters if not (kept and adapter.is_in(request.path / adapter.file))]
    large = [*_large_files(request, kept), *(adapter.file for adapter in adapters)]
    if kept:
        _check_large(request, large)
    card = _card_name(request, kept)
    check_tree(request.path, [Path(name) for name in (*small, *large, *([card] if card else []))])
    return Plan(others, kept, small, large, adapters, card, _superseded(request, there))


# ------------------------------------------------------------------------------------------------------- the model


def _check_model(request: Request) -> None:
    """Refuse options that do not fit the model."""
    checkpoint, options, path = request.checkpoint, request.options, request.path
    n_vocab = checkpoint.config.n_vocab
    for token in options.calibration or ():
        if not 0 <= token < n_vocab:
            raise ValueError(f"calibration has token id {token}; the model's vocabulary is {n_vocab}")
    if request.need_tokenizer and checkpoint.tokenizer is None:
        raise TokenizerError(NO_TOKENIZER.format(source=checkpoint.source or "the model"))
    _ = request.heads
    _check_adapter_heads(request)
    if contract.stays(options.cache) and checkpoint.config.head_dim % 8:
        raise ConfigError(
            f"a cache in place (GroupQueryAttention) needs a head dimension that is a multiple of 8, this model has "
            f"{checkpoint.config.head_dim}: export it with --cache growing"
        )
    if path.name == "onnx" and any(path / "onnx" not in file.parents for file in models_in(path).values()):
        raise DestinationError(
            f"{path}: holds models itself; the directory to export to is the one above, {path.parent}"
        )
    check_size(checkpoint, options)
    for precision in options.chosen:
        if options.opset is not None and options.opset < precision.min_opset:
            raise unknown_opset(precision, options.cache, precision.min_opset, options.opset)


def _check_adapter_heads(request: Request) -> None:
    """Refuse adapters at run time that replace the head of an output: the model has the base's alone."""
    kinds = {EXTRAS.get(name): name for name in request.options.outputs}
    for one in request.adapters:
        for head in one.adapter.heads:
            if head.kind in kinds:
                raise ConversionError(
                    f"{one.adapter.path}: it replaces the head of {kinds[head.kind]}, which cannot be done at run time. "
                    "Merge the adapter: pass its directory without a name before it"
                )


def check_size(checkpoint: Checkpoint, options: ExportOptions) -> None:
    """Refuse single files that would exceed protobuf's limit.

    Raises:
        ConversionError: if one would.
    """
    if not options.single_file:
        return
    for precision in options.chosen:
        least = checkpoint.parameters * precision.bytes_per_weight
        if least > MAX_SINGLE_FILE:
            raise too_large(precision.model_file, int(least))


# ------------------------------------------------------------------------------------------------- what is there


def _check_others(request: Request, others: Mapping[str, Path], checksums: Future[dict[str, str]]) -> None:
    """Refuse to put precisions of another model, or with another cache, beside those that are there."""
    found = {file: _metadata_of(file) for file in others.values()}
    known = {digest for facts in found.values() for digest in _digests(facts.get(contract.CHECKSUMS, ""))}
    for file, facts in found.items():
        ours = metadata(
            request.checkpoint, checksums.result(), FP32, request.options, request.lora, request.heads.labels
        )
        if contract.CONFIG not in facts:
            raise DestinationError(f"{file}: not a model that gpt2x wrote; export to another directory")
        faults = _differences(facts, ours)
        if not _is_own_source(request.checkpoint, file):
            digests = set(_digests(ours[contract.CHECKSUMS]))
            if not digests <= known or bool(digests) != bool(known):
                faults.append("its source is another")
        if faults:
            raise DestinationError(
                f"{file}: cannot be in one directory with this export: {'; '.join(faults)}. "
                "Export with the same options and source, or to another directory"
            )


def _differences(found: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """What all models of one directory must have in common, and these two have not."""
    faults = [
        f"its {what} {found.get(key)}, this export's {ours.get(key)}"
        for key, what in COMMON.items()
        if found.get(key, DEFAULTS.get(key)) != ours.get(key, DEFAULTS.get(key))
    ]
    if found.get(contract.LORA) != ours.get(contract.LORA):
        faults.append("its adapters are others (--adapter NAME=DIR)")
    if found[contract.CONFIG] != ours[contract.CONFIG]:
        faults.append("its configuration is another")
    return faults


def _is_own_source(checkpoint: Checkpoint, file: Path) -> bool:
    """Whether a checkpoint was opened from the directory of a model: an export can be the source of more precisions."""
    if checkpoint.adapter:
        return False
    here = {beside.resolve() for beside in file.parent.iterdir()}
    return bool(here.intersection(source.resolve() for source in checkpoint.files))


def _digests(checksums: str) -> list[str]:
    try:
        return [str(digest) for digest in json.loads(checksums).values()]
    except (ValueError, AttributeError):
        return []


def _metadata_of(file: Path) -> dict[str, str]:
    try:
        return read_metadata(file)
    except ConversionError:  # another program's file, which can hold anything
        return {}


def _check_home(request: Request) -> None:
    """Refuse to change the source: its weights, which may have the name of the model's weights, and its tokenizer."""
    path, checkpoint = request.path, request.checkpoint
    changed = checkpoint.left_out or any(tensor.dtype != F32 for tensor in checkpoint.tensors.values())
    for weights in (path / "onnx" / name for name in (FP32.data_file, contract.OLD_WEIGHTS)):
        is_source = any(file.exists() and weights.exists() and file.samefile(weights) for file in checkpoint.files)
        if is_source and changed:
            raise DestinationError(
                f"{weights}: is the source itself, and the export would change it; export to another directory"
            )
    here, wanted = find_tokenizer(path), checkpoint.tokenizer
    if here and wanted and not same_tokenizer(here, wanted):
        raise DestinationError(f"{path}: has a tokenizer of its own, which is another; export to another directory")


def weights_of(file: Path, precision: str) -> str | None:
    """The name of the file of weights beside a model, if gpt2x gave it that name."""
    try:
        names = external_files(file)
    except ConversionError:  # another program's file, which can hold anything
        return None
    return next((name for name in (contract.data_file(precision), contract.OLD_WEIGHTS) if name in names), None)


def locations(request: Request, others: list[str]) -> Locations:
    """Precision -> the file with its weights, of the new models and of those that stay."""
    options = request.options
    ours = {precision.name: options.location(precision) for precision in options.chosen}
    return {**ours, **{name: weights_of(request.path / contract.model_file(name), name) for name in others}}


# ---------------------------------------------------------------------------------------------------- the new files


def _small_files(request: Request, others: list[str], kept: bool) -> dict[str, bytes]:
    """Configuration and tokenizer. In a directory that is kept, what is missing and what describes the new models."""
    checkpoint, options = request.checkpoint, request.options
    files = hf_companions(checkpoint.cast(F32))
    if options.task != GENERATION:
        own = config_json(checkpoint, options.task, request.heads.labels)
        files[CONFIG] = to_json({**json.loads(files[CONFIG]), **own})
        del files[GENERATION_CONFIG]
    there = request.path / CONFIG
    config = there.read_bytes() if kept and there.is_file() else files[CONFIG]
    files[CONFIG] = with_transformers_js(config, there, locations(request, others), options.cache)
    if options.task == GENERATION:
        files[GENAI] = to_json(
            genai_config(
                checkpoint.config, request.adapter_model(options.precisions[0]), options.cache, lora=bool(request.lora)
            )
        )
    if not kept:
        return files
    return {name: data for name, data in files.items() if _is_renewed(request.path / name, data, others)}


def _is_renewed(file: Path, data: bytes, others: list[str]) -> bool:
    """Whether a small file is written into a directory that is kept."""
    if not os.path.lexists(file):
        return True
    if file.name == CONFIG:
        return file.read_bytes() != data
    return file.name == GENAI and not others


def _large_files(request: Request, kept: bool) -> list[str]:
    """The names of the models, and of the weights for ``transformers`` unless a directory that is kept has some."""
    options = request.options
    names = [name for precision in options.chosen for name in request.graphs(precision)]
    if not options.single_file:
        names += [f"onnx/{precision.data_file}" for precision in options.chosen]
    has_weights = kept and any(os.path.lexists(request.path / name) for name in WEIGHTS)
    return [*names, SAFETENSORS] if options.safetensors and not has_weights else names


def _check_large(request: Request, large: list[str]) -> None:
    """Refuse to replace models of a directory that is kept, unless ``force`` is given."""
    for file in (request.path / name for name in large):
        if os.path.lexists(file) and not request.force:
            raise DestinationError(f"{file}: already exists; pass --force to replace it")


def _card_name(request: Request, kept: bool) -> str | None:
    """Where the model card goes: in the source's own directory, not over a README that is somebody else's."""
    readme = request.path / README
    ours = not os.path.lexists(readme) or _is_ours(readme)
    if request.is_home:
        return README if ours else f"onnx/{README}"
    return README if ours or not kept else None


def _is_ours(readme: Path) -> bool:
    return readme.is_file() and b"Written by gpt2x" in readme.read_bytes()[: 1 << 16]


def _superseded(request: Request, there: Mapping[str, Path]) -> list[str]:
    """Files of weights that only replaced models use; never the source's."""
    options, checkpoint, path = request.options, request.checkpoint, request.path
    names = []
    for precision in options.precisions:
        graph = contract.lora_file(contract.model_file(precision))
        if graph not in request.graphs(PRECISIONS[precision]):
            names.append(graph)
        old = weights_of(there[precision], precision) if precision in there else None
        if old and old != options.location(PRECISIONS[precision]):
            names.append(f"onnx/{old}")
    if f"onnx/{contract.OLD_WEIGHTS}" in names and _indexes_only(path / INDEX, names):
        names.append(INDEX)
    sources = {file.resolve() for file in (*checkpoint.files, checkpoint.source) if file}
    if any((path / name).resolve() in sources for name in names):
        return []
    return [name for name in names if (path / name).is_file()]


def _indexes_only(index: Path, names: list[str]) -> bool:
    """Whether a shard index names no files but these."""
    places = read_json(index).get("weight_map") if index.is_file() else None
    return isinstance(places, dict) and set(map(str, places.values())) <= set(names)
