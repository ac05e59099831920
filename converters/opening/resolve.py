"""Step 6: resolve the configuration from what is stated, what the shapes show, and what the user says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, UnknownHeadsError
from ..spec import PUBLISHED, GPT2Config
from ..tensors import LazyTensor
from .read_configuration import Stated
from .recognise_dialect import Parameters


@dataclass(frozen=True)
class Resolved:
    """The configuration. ``head_stated_in`` is the place that states whether ``lm_head`` is tied, if any does.

    ``head_settings`` are those of heads other than ``lm_head``.
    """

    config: GPT2Config
    notes: list[str]
    stated_in: str
    is_stated: bool
    head_stated_in: str | None
    head_settings: Mapping[str, Any] = field(default_factory=dict)


def resolve(parameters: Parameters, stated: Stated, n_head: int | None = None) -> Resolved:
    """One configuration from what is stated and what the shapes show.

    Raises:
        ConfigError: if they contradict one another, or nothing states ``n_head``.
    """
    path, dialect = parameters.container.path, parameters.dialect
    sizes = _sizes(parameters.tensors, parameters.n_layer, path)
    assumed = {key: value for key, value in dialect.assumes.items() if key not in stated.fields}
    fields = dict(stated.fields)
    if parameters.n_vocab:
        fields["n_vocab"] = parameters.n_vocab
    _check_sizes(fields, sizes, n_head, path, stated.where)
    is_stated = bool(fields)
    notes = list(stated.notes)
    if "n_head" not in fields:
        fields["n_head"], note = _find_heads(sizes, n_head, path)
        notes.append(note)
    for key, value in assumed.items():
        unless = f"; {dialect.unless}" if dialect.unless else ""
        notes.append(f"{key} is {value}, as in {dialect.name}'s code{unless}")
    try:
        # Sizes last: the shapes show them, and what contradicts them was refused above.
        config = GPT2Config(**{**fields, **assumed, **sizes})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    head_stated_in = stated.where if "tie_word_embeddings" in stated.fields else None
    return Resolved(config, notes, stated.where, is_stated, head_stated_in, stated.heads)


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
        raise ConfigError.listing(f"{path}: the configuration and the tensors disagree", faults, _advice(faults))


def _advice(faults: list[str]) -> str:
    """What helps if tokens were added without a new configuration: the tensors show the size."""
    is_vocabulary = len(faults) == 1 and faults[0].startswith("n_vocab")
    return "If the tensors are right, pass --ignore-config-key vocab_size" if is_vocabulary else ""


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


def _sizes(tensors: Mapping[str, LazyTensor], n_layer: int, path: Path) -> dict[str, int]:
    """What the shapes alone state of the configuration."""
    wte = tensors["wte.weight"].shape  # (V, C)
    wpe = tensors["wpe.weight"].shape  # (T, C)
    fc = tensors["h.0.mlp.c_fc.weight"].shape  # (C, F)
    if not len(wte) == len(wpe) == len(fc) == 2:
        raise CheckpointError(
            f"{path}: wte, wpe and mlp.c_fc must be matrices, not {list(wte)}, {list(wpe)} and {list(fc)}"
        )
    return {"n_vocab": wte[0], "n_embd": wte[1], "n_ctx": wpe[0], "n_inner": fc[1], "n_layer": n_layer}
