"""The protocol of every runtime, and the checks of what a runtime is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from converters import GPT2Config

from ..precisions import DEFAULT

Array = NDArray[Any]
Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
FEW = 32  # tokens after those in the cache that one run checks at most; a longer run may read them as a prompt
EMPTY = "the prompt is empty: pass at least one token (<|endoftext|> starts a new text)"


class InputError(ValueError):
    """Tokens, a mask, positions or a cache that do not fit the model or one another."""


class PromptError(InputError):
    """A prompt that the model cannot take."""


class Decoder(Protocol):
    """A GPT-2 that runs, and what it declares about itself.

    A runtime is a subclass that sets ``config`` and ``runtime``, implements ``run``, and overrides each default that does
    not hold for it. The decode loop itself calls only ``step``, and reads ``n_ctx`` and ``n_vocab``.
    """

    config: GPT2Config
    runtime: str
    """What runs the model, for reports: "model.onnx in ONNX Runtime 1.31.1"."""
    path: Path | None = None
    """The file of the model; None for weights that are already in memory."""
    precision: str = DEFAULT
    """How the weights are stored."""
    cache_kind: str = "growing"
    """What a step does with the cache: a key of ``gpt2x.contract.CACHES``."""
    last_only: bool = False
    """Whether ``run`` returns only the logits of the last position."""
    threads: int | None = None
    """Threads of each operator; None for one for each core."""
    can_truncate: bool = False
    """Whether ``truncate`` works, which speculative decoding needs."""
    near_tie: float = 3e-5
    """If the two largest logits differ by less than this share of the largest, a run of several tokens and runs of one token
    may rank them differently, because they round differently."""
    several_price: float = 0.15
    """What each further token of a run costs, as a share of a run of one token: a first estimate."""
    same_in_runs: bool = False
    """Whether a run of several tokens should return the same bits as runs of one token. Speculative decoding checks it."""

    @property
    def n_ctx(self) -> int:
        """The context length in tokens."""
        return self.config.n_ctx

    @property
    def n_vocab(self) -> int:
        """The size of the vocabulary."""
        return self.config.n_vocab

    def run(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """Run the model on new tokens.

        Args:
            input_ids: (B, T).
            attention_mask: (B, P + T), 0 for padding; None if there is no padding.
            position_ids: (B, T).
            cache: what the previous call returned, of P tokens; None for the first call.

        Returns:
            The logits (B, T, V), or (B, 1, V) if ``last_only``, and the cache of P + T tokens.
        """
        ...

    def step(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """As ``run``, but returns the logits of the last position only, (B, V)."""
        logits, cache = self.run(input_ids, attention_mask, position_ids, cache)
        return logits[:, -1], cache

    def extra_outputs(self, ids: Ids) -> dict[str, Array]:
        """The outputs besides the logits and the cache for rows of tokens (B, T) without padding, by their names."""
        return {}

    def extend(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> Any:
        """As ``step``, but returns the cache only: for tokens that are context for others."""
        return self.step(input_ids, attention_mask, position_ids, cache)[1]

    def reorder(self, cache: Any, rows: Ids) -> Any:
        """A cache whose rows are the given rows (N,) of another, which is not used any more.

        A row may be given several times, or not at all.

        Raises:
            InputError: if the runtime cannot do that, which is the default.
        """
        raise InputError(f"{self.runtime}: its cache has fixed rows, so it can continue each prompt only once")

    def truncate(self, cache: Any, length: int) -> Any:
        """A cache of one row without padding, truncated to its first ``length`` tokens. The other is not used any more.

        Raises:
            InputError: if the runtime cannot do that, which is the default (``can_truncate``).
        """
        raise InputError(f"{self.runtime}: its cache cannot be truncated")

    def unoptimized(self) -> Decoder | None:
        """The same model with graph optimizations disabled; None if the runtime has none to disable, or needs them."""
        return None


# ------------------------------------------------------------------------------------------------------------ checks


def check_tokens(input_ids: Any, position_ids: Any, n_vocab: int, n_ctx: int) -> tuple[Ids, Ids]:
    """Return both as int64, of the same shape (B, T), within the vocabulary and the context.

    Raises:
        InputError: if they are not.
    """
    ids = as_int64(input_ids, "input_ids")
    positions = as_int64(position_ids, "position_ids")
    if ids.ndim != 2:
        raise InputError(f"input_ids have the shape {ids.shape}; (batch, tokens) is needed")
    if 0 in ids.shape:
        raise InputError(EMPTY)
    if positions.shape != ids.shape:
        raise InputError(f"position_ids have the shape {positions.shape}, input_ids {ids.shape}: they must be the same")
    _check_range(ids, n_vocab, "token id", "vocabulary")
    _check_range(positions, n_ctx, "position", "context")
    return ids, positions


def check_mask(attention_mask: Any, B: int, P: int, T: int) -> Ids:
    """Return a mask (B, P + T) as int64; ones if there is none.

    Raises:
        InputError: if it has another shape.
    """
    if attention_mask is None:
        return np.ones((B, P + T), np.int64)
    mask = as_int64(attention_mask, "attention_mask")
    if mask.shape != (B, P + T):
        raise InputError(
            f"attention_mask has the shape {mask.shape}, but {P} cached and {T} new tokens need {(B, P + T)}"
        )
    return mask


def as_int64(array: Any, name: str) -> Ids:
    """Return integers as a contiguous int64 array.

    Raises:
        InputError: if they are not integers, or do not fit into int64.
    """
    try:
        found = np.asarray(array)
    except ValueError:
        raise InputError(f"{name} has rows of unequal lengths; pad them") from None
    if found.dtype.kind not in "biu" or _overflows(found):
        raise InputError(f"{name} is {found.dtype} {found.shape}; int64 is needed")
    return np.asarray(found, np.int64, order="C")


def _overflows(array: Array) -> bool:
    return array.dtype == np.uint64 and bool((array > np.iinfo(np.int64).max).any())


def _check_range(values: Ids, limit: int, what: str, of: str) -> None:
    # As uint64, a negative number is larger than any limit.
    if values.view(np.uint64).max() < limit:
        return
    low, high = int(values.min()), int(values.max())
    wrong = low if low < 0 else high
    raise InputError(f"{what} {wrong} is outside the {of} of {limit}")
