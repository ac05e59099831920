"""What an ONNX model stores of each weight, against the checkpoint that it was made from."""

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
from ..precisions.quantize import SLICE, dequantize, unpack4
from ..precisions.weights import BITS, TABLES
from ..runtimes.onnx_model import block_size
from .checks import Check

# How far a block of weights may be from the source's. Rounding to nearest loses 1% and 10%; rounding by a text moves
# weights further, those of small blocks too, to lose less in the end. A long column of w8a8 may hang on one large number.
LOSSES = {"int8": 0.1, "w8a8": 0.25, "int4": 0.6}

Array = NDArray[Any]


class Stored(NamedTuple):
    """What a model stores of a weight: numbers, and their scales if it is quantised. Both (K, ...), K being the axis that a
    product sums over, and ``block`` of which share a scale."""

    numbers: Array
    scale: Array | None
    block: int

    @property
    def fits(self) -> bool:
        """Whether there is a scale for each block."""
        blocks = -(-len(self.numbers) // self.block)
        return self.scale is None or self.scale.shape == (blocks, self.numbers.shape[1])

    def values(self) -> NDArray[np.float32]:
        """What they stand for."""
        if self.scale is None:
            return self.numbers.astype(np.float32)
        return dequantize(self.numbers, self.scale, self.block)


def read_stored(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Stored | None]]:
    """Each weight of an ONNX model in turn; None where it has none of this name. The tables of tokens are transposed, if
    they are quantised.

    Raises:
        FormatError: if the file of weights is not whole.
    """
    model = onnx.load(path, load_external_data=False)
    initializers = {tensor.name.removesuffix("_pairs"): tensor for tensor in model.graph.initializer}
    initializers |= {tensor.name: tensor for tensor in model.graph.initializer}
    given = block_size({entry.key: entry.value for entry in model.metadata_props})
    for name, shape in shapes.items():
        if name not in initializers:
            yield name, None
            continue
        numbers, scale = _array(path, initializers[name], shape), None
        if f"{name}_scale" in initializers:
            scale = _array(path, initializers[f"{name}_scale"])
        if name in TABLES and scale is not None:
            numbers, scale = numbers.T, scale.T
        yield name, Stored(numbers, scale, given or len(numbers))  # or a whole column


def compare_stored(a: Checkpoint, path: Path, precision: str) -> Check:
    """Every weight of an ONNX model, dequantised, against the checkpoint's: the worst block of each.

    Raises:
        FormatError: if the file of weights is not whole.
    """
    calibrated = read_metadata(path).get(contract.ROUNDING) == "calibrated"
    tensors = a.cast(F32).tensors
    faults, worst, bound = [], 0.0, LOSSES.get(precision, 0)
    for name, found in read_stored(path, a.config.shapes()):
        expected = tensors[name].read()
        if found is None:
            faults.append(f"{name} is missing")
            continue
        if name in TABLES and found.scale is not None:
            expected = expected.T
        if found.numbers.shape != expected.shape:
            faults.append(f"{name} is {list(found.numbers.shape)}, not {list(expected.shape)}")
        elif found.scale is None:
            same = (found.numbers == expected.astype(found.numbers.dtype)).all()
            faults += [] if same else [f"{name} is not the source's"]
        elif not found.fits:
            faults.append(f"{name} has scales {list(found.scale.shape)}, which are not of blocks of {found.block}")
        else:
            lost = _loss(expected, found.values(), found.block, calibrated)
            worst = max(worst, lost)
            if not lost <= bound:
                faults.append(f"{name} has a block that is {lost:.0%} off (bound {bound:.0%})")
    n = len(a.tensors)
    result = (
        f"{n} of {n} tensors, the worst block {worst:.1%} off" if precision in BITS else f"{n} of {n} tensors rounded"
    )
    return Check("weights", not faults, "; ".join(faults[:3]) or result, {"worst_block": worst, "failures": faults})


def _array(path: Path, tensor: Any, shape: tuple[int, ...] | None = None) -> Array:
    """An initializer in an external file; one of pairs of 4-bit numbers as those numbers, in their own shape."""
    facts = {entry.key: entry.value for entry in tensor.external_data}
    try:
        if not facts:
            return _numbers(tensor, tensor.raw_data, shape)
        file = File(path.parent / Path(facts.get("location", path.name)).name)
        return _numbers(tensor, file.read(int(facts["offset"]), int(facts["length"])), shape)
    except (KeyError, ValueError):
        raise FormatError(f"{path}: {tensor.name[:100]} is not stored as gpt2x stores it") from None


def _numbers(tensor: Any, data: bytes, shape: tuple[int, ...] | None) -> Array:
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT8):
        return unpack4(np.frombuffer(data, np.uint8), shape or tuple(tensor.dims))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.frombuffer(data, dtype).reshape(tuple(tensor.dims))


def _loss(expected: Array, found: Array, block: int, column: bool) -> float:
    """The largest error of any block along the first axis, (K, N) each: root of the mean square, as a share of the block's
    own, or with ``column`` of its whole column's where that is larger. Of zeros, 0 or infinite."""
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
