"""What a model's matrices are multiplied with on a text: the Hessians that rounding goes by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from converters import Checkpoint

from ..load import model_of
from ..model import Projection

TOKENS = 16384  # of the text, at most
Hessians = dict[str, NDArray[np.float32]]


def hessians(checkpoint: Checkpoint, ids: Sequence[int]) -> Iterator[Hessians]:
    """Canonical name -> (K, K), the mean of ``x x^T`` over the rows that a matrix is multiplied with.

    A block of the model at a time, so that memory holds one block's; at last those of the output, under the name of its
    table.
    """
    model = model_of(checkpoint).eval()
    n_ctx, n = checkpoint.config.n_ctx, min(len(ids), TOKENS)
    pieces = [torch.tensor([ids[i : min(i + n_ctx, n)]]) for i in range(0, n, n_ctx)]
    with torch.inference_mode():
        states = [model.wte(piece) + model.wpe(torch.arange(piece.shape[1])[None]) for piece in pieces]  # (1, T, C)
        for i, block in enumerate(model.h):
            sums: dict[str, Tensor] = {}
            hooks = [
                module.register_forward_pre_hook(partial(_add, sums, f"h.{i}.{name}.weight"))
                for name, module in block.named_modules()
                if name.endswith(("c_attn", "c_proj", "c_fc"))
            ]
            states = [block(x, None, None, False)[0] for x in states]
            for hook in hooks:
                hook.remove()
            yield {name: (total / n).numpy() for name, total in sums.items()}
        sums = {}
        for x in states:
            _add(sums, "wte.weight" if model.lm_head is None else "lm_head.weight", None, (model.ln_f(x),))
        yield {name: (total / n).numpy() for name, total in sums.items()}


def cache_scales(checkpoint: Checkpoint, ids: Sequence[int]) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """For each layer, the scales (H, 1, D) of its keys and its values as 8-bit numbers.

    A channel's scale covers half as much again as it showed on these tokens, and at least a third of the layer's largest:
    what a text does not show may come, and rounding hurts less than cutting off.
    """
    model = model_of(checkpoint).eval()
    n_ctx, n = checkpoint.config.n_ctx, min(len(ids), TOKENS)
    largest: list[list[Tensor]] = []
    with torch.inference_mode():
        for start in range(0, n, n_ctx):
            _, present = model.hidden(torch.tensor([ids[start : min(start + n_ctx, n)]]))
            seen = [[x.abs().amax((0, 2)) for x in pair] for pair in present]  # (H, D) each
            pairs = zip(largest or seen, seen, strict=True)
            largest = [[torch.maximum(a, b) for a, b in zip(*two, strict=True)] for two in pairs]
    keys, values = (
        [torch.maximum(1.5 * x, x.max() / 3).clamp(min=1e-20).div(127).unsqueeze(1).numpy() for x in part]
        for part in zip(*largest, strict=True)
    )
    return list(zip(keys, values, strict=True))


def largest_values(checkpoint: Checkpoint, ids: Sequence[int]) -> dict[str, float]:
    """Canonical name of each projection -> the largest number that goes in or comes out, by magnitude, on these tokens."""
    model, largest = model_of(checkpoint).eval(), dict[str, float]()

    def see(name: str, module: object, arguments: tuple[Tensor, ...], result: Tensor) -> None:
        largest[name] = max(float(x.abs().max()) for x in (arguments[0], result))

    for name, module in model.named_modules():
        if isinstance(module, Projection):
            module.register_forward_hook(partial(see, name))
    with torch.inference_mode():
        model.hidden(torch.tensor([list(ids)]))
    return largest


def _add(sums: dict[str, Tensor], name: str, module: object, arguments: tuple[Tensor, ...]) -> None:
    rows = arguments[0].flatten(0, -2)  # (T, K)
    product = rows.T @ rows
    sums[name] = sums[name] + product if name in sums else product
