"""A model for a task, or one with further outputs, against a reference: rows alone, and in a batch padded on either side.

The reference runs one row at a time, without padding. Each output of the model under test must be the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..precisions import Bounds
from ..runtimes.task_model import Outputs, TaskModel, pad_rows
from ..tasks import LOGITS
from .checks import Check
from .metrics import FP32, Array, measure
from .scenarios import verdict

ROWS = 12
LONGEST = 64  # tokens of a row, but for the first, which may fill the context
PER_TOKEN = ("last_hidden_state", "hidden_states", "values", "mc_logits")
RowRun = Callable[[Sequence[int]], Outputs]  # the outputs of one row, each without the axis of the batch


@dataclass(frozen=True)
class Row:
    """Tokens, and the reference's outputs for them."""

    ids: list[int]
    outputs: Outputs


def rows_of(ids: Sequence[int], longest: int = LONGEST) -> list[list[int]]:
    """Rows of unequal lengths from different places of a text, the shortest of one token."""
    longest = min(longest, len(ids))
    lengths = [max(1, longest * (ROWS - i) // ROWS) for i in range(ROWS - 1)] + [1]
    starts = [i * 37 % (len(ids) - length + 1) for i, length in enumerate(lengths)]
    return [list(ids[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def one_row(model: TaskModel) -> RowRun:
    """A model as a function of one row."""

    def run(ids: Sequence[int]) -> Outputs:
        return {name: array[0] for name, array in model.run(np.array([ids], np.int64)).items()}

    return run


def expected_rows(reference: RowRun, rows: Sequence[list[int]]) -> list[Row]:
    """The rows with the reference's outputs."""
    return [Row(ids, reference(ids)) for ids in rows]


def compare_task(
    rows: Sequence[Row], model: TaskModel, bounds: Mapping[str, Bounds], called: str, *, padded: bool = True
) -> list[Check]:
    """Run each row alone, then all of them in one batch, with padding on the left and on the right.

    Args:
        bounds: of each output.
        called: the reference, for the names of the checks.
        padded: whether the batches are run, too.
    """
    run = one_row(model)
    checks = compare_outputs(rows, [run(row.ids) for row in rows], bounds, f"{called}: rows")
    for left in (True, False) if padded else ():
        side = "left" if left else "right"
        checks += compare_outputs(rows, _run_padded(rows, model, left), bounds, f"{called}: {side} padding")
    return checks


def _run_padded(rows: Sequence[Row], model: TaskModel, left: bool) -> list[Outputs]:
    """The outputs of each row out of one batch, without padding."""
    ids, mask = pad_rows([row.ids for row in rows], left=left)
    found = model.run(ids, mask)
    results: list[Outputs] = []
    for i, real in enumerate(mask == 1):
        of_row = {name: array[i] for name, array in found.items()}
        results.append({name: _real(model.task, name, array, real) for name, array in of_row.items()})
    return results


def _real(task: str, name: str, array: Array, real: Array) -> Array:
    """An output of one row without the slots of padding, if it has one value for each slot."""
    is_per_token = name in PER_TOKEN or (name == LOGITS and task == "token-classification")
    found: Array = array[real] if is_per_token else array
    return found


def compare_outputs(
    rows: Sequence[Row], found: Sequence[Outputs], bounds: Mapping[str, Bounds], called: str
) -> list[Check]:
    """A check of each output over all rows."""
    names = rows[0].outputs
    checks = []
    for name in names:
        faults = [f"returns {array.shape}" for array in _misshapen(rows, found, name)]
        if faults:
            checks.append(Check(f"{called}, {name}", False, faults[0]))
        else:
            metrics = measure(*_vectors(rows, found, name))
            inexact = bounds[name].max_abs_error > FP32.max_abs_error
            checks.append(verdict(f"{called}, {name}", metrics, bounds[name], inexact=inexact))
    return checks


def _misshapen(rows: Sequence[Row], found: Sequence[Outputs], name: str) -> list[Array]:
    pairs = zip(rows, found, strict=True)
    return [outputs[name] for row, outputs in pairs if outputs[name].shape != row.outputs[name].shape]


def _vectors(rows: Sequence[Row], found: Sequence[Outputs], name: str) -> tuple[Array, Array]:
    """An output of the reference and of the model over all rows, (n, D) each. Numbers, such as values, have D = 1."""
    width = rows[0].outputs[name].shape[-1]
    if name in ("values", "mc_logits"):
        width = 1
    expected = np.concatenate([row.outputs[name].reshape(-1, width) for row in rows])
    return expected, np.concatenate([outputs[name].reshape(-1, width) for outputs in found])


def bounds_for(name: str, bounds: Bounds) -> Bounds:
    """The bounds of an output, by those of a language model's logits.

    A few logits, or one number, can all be nearly 0 at a position: errors are relative to the largest of all positions only.
    Hidden states are no logits, and have no KL divergence.
    """
    kl = bounds.kl_divergence if name == LOGITS else math.inf
    return replace(bounds, max_rel_error=math.inf, mean_rel_error=math.inf, kl_divergence=kl)


def measured_error(rows: Sequence[Row], found: Sequence[Outputs], name: str) -> Any:
    """The metrics of an output over all rows."""
    return measure(*_vectors(rows, found, name))
