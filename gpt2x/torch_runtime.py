"""GPT-2 in torch as a step of decoding: a ``GPT2``, a TorchScript file, or a ``.pt2`` file."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converters import FormatError, GPT2Config
from converters.config import config_of
from converters.files import File, parse_json

from .generate import Ids, Logits
from .model import GPT2


class TorchDecoder:
    """A ``GPT2`` for the decode loop of ``gpt2x.generate``. The model is put into eval mode."""

    def __init__(self, model: GPT2) -> None:
        self.model = model.eval()
        self.runtime = f"the weights in gpt2x's model, in torch {torch.__version__}"
        self.config = model.config
        self.n_ctx = model.config.n_ctx
        self.n_vocab = model.config.n_vocab

    def step(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """As ``Decoder.step``."""
        logits, cache = self._run(input_ids, attention_mask, position_ids, cache, last=True)
        return logits[:, -1], cache

    def run(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """As ``step``, but the logits of every new token: (B, T, V)."""
        return self._run(input_ids, attention_mask, position_ids, cache, last=False)

    @torch.inference_mode()
    def _run(self, ids: Ids, mask: Ids | None, positions: Ids, cache: Any, last: bool) -> tuple[Logits, Any]:
        seen = None if mask is None else self._tensor(mask)
        x, cache = self.model.hidden(self._tensor(ids), seen, self._tensor(positions), cache, last)
        return self.model.logits(x).float().cpu().numpy(), cache

    def _tensor(self, array: Ids) -> Tensor:
        return torch.from_numpy(array).to(self.model.wte.weight.device)


class ModuleDecoder:
    """A file that ``gpt2x export`` wrote for torch alone, for the decode loop of ``gpt2x.generate``.

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
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = load(name, extra)
        except Exception as error:  # torch raises RuntimeError, ValueError and others here
            raise FormatError(f"{path}: torch cannot load it: {_first_line(error)}") from None
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
        """As ``step``, but the logits of every new token: (B, T, V)."""
        past = self._empty(len(input_ids)) if cache is None else cache
        total = past[0][0].shape[2] + input_ids.shape[1]
        mask = torch.ones(len(input_ids), total, dtype=torch.int64) if attention_mask is None else attention_mask
        try:
            logits, present = self.module(*map(torch.as_tensor, (input_ids, mask, position_ids)), past)
            found: Logits = logits.numpy()
        except Exception as error:  # the program is the file's, and raises what it likes
            raise FormatError(f"{self.path}: torch cannot run it: {_first_line(error)}") from None
        if found.shape != (*input_ids.shape, self.n_vocab):
            raise FormatError(f"{self.path}: gives {found.shape}, not logits {(*input_ids.shape, self.n_vocab)}")
        return found, present

    def _empty(self, B: int) -> list[tuple[Tensor, Tensor]]:
        size = (B, self.config.n_head, 0, self.config.head_dim)
        return [(torch.empty(size), torch.empty(size)) for _ in range(self.config.n_layer)]


def _first_line(error: Exception) -> str:
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)
