"""Step 5: resolve the configuration from what files state, what the shapes show, and what the user says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..containers.container import Container
from ..errors import CheckpointError, ConfigError, FormatError, UnknownHeadsError
from ..formats import BY_NAME, CONFIG_FILES
from ..formats.format import Embedded
from ..formats.huggingface import CODEC as HF_CODEC
from ..io.json import read_json
from ..spec import PUBLISHED, GPT2Config
from .find import Source
from .recognise import Parameters

MAX_JSON = 1 << 20
INERT = ("token_id", "pdrop")  # ends of fields that do not change the logits: two files may differ in them


@dataclass(frozen=True)
class Stated:
    """The fields of GPT2Config that files and the user state, and where."""

    fields: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Resolved:
    """The configuration. ``head_stated_in`` is the place that states whether ``lm_head`` is tied, if any does."""

    config: GPT2Config
    notes: list[str]
    stated_in: str
    is_stated: bool
    head_stated_in: str | None


# ------------------------------------------------------------------------------------------------- what files state


def read_configuration(source: Source, container: Container, activation_function: str | None = None) -> Stated:
    """Read the configuration inside the weights and beside them.

    A lone file's own configuration is enough. For a directory, and for files that state sizes only (nanoGPT), those
    beside it are read, too.

    Raises:
        ConfigError: if one is invalid.
        CheckpointError: if two disagree.
    """
    inside = embedded_configuration(container)
    fields = inside.fields(f"{container.path}: its metadata") if inside else {}
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
        return BY_NAME[container.format].embedded(container) if container.format in BY_NAME else None
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
            found = CONFIG_FILES[name].read(read_json(path, MAX_JSON), str(path))
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


# ------------------------------------------------------------------------------------------- with what the shapes show


def resolve(parameters: Parameters, stated: Stated, n_head: int | None = None) -> Resolved:
    """One configuration from what is stated and what the shapes show.

    Raises:
        ConfigError: if they contradict one another, or nothing states ``n_head``.
    """
    path, dialect = parameters.path, parameters.dialect
    assumed = {key: value for key, value in dialect.assumes.items() if key not in stated.fields}
    fields = dict(stated.fields)
    if parameters.n_vocab:
        fields["n_vocab"] = parameters.n_vocab
    _check_sizes(fields, parameters.sizes, n_head, path, stated.where)
    is_stated = bool(fields)
    notes = []
    if "n_head" not in fields:
        fields["n_head"], note = _find_heads(parameters.sizes, n_head, path)
        notes.append(note)
    for key, value in assumed.items():
        notes.append(f"{key} is {value}, as in {dialect.name}'s code")
    try:
        config = GPT2Config(**{**fields, **assumed, **parameters.sizes})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    head_stated_in = stated.where if "tie_word_embeddings" in stated.fields else None
    return Resolved(config, notes, stated.where, is_stated, head_stated_in)


def _check_sizes(
    fields: Mapping[str, Any], sizes: Mapping[str, int], n_head: int | None, path: Path, where: str
) -> None:
    faults = []
    for name, value in sizes.items():
        if fields.get(name, value) != value:
            faults.append(f"{name} is {value} in the tensors, {fields[name]!r} in {where}")
    if n_head is not None and fields.get("n_head", n_head) != n_head:
        faults.append(f"n_head is {fields['n_head']!r} in {where}, but --n-head is {n_head}")
    if faults:
        raise ConfigError.listing(f"{path}: the configuration and the tensors disagree", faults)


def _find_heads(sizes: Mapping[str, int], n_head: int | None, path: Path) -> tuple[int, str]:
    """The number of heads, and a note: the published model's with these sizes, or else the user's."""
    key = (sizes["n_embd"], sizes["n_layer"], sizes["n_vocab"], sizes["n_ctx"])
    if key not in PUBLISHED:
        if n_head is None:
            raise _unknown_heads(sizes, path)
        return n_head, f"n_head is {n_head}, as given"
    name, published = PUBLISHED[key]
    if n_head not in (None, published):
        raise ConfigError(
            f"{path}: the tensors have the shapes of the published {name}, which has {published} heads, but --n-head is {n_head}.\n"
            "If it is another model, put a config.json beside it that states n_head"
        )
    return (
        published,
        f"n_head is {published}: no configuration states it; the tensors have the shapes of the published {name}",
    )


def _unknown_heads(sizes: Mapping[str, int], path: Path) -> UnknownHeadsError:
    guess = max(1, sizes["n_embd"] // 64)
    return UnknownHeadsError(
        f"{path}: unknown number of attention heads: the tensors do not show it, and there is no config.json or hparams.json beside them.\n"
        f"Pass --n-head N (published models have a head_dim of 64, which would be {guess} heads here)"
    )
