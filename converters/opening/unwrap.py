"""Step 4: take off what training frameworks put around the tensors of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..containers.container import Container
from ..errors import CheckpointError
from ..tensors import LazyTensor

MAX_NAME = 256
WRAPPERS = ("module.", "_orig_mod.", "model.", "params/")  # DataParallel, torch.compile, Lightning, Flax
# What MLX, GPTQ, AWQ and bitsandbytes store beside, or instead of, weights that they quantize.
QUANTIZED = (".scales", ".qweight", ".qzeros", ".absmax", ".SCB", ".quant_map")


def unwrap(container: Container) -> Container:
    """The same tensors without the prefixes of wrappers.

    Raises:
        CheckpointError: if there are no tensors, quantized ones, or names that no GPT-2 has.
    """
    _check_names(container)
    return replace(container, tensors=_without_prefixes(container.tensors))


def _check_names(container: Container) -> None:
    if not container.tensors:
        raise CheckpointError(f"{container.path}: no tensors in it")
    for name in container.tensors:
        if name.endswith(QUANTIZED):
            raise CheckpointError(
                f"{container.path}: quantized weights (it holds {name[:100]}), which are rounded; convert the model that it was made from"
            )
    for name in container.tensors:
        if len(name) > MAX_NAME:
            raise CheckpointError(
                f"{container.path}: not a GPT-2: the tensor name {name[:60]!r}... has {len(name)} characters"
            )


def _without_prefixes(tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
    """Wrappers may be nested in any order, hence two rounds."""
    for wrapper in WRAPPERS * 2:
        if all(name.startswith(wrapper) for name in tensors) and _is_wrapper(wrapper, tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


def _is_wrapper(prefix: str, tensors: Mapping[str, LazyTensor]) -> bool:
    """``model.`` is MLX's own prefix, too. It wraps a model only where ``transformer.`` follows it."""
    return prefix != "model." or any(name.startswith("model.transformer.") for name in tensors)
