"""The factors of a LoRA adapter as a model takes them at run time, apart from its weights: y = x W + (x A) B."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .adapters import Adapter
from .checkpoint import Checkpoint
from .dtypes import F32
from .errors import CheckpointError
from .opening.adapter import check_fits
from .spec import PROJECTIONS, projections
from .tensors import LazyTensor


@dataclass(frozen=True)
class Factors:
    """The factors of one projection in float32: ``a`` is [in, rank], and ``b`` is [rank, out] with the scale in it."""

    a: LazyTensor
    b: LazyTensor


def run_time_factors(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, Factors]:
    """Projection, such as ``h.0.attn.c_attn`` -> the factors that an adapter has for it, in the order of the model.

    Values are computed in float64 and rounded once, lazily.

    Raises:
        CheckpointError: if the adapter does not fit the checkpoint, or changes more than projections, so that it can only
            be merged.
        ConversionError (while streaming): if a value does not fit into float32, or is NaN or infinite.
    """
    check_fits(checkpoint, adapter)
    reason = _why_merged(adapter)
    if reason:
        raise CheckpointError(
            f"{adapter.path}: {reason}, which cannot be done at run time. Merge the adapter: pass its directory without "
            "a name before it"
        )
    factors = {}
    for projection in projections(checkpoint.config.n_layer):
        change = adapter.factors.get(f"{projection}.weight")
        if change:
            a = _scaled(change.a.transposed(), 1.0, f"{projection}.lora_A")
            b = _scaled(change.b.transposed(), change.scale, f"{projection}.lora_B")
            factors[projection] = Factors(a, b)
    return factors


def _why_merged(adapter: Adapter) -> str | None:
    """What an adapter does besides changing projections by low rank; None if it does nothing else."""
    for name, change in adapter.factors.items():
        if not name.endswith(tuple(f".{projection}.weight" for projection in PROJECTIONS)):
            return f"it changes {name}"
        if change.magnitude is not None:
            return f"it changes {name} by DoRA"
        if change.bias is not None:
            return f"it changes {name.removesuffix('weight')}bias"
    if adapter.rows:
        return f"it replaces rows of {next(iter(adapter.rows))}"
    if adapter.replaced:
        return f"it replaces {next(iter(adapter.replaced))}"
    return None


def _scaled(factor: LazyTensor, scale: float, name: str) -> LazyTensor:
    """A factor times a number, in float32."""

    def stream() -> Iterator[bytes]:
        from .lora_arrays import scaled

        yield from scaled(factor, scale, name)

    return LazyTensor(F32, factor.shape, stream, None, factor.checksummed)
