"""Compare an export for a task, or one with further outputs, with its source: through transformers, and in float64."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from converters import Checkpoint
from converters.head_config import Labels

from ..precisions import PRECISIONS, Bounds
from ..runtimes.base import Decoder
from ..runtimes.reference import ReferenceTask, apply_head
from ..runtimes.task_model import Outputs, TaskModel
from ..task_heads import body_of, heads_of
from . import packages
from .checks import Check, failed
from .metrics import FP32, widened
from .sample_text import sample_ids
from .task_runs import (
    LONGEST,
    Row,
    RowRun,
    bounds_for,
    compare_outputs,
    compare_task,
    expected_rows,
    measured_error,
    one_row,
    rows_of,
)

log = logging.getLogger(__name__)
FLOAT64 = "float64"


@dataclass(frozen=True)
class Reference:
    """What an export is compared with.

    Args:
        name: in the names of checks.
        runtime: for the report.
        run: the outputs of one row.
        rows: the tokens that it runs: the float64 reference, which is slow, no full context.
    """

    name: str
    runtime: str
    run: RowRun
    rows: list[list[int]]


def references(a: Checkpoint, task: str, ids: Sequence[int]) -> list[Reference]:
    """The references of a task: transformers' class, or gpt2x's own model if it is missing; and the float64 one."""
    rows = rows_of(ids)
    found = []
    if packages.installed("transformers") and packages.installed("torch"):
        from ..runtimes.transformers import TransformersTask

        theirs = TransformersTask(a, task)
        found.append(Reference("transformers", theirs.runtime, one_row(theirs), [list(ids), *rows]))
    elif packages.installed("torch"):
        from ..runtimes.torch_task import TorchTask

        ours = TorchTask.of(a, task)
        found.append(Reference("torch", ours.runtime, one_row(ours), [list(ids), *rows]))
    exact = ReferenceTask(a, task)
    return [*found, Reference(FLOAT64, exact.runtime, one_row(exact), rows)]


# --------------------------------------------------------------------------------------------------- exports for a task


def compare_labels(a: Labels | None, b: Labels | None) -> list[Check]:
    """Compare the labels of two classifiers; no check if neither has any."""
    if a is None and b is None:
        return []
    same = a is not None and b is not None and a.names == b.names and a.problem_type == b.problem_type
    return [Check("labels", same, "the same" if same else "the names or the problem type differ")]


def run_task(a: Checkpoint, model: TaskModel, text: str | None = None) -> list[Check]:
    """Run an export for a task and its references on rows of a text.

    Some models lose more in few bits than others. If one is out of its precision's bounds, they are measured on this very model.
    """
    a = body_of(a)
    ids, described = sample_ids(a.config, a.tokenizer, text)
    against = references(a, model.task, ids)
    runtimes = f"{model.runtime} against {' and '.join(one.runtime for one in against)}"
    log.info("running %s on %d tokens", runtimes, len(ids))
    remarks = [Check("run", None, runtimes), Check("text", None, described)]
    base = PRECISIONS[model.precision].bounds
    expected = {one.name: expected_rows(one.run, one.rows) for one in against}
    bounds = {name: bounds_for(name, base) for name in expected[FLOAT64][0].outputs}
    checks = _compare_all(expected, model, bounds)
    if base == FP32 or not failed(checks) or not packages.can_measure(model.precision):
        return [*remarks, *checks]
    bounds = _measured_bounds(a, model, expected[FLOAT64], bounds)
    remark = Check(
        "bounds", None, f"measured: {model.precision} loses more on this model than on most, in exact arithmetic, too"
    )
    return [*remarks, remark, *_compare_all(expected, model, bounds)]


def _compare_all(expected: dict[str, list[Row]], model: TaskModel, bounds: dict[str, Bounds]) -> list[Check]:
    checks = []
    for name, rows in expected.items():
        full = [row for row in rows if len(row.ids) > LONGEST]
        some = [row for row in rows if len(row.ids) <= LONGEST]
        if full:
            checks += compare_task(full, model, bounds, f"{name}: full context", padded=False)
        checks += compare_task(some, model, bounds, name)
    return checks


def _measured_bounds(a: Checkpoint, model: TaskModel, rows: list[Row], bounds: dict[str, Bounds]) -> dict[str, Bounds]:
    """Bounds by what exact arithmetic with the model's stored weights loses."""
    run = one_row(_exact_task(a, model, model.task))
    return _widened(bounds, model, rows, [run(row.ids) for row in rows])


def _exact_task(a: Checkpoint, model: Decoder | TaskModel, task: str) -> TaskModel:
    """The model of a task in exact arithmetic, with the weights that an ONNX model stores."""
    from ..runtimes.torch_task import TorchTask
    from .exact_arithmetic import rounded_model

    exact: Any = rounded_model(a, model)
    return TorchTask.around(exact.model, task, heads_of(a, task))


def _widened(
    bounds: dict[str, Bounds], model: Decoder | TaskModel, rows: list[Row], exact: Sequence[Outputs]
) -> dict[str, Bounds]:
    """Bounds of at least some multiple of the error that exact arithmetic has in each output."""
    times = PRECISIONS[model.precision].exact_multiple
    return {name: widened(bound, measured_error(rows, exact, name), times) for name, bound in bounds.items()}


# ------------------------------------------------------------------------------------- further outputs of text generation


def compare_extras(a: Checkpoint, model: Decoder, bounds: Bounds, text: str | None = None) -> list[Check]:
    """Compare the outputs besides the logits of a model for text generation; no check if it has none.

    Args:
        bounds: of its logits. If it is out of them, they are measured on this very model.
    """
    run = model.extra_outputs
    names = tuple(run(np.zeros((1, 1), np.int64)))
    if not names:
        return []
    ids, _ = sample_ids(a.config, a.tokenizer, text)
    expected = {
        one.name: _last_of(expected_rows(_extras_of(a, names, one.run), one.rows), model.last_only)
        for one in references(body_of(a), "feature-extraction", ids)
    }
    limits = {name: bounds_for(name, bounds) for name in names}
    checks = _compare_extras(expected, run, limits)
    if bounds == FP32 or not failed(checks) or not packages.can_measure(model.precision):
        return checks
    exact = one_row(_exact_task(a, model, "feature-extraction"))
    rows = expected[FLOAT64]
    found = _last_of(expected_rows(_extras_of(a, names, exact), [row.ids for row in rows]), model.last_only)
    limits = _widened(limits, model, rows, [row.outputs for row in found])
    return _compare_extras(expected, run, limits)


def _compare_extras(expected: dict[str, list[Row]], run: Any, bounds: dict[str, Bounds]) -> list[Check]:
    checks = []
    for name, rows in expected.items():
        found = []
        for row in rows:
            outputs = run(np.array([row.ids], np.int64))
            found.append({key: array[0] for key, array in outputs.items()})
        checks += compare_outputs(rows, found, bounds, name)
    return checks


def _last_of(rows: list[Row], last_only: bool) -> list[Row]:
    """The outputs of the last position only, if a model returns no others."""
    if not last_only:
        return rows
    return [Row(row.ids, {name: array[-1:] for name, array in row.outputs.items()}) for row in rows]


def _extras_of(a: Checkpoint, names: Sequence[str], run: RowRun) -> RowRun:
    """Outputs by the final hidden states that a reference returns."""
    heads = heads_of(a, outputs=names)

    def extras(ids: Sequence[int]) -> Outputs:
        states = run(ids)["last_hidden_state"]  # (T, C)
        found = {name: apply_head(part, states)[:, 0] for name, part in heads.parts.items()}
        return {name: found.get(name, states) for name in names}

    return extras
