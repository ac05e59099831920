"""NumPy's ``.npz``, as rust-bert's ``convert_model.py`` and others write a state dict with ``numpy.savez``."""

from __future__ import annotations

from pathlib import Path

from ..containers.container import Container
from .format import LATER, Format, Opener

NAME_LENGTH, NAME = slice(26, 28), 30  # in a zip archive's header of its first member


def _is_npz(head: bytes, size: int) -> bool:
    """Whether a zip archive begins with an array. (PyTorch's begin with another member.)"""
    if not head.startswith(b"PK\x03\x04"):
        return False
    length = int.from_bytes(head[NAME_LENGTH], "little")
    return head[NAME : NAME + length].endswith(b".npy")


def _open(path: Path) -> Container:
    from ..containers.npz import open_npz

    return open_npz(path)


NPZ = Format(
    name="npz",
    what="NumPy's savez",
    files="`.npz`",
    dialect="hf",
    reads=("F64", "F32", "F16"),
    checksums="CRC-32 of every member",
    openers=(Opener(_is_npz, _open),),
    file_names=("model.npz",),
    turn=LATER,
    suffixes=(".npz",),
)
