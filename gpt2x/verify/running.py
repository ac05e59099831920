"""Run two models on the same tokens, within the bounds of their precisions."""

from __future__ import annotations

import logging

from converters import Checkpoint
from converters.adapters import Adapter
from converters.opening.adapter import merge_adapter
from converters.tokenizer import TokenizerFiles

from .. import contract
from ..precisions import Bounds, precisions_in
from ..runtimes.base import Decoder
from ..runtimes.opening import gpt2x_model
from ..runtimes.reference import ReferenceDecoder
from . import packages
from .checks import Check, failed
from .metrics import CACHE8, FP32, loosest, measure, widened
from .sample_text import sample_ids
from .scenarios import compare_runs, one_pass

log = logging.getLogger(__name__)


def run_both(
    reference: Decoder,
    model: Decoder,
    tokenizer: TokenizerFiles | None,
    text: str | None,
    bounds: Bounds | None = None,
) -> list[Check]:
    """Run both on a full context, and state what runs on which tokens."""
    ids, described = sample_ids(reference.config, tokenizer, text)
    runtimes = f"{model.runtime} against {reference.runtime}"
    log.info("running %s on %d tokens", runtimes, len(ids))
    checks = compare_runs(reference, model, ids, bounds or bounds_of(reference, model))
    return [Check("run", None, runtimes), Check("text", None, described), *checks]


def bounds_of(*models: Decoder) -> Bounds:
    """The bounds for models that are compared: the widest of their precisions, and of an 8-bit cache."""
    found = [precision.bounds for model in models for precision in precisions_in(model.precision)]
    if any(contract.has_int8_cache(model.cache_kind) for model in models):
        found.append(CACHE8)
    return loosest(found)


def times_exact(model: Decoder) -> int:
    """A bound, as a multiple of what exact arithmetic loses in this precision."""
    return max(precision.exact_multiple for precision in precisions_in(model.precision))


def run_export(
    a: Checkpoint,
    model: Decoder,
    text: str | None,
    *,
    faithful: bool,
    adapter: Adapter | None = None,
) -> list[Check]:
    """Run a checkpoint, with the tokenizer of the text, and its export.

    Some models lose more in few bits than others. If one is out of its precision's bounds, and its weights are
    ``faithful``, the source's after rounding, the bounds are measured on this very model, and it is run again.

    Args:
        adapter: what the export takes at run time, and is merged into the checkpoint.
    """
    merged = a if adapter is None else merge_adapter(a, adapter, "fp32")
    reference = gpt2x_model(merged) if packages.installed("torch") else ReferenceDecoder(merged)
    checks = run_both(reference, model, a.tokenizer, text)
    inexact = bounds_of(model) != FP32
    if inexact and faithful and packages.can_measure(model.precision) and failed(checks):
        from .exact_arithmetic import rounded_model

        exact = rounded_model(a, model, adapter)
        bounds, remark = _measured_bounds(exact, reference, model, a.tokenizer, text)
        return [remark, *run_both(reference, model, a.tokenizer, text, bounds)]
    return checks


def _measured_bounds(
    rounded: Decoder, reference: Decoder, model: Decoder, tokenizer: TokenizerFiles | None, text: str | None
) -> tuple[Bounds, Check]:
    """Bounds by what exact arithmetic of the ``rounded`` weights loses on this model, and a remark for the report."""
    log.info("out of the bounds of %s: measuring what exact arithmetic loses", model.precision)
    ids, _ = sample_ids(reference.config, tokenizer, text)
    exact = measure(one_pass(reference, ids), one_pass(rounded, ids), ids[1:])
    times = times_exact(model)
    remark = (
        f"{model.precision} loses more on this model than on most: computed exactly, its KL divergence is "
        f"{exact.kl_divergence:.1e}; the bounds are {times} times the exact result"
    )
    return widened(bounds_of(model), exact, times), Check("bounds", None, remark)
