"""Step 5: find the GPT-2 among the tensors, and put its parameters into canonical names and layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import not_gpt2
from ..containers.container import Container
from ..dialects import NANOGPT, Candidate, Dialect, ReadModel, candidates
from ..errors import CheckpointError, ConversionError, FormatError
from ..formats.nanogpt import dialect_of
from ..heads import Head
from ..spec import LM_HEAD
from ..tensors import LazyTensor

# A part of a name -> what stores a parameter in this way, and how to save the parameter itself.
REPLACED = {
    "flat_param": ("FSDP, as a slice of a vector", "save with StateDictType.FULL_STATE_DICT"),
    ".parametrizations.": (
        "torch.nn.utils.parametrize, as the inputs of a function that computes them",
        "call parametrize.remove_parametrizations before you save",
    ),
    ".weight_mask": ("torch.nn.utils.prune, with a mask", "call prune.remove before you save"),
    ".weight_g": ("torch.nn.utils.weight_norm, as length and direction", "call remove_weight_norm before you save"),
    ".weight_u": ("torch.nn.utils.spectral_norm, without its norm", "call remove_spectral_norm before you save"),
}

# A part of a tensor's name -> the program that uses it, and what to do.
OTHERS = {
    "query_key_value.weight": (
        "a checkpoint of Megatron-LM or GPT-NeoX, whose queries, keys and values are interleaved; "
        "convert it to Hugging Face's layout with that project's script"
    ),
    "blocks.0.attn.W_Q": (
        "a HookedTransformer of TransformerLens, whose weights are usually folded and centered; "
        "convert the model that it was made from"
    ),
    "sa.heads.0.key.weight": (
        "the model of the lecture 'Let's build GPT', whose heads and lm_head bias GPT-2 does not have"
    ),
}


@dataclass(frozen=True)
class Parameters:
    """Every parameter of a GPT-2; their shapes are not checked yet.

    Args:
        container: where they come from.
        dialect: the dialect of its names.
        tensors: canonical name -> tensor in canonical layout.
        n_layer: number of layers.
        n_vocab: the number of rows that the token embedding was truncated to, if it was.
        left_out: names of the tensors that are not parameters.
        zero_biases: rows of SPEC for which zeros stand, as the file has no such biases.
        prefix: the prefix of the names, of which the end may be the dialect's own.
        heads: heads other than ``lm_head``.
        rest: names of tensors outside the GPT-2, which is a part of a larger model.
        wte_is_lm_head: whether the file has a tied matrix under the name of ``lm_head`` only.
        cross_attention: those of ``left_out`` that attend to the states of an encoder.
    """

    container: Container
    dialect: Dialect
    tensors: dict[str, LazyTensor]
    n_layer: int
    n_vocab: int | None
    left_out: tuple[str, ...]
    zero_biases: tuple[str, ...]
    prefix: str = ""
    heads: tuple[Head, ...] = ()
    rest: tuple[str, ...] = ()
    wte_is_lm_head: bool = False
    cross_attention: tuple[str, ...] = ()


def recognise(container: Container, n_vocab: int | None = None, prefix: str | None = None) -> Parameters:
    """Find every parameter of a GPT-2 in a container.

    Args:
        container: with tensors whose names have no parts of wrappers.
        n_vocab: truncate the token embedding to this many rows.
        prefix: of the GPT-2 to read, or the beginning of it, if there are several.

    Raises:
        CheckpointError: if they are not a GPT-2's, or those of several. The message lists everything that is wrong.
        FormatError: if one tensor is two parameters.
    """
    candidate, others = _choose(container, prefix)
    dialect = candidate.dialect
    model = _read(container, candidate, others)
    if not model.parameters:
        raise _nothing_known(container)
    if dialect is NANOGPT:
        dialect = dialect_of(container, candidate.prefix)
    if model.faults:
        raise _not_read(container, candidate.prefix) or not_gpt2(container.path, dialect.name, model.faults)
    _check_shared(container, candidate)
    tensors = model.parameters
    if n_vocab:
        tensors = _truncated(tensors, n_vocab, container.path)
    return Parameters(
        container=container,
        dialect=dialect,
        tensors=tensors,
        n_layer=model.n_layer,
        n_vocab=n_vocab,
        left_out=(*model.left_out, *model.rest),
        zero_biases=model.zero_biases,
        prefix=candidate.prefix,
        heads=model.heads,
        rest=tuple(model.rest),
        wte_is_lm_head=model.wte_is_lm_head,
        cross_attention=model.cross_attention,
    )


def _choose(container: Container, prefix: str | None) -> tuple[Candidate, list[Candidate]]:
    """The GPT-2 to read, and the other ones: the only whole one, or the chosen one; if none is whole, the best candidate.

    Raises:
        CheckpointError: if there are several, or none under the chosen prefix.
    """
    found = candidates(container.tensors)
    whole = [each for each in found if each.dialect.is_whole(container.tensors, each.prefix)]
    eligible = whole or found[:1]
    chosen = eligible if prefix is None else [each for each in eligible if _is_under(each.prefix, prefix)]
    if not chosen:
        names = _listed(eligible)
        raise CheckpointError(f"{container.path}: no GPT-2 under the prefix {prefix!r}; there is one under {names}")
    if len(chosen) > 1 and not _same_tensors(container, chosen):
        example = next(each.prefix for each in chosen if each.prefix).rstrip("./")
        raise CheckpointError(
            f"{container.path}: {len(chosen)} GPT-2s in it, under the prefixes {_listed(chosen)}.\n"
            f"Pass --prefix to choose one, such as --prefix {example}"
        )
    return chosen[0], [each for each in whole if each is not chosen[0]]


def _read(container: Container, candidate: Candidate, others: Sequence[Candidate]) -> ReadModel:
    """What the dialect reads, without the tensors of the other models, which are left out."""
    prefix, names = candidate.prefix, container.tensors
    prefixes = tuple(other.prefix for other in others if not prefix.startswith(other.prefix))
    outputs = {other.dialect.lm_head_name(names, other.prefix) for other in others}
    # An lm_head around several models belongs to the chosen one, too.
    outputs.discard(candidate.dialect.lm_head_name(names, prefix))
    tensors, apart = {}, []
    for name, tensor in container.tensors.items():
        if name.startswith(prefixes) or name in outputs:
            apart.append(name)
        else:
            tensors[name] = tensor
    model = candidate.dialect.read(tensors, prefix)
    model.rest += apart
    return model


def _is_under(prefix: str, chosen: str) -> bool:
    """Whether a prefix is the chosen one or begins with it, as whole parts of a name."""
    chosen = chosen.rstrip("./")
    return prefix.rstrip("./") == chosen or (bool(chosen) and prefix.startswith((f"{chosen}.", f"{chosen}/")))


def _listed(found: Sequence[Candidate]) -> str:
    return " and ".join(repr(each.prefix) for each in found)


def _same_tensors(container: Container, found: Sequence[Candidate]) -> bool:
    """Whether every candidate is the same tensors under other names, as of a module that is an attribute of two others."""
    places = []
    for each in found:
        names = {each.dialect.locate(name, each.prefix): id(tensor) for name, tensor in container.tensors.items()}
        places.append({place: key for place, key in names.items() if place and place.row != LM_HEAD})
    return all(place == places[0] for place in places)


def _check_shared(container: Container, candidate: Candidate) -> None:
    """Refuse one tensor that is two parameters. Only ``lm_head`` may be another name of the token embedding.

    Raises:
        FormatError: if there is one.
    """
    names: dict[int, str] = {}
    for name, tensor in container.tensors.items():
        place = candidate.dialect.locate(name, candidate.prefix)
        if place is None or place.row == LM_HEAD or not tensor.size:
            continue
        first = names.setdefault(id(tensor), name)
        if first != name:
            raise FormatError(f"{container.path}: {first} and {name} overlap in one storage")


def _nothing_known(container: Container) -> ConversionError:
    first = next(iter(container.tensors))[:100]
    return _not_read(container, "") or CheckpointError(
        f"{container.path}: not a GPT-2: none of its {len(container.tensors)} tensors has a name of a GPT-2 parameter (the first is {first!r})"
    )


def _not_read(container: Container, prefix: str) -> CheckpointError | None:
    """The error of another program's file, or of one with something in place of parameters under a prefix; None if it is neither."""
    for part, advice in OTHERS.items():
        if any(part in name for name in container.tensors):
            return CheckpointError(f"{container.path}: {advice}")
    names = [name for name in container.tensors if name.startswith(prefix)]
    for part, (what, advice) in REPLACED.items():
        name = next((name for name in names if part in name), None)
        if name:
            return CheckpointError(
                f"{container.path}: its weights are stored by {what} (it holds {name[:100]}), which gpt2x does not read; {advice}"
            )
    return None


def _truncated(tensors: dict[str, LazyTensor], n_vocab: int, path: Path) -> dict[str, LazyTensor]:
    """The same tensors with the first rows of the vocabulary only."""
    result = dict(tensors)
    for name in ("wte.weight", LM_HEAD):
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if not tensor.shape or tensor.shape[0] < n_vocab:
            raise CheckpointError(f"{path}: {name} is {list(tensor.shape)}: fewer than the {n_vocab} rows of --n-vocab")
        result[name] = tensor.first_rows(n_vocab)
    return result
