"""Proof that two GPT-2s are one: the same weights, the same logits, the same words.

Weights are compared as bytes and need no torch. How models are run against each other is in ``gpt2x.verify.scenarios``.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from converters import Checkpoint, ConversionError, GPT2Config, find_tokenizer, open_checkpoint
from converters.formats import WEIGHTS
from converters.tensors import F32
from converters.tokenizer import TokenizerFiles

from .. import contract
from ..precisions import DEFAULT, PRECISIONS, Bounds, Precision
from ..runtimes.base import Subject
from ..runtimes.opening import gpt2x_model, kind_of, open_subject
from ..runtimes.transformers import Transformers, Uncached
from .checks import Check
from .metrics import CACHE8, FP32, loosest, measure, widened
from .sample_text import sample_ids
from .scenarios import compare_runs, one_pass
from .weights import _compare_files, compare_release, compare_weights, rounded_like


@dataclass(frozen=True)
class Report:
    """What was compared, and what came out."""

    a: str
    b: str
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether something was compared and nothing differed."""
        answers = [check.passed for check in self.checks]
        return True in answers and False not in answers

    def to_json(self) -> str:
        """The report for machines."""
        return json.dumps(_finite({"passed": self.passed, **asdict(self)}), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """The same for JSON, which has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------------------------- whole reports


def verify(
    a: str | Path,
    b: str | Path,
    *,
    text: str | None = None,
    runtime: str | None = None,
    n_head: int | None = None,
    precision: str | None = None,
    rounded: bool = False,
) -> Report:
    """Compare any two of: weights, TorchScript, ``.pt2``, ONNX.

    Of a directory with weights and ONNX, ``a`` means the weights and ``b`` the ONNX.

    Args:
        text: what to run them on; by default a scene of Shakespeare's.
        runtime: "torch" takes the weights of ``b``, too; "onnx" insists on its ONNX.
        n_head: attention heads, where nothing beside the weights says it.
        precision: which ONNX model of ``b``, or of ``a`` if only that has some; by default fp32, or else the only one.
        rounded: compare the weights of ``b`` with those of ``a`` rounded as ``b`` stores each.

    Raises:
        ConversionError: if one of them cannot be opened, or what is to be rounded is no weights.
    """
    first = _weights_of(a, n_head, insist=kind_of(a) == "weights")
    other = "onnx" if runtime == "onnx" else "weights" if runtime == "torch" and Path(b).is_dir() else kind_of(b)
    if rounded and (first is None or other != "weights"):
        raise ConversionError(f"{b if first else a}: rounding is compared of weights with weights; leave --rounded out")
    if kind_of(a) == "onnx" and other == "weights" and runtime is None and not rounded:
        return verify_export(open_checkpoint(b, n_head=n_head), a, text, precision)  # what can be wrong is run
    if first is None:
        second = open_subject(b, runtime, n_head=n_head, precision=precision)
        return _verify_runs(a, b, open_subject(a, n_head=n_head), second, text, n_head)
    if other == "weights":
        return verify_checkpoints(first, open_checkpoint(b, n_head=n_head), text, rounded)
    report = verify_export(first, b, text, precision)
    if kind_of(a) == "onnx" and Path(a).resolve() != Path(b).resolve():
        report.checks.append(Check("ONNX of the first", None, "not run: its weights were; give it as the second"))
    return report


def _weights_of(path: str | Path, n_head: int | None, insist: bool = False) -> Checkpoint | None:
    """The weights that a path holds; None where it holds none and that is no fault."""
    if not insist and not Path(path).is_dir():
        return None
    try:
        return open_checkpoint(path, n_head=n_head)
    except ConversionError:
        if insist:
            raise
        return None


def verify_export(a: Checkpoint, b: str | Path, text: str | None = None, precision: str | None = None) -> Report:
    """A checkpoint against what it was exported to. The weights of ONNX are compared as well: those of fp32 byte by byte,
    other precisions' block by block.

    Where torch is missing, the yardstick is the float64 reference, which is slow.
    """
    names = str(a.source), f"{b} ({precision})" if precision else str(b)
    subject = open_subject(b, precision=precision)
    checks = [_same_configs(a.config, subject.config)]
    if kind_of(b) == "onnx":
        checks += _compare_onnx(a, Path(b), subject)
    if not a.config.differences(subject.config, ("n_vocab", "n_ctx")):
        yardstick = gpt2x_model(a) if _installed("torch") else _reference(a)
        tokenizer = a.tokenizer or _tokenizer_of(b)
        ran = _runs(yardstick, subject, tokenizer, text)
        inexact = bounds_of(subject) != FP32 and not _failed(checks)  # what it stores is the source's, rounded
        if inexact and _failed(ran):
            ran = _run_again(a, yardstick, subject, tokenizer, text) or ran
        checks += ran
    return Report(*names, checks)


def _failed(checks: Sequence[Check]) -> bool:
    return any(check.passed is False for check in checks)


def _run_again(
    a: Checkpoint, yardstick: Subject, subject: Subject, tokenizer: TokenizerFiles | None, text: str | None
) -> list[Check]:
    """Judge a model that is out of its precision's bounds by what exact arithmetic gives on this very model: some lose more
    in few bits than others. Nothing where that cannot be computed."""
    if not (_installed("torch") and _installed("onnx")):
        return []
    from .exact_arithmetic import rounded_model

    ids, _ = sample_ids(yardstick.config, tokenizer, text)
    found = measure(one_pass(yardstick, ids), one_pass(rounded_model(a, subject), ids), ids[1:])
    precision, times = precision_of(subject), times_exact(subject)
    said = (
        f"{precision} loses more on this model than on most: computed exactly, its KL divergence is "
        f"{found.kl_divergence:.1e}; the bounds are {times} times the exact result"
    )
    bounds = widened(bounds_of(subject), found, times)
    return [Check("bounds", None, said), *_runs(yardstick, subject, tokenizer, text, bounds)]


def _reference(a: Checkpoint) -> Subject:
    from ..runtimes.reference import Reference

    return Uncached(Reference(a), a.config)


def _verify_runs(
    a: str | Path, b: str | Path, first: Subject, second: Subject, text: str | None, n_head: int | None
) -> Report:
    """Two of which the first is no checkpoint. A checkpoint is the better yardstick, on whichever side it is."""
    weights = _compare_files(getattr(first, "path", a), getattr(second, "path", b), n_head)
    checks = [_same_configs(first.config, second.config), weights]
    if not first.config.differences(second.config, ("n_vocab", "n_ctx")):
        yardstick, subject = (second, first) if kind_of(b) == "weights" else (first, second)
        checks += _runs(yardstick, subject, _tokenizer_of(a, b), text)
    return Report(str(a), str(b), checks)


def _tokenizer_of(*paths: str | Path) -> TokenizerFiles | None:
    folders = (Path(path) if Path(path).is_dir() else Path(path).parent for path in paths)
    return next((found for folder in folders if (found := find_tokenizer(folder))), None)


def verify_checkpoints(a: Checkpoint, b: Checkpoint, text: str | None = None, rounded: bool = False) -> Report:
    """Two checkpoints: configuration, weights, tokenizer, logits and words; ``rounded`` as ``rounded_like`` does."""
    checks = [_same_configs(a.config, b.config)]
    if rounded:
        a = rounded_like(a, b)
        said = ", ".join(f"{n} in {kind}" for kind, n in Counter(kind for kind, _ in b.stored.values()).items())
        checks += [Check("rounding", None, f"the first's tensors are rounded as the second's file holds them: {said}")]
    elif any(a.stored[name][0] != b.stored[name][0] for name in a.tensors.keys() & b.tensors.keys()):
        said = "the two files hold other number formats; --rounded rounds the first's values as the second's file does"
        checks += [Check("rounding", None, said)]
    checks += [compare_weights(a, b), compare_tokenizers(a, b)]
    if a.config.differences(b.config, ("n_vocab", "n_ctx")):
        checks += [Check("logits", None, "not compared: the models take different tokens")]
    elif not _installed("torch"):
        checks += [Check("logits", None, needs_torch())]
    else:
        checks += _runs(gpt2x_model(a), gpt2x_model(b), a.tokenizer, text)
    return Report(str(a.source), str(b.source), checks)


def verify_alone(a: Checkpoint, text: str | None = None) -> Report:
    """A checkpoint run by gpt2x against transformers, or the float64 reference where that is missing."""
    if not _installed("torch"):
        return Report(str(a.source), "nothing", [Check("logits", None, needs_torch())])
    if _installed("transformers"):
        return Report(str(a.source), "transformers", _runs(Transformers(a), gpt2x_model(a), a.tokenizer, text))
    return Report(str(a.source), "float64 reference", _runs(_reference(a), gpt2x_model(a), a.tokenizer, text))


def verify_release(a: Checkpoint) -> Report:
    """A checkpoint against the checksums of OpenAI's 124M release: needs nothing but the table."""
    return Report(str(a.source), "openai-124M", [compare_release(a)])


def _runs(
    yardstick: Subject,
    subject: Subject,
    tokenizer: TokenizerFiles | None,
    text: str | None,
    bounds: Bounds | None = None,
) -> list[Check]:
    """Both run on a full context, and a word on which tokens these are."""
    ids, said = sample_ids(yardstick.config, tokenizer, text)
    ran = f"{subject.runtime} against {yardstick.runtime}"
    checks = compare_runs(yardstick, subject, ids, bounds or bounds_of(yardstick, subject))
    return [Check("run", None, ran), Check("text", None, said), *checks]


def needs_torch() -> str:
    """What to say where torch is missing."""
    return "not compared: needs torch (pip install 'gpt2x[torch]')"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def precision_of(subject: Subject) -> str:
    """How a model stores its weights; all but some ONNX are fp32."""
    return str(getattr(subject, "precision", DEFAULT))


def bounds_of(*subjects: Subject) -> Bounds:
    """How far two models may be apart: as far as the coarser's numbers, of weights or cache, let them."""
    found = [PRECISIONS[precision_of(subject)].bounds for subject in subjects]
    found += [CACHE8 for subject in subjects if contract.has_int8_cache(getattr(subject, "cache_kind", ""))]
    return loosest(found)


def times_exact(subject: Subject) -> int:
    """A bound, as a multiple of what exact arithmetic gives in this precision."""
    return PRECISIONS[precision_of(subject)].exact_multiple


# ------------------------------------------------------------------------------------------------- single checks


def _compare_beside(a: Checkpoint, b: Path, seen: Sequence[Path]) -> list[Check]:
    """The weights in the directory of an ONNX model, which transformers loads, if they are in files that are not seen yet."""
    if not any((b / name).is_file() for name in WEIGHTS):
        return []
    try:
        home = open_checkpoint(b)
    except ConversionError as error:
        return [Check("weights beside", False, str(error).splitlines()[0])]
    if {file.resolve() for file in home.files} <= {file.resolve() for file in seen}:
        return []
    return [replace(compare_weights(a.cast(F32), home.cast(F32)), name="weights beside")]


def _compare_onnx(a: Checkpoint, b: Path, subject: Subject) -> list[Check]:
    """The weights that an ONNX model has by their names, and any others in its directory."""
    precision = PRECISIONS[precision_of(subject)]
    if not precision.keeps_source:
        return [_compare_stored(a, subject, precision), *_compare_beside(a, b, a.files)]
    try:
        used = open_checkpoint(subject.path)  # type: ignore[attr-defined]
    except ConversionError as error:
        return [Check("weights", None, f"not compared: {str(error).splitlines()[0]}")]
    checks = [compare_weights(a.cast(F32), used.cast(F32)), *_compare_beside(a, b, (*a.files, *used.files))]
    return [*checks, compare_tokenizers(a, used)]


def _compare_stored(a: Checkpoint, subject: Subject, precision: Precision) -> Check:
    """What an ONNX model of another precision than fp32 stores, against the checkpoint."""
    if not _installed("onnx"):
        return Check("weights", None, "not compared: needs onnx (pip install 'gpt2x[export]')")
    from .quantized_weights import compare_stored

    return compare_stored(a, subject.path, precision)  # type: ignore[attr-defined]


def _same_configs(a: GPT2Config, b: GPT2Config) -> Check:
    """Everything that decides shapes and arithmetic."""
    differences = a.differences(b)
    return Check("configuration", not differences, "; ".join(differences) or "the same", {"differences": differences})


def compare_tokenizers(a: Checkpoint, b: Checkpoint) -> Check:
    """The vocabularies and merges beside the two."""
    if not a.tokenizer or not b.tokenizer:
        return Check(
            "tokenizer",
            None,
            "not compared: " + ("neither has one" if not (a.tokenizer or b.tokenizer) else "only one has one"),
        )
    same = a.tokenizer.vocabulary() == b.tokenizer.vocabulary()
    return Check("tokenizer", same, "the same vocabulary and merges" if same else "the vocabularies or merges differ")
