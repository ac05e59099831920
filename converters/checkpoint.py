"""A GPT-2 checkpoint: a configuration and its parameters under canonical names, complete by construction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config import resolve
from .containers.container import Container
from .dialects import Dialect, expected_names, recognise
from .errors import CheckpointError, ConversionError, short
from .spec import LM_HEAD, GPT2Config
from .tensors import DType, LazyTensor, crc32c
from .tokenizer import TokenizerFiles

MAX_NAME = 256
# What MLX, GPTQ, AWQ and bitsandbytes put beside, or in the place of, weights that they round.
QUANTISED = (".scales", ".qweight", ".qzeros", ".absmax", ".SCB", ".quant_map")


@dataclass(frozen=True, kw_only=True, repr=False)
class Checkpoint:
    """A whole GPT-2: every parameter of ``config`` under its canonical name, in canonical order and layout.

    ``left_out`` lists what the source held besides; ``notes`` what was assumed. Tensors are lazy.

    Raises:
        CheckpointError: on construction, if a parameter is missing, unknown, of another shape or not of floats.
    """

    config: GPT2Config
    tensors: Mapping[str, LazyTensor]
    source: Path | None = None
    files: tuple[Path, ...] = ()  # those that hold the weights
    format: str = "memory"
    dialect: str = "hf"
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    tokenizer: TokenizerFiles | None = None
    stated: bool = True  # whether the source says its configuration, or it was seen in the shapes

    def __post_init__(self) -> None:
        shapes = self.config.shapes()
        faults = list(_shape_faults(self.tensors, shapes, "the configuration"))
        faults += [f"unknown   {name}" for name in self.tensors if name not in shapes]
        if faults:
            raise CheckpointError.listing(f"{self.source or 'checkpoint'}: not a complete GPT-2", short(faults))
        object.__setattr__(self, "tensors", {name: self.tensors[name] for name in shapes})

    def __repr__(self) -> str:
        return f"<Checkpoint {self.source or ''} {self.format} ({self.dialect}), {self.parameters:,} parameters>"

    @property
    def parameters(self) -> int:
        """How many numbers the model has; a tied output counts once."""
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """How many bytes its tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def stored(self) -> dict[str, tuple[str, int]]:
        """Name -> type and bytes of each tensor as its file holds it: of a quantised one, not what it is read as."""
        return {name: tensor.stored or (tensor.dtype.name, tensor.nbytes) for name, tensor in self.tensors.items()}

    @property
    def checksummed(self) -> int:
        """How many tensors carry a checksum that reading them verifies."""
        return sum(tensor.checksummed for tensor in self.tensors.values())

    def cast(self, dtype: DType) -> Checkpoint:
        """The same model in another number format, lazily."""
        return replace(self, tensors={name: tensor.cast(dtype, name) for name, tensor in self.tensors.items()})


