"""Where the bytes of a weight are in the file of weights, and how they are encoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Union

TABLES = ("wte.weight", "lm_head.weight")  # (V, C): a row is looked up, and the logits are a product with the transpose


class Piece(NamedTuple):
    """A tensor in the file of weights: its dtype (numpy's name, or "int4"), shape, and place in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


class Quantized(NamedTuple):
    """A quantized weight. ``block`` values along the axis that a product sums over share a scale: the second axis of a
    table, the first of every other matrix."""

    q: Piece
    scale: Piece
    block: int


Stored = Mapping[str, Union[Piece, Quantized]]  # by canonical name
