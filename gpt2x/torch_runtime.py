"""A torch GPT2 as a step of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .generate import Ids, Logits
from .model import GPT2


class TorchDecoder:
    """A ``GPT2`` for the decode loop of ``gpt2x.generate``. The model is put into eval mode."""

    def __init__(self, model: GPT2) -> None:
        self.model = model.eval()
        self.n_ctx = model.config.n_ctx
        self.n_vocab = model.config.n_vocab

    @torch.inference_mode()
    def step(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """As ``Decoder.step``."""
        mask = None if attention_mask is None else self._tensor(attention_mask)
        x, cache = self.model.hidden(self._tensor(input_ids), mask, self._tensor(position_ids), cache)
        logits = self.model.logits(x[:, -1])  # (B, V)
        return logits.float().cpu().numpy(), cache

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Logits:
        """The logits after every token of one sequence: (T,) -> (T, V)."""
        x, _ = self.model.hidden(torch.tensor([list(ids)], device=self.model.wte.weight.device))
        return self.model.logits(x)[0].float().cpu().numpy()

    def _tensor(self, array: Ids) -> Tensor:
        return torch.from_numpy(array).to(self.model.wte.weight.device)
