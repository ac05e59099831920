"""The directory around an ONNX model: one that ONNX Runtime, onnxruntime-genai, optimum and transformers.js load as it
is, from a disk and from the Hub, with one copy of the weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from converters import Checkpoint, ConfigError, ConversionError, DestinationError, TokenizerError, find_tokenizer
from converters.config import to_hf
from converters.containers.onnx import external_files, read_metadata
from converters.containers.safetensors import write_safetensors
from converters.dialects import HF
from converters.formats import WEIGHTS
from converters.io.json import parse_json, read_json
from converters.io.publishing import check_free, check_tree, new_directory, new_file
from converters.io.reading import File
from converters.saving import Progress, Warn, hf_companions, rivals, to_json, watched, write_small
from converters.spec import GPT2Config
from converters.tensors import F32

from .. import contract
from .._version import __version__
from ..contract import models_in
from ..precisions import BLOCK, BLOCKS, DEFAULT, PRECISIONS, Precision
from ..precisions.quantize import PAIR
from ..verify.sample_text import sample_ids
from .model_card import model_card
from .onnx_graph import OPSETS, Scales, to_onnx, unknown_opset
from .single_file import MAX_SINGLE_FILE, too_large, write_single_file

README = "README.md"
CONFIG = "config.json"
GENAI = "genai_config.json"
SAFETENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OF_0_1_0 = "1.23.0"  # the version of ONNX Runtime that the models of gpt2x 0.1.0 need
TRANSFORMERS_JS = "transformers.js_config"  # a key of config.json
NO_TOKENIZER = """no tokenizer beside {source}. Without one, onnxruntime-genai and transformers.js do not load the directory, \
and every other client must bring its own.
Say where one is: --tokenizer DIR. Or go on without: --no-tokenizer"""

Checksums = Mapping[str, str]


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    bytes: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class ExportOptions:
    """What kind of model is written.

    Args:
        precisions: of ``gpt2x.precisions.PRECISIONS``, each a model of its own; onnxruntime-genai runs the first.
        cache: one of ``contract.CACHES``.
        last: compute the logits of the last position only.
        calibration: tokens by which int8, w8a8 and int4 are rounded, without them to nearest; and by which the scales of an
            8-bit cache are chosen, without them by a scene of Shakespeare's.
        block: how many weights of int8 and int4 share a scale.
        opset: the version of ONNX's operators; by default the one that loads most widely.
        single_file: put the weights into each ``.onnx`` file, instead of into a file beside it.
        safetensors: add ``model.safetensors``, a second copy of the weights, for ``transformers``.

    Raises:
        ValueError: for what none of them can be.
    """

    precisions: tuple[str, ...] = (DEFAULT,)
    cache: str = "growing"
    last: bool = False
    calibration: Sequence[int] | None = None
    block: int = BLOCK
    opset: int | None = None
    single_file: bool = False
    safetensors: bool = False

    @property
    def chosen(self) -> list[Precision]:
        """The precisions as objects."""
        return [PRECISIONS[name] for name in self.precisions]

    def __post_init__(self) -> None:
        several = isinstance(self.precisions, tuple | list) and bool(self.precisions)
        if not several or len(set(self.precisions) & PRECISIONS.keys()) != len(self.precisions):
            known = ", ".join(PRECISIONS)
            raise ValueError(f"precisions are {self.precisions!r}; some of {known} are needed, each once")
        if self.cache not in tuple(contract.CACHES):
            raise ValueError(f"cache is {self.cache!r}; known are {', '.join(contract.CACHES)}")
        if self.block not in BLOCKS or not isinstance(self.block, int):
            raise ValueError(f"block is {self.block!r}; it can be {', '.join(map(str, BLOCKS))}")
        if self.opset is not None and self.opset not in OPSETS:
            raise ValueError(f"opset is {self.opset!r}; it can be {OPSETS[0]} to {OPSETS[-1]}")
        if self.calibration is not None:
            object.__setattr__(self, "calibration", [int(i) for i in self.calibration])


def export_onnx(
    checkpoint: Checkpoint,
    path: str | Path,
    options: ExportOptions = ExportOptions(),
    *,
    force: bool = False,
    need_tokenizer: bool = True,
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> Exported:
    """Write a checkpoint as a directory with an ONNX model of each precision. It appears whole, or not at all.

    Into the directory of the source itself, only ``onnx/`` and what is missing beside it are added; into one that holds
    other precisions of the same model, only the new ones and a README with all of them.

    Args:
        force: replace what is there.
        need_tokenizer: refuse a checkpoint without one.
        progress: called with the number of tensor bytes read, as they are read.
        warn: called with a sentence where a tensor holds NaN or infinity.

    Raises:
        TokenizerError: if there is no tokenizer and one is needed.
        DestinationError: if the destination exists or cannot be written.
        ConversionError: if the source turns out to be damaged, or a precision cannot hold it.
        ValueError: if the tokens to calibrate by are not the model's.
    """
    path = Path(path)
    if strays := [i for i in options.calibration or () if not 0 <= i < checkpoint.config.n_vocab]:
        raise ValueError(f"calibration has token id {strays[0]}; the model's vocabulary is {checkpoint.config.n_vocab}")
    if need_tokenizer and checkpoint.tokenizer is None:
        raise TokenizerError(NO_TOKENIZER.format(source=checkpoint.source or "the model"))
    if contract.stays(options.cache) and checkpoint.config.head_dim % 8:
        raise ConfigError(
            f"attention that writes in place (GroupQueryAttention) takes heads of a multiple of 8, and this model's heads "
            f"are {checkpoint.config.head_dim} wide: export it with --cache growing"
        )
    if path.name == "onnx" and any(path / "onnx" not in file.parents for file in models_in(path).values()):
        raise DestinationError(
            f"{path}: holds models itself; the directory to export to is the one above, {path.parent}"
        )
    _check_size(checkpoint, options)
    for precision in options.chosen:
        if options.opset is not None and options.opset < precision.min_opset:
            raise unknown_opset(precision, options.cache, precision.min_opset, options.opset)
    with ThreadPoolExecutor(1) as pool:
        checksums = pool.submit(_checksums, checkpoint)
        plan = _plan(checkpoint, path, options, force, checksums)
        in_the_way = None if plan.kept else partial(_rivals, superseded=plan.superseded)
        with new_directory(path, force or plan.kept, in_the_way) as stage:
            (stage / "onnx").mkdir()
            write_small(stage, plan.small)
            source = watched(checkpoint.cast(F32), progress, warn)
            known = dict(checksums.result())
            if SAFETENSORS in plan.large:
                with new_file(stage / SAFETENSORS) as out:
                    write_safetensors(out, HF.write(source.tensors, source.config), to_hf(source.config))
                known[SAFETENSORS] = _sha256(stage / SAFETENSORS)  # what further precisions may be made from
            scales = _cache_scales(checkpoint, options) if contract.has_int8_cache(options.cache) else ()
            for precision in options.chosen:
                _write_model(stage, source, precision, options, known, scales)
            if plan.card:
                write_small(stage, {plan.card: _card(checkpoint, path, stage, options, plan)})
            written = [file for file in stage.rglob("*") if file.is_file()]
            total = sum(file.stat().st_size for file in written)
            files = tuple(sorted(str(file.relative_to(stage)) for file in written))
        for name in plan.superseded:
            (path / name).unlink(missing_ok=True)
    return Exported(path, total, files)


@dataclass(frozen=True)
class _Plan:
    """What is written into a directory, found out before the work begins."""

    at_home: bool  # it is the source's own
    others: list[str]  # precisions that are there already, and stay
    kept: bool  # what else is there stays
    small: dict[str, bytes]
    large: list[str]
    card: str | None  # the name of the model card, unless a README is somebody else's
    superseded: list[str]  # files of the models that are replaced, which go


def _plan(
    checkpoint: Checkpoint, path: Path, options: ExportOptions, force: bool, checksums: Future[dict[str, str]]
) -> _Plan:
    at_home, there = _is_source(path, checkpoint), models_in(path)
    others = [precision for precision in there if precision not in options.precisions]
    fellows = {there[precision]: _metadata_of(there[precision]) for precision in others}
    known = {digest for facts in fellows.values() for digest in _digests(facts.get(contract.CHECKSUMS, ""))}
    for fellow, facts in fellows.items():
        _check_fellow(
            fellow, facts, known, checkpoint, metadata(checkpoint, checksums.result(), PRECISIONS[DEFAULT], options)
        )
    kept = at_home or bool(others)
    if at_home:
        _check_home(path, checkpoint)
    elif not kept:
        check_free(path, force, directory=True)
    if any(there[precision].parent != path / "onnx" for precision in others):
        raise DestinationError(f"{path}: its models lie in it, not in its folder onnx/; export to another directory")
    small = _small_files(checkpoint, path, options, others, kept)
    large = _large_files(path, options, kept)
    card = _card_place(path) if at_home else README
    if kept:
        small = {name: data for name, data in small.items() if _is_renewed(path, name, data, others)}
        in_the_way = (path / name for name in large if os.path.lexists(path / name))
        if not force and (file := next(in_the_way, None)):
            raise DestinationError(f"{file}: exists already; --force replaces it")
    has_card = not (kept and os.path.lexists(path / card)) or card == _card_place(path)
    check_tree(path, [Path(name) for name in (*small, *large, *([card] if has_card else []))])
    superseded = _superseded(checkpoint, path, options)
    return _Plan(at_home, others, kept, small, large, card if has_card else None, superseded)


def _large_files(path: Path, options: ExportOptions, kept: bool) -> list[str]:
    """The names of the models, and of the weights for ``transformers``, unless a directory that is kept has some."""
    names = [contract.model_file(p) for p in options.precisions]
    if not options.single_file:
        names += [f"onnx/{contract.data_file(p)}" for p in options.precisions]
    has_weights = kept and any(os.path.lexists(path / name) for name in WEIGHTS)
    return [*names, SAFETENSORS] if options.safetensors and not has_weights else names


def _superseded(checkpoint: Checkpoint, path: Path, options: ExportOptions) -> list[str]:
    """Weights that only models that are replaced take; never the source's."""
    there = models_in(path)
    replaced = {p: _weights_of(there[p], p) for p in options.precisions if p in there}
    new = {p: None if options.single_file else contract.data_file(p) for p in replaced}
    names = [f"onnx/{old}" for p, old in replaced.items() if old and old != new[p]]
    index = path / INDEX
    if f"onnx/{contract.OLD_WEIGHTS}" in names and index.is_file():
        places = read_json(index).get("weight_map")
        if isinstance(places, dict) and set(map(str, places.values())) <= set(names):
            names.append(INDEX)
    sources = {file.resolve() for file in (*checkpoint.files, checkpoint.source) if file}
    if any((path / name).resolve() in sources for name in names):
        return []
    return [name for name in names if (path / name).is_file()]


