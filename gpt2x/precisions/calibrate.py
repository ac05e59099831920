"""The float32 model run on a calibration text: Hessians for GPTQ, scales of an int8 cache, largest activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from converters import Checkpoint

from ..load import model_of
from ..model import Projection

TOKENS = 16384  # of the text, at most
MARGIN = 1.5  # of the range of an int8 cache, over the largest value seen
LEAST = 3  # a channel's range is at least the layer's largest value, divided by this
Hessians = dict[str, NDArray[np.float32]]


def hessians(checkpoint: Checkpoint, ids: Sequence[int]) -> Iterator[Hessians]:
    """Canonical name of a matrix -> (K, K), the mean of ``x x^T`` over the rows that it is multiplied with.

    Yields those of one transformer block at a time, so that no more are in memory; at last those of the logits, under
    the name of their table.
    """
    model = model_of(checkpoint).eval()
    pieces = _pieces(checkpoint, ids)
    n = sum(piece.shape[1] for piece in pieces)
    with torch.inference_mode():
        states = [model.wte(piece) + model.wpe(torch.arange(piece.shape[1])[None]) for piece in pieces]  # (1, T, C)
        for i, block in enumerate(model.h):
            sums: dict[str, Tensor] = {}
            hooks = _hooks_on_projections(block, f"h.{i}", sums)
            states = [block(x, None, None, False)[0] for x in states]
            # A hook holds the sums of its block, which would stay in memory with the model.
            for hook in hooks:
                hook.remove()
            yield _means(sums, n)
        sums = {}
        table = "wte.weight" if model.lm_head is None else "lm_head.weight"
        for x in states:
            _add(sums, table, None, (model.ln_f(x),))
        yield _means(sums, n)


def _pieces(checkpoint: Checkpoint, ids: Sequence[int]) -> list[Tensor]:
    """The first tokens of a text in pieces of a full context, (1, T) each."""
    n_ctx, n = checkpoint.config.n_ctx, min(len(ids), TOKENS)
    return [torch.tensor([ids[start : min(start + n_ctx, n)]]) for start in range(0, n, n_ctx)]


def _hooks_on_projections(
    block: nn.Module, prefix: str, sums: dict[str, Tensor]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Let every projection of a block add its inputs to ``sums``."""
    hooks = []
    for name, module in block.named_modules():
        if isinstance(module, Projection):
            hook = partial(_add, sums, f"{prefix}.{name}.weight")
            hooks.append(module.register_forward_pre_hook(hook))
    return hooks


def _add(sums: dict[str, Tensor], name: str, module: object, arguments: tuple[Tensor, ...]) -> None:
    rows = arguments[0].flatten(0, -2)  # (T, K)
    product = rows.T @ rows
    sums[name] = sums[name] + product if name in sums else product


def _means(sums: dict[str, Tensor], n: int) -> Hessians:
    return {name: (total / n).numpy() for name, total in sums.items()}


def cache_scales(checkpoint: Checkpoint, ids: Sequence[int]) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """For each layer, the scales (H, 1, D) of int8 keys and values.

    The range of a channel is ``MARGIN`` times its largest value on these tokens, and at least a third of the layer's
    largest: another text may have larger values, and clipping loses more than rounding.
    """
    largest = _largest_cached(checkpoint, ids)
    return [(_scale(keys), _scale(values)) for keys, values in largest]


def _largest_cached(checkpoint: Checkpoint, ids: Sequence[int]) -> list[list[Tensor]]:
    """For each layer, the largest magnitudes (H, D) of keys and of values."""
    model = model_of(checkpoint).eval()
    largest: list[list[Tensor]] = []
    with torch.inference_mode():
        for piece in _pieces(checkpoint, ids):
            _, present = model.hidden(piece)
            seen = [[x.abs().amax((0, 2)) for x in pair] for pair in present]  # (H, D) each
            largest = _maxima(largest, seen) if largest else seen
    return largest


def _maxima(first: list[list[Tensor]], second: list[list[Tensor]]) -> list[list[Tensor]]:
    result = []
    for one, other in zip(first, second, strict=True):
        result.append(list(map(torch.maximum, one, other)))
    return result


def _scale(largest: Tensor) -> NDArray[np.float32]:
    """The scales (H, 1, D) of values with these largest magnitudes (H, D)."""
    covered = torch.maximum(MARGIN * largest, largest.max() / LEAST)
    scale: NDArray[np.float32] = covered.clamp(min=1e-20).div(127).unsqueeze(1).numpy()
    return scale


def largest_values(checkpoint: Checkpoint, ids: Sequence[int]) -> dict[str, float]:
    """Canonical name of each projection -> the largest magnitude of its input and output on these tokens."""
    model = model_of(checkpoint).eval()
    largest: dict[str, float] = {}

    def see(name: str, module: object, arguments: tuple[Tensor, ...], result: Tensor) -> None:
        largest[name] = max(float(x.abs().max()) for x in (arguments[0], result))

    for name, module in model.named_modules():
        if isinstance(module, Projection):
            module.register_forward_hook(partial(see, name))
    with torch.inference_mode():
        model.hidden(torch.tensor([list(ids)]))
    return largest
