"""GPT-2 in float64 numpy, written as plainly as possible: the reference for every faster runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters import Checkpoint, LazyTensor
from converters.arrays import cast_array
from converters.tensors import F64

from ..task_heads import HeadPart, body_of, heads_of
from ..tasks import LOGITS
from .base import Decoder, Ids
from .task_model import Outputs, TaskModel

Array = NDArray[np.float64]


def tanh_gelu(x: Array, a: float = math.sqrt(2 / math.pi)) -> Any:
    y: Array = 0.5 * x * (1 + np.tanh(a * (x + 0.044715 * x**3)))
    return y


def exact_gelu(x: Array) -> Any:
    y: Array = 0.5 * x * (1 + erf(x / math.sqrt(2)))
    return y


def sigmoid(x: Array) -> Any:
    y: Array = 1 / (1 + np.exp(-x))
    return y


def softplus(x: Array) -> Any:
    y: Array = np.logaddexp(0, x)
    return y


erf = np.vectorize(math.erf)
ACTIVATIONS: Mapping[str, Any] = {
    "gelu_new": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "gelu_fast": lambda x: tanh_gelu(x, 0.7978845608),
    "gelu": exact_gelu,
    "gelu_10": lambda x: np.clip(exact_gelu(x), -10, 10),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "laplace": lambda x: 0.5 * (1 + erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "linear": lambda x: x,
    "mish": lambda x: x * np.tanh(softplus(x)),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "relu6": lambda x: np.clip(x, 0, 6),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "sqrtsoftplus": lambda x: np.sqrt(softplus(x)),
    "tanh": np.tanh,
}


class Reference:
    """A checkpoint as a function from ids (T,) to logits (T, V), in float64 and without a cache."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = checkpoint.config
        self.p = {name: cast_array(t.read(), t.dtype, F64, name) for name, t in checkpoint.tensors.items()}

    def __call__(self, ids: Sequence[int]) -> Any:
        return self.hidden(ids) @ self.p.get("lm_head.weight", self.p["wte.weight"]).T  # (T, V)

    def hidden(self, ids: Sequence[int]) -> Any:
        """The final hidden states, (T, C)."""
        c, p = self.config, self.p
        x = p["wte.weight"][list(ids)] + p["wpe.weight"][: len(ids)]  # (T, C)
        for i in range(c.n_layer):
            x = x + self._attention(self._norm(x, f"h.{i}.ln_1"), i)
            hidden = self._linear(self._norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")  # (T, F)
            x = x + self._linear(ACTIVATIONS[c.activation_function](hidden), f"h.{i}.mlp.c_proj")
        return self._norm(x, "ln_f")

    def _attention(self, x: Array, layer: int) -> Any:
        c, (T, C) = self.config, x.shape
        qkv = self._linear(x, f"h.{layer}.attn.c_attn").reshape(T, 3, c.n_head, C // c.n_head)
        q, k, v = qkv.transpose(1, 2, 0, 3)  # (H, T, D) each
        scores = q @ k.transpose(0, 2, 1) * self._scale(layer)  # (H, T, T)
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = (weights / weights.sum(-1, keepdims=True)) @ v  # (H, T, D)
        return self._linear(y.transpose(1, 0, 2).reshape(T, C), f"h.{layer}.attn.c_proj")

    def _scale(self, layer: int) -> float:
        scale = 1.0
        if self.config.scale_attn_weights:
            scale = self.config.head_dim**-0.5
        if self.config.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        return scale

    def _linear(self, x: Array, name: str) -> Any:
        return x @ self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def _norm(self, x: Array, name: str) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.config.layer_norm_epsilon)
        return normal * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]


class ReferenceDecoder(Decoder):
    """The reference as a runtime, for rows without padding. Each step computes the whole rows again."""

    runtime = "gpt2x's reference in float64"
    can_truncate = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.reference = Reference(checkpoint)
        self.config = checkpoint.config

    def run(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Any, Any]:
        """As ``Decoder.run``, with logits in float64. The cache is the array of the tokens so far (B, P)."""
        ids = input_ids if cache is None else np.concatenate((cache, input_ids), 1)
        logits = np.stack([self.reference(row.tolist()) for row in ids])
        return logits[:, -input_ids.shape[1] :], ids

    def truncate(self, cache: Any, length: int) -> Any:
        """As ``Decoder.truncate``."""
        return cache[:, :length]


class ReferenceTask(TaskModel):
    """The reference with the head of a task, for rows without padding.

    Raises:
        CheckpointError: if the checkpoint does not have the head.
    """

    runtime = ReferenceDecoder.runtime

    def __init__(self, checkpoint: Checkpoint, task: str) -> None:
        heads = heads_of(checkpoint, task)
        self.task = task
        self.config = checkpoint.config
        self.labels = heads.labels
        self.reference = Reference(body_of(checkpoint))
        self.head = heads.parts.get(LOGITS)

    def run(self, input_ids: Ids, attention_mask: Ids | None = None) -> Outputs:
        """As ``TaskModel.run``, in float64."""
        assert attention_mask is None or attention_mask.all()
        states = np.stack([self.reference.hidden(row) for row in input_ids.tolist()])  # (B, T, C)
        if self.head is None:
            means, ends = states.mean(1), states[:, -1]
            return {"last_hidden_state": states, "mean_embedding": means, "last_token_embedding": ends}
        logits = apply_head(self.head, states)  # (B, T, N)
        if self.task == "token-classification":
            return {LOGITS: logits}
        return {LOGITS: np.stack([row[self._last(ids)] for row, ids in zip(logits, input_ids, strict=True)])}

    def _last(self, ids: Ids) -> int:
        """The place of the last token that is not padding; 0 if there is none."""
        if self.config.pad_token_id is None:
            return -1
        places = np.flatnonzero(ids != self.config.pad_token_id)
        return int(places[-1]) if len(places) else 0


def apply_head(head: HeadPart, x: NDArray[Any]) -> Array:
    """A head on hidden states (..., C): (..., N), in float64."""
    y: Array = x.astype(np.float64)
    for i, layer in enumerate(head.layers):
        if i:
            y = np.maximum(y, 0)
        y = y @ _float64(layer.weight, layer.name).T
        if layer.bias is not None:
            y = y + _float64(layer.bias, layer.name)
    return np.tanh(y) if head.activation == "tanh" else y


def _float64(tensor: LazyTensor, name: str) -> Array:
    return cast_array(tensor.read(), tensor.dtype, F64, name)
