"""The configuration and the 16 parameters of a GPT-2.

Sources: the paper "Language Models are Unsupervised Multitask Learners" (2019), OpenAI's ``model.py``, and the
configuration of ``transformers`` (``GPT2Config``), whose names for the switches are used here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import ConfigError

# The functions without parameters in ACT2FN of transformers' activations.py. Their other names are in ``config.SAME_FUNCTION``.
ACTIVATIONS = tuple(
    """
    gelu_new gelu_pytorch_tanh gelu gelu_fast gelu_10 hardswish laplace leaky_relu linear mish quick_gelu relu relu2 relu6
    sigmoid silu sqrtsoftplus tanh
    """.split()  # noqa: SIM905  a table reads better as words
)
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")  # two names of one function

# Canonical name -> shape in symbols. V vocabulary, T context, C width, F feed-forward width. Weights are [in, out].
SPEC: dict[str, tuple[str, ...]] = {
    "wte.weight": ("V", "C"),
    "wpe.weight": ("T", "C"),
    "h.{i}.ln_1.weight": ("C",),
    "h.{i}.ln_1.bias": ("C",),
    "h.{i}.attn.c_attn.weight": ("C", "3C"),
    "h.{i}.attn.c_attn.bias": ("3C",),
    "h.{i}.attn.c_proj.weight": ("C", "C"),
    "h.{i}.attn.c_proj.bias": ("C",),
    "h.{i}.ln_2.weight": ("C",),
    "h.{i}.ln_2.bias": ("C",),
    "h.{i}.mlp.c_fc.weight": ("C", "F"),
    "h.{i}.mlp.c_fc.bias": ("F",),
    "h.{i}.mlp.c_proj.weight": ("F", "C"),
    "h.{i}.mlp.c_proj.bias": ("C",),
    "ln_f.weight": ("C",),
    "ln_f.bias": ("C",),
}
PROJECTIONS = (
    "attn.c_attn",
    "attn.c_proj",
    "mlp.c_fc",
    "mlp.c_proj",
)  # of a block: the modules that multiply by a matrix
MAX_LAYERS = 1000  # published GPT-2s have 48 at most
LM_HEAD = "lm_head.weight"  # the 17th, [V, C], where the output is not tied to the token embedding


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Everything that decides a GPT-2's shapes and arithmetic. The defaults are GPT-2 small (124M).

    ``n_inner=None`` becomes ``4 * n_embd``. Token ids that the vocabulary does not hold become None.

    Raises:
        ConfigError: if the values cannot make a GPT-2; the message lists every fault.
    """

    n_vocab: int = 50257
    n_ctx: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = None  # type: ignore[assignment]  # resolved to an int on construction
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    initializer_range: float = 0.02
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.n_inner is None:
            object.__setattr__(self, "n_inner", 4 * self.n_embd if _is_int(self.n_embd) else 0)
        # A file may state 1 for 1.0. Other formats write a float.
        if isinstance(self.layer_norm_epsilon, int) and _is_number(self.layer_norm_epsilon):
            object.__setattr__(self, "layer_norm_epsilon", float(self.layer_norm_epsilon))
        if faults := list(self._faults()):
            raise ConfigError.listing("not a valid GPT-2 configuration", faults)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if not (_is_int(value) and 0 <= value < self.n_vocab):
                object.__setattr__(self, name, None)

    def _faults(self) -> Iterator[str]:
        yield from self._faults_of_sizes()
        for name in (*SWITCHES, "tie_word_embeddings"):
            kind = type(getattr(GPT2Config, name))
            if kind is bool and not isinstance(getattr(self, name), bool):
                yield f"{name} is {getattr(self, name)!r}, not true or false"
        if _is_int(self.n_embd) and _is_int(self.n_head) and self.n_head > 0 and self.n_embd % self.n_head:
            yield f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}"
        if self.activation_function not in ACTIVATIONS:
            yield f"activation_function is {self.activation_function!r}; gpt2x supports {', '.join(ACTIVATIONS)}"
        yield from self._faults_of_numbers()

    def _faults_of_sizes(self) -> Iterator[str]:
        for name in SIZES:
            value = getattr(self, name)
            if not (_is_int(value) and 0 < value < 2**31):
                yield f"{name} is {value!r}, not a positive integer"
        if _is_int(self.n_layer) and self.n_layer > MAX_LAYERS:
            yield f"n_layer is {self.n_layer}, which exceeds the limit of {MAX_LAYERS}"

    def _faults_of_numbers(self) -> Iterator[str]:
        if not (_is_number(self.layer_norm_epsilon) and self.layer_norm_epsilon > 0):
            yield f"layer_norm_epsilon is {self.layer_norm_epsilon!r}, not a positive number"
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value <= 1):
                yield f"{name} is {value!r}, not a probability"
        if not (_is_number(self.initializer_range) and self.initializer_range >= 0):
            yield f"initializer_range is {self.initializer_range!r}, not a standard deviation"

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def size_name(self) -> str | None:
        """The published size with this architecture ("124M", "distilgpt2", ...), or None."""
        key = (self.n_embd, self.n_layer, self.n_vocab, self.n_ctx)
        name, n_head = PUBLISHED.get(key, (None, 0))
        return name if n_head == self.n_head else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every parameter of this model, in canonical order."""
        sizes = {"V": self.n_vocab, "T": self.n_ctx, "C": self.n_embd, "3C": 3 * self.n_embd, "F": self.n_inner}
        shapes: dict[str, tuple[int, ...]] = {}
        for row, _, name in rows(self.n_layer):
            shapes[name] = tuple(sizes[symbol] for symbol in SPEC[row])
        return shapes if self.tie_word_embeddings else {**shapes, LM_HEAD: (self.n_vocab, self.n_embd)}

    def beyond(self, name: str, values: tuple[Any, ...]) -> str | None:
        """The fault of a field that has none of these values; None if it has one."""
        mine = getattr(self, name)
        if any(_same(mine, value) for value in values):
            return None
        return f"{name} is {mine!r}, not {' or '.join(map(repr, values))}"

    def differences(self, other: GPT2Config, names: tuple[str, ...] | None = None) -> list[str]:
        """The fields that change shapes or arithmetic and differ, one line each."""
        found = []
        for name in names or ARITHMETIC:
            mine, theirs = getattr(self, name), getattr(other, name)
            if not _same(mine, theirs):
                found.append(f"{name} is {mine!r}, not {theirs!r}")
        return found


SIZES = ("n_vocab", "n_ctx", "n_embd", "n_layer", "n_head", "n_inner")
SWITCHES = (
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
)
ARITHMETIC = SIZES + SWITCHES + ("tie_word_embeddings",)

# (n_embd, n_layer, n_vocab, n_ctx) -> name and n_head. OpenAI's hparams.json files; distilgpt2's config.json.
PUBLISHED: dict[tuple[int, int, int, int], tuple[str, int]] = {
    (768, 12, 50257, 1024): ("124M", 12),
    (1024, 24, 50257, 1024): ("355M", 16),
    (1280, 36, 50257, 1024): ("774M", 20),
    (1600, 48, 50257, 1024): ("1558M", 25),
    (768, 6, 50257, 1024): ("distilgpt2", 12),
}


def rows(n_layer: int) -> Iterator[tuple[str, int, str]]:
    """SPEC unrolled, in canonical order: (row of SPEC, layer, canonical name); layer is -1 outside the blocks."""
    # SPEC has the embeddings, then the rows of one block, then ln_f.
    for is_block, group in itertools.groupby(SPEC, key=_is_in_block):
        names = list(group)
        layers = range(n_layer) if is_block else (-1,)
        for i in layers:
            for row in names:
                yield row, i, row.replace("{i}", str(i))


def _is_in_block(row: str) -> bool:
    return "{i}" in row


def renamed(raw: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """The fields of ``GPT2Config`` that a file states. ``keys``: a file's key -> the field that it is."""
    return {name: raw[key] for key, name in keys.items() if key in raw}


def spelled(config: GPT2Config, keys: Mapping[str, str]) -> dict[str, Any]:
    """The values of a configuration under a file's keys: the inverse of ``renamed``."""
    return {key: getattr(config, name) for key, name in keys.items()}


def projections(n_layer: int) -> list[str]:
    """The projections of a model in order: ``h.0.attn.c_attn``, ..."""
    return [f"h.{i}.{projection}" for i in range(n_layer) for projection in PROJECTIONS]


def with_inner(fields: dict[str, Any]) -> dict[str, Any]:
    """The same fields with ``n_inner``, which is 4 x n_embd if it is not stated."""
    width = fields.get("n_embd")
    return {"n_inner": 4 * width, **fields} if isinstance(width, int) else fields


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, float) and math.isfinite(value)


def _same(a: Any, b: Any) -> bool:
    return a == b or (a in TANH_GELU and b in TANH_GELU)


assert set(ARITHMETIC) <= {f.name for f in fields(GPT2Config)}
