"""How many sequences a budget of memory holds."""

from __future__ import annotations

from dataclasses import dataclass

from converters import ConversionError

from ..runtimes.kv_cache import grown_capacity
from ..runtimes.onnxruntime import OnnxDecoder

PREFIX_SHARE = 4  # the prefix cache gets one part of so many


class BudgetError(ConversionError):
    """The budget does not hold one sequence."""


@dataclass(frozen=True)
class MemoryPlan:
    """What the caches of a model get.

    Attributes:
        rows: sequences that run at once.
        context: tokens of a sequence, at most.
        row_bytes: of the keys and values of a sequence.
        prefix_bytes: of the prefix cache.
    """

    rows: int
    context: int
    row_bytes: int
    prefix_bytes: int


def bytes_per_token(decoder: OnnxDecoder) -> int:
    """The size of a token's keys and values: ``2 * n_layer * n_embd`` numbers."""
    config = decoder.config
    return int(2 * config.n_layer * config.n_embd * decoder.in_place_run().model.cache_dtype.itemsize)


def plan_memory(decoder: OnnxDecoder, most_rows: int, context: int | None, budget: int) -> MemoryPlan:
    """Divide a budget between the sequences and the prefix cache.

    Args:
        most_rows: sequences that run at once, if memory allows.
        context: tokens of a sequence, at most; None for the model's context.
        budget: bytes.

    Raises:
        BudgetError: if one sequence does not fit.
        InputError: if the model's cache grows.
    """
    context = min(context or decoder.n_ctx, decoder.n_ctx)
    row = grown_capacity(0, context, decoder.n_ctx) * bytes_per_token(decoder)
    prefix = min(budget // PREFIX_SHARE, most_rows * row)
    rows = min(most_rows, (budget - prefix) // row)
    if rows < 1 and budget >= row:
        rows, prefix = 1, 0
    if rows < 1:
        raise BudgetError(
            f"{decoder.path}: a sequence of {context} tokens needs {row / 1e6:.1f} MB of cache, and the budget is "
            f"{budget / 1e6:.1f} MB: raise --cache-memory, or lower --max-context"
        )
    return MemoryPlan(rows, context, row, prefix)
