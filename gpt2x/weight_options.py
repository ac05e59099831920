"""The options that say how weights are opened, for every command and function that opens a model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TypedDict

# Options that select or change weights, and why they need weights.
OF_WEIGHTS = {
    "adapter": "an adapter is merged into weights",
    "entry": "--entry is for weights",
    "prefix": "--prefix is for weights",
    "tie": "--tie and --untie are for weights",
}


class WeightOptions(TypedDict, total=False):
    """How weights are opened: arguments of ``open_checkpoint``."""

    n_head: int | None
    adapter: str | Path | None
    entry: str | None
    prefix: str | None
    tie: bool | None
    ignore_config_keys: Collection[str]


def why_weights(options: WeightOptions) -> str | None:
    """Why options need weights, not another kind of model; None if they do not."""
    return next((reason for name, reason in OF_WEIGHTS.items() if options.get(name) is not None), None)
