"""Opening an ONNX model: find the file, check its version, make the session, check its inputs and outputs.

Needs numpy and onnxruntime, and never imports torch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from converters import CheckpointError, ConfigError, ConversionError, FormatError, GPT2Config
from converters.config import config_of
from converters.containers.onnx import external_files, read_metadata
from converters.containers.safetensors import open_safetensors
from converters.errors import short
from converters.io.json import parse_json, parse_value, read_json
from converters.io.reading import File, check_name
from converters.spec import projections

from .. import contract
from ..contract import Slot
from ..memory import give_back
from ..precisions import DEFAULT, PRECISIONS, Precision
from ..tasks import EXTRAS, GENERATION, LOGITS
from .adapter_files import AdapterFile, open_adapter_file
from .base import Ids, InputError, check_tokens
from .onnx_memory import CpuMemory, Memory, Tensor, bind_input
from .onnx_providers import Provider, check_used, checked_providers, memory_of, session_entries
from .processor import saturates, tiles, tiles_read_prompts_well

log = logging.getLogger(__name__)

MAX_THREADS = 1024
MAX_MESSAGE = 2000  # characters of an error message of ONNX Runtime
MAX_BLOCK = 1 << 16
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # of a model in memory
EXACT = "session.x64quantprecision"  # exact products of uint8 and int8, where the default ones saturate

# ONNX Runtime's name of a type -> numpy's.
TYPES = {
    "tensor(int64)": "int64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int8)": "int8",
}


@dataclass(frozen=True)
class SessionSettings:
    """How a session is made.

    Attributes:
        phase: what the session is for: to read prompts, to decode, or both.

    Raises:
        ValueError: if the number of threads is out of range, or this ONNX Runtime has no such provider.
    """

    threads: int | None = None
    optimize: bool = True
    providers: str | Sequence[Provider] = ("CPUExecutionProvider",)
    phase: Literal["prompts", "decoding", "both"] = "both"

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads not in range(1, MAX_THREADS + 1):
            raise ValueError(f"threads is {self.threads!r}; it must be between 1 and {MAX_THREADS}")
        object.__setattr__(self, "providers", checked_providers(self.providers))


@dataclass(frozen=True)
class ActiveAdapter:
    """The adapter of a run: its name, and the values of the model's optional inputs. Without a name, the model's own."""

    name: str | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def bind(self, binding: Any) -> None:
        """Bind its factors. A run with a binding ignores ``RunOptions.add_active_adapter`` (ONNX Runtime 1.20 to 1.32)."""
        for name, value in self.values.items():
            bind_input(binding, name, value)


NO_ADAPTER = ActiveAdapter()


@dataclass
class OnnxModel:
    """An ONNX model in a session, after its inputs and outputs were checked.

    Args:
        path: the model's file.
        graph: the file in the session: the model's, or the one beside it with inputs for adapters.
        settings: how the session is made.
    """

    path: Path
    graph: Path
    settings: SessionSettings
    metadata: dict[str, str]
    config: GPT2Config
    precision: str
    cache_kind: str
    last_only: bool
    session: Any  # ort.InferenceSession; None once closed
    memory: Memory = field(default_factory=CpuMemory)  # where it needs its cache

    def __post_init__(self) -> None:
        self.in_place = contract.stays(self.cache_kind)
        self.past_names = contract.past_names(self.config.n_layer)
        self.present_names = contract.present_names(self.config.n_layer)
        self.inputs = slots(self.session.get_inputs())
        self.outputs = slots(self.session.get_outputs())
        loaded = self._loaded_factor_inputs()
        self.has_inputs = bool(loaded) or contract.LORA not in self.metadata
        self.factor_inputs = loaded if self.has_inputs else self._stated_factor_inputs()
        self.adapters = contract.adapters_in(self.path.parent) if self.factor_inputs else {}
        self._opened: dict[str, ActiveAdapter] = {}

    def _stated_factor_inputs(self) -> dict[str, Slot]:
        """Those of the graph beside the model, which is not loaded."""
        names = parse_value(self.metadata[contract.LORA].encode(), f"{self.path}: its metadata: {contract.LORA}")
        if not isinstance(names, list):
            raise CheckpointError(f"{self.path}: its metadata: {contract.LORA} is not a list")
        return contract.factor_slots(self.config, [name for name in projections(self.config.n_layer) if name in names])

    def take_adapters(self) -> None:
        """Load the graph with inputs for adapters in place of the one without, whose memory is freed first.

        Raises:
            FormatError: if it is missing or cannot be loaded; the model then is as before.
            CheckpointError: if it is of another model, or its inputs and outputs are not the contract's.
        """
        self.session = None
        give_back()
        try:
            other = load_graph(self.path, self.path.with_name(contract.lora_file(self.path.name)), self.settings)
            self._check_same(other)
        except ConversionError:
            self.session = load_graph(self.path, self.graph, self.settings).session
            raise
        self.session = other.session
        self.graph = other.graph
        self.factor_inputs = other.factor_inputs
        self.has_inputs = True

    def _check_same(self, other: OnnxModel) -> None:
        """Refuse a graph of another model: only the version of ONNX Runtime that both need may differ."""
        version = {contract.RUNTIME: ""}
        same = {**self.metadata, **version} == {**other.metadata, **version}
        if not same or self.factor_inputs.keys() != other.factor_inputs.keys():
            raise CheckpointError(f"{other.graph}: not of the same export as {self.path.name}: export the model again")

    def _loaded_factor_inputs(self) -> dict[str, Slot]:
        """The optional inputs for factors of adapters in the session."""
        optional = slots(self.session.get_overridable_initializers())
        names = [name for module in projections(self.config.n_layer) for name in contract.factor_names(module)]
        return {name: optional[name] for name in names if name in optional}

    @property
    def expected_factor_inputs(self) -> dict[str, Slot]:
        """What the contract says of them: both factors of each projection that has one."""
        modules = projections(self.config.n_layer)
        has_factors = [m for m in modules if not self.factor_inputs.keys().isdisjoint(contract.factor_names(m))]
        return contract.factor_slots(self.config, has_factors)

    def adapter_file(self, name: str) -> AdapterFile:
        """The adapter of this name beside the model.

        Raises:
            FormatError: if there is none, or its file is invalid.
            CheckpointError: if it does not fit the model.
        """
        if name not in self.adapters:
            here = ", ".join(self.adapters)
            held = f"it holds {here}" if here else "it holds none: export the model with --adapter NAME=DIR"
            raise FormatError(f"{self.path.parent}: no adapter {name[:100]!r} in this directory; {held}")
        return open_adapter_file(self.adapters[name], self.factor_inputs)

    def adapter(self, name: str | None) -> ActiveAdapter:
        """The adapter of this name, read; without a name, none.

        Raises:
            FormatError, CheckpointError: as ``adapter_file``.
        """
        if name is None:
            return NO_ADAPTER
        if name not in self._opened:
            tensors = self.adapter_file(name).tensors
            values = {key: self.memory.upload(tensor.read()) for key, tensor in tensors.items()}
            self._opened[name] = ActiveAdapter(name, values)
        return self._opened[name]

    @property
    def cache_dtype(self) -> np.dtype[Any]:
        """The dtype of keys and values."""
        return np.dtype(contract.cache_type(self.precision, self.cache_kind))

    def check_tokens(self, input_ids: Any, position_ids: Any) -> tuple[Ids, Ids]:
        """As ``base.check_tokens``, for this model.

        Raises:
            InputError: if the tokens do not fit, or the model is closed.
        """
        if self.session is None:
            raise InputError(f"{self.path}: this decoder is closed")
        return check_tokens(input_ids, position_ids, self.config.n_vocab, self.config.n_ctx)

    def extra_outputs(self, ids: Ids, positions: Ids) -> dict[str, NDArray[Any]]:
        """The outputs besides the logits and the cache for whole rows (B, T), by their names.

        Raises:
            FormatError: if ONNX Runtime fails.
        """
        names = [name for name in contract.outputs_in(self.metadata) if name != LOGITS]
        empty = np.empty((len(ids), self.config.n_head, 0, self.config.head_dim), self.cache_dtype)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}
        if not names:
            return {}
        return run_session(self.session, self.path, names, {**feed, **dict.fromkeys(self.past_names, empty)})

    def run(self, binding: Any, options: ort.RunOptions | None) -> None:
        """Run the model with everything bound.

        Raises:
            FormatError: if ONNX Runtime fails.
        """
        try:
            self.session.run_with_iobinding(binding, options)
        except Exception as error:
            raise _cannot_run(self.path, error) from None


def run_session(
    session: ort.InferenceSession, path: Path, names: list[str], feed: Mapping[str, Any]
) -> dict[str, NDArray[Any]]:
    """Run a model on arrays. Returns the outputs of these names.

    Raises:
        FormatError: if ONNX Runtime fails.
    """
    try:
        found = session.run(names, feed)
    except Exception as error:
        raise _cannot_run(path, error) from None
    return dict(zip(names, found, strict=True))


def _cannot_run(path: Path, error: Exception) -> FormatError:
    """The error for a model whose metadata promised what its graph does not do."""
    return FormatError(f"{path}: ONNX Runtime cannot run it: {one_line(error)}")


def open_model(
    path: str | Path, precision: str | None, settings: SessionSettings, *, with_inputs: bool = False
) -> OnnxModel:
    """Open the ONNX model that a path means.

    Args:
        with_inputs: load the graph with inputs for adapters, if there are two.

    Raises:
        FormatError: if there is no model, it is damaged, or its file of weights is incomplete.
        CheckpointError: if its inputs and outputs are not the contract's; the message lists every difference.
        ConfigError: if it has no configuration.
    """
    file = find_model(path, precision)
    beside = file.with_name(contract.lora_file(file.name))
    graph = beside if with_inputs and beside.is_file() else file
    model = load_graph(file, graph, settings, precision)
    log.info("%s: %s, %s cache", graph, model.precision, model.cache_kind)
    return model


def load_graph(path: Path, graph: Path, settings: SessionSettings, precision: str | None = None) -> OnnxModel:
    """Load a model from its file, or from the graph beside it with inputs for adapters.

    Raises:
        FormatError, CheckpointError, ConfigError: as ``open_model``.
    """
    metadata = read_metadata(graph)
    if metadata.get(contract.TASK, GENERATION) != GENERATION:
        raise FormatError(f"{graph}: a model for {metadata[contract.TASK][:50]}, which generates no text")
    loaded = load_file(graph, metadata, precision, settings)
    cache_kind = metadata.get(contract.CACHE, "growing")
    model = OnnxModel(
        path=path,
        graph=graph,
        settings=settings,
        metadata=metadata,
        config=loaded.config,
        precision=loaded.precision,
        cache_kind=cache_kind,
        last_only=metadata.get(contract.LOGITS) == "last",
        session=loaded.session,
        memory=memory_of(loaded.session, settings.providers, contract.stays(cache_kind), graph),
    )
    check_contract(model)
    return model


@dataclass(frozen=True)
class Loaded:
    """What every model has, for any task. Its inputs and outputs are not checked yet."""

    config: GPT2Config
    precision: str
    session: ort.InferenceSession


def load_file(file: Path, metadata: dict[str, str], precision: str | None, settings: SessionSettings) -> Loaded:
    """Load a file into ONNX Runtime.

    Args:
        metadata: that of the file.
        precision: what the user asked for.

    Raises:
        FormatError: if it cannot be loaded, or has another precision.
        ConfigError: if it has no configuration.
    """
    check_runtime(file, metadata)
    session = open_session(file, metadata, settings)
    give_back()  # loading needs a third more memory for a moment, if weights are packed anew
    config, found = config_in(file, metadata), metadata.get(contract.PRECISION, DEFAULT)
    if precision not in (None, found):
        raise FormatError(f"{file}: its metadata says {found[:50]}, not {precision}")
    return Loaded(config, found, session)


# -------------------------------------------------------------------------------------------------------- the file


def find_model(path: str | Path, precision: str | None = None) -> Path:
    """Return the ONNX file that a path means: itself, or the one of a precision in a directory (default: fp32, or the only
    one).

    Raises:
        FormatError: if there is none, or there are several and ``precision`` is missing.
    """
    path = Path(path)
    check_name(path)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise FormatError(f"{path}: ONNX Runtime opens only paths in UTF-8: rename it") from None
    if not path.is_dir():
        return File(path).path
    found = contract.models_in(path)
    chosen = _choose(path, found, precision)
    log.debug("%s holds %s; chosen: %s", path, ", ".join(found), chosen.name)
    return chosen


def _choose(directory: Path, found: dict[str, Path], precision: str | None) -> Path:
    if not found:
        raise FormatError(
            f"{directory}: no ONNX model in this directory (looked for {contract.model_file()}, model.onnx, and "
            "models of other precisions): create one with gpt2x export --onnx"
        )
    if precision in found:
        return found[precision]
    here = ", ".join(found)
    if precision is not None:
        raise FormatError(f"{directory}: no {precision} model in this directory; it holds {here}")
    if DEFAULT in found:
        return found[DEFAULT]
    if len(found) > 1:
        raise FormatError(
            f"{directory}: several models in this directory; it holds {here}: choose one (--precision, or precision=)"
        )
    return next(iter(found.values()))


def stated_config(path: str | Path, precision: str | None) -> GPT2Config:
    """The configuration of the ONNX model that a path means, without loading the model.

    Raises:
        FormatError: if there is no model, or it is damaged.
        ConfigError: if it has no configuration.
    """
    file = find_model(path, precision)
    return config_in(file, read_metadata(file))


def check_runtime(path: Path, metadata: Mapping[str, str]) -> None:
    """Refuse a model whose metadata asks for a newer ONNX Runtime than the installed one.

    Raises:
        FormatError: with both versions.
    """
    needed = metadata.get(contract.RUNTIME, "")
    if contract.VERSION.fullmatch(needed) and _numbers(ort.__version__) < _numbers(needed):
        raise FormatError(
            f"{path}: needs ONNX Runtime {needed} or newer; {ort.__version__} is installed. "
            f"Upgrade it: pip install 'onnxruntime>={needed}'. Or export the model again for this version: "
            "gpt2x export --help explains --cache, --precision and --opset"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def config_in(path: Path, metadata: dict[str, str]) -> GPT2Config:
    """The configuration in the metadata, or in the ``config.json`` beside the file or above it."""
    if contract.CONFIG in metadata:
        where = f"{path}: its metadata"
        return config_of(parse_json(metadata[contract.CONFIG].encode(), where), where)
    for file in (path.parent / "config.json", path.parent.parent / "config.json"):
        if file.is_file():
            log.info("%s: configuration from %s", path, file)
            return config_of(read_json(file, 1 << 20), str(file))
    raise ConfigError(f"{path}: no configuration in its metadata, and no config.json beside it")


# ----------------------------------------------------------------------------------------------------- the session


def open_session(path: Path, metadata: Mapping[str, str], settings: SessionSettings) -> ort.InferenceSession:
    """Load a model into ONNX Runtime.

    Raises:
        FormatError: if it cannot be loaded.
    """
    precision = _precision_of(metadata)
    if precision is not None and precision.keeps_source:
        _check_weights(path)
    return _load(str(path), path, _session_options(metadata, settings), metadata, settings)


def session_of_bytes(
    model: bytes, path: Path, metadata: Mapping[str, str], settings: SessionSettings
) -> ort.InferenceSession:
    """As ``open_session``, for a changed model of a file, whose weights are still beside that file.

    Raises:
        FormatError: if it cannot be loaded.
    """
    options = _session_options(metadata, settings)
    options.add_session_config_entry(WEIGHTS_FOLDER, str(path.parent))
    return _load(model, path, options, metadata, settings)


def _load(
    model: str | bytes, path: Path, options: ort.SessionOptions, metadata: Mapping[str, str], settings: SessionSettings
) -> ort.InferenceSession:
    providers = list(settings.providers)
    try:
        with _attention(metadata, settings):
            session = ort.InferenceSession(model, options, providers=providers, enable_fallback=False)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise FormatError(f"{path}: ONNX Runtime {ort.__version__} cannot load it: {one_line(error)}") from None
    check_used(session, providers, path)
    return session


def _attention(metadata: Mapping[str, str], settings: SessionSettings) -> AbstractContextManager[None]:
    """The choice of an attention kernel. Only a float32 cache in place has one: 8 bits are read as fast in tiles."""
    if metadata.get(contract.CACHE) != "inplace":
        return nullcontext()
    wanted = settings.phase == "decoding" or (settings.phase == "both" and tiles_read_prompts_well())
    log.info("tiled attention %s, unless the environment says otherwise", _on(wanted))
    return tiles(wanted)


def _session_options(metadata: Mapping[str, str], settings: SessionSettings) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised; nothing is printed
    options.intra_op_num_threads = int(settings.threads or 0)
    # The arena never frees what a growing cache took.
    options.enable_cpu_mem_arena = contract.stays(metadata.get(contract.CACHE, "growing"))
    exact = needs_exact_products(metadata)
    if exact:
        options.add_session_config_entry(EXACT, "1")
    for key, value in session_entries(settings.providers).items():
        options.add_session_config_entry(key, value)
    if not settings.optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    log.info(
        "session options: %s threads, optimizations %s, memory arena %s, exact products %s, providers %s",
        settings.threads or "default",
        _on(settings.optimize),
        _on(options.enable_cpu_mem_arena),
        _on(exact),
        ", ".join(map(str, settings.providers)),
    )
    return options


def _on(value: bool) -> str:
    return "on" if value else "off"


def needs_exact_products(metadata: Mapping[str, str]) -> bool:
    """Whether integer products of a model of gpt2x 0.1.0 saturate on this processor. Later ones never do (``contract.PAIRS``)."""
    precision = _precision_of(metadata)
    if precision is None or not precision.integer_products:
        return False
    return contract.PAIRS not in metadata and saturates()


def _precision_of(metadata: Mapping[str, str]) -> Precision | None:
    """The precision that a model names. None if it names none, or an unknown one."""
    return PRECISIONS.get(metadata.get(contract.PRECISION, ""))


def _check_weights(path: Path) -> None:
    """Report a truncated file of float32 weights with its exact place: it is a safetensors file."""
    for name in external_files(path) & {contract.data_file(), contract.OLD_WEIGHTS}:
        weights = path.with_name(name)
        if weights.is_file():
            open_safetensors(weights)


def one_line(error: Exception) -> str:
    """ONNX Runtime's message in one line, without its prefix."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(" : ")[-1][:MAX_MESSAGE]


