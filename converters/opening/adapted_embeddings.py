"""Part of the merge: what an adapter changes of ``wte`` and ``lm_head``, which are one matrix in most GPT-2s.

A tied matrix gets every change of low rank, whichever of the two names it has, as by ``merge_and_unload`` of peft. The model with its
adapter computes something else (peft#2018): there, ``wte`` and ``lm_head`` add their own changes to the same matrix.
A module of ``modules_to_save`` is a copy of its own, with which peft unties the two.

Source: peft 0.21; its results are those of 0.5 to 0.20, too, except for DoRA of ``wte`` in 0.14.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..adapters import Adapter, LowRank, Rows
from ..checkpoint import Checkpoint, same_bytes
from ..dtypes import F64, DType
from ..errors import CheckpointError
from ..lora import changed
from ..spec import LM_HEAD
from ..tensors import LazyTensor

WTE = "wte.weight"
PAIR = frozenset([WTE, LM_HEAD])

MERGED = (
    "is merged into the one matrix that is wte and lm_head, as by peft's merge_and_unload; the model with its adapter "
    "computes something else (peft#2018), and --untie converts that one"
)
UNTIED = "lm_head is no longer tied to wte, as they differ with the adapter"
UNLIKE_PEFT = "; peft's merge_and_unload would change both"


@dataclass(frozen=True)
class Embeddings:
    """``wte``, and ``lm_head`` where it is not the same matrix, after the change; notes say what that means."""

    tensors: dict[str, LazyTensor]
    notes: tuple[str, ...] = ()


def with_shared_matrix(adapter: Adapter) -> Adapter:
    """An adapter of a tied base, in which a saved embedding that is not a copy replaces both names."""
    whole = {name: adapter.replaced[name] for name in PAIR & adapter.replaced.keys() - adapter.copies}
    if not whole:
        return adapter
    return replace(adapter, replaced={**dict.fromkeys(PAIR, next(iter(whole.values()))), **adapter.replaced})


def merge_embeddings(checkpoint: Checkpoint, adapter: Adapter, dtype: DType | None, tie: bool | None) -> Embeddings:
    """What ``wte`` and ``lm_head`` become, lazily.

    Args:
        checkpoint: the base.
        adapter: an adapter that fits it; for a tied base, one of ``with_shared_matrix``.
        dtype: the dtype of what changes; by default the base's.
        tie: as in ``merge_adapter``.

    Raises:
        CheckpointError: if the two have different numbers of rows, or peft does not merge the change.
    """
    is_tied = checkpoint.config.tie_word_embeddings
    if not adapter.touched & PAIR:
        return Embeddings({name: checkpoint.tensors[name] for name in (WTE, LM_HEAD) if name in checkpoint.tensors})
    if is_tied and tie is not False and not adapter.copies & PAIR:
        return _one_matrix(checkpoint, adapter, dtype)
    return _two_matrices(checkpoint, adapter, dtype, tie)


def _one_matrix(checkpoint: Checkpoint, adapter: Adapter, dtype: DType | None) -> Embeddings:
    """Every change in the one matrix: first those of ``wte``, then those of ``lm_head``, as peft merges them."""
    if PAIR & adapter.factors.keys() and PAIR & adapter.rows.keys():
        raise CheckpointError(
            f"{adapter.path}: trains tokens, and changes lm_head by low rank, which peft's merge_and_unload drops; "
            "pass --untie to get the model with its adapter"
        )
    base = checkpoint.tensors[WTE]
    wanted = dtype or base.dtype
    merged = _without_second(adapter)
    is_last = LM_HEAD not in {*merged.factors, *merged.rows}
    tensor = changed(WTE, base, merged, wanted if is_last else F64)
    if not is_last:
        # The whole matrix that may replace the base's is already in it.
        tensor = changed(LM_HEAD, tensor, replace(merged, replaced={}), wanted)
    notes = (f"the change of {_names(adapter)} {MERGED}",) if _differs_from_merged(adapter) else ()
    return Embeddings({WTE: tensor}, notes)


def _two_matrices(checkpoint: Checkpoint, adapter: Adapter, dtype: DType | None, tie: bool | None) -> Embeddings:
    """``wte`` and ``lm_head``, each with its own changes, as the model with its adapter has them."""
    is_tied = checkpoint.config.tie_word_embeddings
    if is_tied and WTE in adapter.rows:
        adapter = replace(adapter, rows={LM_HEAD: adapter.rows[WTE], **adapter.rows})  # peft replaces rows of both
    base = checkpoint.tensors[WTE]
    wte = changed(WTE, base, adapter, dtype) if WTE in adapter.touched else base
    if tie:
        return Embeddings({WTE: wte})
    head = checkpoint.tensors.get(LM_HEAD, base)
    if LM_HEAD in adapter.touched:
        head = changed(LM_HEAD, head, adapter, dtype)
    if head.shape != wte.shape:
        raise CheckpointError(
            f"{adapter.path}: does not fit {checkpoint.source}: it brings a token embedding of {wte.shape[0]} rows, "
            f"but lm_head has {head.shape[0]}; pass the base with the added tokens, or --tie to use the embedding as lm_head"
        )
    if is_tied and same_bytes(wte, head):
        return Embeddings({WTE: wte})
    note = UNTIED if adapter.copies & PAIR else UNTIED + UNLIKE_PEFT
    return Embeddings({WTE: wte, LM_HEAD: head}, (note,) if is_tied else ())


def _without_second(adapter: Adapter) -> Adapter:
    """An adapter without the change of ``lm_head`` that is that of ``wte``.

    ``ensure_weight_tying`` saves the change under both names. peft loads the first, and merges it once.
    """
    if not _is_one_change(adapter.factors.get(WTE), adapter.factors.get(LM_HEAD)):
        return adapter
    return replace(adapter, factors={name: change for name, change in adapter.factors.items() if name != LM_HEAD})


def _is_one_change(wte: LowRank | None, head: LowRank | None) -> bool:
    """Whether two changes of low rank have the same product: that of ``lm_head`` is transposed."""
    if wte is None or head is None or wte.scale != head.scale:
        return False
    return same_bytes(wte.a.transposed(), head.b) and same_bytes(wte.b.transposed(), head.a)


def _differs_from_merged(adapter: Adapter) -> bool:
    """Whether the model with its adapter computes something else than the one with every change in one matrix."""
    wte, head = adapter.factors.get(WTE), adapter.factors.get(LM_HEAD)
    if wte or head:
        return not _is_one_change(wte, head) or adapter.config.has_magnitudes
    # The rows of wte are those of a tied lm_head in peft, too, unless that has rows of its own.
    rows, rows_of_head = adapter.rows.get(WTE), adapter.rows.get(LM_HEAD)
    return rows_of_head is not None and not _are_same(rows, rows_of_head)


def _are_same(a: Rows | None, b: Rows) -> bool:
    return a is not None and a.indices == b.indices and same_bytes(a.values, b.values)


def _names(adapter: Adapter) -> str:
    changed_names = {*adapter.factors, *adapter.rows} & PAIR
    return " and ".join(name.removesuffix(".weight") for name in sorted(changed_names, reverse=True))
