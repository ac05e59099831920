"""What a precision's arithmetic gives where it is computed exactly: the weights that an ONNX model stores, and activations
and cache rounded as ONNX Runtime rounds them, in torch, with sums in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional as F

from converters import Checkpoint, LazyTensor

from ..load import model_of
from ..model import GPT2, MLP, Attention, Projection
from ..precisions.weights import BLOCKWISE, TABLES
from ..runtimes.base import Decoder
from ..runtimes.torch import TorchDecoder
from .quantized_weights import read_stored


def rounded_model(a: Checkpoint, subject: Any) -> Decoder:
    """The model of a checkpoint in a precision, computed exactly.

    Args:
        a: what ``subject`` was exported from.
        subject: an ``OnnxDecoder``.
    """
    tensors, block = {}, 1
    for name, stored in read_stored(subject.path, a.config.shapes()):
        assert stored is not None, f"{name} is missing"
        values = stored.values()
        tensors[name] = LazyTensor.of(values.T.copy() if name in TABLES and stored.scale is not None else values)
        block = stored.block if stored.scale is not None else block
    model = model_of(replace(a, tensors=tensors))
    if subject.precision == "fp16":
        model = model.half()
    elif subject.precision == "w8a8":
        _round_inputs(model, _by_row)
    elif subject.precision in BLOCKWISE:
        _round_inputs(model, lambda x, positive: _by_block(x, block))
    if subject.cache_kind.endswith("int8"):
        _round_caches(model, subject)
    return TorchDecoder(model)


def _round_inputs(model: GPT2, rounded: Callable[[Tensor, bool], Tensor]) -> None:
    """Round what every product with a weight is given. ``positive`` says that it comes out of GELU."""
    gelu = model.config.activation_function.startswith("gelu")
    after_gelu = {module.c_proj for module in model.modules() if isinstance(module, MLP)} if gelu else set()
    for module in model.modules():
        if isinstance(module, Projection):
            positive = module in after_gelu
            module.register_forward_pre_hook(lambda _, args, p=positive: (rounded(args[0], p),))
    table = model.wte.weight if model.lm_head is None else model.lm_head.weight
    model.logits = lambda x: F.linear(rounded(x, False), table)  # type: ignore[method-assign]


def _by_row(x: Tensor, positive: bool) -> Tensor:
    """As ``gpt2x.export.onnx_graph._multiply_whole``: 8 bits, and one scale a row."""
    if positive:
        zero, levels = 16, 239
        largest = x.amax(-1, keepdim=True).clamp(min=levels / 94)
    else:
        zero, levels = 128, 127
        largest = x.abs().amax(-1, keepdim=True)
    largest = torch.where(largest == 0, 1, largest)
    return ((x / largest * levels).round() + zero).clamp(0, 255).sub(zero) / levels * largest


def _by_block(x: Tensor, block: int) -> Tensor:
    """As ONNX Runtime's MatMulNBits with 8-bit activations: one scale for each block of a row."""
    short = -x.shape[-1] % block
    cut = F.pad(x, (0, short)).unflatten(-1, (-1, block))
    largest = cut.abs().amax(-1, keepdim=True)
    largest = torch.where(largest == 0, 1, largest)
    rounded = (cut / largest * 127).round() / 127 * largest
    whole: Tensor = rounded.flatten(-2)
    return whole[..., : x.shape[-1]]


def _round_caches(model: GPT2, subject: Any) -> None:
    """Round keys and values to 8 bits by the scales that the ONNX model has for them."""
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