# ---------------------------------------------------------------------------------------------------- the contract


def check_contract(model: OnnxModel) -> None:
    """Compare a model's inputs and outputs with the contract.

    Raises:
        CheckpointError: if they differ, or the metadata names an unknown contract, precision or cache.
        FormatError: if the metadata's block size is invalid.
    """
    version = model.metadata.get(contract.CONTRACT, contract.CACHES.get(model.cache_kind))
    logits = model.metadata.get(contract.LOGITS, "all")
    known = (
        version in contract.CACHES.values()
        and logits in ("all", "last")
        and model.precision in PRECISIONS
        and model.cache_kind in contract.CACHES
        and {LOGITS, *EXTRAS}.issuperset(contract.outputs_in(model.metadata))
    )
    if not known:
        said = f"contract {version}, {model.precision}, {model.cache_kind} cache"[:100]
        raise CheckpointError(f"{model.path}: unknown kind of model ({said}): a newer gpt2x may have written it")
    block_size(model.metadata)
    kind = model.precision, model.cache_kind
    names = contract.outputs_in(model.metadata)
    faults = [
        *differences("input", contract.inputs(model.config, *kind), model.inputs),
        *differences("input", model.expected_factor_inputs, model.factor_inputs),
        *differences("output", contract.outputs(model.config, model.last_only, *kind, names), model.outputs),
    ]
    refuse_differences(model.graph, faults)


