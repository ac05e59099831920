"""The quantized types of GGUF: how the values of a block are computed from its bytes, in float32.

Each type is one object: the structure of its block, as a numpy dtype, and a function from blocks to values. The functions
round in the same order as gguf-py's, so that the values are the same bit for bit.

Sources: the ``block_*`` structures in ggml's ``ggml-common.h``; ``dequantize_row_*`` in ``ggml-quants.c``, and gguf-py's
``quants.py`` for the order of the operations; the Open Compute Project's Microscaling Formats (MX) 1.0 for E8M0 and E2M1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import gguf_grids as grids
from .gguf_grids import Grid
from .gguf_types import TensorType

Array = NDArray[Any]
Floats = NDArray[np.float32]

VALUES_AT_ONCE = 1 << 18  # a megabyte of float32, however small the blocks are


@dataclass(frozen=True)
class Quant:
    """A quantized type.

    Args:
        block: the structure of one block.
        values: blocks ``[n]`` -> float32 values, n times as many as a block has, in order.
    """

    block: np.dtype[Any]
    values: Callable[[Array], Floats]


def dequantize(kind: TensorType, data: bytes) -> Iterator[Floats]:
    """The values of whole blocks, about a megabyte at a time."""
    quant = QUANTS[kind.name]
    step = VALUES_AT_ONCE // kind.values * kind.nbytes
    for begin in range(0, len(data), step):
        blocks = np.frombuffer(data[begin : begin + step], quant.block)
        with np.errstate(invalid="ignore", over="ignore"):  # a scale may be infinite, NaN, or too large
            values = quant.values(blocks)
        yield values.reshape(-1)


# ------------------------------------------------------------------------------------------------ parts of a block


def _scale(blocks: Array, field: str = "d") -> Floats:
    """The float16 of each block: ``[n, 1]``."""
    scale: Floats = blocks[field].astype(np.float32)[:, None]
    return scale


def _unpacked(packed: Array, bits: int, run: int) -> Array:
    """Unsigned integers of ``bits`` bits: ``[n, bytes]`` -> ``[n, bytes * 8 / bits]``.

    A run of bytes holds as many integers in its lowest bits, then as many in the bits above them, and so on.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = packed.reshape(len(packed), -1, 1, run)
    integers: Array = (runs >> shifts) & np.uint8(2**bits - 1)
    return integers.reshape(len(packed), -1)


def _centred(integers: Array, offset: int) -> Floats:
    """Unsigned integers of at most 7 bits, less an offset."""
    return (integers.astype(np.int8) - np.int8(offset)).astype(np.float32)


def _grouped(scales: Floats, values: Floats) -> Floats:
    """The product of each scale with its group of values: ``[n, groups]``, ``[n, values]``."""
    groups = values.reshape(*scales.shape, -1)
    return scales[..., None] * groups


# ------------------------------------------------------------------------------------------------- blocks of 32


def _q4_0(blocks: Array) -> Floats:
    return _scale(blocks) * _centred(_unpacked(blocks["qs"], 4, 16), 8)


def _q4_1(blocks: Array) -> Floats:
    return _scale(blocks) * _unpacked(blocks["qs"], 4, 16).astype(np.float32) + _scale(blocks, "m")


def _five_bits(blocks: Array) -> Array:
    integers: Array = _unpacked(blocks["qs"], 4, 16) | _unpacked(blocks["qh"], 1, 1) << 4
    return integers


def _q5_0(blocks: Array) -> Floats:
    return _scale(blocks) * _centred(_five_bits(blocks), 16)


def _q5_1(blocks: Array) -> Floats:
    return _scale(blocks) * _five_bits(blocks).astype(np.float32) + _scale(blocks, "m")


def _q8_0(blocks: Array) -> Floats:
    return blocks["qs"].astype(np.float32) * _scale(blocks)


# The values of IQ4_NL and IQ4_XS, and the values of E2M1, doubled.
NONLINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def _iq4_nl(blocks: Array) -> Floats:
    return _scale(blocks) * NONLINEAR[_unpacked(blocks["qs"], 4, 16)]


def _mxfp4(blocks: Array) -> Floats:
    scales: Floats = E8M0[blocks["e"]][:, None]
    return scales * E2M1[_unpacked(blocks["qs"], 4, 16)]


