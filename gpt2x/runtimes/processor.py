"""What this processor is good at, and which of ONNX Runtime's kernels a session takes because of it."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import onnxruntime as ort

# An ONNX model: y = MatMulInteger(a, b); a is uint8 (1, 2), b int8 (2, 1), both 127.
PRODUCT = bytes.fromhex(
    "08043a560a180a01610a0162120179220d4d61744d756c496e74656765721201672a0d0802080110034201624a027f7f"
    "5a130a0161120e0a0c080212080a0208010a02080262130a0179120e0a0c080612080a0208010a02080142040a00100a"
)
TILES_OFF = "ORT_GQA_DISABLE_FLASH_ATTENTION"
"""ONNX Runtime reads it when it makes the kernel of GroupQueryAttention, so once for each session."""
ENVIRONMENT = threading.Lock()


@cache
def saturates() -> bool:
    """Whether ONNX Runtime's products of uint8 and int8 saturate at 16 bits on this processor (x86-64 without VNNI)."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(PRODUCT, options, providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"a": np.full((1, 2), 255, np.uint8)})
    return int(product.item()) != 2 * 255 * 127


@cache
def is_amd() -> bool:
    """Whether the processor is one of AMD's."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            described = file.read(1 << 16)
    except OSError:  # not Linux; on Windows the name ends with the vendor
        described = platform.processor()
    return "AuthenticAMD" in described


def tiles_read_prompts_well() -> bool:
    """Whether ONNX Runtime's tiled attention to a float32 cache reads prompts about as fast as its other kernels do.

    Measured on AMD's Zen 3: decoding was 3 to 17% faster, prompts of 128 tokens as fast, those of 900 took 1 to 3% longer.
    On Intel's Sapphire Rapids, prompts took twice as long. This is a rule and not a measurement at load, because the
    kernels round differently: a text with a seed must not depend on how busy the processor was.
    """
    return is_amd() and saturates()


@contextmanager
def tiles(wanted: bool) -> Iterator[None]:
    """Choose ONNX Runtime's attention, tiled or not, for a session that is made meanwhile.

    With it comes the kernel for one token. The user's own setting of the variable stays.
    """
    with ENVIRONMENT:
        if wanted or TILES_OFF in os.environ:
            yield
            return
        os.environ[TILES_OFF] = "1"
        try:
            yield
        finally:
            del os.environ[TILES_OFF]