def refuse_differences(path: Path, faults: list[str]) -> None:
    """Refuse a model with these ``differences``, if there are any.

    Raises:
        CheckpointError: with all of them.
    """
    if faults:
        advice = "gpt2x runs models that gpt2x export --onnx wrote, or with the same inputs and outputs."
        raise CheckpointError.listing(f"{path}: other inputs or outputs than gpt2x's", short(faults), advice)


def block_size(metadata: Mapping[str, str]) -> int | None:
    """How many weights share a scale; None if the metadata does not say.

    Raises:
        FormatError: if the value is invalid.
    """
    text = metadata.get(contract.BLOCK)
    if text is None:
        return None
    valid = re.fullmatch(r"[0-9]{1,5}", text) is not None and 1 <= int(text) <= MAX_BLOCK
    if not valid:
        raise FormatError(f"the model's metadata: {contract.BLOCK} is {text[:50]!r}")
    return int(text)


def slots(arguments: Any) -> dict[str, Slot]:
    """The inputs or outputs of a session, by their names."""
    return {a.name: Slot(TYPES.get(a.type, a.type), tuple(a.shape)) for a in arguments}


def differences(kind: str, expected: dict[str, Slot], found: dict[str, Slot]) -> Iterator[str]:
    """How the inputs or outputs of a model differ from the expected ones, one line each."""
    for name in expected:
        if name not in found:
            yield f"missing   {kind} {name}"
    for name in found:
        if name not in expected:
            yield f"extra     {kind} {name[:100]}"
    for name in expected:
        if name in found and not _fits(expected[name], found[name]):
            yield f"{kind:<9} {name} is {_words(found[name])}, not {_words(expected[name])}"


def _fits(expected: Slot, found: Slot) -> bool:
    """Whether dtypes and fixed sizes agree; a symbolic size may have any name."""
    if expected.dtype != found.dtype or len(expected.shape) != len(found.shape):
        return False
    return all(_same_size(a, b) for a, b in zip(expected.shape, found.shape, strict=True))


def _same_size(expected: int | str, found: int | str) -> bool:
    if isinstance(expected, int):
        return expected == found
    return not isinstance(found, int)


def _words(slot: Slot) -> str:
    return f"{slot.dtype} [{', '.join(map(str, slot.shape))}]"
