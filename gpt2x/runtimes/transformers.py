"""transformers' GPT-2 as a runtime."""

from __future__ import annotations

from typing import Any

from converters import Checkpoint

from ..task_heads import TaskHeads, body_of, heads_of
from ..tasks import LOGITS, TASKS
from .base import Decoder, Ids
from .task_model import Outputs, TaskModel

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


class TransformersTask(TaskModel):
    """transformers' class for a task with the weights of a checkpoint, for one row without padding at a time.

    Raises:
        CheckpointError: if the checkpoint does not have the head of the task.
    """

    def __init__(self, checkpoint: Checkpoint, task: str) -> None:
        import torch
        import transformers

        heads = heads_of(checkpoint, task)
        self.task = task
        self.config = checkpoint.config
        self.labels = heads.labels
        self.model = _task_model(body_of(checkpoint), task, heads)
        self.runtime = (
            f"{TASKS[task].architecture} of transformers {transformers.__version__}, in torch {torch.__version__}"
        )

    def run(self, input_ids: Ids, attention_mask: Ids | None = None) -> Outputs:
        """As ``TaskModel.run``."""
        import torch

        assert len(input_ids) == 1 and (attention_mask is None or attention_mask.all())
        with torch.inference_mode():
            ids = torch.from_numpy(input_ids)
            # Without a mask, transformers warns that tokens with the id of padding may be padding.
            out = self.model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
        if self.task != "feature-extraction":
            return {LOGITS: out.logits.numpy()}
        states = out.last_hidden_state.numpy()
        return {"last_hidden_state": states, "mean_embedding": states.mean(1), "last_token_embedding": states[:, -1]}


def _task_model(checkpoint: Checkpoint, task: str, heads: TaskHeads) -> Any:
    import torch
    import transformers

    from ..load import state_of, tensor_of

    labels = heads.labels.to_hf() if heads.labels else {}
    config = _config_of(checkpoint, **labels)
    with torch.device("meta"):
        model = getattr(transformers, TASKS[task].architecture)(config)
    prefix = "" if task == "feature-extraction" else "transformer."
    state = {f"{prefix}{name}": tensor.float() for name, tensor in state_of(checkpoint).items()}
    state |= {name: tensor_of(tensor).float() for name, tensor in heads.tensors.items()}
    model.load_state_dict(state, assign=True, strict=True)
    return model.eval()


def _config_of(checkpoint: Checkpoint, **more: Any) -> Any:
    """transformers' own configuration."""
    from transformers import GPT2Config

    from converters.config import to_hf

    values = to_hf(checkpoint.config)
    config = GPT2Config(**{key: value for key, value in values.items() if key not in NOT_ARGUMENTS}, **more)
    config._attn_implementation = "eager"
    return config


def _language_model(checkpoint: Checkpoint) -> Any:
    import torch
    from transformers import GPT2LMHeadModel

    config = _config_of(checkpoint)
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
