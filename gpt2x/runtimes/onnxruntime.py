"""GPT-2 in ONNX Runtime. Needs numpy and onnxruntime, and never imports torch.

decoder = OnnxDecoder("gpt2-onnx/")
print(generate_text(decoder, Tokenizer.from_pretrained("gpt2-onnx/"), "ROMEO:", 50))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from .. import contract
from ..memory import give_back
from ..precisions import PRECISIONS
from .base import Decoder, Ids, InputError, Logits
from .kv_cache import RowCache
from .onnx_model import Provider, SessionSettings, needs_exact_products, open_model
from .onnx_run import GrowingRun, InPlaceRun


class OnnxDecoder(Decoder):
    """An ONNX model with a KV cache.

    A model with a cache in place (``--cache inplace``) has a ``RowCache``, which each step changes: the cache that an
    earlier step returned is changed, too. Padding on either side is removed from its input.

    It is also a context manager: ``with OnnxDecoder(path) as decoder`` frees the model at the end, as ``close`` does.

    Args:
        path: a directory that ``gpt2x export --onnx`` wrote, or an ``.onnx`` file of the same contract.
        precision: which model of a directory; by default fp32, or else the only one.
        threads: threads for each operator; by default one for each core.
        optimize: enable ONNX Runtime's graph optimizations (``ORT_ENABLE_ALL``, its default).
        providers: ONNX Runtime's execution providers in order of preference; each a name, or a name and its options.

    Raises:
        FormatError: if there is no model, it is damaged, or its file of weights is incomplete.
        CheckpointError: if its inputs and outputs are not the contract's; the message lists every difference.
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
        threads: int | None = None,
        optimize: bool = True,
        providers: Sequence[Provider] = ("CPUExecutionProvider",),
    ) -> None:
        settings = SessionSettings(threads, optimize, tuple(providers))
        model = open_model(path, precision, settings)
        self._settings = settings
        self._model = model
        self._run = InPlaceRun(model) if model.in_place else GrowingRun(model)
        self.path = model.path
        self.metadata = model.metadata
        self.config = model.config
        self.precision = model.precision
        self.cache_kind = model.cache_kind
        self.last_only = model.last_only
        kind = PRECISIONS[model.precision]
        self.near_tie, self.several_price = kind.near_tie, kind.several_price
        self.same_in_runs = kind.row_by_row and contract.has_int8_cache(model.cache_kind)
        self.inputs, self.outputs = model.inputs, model.outputs
        self.runtime = f"{self.path.name} in ONNX Runtime {ort.__version__}"

    @property
    def in_place(self) -> bool:
        """Whether the cache stays in place."""
        return self._model.in_place

    def run(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """As ``Decoder.run``, in one run of the model.

        Raises:
            InputError: if the arguments do not fit the model or one another.
        """
        ids, positions = self._model.check_tokens(input_ids, position_ids)
        if isinstance(self._run, InPlaceRun):
            return self._run.run(ids, attention_mask, positions, cache, last=self.last_only)
        return self._run.run(ids, attention_mask, positions, cache)

    def step(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """As ``Decoder.step``. A long prompt is split into chunks.

        Raises:
            InputError: if the arguments do not fit the model or one another.
        """
        ids, positions = self._model.check_tokens(input_ids, position_ids)
        if isinstance(self._run, InPlaceRun):
            logits, cache = self._run.run(ids, attention_mask, positions, cache, last=True)
        else:
            logits, cache = self._run.step(ids, attention_mask, positions, cache)
        return logits[:, -1], cache

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
        if needs_exact_products(self.metadata):
            return None
        settings = self._settings
        return OnnxDecoder(self.path, threads=settings.threads, optimize=False, providers=settings.providers)

    def close(self) -> None:
        """Free the model's memory. The decoder cannot be used after that; closing it twice does nothing."""
        self._model.session = None
        give_back()

    def __enter__(self) -> OnnxDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
