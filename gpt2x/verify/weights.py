"""Comparing the weights of two files byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from converters import Checkpoint, ConversionError, open_checkpoint
from converters.arrays import as_array, cast_array
from converters.checkpoint import crc_of, zip_chunks
from converters.containers.gguf import through_q8_0
from converters.containers.gguf_types import Q8_0
from converters.dtypes import whole_items
from converters.tensors import F32, F64, LazyTensor

from .checks import Check


def compare_files(
    a: str | Path, b: str | Path, open_weights: Callable[[str | Path], Checkpoint] = open_checkpoint
) -> Check:
    """Compare the weights of two files; not compared if ``open_weights`` cannot read one of them."""
    found = []
    for path in (a, b):
        try:
            found.append(open_weights(path).cast(F32))
        except ConversionError as error:
            return not_compared(error)
    return compare_weights(*found)


def not_compared(error: ConversionError) -> Check:
    """The check of weights that cannot be opened."""
    return Check("weights", None, f"not compared: {first_line(error)}")


def first_line(error: ConversionError) -> str:
    """The headline of an error, which may list faults below it."""
    return str(error).splitlines()[0]


def rounded_like(a: Checkpoint, b: Checkpoint) -> Checkpoint:
    """Return the first checkpoint with each tensor rounded to the dtype in the second's file, lazily.

    Raises:
        ConversionError: if a tensor of the second is quantized to a type other than Q8_0.

    Raises (while streaming):
        ConversionError: if a value does not fit into the dtype.
    """
    tensors = dict(a.tensors)
    for name in a.tensors.keys() & b.tensors.keys():
        tensors[name] = _rounded_like(a.tensors[name], b.tensors[name], name)
    return replace(a, tensors=tensors)


def _rounded_like(tensor: LazyTensor, like: LazyTensor, name: str) -> LazyTensor:
    if like.stored is None or tensor.stored == like.stored or tensor.shape != like.shape:
        return tensor.cast(like.dtype, name)
    kind, _ = like.stored
    if kind != Q8_0.name:
        raise ConversionError(f"{name}: stored as {kind}, to which gpt2x cannot round; compare without --rounded")
    # A block is a part of a row in the file.
    if like.transpose_of:
        return through_q8_0(tensor.transposed(), name).transposed()
    return through_q8_0(tensor, name)


def compare_weights(a: Checkpoint, b: Checkpoint) -> Check:
    """Compare every tensor byte for byte. Each file is read once."""
    names = list(dict.fromkeys([*a.tensors, *b.tensors]))
    faults = {}
    for name in names:
        fault = _difference(a.tensors.get(name), b.tensors.get(name))
        if fault:
            faults[name] = fault
    result = f"{len(names) - len(faults)} of {len(names)} tensors bit-identical"
    if faults:
        result += "; " + "; ".join(f"{name} {fault}" for name, fault in list(faults.items())[:3])
    details = {"tensors": len(names), "identical": len(names) - len(faults), "different": faults}
    return Check("weights", not faults, result, details)


def _difference(a: LazyTensor | None, b: LazyTensor | None) -> str | None:
    if a is None:
        return "is only in the second"
    if b is None:
        return "is only in the first"
    if a.shape != b.shape:
        return f"is {list(a.shape)}, not {list(b.shape)}"
    if a.dtype != b.dtype:
        return f"is {a.dtype}, not {b.dtype} (largest difference {_largest(a, b):.3g})"
    count, largest = _count_differences(a, b)
    return f"differs in {count} values (by {largest:.3g} at most)" if count else None


def _count_differences(a: LazyTensor, b: LazyTensor) -> tuple[int, float]:
    """How many values of two tensors of one shape and dtype differ, and by how much at most."""
    count, largest = 0, 0.0
    size = a.dtype.itemsize
    for x, y in zip_chunks(whole_items(a.chunks(), size), whole_items(b.chunks(), size)):
        # Equal bytes are most of all: they are compared without numpy.
        if x == y:
            continue
        differs = (np.frombuffer(x, np.uint8) != np.frombuffer(y, np.uint8)).reshape(-1, size).any(1)
        count += int(differs.sum())
        u = cast_array(as_array(x, a.dtype, (-1,))[differs], a.dtype, F64, "")
        v = cast_array(as_array(y, a.dtype, (-1,))[differs], a.dtype, F64, "")
        largest = float(np.maximum(largest, np.abs(u - v).max()))  # np.maximum keeps a NaN
    return count, largest


def _largest(a: LazyTensor, b: LazyTensor) -> float:
    u = cast_array(a.read(), a.dtype, F64, "")
    v = cast_array(b.read(), b.dtype, F64, "")
    return float(np.abs(u - v).max(initial=0))


def compare_release(a: Checkpoint) -> Check:
    """Compare the CRC-32C of every tensor with the index of OpenAI's 124M checkpoint."""
    table = release_checksums()
    faults = [name for name, expected in table.items() if not _meets(a.tensors.get(name), expected)]
    extra = [name for name in a.tensors if name not in table]
    result = f"{len(table) - len(faults)} of {len(table)} tensors bit-identical to OpenAI's release"
    others = faults + extra
    if others:
        more = " ..." if len(others) > 3 else ""
        result += f"; other: {', '.join(others[:3])}{more}"
    details = {"tensors": len(table), "identical": len(table) - len(faults), "different": others}
    return Check("weights", not others, result, details)


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
