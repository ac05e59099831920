"""Compare what two models hold: configuration, weights, tokenizer, and the factors of an adapter. Nothing is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from converters import Checkpoint, ConversionError, GPT2Config, find_tokenizer, open_checkpoint
from converters.checkpoint import same_bytes
from converters.formats import WEIGHTS
from converters.lora_factors import Factors
from converters.tensors import F32
from converters.tokenizer import TokenizerFiles, same_tokenizer

from ..precisions import Precision, precisions_in
from ..runtimes.adapter_files import AdapterFile, named_factors
from ..runtimes.base import Decoder
from ..runtimes.task_model import TaskModel
from . import packages
from .checks import Check
from .weights import compare_weights, first_line, not_compared


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


def tokenizer_of(*paths: str | Path) -> TokenizerFiles | None:
    """The first tokenizer in the directories of these paths."""
    for path in map(Path, paths):
        found = find_tokenizer(path if path.is_dir() else path.parent)
        if found:
            return found
    return None


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


def compare_onnx(a: Checkpoint, b: Path, model: Decoder | TaskModel) -> list[Check]:
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
        return [not_compared(error)]
    weights = compare_weights(a.cast(F32), used.cast(F32))
    return [weights, *_compare_beside(a, b, (*a.files, *used.files)), compare_tokenizers(a, used)]


def _compare_stored(a: Checkpoint, path: Path, precision: Precision) -> Check:
    """Compare the rounded weights in an ONNX model with the checkpoint's."""
    if not packages.installed("onnx"):
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
        return [Check("weights beside", False, first_line(error))]
    files = {file.resolve() for file in beside.files}
    if files <= {file.resolve() for file in seen}:
        return []
    return [replace(compare_weights(a.cast(F32), beside.cast(F32)), name="weights beside")]
