"""Compare the weights that an ONNX model stores with those of the checkpoint that it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from converters import Checkpoint, FormatError
from converters.containers.onnx import read_metadata
from converters.io.reading import File
from converters.tensors import F32

from .. import contract
from ..precisions import Precision
from ..precisions.quantize import SLICE, dequantize, unpack4
from ..precisions.stored import TABLES
from ..runtimes.onnx_model import block_size
from .checks import Check

Array = NDArray[Any]


class Stored(NamedTuple):
    """A weight as a model stores it: values, or integers and their scales if it is quantized. The first axis is the one that
    a product sums over; ``block`` values along it share a scale."""

    numbers: Array
    scale: Array | None
    block: int

    @property
    def fits(self) -> bool:
        """Whether there is a scale for each block."""
        blocks = -(-len(self.numbers) // self.block)
        return self.scale is None or self.scale.shape == (blocks, self.numbers.shape[1])

    def values(self) -> NDArray[np.float32]:
        """The weight, dequantized."""
        if self.scale is None:
            return self.numbers.astype(np.float32)
        return dequantize(self.numbers, self.scale, self.block)


def read_stored(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Stored | None]]:
    """Each weight of an ONNX model in turn; None if the model has no weight of this name. Quantized tables are transposed.

    Raises:
        FormatError: if the file of weights is truncated.
    """
    model = onnx.load(path, load_external_data=False)
    # Beside an untied lm_head, a 4-bit wte is only looked up, so that the graph has its pairs alone. A tied one is there
    # twice, and counts under its own name.
    initializers = {tensor.name.removesuffix("_pairs"): tensor for tensor in model.graph.initializer}
    initializers |= {tensor.name: tensor for tensor in model.graph.initializer}
    given = block_size({entry.key: entry.value for entry in model.metadata_props})
    for name, shape in shapes.items():
        if name not in initializers:
            yield name, None
            continue
        numbers = _array(path, initializers[name], shape)
        scale = None
        if f"{name}_scale" in initializers:
            scale = _array(path, initializers[f"{name}_scale"])
        if name in TABLES and scale is not None:
            numbers, scale = numbers.T, scale.T
        yield name, Stored(numbers, scale, given or len(numbers))  # without a block size, a column has one scale


def compare_stored(a: Checkpoint, path: Path, precision: Precision) -> Check:
    """Compare every weight of an ONNX model, dequantized, with the checkpoint's.

    Raises:
        FormatError: if the file of weights is truncated.
    """
    calibrated = read_metadata(path).get(contract.ROUNDING) == "calibrated"
    tensors = a.cast(F32).tensors
    faults: list[str] = []
    worst = 0.0  # error of a block, relative to the block
    for name, found in read_stored(path, a.config.shapes()):
        if found is None:
            faults.append(f"{name} is missing")
            continue
        expected = tensors[name].read()
        if name in TABLES and found.scale is not None:
            expected = expected.T
        fault = _fault_of_layout(found, expected) or _fault_of_plain(found, expected)
        if fault is None and found.scale is not None:
            lost = _loss(expected, found.values(), found.block, calibrated)
            worst = max(worst, lost)
            if not lost <= precision.worst_block:
                fault = f"has a block with a relative error of {lost:.0%} (bound {precision.worst_block:.0%})"
        if fault is not None:
            faults.append(f"{name} {fault}")
    n = len(a.tensors)
    passed = f"worst block {worst:.1%} off" if precision.bits else "each rounded exactly"
    result = "; ".join(faults[:3]) or f"{n} of {n} tensors, {passed}"
    return Check("weights", not faults, result, {"worst_block": worst, "failures": faults, "inexact": True})


def _fault_of_layout(found: Stored, expected: Array) -> str | None:
    """What is wrong with the shapes of a weight and its scales."""
    if found.numbers.shape != expected.shape:
        return f"is {list(found.numbers.shape)}, not {list(expected.shape)}"
    if found.scale is not None and not found.fits:
        return f"has scales {list(found.scale.shape)}, which do not match blocks of {found.block}"
    return None


def _fault_of_plain(found: Stored, expected: Array) -> str | None:
    """What is wrong with the values of a weight that is not quantized."""
    if found.scale is not None:
        return None
    same = (found.numbers == expected.astype(found.numbers.dtype)).all()
    return None if same else "differs from the source"


def _array(path: Path, tensor: Any, shape: tuple[int, ...] | None = None) -> Array:
    """An initializer, 4-bit integers unpacked to ``shape``."""
    facts = {entry.key: entry.value for entry in tensor.external_data}
    try:
        if not facts:
            return _numbers(tensor, tensor.raw_data, shape)
        file = File(path.parent / Path(facts.get("location", path.name)).name)
        return _numbers(tensor, file.read(int(facts["offset"]), int(facts["length"])), shape)
    except (KeyError, ValueError):
        raise FormatError(f"{path}: {tensor.name[:100]} is not stored in the way that gpt2x writes it") from None


def _numbers(tensor: Any, data: bytes, shape: tuple[int, ...] | None) -> Array:
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT8):
        return unpack4(np.frombuffer(data, np.uint8), shape or tuple(tensor.dims))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.frombuffer(data, dtype).reshape(tuple(tensor.dims))


def _loss(expected: Array, found: Array, block: int, column: bool) -> float:
    """The largest root mean square error of a block along the first axis of (K, N), relative to the root mean square of the
    block, or with ``column`` to that of its column if it is larger. Of a block of zeros, 0 or infinity."""
    starts = np.arange(0, len(expected), block)
    lengths = np.diff([*starts, len(expected)])[:, None]
    worst = 0.0
    for begin in range(0, expected.shape[1], SLICE):
        x, y = (array[:, begin : begin + SLICE].astype(np.float64) for array in (expected, found))
        error = np.add.reduceat((y - x) ** 2, starts) / lengths
        size = np.add.reduceat(x**2, starts) / lengths
        if column:
            size = np.maximum(size, (x**2).mean(0))
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(error == 0, 0, np.sqrt(error / size))
        worst = max(worst, float(share.max(initial=0)))
    return worst
