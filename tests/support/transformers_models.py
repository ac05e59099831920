"""Small GPT-2s of transformers, and the comparison of their logits with those of a checkpoint that gpt2x reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from converters import Checkpoint
from gpt2x.load import model_of

SIZES = {"vocab_size": 40, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 2}
IDS = torch.arange(32).view(2, 16)


def their_config(**changes: Any) -> GPT2Config:
    return GPT2Config(**{**SIZES, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **changes})


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter a random value, so that each one changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.3, generator=generator)


def language_model(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(their_config(**changes)).eval()
    randomize(model, seed)
    return model


def under(prefix: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors with a prefix before each name."""
    return {prefix + name: tensor for name, tensor in state.items()}


def save(state: Mapping[str, Any], folder: Path, model: GPT2LMHeadModel, name: str = "pytorch_model.bin") -> Path:
    """A file of PyTorch's and the configuration beside it."""
    model.config.save_pretrained(folder)
    torch.save(dict(state), folder / name)
    return folder / name


def assert_same_logits(checkpoint: Checkpoint, model: GPT2LMHeadModel) -> None:
    with torch.no_grad():
        theirs = model(IDS).logits
        ours = model_of(checkpoint)(IDS)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
