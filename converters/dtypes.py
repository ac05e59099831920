"""Dtypes, named as in safetensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """A dtype: its name, numpy's name for the same bytes (little-endian), and the bytes of a value."""

    name: str
    numpy: str
    itemsize: int

    @property
    def is_float(self) -> bool:
        """Whether it is a float, as a parameter must be."""
        return self.name in EXPONENTS

    def __str__(self) -> str:
        return self.name


F64, F32, F16, BF16 = DType("F64", "<f8", 8), DType("F32", "<f4", 4), DType("F16", "<f2", 2), DType("BF16", "<u2", 2)
DTYPES = {
    d.name: d
    for d in (
        F64, F32, F16, BF16, DType("I64", "<i8", 8), DType("I32", "<i4", 4), DType("I16", "<i2", 2), DType("I8", "|i1", 1),
        DType("U64", "<u8", 8), DType("U32", "<u4", 4), DType("U16", "<u2", 2), DType("U8", "|u1", 1), DType("BOOL", "|b1", 1),
    )
}  # fmt: skip
BY_NUMPY = {dtype.numpy: dtype for dtype in DTYPES.values() if dtype is not BF16}  # numpy has no bfloat16

# The names in Python and on the command line -> safetensors' or GGUF's.
NAMES = {"fp64": "F64", "fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}

# The first bytes (sign and leading exponent bits) of NaN, infinity and very large values.
EXPONENTS = {
    "F64": (b"\x7f", b"\xff"),
    "F32": (b"\x7f", b"\xff"),
    "BF16": (b"\x7f", b"\xff"),
    "F16": tuple(bytes([b]) for b in (*range(0x7C, 0x80), *range(0xFC, 0x100))),
}


def whole_items(chunks: Iterator[bytes], itemsize: int) -> Iterator[bytes]:
    """The same bytes, in chunks of whole values."""
    rest = b""
    for chunk in chunks:
        # A value may lie across the border of two chunks.
        data = rest + chunk if rest else chunk
        cut = len(data) - len(data) % itemsize
        rest = data[cut:]
        if cut:
            yield data[:cut]
