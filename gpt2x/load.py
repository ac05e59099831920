"""Checkpoint -> GPT2, and back. Loading maps the file if its bytes are the model's own; then nothing is copied."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from converters import Checkpoint, CheckpointError, LazyTensor, UnknownHeadsError, open_checkpoint
from converters.opening import tokenizer_in
from converters.spec import SIZES
from converters.tensors import BF16, DTYPES

from .model import GPT2
from .weight_options import WeightOptions

TORCH_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}


def load_model(model: GPT2, path: str | Path, **options: Unpack[WeightOptions]) -> GPT2:
    """Fill ``model`` with the weights of a file of any supported format, and put it into eval mode.

    The file is memory-mapped privately: pages are read when they are used, and training the model never writes the file.

    Args:
        model: receives the weights; its dtype and device stay.
        path: anything that ``gpt2x convert`` reads. A file without a configuration is assumed to have the model's own.
        options: how the weights are opened; see ``open_checkpoint``.

    Returns:
        The same object.

    Raises:
        CheckpointError: if shapes or the configuration of the file differ from the model's.
        ConversionError: if the file cannot be read as a GPT-2.
    """
    try:
        checkpoint = open_checkpoint(path, **options)
    except UnknownHeadsError:
        options["n_head"] = model.config.n_head
        checkpoint = open_checkpoint(path, **options)
    names = None if checkpoint.stated else (*SIZES, "tie_word_embeddings")
    faults = checkpoint.config.differences(model.config, names)
    if faults:
        raise CheckpointError.listing(f"{path}: does not fit into this model", faults)
    return fill(model, checkpoint).eval()


def from_pretrained(path: str | Path, **options: Unpack[WeightOptions]) -> GPT2:
    """Return a model in eval mode with the configuration and the weights of a file of any supported format.

    Args:
        options: how the weights are opened; see ``open_checkpoint``.

    Raises:
        ConversionError: if the file cannot be read as a GPT-2.
    """
    return model_of(open_checkpoint(path, **options))


def model_of(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> GPT2:
    """Return a model in eval mode with the weights of an open checkpoint."""
    # Without memory for weights that are replaced at once.
    with torch.device("meta"):
        model = GPT2(checkpoint.config).to(dtype)
    return fill(model, checkpoint, torch.device("cpu")).eval()


def fill(model: GPT2, checkpoint: Checkpoint, device: torch.device | None = None) -> GPT2:
    """Put the weights of a checkpoint with the same shapes into a model."""
    like = model.wte.weight
    state = {name: tensor.to(device or like.device, like.dtype) for name, tensor in state_of(checkpoint).items()}
    # The tensors become the parameters, so that a mapped file is not copied.
    model.load_state_dict(state, assign=True)
    return model


def state_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Canonical name -> tensor, memory-mapped from the file if possible."""
    return {name: tensor_of(tensor) for name, tensor in checkpoint.tensors.items()}


def tensor_of(tensor: LazyTensor) -> Tensor:
    """One tensor, memory-mapped from the file if possible."""
    array = torch.from_numpy(tensor.map())
    return array.view(torch.bfloat16) if tensor.dtype == BF16 else array


def checkpoint_of(model: GPT2, tokenizer: str | Path | None = None) -> Checkpoint:
    """Return a model as a checkpoint that ``converters.save_checkpoint`` writes.

    Args:
        tokenizer: a directory, or a GGUF file, with the tokenizer to write beside the weights.
    """
    found = tokenizer_in(Path(tokenizer)) if tokenizer is not None else None
    tensors = {name: _lazy(tensor.detach().cpu()) for name, tensor in model.state_dict().items()}
    return Checkpoint(config=model.config, tensors=tensors, tokenizer=found)


def _lazy(tensor: Tensor) -> LazyTensor:
    dtype = DTYPES[TORCH_DTYPES[tensor.dtype]]
    return LazyTensor.of((tensor.view(torch.uint16) if dtype == BF16 else tensor).numpy(), dtype)
