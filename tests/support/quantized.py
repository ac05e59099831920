"""GGUF files with quantized tensors, written by gguf-py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

# Parts of a GPT-2 that are quantized -> their shapes as in the file. Blocks of 256 values fill their rows.
WIDTH, N_VOCAB, N_CTX = 256, 6, 4
MATRICES = {
    "token_embd": (N_VOCAB, WIDTH),
    "blk.0.attn_qkv": (3 * WIDTH, WIDTH),
    "blk.0.attn_output": (WIDTH, WIDTH),
    "blk.0.ffn_up": (WIDTH, WIDTH),
    "blk.0.ffn_down": (WIDTH, WIDTH),
}
VECTORS = ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")


def random_blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bytes, whole blocks of a type, for a tensor of this shape: ``[rows, bytes]``."""
    values, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*shape[:-1], shape[-1] // values * nbytes), dtype=np.uint8)


def write_quantized(path: Path, kinds: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Write a GPT-2 of one layer whose matrices are random blocks of these types. Returns name -> bytes of the matrices."""
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(1)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    written = {}
    for seed, (name, shape) in enumerate(MATRICES.items()):
        blocks = random_blocks(kinds[name], shape, seed)
        written[f"{name}.weight"] = blocks
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType[kinds[name]])
        if name != "token_embd":
            writer.add_tensor(f"{name}.bias", np.zeros(shape[0], np.float32))
    for name in VECTORS:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(WIDTH, np.float32))
    writer.add_tensor("position_embd.weight", np.zeros((N_CTX, WIDTH), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written