def _weights_of(file: Path, precision: str) -> str | None:
    """The name of the file of weights beside a model, if it is one that gpt2x gives."""
    try:
        names = external_files(file)
    except ConversionError:  # it is somebody else's, and may be anything
        return None
    return next((name for name in (contract.data_file(precision), contract.OLD_WEIGHTS) if name in names), None)


def _is_renewed(path: Path, name: str, data: bytes, others: Sequence[str]) -> bool:
    """Whether a small file is written into a directory that is kept: what is missing, and what describes its models."""
    if not os.path.lexists(path / name):
        return True
    return (name == CONFIG and (path / name).read_bytes() != data) or (name == GENAI and not others)


def _check_size(checkpoint: Checkpoint, options: ExportOptions) -> None:
    """Refuse single files that would be too large before anything is written."""
    if not options.single_file:
        return
    for precision in options.chosen:
        least = checkpoint.parameters * precision.bytes_per_weight
        if least > MAX_SINGLE_FILE:
            raise too_large(precision.model_file, int(least))


def _check_fellow(
    file: Path, found: Mapping[str, str], known: set[str], checkpoint: Checkpoint, ours: Mapping[str, str]
) -> None:
    """Refuse to put precisions of another model, or with another cache, beside one that is there.

    Args:
        found: its metadata.
        known: SHA-256 of all files that the models there were made from.
        ours: the new models' metadata.
    """
    if contract.CONFIG not in found:
        raise DestinationError(f"{file}: not a model that gpt2x wrote; export to another directory")
    # An export can be the source of its own further precisions.
    here = {beside.resolve() for beside in file.parent.iterdir()}
    faults = [
        f"its {what} {found.get(key)}, this export's {ours[key]}"
        for key, what in ((contract.CACHE, "cache is"), (contract.LOGITS, "logits are"))
        if found.get(key) != ours[key]
    ]
    if found[contract.CONFIG] != ours[contract.CONFIG]:
        faults.append("its configuration is another")
    if not here.intersection(source.resolve() for source in checkpoint.files):
        digests = set(_digests(ours[contract.CHECKSUMS]))
        faults += [] if digests <= known and bool(digests) == bool(known) else ["its source is another"]
    if faults:
        raise DestinationError(
            f"{file}: cannot lie beside this export: {'; '.join(faults)}. Models in one directory agree in these: "
            "export with the same, or to another directory"
        )


