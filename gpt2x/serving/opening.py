"""Opening the models of a server."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from converters import ConversionError

from ..contract import has_onnx, model_file
from ..generation.config import controls_beside
from ..generation.generate import end_token_of
from ..memory import machine_memory
from ..precisions import PRECISIONS
from ..runtimes.base import InputError
from ..runtimes.onnx_providers import CPU
from ..runtimes.onnx_task import OnnxTask
from ..runtimes.onnxruntime import OnnxDecoder
from ..runtimes.opening import task_of_export
from ..tasks import GENERATION
from ..tokenizer import Tokenizer
from .chat import ChatTemplate
from .embedder import Embedder
from .engine import Engine
from .memory_plan import plan_memory
from .metrics import EngineMetrics, Metrics
from .models import EMBEDDINGS, EmbeddingModel, Models, ServedModel, TextModel

log = logging.getLogger(__name__)

MODEL_FILES = {model_file(precision): precision for precision in PRECISIONS}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+-]{0,127}")


@dataclass(frozen=True)
class Wanted:
    """A model that is to be served.

    Attributes:
        name: what clients call it.
        folder: a directory that ``gpt2x export --onnx`` wrote, with ``--cache inplace`` or for feature extraction.
        precision: which of its models, or a pair such as ``w8a8+int4``; None for fp32, or the only one.
    """

    name: str
    folder: Path
    precision: str | None


@dataclass(frozen=True)
class EngineOptions:
    """What every model gets.

    Attributes:
        max_batch_size: sequences of a model that run at once, if memory allows.
        max_queue: texts of a model that wait, at most.
        threads: of each operator; None for one for each core.
        max_context: tokens of a sequence, at most; None for the model's context.
        cache_memory: bytes for the caches of all models; None for half of this machine's memory.
        provider: ONNX Runtime's execution provider, as in ``OnnxDecoder``.
    """

    max_batch_size: int = 32
    max_queue: int = 256
    threads: int | None = None
    max_context: int | None = None
    cache_memory: int | None = None
    provider: str = CPU


def wanted_models(sources: Sequence[str], precisions: Sequence[str], name: str | None) -> list[Wanted]:
    """The models that arguments mean: each ``DIR`` or ``NAME=DIR``, in each of the precisions.

    In the place of a directory can be one of its models, such as ``DIR/onnx/model_int8.onnx``: that precision (w8a8) alone.

    Raises:
        ValueError: if a name is not valid, or two are the same.
    """
    if name is not None and len(sources) > 1:
        raise ValueError("--model-name is for one directory: write NAME=DIR for each of several")
    found = []
    for source in sources:
        before, equals, after = source.partition("=")
        named = bool(equals) and not Path(source).is_dir()
        folder, own = _directory_of(Path(after if named else source))
        base = name or (before if named else folder.resolve().name)
        if own is not None:
            found.append(Wanted(base, folder, own))
            continue
        for precision in precisions or [None]:  # type: ignore[list-item]
            whole = f"{base}-{precision}" if len(precisions) > 1 else base
            found.append(Wanted(whole, folder, precision))
    for one in found:
        if not NAME.fullmatch(one.name):
            raise ValueError(f"{one.name[:60]!r} is no valid name of a model: use letters, digits, and . _ : / + -")
    _check_differ([one.name for one in found])
    return found


def _directory_of(path: Path) -> tuple[Path, str | None]:
    """The directory that a path means, and its precision if it is the file of a model in it."""
    precision = MODEL_FILES.get(f"{path.parent.name}/{path.name}")
    if precision is None:
        return path, None
    return path.parent.parent, precision


def _check_differ(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two models are called {name}: write NAME=DIR")


@dataclass(frozen=True)
class _Opened:
    """A model in memory that is not served yet. A decoder can have an adapter."""

    name: str
    folder: Path
    model: OnnxDecoder | OnnxTask
    tokenizer: Tokenizer


def open_models(wanted: Sequence[Wanted], options: EngineOptions, metrics: Metrics) -> Models:
    """Open every model, with an engine for it and for each of its adapters.

    Raises:
        ConversionError: if one cannot be opened, two have one name, or the budget does not hold a sequence of each.
        MemoryError: if there is no memory for a cache.
    """
    budget = machine_memory() // 2 if options.cache_memory is None else options.cache_memory
    with ExitStack() as resources:
        opened: list[_Opened] = []
        for one in wanted:
            opened += _open(one, options, resources)
        try:
            _check_differ([one.name for one in opened])
        except ValueError as error:
            raise ConversionError(str(error)) from None
        caches = [one for one in opened if isinstance(one.model, OnnxDecoder)]
        share = budget // max(1, len(caches))
        models = [_serve(one, options, share, metrics, resources) for one in opened]
        return Models(models, resources.pop_all())


def _open(wanted: Wanted, options: EngineOptions, resources: ExitStack) -> list[_Opened]:
    """A model, and the same with each of the adapters beside it, called ``MODEL:ADAPTER``. They share its memory."""
    folder, name = wanted.folder, wanted.name
    if not folder.is_dir() or not has_onnx(folder):
        raise ConversionError(
            f"{folder}: not a directory with an ONNX model: gpt2x export MODEL --onnx {folder} --cache inplace"
        )
    task = task_of_export(folder, wanted.precision)
    if task not in (GENERATION, EMBEDDINGS):
        raise ConversionError(f"{folder}: a model for {task[:50]}; {GENERATION} and {EMBEDDINGS} can be served")
    tokenizer = Tokenizer.from_pretrained(folder)
    if task == EMBEDDINGS:
        embedder = OnnxTask(folder, precision=wanted.precision, threads=options.threads, providers=options.provider)
        return [_Opened(name, folder, embedder, tokenizer)]
    decoder = resources.enter_context(
        OnnxDecoder(folder, precision=wanted.precision, threads=options.threads, providers=options.provider)
    )
    found = [_Opened(name, folder, decoder, tokenizer)]
    for adapter in decoder.adapters:
        found.append(_Opened(f"{name}:{adapter}", folder, decoder.with_adapter(adapter), tokenizer))
    return found


def _serve(opened: _Opened, options: EngineOptions, budget: int, metrics: Metrics, resources: ExitStack) -> ServedModel:
    if isinstance(opened.model, OnnxDecoder):
        return _with_engine(opened, opened.model, options, budget, metrics, resources)
    observer = EngineMetrics(metrics, opened.name)
    embedder = Embedder(opened.model, options.max_batch_size, options.max_queue, observer)
    resources.callback(embedder.close)
    return EmbeddingModel(opened.name, opened.tokenizer, embedder, options.max_context)


def _with_engine(
    opened: _Opened,
    decoder: OnnxDecoder,
    options: EngineOptions,
    budget: int,
    metrics: Metrics,
    resources: ExitStack,
) -> TextModel:
    tokenizer, folder = opened.tokenizer, opened.folder
    try:
        plan = plan_memory(decoder, options.max_batch_size, options.max_context, budget)
    except InputError as error:
        raise ConversionError(str(error)) from None
    log.info("%s: %d sequences of %d tokens", opened.name, plan.rows, plan.context)
    observer = EngineMetrics(metrics, opened.name, plan.rows * plan.context)
    engine = Engine(decoder, tokenizer, plan, options.max_queue, observer)
    resources.callback(engine.close)
    end_tokens = _end_tokens(folder, decoder, tokenizer)
    return TextModel(opened.name, tokenizer, engine, end_tokens, ChatTemplate.beside(folder))


def _end_tokens(folder: Path, decoder: OnnxDecoder, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a text: those of ``generation_config.json``, or the tokenizer's, or the model's."""
    stated = controls_beside(folder).values.get("eos_token_id")
    if stated is not None:
        return tuple(stated)
    end = end_token_of(decoder, tokenizer)
    return () if end is None else (end,)
