"""GPT-2 in torch as a step of decoding: a ``GPT2``, a TorchScript file, or a ``.pt2`` file."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor

from converters import ChecksumError, FormatError, GPT2Config
from converters.config import config_of
from converters.io.json import parse_json
from converters.io.reading import File

from ..model import GPT2
from .base import Ids, InputError, Logits, check_mask, check_tokens

Past = Sequence[tuple[Tensor, Tensor]]  # key and value of each layer, each (B, H, P, D)


class TorchDecoder:
    """A ``GPT2`` for the decode loop of ``gpt2x.generation``. The model is put into eval mode."""

    def __init__(self, model: GPT2) -> None:
        self.model = model.eval()
        self.runtime = f"the weights in gpt2x's model, in torch {torch.__version__}"
        self.config = model.config
        self.n_ctx = model.config.n_ctx
        self.n_vocab = model.config.n_vocab

    def step(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """As ``Decoder.step``.

        Raises:
            InputError: if these do not fit the model or one another.
        """
        logits, cache = self._run(input_ids, attention_mask, position_ids, cache, last=True)
        return logits[:, -1], cache

    def run(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """As ``step``, but the logits of every new token: (B, T, V)."""
        return self._run(input_ids, attention_mask, position_ids, cache, last=False)

    @torch.inference_mode()
    def _run(self, ids: Ids, mask: Ids | None, positions: Ids, cache: Any, last: bool) -> tuple[Logits, Any]:
        ids, positions = check_tokens(ids, positions, self.n_vocab, self.n_ctx)
        weight = self.model.wte.weight
        kind = torch.float32 if self.config.reorder_and_upcast_attn else weight.dtype
        P = 0 if cache is None else _length(cache, self.config, len(ids), kind)
        seen = None if mask is None else self._tensor(check_mask(mask, len(ids), P, ids.shape[1]))
        x, cache = self.model.hidden(self._tensor(ids), seen, self._tensor(positions), cache, last)
        return self.model.logits(x).float().cpu().numpy(), cache

    def _tensor(self, array: Ids) -> Tensor:
        return torch.from_numpy(array).to(self.model.wte.weight.device)


class ModuleDecoder:
    """A file that ``gpt2x export`` wrote for torch alone, for the decode loop of ``gpt2x.generation``.

    A TorchScript or ``.pt2`` file is a program: load one only if you trust where it comes from.
    """

    def __init__(self, module: Any, config: GPT2Config, path: str | Path) -> None:
        self.module, self.config, self.path = module, config, path
        self.runtime = f"{Path(path).name} in torch {torch.__version__}"
        self.n_ctx, self.n_vocab = config.n_ctx, config.n_vocab

    @classmethod
    def from_torchscript(cls, path: str | Path) -> ModuleDecoder:
        """Load TorchScript.

        Raises:
            FormatError: if torch cannot load it, or it is not one of gpt2x's.
        """

        def load(file: str, extra: dict[str, Any]) -> Any:
            return torch.jit.load(file, map_location="cpu", _extra_files=extra)

        return cls._load(path, load)

    @classmethod
    def from_pt2(cls, path: str | Path) -> ModuleDecoder:
        """Load a program of ``torch.export``.

        Raises:
            FormatError: if torch cannot load it, or it is not one of gpt2x's.
        """
        return cls._load(path, lambda file, extra: torch.export.load(file, extra_files=extra).module())

    @classmethod
    def _load(cls, path: str | Path, load: Callable[[str, dict[str, Any]], Any]) -> ModuleDecoder:
        name = str(File(Path(path)).path)
        extra: dict[str, Any] = {"config.json": ""}
        try:
            with warnings.catch_warnings(), ZipFile(name) as archive:
                warnings.simplefilter("ignore")
                damaged = archive.testzip()  # torch itself looks at no checksum
                module = None if damaged else load(name, extra)
        except Exception as error:  # torch raises RuntimeError, ValueError and others here
            raise FormatError(f"{path}: torch cannot load it: {_line(error)}") from None
        if damaged:
            raise ChecksumError(f"{path}: {damaged[:200]}, in it, does not match its checksum")
        said = extra["config.json"]
        if not said:
            raise FormatError(f"{path}: not exported by gpt2x: no config.json is in it")
        where = f"{path}: config.json"
        data = said if isinstance(said, bytes) else said.encode()
        return cls(module, config_of(parse_json(data, where), where), path)

    def step(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """As ``Decoder.step``."""
        logits, cache = self.run(input_ids, attention_mask, position_ids, cache)
        return logits[:, -1], cache

    @torch.inference_mode()
    def run(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """As ``step``, but the logits of every new token: (B, T, V).

        Raises:
            InputError: if these do not fit the model or one another.
            FormatError: if the program cannot be run with them, or gives something else.
        """
        ids, positions = check_tokens(input_ids, position_ids, self.n_vocab, self.n_ctx)
        B, T = ids.shape
        past = self._empty(B) if cache is None else cache
        mask = check_mask(attention_mask, B, _length(past, self.config, B, torch.float32), T)
        past = [(key, value) for key, value in past]  # a program takes a list
        try:
            logits, present = self.module(*map(torch.from_numpy, (ids, mask, positions)), past)
            found: Logits = logits.numpy()
            layers = len(present)
        except Exception as error:  # the program is the file's, and raises what it likes
            raise FormatError(f"{self.path}: torch cannot run it: {_line(error)}") from None
        if found.shape != (B, T, self.n_vocab):
            raise FormatError(f"{self.path}: gives {found.shape}, not logits {(B, T, self.n_vocab)}")
        if layers != self.config.n_layer:
            raise FormatError(
                f"{self.path}: gives the cache of {layers} layers; its config.json says {self.config.n_layer}"
            )
        return found, present

    def _empty(self, B: int) -> list[tuple[Tensor, Tensor]]:
        size = (B, self.config.n_head, 0, self.config.head_dim)
        return [(torch.empty(size), torch.empty(size)) for _ in range(self.config.n_layer)]


def _length(past: Past, config: GPT2Config, B: int, dtype: torch.dtype) -> int:
    """How many tokens a cache holds.

    Raises:
        InputError: if it is not one of this model's for B rows.
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
            raise InputError(f"the cache holds {type(tensor).__name__}, not tensors of torch")
        if (tuple(tensor.shape), tensor.dtype) != wanted:
            raise InputError(f"the cache holds {tensor.dtype} {tuple(tensor.shape)}; {dtype} {wanted[0]} is needed")
    return P


def _line(error: Exception) -> str:
    """What an error says, in one line: the interpreter's of TorchScript say it last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if "TorchScript interpreter" in lines[0] else 0][:300]