def _digests(checksums: str) -> list[str]:
    try:
        return [str(digest) for digest in json.loads(checksums).values()]
    except (ValueError, AttributeError):
        return []


def _metadata_of(file: Path) -> dict[str, str]:
    try:
        return read_metadata(file)
    except ConversionError:  # it is somebody else's, and may be anything
        return {}


def _is_source(path: Path, checkpoint: Checkpoint) -> bool:
    return checkpoint.source is not None and path.is_dir() and checkpoint.source.parent.resolve() == path.resolve()


def _check_home(path: Path, checkpoint: Checkpoint) -> None:
    """Refuse to change what the source is: its weights, which may lie where the model's go, and its tokenizer."""
    names = contract.data_file(), contract.OLD_WEIGHTS
    for weights in (path / "onnx" / name for name in names):
        own = any(file.exists() and weights.exists() and file.samefile(weights) for file in checkpoint.files)
        if own and (checkpoint.left_out or any(tensor.dtype != F32 for tensor in checkpoint.tensors.values())):
            raise DestinationError(
                f"{weights}: is the source itself, and would become another; export to another directory"
            )
    here, wanted = find_tokenizer(path), checkpoint.tokenizer
    if here and wanted and here.vocabulary() != wanted.vocabulary():
        raise DestinationError(f"{path}: has a tokenizer of its own, which is another; export to another directory")


