"""GPT-2 as a file that torch runs without gpt2x: TorchScript, and ``torch.export``'s ``.pt2``, with the same interface.

Both hold ``config.json`` (Hugging Face's) among their extra files.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import torch
from torch import nn
from torch.fx.experimental import _config as fx_config

from converters import Checkpoint, DestinationError
from converters.io.publishing import staged_file

from ..load import model_of
from ..task_heads import body_of, config_json, heads_of
from ..tasks import GENERATION, LOGITS, check_outputs
from .interface import (
    dynamic_shapes,
    example_inputs,
    exported_module,
    task_dynamic_shapes,
    task_example_inputs,
)

CONFIG = "config.json"
WHOLE = ".gpt2.whole"  # a temporary file; torch names the folder in the archive after it, up to the last dot
PROGRAM = 100_000  # bytes for each layer, more than a program needs beside its weights


def export_torchscript(
    checkpoint: Checkpoint,
    path: str | Path,
    *,
    force: bool = False,
    task: str = GENERATION,
    outputs: Sequence[str] = (LOGITS,),
) -> int:
    """Write a checkpoint as TorchScript: scripted, not traced, for any batch and any lengths.

    ``torch.jit.load`` returns a module whose ``forward(input_ids, attention_mask, position_ids, past)`` is
    ``gpt2x.export.interface.Interface``'s. With outputs besides the logits, it also returns a dictionary of them. Of other
    tasks, ``forward(input_ids, attention_mask)`` is that of the module in ``gpt2x.task_models``.

    Args:
        task: one of ``gpt2x.tasks.TASKS``.
        outputs: of text generation: ``logits`` and any of ``gpt2x.tasks.EXTRAS``.

    Returns:
        The size of the file in bytes.

    Raises:
        CheckpointError: if the checkpoint does not have the head that the task or an output needs.
        DestinationError: if the destination exists or cannot be written. The old file then stays.
    """
    program = _program_of(checkpoint, task, outputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch prefers torch.export, which --pt2 is for
        module = torch.jit.script(program.module)
        extra = program.extra
        return _save(program.checkpoint, path, force, lambda file: _without_paths(module.save, file, extra), copies=2)


def export_pt2(
    checkpoint: Checkpoint,
    path: str | Path,
    *,
    force: bool = False,
    task: str = GENERATION,
    outputs: Sequence[str] = (LOGITS,),
) -> int:
    """Write a checkpoint as a program of ``torch.export``, with the same interface, for any batch and any lengths.

    Arguments as of ``export_torchscript``.

    Returns:
        The size of the file in bytes.

    Raises:
        CheckpointError: if the checkpoint does not have the head that the task or an output needs.
        DestinationError: if the destination exists or cannot be written. The old file then stays.
    """
    whole = _program_of(checkpoint, task, outputs)
    # Otherwise torch takes sizes 0 and 1 for constants, and refuses an empty cache or a single token.
    with torch.no_grad(), fx_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = torch.export.export(whole.module, whole.inputs, dynamic_shapes=whole.shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds paths of this machine
    _drop_constraints_on_sums(program.range_constraints)
    return _save(whole.checkpoint, path, force, lambda file: torch.export.save(program, file, extra_files=whole.extra))


def _drop_constraints_on_sums(constraints: dict[Any, Any]) -> None:
    """Keep only the constraints on single symbols.

    ``torch.export.load`` reads the key ``s13 + s70`` (cached and new tokens) as the name of a symbol, and then
    ``run_decompositions`` fails. The sum has no limits of its own, so nothing is lost.
    """
    for expression in list(constraints):
        if not expression.is_Symbol:
            del constraints[expression]


@dataclass(frozen=True)
class _Program:
    """A module to export, its example inputs with their dynamic dimensions, and what the file says of it.

    Args:
        checkpoint: whose tensors the module has, without its heads.
    """

    checkpoint: Checkpoint
    module: nn.Module
    inputs: tuple[Any, ...]
    shapes: tuple[Any, ...]
    extra: dict[str, Any]


def _program_of(checkpoint: Checkpoint, task: str, outputs: Sequence[str]) -> _Program:
    outputs = check_outputs(outputs, task)
    if task != GENERATION:
        checkpoint = body_of(checkpoint)
    config, heads = checkpoint.config, heads_of(checkpoint, task, outputs)
    model = model_of(checkpoint)
    module = exported_module(model, task, outputs, heads)
    inputs, shapes = example_inputs(config), dynamic_shapes(config)
    if task != GENERATION:
        inputs, shapes = task_example_inputs(), task_dynamic_shapes()
    extra = {CONFIG: json.dumps(config_json(checkpoint, task, heads.labels), sort_keys=True)}
    # For inference: with gradients, the memory of a cache would grow with every token.
    return _Program(checkpoint, module.eval().requires_grad_(False), inputs, shapes, extra)


def _save(checkpoint: Checkpoint, path: str | Path, force: bool, write: Callable[[str], Any], copies: int = 1) -> int:
    if any(file.exists() and Path(path).exists() and file.samefile(path) for file in checkpoint.files):
        raise DestinationError(f"{path}: is the source itself: choose another path")
    # torch ends the process if it cannot write, so the room is checked first.
    size = 4 * checkpoint.parameters + PROGRAM * (checkpoint.config.n_layer + 4)
    with staged_file(Path(path), [size] * copies, force) as staged:
        write(str(staged))
        return staged.stat().st_size


def _without_paths(save: Callable[..., Any], path: str, extra: dict[str, Any]) -> None:
    """Save TorchScript without its debug tables, which hold paths of this machine."""
    whole = str(Path(path).with_name(WHOLE))
    save(whole, _extra_files=extra)
    with ZipFile(whole) as source, ZipFile(path, "w", ZIP_STORED) as target:
        for member in source.infolist():
            if not member.filename.endswith(".debug_pkl"):
                with source.open(member) as data, target.open(ZipInfo(member.filename), "w", force_zip64=True) as out:
                    shutil.copyfileobj(data, out, 1 << 20)
    Path(whole).unlink()
