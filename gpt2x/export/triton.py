"""A model repository for Triton Inference Server.

    DIR/gpt2_step/1/model.onnx      the ONNX model, with its weights beside it, for the ONNX Runtime backend
    DIR/gpt2/1/model.py             text in, text out: tokenizer and decoding loop, for the Python backend
    DIR/gpt2_stream/1/model.py      the same, with the text in pieces

Each model has a ``config.pbtxt``. Its fields are those of Triton's ``model_config.proto``.
"""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

from converters import Checkpoint, TokenizerError
from converters.io.publishing import check_free, new_directory, write_small
from converters.saving import Progress, Warn

from .. import contract
from ..contract import Slot
from ..tokenizer import Tokenizer
from .onnx_directory import export_onnx
from .onnx_plan import TOKENIZER
from .options import DEFAULT_OPTIONS, Exported, ExportOptions

STEP, TEXT, STREAM = "gpt2_step", "gpt2", "gpt2_stream"
MODEL = f"{STEP}/1/model.onnx"
WORK = ".onnx"  # a directory for the export, which is removed

TYPES = {
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "int8": "TYPE_INT8",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "string": "TYPE_STRING",
}
ONE = (1,)
TEXT_INPUTS = {
    "text": Slot("string", ONE),
    "max_tokens": Slot("int32", ONE),
    "temperature": Slot("float32", ONE),
    "top_k": Slot("int32", ONE),
    "top_p": Slot("float32", ONE),
    "seed": Slot("int64", ONE),
}
REQUIRED = "text"


def export_triton(
    checkpoint: Checkpoint,
    path: str | Path,
    options: ExportOptions = DEFAULT_OPTIONS,
    *,
    force: bool = False,
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> Exported:
    """Write a checkpoint as a Triton model repository. All files appear at once, or none.

    Args:
        options: of one precision, without ``safetensors``.
        force: replace existing files.
        progress: called with the number of tensor bytes read, as they are read.
        warn: called with a sentence if a tensor holds NaN or infinity.

    Raises:
        TokenizerError: if there is no tokenizer, or it is not a byte-level BPE.
        DestinationError: if the destination exists, holds another version of the models, or cannot be written.
        ConversionError: if the source is damaged, or a precision cannot represent it.
        ValueError: if the options name several precisions, or ``safetensors``.
    """
    path = Path(path)
    if len(options.precisions) != 1 or options.safetensors:
        raise ValueError("a Triton model repository has one precision, and no safetensors")
    check_free(path, force, directory=True)
    end_token = _end_token(checkpoint)
    with new_directory(path, force, _other_versions) as stage:
        export_onnx(checkpoint, stage / WORK, options, progress=progress, warn=warn)
        _arrange(stage, options.chosen[0].model_file)
        write_small(stage, _configurations(checkpoint, options, end_token))
        written = sorted(str(file.relative_to(stage)) for file in stage.rglob("*") if file.is_file())
        size = sum((stage / name).stat().st_size for name in written)
    _remove_old_weights(path, written)
    return Exported(path, size, tuple(written))


def _end_token(checkpoint: Checkpoint) -> int:
    """``<|endoftext|>``: the tokenizer's, or else the configuration's; -1 if there is none."""
    if checkpoint.tokenizer is None:
        raise TokenizerError("a Triton model repository needs a tokenizer; say where one is: --tokenizer DIR")
    end = Tokenizer.from_files(checkpoint.tokenizer).eos_token_id
    if end is None:
        end = checkpoint.config.eos_token_id
    return -1 if end is None else end


def _other_versions(path: Path) -> list[str]:
    """Other versions of the models, which Triton would serve in place of the new ones."""
    found = []
    for model in (STEP, TEXT, STREAM):
        for version in sorted((path / model).glob("[0-9]*/*")):
            if version.parent.name != "1":
                found.append(version.relative_to(path).as_posix())
    return found


def _arrange(stage: Path, model_file: str) -> None:
    """Put the files of an ONNX export into their places."""
    work = stage / WORK
    for name in (STEP, TEXT, STREAM):
        (stage / name / "1").mkdir(parents=True)
    (work / model_file).rename(stage / MODEL)
    for weights in (work / "onnx").iterdir():
        weights.rename(stage / STEP / "1" / weights.name)  # the graph has the name
    program = files(__package__).joinpath("triton_model.py").read_bytes()
    tokenizer = (work / TOKENIZER).read_bytes()
    for name in (TEXT, STREAM):
        write_small(stage / name / "1", {"model.py": program, TOKENIZER: tokenizer})
    shutil.rmtree(work)


def _remove_old_weights(path: Path, written: list[str]) -> None:
    """Remove the weights of a model that was replaced."""
    for file in (path / STEP / "1").glob("model*.onnx_data"):
        if file.relative_to(path).as_posix() not in written:
            file.unlink()


# -------------------------------------------------------------------------------------------------- config.pbtxt


def _configurations(checkpoint: Checkpoint, options: ExportOptions, end_token: int) -> dict[str, bytes]:
    """``config.pbtxt`` of each model."""
    config, precision = checkpoint.config, options.precisions[0]
    parameters = {
        "step": "triton",
        "layers": str(config.n_layer),
        "heads": str(config.n_head),
        "head_size": str(config.head_dim),
        "context": str(config.n_ctx),
        "vocabulary": str(config.n_vocab),
        "end_token": str(end_token),
        "cache_dtype": contract.cache_type(precision, options.cache),
    }
    inputs = contract.inputs(config, precision, options.cache)
    outputs = contract.outputs(config, options.last, precision, options.cache)
    texts = {
        TEXT: [],
        STREAM: ["model_transaction_policy { decoupled: true }"],
    }
    found = {f"{STEP}/config.pbtxt": _model(STEP, "onnxruntime", inputs, outputs, [])}
    for name, policy in texts.items():
        more = [*policy, *_parameters(parameters)]
        found[f"{name}/config.pbtxt"] = _model(name, "python", TEXT_INPUTS, {"text": Slot("string", ONE)}, more)
    return {name: text.encode() for name, text in found.items()}


def _model(name: str, backend: str, inputs: dict[str, Slot], outputs: dict[str, Slot], more: list[str]) -> str:
    """A ``ModelConfig`` in protobuf's text format.

    ``max_batch_size`` is 0: the first dimension is the model's own. Triton would otherwise batch rows with caches of
    different lengths, which it cannot pad.
    """
    lines = [
        f'name: "{name}"',
        f'backend: "{backend}"',
        "max_batch_size: 0",
        *[_slot("input", slot_name, slot, backend) for slot_name, slot in inputs.items()],
        *[_slot("output", slot_name, slot, backend) for slot_name, slot in outputs.items()],
        "instance_group { count: 1 kind: KIND_CPU }",
        *more,
    ]
    return "\n".join(lines) + "\n"


def _slot(kind: str, name: str, slot: Slot, backend: str) -> str:
    """An input or output. A size that varies is -1."""
    sizes = [size if isinstance(size, int) else -1 for size in slot.shape]
    optional = " optional: true" if kind == "input" and backend == "python" and name != REQUIRED else ""
    dims = ", ".join(map(str, sizes))
    return f'{kind} {{ name: "{name}" data_type: {TYPES[slot.dtype]} dims: [ {dims} ]{optional} }}'


def _parameters(values: dict[str, str]) -> list[str]:
    return [f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in values.items()]