def _rivals(path: Path, superseded: Sequence[str]) -> list[str]:
    """What would be read together with the new files; other precisions of another model among them."""
    models = (path / "onnx").glob("*.onnx*") if (path / "onnx").is_dir() else []
    found = [*rivals(path), *sorted(f"onnx/{file.name}" for file in models)]
    return [name for name in found if name not in superseded]


def _small_files(
    checkpoint: Checkpoint, path: Path, options: ExportOptions, others: Sequence[str], kept: bool
) -> dict[str, bytes]:
    config = checkpoint.config
    fp32 = checkpoint.cast(F32)
    files = hf_companions(fp32)
    files[CONFIG] = _with_transformers_js(files[CONFIG], path, options, others, kept)
    files[GENAI] = to_json(genai_config(config, options.precisions[0], options.cache))
    return files


def _card(checkpoint: Checkpoint, path: Path, stage: Path, options: ExportOptions, plan: _Plan) -> bytes:
    """The model card of the models that are there already and of those that were written."""
    for_cpu_first = sorted(PRECISIONS.values(), key=lambda p: not p.for_cpu)  # the card's client runs the first
    precisions = [p.name for p in for_cpu_first if p.name in options.precisions or p.name in plan.others]
    files = {p: (stage if p in options.precisions else path) / contract.model_file(p) for p in precisions}
    return model_card(
        checkpoint.config,
        precisions=precisions,
        cache=options.cache,
        last=options.last,
        tokenizer=checkpoint.tokenizer is not None,
        source=_name(checkpoint),
        runtimes={p: _runtime_of(file) for p, file in files.items()},
        locations=_locations(path, options, plan.others),
        safetensors=options.safetensors or (plan.kept and (path / SAFETENSORS).is_file()),
    ).encode()


def _runtime_of(file: Path) -> str:
    """The first version of ONNX Runtime that runs a model, by its metadata."""
    said = read_metadata(file).get(contract.RUNTIME, "")
    return said if contract.VERSION.fullmatch(said) else OF_0_1_0


def _locations(path: Path, options: ExportOptions, others: Sequence[str]) -> dict[str, str | None]:
    """Precision -> the file beside its model that the weights are in; None where they are in the model."""
    ours = {p: None if options.single_file else contract.data_file(p) for p in options.precisions}
    return {**ours, **{p: _weights_of(path / contract.model_file(p), p) for p in others}}


