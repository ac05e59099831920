"""GPT-2 in float64 numpy, as plainly as it can be written: the yardstick for every faster one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters import Checkpoint
from converters.arrays import cast_array
from converters.tensors import F64

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
        q, k, v = self._linear(x, f"h.{layer}.attn.c_attn").reshape(T, 3, c.n_head, C // c.n_head).transpose(1, 2, 0, 3)
        scale = (c.head_dim**-0.5 if c.scale_attn_weights else 1) / (
            layer + 1 if c.scale_attn_by_inverse_layer_idx else 1
        )
        scores = np.where(np.tri(T, dtype=bool), q @ k.transpose(0, 2, 1) * scale, -np.inf)  # (H, T, T)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = (weights / weights.sum(-1, keepdims=True)) @ v  # (H, T, D)
        return self._linear(y.transpose(1, 0, 2).reshape(T, C), f"h.{layer}.attn.c_proj")

    def _linear(self, x: Array, name: str) -> Any:
        return x @ self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def _norm(self, x: Array, name: str) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.config.layer_norm_epsilon)
        return normal * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]
