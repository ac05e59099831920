"""Step 3: read the configuration inside the weights and beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..containers.container import Container
from ..errors import CheckpointError, FormatError
from ..formats import BY_NAME, CONFIG_FILES
from ..formats.format import Embedded
from ..formats.huggingface import CODEC as HF_CODEC
from ..io.json import read_json
from .find import Source

MAX_JSON = 1 << 20
INERT = ("token_id", "pdrop")  # ends of fields that do not change the logits: two files may differ in them


@dataclass(frozen=True)
class Stated:
    """The fields of GPT2Config that files and the user state, and where."""

    fields: Mapping[str, Any]
    where: str


def read_configuration(source: Source, container: Container, activation_function: str | None = None) -> Stated:
    """Read the configuration inside the weights and beside them.

    A lone file's own configuration is enough. For a directory, and for files that state sizes only (nanoGPT), those
    beside it are read, too.

    Raises:
        ConfigError: if one is invalid.
        CheckpointError: if two disagree.
    """
    inside = embedded_configuration(container)
    fields: dict[str, Any] = {}
    if inside:
        fields = inside.codec.read(inside.raw, f"{container.path}: its metadata")
    where = "its metadata" if fields else ""
    is_enough = inside is not None and inside.complete and bool(fields) and not source.is_directory
    if not is_enough:
        beside = _beside(source.home)
        _check_agreement(source.home, fields, container.path.name, beside.fields, beside.where)
        fields = {**fields, **beside.fields}
        where = beside.where or where
    if activation_function:
        given = {"activation_function": activation_function}
        _check_agreement(source.home, fields, where, given, "--activation-function")
        fields = {**fields, **given}
    return Stated(fields, where)


def embedded_configuration(container: Container) -> Embedded | None:
    """The configuration inside a file of weights, or inside the shards of one."""
    if not container.shards:
        entry = BY_NAME.get(container.format)
        return entry.embedded(container) if entry and entry.embedded else None
    first: Embedded | None = None
    for shard in container.shards:
        found = embedded_configuration(shard)
        if found is None:
            continue
        if found.codec is not HF_CODEC:
            raise FormatError(
                f"{container.path}: points to {shard.path.name!r}, which is not a shard but a whole model; convert that file"
            )
        if first and found.raw != first.raw:
            raise FormatError(f"{container.path}: the configurations in its shards disagree")
        first = first or found
    return first


def _beside(directory: Path) -> Stated:
    fields: dict[str, Any] = {}
    names: list[str] = []
    for name in sorted(CONFIG_FILES):
        path = directory / name
        if path.is_file():
            raw = read_json(path, MAX_JSON)
            codec = next(codec for codec in CONFIG_FILES[name] if codec.applies is None or codec.applies(raw))
            found = codec.read(raw, str(path))
            _check_agreement(directory, fields, " and ".join(names), found, name)
            fields = {**found, **fields}
            names.append(name)
    return Stated(fields, " and ".join(names))


def _check_agreement(directory: Path, a: Mapping[str, Any], name_a: str, b: Mapping[str, Any], name_b: str) -> None:
    faults = []
    for key in a:
        if key in b and b[key] != a[key] and not key.endswith(INERT):
            faults.append(f"{key} is {a[key]!r} in {name_a}, {b[key]!r} in {name_b}")
    if faults:
        advice = "Remove the wrong one, or convert the file alone."
        raise CheckpointError.listing(f"{directory}: two configurations disagree", faults, advice)
