"""safetensors. The configuration is in its metadata, under ``config``."""

from __future__ import annotations

import struct
from pathlib import Path

from ..config import to_hf
from ..containers.container import Container
from ..dialects import HF
from ..io.json import parse_json
from ..io.publishing import new_file
from .format import FLOATS, Embedded, Format, Job, Opener, Written
from .huggingface import CODEC

CONFIG_KEY = "config"


def _matches(head: bytes, size: int) -> bool:
    return head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= size - 8


def _open(path: Path) -> Container:
    from ..containers.safetensors import open_safetensors

    return open_safetensors(path)


def _embedded(container: Container) -> Embedded | None:
    text = container.metadata.get(CONFIG_KEY)
    if text is None:
        return None
    return Embedded(parse_json(text.encode(), f"{container.path}: config in the metadata"), CODEC)


def _write(job: Job) -> Written:
    from ..containers.safetensors import write_safetensors

    config = job.checkpoint.config
    tensors = HF.write(job.checkpoint.tensors, config)
    with new_file(job.path, job.force) as out:
        write_safetensors(out, tensors, to_hf(config))
    return Written([job.path], [])


SAFETENSORS = Format(
    name="safetensors",
    what="Hugging Face, and MLX (mlx-lm)",
    files="`.safetensors`",
    dialect="hf",
    reads=FLOATS,
    writes=FLOATS,
    ask="`NAME.safetensors`",
    configuration="in its metadata",
    openers=(Opener(_matches, _open),),
    file_names=("model.safetensors", "model.safetensors.index.json"),
    suffixes=(".safetensors",),
    suffix_decides=True,  # it has no magic number
    codec=CODEC,
    embedded=_embedded,
    write=_write,
    write_suffixes=(".safetensors",),
)