def _with_transformers_js(
    config: bytes, path: Path, options: ExportOptions, others: Sequence[str], kept: bool
) -> bytes:
    """``config.json`` with what transformers.js has to know of the models: whose weights lie in a file beside them, and
    whose cache is not float32. One in a directory that is kept keeps all else.
    """
    there = path / CONFIG
    before = there.read_bytes() if kept and there.is_file() else config
    facts = parse_json(before, str(there))
    found = facts.get(TRANSFORMERS_JS, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{there}: {TRANSFORMERS_JS} is no object: correct it, or leave it out")
    settings = {key: value for key, value in found.items() if key not in ("use_external_data_format", "kv_cache_dtype")}
    locations = _locations(path, options, others)
    beside = [precision for precision, name in locations.items() if name == contract.data_file(precision)]
    if len(beside) == len(locations):
        settings["use_external_data_format"] = True
    elif beside:
        names = [contract.model_file(precision).removeprefix("onnx/") for precision in beside]
        settings["use_external_data_format"] = dict.fromkeys(names, True)
    cache_dtypes = {PRECISIONS[name].transformers_js: contract.cache_type(name, options.cache) for name in locations}
    halves = {name: dtype for name, dtype in cache_dtypes.items() if dtype == "float16"}
    if halves:
        settings["kv_cache_dtype"] = halves  # transformers.js before version 4 does not ask the model
    if settings == found:
        return before
    facts.pop(TRANSFORMERS_JS, None)
    return to_json({**facts, TRANSFORMERS_JS: settings} if settings else facts)


def _card_place(home: Path) -> str:
    """Where the card goes in the source's own directory: not over a README that is somebody else's."""
    readme = home / README
    if not os.path.lexists(readme):
        return README
    ours = readme.is_file() and b"Written by gpt2x" in readme.read_bytes()[: 1 << 16]
    return README if ours else f"onnx/{README}"


def _name(checkpoint: Checkpoint) -> str:
    name = checkpoint.source.name if checkpoint.source else "memory"
    return name.encode("utf-8", "backslashreplace").decode()  # a file's name may be no text


def _checksums(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of each file of weights, by base name: what model hubs show, and ``sha256sum`` prints."""
    return {file.name: _sha256(file) for file in checkpoint.files}


def _sha256(path: Path) -> str:
    digest, file = hashlib.sha256(), File(path)
    for chunk in file.chunks(0, file.size):
        digest.update(chunk)
    return digest.hexdigest()


def _write_model(
    stage: Path,
    checkpoint: Checkpoint,
    precision: Precision,
    options: ExportOptions,
    checksums: Checksums,
    scales: Sequence[Scales],
) -> None:
    data = stage / "onnx" / precision.data_file
    with new_file(data) as out:
        stored = precision.store(out, checkpoint, options.block, options.calibration)
    precision.check_activations(checkpoint, partial(_sample, checkpoint))
    model = to_onnx(
        checkpoint.config,
        precision,
        stored,
        metadata(checkpoint, checksums, precision, options),
        last=options.last,
        cache=options.cache,
        scales=scales,
        opset=options.opset,
    )
    with new_file(stage / precision.model_file) as out:
        if options.single_file:
            write_single_file(out, model, data, precision.model_file)
        else:
            out.write(model.SerializeToString(deterministic=True))
    if options.single_file:
        data.unlink()


def _cache_scales(checkpoint: Checkpoint, options: ExportOptions) -> Sequence[Scales]:
    from ..precisions.calibrate import cache_scales

    return cache_scales(checkpoint, options.calibration or _sample(checkpoint))


def _sample(checkpoint: Checkpoint) -> Sequence[int]:
    """Tokens of the text that ``verify`` runs models on."""
    return sample_ids(checkpoint.config, checkpoint.tokenizer)[0]


def metadata(
    checkpoint: Checkpoint, checksums: Checksums, precision: Precision, options: ExportOptions
) -> dict[str, str]:
    """The model's ``metadata_props``: what it is, and what it came from."""
    facts = {
        contract.CONTRACT: contract.CACHES[options.cache],
        contract.WRITER: __version__,
        contract.SOURCE: _name(checkpoint),
        contract.CHECKSUMS: json.dumps(checksums, sort_keys=True),
        contract.CONFIG: json.dumps(to_hf(checkpoint.config), sort_keys=True),
        contract.PRECISION: precision.name,
        contract.CACHE: options.cache,
        contract.LOGITS: "last" if options.last else "all",
    }
    if precision.block_sizes:
        facts[contract.BLOCK] = str(options.block)
    if precision.integer_products:
        facts[contract.PAIRS] = str(PAIR)
    if precision.bits:
        facts[contract.ROUNDING] = "calibrated" if options.calibration else "nearest"
    return facts


def genai_config(config: GPT2Config, precision: str = DEFAULT, cache: str = "growing") -> dict[str, Any]:
    """The ``genai_config.json`` of onnxruntime-genai, which refuses unknown keys."""
    end = config.eos_token_id if config.eos_token_id is not None else config.n_vocab - 1
    begin = config.bos_token_id if config.bos_token_id is not None else end
    pad = config.pad_token_id if config.pad_token_id is not None else end
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": contract.model_file(precision),
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
        "search": {"max_length": config.n_ctx, "num_beams": 1, "past_present_share_buffer": contract.stays(cache)},
    }
