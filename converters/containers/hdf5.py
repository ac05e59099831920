"""HDF5, as Keras wrote ``tf_model.h5``: data sets in nested groups, each contiguous.

h5py finds them, in a process of its own (see ``hdf5_listing.py``); the values are then read from the file by position. Source: the HDF5 file format specification; ``save_weights`` of Keras 2.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..dtypes import BY_NUMPY
from ..errors import FormatError, truncated
from ..io.reading import File
from ..tensors import LazyTensor
from ..values import are_sizes
from .container import MAX_RANK, MAX_VALUES, Container

# The process limits its own CPU time. This limit is for one that waits, as for a disk that does not answer.
SECONDS = 60
MAX_ERROR = 2000  # characters


def open_hdf5(path: Path) -> Container:
    """Open an HDF5 file.

    Raises:
        FormatError: if it is invalid, or data is not contiguous in this file.
        ModuleNotFoundError: if h5py is not installed.
    """
    file = File(path)
    datasets = _datasets(path)
    tensors = {name: _tensor(file, name, *entry) for name, *entry in datasets}
    spans = sorted((offset, offset + tensors[name].nbytes, name) for name, _, _, offset in datasets)
    for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise FormatError(f"{path}: {name[:100]!r} and {other[:100]!r} overlap")
    return Container("hdf5", path, tensors)


def _datasets(path: Path) -> list[Any]:
    specs = [importlib.util.find_spec(name) for name in ("h5py", "numpy")]
    if specs[0] is None:
        raise ModuleNotFoundError("No module named 'h5py'", name="h5py")
    program = Path(__file__).with_name("hdf5_listing.py")
    # -I: Python then imports nothing from the current folder, where a stranger's h5py.py may lie, nor from folders of
    # the user's. So the folders of both packages are passed.
    command = [sys.executable, "-I", "-W", "ignore", str(program), str(path.absolute())]
    command += [str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin]
    # OpenBLAS reserves memory for each thread, which the process may not have. Locks fail on some network disks.
    environment = {"OPENBLAS_NUM_THREADS": "1", "HDF5_USE_FILE_LOCKING": "FALSE"}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise FormatError(f"{path}: the HDF5 library exceeds its time limit of {SECONDS} seconds") from None
    if done.returncode != 0:
        raise FormatError(f"{path}: the HDF5 library cannot read it")
    return _listed(done.stdout, path)


def _listed(printed: bytes, path: Path) -> list[Any]:
    """Return name, type, shape and offset of each data set.

    What the process printed is not trusted: a file that exploits a fault of the HDF5 library could print anything.
    """
    try:
        result = json.loads(printed.decode())
        if "error" in result:
            raise FormatError(f"{path}: {str(result['error'])[:MAX_ERROR]}")
        datasets: list[Any] = result["datasets"]
        for name, kind, shape, offset in datasets:
            if not (type(name) is type(kind) is str and type(shape) is list and are_sizes([*shape, offset], 2**63)):
                raise ValueError("not a list of data sets")
    except (ValueError, TypeError, KeyError, RecursionError):
        raise FormatError(f"{path}: the HDF5 library cannot list its data sets") from None
    return datasets


def _tensor(file: File, name: str, kind: str, shape: list[int], offset: int) -> LazyTensor:
    where = f"{file.path}: {name[:100]!r}"
    dtype = BY_NUMPY.get(kind)
    if dtype is None:
        raise FormatError(f"{where}: data type {kind!r}, which gpt2x does not read")
    if len(shape) > MAX_RANK or math.prod(shape) >= MAX_VALUES or not name.isprintable():
        raise FormatError(f"{where}: invalid name or shape, {shape[:9]}")
    if offset + math.prod(shape) * dtype.itemsize > file.size:
        raise truncated(where, f"it ends after the file, which has {file.size} bytes")
    return LazyTensor.in_file(file, offset, dtype, tuple(shape))
