"""An ONNX model for a task other than text generation. Needs numpy and onnxruntime, and never imports torch.

model = OnnxTask("classifier-onnx/")
logits = model.run(*pad_rows([tokenizer.encode(text) for text in texts]))["logits"]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from converters import CheckpointError, FormatError
from converters.containers.onnx import read_metadata
from converters.head_config import Labels, head_settings, labels_of
from converters.io.json import parse_json

from .. import contract
from ..contract import Slot
from ..precisions import PRECISIONS
from ..tasks import GENERATION, TASKS
from .base import Ids
from .onnx_model import (
    SessionSettings,
    block_size,
    differences,
    find_model,
    load_file,
    refuse_differences,
    run_session,
    slots,
)
from .onnx_providers import Provider, runtime_name
from .task_model import Outputs, TaskModel, check_rows


class OnnxTask(TaskModel):
    """A model that ``gpt2x export --onnx DIR --task TASK`` wrote.

    Args:
        path: the directory, or an ``.onnx`` file.
        precision: which model of a directory; by default fp32, or else the only one.
        threads: threads for each operator; by default one for each core.
        optimize: enable ONNX Runtime's graph optimizations.
        providers: ONNX Runtime's execution providers in order of preference; each a name, or a name and its options.

    Raises:
        FormatError: if there is no model, it is damaged, has another precision, or is one for text generation.
        CheckpointError: if its inputs and outputs are not the contract's.
        ConfigError: if its configuration or its labels are invalid.
        ValueError: if the number of threads is out of range, or this ONNX Runtime has no such provider.
    """

    path: Path

    def __init__(
        self,
        path: str | Path,
        *,
        precision: str | None = None,
        threads: int | None = None,
        optimize: bool = True,
        providers: str | Sequence[Provider] = ("CPUExecutionProvider",),
    ) -> None:
        settings = SessionSettings(threads, optimize, providers)
        self.path = find_model(path, precision)
        self.metadata = read_metadata(self.path)
        self.task = task_in(self.path, self.metadata)
        loaded = load_file(self.path, self.metadata, precision, settings)
        self.config = loaded.config
        self.precision = loaded.precision
        self._session = loaded.session
        self.inputs, self.outputs = slots(self._session.get_inputs()), slots(self._session.get_outputs())
        self._check()
        self.labels = self._labels()
        self.runtime = f"{self.path.name} in {runtime_name(settings.providers)}"

    def run(self, input_ids: Ids, attention_mask: Ids | None = None) -> Outputs:
        """As ``TaskModel.run``.

        Raises:
            InputError: if the arguments do not fit the model or one another.
            FormatError: if ONNX Runtime fails.
        """
        ids, mask = check_rows(input_ids, attention_mask, self.config)
        feed = {"input_ids": ids, "attention_mask": mask}
        return run_session(self._session, self.path, list(self.outputs), feed)

    def _check(self) -> None:
        """Compare inputs and outputs with the contract."""
        if self.precision not in PRECISIONS or self.metadata.get(contract.CONTRACT) != contract.OF_TASKS:
            raise CheckpointError(f"{self.path}: unknown kind of model: a newer gpt2x may have written it")
        block_size(self.metadata)
        expected = contract.task_outputs(self.task, self.config, self._label_count())
        faults = [
            *differences("input", contract.task_inputs(), self.inputs),
            *differences("output", expected, self.outputs),
        ]
        refuse_differences(self.path, faults)

    def _label_count(self) -> int | str:
        """The size of the last axis of the logits, which the labels must fit."""
        slot = self.outputs.get("logits", Slot("", ()))
        return slot.shape[-1] if slot.shape else "num_labels"

    def _labels(self) -> Labels | None:
        if TASKS[self.task].head is None:
            return None
        where = f"{self.path}: its metadata"
        settings = head_settings(parse_json(self.metadata.get(contract.CONFIG, "{}").encode(), where))
        count = self._label_count()
        if not isinstance(count, int):
            raise CheckpointError(f"{self.path}: the number of labels in its logits is not fixed")
        return labels_of(settings, count, where)


def task_in(path: Path, metadata: Mapping[str, str]) -> str:
    """The task of a model, by its metadata.

    Raises:
        FormatError: if it is one for text generation, or an unknown one.
    """
    task = metadata.get(contract.TASK, GENERATION)
    if task == GENERATION:
        raise FormatError(f"{path}: a model for text generation; open it with OnnxDecoder")
    if task not in TASKS:
        raise FormatError(f"{path}: unknown task {task[:50]!r}: a newer gpt2x may have written it")
    return task
