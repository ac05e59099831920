"""Small models of transformers' classes for each task, and rows of unequal lengths to run them on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from transformers_models import language_model, randomize, their_config

PAD = 39
CLASSES = {
    "feature-extraction": "GPT2Model",
    "text-classification": "GPT2ForSequenceClassification",
    "token-classification": "GPT2ForTokenClassification",
}
TASKS = tuple(CLASSES)
LABELS = {0: "negative", 1: "neutral", 2: "positive"}


@functools.cache
def task_model(task: str) -> Any:
    """A model with random weights, whose matrices have whole blocks of 32 weights."""
    ids = {name: i for i, name in LABELS.items()}
    config = their_config(n_embd=64, pad_token_id=PAD, id2label=LABELS, label2id=ids)
    model = getattr(transformers, CLASSES[task])(config).eval()
    randomize(model)
    return model


def rows() -> list[list[int]]:
    """Token ids of unequal lengths, up to the whole context, without padding."""
    random = np.random.default_rng(0)
    return [random.integers(PAD, size=length).tolist() for length in (9, 16, 1, 4)]


def expected(model: Any, row: list[int]) -> dict[str, np.ndarray]:
    """transformers' outputs for one row, by the names of the export."""
    with torch.inference_mode():
        out = model(torch.tensor([row]))
    if "logits" in out:
        return {"logits": out.logits[0].numpy()}
    states = out.last_hidden_state[0].numpy()
    return {"last_hidden_state": states, "mean_embedding": states.mean(0), "last_token_embedding": states[-1]}


def without_padding(task: str, name: str, array: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An output of one row of a padded batch, at its tokens only, if it has one value for each of them."""
    is_per_token = name == "last_hidden_state" or task == "token-classification"
    return array[mask == 1] if is_per_token else array


def assert_close(found: np.ndarray, wanted: np.ndarray, share: float = 1e-5) -> None:
    """Equal within a share of the largest value."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=share * float(np.abs(wanted).max()))


def save_with_value_head(folder: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A language model with trl's value head in a folder: the model, and the head's weight and bias."""
    model = language_model(n_embd=64)
    weight, bias = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([0.5])
    state = {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}
    head = {"v_head.summary.weight": weight, "v_head.summary.bias": bias}
    model.config.save_pretrained(folder)
    named = {f"pretrained_model.transformer.{name}": tensor for name, tensor in state.items()}
    safetensors.torch.save_file({**named, **head}, folder / "model.safetensors")
    return model, weight, bias