def _nvfp4(blocks: Array) -> Floats:
    return _grouped(UE4M3[blocks["d"]], E2M1[_unpacked(blocks["qs"], 4, 8)])


def _halves_of_e8m0() -> Floats:
    """Half of each E8M0, which is ``2 ** (e - 127)``: E2M1 holds doubled values. ggml has no NaN there."""
    exponents = np.arange(256) - 128
    return np.ldexp(np.float32(1), exponents)


def _halves_of_ue4m3() -> Floats:
    """Half of each unsigned E4M3: 4 bits of an exponent, 3 bits of a mantissa; bit 7 is not used. NaN (0x7f) is 0 in ggml."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    normal = np.ldexp((8 + mantissa).astype(np.float32), exponent - 11)
    subnormal = np.ldexp(mantissa.astype(np.float32), -10)
    values = np.where(exponent == 0, subnormal, normal)
    values[0x7F] = 0
    return values


E8M0, UE4M3 = _halves_of_e8m0(), _halves_of_ue4m3()


# ------------------------------------------------------------------------------------------------ blocks of 256


def _q2_k(blocks: Array) -> Floats:
    scales, minima = blocks["scales"] & 15, blocks["scales"] >> 4
    steps = _scale(blocks) * scales.astype(np.float32)
    offsets = _scale(blocks, "dmin") * minima.astype(np.float32)
    return _grouped(steps, _unpacked(blocks["qs"], 2, 32).astype(np.float32)) - offsets[..., None]


def _q3_k(blocks: Array) -> Floats:
    low, high = blocks["scales"][:, :8], blocks["scales"][:, 8:]
    scales = _unpacked(low, 4, 8) | _unpacked(high, 2, 4) << 4
    integers = _unpacked(blocks["qs"], 2, 32) | _unpacked(blocks["hmask"], 1, 32) << 2
    return _grouped(_scale(blocks) * _centred(scales, 32), _centred(integers, 4))


def _q4_k(blocks: Array) -> Floats:
    return _with_minima(blocks, _unpacked(blocks["qs"], 4, 32))


def _q5_k(blocks: Array) -> Floats:
    return _with_minima(blocks, _unpacked(blocks["qs"], 4, 32) | _unpacked(blocks["qh"], 1, 32) << 4)


def _with_minima(blocks: Array, integers: Array) -> Floats:
    """The values of 8 groups of 32, each with a scale and a minimum of 6 bits.

    In 12 bytes, 4 scales and 4 minima have their 6 bits in the first and the second 4 bytes. The others have 4 bits in the
    last 4 bytes, and their upper 2 bits above those of the first ones.
    """
    first, second, last = np.split(blocks["scales"], 3, axis=1)
    scales = np.concatenate((first & 63, last & 15 | first >> 6 << 4), axis=1)
    minima = np.concatenate((second & 63, last >> 4 | second >> 6 << 4), axis=1)
    steps = _scale(blocks) * scales.astype(np.float32)
    offsets = _scale(blocks, "dmin") * minima.astype(np.float32)
    return _grouped(steps, integers.astype(np.float32)) - offsets[..., None]


def _q6_k(blocks: Array) -> Floats:
    integers = _unpacked(blocks["ql"], 4, 64) | _unpacked(blocks["qh"], 2, 32) << 4
    return _grouped(_scale(blocks) * blocks["scales"].astype(np.float32), _centred(integers, 32))


def _iq4_xs(blocks: Array) -> Floats:
    scales = _unpacked(blocks["scales_l"], 4, 1) | _unpacked(blocks["scales_h"], 2, 1) << 4
    return _grouped(_scale(blocks) * _centred(scales, 32), NONLINEAR[_unpacked(blocks["qs"], 4, 16)])


def _tq1_0(blocks: Array) -> Floats:
    qs = blocks["qs"]
    parts = (_ternary(qs[:, :32], 5), _ternary(qs[:, 32:], 5), _ternary(blocks["qh"], 4))
    return _scale(blocks) * np.concatenate(parts, axis=1)


def _ternary(packed: Array, digits: int) -> Floats:
    """The base 3 digits of each byte, less one: first the first digit of all bytes, then the second.

    A byte is a fraction of 256. Its digits come out at the top when it is multiplied by 3.
    """
    powers = 3 ** np.arange(digits, dtype=np.uint8)[:, None]
    fractions = packed[:, None, :] * powers  # modulo 256
    integers = (fractions.astype(np.uint16) * 3 >> 8).astype(np.uint8)
    return _centred(integers.reshape(len(packed), -1), 1)


def _tq2_0(blocks: Array) -> Floats:
    return _scale(blocks) * _centred(_unpacked(blocks["qs"], 2, 32), 1)


# -------------------------------------------------------------------------- blocks of 256: points of a grid, with signs


def _points(grid: Grid, low: Array, high: Array) -> Floats:
    """The points whose index has 8 low bits and some high bits: ``[n, indices * width]``."""
    index = low | high.astype(np.uint16) << 8
    points: Floats = grid.points[index]
    return points.reshape(len(low), -1)


def _signs(bits: Array) -> Floats:
    """-1 where a bit is set, else 1: ``[n, bytes]`` -> ``[n, bytes * 8]``."""
    return np.where(_unpacked(bits, 1, 1) == 1, np.float32(-1), np.float32(1))


def _even_signs(code: Array) -> Floats:
    """The signs of 8 values, of which 7 bits are stored: the number of negative ones is even. ``[n, codes]`` -> ``[n, codes * 8]``."""
    seven = code.astype(np.uint8) & 127
    parity = _unpacked(seven, 1, 1).reshape(*seven.shape, 8).sum(axis=-1, dtype=np.uint8) & 1
    return _signs(seven | parity << 7)


def _four_sign_codes(words: NDArray[np.uint32]) -> Array:
    """The four codes of 7 bits in the lower 28 bits of each word: ``[n, words * 4]``."""
    codes = words[..., None] >> np.array([0, 7, 14, 21], np.uint32) & 127
    return codes.reshape(len(words), -1)


def _iq2_xxs(blocks: Array) -> Floats:
    words = blocks["words"]  # [n, 8, 2]: four indices; four codes of signs, and a scale
    indices = np.ascontiguousarray(words[..., 0]).view(np.uint8)
    codes = words[..., 1]
    points = grids.IQ2_XXS.points[indices].reshape(len(blocks), -1)
    scales = _scale(blocks) * (np.float32(0.5) + (codes >> 28).astype(np.float32)) * np.float32(0.25)
    return _grouped(scales, points * _even_signs(_four_sign_codes(codes)))


def _iq2_xs(blocks: Array) -> Floats:
    points = grids.IQ2_XS.points[blocks["qs"] & 511].reshape(len(blocks), -1)
    return _grouped(_iq2_scales(blocks), points * _even_signs(blocks["qs"] >> 9))


def _iq2_s(blocks: Array) -> Floats:
    points = _points(grids.IQ2_S, blocks["qs"], _unpacked(blocks["qh"], 2, 1))
    return _grouped(_iq2_scales(blocks), points * _signs(blocks["signs"]))


def _iq2_scales(blocks: Array) -> Floats:
    scales = _unpacked(blocks["scales"], 4, 1).astype(np.float32)
    return _scale(blocks) * (np.float32(0.5) + scales) * np.float32(0.25)


def _iq3_xxs(blocks: Array) -> Floats:
    words = blocks["words"]
    points = grids.IQ3_XXS.points[blocks["qs"]].reshape(len(blocks), -1)
    scales = _scale(blocks) * (np.float32(0.5) + (words >> 28).astype(np.float32)) * np.float32(0.5)
    return _grouped(scales, points * _even_signs(_four_sign_codes(words)))


def _iq3_s(blocks: Array) -> Floats:
    points = _points(grids.IQ3_S, blocks["qs"], _unpacked(blocks["qh"], 1, 1))
    scales = 1 + 2 * _unpacked(blocks["scales"], 4, 1)
    return _grouped(_scale(blocks) * scales.astype(np.float32), points * _signs(blocks["signs"]))


DELTA = np.float32(0.125)  # added to, or subtracted from, every value of a group of IQ1_S and IQ1_M


def _iq1_s(blocks: Array) -> Floats:
    words = blocks["qh"]  # [n, 8]: four times 3 high bits of an index, a scale of 3 bits, the sign of delta
    high = (words[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(len(blocks), -1)
    scales = 2 * (words >> 12 & 7) + 1
    delta = np.where(words >> 15 == 1, -DELTA, DELTA)
    points = _points(grids.IQ1_S, blocks["qs"], high).reshape(len(blocks), 8, 32)
    return _grouped(_scale(blocks) * scales.astype(np.float32), points + delta[..., None])


def _iq1_m(blocks: Array) -> Floats:
    words = blocks["scales"]  # [n, 4]: four times 3 bits of a scale, and 4 bits of the block's float16
    scale = np.bitwise_or.reduce((words >> 12) << np.array([0, 4, 8, 12], np.uint16), axis=1)
    scales = 2 * (words[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7) + 1
    steps = scale.view(np.float16).astype(np.float32)[:, None] * scales.reshape(len(blocks), -1).astype(np.float32)
    nibbles = _unpacked(blocks["qh"], 4, 1)  # [n, 32]: 3 high bits of an index, the sign of delta
    delta = np.where(nibbles >> 3 == 1, -DELTA, DELTA)
    points = _points(grids.IQ1_S, blocks["qs"], nibbles & 7).reshape(len(blocks), 32, 8)
    return _grouped(steps, points + delta[..., None])


# --------------------------------------------------------------------------------------------------------- the table


def _quant(values: Callable[[Array], Floats], *fields: tuple[str, str]) -> Quant:
    return Quant(np.dtype(list(fields)), values)


SCALE, MINIMUM, MINIMA = ("d", "<f2"), ("m", "<f2"), ("dmin", "<f2")

QUANTS = {
    "Q4_0": _quant(_q4_0, SCALE, ("qs", "16u1")),
    "Q4_1": _quant(_q4_1, SCALE, MINIMUM, ("qs", "16u1")),
    "Q5_0": _quant(_q5_0, SCALE, ("qh", "4u1"), ("qs", "16u1")),
    "Q5_1": _quant(_q5_1, SCALE, MINIMUM, ("qh", "4u1"), ("qs", "16u1")),
    "Q8_0": _quant(_q8_0, SCALE, ("qs", "32i1")),
    "Q2_K": _quant(_q2_k, ("scales", "16u1"), ("qs", "64u1"), SCALE, MINIMA),
    "Q3_K": _quant(_q3_k, ("hmask", "32u1"), ("qs", "64u1"), ("scales", "12u1"), SCALE),
    "Q4_K": _quant(_q4_k, SCALE, MINIMA, ("scales", "12u1"), ("qs", "128u1")),
    "Q5_K": _quant(_q5_k, SCALE, MINIMA, ("scales", "12u1"), ("qh", "32u1"), ("qs", "128u1")),
    "Q6_K": _quant(_q6_k, ("ql", "128u1"), ("qh", "64u1"), ("scales", "16i1"), SCALE),
    "IQ2_XXS": _quant(_iq2_xxs, SCALE, ("words", "(8,2)<u4")),
    "IQ2_XS": _quant(_iq2_xs, SCALE, ("qs", "32<u2"), ("scales", "8u1")),
    "IQ3_XXS": _quant(_iq3_xxs, SCALE, ("qs", "64u1"), ("words", "8<u4")),
    "IQ1_S": _quant(_iq1_s, SCALE, ("qs", "32u1"), ("qh", "8<u2")),
    "IQ4_NL": _quant(_iq4_nl, SCALE, ("qs", "16u1")),
    "IQ3_S": _quant(_iq3_s, SCALE, ("qs", "64u1"), ("qh", "8u1"), ("signs", "32u1"), ("scales", "4u1")),
    "IQ2_S": _quant(_iq2_s, SCALE, ("qs", "32u1"), ("signs", "32u1"), ("qh", "8u1"), ("scales", "8u1")),
    "IQ4_XS": _quant(_iq4_xs, SCALE, ("scales_h", "2u1"), ("scales_l", "4u1"), ("qs", "128u1")),
    "IQ1_M": _quant(_iq1_m, ("qs", "32u1"), ("qh", "16u1"), ("scales", "4<u2")),
    "TQ1_0": _quant(_tq1_0, ("qs", "48u1"), ("qh", "4u1"), SCALE),
    "TQ2_0": _quant(_tq2_0, ("qs", "64u1"), SCALE),
    "MXFP4": _quant(_mxfp4, ("e", "u1"), ("qs", "16u1")),
    "NVFP4": _quant(_nvfp4, ("d", "4u1"), ("qs", "32u1")),
}
