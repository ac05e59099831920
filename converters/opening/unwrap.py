"""Step 4: take out of the names what training frameworks put into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..containers.container import Container
from ..errors import CheckpointError
from ..tensors import LazyTensor

MAX_NAME = 256
# Parts that wrappers add to names, at the front or anywhere. What else stands before every name is a prefix, which step 5 finds.
WRAPPERS = (
    "module",  # DataParallel, DistributedDataParallel, DeepSpeed, AveragedModel
    "_orig_mod",  # torch.compile
    "_forward_module",  # Lightning
    "_fsdp_wrapped_module",  # FullyShardedDataParallel
    "_fpw_module",  # the same in fairscale and PyTorch 1.11
    "_checkpoint_wrapped_module",  # activation checkpointing
    "_module",  # Opacus
)
# What MLX, GPTQ, AWQ and bitsandbytes store beside, or instead of, weights that they quantize.
QUANTIZED = (".scales", ".qweight", ".qzeros", ".absmax", ".SCB", ".quant_map")


def unwrap(container: Container) -> Container:
    """The same tensors without the parts of wrappers in their names, and with a name for each tensor that had several.

    Raises:
        CheckpointError: if there are no tensors, quantized ones, or names that no GPT-2 has; or if two names become one.
    """
    _check_names(container)
    tensors = {**container.tensors, **_other_names(container)}
    tensors, found = _without_wrappers(tensors, container)
    return replace(container, tensors=tensors, wrappers=found)


def _check_names(container: Container) -> None:
    if not container.tensors:
        raise CheckpointError(f"{container.path}: no tensors in it; pass the file that holds the weights of the model")
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


def _other_names(container: Container) -> dict[str, LazyTensor]:
    """The names that ``safetensors.torch.save_model`` removed: of a tensor with several names, it stores one.

    Its metadata has an entry for each: the name that was removed -> the name that was kept.
    """
    tensors = container.tensors
    names = {}
    for removed, kept in container.metadata.items():
        if isinstance(kept, str) and kept in tensors and removed not in tensors and len(removed) <= MAX_NAME:
            names[removed] = tensors[kept]
    return names


def _without_wrappers(
    tensors: Mapping[str, LazyTensor], container: Container
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """The tensors under names without the parts of wrappers, and these parts."""
    origins: dict[str, str] = {}
    found: dict[str, None] = {}
    for name in tensors:
        parts = name.split(".")
        found |= dict.fromkeys(part for part in parts if part in WRAPPERS)
        bare = ".".join(part for part in parts if part not in WRAPPERS)
        if bare in origins:
            raise CheckpointError(
                f"{container.path}: {origins[bare][:100]} and {name[:100]} are both {bare[:100]} without the parts of wrappers; save only one of them"
            )
        origins[bare] = name
    return {bare: tensors[name] for bare, name in origins.items()}, tuple(found)
