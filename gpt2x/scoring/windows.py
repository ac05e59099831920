"""The sliding window of perplexity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..runtimes.base import InputError


@dataclass(frozen=True)
class Window:
    """Tokens from ``begin`` to ``end``, of which those from ``first`` on are scored.

    Attributes:
        weight: of the mean of its losses in the perplexity.
    """

    begin: int
    end: int
    first: int
    weight: int


def default_stride(context: int) -> int:
    """Half the context, as in transformers' documentation: 512 for a context of 1024."""
    return max(1, context // 2)


def check_stride(stride: int) -> None:
    """Refuse a stride below 1.

    Raises:
        InputError: with its value.
    """
    if stride < 1:
        raise InputError(f"the stride is {stride}; it must be 1 or more")


def windows_of(n: int, context: int, stride: int) -> Iterator[Window]:
    """The windows of n tokens, as in transformers' documentation ("Perplexity of fixed-length models").

    There, a window of L tokens has as its targets the last ones that no earlier window had, ``trg_len``. The first token of
    a window is never scored, because nothing stands before it. The loss, a mean over the scored tokens, counts
    ``num_loss_tokens`` times, which is one less than there are targets: also where the window begins earlier than its
    targets, so that all of them are scored. Windows that score nothing, whose loss is NaN there, are left out.
    """
    previous = 0
    for begin in range(0, n, stride):
        end = min(begin + context, n)
        targets = min(end - previous, end - begin)
        first = max(end - targets, begin + 1)
        if first < end:
            yield Window(begin, end, first, targets - 1)
        previous = end
        if end == n:
            return
