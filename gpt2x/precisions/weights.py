"""The file of weights beside an ONNX model: tensors one after another, each at an aligned offset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters import Checkpoint, ConversionError
from converters.io.publishing import Output

from .quantize import pack4, quantize
from .stored import TABLES, Piece, Quantized

ALIGNMENT = 64  # bytes


class Writer:
    """Appends tensors to the file."""

    def __init__(self, out: Output) -> None:
        self.out = out
        self.position = 0

    def add(self, dtype: str, shape: tuple[int, ...], array: NDArray[Any]) -> Piece:
        """Append the bytes of a tensor of this dtype and shape."""
        data = np.ascontiguousarray(array).tobytes()
        gap = -self.position % ALIGNMENT
        self.out.write(bytes(gap))
        self.out.write(data)
        piece = Piece(dtype, tuple(shape), self.position + gap, len(data))
        self.position += gap + len(data)
        return piece


def write_half(writer: Writer, name: str, array: NDArray[np.float32], largest: float) -> Piece:
    """Append a weight in float16, whose largest value is ``largest``.

    Raises:
        ConversionError: if the weight has larger values.
    """
    found = float(np.abs(array).max(initial=0))
    if found > largest:
        raise ConversionError(
            f"{name} holds {found:.6g}, beyond fp16's largest value {largest:.0f}. Export this model as fp32 or int8."
        )
    return writer.add("float16", array.shape, array.astype(np.float16))


def write_quantized(
    writer: Writer, name: str, array: NDArray[np.float32], bits: int, block: int, hessian: Any, paired: bool
) -> Quantized:
    """Quantize a matrix and append its integers and scales. Arguments as of ``quantize``; a table is quantized along
    its second axis.

    Raises:
        ConversionError: if the Hessian is not finite.
    """
    if hessian is not None and not np.isfinite(hessian).all():
        raise ConversionError(f"{name}: its input overflows on the calibration text. Export without --calibrate.")
    if name in TABLES:
        transposed = quantize(array.T, bits, block, hessian, paired=paired)
        q, scale = (np.ascontiguousarray(part.T) for part in transposed)
    else:
        q, scale = quantize(array, bits, block, hessian, paired=paired)
    numbers = writer.add(f"int{bits}", q.shape, pack4(q) if bits == 4 else q)
    return Quantized(numbers, writer.add("float32", scale.shape, scale), block)


def check_finite(name: str, array: NDArray[np.float32], precision: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        ConversionError: if the weight holds one.
    """
    if not np.isfinite(array).all():
        raise ConversionError(f"{name} holds NaN or infinity, which {precision} cannot represent. Export it as fp32.")


def with_hessians(
    checkpoint: Checkpoint, calibration: Sequence[int] | None
) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float32] | None]]:
    """Each weight's name, values and Hessian (None without calibration): blocks in order, then the rest."""
    # The order in which Hessians come: the blocks, and last what the logits are computed with.
    in_order = sorted(checkpoint.tensors, key=lambda name: not name.startswith("h."))
    if not calibration:
        for name in in_order:
            yield name, checkpoint.tensors[name].read(), None
        return
    from .calibrate import hessians

    # One group of Hessians at a time is in memory: those of a block, or at last the logits'.
    groups = hessians(checkpoint, calibration)
    known: dict[str, NDArray[np.float32]] = {}
    group = ""
    for name in in_order:
        if _group_of(name) != group:
            group = _group_of(name)
            known = next(groups)
        yield name, checkpoint.tensors[name].read(), known.get(name)


def _group_of(name: str) -> str:
    """``h.3`` of ``h.3.mlp.c_fc.weight``; one group for all weights outside of blocks."""
    return ".".join(name.split(".")[:2]) if name.startswith("h.") else "rest"