def assemble(
    container: Container,
    stated: Mapping[str, Any],
    stated_in: str,
    *,
    n_head: int | None = None,
    n_vocab: int | None = None,
    tie: bool = False,
) -> Checkpoint:
    """Recognise the dialect of a container and put its tensors into canonical form.

    ``n_vocab`` keeps that many rows of the token embedding, where padding makes it longer.

    Raises:
        CheckpointError: if they are not a GPT-2's; the message lists everything that is wrong.
        ConfigError: if the configuration is impossible or contradicts them.
    """
    if quantised := next((name for name in container.tensors if name.endswith(QUANTISED)), None):
        raise CheckpointError(
            f"{container.path}: quantised weights (it holds {quantised[:100]}), which are rounded; convert what they were made from"
        )
    if not container.tensors:
        raise CheckpointError(f"{container.path}: no tensors in it")
    if long := next((name for name in container.tensors if len(name) > MAX_NAME), None):
        raise CheckpointError(
            f"{container.path}: not a GPT-2: the name {long[:60]!r}... is {len(long)} characters long"
        )
    unwrapped = _unwrapped(container.tensors)
    dialect, prefix = recognise(unwrapped)
    assumed = {key: value for key, value in dialect.assumes.items() if key not in stated}
    where = str(container.path)
    found, left_out, faults = _sort(unwrapped, dialect, prefix)
    if not found:
        first = next(iter(container.tensors))[:100]
        raise CheckpointError(
            f"{where}: not a GPT-2: none of its {len(container.tensors)} tensors has a name of GPT-2's (the first is {first!r})"
        )
    depth = _depth(found, faults)
    names = expected_names(dialect, prefix, depth)
    zeros = _zero_biases(found, names.values()) if dialect.biasless else {}
    found |= zeros
    faults = [f"missing   {name}" for name, canonical in names.items() if canonical not in found] + faults
    if faults:
        raise _not_gpt2(where, dialect, faults)
    if n_vocab:
        found, stated = _trimmed(found, n_vocab, where), {**stated, "n_vocab": n_vocab}
    config, notes = resolve({**stated, **assumed}, _sizes(found, depth, where), n_head, where, stated_in)
    notes += [f"{key} is {value}, as {dialect.name}'s code has it" for key, value in assumed.items()]
    notes += ["no biases in it; zeros stand for them"] if zeros else []
    notes += [f"{LM_HEAD} is dropped as --tie asks, whatever is in it"] if tie and LM_HEAD in found else []
    ties = stated_in if "tie_word_embeddings" in stated else None
    tensors, config, note = _untangle(found, config, tie, dialect.head_untied and not ties, where, ties)
    wrong = list(_shape_faults(tensors, config.shapes(), f"its {stated_in or 'other tensors'}"))
    if wrong:
        raise _not_gpt2(where, dialect, wrong)
    return Checkpoint(
        config=config,
        tensors=tensors,
        source=container.path,
        files=container.files,
        format=container.format,
        dialect=dialect.name,
        left_out=(*container.left_out, *left_out, *note),
        notes=(*container.notes, *notes),
        stated=bool(stated),
    )


