"""Prove that two GPT-2s are the same: the same weights, the same logits, the same greedy tokens.

Each kind of pair goes through the same steps: open both, compare what the files hold, run both, report. Weights are compared
as bytes, without torch. ``gpt2x.verify.scenarios`` runs the models.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from converters import Checkpoint, ConversionError, GPT2Config, find_tokenizer, open_checkpoint
from converters.adapters import Adapter
from converters.checkpoint import same_bytes
from converters.formats import WEIGHTS
from converters.lora_factors import Factors, run_time_factors
from converters.opening.adapter import adapter_in, merge_adapter
from converters.tensors import F32
from converters.tokenizer import TokenizerFiles, same_tokenizer

from .. import contract
from ..precisions import Bounds, Precision, precisions_in
from ..runtimes.adapter_files import AdapterFile, named_factors
from ..runtimes.base import Decoder
from ..runtimes.opening import NAMES, gpt2x_model, kind_of, open_decoder, open_task, task_of_export
from ..runtimes.reference import ReferenceDecoder
from ..runtimes.task_model import TaskModel
from ..runtimes.transformers import Transformers
from ..task_heads import body_of, heads_of
from ..tasks import GENERATION
from ..weight_options import WeightOptions, why_weights
from .checks import Check, failed
from .metrics import CACHE8, FP32, loosest, measure, widened
from .packages import can_measure, installed
from .sample_text import sample_ids
from .scenarios import compare_runs, one_pass
from .tasks import compare_extras, compare_labels, run_task
from .weights import compare_files, compare_release, compare_weights, rounded_like

log = logging.getLogger(__name__)

# Two models that differ here do not take the same tokens, so that their logits cannot be compared.
TOKEN_SIZES = ("n_vocab", "n_ctx")


@dataclass(frozen=True)
class Report:
    """What was compared, and the results."""

    a: str
    b: str
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether something was compared and no check failed."""
        answers = [check.passed for check in self.checks]
        return True in answers and False not in answers

    @property
    def inexact(self) -> bool:
        """Whether a model was compared within the bounds of its precision, not for equality up to float32 rounding."""
        return any(check.details.get("inexact") for check in self.checks)

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(_finite({"passed": self.passed, **asdict(self)}), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """The same value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ------------------------------------------------------------------------------------------------- pairs of models


def verify(
    a: str | Path,
    b: str | Path,
    *,
    text: str | None = None,
    runtime: str | None = None,
    precision: str | None = None,
    rounded: bool = False,
    **options: Unpack[WeightOptions],
) -> Report:
    """Compare any two of: weights, TorchScript, ``.pt2``, ONNX.

    If a directory has weights and ONNX, ``a`` means the weights and ``b`` the ONNX.

    Args:
        text: the text to run both on; by default a scene of Shakespeare.
        runtime: "torch" uses the weights of ``b``, too; "onnx" insists on its ONNX.
        precision: which ONNX model of ``b``, or of ``a`` if only ``a`` has any; by default fp32, or else the only one.
        rounded: compare the weights of ``b`` with those of ``a`` after rounding them to the dtypes of ``b``.
        options: how weights are opened. ``n_head``, ``ignore_config_keys`` and ``tie=False`` hold for both models, the
            others for ``a``.

    Raises:
        ConversionError: if one of them cannot be opened, or ``rounded`` or an option of weights is asked of anything else.
    """
    shared = _of_both(options)
    open_weights = functools.partial(open_checkpoint, **shared)
    open_any = functools.partial(open_decoder, **shared)
    reason = why_weights(options)
    first = _selected(a, reason, options, rounded) if reason else _weights_of(a, open_weights)
    second_kind = _kind_of_second(b, runtime)
    if rounded and (first is None or second_kind != "weights"):
        raise ConversionError(f"{b if first else a}: --rounded compares weights with weights only: leave it out")
    match kind_of(a), second_kind:
        case "onnx", "weights" if runtime is None and not rounded and reason is None:
            # A directory with both may be the first. Its ONNX is what can be wrong.
            return verify_export(open_weights(b), a, text, precision)
        case _ if first is None:
            second = open_any(b, runtime, precision=precision)
            return _verify_programs(a, b, open_any(a), second, text, open_weights)
        case _, "weights":
            return verify_checkpoints(first, open_weights(b), text, rounded)
        case "onnx", _ if Path(a).resolve() != Path(b).resolve():
            report = verify_export(first, b, text, precision)
            remark = Check("ONNX of the first", None, "not run: its weights were compared; pass it as the second")
            return replace(report, checks=[*report.checks, remark])
        case _:
            return verify_export(first, b, text, precision)


def _of_both(options: WeightOptions) -> WeightOptions:
    """The options that hold for both models: the others select or change the weights of the first."""
    shared: WeightOptions = {}
    if "n_head" in options:
        shared["n_head"] = options["n_head"]
    if "ignore_config_keys" in options:
        shared["ignore_config_keys"] = options["ignore_config_keys"]
    if options.get("tie") is False:
        shared["tie"] = False  # nothing is dropped from the second
    return shared


def _selected(path: str | Path, reason: str, options: WeightOptions, rounded: bool) -> Checkpoint:
    """The weights of a path by these options; a merged adapter is not rounded, if it is rounded later."""
    if kind_of(path) != "weights" and not Path(path).is_dir():
        raise ConversionError(f"{path}: {reason}, and this is {NAMES[kind_of(path)]}")
    return open_checkpoint(path, merged_dtype="fp64" if rounded else None, **options)


def _weights_of(path: str | Path, open_weights: Callable[[str | Path], Checkpoint]) -> Checkpoint | None:
    """The weights of a path; None if it holds a program, or a directory of ONNX without weights."""
    if kind_of(path) == "weights":
        return open_weights(path)
    if not Path(path).is_dir():
        return None
    try:
        return open_weights(path)
    except ConversionError:
        return None


def _kind_of_second(path: str | Path, runtime: str | None) -> str:
    if runtime == "onnx":
        return "onnx"
    if runtime == "torch" and Path(path).is_dir():
        return "weights"
    return kind_of(path)


def verify_export(a: Checkpoint, b: str | Path, text: str | None = None, precision: str | None = None) -> Report:
    """Compare a checkpoint with what it was exported to.

    The weights in ONNX are compared as well: byte by byte in fp32, block by block in other precisions. Without torch, the
    reference is the float64 one, which is slow.
    """
    name = f"{b} ({precision})" if precision else str(b)
    if task_of_export(b, precision) != GENERATION:
        return Report(a.origin, name, _verify_task(a, b, text, precision))
    model = open_decoder(b, precision=precision)
    checks = [compare_configs(a.config, model.config)]
    if kind_of(b) == "onnx":
        checks += _compare_onnx(a, Path(b), model)
    if not a.config.differences(model.config, TOKEN_SIZES):
        checks += _run_export(a, b, model, text, faithful=not failed(checks))
        checks += compare_extras(_with_tokenizer_of(a, b), model, bounds_of(model), text)
    return Report(a.origin, name, checks)


def _verify_task(a: Checkpoint, b: str | Path, text: str | None, precision: str | None) -> list[Check]:
    """Compare a checkpoint with its export for a task other than text generation."""
    model = open_task(b, precision)
    body, heads = _with_tokenizer_of(body_of(a), b), heads_of(a, model.task)
    checks = [compare_configs(body.config, model.config), *compare_labels(heads.labels, model.labels)]
    if kind_of(b) == "onnx":
        checks += _compare_onnx(body, Path(b), model)
    if not body.config.differences(model.config, TOKEN_SIZES):
        checks += run_task(body, model, text)
    return checks


def _with_tokenizer_of(a: Checkpoint, b: str | Path) -> Checkpoint:
    """The checkpoint with the tokenizer of its export, if it has none itself."""
    return a if a.tokenizer else replace(a, tokenizer=_tokenizer_of(b))


def verify_adapter(
    base: Checkpoint,
    folder: str | Path,
    b: str | Path,
    name: str,
    text: str | None = None,
    precision: str | None = None,
) -> Report:
    """Compare a checkpoint into which an adapter is merged with an ONNX model that takes the same adapter at run time.

    The weights in ONNX are compared with the base's, and the factors beside it with those of the adapter.

    Args:
        base: the checkpoint without the adapter.
        folder: the directory of PEFT's adapter.
        name: what it is called beside the ONNX model.

    Raises:
        ConversionError: if the ONNX model has no adapter of this name, or one of the two does not fit.
    """
    from ..runtimes.onnxruntime import OnnxDecoder

    adapter = adapter_in(folder)
    model = OnnxDecoder(b, precision=precision, adapter=name)
    checks = [compare_configs(base.config, model.config), *_compare_onnx(base, Path(b), model)]
    checks.append(compare_factors(run_time_factors(base, adapter), model.adapter_file(name)))
    if not base.config.differences(model.config, TOKEN_SIZES):
        checks += _run_export(base, b, model, text, faithful=not failed(checks), adapter=adapter)
    which = f"{precision}, adapter {name}" if precision else f"adapter {name}"
    return Report(f"{base.origin} + {adapter.path}", f"{b} ({which})", checks)


def compare_factors(expected: Mapping[str, Factors], found: AdapterFile) -> Check:
    """Compare the factors of an adapter with those in a file, by their bytes."""
    tensors = named_factors(expected)
    differing = sorted(tensors.keys() ^ found.tensors.keys())
    # A name that only one of them has differs already.
    shared = tensors.keys() & found.tensors.keys()
    differing += [name for name in tensors if name in shared and not same_bytes(tensors[name], found.tensors[name])]
    if not differing:
        return Check("factors", True, f"the same: {len(expected)} projections")
    more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
    return Check("factors", False, f"{differing[0][:100]}{more} differ")


def _run_export(
    a: Checkpoint,
    b: str | Path,
    model: Decoder,
    text: str | None,
    *,
    faithful: bool,
    adapter: Adapter | None = None,
) -> list[Check]:
    """Run a checkpoint and its export.

    Some models lose more in few bits than others. If one is out of its precision's bounds, and its weights are
    ``faithful``, the source's after rounding, the bounds are measured on this very model, and it is run again.

    Args:
        adapter: what the export takes at run time, and is merged into the checkpoint.
    """
    merged = a if adapter is None else merge_adapter(a, adapter, "fp32")
    reference = gpt2x_model(merged) if installed("torch") else ReferenceDecoder(merged)
    tokenizer = a.tokenizer or _tokenizer_of(b)
    checks = _run(reference, model, tokenizer, text)
    inexact = bounds_of(model) != FP32
    if inexact and faithful and can_measure(model.precision) and failed(checks):
        from .exact_arithmetic import rounded_model

        exact = rounded_model(a, model, adapter)
        bounds, remark = _measured_bounds(exact, reference, model, tokenizer, text)
        return [remark, *_run(reference, model, tokenizer, text, bounds)]
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


def _verify_programs(
    a: str | Path,
    b: str | Path,
    first: Decoder,
    second: Decoder,
    text: str | None,
    open_weights: Callable[[str | Path], Checkpoint],
) -> Report:
    """Compare two models of which the first is not a checkpoint. If the second is, it is the reference."""
    weights = compare_files(first.path or a, second.path or b, open_weights)
    checks = [compare_configs(first.config, second.config), weights]
    if not first.config.differences(second.config, TOKEN_SIZES):
        reference, model = (second, first) if kind_of(b) == "weights" else (first, second)
        checks += _run(reference, model, _tokenizer_of(a, b), text)
    return Report(str(a), str(b), checks)


def verify_checkpoints(a: Checkpoint, b: Checkpoint, text: str | None = None, rounded: bool = False) -> Report:
    """Compare two checkpoints: configuration, weights, tokenizer, logits and greedy tokens.

    Args:
        rounded: round the first's weights as ``rounded_like`` does.
    """
    checks = [compare_configs(a.config, b.config)]
    if rounded:
        a = rounded_like(a, b)
        checks.append(_rounding(b))
    elif _dtypes_differ(a, b):
        remark = "the files hold different dtypes; --rounded rounds the first model's values to the second's dtypes"
        checks.append(Check("rounding", None, remark))
    checks += [compare_weights(a, b), compare_tokenizers(a, b)]
    if a.config.differences(b.config, TOKEN_SIZES):
        checks.append(Check("logits", None, "not compared: vocabulary or context length differ"))
    elif not installed("torch"):
        checks.append(Check("logits", None, needs_torch()))
    else:
        checks += _run(gpt2x_model(a), gpt2x_model(b), a.tokenizer, text)
    return Report(a.origin, str(b.source), checks)


def _rounding(b: Checkpoint) -> Check:
    counts = Counter(dtype for dtype, _ in b.stored.values())
    dtypes = ", ".join(f"{n} in {dtype}" for dtype, n in counts.items())
    return Check("rounding", None, f"the first model's tensors are rounded to the second's dtypes: {dtypes}")


def _dtypes_differ(a: Checkpoint, b: Checkpoint) -> bool:
    shared = a.tensors.keys() & b.tensors.keys()
    return any(a.stored[name][0] != b.stored[name][0] for name in shared)


def verify_alone(a: Checkpoint, text: str | None = None) -> Report:
    """Compare gpt2x's model of a checkpoint with transformers, or with the float64 reference if that is missing."""
    if not installed("torch"):
        return Report(a.origin, "nothing", [Check("logits", None, needs_torch())])
    if installed("transformers"):
        return Report(a.origin, "transformers", _run(Transformers(a), gpt2x_model(a), a.tokenizer, text))
    return Report(a.origin, "float64 reference", _run(ReferenceDecoder(a), gpt2x_model(a), a.tokenizer, text))


def verify_release(a: Checkpoint) -> Report:
    """Compare a checkpoint with the checksums of OpenAI's 124M release."""
    return Report(a.origin, "openai-124M", [compare_release(a)])


# ------------------------------------------------------------------------------------------------------- the run


def _run(
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


def _tokenizer_of(*paths: str | Path) -> TokenizerFiles | None:
    """The first tokenizer in the directories of these paths."""
    for path in map(Path, paths):
        found = find_tokenizer(path if path.is_dir() else path.parent)
        if found:
            return found
    return None


def needs_torch() -> str:
    """The result of a check that needs torch, if torch is missing."""
    return "not compared: needs torch (pip install 'gpt2x[torch]')"


def bounds_of(*models: Decoder) -> Bounds:
    """The bounds for models that are compared: the widest of their precisions, and of an 8-bit cache."""
    found = [precision.bounds for model in models for precision in precisions_in(model.precision)]
    if any(contract.has_int8_cache(model.cache_kind) for model in models):
        found.append(CACHE8)
    return loosest(found)


def times_exact(model: Decoder) -> int:
    """A bound, as a multiple of what exact arithmetic loses in this precision."""
    return max(precision.exact_multiple for precision in precisions_in(model.precision))


# -------------------------------------------------------------------------------------------------- what files hold


def compare_configs(a: GPT2Config, b: GPT2Config) -> Check:
    """Compare everything that decides shapes and arithmetic."""
    differences = a.differences(b)
    return Check("configuration", not differences, "; ".join(differences) or "the same", {"differences": differences})


def compare_tokenizers(a: Checkpoint, b: Checkpoint) -> Check:
    """Compare the vocabularies, merges and added tokens of two checkpoints; files, if gpt2x cannot read them."""
    if not a.tokenizer and not b.tokenizer:
        return Check("tokenizer", None, "not compared: neither has one")
    if not a.tokenizer or not b.tokenizer:
        return Check("tokenizer", None, "not compared: only one has one")
    same = same_tokenizer(a.tokenizer, b.tokenizer)
    if a.tokenizer.fault:
        return Check("tokenizer", same, f"{a.tokenizer.kind}: {'the same files' if same else 'the files differ'}")
    return Check("tokenizer", same, "the same vocabulary and merges" if same else "the vocabularies or merges differ")


def _compare_onnx(a: Checkpoint, b: Path, model: Decoder | TaskModel) -> list[Check]:
    """Compare the weights in an ONNX model, by their names, and any others in its directory."""
    assert model.path is not None  # an ONNX model comes from a file
    precisions = precisions_in(model.precision)
    if len(precisions) == 1:
        return _compare_file(a, b, model.path, precisions[0])
    from ..runtimes.onnx_model import find_model

    checks = []
    for precision in precisions:
        for check in _compare_file(a, b, find_model(b, precision.name), precision):
            checks.append(replace(check, name=f"{check.name}, {precision.name}"))
    return checks


def _compare_file(a: Checkpoint, b: Path, path: Path, precision: Precision) -> list[Check]:
    """Compare the weights in one ONNX file, and any others in its directory."""
    if not precision.keeps_source:
        return [_compare_stored(a, path, precision), *_compare_beside(a, b, a.files)]
    try:
        used = open_checkpoint(path)
    except ConversionError as error:
        return [Check("weights", None, f"not compared: {_first_line(error)}")]
    weights = compare_weights(a.cast(F32), used.cast(F32))
    return [weights, *_compare_beside(a, b, (*a.files, *used.files)), compare_tokenizers(a, used)]


def _compare_stored(a: Checkpoint, path: Path, precision: Precision) -> Check:
    """Compare the rounded weights in an ONNX model with the checkpoint's."""
    if not installed("onnx"):
        return Check("weights", None, "not compared: needs onnx (pip install 'gpt2x[export]')")
    from .quantized_weights import compare_stored

    return compare_stored(a, path, precision)


def _compare_beside(a: Checkpoint, b: Path, seen: Sequence[Path]) -> list[Check]:
    """Compare the weights in an ONNX model's directory, which transformers loads, if none of their files was compared yet."""
    if not any((b / name).is_file() for name in WEIGHTS):
        return []
    try:
        beside = open_checkpoint(b)
    except ConversionError as error:
        return [Check("weights beside", False, _first_line(error))]
    files = {file.resolve() for file in beside.files}
    if files <= {file.resolve() for file in seen}:
        return []
    return [replace(compare_weights(a.cast(F32), beside.cast(F32)), name="weights beside")]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
