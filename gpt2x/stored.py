"""What an ONNX model stores of each weight, against the checkpoint that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from converters import Checkpoint, FormatError
from converters.files import File
from converters.tensors import F32

from . import contract
from .export.quantize import dequantize, unpack4
from .export.weights import BITS, TABLES
from .runs import Check

# How far a block of weights may be from the source's: root of the mean square, as a share of the block's own. Rounding
# to nearest loses 1% and 10%; rounding by a text moves weights further, to lose less in the end.
LOSSES = {"int8": 0.1, "int4": 0.6}

Array = NDArray[Any]


def compare_stored(a: Checkpoint, path: Path, precision: str) -> Check:
    """Every weight of an ONNX model, dequantised, against the checkpoint's: the worst block of each.

    Raises:
        FormatError: if the file of weights is not whole.
    """
    model = onnx.load(path, load_external_data=False)
    initializers = {tensor.name.removesuffix("_pairs"): tensor for tensor in model.graph.initializer}
    initializers |= {tensor.name: tensor for tensor in model.graph.initializer}
    block = int({entry.key: entry.value for entry in model.metadata_props}.get(contract.BLOCK, 0))
    faults, worst = [], 0.0
    for name, tensor in a.cast(F32).tensors.items():
        if name not in initializers:
            faults.append(f"{name} is missing")
            continue
        found, scale = _array(path, initializers[name], tensor.shape), None
        if f"{name}_scale" in initializers:
            scale = _array(path, initializers[f"{name}_scale"])
        expected = tensor.read()
        if name in TABLES and scale is not None:
            found, scale, expected = found.T, scale.T, expected.T
        if found.shape != expected.shape:
            faults.append(f"{name} is {list(found.shape)}, not {list(expected.shape)}")
        elif scale is None:
            same = (found == expected.astype(found.dtype)).all()
            faults += [] if same else [f"{name} is not the source's"]
        else:
            lost = _loss(expected, dequantize(found, scale, block), block)
            worst = max(worst, lost)
            if not lost <= LOSSES[precision]:
                faults.append(f"{name} has a block that is {lost:.0%} off (bound {LOSSES[precision]:.0%})")
    n = len(a.tensors)
    result = (
        f"{n} of {n} tensors, the worst block {worst:.1%} off" if precision in BITS else f"{n} of {n} tensors rounded"
    )
    return Check("weights", not faults, "; ".join(faults[:3]) or result, {"worst_block": worst, "failures": faults})


def _array(path: Path, tensor: Any, shape: tuple[int, ...] | None = None) -> Array:
    """An initializer in an external file; one of pairs of 4-bit numbers as those numbers, in their own shape."""
    facts = {entry.key: entry.value for entry in tensor.external_data}
    file = File(path.parent / Path(facts.get("location", path.name)).name)
    try:
        return _numbers(tensor, file.read(int(facts["offset"]), int(facts["length"])), shape)
    except (KeyError, ValueError):
        raise FormatError(f"{path}: {tensor.name[:100]} is not stored as gpt2x stores it") from None


def _numbers(tensor: Any, data: bytes, shape: tuple[int, ...] | None) -> Array:
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT8):
        return unpack4(np.frombuffer(data, np.uint8), shape or tuple(tensor.dims))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.frombuffer(data, dtype).reshape(tuple(tensor.dims))


def _loss(expected: Array, found: Array, block: int) -> float:
    """The largest relative error of any block along the first axis, (K, N) each; of a block of zeros, 0 or infinite."""
    starts = np.arange(0, len(expected), block)
    error = np.add.reduceat((found - expected).astype(np.float32) ** 2, starts)
    size = np.add.reduceat(expected.astype(np.float32) ** 2, starts)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(error == 0, 0, np.sqrt(error / size))
    return float(share.max(initial=0))
