"""transformers' GPT-2 as a runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from converters import Checkpoint, GPT2Config

from .base import Array


class Uncached:
    """A function from ids to logits as a subject that computes everything anew at each step, for one row."""

    def __init__(self, logits: Callable[[Sequence[int]], Array], config: GPT2Config) -> None:
        self.logits, self.config, self.n_ctx, self.n_vocab = logits, config, config.n_ctx, config.n_vocab
        self.runtime = "gpt2x's reference in float64"

    def run(self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any) -> tuple[Any, Any]:
        """As ``Subject.run``."""
        ids = [*(cache or []), *input_ids[0].tolist()]
        return np.asarray(self.logits(ids))[None, -input_ids.shape[1] :], ids

    def step(self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any) -> tuple[Any, Any]:
        """As ``Decoder.step``."""
        logits, cache = self.run(input_ids, attention_mask, position_ids, cache)
        return logits[:, -1], cache


class Transformers:
    """transformers' ``GPT2LMHeadModel`` with the weights of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        import torch
        import transformers
        from transformers import GPT2Config, GPT2LMHeadModel

        from converters.config import to_hf

        from ..load import state_of

        config = GPT2Config(
            **{k: v for k, v in to_hf(checkpoint.config).items() if k not in ("architectures", "model_type", "n_ctx")}
        )
        config._attn_implementation = "eager"
        with torch.device("meta"):
            self.model = GPT2LMHeadModel(config)
        state = {
            name if name.startswith("lm_head") else f"transformer.{name}": t.float()
            for name, t in state_of(checkpoint).items()
        }
        state.setdefault("lm_head.weight", state["transformer.wte.weight"])
        self.model.load_state_dict(state, assign=True, strict=True)
        self.model.tie_weights()
        self.model.eval()
        self.runtime = f"transformers {transformers.__version__}, in torch {torch.__version__}"
        self.config = checkpoint.config
        self.n_ctx, self.n_vocab = checkpoint.config.n_ctx, checkpoint.config.n_vocab

    def run(self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any) -> tuple[Any, Any]:
        """As ``Subject.run``."""
        import torch

        mask = None if attention_mask is None else torch.from_numpy(attention_mask)
        with torch.inference_mode():
            out = self.model(
                torch.from_numpy(input_ids),
                attention_mask=mask,
                position_ids=torch.from_numpy(position_ids),
                past_key_values=cache,
                use_cache=True,
            )
        return out.logits.numpy(), out.past_key_values

    def step(self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any) -> tuple[Any, Any]:
        """As ``Decoder.step``."""
        logits, cache = self.run(input_ids, attention_mask, position_ids, cache)
        return logits[:, -1], cache
