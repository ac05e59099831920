"""Proof that two GPT-2s are one: the same weights, the same logits, the same words.

Weights are compared as bytes and need no torch. How models are run against each other is in ``gpt2x.runs``.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from converters import Checkpoint, ConversionError, GPT2Config, find_tokenizer, open_checkpoint
from converters.arrays import as_array, cast_array
from converters.checkpoint import crc_of, zip_chunks
from converters.formats import WEIGHTS
from converters.gguf_file import through_q8_0
from converters.tensors import F32, F64, LazyTensor, whole_items
from converters.tokenizer_files import TokenizerFiles

from .runs import BOUNDS, CACHE8, FP32, TIMES, TIMES_EXACT, Bounds, Check, compare_runs, measure, one_pass
from .sample import sample_ids
from .subjects import Subject, Transformers, Uncached, gpt2x_model, kind_of, open_subject


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
    from .arithmetic import rounded_model

    ids, _ = sample_ids(yardstick.config, tokenizer, text)
    found = measure(one_pass(yardstick, ids), one_pass(rounded_model(a, subject), ids), ids[1:])
    precision, times = precision_of(subject), times_exact(subject)
    said = (
        f"{precision} loses more on this model than on most: computed exactly, its KL divergence is "
        f"{found.kl_divergence:.1e}; the bounds are {times} times the exact result"
    )
    bounds = bounds_of(subject).or_wider(found, times)
    return [Check("bounds", None, said), *_runs(yardstick, subject, tokenizer, text, bounds)]


def _reference(a: Checkpoint) -> Subject:
    from .reference import Reference

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
    return str(getattr(subject, "precision", "fp32"))


def bounds_of(*subjects: Subject) -> Bounds:
    """How far two models may be apart: as far as the coarser's numbers, of weights or cache, let them."""
    kinds = [precision_of(subject) for subject in subjects]
    kinds += [CACHE8 for subject in subjects if getattr(subject, "cache_kind", "").endswith("int8")]
    return BOUNDS[max(kinds, key=list(BOUNDS).index)]


def times_exact(subject: Subject) -> int:
    """A bound, as a multiple of what exact arithmetic gives in this precision."""
    return TIMES_EXACT.get(precision_of(subject), TIMES)


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


def _compare_files(a: str | Path, b: str | Path, n_head: int | None = None) -> Check:
    """The weights of two files, of which any may be one that weights are not read from."""
    found = []
    for path in (a, b):
        try:
            found.append(open_checkpoint(path, n_head=n_head).cast(F32))
        except ConversionError as error:
            return _not_compared(error)
    return compare_weights(*found)


def _not_compared(error: ConversionError) -> Check:
    return Check("weights", None, f"not compared: {str(error).splitlines()[0]}")


def _compare_onnx(a: Checkpoint, b: Path, subject: Subject) -> list[Check]:
    """The weights that an ONNX model has by their names, and any others in its directory."""
    if (stored := precision_of(subject)) != "fp32":
        return [_compare_stored(a, subject, stored), *_compare_beside(a, b, a.files)]
    try:
        used = open_checkpoint(subject.path)  # type: ignore[attr-defined]
    except ConversionError as error:
        return [Check("weights", None, f"not compared: {str(error).splitlines()[0]}")]
    checks = [compare_weights(a.cast(F32), used.cast(F32)), *_compare_beside(a, b, (*a.files, *used.files))]
    return [*checks, compare_tokenizers(a, used)]


def _compare_stored(a: Checkpoint, subject: Subject, precision: str) -> Check:
    """What an ONNX model of another precision than fp32 stores, against the checkpoint."""
    if not _installed("onnx"):
        return Check("weights", None, "not compared: needs onnx (pip install 'gpt2x[export]')")
    from .stored import compare_stored

    return compare_stored(a, subject.path, precision)  # type: ignore[attr-defined]


def _same_configs(a: GPT2Config, b: GPT2Config) -> Check:
    """Everything that decides shapes and arithmetic."""
    differences = a.differences(b)
    return Check("configuration", not differences, "; ".join(differences) or "the same", {"differences": differences})


