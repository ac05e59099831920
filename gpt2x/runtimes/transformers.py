"""transformers' GPT-2 as a runtime."""

from __future__ import annotations

from typing import Any

from converters import Checkpoint

from .base import Decoder, Ids

# Keys of config.json that transformers' GPT2Config does not take as arguments.
NOT_ARGUMENTS = ("architectures", "model_type", "n_ctx")


class Transformers(Decoder):
    """transformers' ``GPT2LMHeadModel`` with the weights of a checkpoint."""

    can_truncate = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        import torch
        import transformers

        self.model = _language_model(checkpoint)
        self.runtime = f"transformers {transformers.__version__}, in torch {torch.__version__}"
        self.config = checkpoint.config

    def run(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Any, Any]:
        """As ``Decoder.run``. The cache is transformers' own."""
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

    def reorder(self, cache: Any, rows: Ids) -> Any:
        """As ``Decoder.reorder``."""
        import torch

        cache.reorder_cache(torch.from_numpy(rows))
        return cache

    def truncate(self, cache: Any, length: int) -> Any:
        """As ``Decoder.truncate``, in the cache itself."""
        cache.crop(length - cache.get_seq_length())  # a negative number removes so many tokens
        return cache


def _language_model(checkpoint: Checkpoint) -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from converters.config import to_hf

    values = to_hf(checkpoint.config)
    config = GPT2Config(**{key: value for key, value in values.items() if key not in NOT_ARGUMENTS})
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    model.load_state_dict(_state(checkpoint), assign=True, strict=True)
    model.tie_weights()
    return model.eval()


def _state(checkpoint: Checkpoint) -> dict[str, Any]:
    """transformers' names -> float32 tensors."""
    from ..load import state_of

    state = {}
    for name, tensor in state_of(checkpoint).items():
        theirs = name if name.startswith("lm_head") else f"transformer.{name}"
        state[theirs] = tensor.float()
    state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    return state
