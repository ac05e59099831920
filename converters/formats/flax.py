"""MessagePack, as Flax and transformers 4 wrote ``flax_model.msgpack``."""

from __future__ import annotations

from pathlib import Path

from ..containers.container import Container
from .format import FLOATS, LATER, Format, Opener

LARGE_MAPS = {b"\xde": 3, b"\xdf": 5}  # leading byte -> bytes before the first key


def _matches(head: bytes, size: int) -> bool:
    """Whether it is a map of MessagePack whose first key is a string."""
    # MessagePack has no magic number. Flax's outermost value is a map, whose first key is a short string.
    first = head[:1]
    is_small_map = b"\x81" <= first <= b"\x8f"
    start = LARGE_MAPS.get(first, 1)
    key = head[start : start + 1]
    return (is_small_map or first in LARGE_MAPS) and b"\xa1" <= key <= b"\xdb"


def _open(path: Path) -> Container:
    from ..containers.msgpack import open_msgpack

    return open_msgpack(path)


MSGPACK = Format(
    name="msgpack",
    what="Flax, through transformers 4",
    files="`flax_model.msgpack`",
    dialect="flax",
    reads=FLOATS,
    openers=(Opener(_matches, _open, uncertain=True),),
    file_names=("flax_model.msgpack",),
    turn=LATER,
    suffixes=(".msgpack",),
)
