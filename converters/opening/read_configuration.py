"""Step 3: read the configuration inside the weights and beside them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..containers.container import Container
from ..errors import CheckpointError, FormatError
from ..formats import BY_NAME, CONFIG_FILES
from ..formats.format import Codec, Embedded
from ..formats.huggingface import CODEC as HF_CODEC
from ..head_config import head_settings
from ..io.json import MAX_CONFIG, read_json
from .find import Source

INERT = ("token_id", "pdrop")  # ends of fields that do not change the logits: two files may differ in them


@dataclass(frozen=True)
class Stated:
    """The fields of GPT2Config that files and the user state, where, and what the user should know of them.

    ``heads`` are the settings of heads (``head_config.KEYS``), not checked.
    """

    fields: Mapping[str, Any]
    where: str
    notes: tuple[str, ...] = ()
    heads: Mapping[str, Any] = field(default_factory=dict)


class _Reader:
    """Reads configurations without the keys that the user says to ignore, and remembers which of these it met."""

    def __init__(self, ignored: Collection[str]) -> None:
        self.ignored = ignored
        self.met: dict[str, str] = {}  # key -> place

    def read(self, raw: Mapping[str, Any], codec: Codec, where: str) -> Stated:
        """One configuration."""
        self.met |= {key: where for key in self.ignored if key in raw}
        kept = {key: value for key, value in raw.items() if key not in self.ignored}
        fields = codec.read(kept, where)
        return Stated(fields, where, tuple(codec.notes(kept, where)), head_settings(kept))

    def notes(self) -> tuple[str, ...]:
        """The notes on the keys that were ignored."""
        return tuple(f"{where}: {key} is ignored, as --ignore-config-key asks" for key, where in self.met.items())


def read_configuration(
    source: Source,
    container: Container,
    activation_function: str | None = None,
    ignore_config_keys: Collection[str] = (),
) -> Stated:
    """Read the configuration inside the weights and beside them.

    A lone file's own configuration is enough. For a directory, and for files that state sizes only (nanoGPT), those
    beside it are read, too.

    Raises:
        ConfigError: if one is invalid.
        CheckpointError: if two disagree.
    """
    reader = _Reader(ignore_config_keys)
    inside = embedded_configuration(container)
    found = Stated({}, "")
    if inside:
        found = reader.read(inside.raw, inside.codec, f"{container.path}: its metadata")
    fields: dict[str, Any] = dict(found.fields)
    where = "its metadata" if fields else ""
    notes, heads = found.notes, found.heads
    is_enough = inside is not None and inside.complete and bool(fields) and not source.is_directory
    if not is_enough:
        beside = _beside(source.home, reader)
        _check_agreement(source.home, fields, container.path.name, beside.fields, beside.where)
        fields = {**fields, **beside.fields}
        where = beside.where or where
        notes += beside.notes
        heads = {**heads, **beside.heads}
    if activation_function:
        given = {"activation_function": activation_function}
        _check_agreement(source.home, fields, where, given, "--activation-function")
        fields = {**fields, **given}
    return Stated(fields, where, (*notes, *reader.notes()), heads)


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


def _beside(directory: Path, reader: _Reader) -> Stated:
    fields: dict[str, Any] = {}
    heads: dict[str, Any] = {}
    names: list[str] = []
    notes: list[str] = []
    for name in sorted(CONFIG_FILES):
        path = directory / name
        if path.is_file():
            raw = read_json(path, MAX_CONFIG)
            codec = next(codec for codec in CONFIG_FILES[name] if codec.applies is None or codec.applies(raw))
            found = reader.read(raw, codec, str(path))
            _check_agreement(directory, fields, " and ".join(names), found.fields, name)
            fields = {**found.fields, **fields}
            heads |= found.heads
            names.append(name)
            notes += found.notes
    return Stated(fields, " and ".join(names), tuple(notes), heads)


def _check_agreement(directory: Path, a: Mapping[str, Any], name_a: str, b: Mapping[str, Any], name_b: str) -> None:
    faults = []
    for key in a:
        if key in b and b[key] != a[key] and not key.endswith(INERT):
            faults.append(f"{key} is {a[key]!r} in {name_a}, {b[key]!r} in {name_b}")
    if faults:
        advice = "Remove the wrong one, or convert the file alone."
        raise CheckpointError.listing(f"{directory}: two configurations disagree", faults, advice)
