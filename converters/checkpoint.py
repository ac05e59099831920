"""A GPT-2 checkpoint: a configuration and its parameters under canonical names, complete by construction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import CheckpointError, ConversionError, short
from .heads import Head
from .io.checksums import crc32c
from .spec import GPT2Config
from .tensors import DType, LazyTensor
from .tokenizer import TokenizerFiles


@dataclass(frozen=True, kw_only=True, repr=False)
class Checkpoint:
    """A complete GPT-2: every parameter of ``config`` under its canonical name, in canonical order and layout.

    ``left_out`` lists what else the source holds, and ``heads`` those heads that it also lists; ``notes`` what was assumed.
    ``convert`` writes no heads; ``export --task`` and ``--outputs`` use them.
    Tensors are lazy.

    Raises:
        CheckpointError: on construction, if a parameter is missing, unknown, has another shape, or is not float.
    """

    config: GPT2Config
    tensors: Mapping[str, LazyTensor]
    source: Path | None = None
    files: tuple[Path, ...] = ()  # the files of weights
    format: str = "memory"
    dialect: str = "hf"
    entry: str = ""  # the place of the tensors in a file of torch.save that holds more than them
    left_out: tuple[str, ...] = ()
    heads: tuple[Head, ...] = ()  # other than lm_head
    head_settings: Mapping[str, Any] = field(default_factory=dict)  # of config.json (head_config.KEYS), not checked
    prefix: str = ""  # that a wrapper put before the dialect's names
    wrappers: tuple[str, ...] = ()  # parts of names that wrappers added anywhere in them
    notes: tuple[str, ...] = ()
    tokenizer: TokenizerFiles | None = None
    stated: bool = True  # whether the source states its configuration; else it comes from the shapes
    adapter: Path | None = None  # what was merged into the source

    def __post_init__(self) -> None:
        shapes = self.config.shapes()
        faults = list(shape_faults(self.tensors, shapes, "the configuration"))
        faults += [f"unknown   {name}" for name in self.tensors if name not in shapes]
        if faults:
            raise CheckpointError.listing(f"{self.source or 'checkpoint'}: not a complete GPT-2", short(faults))
        # Writers store tensors in this order, so that equal models give equal files, whatever they were read from.
        object.__setattr__(self, "tensors", {name: self.tensors[name] for name in shapes})

    def __repr__(self) -> str:
        return f"<Checkpoint {self.source or ''} {self.format} ({self.dialect}), {self.parameters:,} parameters>"

    @property
    def origin(self) -> str:
        """The source for people, with the adapter that was merged into it."""
        return f"{self.source} + {self.adapter}" if self.adapter else str(self.source)

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied ``lm_head`` is not counted twice."""
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Total size of its tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def stored(self) -> dict[str, tuple[str, int]]:
        """Name -> dtype and size in bytes of each tensor in its file, which for a quantized one is not the dtype it is read as."""
        return {name: tensor.stored or (tensor.dtype.name, tensor.nbytes) for name, tensor in self.tensors.items()}

    @property
    def checksummed(self) -> int:
        """Number of tensors with a checksum, which is verified when they are read."""
        return sum(tensor.checksummed for tensor in self.tensors.values())

    def cast(self, dtype: DType) -> Checkpoint:
        """The same model in another dtype, lazily."""
        return replace(self, tensors={name: tensor.cast(dtype, name) for name, tensor in self.tensors.items()})


def same_bytes(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if a is b:
        return True
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(x == y for x, y in zip_chunks(a.chunks(), b.chunks()))


def zip_chunks(a: Iterator[bytes], b: Iterator[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Two streams of bytes in chunks of equal size. Both are read to the end, so checksums are verified."""
    x, y = next(a, None), next(b, None)
    while x is not None and y is not None:
        n = min(len(x), len(y))
        yield x[:n], y[:n]
        x = x[n:] if n < len(x) else next(a, None)
        y = y[n:] if n < len(y) else next(b, None)


def shape_faults(tensors: Mapping[str, LazyTensor], shapes: Mapping[str, tuple[int, ...]], says: str) -> Iterator[str]:
    for name, shape in shapes.items():
        if name not in tensors:
            yield f"missing   {name}"
        elif tensors[name].shape != shape:
            yield f"shape     {name} is {tensors[name].shape}, {says} needs {shape}"
        elif not tensors[name].dtype.is_float:
            yield f"integers  {name} is {tensors[name].dtype}; a parameter must be float"


def not_gpt2(path: Path, dialect: str, faults: list[str]) -> ConversionError:
    """The error that lists what is wrong with the tensors of a file."""
    return CheckpointError.listing(f"{path}: not a GPT-2 checkpoint (closest dialect: {dialect})", short(faults))


def crc_of(tensor: LazyTensor) -> int:
    """CRC-32C over the tensor's bytes."""
    value = 0
    for chunk in tensor.chunks():
        value = crc32c(value, chunk)
    return value
