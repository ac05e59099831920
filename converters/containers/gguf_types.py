"""The types of tensors in a GGUF file: their numbers, names, and sizes of blocks.

A quantized type stores a tensor's values in blocks of 32, 64 or 256, each a packed structure (see ``gguf_quants.py``).

Sources: ``enum ggml_type`` in ggml's ``ggml.h``; the ``block_*`` structures in ``ggml-common.h``; ``GGML_QUANT_SIZES`` in
gguf-py's ``constants.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..dtypes import BF16, F16, F32, F64, DType


@dataclass(frozen=True)
class TensorType:
    """How a tensor's values are stored.

    Args:
        number: its number in the file.
        name: ggml's name.
        values: how many values a block has.
        nbytes: how many bytes a block has.
        dtype: the dtype of the values that are read.
    """

    number: int
    name: str
    values: int
    nbytes: int
    dtype: DType = F32

    @property
    def is_quantized(self) -> bool:
        """Whether the values are decoded from blocks; else they are read as they are stored."""
        return self.values > 1


PLAIN = (
    TensorType(0, "F32", 1, 4, F32),
    TensorType(1, "F16", 1, 2, F16),
    TensorType(28, "F64", 1, 8, F64),
    TensorType(30, "BF16", 1, 2, BF16),
)
Q8_0 = TensorType(8, "Q8_0", 32, 34)
QUANTIZED = (
    TensorType(2, "Q4_0", 32, 18),
    TensorType(3, "Q4_1", 32, 20),
    TensorType(6, "Q5_0", 32, 22),
    TensorType(7, "Q5_1", 32, 24),
    Q8_0,
    TensorType(10, "Q2_K", 256, 84),
    TensorType(11, "Q3_K", 256, 110),
    TensorType(12, "Q4_K", 256, 144),
    TensorType(13, "Q5_K", 256, 176),
    TensorType(14, "Q6_K", 256, 210),
    TensorType(16, "IQ2_XXS", 256, 66),
    TensorType(17, "IQ2_XS", 256, 74),
    TensorType(18, "IQ3_XXS", 256, 98),
    TensorType(19, "IQ1_S", 256, 50),
    TensorType(20, "IQ4_NL", 32, 18),
    TensorType(21, "IQ3_S", 256, 110),
    TensorType(22, "IQ2_S", 256, 82),
    TensorType(23, "IQ4_XS", 256, 136),
    TensorType(29, "IQ1_M", 256, 56),
    TensorType(34, "TQ1_0", 256, 54),
    TensorType(35, "TQ2_0", 256, 66),
    TensorType(39, "MXFP4", 32, 17),
    TensorType(40, "NVFP4", 64, 36),
)
TYPES = {entry.number: entry for entry in (*PLAIN, *QUANTIZED)}

# Types that are not read, by name: of activations (Q8_1, Q8_K), of integers, and of files that llama.cpp reads no more.
UNREAD = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 41: "Q1_0",
}  # fmt: skip
