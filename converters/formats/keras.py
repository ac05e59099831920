"""HDF5, as Keras and transformers 4 wrote ``tf_model.h5``."""

from __future__ import annotations

from pathlib import Path

from ..containers.container import Container
from .format import LATER, Format, Opener, starts_with


def _open(path: Path) -> Container:
    from ..containers.hdf5 import open_hdf5

    return open_hdf5(path)


HDF5 = Format(
    name="hdf5",
    what="Keras, through transformers 4",
    files="`tf_model.h5`",
    dialects=("keras",),
    reads=("F64", "F32", "F16"),
    untied=False,
    openers=(Opener(starts_with(b"\x89HDF\r\n\x1a\n"), _open),),
    file_names=("tf_model.h5",),
    turn=LATER,
    suffixes=(".h5",),
)
