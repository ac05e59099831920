"""Activations rounded in torch as ONNX Runtime rounds them. ``gpt2x.verify.exact_arithmetic`` compares with these."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model import GPT2, MLP, Projection

Rounding = Callable[[Tensor, bool], Tensor]  # (activations, whether they come from GELU) -> rounded activations


def round_inputs(model: GPT2, rounded: Rounding) -> GPT2:
    """Round the input of every product with a weight. Returns the same model."""
    after_gelu = {module.c_proj for module in model.modules() if isinstance(module, MLP) and _has_gelu(module)}
    for module in model.modules():
        if isinstance(module, Projection):
            module.register_forward_pre_hook(_rounding_hook(rounded, module in after_gelu))
    table = model.wte.weight if model.lm_head is None else model.lm_head.weight
    model.logits = lambda x: F.linear(rounded(x, False), table)  # type: ignore[method-assign]
    return model


def _has_gelu(mlp: MLP) -> bool:
    """Whether ``Gelu`` of ONNX computes the activation, as ``Value.after_gelu`` states in the graph."""
    return any(isinstance(part, torch.nn.GELU) for part in mlp.act.modules())


def _rounding_hook(rounded: Rounding, after_gelu: bool) -> Callable[[object, tuple[Tensor]], tuple[Tensor]]:
    return lambda _, arguments: (rounded(arguments[0], after_gelu),)


def by_row(x: Tensor, after_gelu: bool) -> Tensor:
    """8 bits, one scale for each row: as ``gpt2x.precisions.w8a8`` does in the graph."""
    if after_gelu:
        # The numbers of w8a8.py, which says where they come from.
        zero, levels = 16, 239
        largest = x.amax(-1, keepdim=True).clamp(min=levels / 94)
    else:
        zero, levels = 128, 127
        largest = x.abs().amax(-1, keepdim=True)
    largest = torch.where(largest == 0, 1, largest)
    return ((x / largest * levels).round() + zero).clamp(0, 255).sub(zero) / levels * largest


def by_block(x: Tensor, block: int) -> Tensor:
    """8 bits, one scale for each block of a row: as ONNX Runtime's MatMulNBits does with 8-bit activations."""
    padding = -x.shape[-1] % block
    cut = F.pad(x, (0, padding)).unflatten(-1, (-1, block))
    largest = cut.abs().amax(-1, keepdim=True)
    largest = torch.where(largest == 0, 1, largest)
    rounded = (cut / largest * 127).round() / 127 * largest
    whole: Tensor = rounded.flatten(-2)
    return whole[..., : x.shape[-1]]
