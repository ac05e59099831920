"""A LoRA adapter with random factors, in the files that PEFT writes. Those of PEFT itself are in tests/fixtures/adapters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from converters import Checkpoint

RANK, ALPHA = 4, 8


def write_adapter(folder: Path, base: Checkpoint, size: float = 0.05, rank: int = RANK) -> Path:
    """An adapter of every ``c_attn``, in the directory ``folder``."""
    folder.mkdir()
    rng = np.random.default_rng(7)
    tensors = {}
    for i in range(base.config.n_layer):
        name = f"base_model.model.transformer.h.{i}.attn.c_attn"
        inputs, outputs = base.tensors[f"h.{i}.attn.c_attn.weight"].shape
        tensors[f"{name}.lora_A.weight"] = rng.normal(size=(rank, inputs)).astype(np.float32) * size
        tensors[f"{name}.lora_B.weight"] = rng.normal(size=(outputs, rank)).astype(np.float32) * size
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "me/shakespeare"}))
    return folder
