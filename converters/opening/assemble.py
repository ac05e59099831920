"""Step 7: assemble the checkpoint: settle whether ``lm_head`` is tied, and check every shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..checkpoint import Checkpoint, not_gpt2, same_bytes, shape_faults
from ..dialects import BIASES
from ..errors import CheckpointError
from ..spec import LM_HEAD, GPT2Config
from ..tensors import LazyTensor
from .recognise_dialect import Parameters
from .resolve import Resolved


@dataclass(frozen=True)
class _Head:
    """The parameters and the configuration once ``lm_head`` is settled; whether it was dropped."""

    tensors: Mapping[str, LazyTensor]
    config: GPT2Config
    is_dropped: bool = False


def assemble(parameters: Parameters, resolved: Resolved, tie: bool | None = None) -> Checkpoint:
    """Build the checkpoint.

    Args:
        parameters: of step 5.
        resolved: of step 6.
        tie: whether an ``lm_head`` that differs from the token embedding is dropped (True), kept (False) or refused (None).

    Raises:
        CheckpointError: if a shape is not the configuration's, or an untied ``lm_head`` contradicts it.
    """
    container, dialect = parameters.container, parameters.dialect
    notes = (*container.notes, *resolved.notes, *_notes(parameters, tie))
    head = _settle_head(parameters, resolved, tie)
    shapes = head.config.shapes()
    faults = list(shape_faults(head.tensors, shapes, f"its {resolved.stated_in or 'other tensors'}"))
    if faults:
        raise not_gpt2(container.path, dialect.name, faults)
    dropped = (LM_HEAD,) if head.is_dropped else ()
    return Checkpoint(
        config=head.config,
        tensors=head.tensors,
        source=container.path,
        files=container.files,
        format=container.format,
        dialect=dialect.name,
        entry=container.entry,
        left_out=(*container.left_out, *parameters.left_out, *dropped),
        heads=parameters.heads,
        head_settings=resolved.head_settings,
        prefix=_wrapper_prefix(parameters),
        wrappers=container.wrappers,
        notes=notes,
        stated=resolved.is_stated,
    )


def _wrapper_prefix(parameters: Parameters) -> str:
    """The prefix without the end that is the dialect's own."""
    own = parameters.dialect.own_end(parameters.prefix)
    return parameters.prefix.removesuffix(own or "")


def _notes(parameters: Parameters, tie: bool | None) -> list[str]:
    notes = []
    if parameters.rest:
        count, first = len(parameters.rest), parameters.rest[0][:100]
        notes.append(
            f"the GPT-2 with the prefix {parameters.prefix!r} is read; {count} other tensors are left out (the first is {first})"
        )
    if parameters.cross_attention:
        count, first = len(parameters.cross_attention), parameters.cross_attention[0][:100]
        notes.append(
            f"{count} tensors of cross-attention (crossattention.*, ln_cross_attn.*; the first is {first}) are left out: without "
            "the states of an encoder, GPT-2 does not use them"
        )
    if parameters.wte_is_lm_head:
        notes.append(f"wte.weight is not in it: {LM_HEAD} is taken for both, as they are tied")
    if parameters.zero_biases:
        only = "" if parameters.zero_biases == BIASES else f" {', '.join(parameters.zero_biases)}"
        notes.append(f"it has no biases{only}; zeros are used")
    if tie and LM_HEAD in parameters.tensors:
        notes.append(f"{LM_HEAD} is dropped, as --tie asks, whatever its values")
    return notes


def _settle_head(parameters: Parameters, resolved: Resolved, tie: bool | None) -> _Head:
    """Decide what ``lm_head`` is: a copy of ``wte``, a parameter of its own, or a contradiction."""
    tensors, config = parameters.tensors, resolved.config
    tied_config = replace(config, tie_word_embeddings=True)
    head = tensors.get(LM_HEAD)
    if head is None and parameters.wte_is_lm_head and not config.tie_word_embeddings and not tie:
        raise CheckpointError(
            f"{parameters.container.path}: missing wte.weight: {LM_HEAD} is in it, but {resolved.head_stated_in} states tie_word_embeddings: false"
        )
    if head is None:
        return _Head(tensors, tied_config if tie else config)
    without_head = {name: tensor for name, tensor in tensors.items() if name != LM_HEAD}
    if tie:
        return _Head(without_head, tied_config, is_dropped=True)
    if not config.tie_word_embeddings:
        return _Head(tensors, config)
    if same_bytes(head, tensors["wte.weight"]):
        return _Head(without_head, config, is_dropped=True)
    is_untied = parameters.dialect.head_untied and not resolved.head_stated_in
    if is_untied or tie is False:
        return _Head(tensors, replace(config, tie_word_embeddings=False))
    if resolved.head_stated_in:
        reason = f"{resolved.head_stated_in} states tie_word_embeddings: true"
    else:
        reason = "no configuration states that it is untied"
    # transformers' versions disagree: PreTrainedModel.tie_weights of 5 compares the values first.
    raise CheckpointError(
        f"{parameters.container.path}: untied lm_head: {LM_HEAD} differs from wte.weight, but {reason}.\n"
        "Pass --untie to keep it, as transformers 5 does, or --tie to drop it, as transformers 4 does"
    )
