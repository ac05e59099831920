"""The runtimes in torch: a ``GPT2``, a TorchScript file, and a ``.pt2`` file."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from converters import ChecksumError, ConfigError, FormatError, GPT2Config
from converters.config import config_of
from converters.head_config import Labels, head_settings, labels_of
from converters.io.json import parse_json
from converters.io.reading import File

from ..model import GPT2
from ..tasks import GENERATION, TASKS, task_of
from .base import Decoder, Ids, InputError, Logits, check_mask, check_tokens

NEAR_TIES = {torch.float16: 1e-2, torch.bfloat16: 1e-1}
Past = Sequence[tuple[Tensor, Tensor]]  # key and value of each layer, each (B, H, P, D)


class TorchDecoder(Decoder):
    """A ``GPT2`` as a runtime. The model is put into eval mode."""

    can_truncate = True

    def __init__(self, model: GPT2) -> None:
        self.model = model.eval()
        self.runtime = f"the weights in gpt2x's model, in torch {torch.__version__}"
        self.config = model.config
        self.near_tie = NEAR_TIES.get(model.wte.weight.dtype, Decoder.near_tie)

    def step(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """As ``Decoder.step``; the last block computes the last position only.

        Raises:
            InputError: if the arguments do not fit the model or one another.
        """
        logits, cache = self._run(input_ids, attention_mask, position_ids, cache, last=True)
        return logits[:, -1], cache

    def run(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """As ``Decoder.run``.

        Raises:
            InputError: if the arguments do not fit the model or one another.
        """
        return self._run(input_ids, attention_mask, position_ids, cache, last=False)

    @torch.inference_mode()
    def _run(self, ids: Ids, mask: Ids | None, positions: Ids, cache: Any, last: bool) -> tuple[Logits, Any]:
        ids, positions = check_tokens(ids, positions, self.n_vocab, self.n_ctx)
        B, T = ids.shape
        P = 0 if cache is None else _length(cache, self.config, B, self._cache_dtype)
        seen = None if mask is None else self._tensor(check_mask(mask, B, P, T))
        x, cache = self.model.hidden(self._tensor(ids), seen, self._tensor(positions), cache, last)
        return self.model.logits(x).float().cpu().numpy(), cache

    def reorder(self, cache: Any, rows: Ids) -> Any:
        """As ``Decoder.reorder``."""
        return _reordered(cache, self._tensor(rows))

    def truncate(self, cache: Any, length: int) -> Any:
        """As ``Decoder.truncate``."""
        return _truncated(cache, length)

    @property
    def _cache_dtype(self) -> torch.dtype:
        return torch.float32 if self.config.reorder_and_upcast_attn else self.model.wte.weight.dtype

    def _tensor(self, array: Ids) -> Tensor:
        return torch.from_numpy(array).to(self.model.wte.weight.device)


class ModuleDecoder(Decoder):
    """A TorchScript or ``.pt2`` file that ``gpt2x export`` wrote, as a runtime.

    Such a file is a program: load one only if you trust where it comes from.
    """

    path: Path
    can_truncate = True

    def __init__(self, module: Any, config: GPT2Config, path: str | Path) -> None:
        self.module = module
        self.config = config
        self.path = Path(path)
        self.runtime = f"{self.path.name} in torch {torch.__version__}"

    @classmethod
    def from_torchscript(cls, path: str | Path) -> ModuleDecoder:
        """Load TorchScript.

        Raises:
            FormatError: if torch cannot load it, or gpt2x did not export it for text generation.
        """
        return cls._of(load_program(path, "torchscript"), path)

    @classmethod
    def from_pt2(cls, path: str | Path) -> ModuleDecoder:
        """Load a program of ``torch.export``.

        Raises:
            FormatError: if torch cannot load it, or gpt2x did not export it for text generation.
        """
        return cls._of(load_program(path, "pt2"), path)

    @classmethod
    def _of(cls, program: Program, path: str | Path) -> ModuleDecoder:
        if program.task != GENERATION:
            raise FormatError(f"{path}: a model for {program.task}, which generates no text")
        return cls(program.module, program.config, path)

    def run(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """As ``Decoder.run``.

        Raises:
            InputError: if the arguments do not fit the model or one another.
            FormatError: if the program fails, or returns something else than logits and a cache.
        """
        logits, present, _ = self._run(input_ids, attention_mask, position_ids, cache)
        return logits, present

    def extra_outputs(self, ids: Ids) -> dict[str, NDArray[Any]]:
        """The outputs besides the logits and the cache for rows of tokens (B, T) without padding, by their names.

        Raises:
            InputError: if the tokens do not fit the model.
            FormatError: if the program fails.
        """
        positions = np.arange(ids.shape[1])[None].repeat(len(ids), 0)
        _, _, extras = self._run(ids, None, positions, None)
        return {str(name): tensor.numpy() for name, tensor in extras.items()}

    @torch.inference_mode()
    def _run(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Any, Any, Any]:
        ids, positions = check_tokens(input_ids, position_ids, self.n_vocab, self.n_ctx)
        B, T = ids.shape
        past = self._empty(B) if cache is None else cache
        P = _length(past, self.config, B, torch.float32)
        mask = check_mask(attention_mask, B, P, T)
        past = [(key, value) for key, value in past]  # the program takes a list
        try:
            logits, present, *rest = self.module(*map(torch.from_numpy, (ids, mask, positions)), past)
            found: Logits = logits.numpy()
            layers = len(present)
            extras = dict(rest[0]) if rest else {}
        except Exception as error:  # the program comes from the file, and raises anything
            raise FormatError(f"{self.path}: torch cannot run it: {one_line(error)}") from None
        if found.shape != (B, T, self.n_vocab):
            raise FormatError(f"{self.path}: returns {found.shape}, not logits {(B, T, self.n_vocab)}")
        if layers != self.config.n_layer:
            raise FormatError(
                f"{self.path}: returns a cache of {layers} layers; its config.json says {self.config.n_layer}"
            )
        return found, present, extras

    def reorder(self, cache: Any, rows: Ids) -> Any:
        """As ``Decoder.reorder``."""
        return _reordered(cache, torch.from_numpy(rows))

    def truncate(self, cache: Any, length: int) -> Any:
        """As ``Decoder.truncate``."""
        return _truncated(cache, length)

    def _empty(self, B: int) -> list[tuple[Tensor, Tensor]]:
        size = (B, self.config.n_head, 0, self.config.head_dim)
        return [(torch.empty(size), torch.empty(size)) for _ in range(self.config.n_layer)]


@dataclass(frozen=True)
class Program:
    """A program that ``gpt2x export`` wrote: its module, and what its file says of it.

    Args:
        task: one of ``gpt2x.tasks.TASKS``.
        labels: of a classifier.
    """

    module: Any
    config: GPT2Config
    task: str = GENERATION
    labels: Labels | None = None


LOADERS: dict[str, Callable[[str, dict[str, Any]], Any]] = {
    "torchscript": lambda file, extra: torch.jit.load(file, map_location="cpu", _extra_files=extra),
    "pt2": lambda file, extra: torch.export.load(file, extra_files=extra).module(),
}


def load_program(path: str | Path, kind: str) -> Program:
    """Load a program. It is executed: load one only if you trust where it comes from.

    Args:
        kind: a key of ``LOADERS``.

    Raises:
        FormatError: if torch cannot load it, or gpt2x did not export it.
    """
    name = str(File(Path(path)).path)
    extra: dict[str, Any] = {"config.json": ""}
    try:
        with warnings.catch_warnings(), ZipFile(name) as archive:
            warnings.simplefilter("ignore")
            damaged = archive.testzip()  # torch itself checks no checksum
            module = None if damaged else LOADERS[kind](name, extra)
    except Exception as error:  # torch raises RuntimeError, ValueError and others here
        raise FormatError(f"{path}: torch cannot load it: {one_line(error)}") from None
    if damaged:
        raise ChecksumError(f"{path}: its record {damaged[:200]} does not match its checksum")
    return _described(module, path, extra["config.json"])


def _described(module: Any, path: str | Path, text: str | bytes) -> Program:
    """A program with the configuration that ``gpt2x export`` puts into the file."""
    if not text:
        raise FormatError(f"{path}: not exported by gpt2x: it holds no config.json")
    where = f"{path}: config.json"
    raw = parse_json(text if isinstance(text, bytes) else text.encode(), where)
    config, task = config_of(raw, where), task_of(raw)
    return Program(module, config, task, _labels(raw, where) if TASKS[task].head else None)


def _labels(raw: Mapping[str, Any], where: str) -> Labels:
    """The labels of a classifier, as many as are named: the program does not tell how many it has."""
    settings = head_settings(raw)
    names = settings.get("id2label")
    if not isinstance(names, dict) or not names:
        raise ConfigError(f"{where}: a classifier without id2label, an object of names")
    return labels_of(settings, len(names), where)


def _reordered(past: Past, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(key.index_select(0, rows), value.index_select(0, rows)) for key, value in past]


def _truncated(past: Past, length: int) -> list[tuple[Tensor, Tensor]]:
    return [(key[:, :, :length].contiguous(), value[:, :, :length].contiguous()) for key, value in past]


def _length(past: Past, config: GPT2Config, B: int, dtype: torch.dtype) -> int:
    """Return how many tokens a cache holds.

    Raises:
        InputError: if it is not a cache of this model for B rows.
    """
    try:
        layers = len(past)
        tensors = [tensor for key, value in past for tensor in (key, value)]
        P = int(tensors[0].shape[2])
    except (TypeError, ValueError, AttributeError, IndexError):
        raise InputError("the cache is not one that an earlier step returned") from None
    if layers != config.n_layer:
        raise InputError(f"the cache has {layers} layers, the model {config.n_layer}")
    wanted = (B, config.n_head, P, config.head_dim), dtype
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise InputError(f"the cache holds {type(tensor).__name__}; torch.Tensor is needed")
        if (tuple(tensor.shape), tensor.dtype) != wanted:
            raise InputError(f"the cache holds {tensor.dtype} {tuple(tensor.shape)}; {dtype} {wanted[0]} is needed")
    return P


def one_line(error: Exception) -> str:
    """The message of an error in one line. TorchScript's interpreter puts it last, all others first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    place = -1 if "TorchScript interpreter" in lines[0] else 0
    return lines[place][:300]
