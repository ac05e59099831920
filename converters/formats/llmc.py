"""llm.c's ``.bin``. The configuration is its header."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..containers.container import Container
from ..dialects import LLMC as DIALECT
from ..io.publishing import new_file
from ..spec import GPT2Config, renamed, spelled, with_inner
from ..tensors import BF16, F32
from .format import Codec, Embedded, Format, Job, Opener, Written, starts_with
from .notes import refuse_float64

# Stated again in the container, which is imported only when a file is opened.
MAGIC = (20240326).to_bytes(4, "little")

# llm.c's GPT2Config -> ours
KEYS = {
    "max_seq_len": "n_ctx",
    "vocab_size": "n_vocab",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "channels": "n_embd",
}


def from_header(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The GPT2Config fields that the header states."""
    return with_inner(renamed(raw, KEYS))


def to_header(config: GPT2Config) -> dict[str, int]:
    """The header of a configuration, without the size of the padded vocabulary."""
    return spelled(config, KEYS)


CODEC = Codec(from_header, to_header)


def _open(path: Path) -> Container:
    from ..containers.llmc import open_llmc

    return open_llmc(path)


def _embedded(container: Container) -> Embedded:
    return Embedded(container.metadata, CODEC)


def _write(job: Job) -> Written:
    from ..containers.llmc import write_llmc

    config = job.checkpoint.config
    dtypes = {tensor.dtype for tensor in job.checkpoint.tensors.values()}
    refuse_float64(job.checkpoint, "llmc")
    # llm.c has no float16, whose values float32 holds exactly.
    dtype = BF16 if dtypes == {BF16} else F32
    tensors = DIALECT.write(job.checkpoint.cast(dtype).tensors, config)
    with new_file(job.path, job.force) as out:
        write_llmc(out, tensors, to_header(config), dtype)
    return Written([job.path], [])


LLMC = Format(
    name="llmc",
    what="llm.c, versions 3 and 5",
    files="`.bin`",
    dialect="llmc",
    reads=("F32", "BF16"),
    writes=("F32", "BF16"),
    ask="`--to llmc`",
    configuration="in its header",
    untied=False,
    openers=(Opener(starts_with(MAGIC), _open),),
    suffixes=(".bin",),
    codec=CODEC,
    embedded=_embedded,
    write=_write,
)