def rounded_like(a: Checkpoint, b: Checkpoint) -> Checkpoint:
    """The first's values as they are after a conversion to what the second's file holds each tensor in, lazily.

    Raises (while streaming):
        ConversionError: if a value does not fit into it.
    """
    tensors = {
        name: _rounded_like(tensor, b.tensors[name], name) if name in b.tensors else tensor
        for name, tensor in a.tensors.items()
    }
    return replace(a, tensors=tensors)


def _rounded_like(tensor: LazyTensor, like: LazyTensor, name: str) -> LazyTensor:
    if like.stored is None or tensor.stored == like.stored or tensor.shape != like.shape:
        return tensor.cast(like.dtype, name)
    # Q8_0, in blocks of a row of the file.
    if like.transpose_of:
        return through_q8_0(tensor.transposed(), name).transposed()
    return through_q8_0(tensor, name)


def compare_weights(a: Checkpoint, b: Checkpoint) -> Check:
    """Every tensor, byte for byte. Each file is read once."""
    names = list(dict.fromkeys([*a.tensors, *b.tensors]))
    faults = {name: fault for name in names if (fault := _difference(a.tensors.get(name), b.tensors.get(name)))}
    result = f"{len(names) - len(faults)} of {len(names)} tensors bit-identical"
    if faults:
        result += "; " + "; ".join(f"{name} {fault}" for name, fault in list(faults.items())[:3])
    return Check(
        "weights",
        not faults,
        result,
        {"tensors": len(names), "identical": len(names) - len(faults), "different": faults},
    )


def _difference(a: LazyTensor | None, b: LazyTensor | None) -> str | None:
    if a is None or b is None:
        return "is only in " + ("the second" if a is None else "the first")
    if a.shape != b.shape:
        return f"is {list(a.shape)}, not {list(b.shape)}"
    if a.dtype != b.dtype:
        return f"is {a.dtype}, not {b.dtype} (largest difference {_largest(a, b):.3g})"
    count, largest, size = 0, 0.0, a.dtype.itemsize
    for x, y in zip_chunks(whole_items(a.chunks(), size), whole_items(b.chunks(), size)):
        if x != y:
            apart = (np.frombuffer(x, np.uint8) != np.frombuffer(y, np.uint8)).reshape(-1, size).any(1)
            count += int(apart.sum())
            u, v = (cast_array(as_array(z, a.dtype, (-1,))[apart], a.dtype, F64, "") for z in (x, y))
            largest = float(np.maximum(largest, np.abs(u - v).max()))  # NaN, where there is one
    return f"differs in {count} values (by {largest:.3g} at most)" if count else None


def _largest(a: LazyTensor, b: LazyTensor) -> float:
    return float(np.abs(cast_array(a.read(), a.dtype, F64, "") - cast_array(b.read(), b.dtype, F64, "")).max(initial=0))


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


def compare_release(a: Checkpoint) -> Check:
    """CRC-32C of every tensor against the index of OpenAI's 124M checkpoint."""
    table = release_checksums()
    faults = [name for name, expected in table.items() if not _meets(a.tensors.get(name), expected)]
    extra = [name for name in a.tensors if name not in table]
    result = f"{len(table) - len(faults)} of {len(table)} tensors bit-identical to OpenAI's release"
    if faults or extra:
        result += f"; other: {', '.join((faults + extra)[:3])}{' ...' if len(faults + extra) > 3 else ''}"
    return Check(
        "weights",
        not faults and not extra,
        result,
        {"tensors": len(table), "identical": len(table) - len(faults), "different": faults + extra},
    )


def release_checksums() -> dict[str, dict[str, Any]]:
    """Canonical name -> shape and CRC-32C (of float32 bytes, row-major) in OpenAI's 124M release."""
    text = resources.files("converters").joinpath("openai_124M.json").read_text()
    return {name: {"shape": tuple(shape), "crc32c": int(crc, 16)} for name, (shape, crc) in json.loads(text).items()}


def _meets(tensor: LazyTensor | None, expected: dict[str, Any]) -> bool:
    return (
        tensor is not None
        and tensor.dtype == F32
        and tensor.shape == expected["shape"]
        and crc_of(tensor) == expected["crc32c"]
    )
