"""PyTorch's ``torch.save``: a zip archive since 1.6, a row of pickles before. The configuration is in an extra record."""

from __future__ import annotations

import json
from pathlib import Path

from ..config import to_hf
from ..containers.container import Container
from ..dialects import HF
from ..errors import FormatError
from ..io.json import parse_json
from ..io.publishing import new_file
from ..spec import LM_HEAD
from .format import FLOATS, Embedded, Format, Job, Opener, Written, starts_with
from .huggingface import CODEC
from .nanogpt import embedded as nanogpt_embedded

RECORD = "extra/config.json"  # torch.load ignores it. With it, a lone .bin is complete


def _open_zip(path: Path) -> Container:
    from ..containers.torch_zip import open_torch_zip

    return _without_shared(open_torch_zip(path, records=(RECORD,)))


def _open_legacy(path: Path) -> Container:
    from ..containers.torch_legacy import open_torch_legacy

    return _without_shared(open_torch_legacy(path))


def _without_shared(container: Container) -> Container:
    """Refuse one tensor under two names. Only ``lm_head`` may be another name of the token embedding.

    Raises:
        FormatError: if there is one.
    """
    names: dict[int, str] = {}
    for name, tensor in container.tensors.items():
        if name.endswith(LM_HEAD) or not tensor.size:
            continue
        first = names.setdefault(id(tensor), name)
        if first != name:
            raise FormatError(f"{container.path}: {first} and {name} overlap in one storage")
    return container


def _embedded(container: Container) -> Embedded | None:
    record = container.metadata.get(RECORD)
    if isinstance(record, bytes):
        return Embedded(parse_json(record, f"{container.path}: {RECORD}"), CODEC)
    return nanogpt_embedded(container)


def _write(job: Job) -> Written:
    from ..containers.torch_zip import write_torch_zip

    config = job.checkpoint.config
    tensors = HF.write(job.checkpoint.tensors, config)
    with new_file(job.path, job.force) as out:
        write_torch_zip(out, tensors, records={RECORD: json.dumps(to_hf(config)).encode()})
    return Written([job.path], [])


BIN = Format(
    name="bin",
    what="PyTorch, since 1.6 (zip) and before (legacy)",
    files="`.bin`, `.pt`, `.pth`",
    dialects=("hf", "llms-from-scratch", "mingpt-2020", "flash-attn"),
    reads=FLOATS,
    writes=FLOATS,
    ask="`NAME.bin`",
    configuration="in an extra record that `torch.load` ignores",
    checksums="CRC-32 of every member (zip)",
    openers=(
        Opener(starts_with(b"PK\x03\x04", b"PK\x05\x06"), _open_zip),
        Opener(starts_with(b"\x80\x02\x8a\x0a"), _open_legacy),
    ),
    file_names=("pytorch_model.bin", "pytorch_model.bin.index.json"),
    suffixes=(".bin", ".pt", ".pth"),
    codec=CODEC,
    embedded=_embedded,
    write=_write,
    write_suffixes=(".bin",),
)
