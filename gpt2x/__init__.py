"""gpt2x converts GPT-2 weights between all formats, and proves that nothing changed.

    from gpt2x import GPT2, SHAKESPEARE, Tokenizer, from_pretrained, generate_text

    model = from_pretrained(SHAKESPEARE)
    tokenizer = Tokenizer.from_pretrained(SHAKESPEARE)
    print(generate_text(model, tokenizer, "ROMEO:", 50))

Names are imported when they are first used: only what needs torch imports it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__

SHAKESPEARE = Path(__file__).parent / "shakespeare"
"""A small GPT-2 that ships with gpt2x, in OpenAI's format: 2 million parameters, trained on Shakespeare's plays."""

_HOMES = {
    "gpt2x.model": (
        "GPT2", "VOCAB_SIZE", "EMBED_DIM", "NUM_LAYERS", "NUM_HEADS", "FFN_DIM", "MAX_LEN", "DROP_RATE",
    ),
    "gpt2x.download.fetch": ("fetch",),
    "gpt2x.load": ("load_model", "from_pretrained", "checkpoint_of"),
    "gpt2x.tokenizer": ("Tokenizer",),
    "gpt2x.generation.beams": ("Beams", "beam_search"),
    "gpt2x.generation.config": ("GenerationConfig",),
    "gpt2x.generation.generate": ("generate_text",),
    "gpt2x.generation.loop": ("Generation",),
    "gpt2x.generation.sampling": ("Sampling",),
    "gpt2x.generation.text": ("TextStream",),
    "gpt2x.scoring.score": ("Score", "score"),
    "gpt2x.runtimes.base": ("InputError", "PromptError"),
    "gpt2x.runtimes.onnxruntime": ("OnnxDecoder",),
    "gpt2x.runtimes.batching": ("RunningBatch",),
    "gpt2x.export.onnx_directory": ("ExportOptions", "export_onnx"),
    "converters": ("GPT2Config", "Checkpoint", "ConversionError", "open_checkpoint", "save_checkpoint"),
}  # fmt: skip
# What is not installed with gpt2x itself -> the extra that installs it.
_EXTRAS = {
    "h5py": "formats", "torch": "torch", "onnx": "export", "transformers": "verify", "huggingface_hub": "hub",
    "httpx2": "hub", "filelock": "hub", "starlette": "serve", "uvicorn": "serve", "prometheus_client": "serve",
    "pydantic": "serve", "jinja2": "serve",
}  # fmt: skip
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from converters import Checkpoint, ConversionError, GPT2Config, open_checkpoint, save_checkpoint

    from .download.fetch import fetch
    from .export.onnx_directory import ExportOptions, export_onnx
    from .generation.beams import Beams, beam_search
    from .generation.config import GenerationConfig
    from .generation.generate import generate_text
    from .generation.loop import Generation
    from .generation.sampling import Sampling
    from .generation.text import TextStream
    from .load import checkpoint_of, from_pretrained, load_model
    from .model import DROP_RATE, EMBED_DIM, FFN_DIM, GPT2, MAX_LEN, NUM_HEADS, NUM_LAYERS, VOCAB_SIZE
    from .runtimes.base import InputError, PromptError
    from .runtimes.batching import RunningBatch
    from .runtimes.onnxruntime import OnnxDecoder
    from .scoring.score import Score, score
    from .tokenizer import Tokenizer


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'gpt2x' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME_OF[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        hint = f"gpt2x.{name} needs {error.name}: pip install 'gpt2x[{_EXTRAS[error.name]}]'"
        raise ModuleNotFoundError(hint, name=error.name) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])


__all__ = [
    "DROP_RATE",
    "EMBED_DIM",
    "FFN_DIM",
    "GPT2",
    "MAX_LEN",
    "NUM_HEADS",
    "NUM_LAYERS",
    "SHAKESPEARE",
    "VOCAB_SIZE",
    "Beams",
    "Checkpoint",
    "ConversionError",
    "ExportOptions",
    "GPT2Config",
    "Generation",
    "GenerationConfig",
    "InputError",
    "OnnxDecoder",
    "PromptError",
    "RunningBatch",
    "Sampling",
    "Score",
    "TextStream",
    "Tokenizer",
    "__version__",
    "beam_search",
    "checkpoint_of",
    "export_onnx",
    "fetch",
    "from_pretrained",
    "generate_text",
    "load_model",
    "open_checkpoint",
    "save_checkpoint",
    "score",
]
