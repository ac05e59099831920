"""GPT-2 with the heads of other tasks, in torch: the reference of their exports, and what TorchScript and ONNX are made of.

Shapes in comments: B batch, T tokens, C width, N labels. Source: ``modeling_gpt2.py`` of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

# TorchScript reads typing's forms, and not list[...] or X | None.
from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from converters import Checkpoint
from converters.heads import Layer

from .load import model_of, tensor_of
from .model import GPT2
from .task_heads import HeadPart, TaskHeads, heads_of
from .tasks import GENERATION

ACTIVATIONS: Dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh}


def positions(attention_mask: Tensor) -> Tensor:
    """The position of each token, (B, T): tokens count from 0, wherever a row is padded."""
    return ((attention_mask != 0).long().cumsum(1) - 1).clamp(min=0)


def last_token(input_ids: Tensor, attention_mask: Tensor, pad_token_id: Optional[int]) -> Tensor:
    """The slot of each row's last token, (B,).

    As transformers does, tokens with the id of padding do not count, even where the mask is 1. A row that has no other
    tokens has its first one.
    """
    T = input_ids.shape[1]
    rank = torch.arange(1, T + 1, device=input_ids.device).unsqueeze(0)  # (1, T)
    if pad_token_id is not None:
        rank = rank * (input_ids != pad_token_id).long()
    # + 1: a token with the padding's id (rank 0) still counts more than a slot that the mask leaves out.
    return ((rank + 1) * (attention_mask != 0).long()).argmax(1)  # the first of several maxima


def at(x: Tensor, slots: Tensor, width: int) -> Tensor:
    """The vectors of (B, T, C) at one slot of each row: (B, C)."""
    return x.gather(1, slots.unsqueeze(1).unsqueeze(2).expand(-1, -1, width)).squeeze(1)


class FeatureExtractor(nn.Module):
    """``forward(input_ids, attention_mask)`` -> the last hidden states (B, T, C), their mean over the tokens of each row (B, C),
    and that of the last token (B, C)."""

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model
        self.width = model.config.n_embd

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        x, _ = self.model.hidden(input_ids, attention_mask, positions(attention_mask))
        x = x.float()
        tokens = (attention_mask != 0).long().unsqueeze(2)  # (B, T, 1)
        mean = (x * tokens).sum(1) / tokens.sum(1).clamp(min=1)
        return x, mean, at(x, last_token(input_ids, attention_mask, None), self.width)


class SequenceClassifier(nn.Module):
    """``forward(input_ids, attention_mask)`` -> the logits of each row's last token, (B, N)."""

    def __init__(self, model: GPT2, head: nn.Sequential) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.width = model.config.n_embd
        self.pad_token_id = model.config.pad_token_id

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x, _ = self.model.hidden(input_ids, attention_mask, positions(attention_mask))
        last = at(x.float(), last_token(input_ids, attention_mask, self.pad_token_id), self.width)
        logits: Tensor = self.head(last)
        return logits


class TokenClassifier(nn.Module):
    """``forward(input_ids, attention_mask)`` -> the logits of each token, (B, T, N)."""

    def __init__(self, model: GPT2, head: nn.Sequential) -> None:
        super().__init__()
        self.model = model
        self.head = head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x, _ = self.model.hidden(input_ids, attention_mask, positions(attention_mask))
        logits: Tensor = self.head(x.float())
        return logits


class Scores(nn.Module):
    """A head with one number for each position: (B, T, C) -> (B, T)."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(x.float())
        return scores.squeeze(2)


def task_module(model: GPT2, task: str, heads: TaskHeads) -> nn.Module:
    """The module of a task other than text generation, around a model."""
    if task == "feature-extraction":
        return FeatureExtractor(model)
    head = sequential(heads.parts["logits"])
    return SequenceClassifier(model, head) if task == "text-classification" else TokenClassifier(model, head)


def task_model(checkpoint: Checkpoint, task: str) -> nn.Module:
    """The module of a task with the weights of a checkpoint, in eval mode.

    Raises:
        CheckpointError: if the checkpoint has no such head.
    """
    assert task != GENERATION
    return task_module(model_of(checkpoint), task, heads_of(checkpoint, task)).eval().requires_grad_(False)


def extra_outputs(outputs: tuple[str, ...], heads: TaskHeads) -> Dict[str, nn.Module]:
    """Output -> the module that computes it from the final hidden states, for outputs other than the logits."""
    modules: Dict[str, nn.Module] = {}
    for name in outputs:
        if name in heads.parts:
            modules[name] = Scores(sequential(heads.parts[name]))
        elif name == "hidden_states":
            modules[name] = nn.Identity()
    return modules


def sequential(part: HeadPart) -> nn.Sequential:
    """A head as a module. On the meta device, it has no values."""
    modules: List[nn.Module] = []
    for layer in part.layers:
        if modules:
            modules.append(nn.ReLU())
        modules.append(_linear(layer))
    if part.activation is not None:
        modules.append(ACTIVATIONS[part.activation]())
    return nn.Sequential(*modules)


def _linear(layer: Layer) -> nn.Linear:
    n_out, n_in = layer.weight.shape
    linear = nn.Linear(n_in, n_out, bias=layer.bias is not None)
    if not linear.weight.is_meta:
        state: Mapping[str, Tensor] = {"weight": tensor_of(layer.weight).float()}
        if layer.bias is not None:
            state = {**state, "bias": tensor_of(layer.bias).float()}
        linear.load_state_dict(state)
    return linear
