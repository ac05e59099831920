"""Whatever can be run and compared, opened by what it is: weights, TorchScript, ``.pt2``, ONNX."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from converters import Checkpoint, FormatError, GPT2Config, open_checkpoint
from converters.files import check_name
from converters.torch_zip import PROGRAMS, program_in

from .contract import has_onnx
from .generate import Decoder

Array = NDArray[Any]


NAMES = {"weights": "weights", "onnx": "ONNX", **{kind: name for kind, (_, name) in PROGRAMS.items()}}


class Subject(Decoder, Protocol):
    """A decoder that also gives the logits of every new token."""

    config: GPT2Config
    runtime: str  # what runs it

    def run(self, input_ids: Array, attention_mask: Array | None, position_ids: Array, cache: Any) -> tuple[Array, Any]:
        """As ``step``, but logits (B, T, V); (B, 1, V) where the subject's ``last_only`` is true."""
        ...


def kind_of(path: str | Path) -> str:
    """What a path holds, of ``NAMES``. Of a directory that has ONNX, the ONNX is meant."""
    path = Path(path)
    check_name(path)
    if has_onnx(path):
        return "onnx"
    if path.is_file() and zipfile.is_zipfile(path):
        return program_in(_members(path)) or "weights"
    return "weights"


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError):
        return []  # whoever opens it as weights says what is wrong


def open_subject(
    path: str | Path, runtime: str | None = None, *, n_head: int | None = None, precision: str | None = None
) -> Subject:
    """Open anything that can be run.

    Args:
        runtime: "torch" runs the weights of a directory that has ONNX as well; "onnx" insists on ONNX.
        precision: which ONNX model of a directory; by default fp32, or else the only one.

    Raises:
        ConversionError: if it cannot be opened.
    """
    kind = kind_of(path)
    if runtime == "onnx" or (kind == "onnx" and runtime is None):
        from .runtime import OnnxDecoder

        return OnnxDecoder(path, precision=precision)
    if kind == "onnx" and Path(path).suffix == ".onnx":
        raise FormatError(f"{path}: an ONNX model, which torch does not run")
    if precision is not None:
        meant = NAMES["weights" if kind == "onnx" else kind]
        raise FormatError(f"{path}: precisions are for ONNX, and this would be run as {meant}")
    from .torch_runtime import ModuleDecoder

    if kind == "torchscript":
        return ModuleDecoder.from_torchscript(path)
    if kind == "pt2":
        return ModuleDecoder.from_pt2(path)
    return gpt2x_model(open_checkpoint(path, n_head=n_head))


def gpt2x_model(checkpoint: Checkpoint) -> Subject:
    """gpt2x's own model of a checkpoint."""
    from .load import model_of
    from .torch_runtime import TorchDecoder

    return TorchDecoder(model_of(checkpoint))


class Uncached:
    """A function from ids to logits as a subject that computes everything anew at each step, for one row."""

    def __init__(self, logits: Callable[[Sequence[int]], Array], config: GPT2Config) -> None:
        self.logits, self.config, self.n_ctx, self.n_vocab = logits, config, config.n_ctx, config.n_vocab
        self.runtime = "gpt2x's reference in float64"

    def run(self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any) -> tuple[Any, Any]:
        """As ``Subject.run``."""
        ids = [*(cache or []), *input_ids[0].tolist()]
        return np.asarray(self.logits(ids))[None, -input_ids.shape[1] :], ids

    def step(self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any) -> tuple[Any, Any]:
        """As ``Decoder.step``."""
        logits, cache = self.run(input_ids, attention_mask, position_ids, cache)
        return logits[:, -1], cache


class Transformers:
    """transformers' ``GPT2LMHeadModel`` with the weights of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        import torch
        import transformers
        from transformers import GPT2Config, GPT2LMHeadModel

        from converters.config import to_hf

        from .load import state_of

        config = GPT2Config(
            **{k: v for k, v in to_hf(checkpoint.config).items() if k not in ("architectures", "model_type", "n_ctx")}
        )
        config._attn_implementation = "eager"
        with torch.device("meta"):
            self.model = GPT2LMHeadModel(config)
        state = {
            name if name.startswith("lm_head") else f"transformer.{name}": t.float()
            for name, t in state_of(checkpoint).items()
        }
        state.setdefault("lm_head.weight", state["transformer.wte.weight"])
        self.model.load_state_dict(state, assign=True, strict=True)
        self.model.tie_weights()
        self.model.eval()
        self.runtime = f"transformers {transformers.__version__}, in torch {torch.__version__}"
        self.config = checkpoint.config
        self.n_ctx, self.n_vocab = checkpoint.config.n_ctx, checkpoint.config.n_vocab

    def run(self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any) -> tuple[Any, Any]:
        """As ``Subject.run``."""
        import torch

        mask = None if attention_mask is None else torch.from_numpy(attention_mask)
        with torch.inference_mode():
            out = self.model(
                torch.from_numpy(input_ids),
                attention_mask=mask,
                position_ids=torch.from_numpy(position_ids),
                past_key_values=cache,
                use_cache=True,
            )
        return out.logits.numpy(), out.past_key_values

    def step(self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any) -> tuple[Any, Any]:
        """As ``Decoder.step``."""
        logits, cache = self.run(input_ids, attention_mask, position_ids, cache)
        return logits[:, -1], cache
