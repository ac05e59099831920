"""safetensors: eight bytes of length, a JSON header, the tensors.

The header is read and checked here: the ``safetensors`` library (0.8) lets duplicate names and unknown fields pass.
Source: the format section of safetensors' README.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FormatError, truncated
from ..io.json import parse_json
from ..io.publishing import Output
from ..io.reading import File
from ..tensors import DTYPES, LazyTensor
from ..values import all_are, are_sizes
from .container import MAX_RANK, MAX_VALUES, Container

MAX_HEADER = 100_000_000  # the library's limit
CONFIG_KEY = "config"  # of __metadata__
OTHER_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "C64")


def open_safetensors(path: Path) -> Container:
    """Open a safetensors file.

    Raises:
        FormatError: if any part of the header is invalid, or the tensors do not cover the file exactly.
    """
    file = File(path)
    header, start = _header(file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all_are(metadata.values(), str):
        raise FormatError(f"{path}: __metadata__ is not a table of strings")
    tensors = {name: _tensor(file, start, name, entry) for name, entry in header.items()}
    _check_cover(file, start, header)
    return Container("safetensors", path, tensors, metadata)


def _header(file: File) -> tuple[dict[str, Any], int]:
    # The length, and at least "{}".
    if file.size < 10:
        raise truncated(file.path, f"safetensors needs 10 bytes, the file has {file.size}")
    size = struct.unpack("<Q", file.read(0, 8))[0]
    if size > MAX_HEADER:
        raise FormatError(f"{file.path}: a header of {size} bytes, which exceeds the limit of {MAX_HEADER}")
    if size < 2 or 8 + size > file.size:
        raise truncated(
            file.path, f"the header needs {8 + size} bytes, the file has {file.size}", "truncated, or not safetensors"
        )
    data = file.read(8, size)
    if data[:1] != b"{":
        raise FormatError(f"{file.path}: the header does not begin with '{{'")
    # Writers pad the header with spaces, which align the tensors.
    return parse_json(data.rstrip(b" "), f"{file.path}: header"), 8 + size


def _tensor(file: File, start: int, name: str, entry: Any) -> LazyTensor:
    where = f"{file.path}: {name[:200]!r}"
    if "\0" in name or len(name) > 1024:
        raise FormatError(f"{where}: invalid tensor name")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: its entry must hold dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        hint = ": gpt2x does not read quantized weights" if dtype in OTHER_DTYPES else ""
        raise FormatError(f"{where}: unknown dtype {dtype!r}{hint}")
    if not _naturals(shape) or len(shape) > MAX_RANK or math.prod(shape) >= MAX_VALUES:
        raise FormatError(f"{where}: invalid shape, {str(shape)[:100]}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{where}: invalid offsets, {str(offsets)[:100]}")
    begin, end = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise FormatError(f"{where}: {end - begin} bytes, but shape {shape} of {dtype} needs {expected}")
    if start + end > file.size:
        raise truncated(where, f"{start + end} bytes needed, the file has {file.size}")
    return LazyTensor.in_file(file, start + begin, DTYPES[dtype], tuple(shape))


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and are_sizes(value, 2**63)


def _check_cover(file: File, start: int, header: Mapping[str, Any]) -> None:
    spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
    edges = [(0, 0, "the start"), *spans, (file.size - start, file.size - start, "the end")]
    for (_, end, _), (begin, _, name) in itertools.pairwise(edges):
        if begin != end:
            fault = f"{begin - end} bytes belong to no tensor" if begin > end else "overlaps the tensor before it"
            raise FormatError(
                f"{file.path}: before {name!r}: {fault}" if begin > end else f"{file.path}: {name!r} {fault}"
            )


def _layout(
    tensors: Mapping[str, LazyTensor], config: dict[str, Any] | None = None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header of a safetensors file, and where each tensor's bytes begin and end, in file order.

    The order is the library's own: wide numbers first, then by name.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[1].dtype.name, item[0]))
    # transformers requires "format": "pt".
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | ({CONFIG_KEY: json.dumps(config)} if config else {})}
    position = 0
    spans = {}
    for name, tensor in ordered:
        end = position + tensor.nbytes
        header[name] = {"dtype": tensor.dtype.name, "shape": list(tensor.shape), "data_offsets": [position, end]}
        spans[name] = (position, end)
        position = end
    data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    data = data.ljust((len(data) + 7) // 8 * 8)
    head = struct.pack("<Q", len(data)) + data
    return head, {name: (len(head) + begin, len(head) + end) for name, (begin, end) in spans.items()}


def write_safetensors(
    out: Output, tensors: Mapping[str, LazyTensor], config: dict[str, Any] | None = None
) -> dict[str, tuple[int, int]]:
    """Write a safetensors file with ``config`` as JSON in its metadata. Returns where each tensor's bytes begin and end."""
    head, spans = _layout(tensors, config)
    out.write(head)
    for name in spans:
        for chunk in tensors[name].chunks():
            out.write(chunk)
    return spans
