"""Prove that two GPT-2s are the same: the same weights, the same logits, the same greedy tokens.

Each kind of pair goes through the same steps: open both, compare what the files hold (``files``), run both (``running``), report.
Weights are compared as bytes, without torch.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from converters import Checkpoint, ConversionError, open_checkpoint
from converters.lora_factors import run_time_factors
from converters.opening.adapter import adapter_in

from ..runtimes.base import Decoder
from ..runtimes.opening import (
    NAMES,
    gpt2x_model,
    kind_of,
    open_decoder,
    open_task,
    refuse_of_onnx,
    task_of_export,
)
from ..runtimes.reference import ReferenceDecoder
from ..runtimes.transformers import Transformers
from ..task_heads import body_of, heads_of
from ..tasks import GENERATION
from ..weight_options import WeightOptions, why_weights
from . import packages
from .checks import Check, failed
from .files import compare_configs, compare_factors, compare_onnx, compare_tokenizers, tokenizer_of
from .running import bounds_of, run_both, run_export
from .tasks import compare_extras, compare_labels, run_task
from .weights import compare_files, compare_release, compare_weights, rounded_like

# Two models that differ here do not take the same tokens, so that their logits cannot be compared.
TOKEN_SIZES = ("n_vocab", "n_ctx")
NEEDS_TORCH = "not compared: needs torch (pip install 'gpt2x[torch]')"


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
    provider: str | None = None,
    rounded: bool = False,
    **options: Unpack[WeightOptions],
) -> Report:
    """Compare any two of: weights, TorchScript, ``.pt2``, ONNX.

    If a directory has weights and ONNX, ``a`` means the weights and ``b`` the ONNX.

    Args:
        text: the text to run both on; by default a scene of Shakespeare.
        runtime: "torch" uses the weights of ``b``, too; "onnx" insists on its ONNX.
        precision: which ONNX model of ``b``, or of ``a`` if only ``a`` has any; by default fp32, or else the only one.
        provider: the execution provider of that ONNX model, as in ``OnnxDecoder``; by default the CPU.
        rounded: compare the weights of ``b`` with those of ``a`` after rounding them to the dtypes of ``b``.
        options: how weights are opened. ``n_head``, ``ignore_config_keys`` and ``tie=False`` hold for both models, the
            others for ``a``.

    Raises:
        ConversionError: if one of them cannot be opened, or ``rounded`` or an option of weights is asked of anything else,
            or a provider of anything else than ONNX.
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
            return verify_export(open_weights(b), a, text, precision, provider)
        case _ if first is None:
            second = open_any(b, runtime, precision=precision, provider=provider)
            return _verify_programs(a, b, open_any(a), second, text, open_weights)
        case _, "weights":
            refuse_of_onnx(b, "weights", provider=provider)
            return verify_checkpoints(first, open_weights(b), text, rounded)
        case "onnx", _ if Path(a).resolve() != Path(b).resolve():
            report = verify_export(first, b, text, precision, provider)
            remark = Check("ONNX of the first", None, "not run: its weights were compared; pass it as the second")
            return replace(report, checks=[*report.checks, remark])
        case _:
            return verify_export(first, b, text, precision, provider)


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


def verify_export(
    a: Checkpoint, b: str | Path, text: str | None = None, precision: str | None = None, provider: str | None = None
) -> Report:
    """Compare a checkpoint with what it was exported to.

    The weights in ONNX are compared as well: byte by byte in fp32, block by block in other precisions. Without torch, the
    reference is the float64 one, which is slow.
    """
    name = f"{b} ({precision})" if precision else str(b)
    if task_of_export(b, precision) != GENERATION:
        return Report(a.origin, name, _verify_task(a, b, text, precision, provider))
    model = open_decoder(b, precision=precision, provider=provider)
    checks = [compare_configs(a.config, model.config)]
    if kind_of(b) == "onnx":
        checks += compare_onnx(a, Path(b), model)
    if not a.config.differences(model.config, TOKEN_SIZES):
        source = _with_tokenizer_of(a, b)
        checks += run_export(source, model, text, faithful=not failed(checks))
        checks += compare_extras(source, model, bounds_of(model), text)
    return Report(a.origin, name, checks)


def _verify_task(
    a: Checkpoint, b: str | Path, text: str | None, precision: str | None, provider: str | None
) -> list[Check]:
    """Compare a checkpoint with its export for a task other than text generation."""
    model = open_task(b, precision, provider)
    body, heads = _with_tokenizer_of(body_of(a), b), heads_of(a, model.task)
    checks = [compare_configs(body.config, model.config), *compare_labels(heads.labels, model.labels)]
    if kind_of(b) == "onnx":
        checks += compare_onnx(body, Path(b), model)
    if not body.config.differences(model.config, TOKEN_SIZES):
        checks += run_task(body, model, text)
    return checks


def _with_tokenizer_of(a: Checkpoint, b: str | Path) -> Checkpoint:
    """The checkpoint with the tokenizer of its export, if it has none itself."""
    return a if a.tokenizer else replace(a, tokenizer=tokenizer_of(b))


def verify_adapter(
    base: Checkpoint,
    folder: str | Path,
    b: str | Path,
    name: str,
    text: str | None = None,
    precision: str | None = None,
    provider: str | None = None,
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
    from ..runtimes.onnx_providers import CPU
    from ..runtimes.onnxruntime import OnnxDecoder

    adapter = adapter_in(folder)
    model = OnnxDecoder(b, precision=precision, providers=provider or CPU, adapter=name)
    checks = [compare_configs(base.config, model.config), *compare_onnx(base, Path(b), model)]
    checks.append(compare_factors(run_time_factors(base, adapter), model.adapter_file(name)))
    if not base.config.differences(model.config, TOKEN_SIZES):
        source = _with_tokenizer_of(base, b)
        checks += run_export(source, model, text, faithful=not failed(checks), adapter=adapter)
    which = f"{precision}, adapter {name}" if precision else f"adapter {name}"
    return Report(f"{base.origin} + {adapter.path}", f"{b} ({which})", checks)


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
        checks += run_both(reference, model, tokenizer_of(a, b), text)
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
    elif not packages.installed("torch"):
        checks.append(Check("logits", None, NEEDS_TORCH))
    else:
        checks += run_both(gpt2x_model(a), gpt2x_model(b), a.tokenizer, text)
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
    if not packages.installed("torch"):
        return Report(a.origin, "nothing", [Check("logits", None, NEEDS_TORCH)])
    if packages.installed("transformers"):
        return Report(a.origin, "transformers", run_both(Transformers(a), gpt2x_model(a), a.tokenizer, text))
    return Report(a.origin, "float64 reference", run_both(ReferenceDecoder(a), gpt2x_model(a), a.tokenizer, text))


def verify_release(a: Checkpoint) -> Report:
    """Compare a checkpoint with the checksums of OpenAI's 124M release."""
    return Report(a.origin, "openai-124M", [compare_release(a)])
