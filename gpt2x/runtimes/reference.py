"""GPT-2 in float64 numpy, written as plainly as possible: the reference for every faster runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters import Checkpoint
from converters.arrays import cast_array
from converters.tensors import F64

from .base import Decoder, Ids

Array = NDArray[np.float64]


def tanh_gelu(x: Array, a: float = math.sqrt(2 / math.pi)) -> Any:
    y: Array = 0.5 * x * (1 + np.tanh(a * (x + 0.044715 * x**3)))
    return y


ACTIVATIONS: Mapping[str, Any] = {
    "gelu_new": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "gelu_fast": lambda x: tanh_gelu(x, 0.7978845608),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


class Reference:
    """A checkpoint as a function from ids (T,) to logits (T, V), in float64 and without a cache."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = checkpoint.config
        self.p = {name: cast_array(t.read(), t.dtype, F64, name) for name, t in checkpoint.tensors.items()}

    def __call__(self, ids: Sequence[int]) -> Any:
        c, p = self.config, self.p
        x = p["wte.weight"][list(ids)] + p["wpe.weight"][: len(ids)]  # (T, C)
        for i in range(c.n_layer):
            x = x + self._attention(self._norm(x, f"h.{i}.ln_1"), i)
            hidden = self._linear(self._norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")  # (T, F)
            x = x + self._linear(ACTIVATIONS[c.activation_function](hidden), f"h.{i}.mlp.c_proj")
        return self._norm(x, "ln_f") @ p.get("lm_head.weight", p["wte.weight"]).T  # (T, V)

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
