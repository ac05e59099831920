"""Keys and values of prompts, kept for later prompts that begin alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PIECE = 64
"""Tokens of a prompt that are read in one run, and that are kept together.

Prompts are always cut at multiples of it. So what is kept is what reading the same tokens again would compute, to the
last bit.
"""

Block = list[NDArray[Any]]  # keys and values of each layer in turn, each (H, PIECE, D)


class PrefixCache:
    """Blocks of ``PIECE`` tokens by all the tokens up to their end. The blocks that were not used for longest go first.

    Args:
        budget: bytes of keys and values.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, prompt: Sequence[int]) -> list[Block]:
        """The blocks that a prompt begins with. Its last token is never among them: its logits are needed."""
        keys = []
        for stop in range(PIECE, len(prompt), PIECE):
            key = _key(prompt[:stop])
            if key not in self._blocks:
                break
            keys.append(key)
        found = [self._blocks[key] for key in keys]
        # A block is of no use without those before it, so those are used last.
        for key in reversed(keys):
            self._blocks.move_to_end(key)
        return found

    def has(self, tokens: Sequence[int]) -> bool:
        """Whether the block that ends with the last of these tokens is kept."""
        return _key(tokens) in self._blocks

    def add(self, tokens: Sequence[int], block: Block) -> None:
        """Keep the block of the last ``PIECE`` of these tokens."""
        size = _size(block)
        key = _key(tokens)
        if size > self.budget or key in self._blocks:
            return
        while self.nbytes + size > self.budget:
            _, oldest = self._blocks.popitem(last=False)
            self.nbytes -= _size(oldest)
        self._blocks[key] = block
        self.nbytes += size


def _key(tokens: Sequence[int]) -> bytes:
    # The tokens themselves, not a hash: two prompts never share a key.
    return np.asarray(tokens, np.int32).tobytes()


def _size(block: Block) -> int:
    return sum(tensor.nbytes for tensor in block)
