"""Write a GPT-2 in Hugging Face's layout as a GGUF file for llama.cpp, with the ``gguf`` package. All matrices have the
requested type; positions, biases and norms are float32. The file has no vocabulary, so llama.cpp takes and returns token ids.

    python benchmarks/to_gguf.py gpt2-hf/ gpt2-q8_0.gguf Q8_0
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file

NAMES = {
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.argument("kind")
def main(source: Path, target: Path, kind: str) -> None:
    """Write SOURCE, a directory, as the GGUF file TARGET. KIND is a type of GGUF, such as F32 or Q8_0."""
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    writer = gguf.GGUFWriter(target, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, array in tensors.items():
        name = name.removeprefix("transformer.")
        prefix = ""
        if name.startswith("h."):
            _, layer, name = name.split(".", 2)
            prefix = f"blk.{layer}."
        known = next(ours for ours in NAMES if name.startswith(ours))
        matrix = array.ndim == 2 and name != "wpe.weight"
        array = array.astype(np.float32)
        if prefix and array.ndim == 2:
            array = np.ascontiguousarray(array.T)  # llama.cpp stores [out, in]
        called = prefix + NAMES[known] + name.removeprefix(known)
        stored = Type[kind] if matrix else Type.F32
        writer.add_tensor(called, gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