def _unwrapped(tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
    """The same tensors without what wrappers put before every name: DataParallel, torch.compile, Lightning, Flax."""
    for wrapper in ("module.", "_orig_mod.", "model.", "params/") * 2:
        within = wrapper != "model." or any(name.startswith("model.transformer.") for name in tensors)  # MLX has it too
        if within and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


def _sort(
    tensors: Mapping[str, LazyTensor], dialect: Dialect, prefix: str
) -> tuple[dict[str, LazyTensor], list[str], list[str]]:
    """The parameters by canonical name and in canonical layout, the known extras, and the faults."""
    found: dict[str, LazyTensor] = {}
    left_out, faults = [], []
    for name, tensor in tensors.items():
        place = dialect.locate(name, prefix)
        if place is not None and not tensor.dtype.is_float:
            faults.append(f"integers  {name} is {tensor.dtype}; a parameter has floats")
        elif place is not None:
            canonical = place[0].replace("{i}", str(place[1]))
            if canonical in found:
                faults.append(f"twice     {name} is {canonical}, which another name is too")
            found[canonical] = tensor
            try:
                found[canonical] = dialect.read(name, prefix, tensor)
            except CheckpointError as error:
                faults.append(f"shape     {error}")
        elif dialect.is_extra(name, prefix):
            left_out.append(name)
        else:
            faults.append(f"unknown   {name[:200]}")
    return found, left_out, faults


def _depth(found: Iterable[str], faults: list[str]) -> int:
    layers = sorted({int(name.split(".")[1]) for name in found if name.startswith("h.")})
    depth = next((i for i, layer in enumerate(layers) if i != layer), len(layers))
    if depth != len(layers):
        faults.append(f"gap       no layer {depth}, but a layer {layers[-1]}")
    return max(depth, 1)


def _zero_biases(found: Mapping[str, LazyTensor], names: Iterable[str]) -> dict[str, LazyTensor]:
    """Zeros for every bias, if there is none at all; what they are added to says how many."""
    biases = [name for name in names if name.endswith(".bias")]
    weights = {name: found.get(name.removesuffix("bias") + "weight") for name in biases}
    if any(name in found for name in biases) or not all(weight and weight.shape for weight in weights.values()):
        return {}
    return {name: LazyTensor.zeros(w.dtype, w.shape[-1:]) for name, w in weights.items() if w}


def _trimmed(tensors: dict[str, LazyTensor], n_vocab: int, where: str) -> dict[str, LazyTensor]:
    """The same tensors with the first rows of the vocabulary alone."""
    long = {name: tensors[name] for name in ("wte.weight", LM_HEAD) if name in tensors}
    if wrong := next((name for name, t in long.items() if not t.shape or t.shape[0] < n_vocab), None):
        raise CheckpointError(f"{where}: {wrong} is {list(long[wrong].shape)}: it has no {n_vocab} rows to keep")
    return {**tensors, **{name: tensor.first_rows(n_vocab) for name, tensor in long.items()}}


def _sizes(tensors: Mapping[str, LazyTensor], depth: int, where: str) -> dict[str, int]:
    """What the shapes alone say of the configuration."""
    wte, wpe, fc = (tensors[name].shape for name in ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight"))
    if not len(wte) == len(wpe) == len(fc) == 2:
        raise CheckpointError(
            f"{where}: wte, wpe and mlp.c_fc must be matrices, not {list(wte)}, {list(wpe)} and {list(fc)}"
        )
    return {"n_vocab": wte[0], "n_embd": wte[1], "n_ctx": wpe[0], "n_inner": fc[1], "n_layer": depth}


def _untangle(
    tensors: dict[str, LazyTensor], config: GPT2Config, tie: bool, untied: bool, where: str, stated_in: str | None
) -> tuple[dict[str, LazyTensor], GPT2Config, list[str]]:
    """Settle what ``lm_head`` is: a copy of ``wte``, a parameter of its own (``untied``: if it differs), or a contradiction."""
    head = tensors.get(LM_HEAD)
    if head is None:
        if not config.tie_word_embeddings and tie:
            config = replace(config, tie_word_embeddings=True)
        return tensors, config, []
    tied = {name: tensor for name, tensor in tensors.items() if name != LM_HEAD}
    if tie:
        return tied, replace(config, tie_word_embeddings=True), [LM_HEAD]
    if not config.tie_word_embeddings:
        return tensors, config, []
    if same_bytes(head, tensors["wte.weight"]):
        return tied, config, [LM_HEAD]
    if untied:
        return tensors, replace(config, tie_word_embeddings=False), []
    saying = (
        f"{stated_in} says that they are tied" if stated_in else "GPT-2's are tied, and no configuration says otherwise"
    )
    raise CheckpointError(
        f"{where}: {LM_HEAD} differs from wte.weight, but {saying}.\n"
        "Pass --tie to drop it, or say tie_word_embeddings: false in config.json to keep it"
    )


def same_bytes(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors have the same format, shape and bytes."""
    if a is b:
        return True
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(x == y for x, y in zip_chunks(a.chunks(), b.chunks()))


def zip_chunks(a: Iterator[bytes], b: Iterator[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Two streams of bytes in step, whatever their chunks; both are read to the end, so checksums are verified."""
    x, y = next(a, None), next(b, None)
    while x is not None and y is not None:
        n = min(len(x), len(y))
        yield x[:n], y[:n]
        x = x[n:] if n < len(x) else next(a, None)
        y = y[n:] if n < len(y) else next(b, None)


def _shape_faults(tensors: Mapping[str, LazyTensor], shapes: Mapping[str, tuple[int, ...]], says: str) -> Iterator[str]:
    for name, shape in shapes.items():
        if name not in tensors:
            yield f"missing   {name}"
        elif tensors[name].shape != shape:
            yield f"shape     {name} is {tensors[name].shape}, {says} asks for {shape}"
        elif not tensors[name].dtype.is_float:
            yield f"integers  {name} is {tensors[name].dtype}; a parameter has floats"


def _not_gpt2(where: str, dialect: Dialect, faults: list[str]) -> ConversionError:
    return CheckpointError.listing(f"{where}: not a GPT-2 checkpoint (closest dialect: {dialect.name})", short(faults))


def crc_of(tensor: LazyTensor) -> int:
    """CRC-32C over the tensor's bytes."""
    value = 0
    for chunk in tensor.chunks():
        value = crc32c(value, chunk)
    return value
