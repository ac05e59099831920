"""PyTorch's ``torch.save``: a zip archive since 1.6, a row of pickles before. The configuration is in an extra record."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

from ..config import to_hf
from ..containers.container import Container, Entry
from ..dialects import HF
from ..errors import short
from ..io.json import parse_json
from ..io.publishing import new_file
from .format import FLOATS, Embedded, Format, Job, Opener, Written, starts_with
from .huggingface import CODEC
from .nanogpt import configuration_beside
from .nanogpt import embedded as nanogpt_embedded

RECORD = "extra/config.json"  # torch.load ignores it. With it, a lone .bin is complete


def _open_zip(path: Path) -> Container:
    from ..containers.torch_zip import open_torch_zip

    return _checked(open_torch_zip(path, records=(RECORD,)))


def _open_legacy(path: Path) -> Container:
    from ..containers.torch_legacy import open_torch_legacy

    return _checked(open_torch_legacy(path))


def _checked(container: Container) -> Container:
    """The container, or each of its entries once it is opened, with what is known of the configuration in it."""
    if not container.entries:
        return _without_configuration(container)
    entries = []
    for entry in container.entries:
        opened = functools.partial(_open_entry, entry)
        entries.append(replace(entry, open=opened))
    return replace(container, entries=tuple(entries))


def _open_entry(entry: Entry) -> Container:
    return _checked(entry.open())


def _without_configuration(container: Container) -> Container:
    """What is read as the configuration is not left out. A note names the fields of it that are not read."""
    found = configuration_beside(container)
    if found is None:
        return container
    left_out = tuple(name for name in container.left_out if name.partition(" (")[0].rpartition(".")[2] != found.key)
    notes = container.notes
    if found.ignored:
        notes = (*notes, f"of {found.key}, only the sizes are read, and not {', '.join(short(list(found.ignored), 8))}")
    return replace(container, left_out=left_out, notes=notes)


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
    files="`.bin`, `.pt`, `.pth`, `rust_model.ot`",
    dialect="hf",
    reads=FLOATS,
    writes=FLOATS,
    ask="`NAME.bin`",
    configuration="in an extra record that `torch.load` ignores",
    checksums="CRC-32 of every member (zip)",
    openers=(
        # The second is an archive without members, which the reader refuses by name.
        Opener(starts_with(b"PK\x03\x04", b"PK\x05\x06"), _open_zip),
        # The first pickle is torch.save's magic number: protocol 2, an integer of ten bytes.
        Opener(starts_with(b"\x80\x02\x8a\x0a"), _open_legacy),
    ),
    file_names=("pytorch_model.bin", "pytorch_model.bin.index.json"),
    suffixes=(".bin", ".pt", ".pth", ".ot"),
    codec=CODEC,
    embedded=_embedded,
    write=_write,
    write_suffixes=(".bin",),
)
