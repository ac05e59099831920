"""Quantization in blocks of integers that share a scale, for ONNX's ``DequantizeLinear``.

A matrix (K, N) is split along K, the axis that a product sums over, into blocks of B values; a shorter last block has a
scale of its own. There is no zero point: 8 bits are -127 to 127, 4 bits -8 to 7. Each block gets the scale with the
smallest squared error, of a few near the one that just covers its largest value.

With a Hessian, rounding errors are compensated by later values of the same column: GPTQ ("GPTQ: Accurate Post-Training
Quantization for Generative Pre-trained Transformers", 2023).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

RANGES = {8: (-127, 127), 4: (-8, 7)}
TRIED = {
    8: (1.0, 0.99, 0.98, 0.97),
    4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75),
}  # scales to try, relative to the covering one
PAIR = 128  # the largest sum of two adjacent values: 255 times it fits into int16
SLICE = 512  # columns at a time, so that they fit into a processor's cache
LAZY = 128  # rows whose errors are compensated among themselves first, and then in all later rows at once
# The default of the authors' own code (percdamp).
DAMPING = 0.01  # of the Hessian's mean diagonal, added to it


class Blocks(NamedTuple):
    """A quantized matrix: integers int8 (K, N), and scales float32 (ceil(K / B), N)."""

    q: NDArray[np.int8]
    scale: NDArray[np.float32]


def quantize(matrix: Array, bits: int, block: int, hessian: Array | None = None, paired: bool = False) -> Blocks:
    """Quantize a matrix (K, N) of finite values in blocks of ``block`` rows.

    Args:
        bits: 8 or 4.
        hessian: (K, K), the mean of ``x x^T`` over the inputs of the product, for GPTQ; None rounds to nearest.
        paired: keep the sum of rows 2i and 2i + 1 of each column within -128 to 128 (8 bits, blocks of an even number
            of rows). x86 processors without VNNI add two such products with uint8 activations in int16
            (``vpmaddubsw``), which saturates otherwise.
    """
    if hessian is None:
        method = partial(_nearest, paired=paired)
    else:
        method = partial(_compensated, root=_root(hessian), paired=paired)

    def of_slice(start: int) -> Blocks:
        return method(matrix[:, start : start + SLICE].astype(np.float32), bits, block)

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(of_slice, range(0, matrix.shape[1], SLICE)))
    return Blocks(np.concatenate([part.q for part in parts], 1), np.concatenate([part.scale for part in parts], 1))


def dequantize(q: Array, scale: Array, block: int) -> NDArray[np.float32]:
    """The values (K, N) of integers (K, N) with scales (ceil(K / B), N)."""
    result: NDArray[np.float32] = q * np.repeat(scale, block, 0)[: len(q)]
    return result


def _nearest(x: Array, bits: int, block: int, paired: bool) -> Blocks:
    K, N = x.shape
    groups = -(-K // block)
    cut = np.zeros((groups * block, N), np.float32)
    cut[:K] = x
    cut = cut.reshape(groups, block, N)
    scale = np.stack([best_scale(part, bits, paired) for part in cut])  # (G, N)
    q = np.stack([_round(part, s, bits, paired) for part, s in zip(cut, scale, strict=True)])
    return Blocks(q.reshape(-1, N)[:K].astype(np.int8), scale)


def _round(x: Array, scale: Array, bits: int, paired: bool) -> Array:
    """The integers of one block (B, N), as floats."""
    q: Array = np.rint(x / scale).clip(*RANGES[bits])
    if paired:
        # Views: what a sum exceeds is taken from both values alike.
        first, second = q[: len(q) // 2 * 2 : 2], q[1::2]
        excess = first + second
        excess -= excess.clip(-PAIR, PAIR)
        half = np.rint(excess / 2)
        first -= half
        second -= excess - half
    return q


def best_scale(x: Array, bits: int, paired: bool = False) -> NDArray[np.float32]:
    """The scale of each column of one block (B, N) with the smallest squared error; 1 for a column of zeros."""
    low, high = RANGES[bits]
    largest = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]
    covering = np.abs(largest) / high if bits == 8 else largest / low  # 4 bits reach farther below zero
    if paired:
        sums = x[: len(x) // 2 * 2 : 2] + x[1::2]
        covering = np.maximum(covering, np.abs(sums).max(0, initial=0) / PAIR)
    covering = np.minimum(covering, np.finfo(np.float32).max / 128)  # so that dequantizing does not overflow
    covering = np.where(np.abs(covering) < np.finfo(np.float32).tiny, 1, covering).astype(np.float32)
    best, least = covering, np.full(x.shape[1], np.inf, np.float32)
    for share in TRIED[bits]:
        scale = covering * np.float32(share)
        lost = _round(x, scale, bits, paired)
        lost *= scale
        lost -= x
        error = np.einsum("kn,kn->n", lost, lost)
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
    return best


def _root(hessian: Array) -> Array:
    """Upper triangular U with ``U^T U`` the inverse of a Hessian, which is damped to be invertible."""
    h = hessian.astype(np.float64)
    h[np.diag_indices_from(h)] += DAMPING * (float(np.mean(np.diag(h))) or 1.0)
    root: Array = np.linalg.cholesky(np.linalg.inv(h)).T.astype(np.float32)
    return root


def _compensated(x: Array, bits: int, block: int, root: Array, paired: bool) -> Blocks:
    K, N = x.shape
    q, scales = np.empty((K, N), np.int8), []
    low, high = RANGES[bits]
    step = min(block, LAZY)
    for start in range(0, K, step):
        end = min(start + step, K)
        if start % block == 0:
            scale = best_scale(x[start : start + block], bits, paired)
            scales.append(scale)
        lost = np.empty((end - start, N), np.float32)
        for k in range(start, end):
            # Clipping to the range of the pair is compensated by later rows, too.
            other = q[k - 1].astype(np.float32) if paired and k % 2 else 0
            q[k] = np.rint(x[k] / scale).clip(np.maximum(low, -PAIR - other), np.minimum(high, PAIR - other))
            lost[k - start] = (x[k] - q[k] * scale) / root[k, k]
            x[k + 1 : end] -= np.outer(root[k, k + 1 : end], lost[k - start])
        x[end:] -= root[start:end, end:].T @ lost
    return Blocks(q, np.stack(scales))


def pack4(q: Array) -> NDArray[np.uint8]:
    """4-bit integers in ONNX's order: two in a byte, the first in the lower half; an odd last one has its own byte."""
    flat = q.reshape(-1).view(np.uint8) & 15
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return np.asarray(flat[::2] | flat[1::2] << 4, np.uint8)


def unpack4(data: Array, shape: tuple[int, ...]) -> NDArray[np.int8]:
    """The integers (of this shape) that ``pack4`` packed."""
    both = np.stack((data & 15, data >> 4), 1).reshape(-1)[: int(np.prod(shape))]
    numbers: NDArray[np.int8] = (both.astype(np.int8) ^ 8) - np.int8(8)
    return numbers.reshape(shape)
