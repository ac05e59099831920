"""GPT-2 in ONNX Runtime. Needs numpy and onnxruntime, and never imports torch.

decoder = OnnxDecoder("gpt2-onnx/")
print(generate_text(decoder, Tokenizer.from_pretrained("gpt2-onnx/"), "ROMEO:", 50))
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters import CheckpointError

from .. import contract
from ..memory import give_back
from ..precisions import PAIR, PRECISIONS, precisions_in
from .adapter_files import AdapterFile
from .base import Decoder, Ids, InputError, Logits
from .kv_cache import RowCache
from .onnx_context import Context
from .onnx_model import ActiveAdapter, OnnxModel, SessionSettings, needs_exact_products, open_model
from .onnx_providers import Provider, runtime_name
from .onnx_run import GrowingRun, InPlaceRun


class OnnxDecoder(Decoder):
    """An ONNX model with a KV cache.

    A model with a cache in place (``--cache inplace``) has a ``RowCache``, which each step changes: the cache that an
    earlier step returned is changed, too. Padding on either side is removed from its input.

    It is also a context manager: ``with OnnxDecoder(path) as decoder`` frees the model at the end, as ``close`` does.

    Args:
        path: a directory that ``gpt2x export --onnx`` wrote, or an ``.onnx`` file of the same contract.
        precision: which model of a directory; by default fp32, or else the only one. A pair such as ``w8a8+int4`` are the
            two that ``prefill`` and ``decode`` name.
        prefill: the precision of the model that reads prompts, with ``decode``. Both keep their caches in place, and share
            it.
        decode: the precision of the model that decodes, with ``prefill``.
        threads: threads for each operator; by default one for each core.
        optimize: enable ONNX Runtime's graph optimizations (``ORT_ENABLE_ALL``, its default).
        providers: ONNX Runtime's execution providers in order of preference; each a name, or a name and its options.
            "cpu", "cuda" and "webgpu" are short names. The cache is in the memory of the first one that needs it.
        adapter: the name of the adapter beside the model that ``run`` and ``step`` take, unless they are given another.

    Raises:
        FormatError: if there is no model, it is damaged, its file of weights is incomplete, or it has no such adapter.
        CheckpointError: if its inputs and outputs are not the contract's, or the adapter does not fit; the message lists
            every difference.
        ConfigError: if it has no configuration.
        ValueError: if the number of threads is out of range, or this ONNX Runtime has no such provider.
    """

    path: Path
    can_truncate = True

    def __init__(
        self,
        path: str | Path,
        *,
        precision: str | None = None,
        prefill: str | None = None,
        decode: str | None = None,
        threads: int | None = None,
        optimize: bool = True,
        providers: str | Sequence[Provider] = ("CPUExecutionProvider",),
        adapter: str | None = None,
    ) -> None:
        settings = SessionSettings(threads, optimize, providers)
        for_prompts, for_tokens = phases(precision, prefill, decode)
        has_adapter = adapter is not None
        prompts = None
        if for_prompts is None:
            model = open_model(path, for_tokens, settings, with_inputs=has_adapter)
        else:
            model = open_model(path, for_tokens, replace(settings, phase="decoding"), with_inputs=has_adapter)
            prompts = open_model(path, for_prompts, replace(settings, phase="prompts"), with_inputs=has_adapter)
            check_pair(prompts, model)
        self._source = Path(path)
        self._settings = settings
        self._model = model
        self._prompts = prompts
        self._context = Context(prompts or model, settings)
        self.path = model.path
        self.threads = threads
        self.metadata = model.metadata
        self.config = model.config
        self.precision = f"{prompts.precision}{PAIR}{model.precision}" if prompts else model.precision
        self.cache_kind = model.cache_kind
        self.last_only = model.last_only or bool(prompts and prompts.last_only)
        kind = PRECISIONS[model.precision]
        self.near_tie, self.several_price = kind.near_tie, kind.several_price
        self.same_in_runs = kind.row_by_row and contract.has_int8_cache(model.cache_kind)
        self.inputs, self.outputs = model.inputs, model.outputs
        self._use(adapter)

    def _use(self, adapter: str | None) -> None:
        """Take an adapter in every run."""
        self._run = self._run_with(adapter)
        self.adapter = adapter
        files = f"{self._prompts.path.name} and {self.path.name}" if self._prompts else self.path.name
        self.runtime = f"{files} in {runtime_name(self._settings.providers)}"
        if adapter is not None:
            self.runtime += f" with the adapter {adapter}"

    def _run_with(self, adapter: str | None) -> InPlaceRun | GrowingRun:
        """How the model is run with an adapter of this name."""
        chosen = self._model.adapter(adapter)
        if adapter is not None:
            self._take_adapters()
        return _new_run(self._model, chosen, self._prompts)

    def _take_adapters(self) -> None:
        """Load the graphs with inputs for adapters, where those without are loaded.

        Raises:
            FormatError, CheckpointError: as ``OnnxModel.take_adapters``.
        """
        for model in filter(None, (self._model, self._prompts)):
            if not model.has_inputs:
                self._context.close()  # its graph has no such inputs
                model.take_adapters()

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters beside the model."""
        return tuple(self._model.adapters)

    def with_adapter(self, name: str | None) -> OnnxDecoder:
        """The same model with another adapter in every run; without a name, with none. They share the model's memory.

        The first adapter replaces the graph that was loaded by the one with inputs for adapters, which takes the time of
        opening the model. No other thread may use the decoder meanwhile. From then on, steps without an adapter take a
        little longer, too. ``OnnxDecoder(path, adapter=...)`` loads that graph at once.

        Raises:
            FormatError: if there is no such adapter, or its file is invalid.
            CheckpointError: if it does not fit the model.
        """
        decoder = copy.copy(self)
        decoder._use(name)
        return decoder

    def adapter_file(self, name: str) -> AdapterFile:
        """The adapter of this name beside the model, which is not read.

        Raises:
            FormatError: if there is none, or its file is invalid.
            CheckpointError: if it does not fit the model.
        """
        return self._model.adapter_file(name)

    @property
    def in_place(self) -> bool:
        """Whether the cache stays in place."""
        return self._model.in_place

    def run(
        self,
        input_ids: Ids,
        attention_mask: Ids | None,
        position_ids: Ids,
        cache: Any,
        adapter: str | None = None,
    ) -> tuple[Logits, Any]:
        """As ``Decoder.run``, in one run of the model.

        Args:
            adapter: the name of an adapter beside the model; by default the decoder's. The first one has the effect that
                ``with_adapter`` describes.

        Raises:
            InputError: if the arguments do not fit the model or one another, or the cache is of another adapter.
            FormatError: if there is no such adapter.
        """
        ids, positions = self._model.check_tokens(input_ids, position_ids)
        return self._chosen(adapter).run(ids, attention_mask, positions, cache)

    def step(
        self,
        input_ids: Ids,
        attention_mask: Ids | None,
        position_ids: Ids,
        cache: Any,
        adapter: str | None = None,
    ) -> tuple[Logits, Any]:
        """As ``Decoder.step``. A long prompt is split into chunks.

        Args:
            adapter: the name of an adapter beside the model; by default the decoder's. The first one has the effect that
                ``with_adapter`` describes.

        Raises:
            InputError: if the arguments do not fit the model or one another, or the cache is of another adapter.
            FormatError: if there is no such adapter.
        """
        ids, positions = self._model.check_tokens(input_ids, position_ids)
        logits, cache = self._chosen(adapter).step(ids, attention_mask, positions, cache)
        return logits[:, -1], cache

    def _chosen(self, adapter: str | None) -> InPlaceRun | GrowingRun:
        """The run with this adapter, by default with the decoder's."""
        return self._run if adapter in (None, self.adapter) else self._run_with(adapter)

    def extra_outputs(self, ids: Ids) -> dict[str, NDArray[Any]]:
        """The outputs besides the logits and the cache for rows of tokens (B, T) without padding, by their names.

        Raises:
            InputError: if the tokens do not fit the model.
            FormatError: if ONNX Runtime fails.
        """
        positions = np.arange(ids.shape[1])[None].repeat(len(ids), 0)
        ids, positions = self._model.check_tokens(ids, positions)
        return self._model.extra_outputs(ids, positions)

    def extend(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> Any:
        """As ``Decoder.extend``. Where onnx is installed, a model of at most 1 GB computes no logits for it, in a session
        that has its weights again.

        Raises:
            InputError: if the arguments do not fit the model or one another.
        """
        ids, positions = self._model.check_tokens(input_ids, position_ids)
        run = self._context_run() if ids.shape[1] > 1 else self._run
        return run.step(ids, attention_mask, positions, cache)[1]

    def _context_run(self) -> InPlaceRun | GrowingRun:
        """The run of the model for prompts without its logits; the decoder's own if there is none."""
        context = self._context.model
        return self._run if context is None else _new_run(context, self._run.adapter)

    def reorder(self, cache: Any, rows: Ids) -> Any:
        """As ``Decoder.reorder``. In a cache in place, only rows that change are copied."""
        return self._run.reorder(cache, rows)

    def truncate(self, cache: Any, length: int) -> Any:
        """As ``Decoder.truncate``. In a cache in place, only its length changes."""
        return self._run.truncate(cache, length)

    def row_cache(self, rows: int) -> RowCache:
        """An empty cache of so many rows.

        Raises:
            InputError: if the model's cache does not stay in place.
        """
        return self.in_place_run().new_cache(rows)

    def in_place_run(self) -> InPlaceRun:
        """The run of a model with a cache in place.

        Raises:
            InputError: if the model's cache grows.
        """
        if not isinstance(self._run, InPlaceRun):
            raise InputError(f"{self.path}: its cache grows; export the model with --cache inplace")
        return self._run

    def unoptimized(self) -> OnnxDecoder | None:
        """The same model with graph optimizations disabled; None if its exact products come only with them."""
        models = [self._model, self._prompts] if self._prompts else [self._model]
        if any(needs_exact_products(model.metadata) for model in models):
            return None
        settings = self._settings
        path, precision = (self._source, self.precision) if self._prompts else (self.path, None)
        return OnnxDecoder(
            path,
            precision=precision,
            threads=settings.threads,
            optimize=False,
            providers=settings.providers,
            adapter=self.adapter,
        )

    def close(self) -> None:
        """Free the model's memory. Neither the decoder nor those of ``with_adapter``, which share it, can be used after that;
        closing one of them again does nothing.
        """
        self._model.session = None
        if self._prompts:
            self._prompts.session = None
        self._context.close()
        give_back()

    def __enter__(self) -> OnnxDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _new_run(model: OnnxModel, adapter: ActiveAdapter, prompts: OnnxModel | None = None) -> InPlaceRun | GrowingRun:
    if model.in_place:
        return InPlaceRun(model, adapter, prompts)
    return GrowingRun(model, adapter)


def phases(precision: str | None, prefill: str | None, decode: str | None) -> tuple[str | None, str | None]:
    """Return the precisions of the model for prompts, None if it is the same model, and of the model that decodes.

    Raises:
        ValueError: if a pair is incomplete, or its precisions are the same or unknown.
    """
    if prefill is None and decode is None:
        if precision is None or PAIR not in precision:
            return None, precision
        prefill, decode = (each.name for each in precisions_in(precision))
    elif precision is not None or prefill is None or decode is None:
        raise ValueError("pass either precision, or prefill and decode")
    elif prefill == decode:
        return None, decode
    return prefill, decode


def check_pair(prompts: OnnxModel, model: OnnxModel) -> None:
    """Refuse two models that cannot share a cache.

    Raises:
        CheckpointError: if a cache grows, or they are not of one model with the same kind of cache.
    """
    both = f"{prompts.path} and {model.path}"
    if not prompts.in_place or not model.in_place:
        raise CheckpointError(
            f"{both}: their caches grow, and two models share one in place: export with --cache inplace"
        )
    if prompts.config != model.config:
        raise CheckpointError(f"{both}: their configurations differ")
    if prompts.factor_inputs != model.factor_inputs:
        raise CheckpointError(f"{both}: they take other adapters: export both in one command")
    if (prompts.cache_kind, prompts.cache_dtype) != (model.cache_kind, model.cache_dtype):
        raise CheckpointError(
            f"{both}: one keeps its cache in {prompts.cache_dtype}, the other in {model.cache_dtype}: "
            "choose two precisions with the same"
        )
