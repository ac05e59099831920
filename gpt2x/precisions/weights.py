"""How a precision stores each weight, and the file beside the ONNX model that they lie in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from converters import Checkpoint, ConversionError
from converters.config import to_hf
from converters.containers.safetensors import write_safetensors
from converters.dialects import HF
from converters.io.publishing import Output

from .. import contract
from ..verify.sample_text import sample_ids
from .quantize import pack4, quantize

BITS = {"int8": 8, "w8a8": 8, "int4": 4}
BLOCKWISE = ("int8", "int4")  # in w8a8 a whole column shares a scale, as whole numbers are summed along it
BLOCKS = (16, 32, 64, 128, 256)  # that ONNX Runtime's fused product takes
BLOCK = 32  # weights that share a scale: docs/quantization.md has what others give
ALIGNMENT = 64  # bytes
TABLES = ("wte.weight", "lm_head.weight")
LONGEST = 65536  # products of 8 by 8 bits that a sum of 32 bits holds
LARGEST_FP16 = float(np.finfo(np.float16).max)


class Piece(NamedTuple):
    """A tensor in the file of weights: numpy's name of its type (or "int4"), its shape, and where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


class Quantized(NamedTuple):
    """A weight in blocks of numbers along the axis that a product sums over: a table's second, otherwise the first."""

    q: Piece
    scale: Piece
    block: int


@dataclass(frozen=True)
class Weights:
    """What lies where in the file of weights of one precision."""

    precision: str
    stored: Mapping[str, Piece | Quantized]  # by canonical name

    @property
    def location(self) -> str:
        """The file's name."""
        return contract.data_file(self.precision)


def write_weights(
    out: Output, checkpoint: Checkpoint, precision: str, *, block: int = BLOCK, calibration: Sequence[int] | None = None
) -> Weights:
    """Write every weight of a checkpoint in float32 as a precision stores it.

    fp32 is a safetensors file. In fp16, all but the norms are float16. In int8 and int4, the projections and the tables
    of tokens are quantised in blocks, in w8a8 by column; positions, biases and norms stay float32.

    Args:
        block: how many weights of int8 and int4 share a scale.
        calibration: tokens to round by (GPTQ); otherwise to nearest.

    Raises:
        ConversionError: if a weight cannot be stored so.
    """
    if precision == "fp32":
        spans = write_safetensors(out, HF.write(checkpoint.tensors, checkpoint.config), to_hf(checkpoint.config))
        places = ((name, tensor, spans[HF.layout(name)[0]][0]) for name, tensor in checkpoint.tensors.items())
        return Weights(precision, {n: Piece("float32", t.shape, offset, t.nbytes) for n, t, offset in places})
    writer = _Writer(out)
    if precision == "fp16":
        arrays = ((name, tensor.read()) for name, tensor in checkpoint.tensors.items())
        halves = {name: _write_half(writer, name, array) for name, array in arrays}
        _check_range(checkpoint)
        return Weights(precision, halves)
    stored = {
        name: _write_blocks(writer, name, array, precision, block, hessian)
        for name, array, hessian in _with_hessians(checkpoint, calibration)
    }
    return Weights(precision, stored)


def _with_hessians(
    checkpoint: Checkpoint, calibration: Sequence[int] | None
) -> Iterator[tuple[str, NDArray[np.float32], Any]]:
    """Every weight and its Hessian, if there is one: blocks in turn, and the rest at last."""
    known: dict[str, Any] = {}
    if calibration:
        from .calibrate import hessians

        known_by_block = hessians(checkpoint, calibration)
    prefix = ""
    for name in sorted(checkpoint.tensors, key=lambda name: not name.startswith("h.")):
        here = ".".join(name.split(".")[:2]) if name.startswith("h.") else "the rest"
        if calibration and here != prefix:
            known, prefix = next(known_by_block), here
        yield name, checkpoint.tensors[name].read(), known.get(name)


def _write_half(writer: _Writer, name: str, array: NDArray[np.float32]) -> Piece:
    _check_finite(name, array, "fp16")
    if ".ln_" in name or name.startswith("ln_"):
        return writer.add("float32", array.shape, array)
    largest = float(np.abs(array).max(initial=0))
    if largest > LARGEST_FP16:
        raise ConversionError(
            f"{name} holds {largest:.6g}; fp16 ends at {LARGEST_FP16:.0f}. Export this model as fp32 or int8."
        )
    return writer.add("float16", array.shape, array.astype(np.float16))


def _check_range(checkpoint: Checkpoint) -> None:
    """Run the model once, for numbers in its midst that fp16 cannot hold. (ONNX Runtime on a CPU would hide them.)"""
    from .calibrate import largest_values

    ids, _ = sample_ids(checkpoint.config, checkpoint.tokenizer)
    found = [
        (name, largest) for name, largest in largest_values(checkpoint, ids).items() if not largest <= LARGEST_FP16
    ]
    if found:
        name, largest = found[0]
        raise ConversionError(
            f"{name} makes numbers of {largest:.6g} on a text; fp16 ends at {LARGEST_FP16:.0f}. "
            "Export this model as fp32 or int8."
        )


def _write_blocks(
    writer: _Writer, name: str, array: NDArray[np.float32], precision: str, block: int, hessian: Any
) -> Piece | Quantized:
    _check_finite(name, array, precision)
    if array.ndim < 2 or name == "wpe.weight":
        return writer.add("float32", array.shape, array)
    table, bits = name in TABLES, BITS[precision]
    if precision not in BLOCKWISE:
        block = array.shape[table]
        if block > LONGEST:
            raise ConversionError(f"{name} sums {block} products, and w8a8 at most {LONGEST}: export it as int8")
    if table and array.shape[1] % 2:
        bits = 8  # rows of an odd number of 4 bits would share bytes
    if hessian is not None and not np.isfinite(hessian).all():
        raise ConversionError(f"{name}: what it is multiplied with on the text overflows; export without --calibrate")
    blocks = quantize(array.T if table else array, bits, block, hessian, paired=precision == "w8a8")
    q, scale = (np.ascontiguousarray(part.T) for part in blocks) if table else blocks
    numbers = writer.add(f"int{bits}", q.shape, pack4(q) if bits == 4 else q)
    return Quantized(numbers, writer.add("float32", scale.shape, scale), block)


def _check_finite(name: str, array: NDArray[np.float32], precision: str) -> None:
    if not np.isfinite(array).all():
        raise ConversionError(f"{name} holds NaN or infinity, which {precision} cannot: only fp32 keeps such a model")


class _Writer:
    """Tensors one after another, each at an aligned offset."""

    def __init__(self, out: Output) -> None:
        self.out, self.position = out, 0

    def add(self, dtype: str, shape: tuple[int, ...], array: NDArray[Any]) -> Piece:
        """Append the bytes of a tensor of this type and shape."""
        data = np.ascontiguousarray(array).tobytes()
        gap = -self.position % ALIGNMENT
        self.out.write(bytes(gap))
        self.out.write(data)
        piece = Piece(dtype, tuple(shape), self.position + gap, len(data))
        self.position += gap + len(data)
        return piece
