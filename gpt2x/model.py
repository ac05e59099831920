"""GPT-2, from scratch. Read it top to bottom: the leaves first, the model last. No input or output here.

Shapes in comments: B batch, T new tokens, P tokens in the cache, S = P + T, C width, H heads, D = C / H, F feed-forward
width, V vocabulary. Weights are kept as OpenAI published them, ``[in, out]``, and named as Hugging Face names them,
so the state dict *is* the canonical form of a checkpoint (``converters.spec``).

Sources: "Language Models are Unsupervised Multitask Learners" (2019); OpenAI's ``gpt-2/src/model.py``.
"""

from __future__ import annotations

import math

# TorchScript reads typing's forms, and not list[...] or X | None.
from typing import Any, List, Optional, Tuple, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from converters.spec import GPT2Config

# GPT-2 small, as published.
VOCAB_SIZE = 50257
EMBED_DIM = 768
NUM_LAYERS = 12
NUM_HEADS = 12
FFN_DIM = 3072
MAX_LEN = 1024
DROP_RATE = 0.1


class GeluFast(nn.Module):
    """``gelu_fast`` of transformers: the tanh approximation with rounded constants."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


class QuickGelu(nn.Module):
    """``quick_gelu`` of transformers."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Laplace(nn.Module):
    """``laplace`` of transformers: a normal distribution function, with rounded constants."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


class Square(nn.Module):
    """The square of each number."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Root(nn.Module):
    """The square root of each number."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(x)


def activation(name: str) -> nn.Module:
    """The activation of a value of ``activation_function``. Source: ACT2FN in ``activations.py`` of transformers."""
    table: dict[str, nn.Module] = {
        "gelu_new": nn.GELU(approximate="tanh"),
        "gelu_pytorch_tanh": nn.GELU(approximate="tanh"),
        "gelu": nn.GELU(),
        "gelu_fast": GeluFast(),
        "gelu_10": nn.Sequential(nn.GELU(), nn.Hardtanh(-10.0, 10.0)),
        "hardswish": nn.Hardswish(),
        "laplace": Laplace(),
        "leaky_relu": nn.LeakyReLU(),
        "linear": nn.Identity(),
        "mish": nn.Mish(),
        "quick_gelu": QuickGelu(),
        "relu": nn.ReLU(),
        "relu2": nn.Sequential(nn.ReLU(), Square()),
        "relu6": nn.ReLU6(),
        "sigmoid": nn.Sigmoid(),
        "silu": nn.SiLU(),
        "sqrtsoftplus": nn.Sequential(nn.Softplus(), Root()),
        "tanh": nn.Tanh(),
    }
    return table[name]


class Table(nn.Module):
    """An embedding, which also serves as an untied ``lm_head``. The model initializes it."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Projection(nn.Module):
    """``x @ weight + bias``, with ``weight`` stored as ``[in, out]``."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Optional[Tuple[Tensor, Tensor]],
    mask: Optional[Tensor],
    n_head: int,
    scale: float,
    drop: float,
) -> Tuple[Tensor, Tuple[Tensor, Tensor]]:
    """Scaled dot-product attention over the cache and the new tokens. The ONNX export replaces it.

    Args:
        q, k, v: (B, T, C) each; q may hold the last token only.
        past: keys and values (B, H, P, D) of earlier tokens.
        mask: (B, 1, T, S) or (T, S), true where a token may attend; None for a plain causal mask.

    Returns:
        The output (B, T, C), with one row for each query, and the keys and values (B, H, S, D) of all tokens.
    """
    B, T, C = q.shape
    q = q.view(B, -1, n_head, C // n_head).transpose(1, 2)  # (B, H, T, D)
    k = k.view(B, -1, n_head, C // n_head).transpose(1, 2)
    v = v.view(B, -1, n_head, C // n_head).transpose(1, 2)
    if past is not None:
        k = torch.cat((past[0], k), dim=2)  # (B, H, S, D)
        v = torch.cat((past[1], v), dim=2)
    # A single token attends to everything before it. torch's own causal mask would let it see the first slot only.
    causal = mask is None and T > 1
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, is_causal=causal, scale=scale)
    return y.transpose(1, 2).reshape(B, T, C), (k, v)


class Attention(nn.Module):
    """Multi-head causal self-attention over the cache and the new tokens."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.c_attn = Projection(config.n_embd, 3 * config.n_embd)
        self.c_proj = Projection(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.n_head = config.n_head
        self.drop = config.attn_pdrop
        self.upcast = config.reorder_and_upcast_attn
        scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        self.scale = scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale

    def forward(
        self, x: Tensor, mask: Optional[Tensor], past: Optional[Tuple[Tensor, Tensor]], last: bool
    ) -> Tuple[Tensor, Tuple[Tensor, Tensor]]:
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # (B, T, C) each
        if last:
            q = q.narrow(1, -1, 1)  # (B, 1, C)
            mask = mask.narrow(-2, -1, 1) if mask is not None else None
        if self.upcast:  # the cache is then float32, too
            q, k, v = q.float(), k.float(), v.float()
        drop = self.drop if self.training else 0.0
        y, present = attention(q, k, v, past, mask, self.n_head, self.scale, drop)
        return self.resid_dropout(self.c_proj(y.to(x.dtype))), present


class MLP(nn.Module):
    """The feed-forward network."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Projection(config.n_embd, config.n_inner)
        self.act = activation(config.activation_function)
        self.c_proj = Projection(config.n_inner, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.c_fc(x))  # (B, T, F)
        y: Tensor = self.dropout(self.c_proj(x))  # (B, T, C)
        return y


class Block(nn.Module):
    """A pre-norm transformer block: attention and feed-forward, each on a residual."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, mask: Optional[Tensor], past: Optional[Tuple[Tensor, Tensor]], last: bool
    ) -> Tuple[Tensor, Tuple[Tensor, Tensor]]:
        y, present = self.attn(self.ln_1(x), mask, past, last)
        x = (x.narrow(1, -1, 1) if last else x) + y
        x = x + self.mlp(self.ln_2(x))
        return x, present


