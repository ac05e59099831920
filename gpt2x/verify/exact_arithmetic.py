"""Exact arithmetic: an ONNX model's stored weights, with activations and cache rounded as ONNX Runtime rounds them, computed
in torch with float32 sums."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from converters import Checkpoint, LazyTensor
from converters.adapters import Adapter
from converters.opening.adapter import merge_adapter

from .. import contract
from ..load import model_of
from ..model import GPT2, Attention
from ..precisions import PRECISIONS
from ..precisions.stored import TABLES
from ..runtimes.base import Decoder
from ..runtimes.torch import TorchDecoder
from .quantized_weights import read_stored


def rounded_model(a: Checkpoint, subject: Any, adapter: Adapter | None = None) -> Decoder:
    """The model of a checkpoint in a precision, in exact arithmetic.

    Args:
        a: what ``subject`` was exported from.
        subject: an ``OnnxDecoder``.
        adapter: what ``subject`` takes at run time. It is added to the rounded weights.
    """
    tensors: dict[str, LazyTensor] = {}
    block = 1
    for name, stored in read_stored(subject.path, a.config.shapes()):
        assert stored is not None, f"{name} is missing"
        values = stored.values()
        if stored.scale is not None:
            block = stored.block
            values = values.T.copy() if name in TABLES else values
        tensors[name] = LazyTensor.of(values)
    rounded = replace(a, tensors=tensors)
    if adapter is not None:
        rounded = merge_adapter(rounded, adapter)
    model = PRECISIONS[subject.precision].exact(model_of(rounded), block)
    if contract.has_int8_cache(subject.cache_kind):
        _round_caches(model, subject)
    return TorchDecoder(model)


def _round_caches(model: GPT2, subject: Any) -> None:
    """Round keys and values to int8 with the ONNX model's scales."""
    graph = onnx.load(subject.path, load_external_data=False).graph
    scales = {t.name: numpy_helper.to_array(t).reshape(-1) for t in graph.initializer if _is_cache_scale(t.name)}
    for i, block in enumerate(model.h):
        attention: Attention = block.attn  # type: ignore[assignment]
        both = [scales[f"h.{i}.attn.{part}_scale"] for part in ("key", "value")]  # (C,) each
        scale = torch.from_numpy(np.concatenate(both))
        attention.c_attn.register_forward_hook(partial(_round_keys, scale))


def _is_cache_scale(name: str) -> bool:
    return name.endswith((".key_scale", ".value_scale"))


def _round_keys(scale: Tensor, _module: Any, _inputs: Any, qkv: Tensor) -> Tensor:
    q, kv = qkv.tensor_split([qkv.shape[-1] // 3], -1)
    rounded = (kv / scale).round().clamp(-128, 127) * scale
    return torch.cat((q, rounded.to(qkv.dtype)), -1)
