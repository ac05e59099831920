"""The modules that are exported. For text generation: tokens, attention mask, positions and KV cache in; logits and KV cache out."""

from __future__ import annotations

from collections.abc import Mapping

# TorchScript reads typing's forms, and not list[...] or X | None.
from typing import Dict, List, Tuple

import torch
from torch import Tensor, nn

from converters.spec import GPT2Config

from ..model import GPT2
from ..task_heads import TaskHeads
from ..task_models import extra_outputs, task_module
from ..tasks import GENERATION, LOGITS


class Interface(nn.Module):
    """A ``GPT2`` whose inputs are all required.

    ``forward(input_ids, attention_mask, position_ids, past) -> (logits, present)``. The first three are int64 (B, T),
    (B, P + T) and (B, T). ``past`` has a (key, value) for each layer, (B, H, P, D) each; P is 0 at first. The logits are
    (B, T, V), or (B, 1, V) with ``last``.
    """

    def __init__(self, model: GPT2, last: bool = False) -> None:
        super().__init__()
        self.model = model
        self.last = last

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: List[Tuple[Tensor, Tensor]]
    ) -> Tuple[Tensor, List[Tuple[Tensor, Tensor]]]:
        x, present = self.model.hidden(input_ids, attention_mask, position_ids, past, self.last)
        return self.model.logits(x), present


class InterfaceWithOutputs(nn.Module):
    """An ``Interface`` that also returns a dictionary of further outputs, which are computed from the final hidden states.

    Args:
        outputs: name -> the module that computes it.
    """

    def __init__(self, model: GPT2, outputs: Mapping[str, nn.Module], last: bool = False) -> None:
        super().__init__()
        self.model = model
        self.names = list(outputs)
        self.outputs = nn.ModuleList(outputs.values())
        self.last = last

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: List[Tuple[Tensor, Tensor]]
    ) -> Tuple[Tensor, List[Tuple[Tensor, Tensor]], Dict[str, Tensor]]:
        x, present = self.model.hidden(input_ids, attention_mask, position_ids, past, self.last)
        found: Dict[str, Tensor] = {}
        for i, module in enumerate(self.outputs):
            found[self.names[i]] = module(x)
        return self.model.logits(x), present, found


def exported_module(
    model: GPT2, task: str, outputs: tuple[str, ...], heads: TaskHeads, *, last: bool = False
) -> nn.Module:
    """The module that is exported, around a model.

    Args:
        task: one of ``gpt2x.tasks.TASKS``.
        outputs: of text generation.
        heads: those that the task and its outputs need.
        last: compute the logits of the last position only.
    """
    if task != GENERATION:
        return task_module(model, task, heads)
    if outputs == (LOGITS,):
        return Interface(model, last)
    return InterfaceWithOutputs(model, extra_outputs(outputs, heads), last)


# The sizes differ, and none is 0 or 1, which torch.export takes for constants.
def example_inputs(config: GPT2Config, B: int = 2, T: int = 3, P: int = 4) -> tuple[object, ...]:
    """Inputs of the right shapes and dtypes, on torch's default device."""
    size = (B, config.n_head, P, config.head_dim)
    past = [(torch.zeros(size), torch.zeros(size)) for _ in range(config.n_layer)]
    tokens = torch.zeros(B, T, dtype=torch.int64)
    return tokens, torch.ones(B, P + T, dtype=torch.int64), tokens.clone(), past


def dynamic_shapes(config: GPT2Config) -> tuple[object, ...]:
    """The dynamic dimensions of the inputs, for ``torch.export``: the batch and all lengths."""
    dynamic = torch.export.Dim.DYNAMIC
    tokens, cache = {0: dynamic, 1: dynamic}, {0: dynamic, 2: dynamic}
    return tokens, tokens, tokens, [(cache, cache)] * config.n_layer


def task_example_inputs(B: int = 2, T: int = 3) -> tuple[object, ...]:
    """The same for a task other than text generation: token ids and attention mask."""
    return torch.zeros(B, T, dtype=torch.int64), torch.ones(B, T, dtype=torch.int64)


def task_dynamic_shapes() -> tuple[object, ...]:
    """The same for a task other than text generation."""
    tokens = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    return tokens, tokens