def sizes_to_config(
    vocab_size: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    ffn_dim: int,
    max_len: int,
    drop_rate: float = DROP_RATE,
    **switches: Any,
) -> GPT2Config:
    """The configuration of a ``GPT2`` with these arguments."""
    rates = {"resid_pdrop": drop_rate, "embd_pdrop": drop_rate, "attn_pdrop": drop_rate}
    return GPT2Config(
        n_vocab=vocab_size,
        n_embd=embed_dim,
        n_layer=num_layers,
        n_head=num_heads,
        n_inner=ffn_dim,
        n_ctx=max_len,
        **{**rates, **switches},
    )


class GPT2(nn.Module):
    """The GPT-2 language model: ``GPT2(config)``, or ``GPT2(50257, 768, 12, 12, 3072, 1024, 0.1)``.

    Args:
        config: a ``GPT2Config``, in place of all other arguments.
        vocab_size: rows of the token embedding.
        embed_dim: width of the residual stream.
        num_layers: blocks.
        num_heads: attention heads; must divide ``embed_dim``.
        ffn_dim: width inside the feed-forward networks.
        max_len: context length in tokens (rows of the position embedding).
        drop_rate: dropout after the embeddings, in the attention and on each residual.
        switches: any other field of ``GPT2Config``, such as ``activation_function="gelu"``.

    Raises:
        ConfigError: if the sizes do not fit together.
    """

    @overload
    def __init__(self, config: GPT2Config, /) -> None: ...
    @overload
    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        max_len: int,
        drop_rate: float = ...,
        **switches: Any,
    ) -> None: ...
    def __init__(self, *sizes: Any, **named: Any) -> None:
        super().__init__()
        if len(sizes) == 1 and isinstance(sizes[0], GPT2Config) and not named:
            config = sizes[0]
        else:
            config = sizes_to_config(*sizes, **named)
        self.config = config
        self.n_ctx = config.n_ctx
        self.wte = Table(config.n_vocab, config.n_embd)
        self.wpe = Table(config.n_ctx, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = None if config.tie_word_embeddings else Table(config.n_vocab, config.n_embd)
        # On the meta device, the model waits for the weights of a checkpoint.
        if not self.wte.weight.is_meta:
            self._initialise()

    @classmethod
    def from_config(cls, config: GPT2Config) -> GPT2:
        """The same as ``GPT2(config)``."""
        return cls(config)

    def _initialise(self) -> None:
        # OpenAI's model.py: normal(0.02) for weights, normal(0.01) for positions, zero biases, unit gains. The paper
        # scales the projections that end a residual by 1 / sqrt(number of residual layers).
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name == "wpe.weight":
                nn.init.normal_(parameter, std=std / 2)
            # Each block ends two residuals: attention and feed-forward.
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=std)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        past: Optional[List[Tuple[Tensor, Tensor]]] = None,
    ) -> Tuple[Tensor, List[Tuple[Tensor, Tensor]]]:
        """Run the model on new tokens, with the cache of earlier ones.

        Args:
            input_ids: int64 (B, T).
            attention_mask: (B, P + T), 0 for a slot with padding; None for no padding. The causal mask follows the slots.
            position_ids: int64 (B, T), each below ``max_len``; by default the number of tokens before each.
            past: the cache that an earlier call returned: one (key, value) for each layer, each (B, H, P, D).

        Returns:
            The logits (B, T, V), and the cache of P + T slots.

        Raises:
            ValueError: if the tokens do not fit into the context.
        """
        x, present = self.hidden(input_ids, attention_mask, position_ids, past)
        return self.logits(x), present

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        past: Optional[List[Tuple[Tensor, Tensor]]] = None,
        last: bool = False,
    ) -> Tuple[Tensor, List[Tuple[Tensor, Tensor]]]:
        """As ``forward``, but returns the final hidden states (B, T, C) instead of the logits.

        With ``last``, only those of the last token, (B, 1, C): the last block computes no others.
        """
        T = input_ids.shape[1]
        P = past[0][0].shape[2] if past is not None else 0
        if position_ids is None:
            if P + T > self.n_ctx:
                raise ValueError(f"{P} + {T} tokens do not fit into the context of {self.n_ctx}")
            position_ids = self._positions(attention_mask, P, T, input_ids)
        mask = self._mask(attention_mask, P, T, input_ids)
        x = self.drop(self.wte(input_ids) + self.wpe(position_ids))  # (B, T, C)
        present: List[Tuple[Tensor, Tensor]] = []
        for i, block in enumerate(self.h):
            x, kv = block(x, mask, past[i] if past is not None else None, last and i + 1 == len(self.h))
            present.append(kv)
        return self.ln_f(x), present

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V)."""
        return F.linear(x, self.wte.weight if self.lm_head is None else self.lm_head.weight)

    def _positions(self, attention_mask: Optional[Tensor], P: int, T: int, like: Tensor) -> Tensor:
        if attention_mask is None:
            return torch.arange(P, P + T, device=like.device).unsqueeze(0)  # (1, T)
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, P:]  # (B, T)

    def _mask(self, attention_mask: Optional[Tensor], P: int, T: int, like: Tensor) -> Optional[Tensor]:
        """The slots that each new token may attend to, (B, 1, T, S) or (T, S); None for a plain causal mask."""
        if attention_mask is None and (P == 0 or T == 1):
            return None
        query = torch.arange(P, P + T, device=like.device).unsqueeze(1)  # (T, 1)
        key = torch.arange(P + T, device=like.device).unsqueeze(0)  # (1, S)
        mask = key <= query  # (T, S)
        if attention_mask is not None:
            # A padding slot attends to itself: a softmax over no slot would be NaN.
            mask = mask & ((attention_mask != 0).unsqueeze(1).unsqueeze(1) | (key == query))  # (B, 1, T, S)
        return mask
