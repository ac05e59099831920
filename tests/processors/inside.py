"""What ``test_processors.py`` runs on an emulated processor: ``python inside.py MODELS RESULTS``.

MODELS has ``products/`` and ``exports/``. Into the folder RESULTS go ``converted/``, ``products.npz`` and ``logits.npz``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from converters import open_checkpoint, save_checkpoint
from gpt2x import SHAKESPEARE, contract
from gpt2x.runtimes.onnxruntime import OnnxDecoder

FIXTURES = Path(__file__).parents[1] / "fixtures"
SOURCES = (
    "flax",
    "gguf/BF16.gguf",
    "gguf/F16.gguf",
    "gguf/F32.gguf",
    "gguf/Q8_0.gguf",
    "llmc/gpt2.bin",
    "llmc/gpt2_bf16.bin",
    "mlx",
    "nanogpt/ckpt.pt",
    "onnx_optimum",
    "tf_fp16",
    "tf_partitioned",
    "tf_plain",
    "tf_training",
    "tf_two_shards",
)
# The shipped model, from one file to the next: file name, format, and dtype where it is another one.
CHAIN = (
    ("a", "hf", None),
    ("b.gguf", "gguf", None),
    ("c", "tf", None),
    ("d.gguf", "gguf", "Q8_0"),
    ("e.safetensors", "safetensors", "BF16"),
    ("f.bin", "bin", "F64"),
    ("g.pt", "nanogpt", "F32"),
    ("h.bin", "llmc", None),
    ("i", "tf", "F16"),
)
PROMPT = 7  # tokens of the first step
BATCHES = (1, 3)  # rows; a kernel may treat one row differently
ALONE = ("saturating-growing", "large-growing")  # exports that are run in ONNX Runtime without gpt2x, too
EXACT = "session.x64quantprecision"


def token_ids(rows: int) -> np.ndarray:
    """The tokens to run, (rows, 16), below 48."""
    return np.random.default_rng(7).integers(48, size=(rows, 16))


def convert(folder: Path) -> None:
    """Convert every fixture to safetensors, and the shipped model from format to format."""
    for source in SOURCES:
        save_checkpoint(open_checkpoint(FIXTURES / source), folder / f"{source.replace('/', ' ')}.safetensors")
    previous = SHAKESPEARE
    for name, form, dtype in CHAIN:
        save_checkpoint(open_checkpoint(previous), folder / name, form, dtype=dtype)
        previous = folder / name


def multiply(products: Path) -> dict[str, np.ndarray]:
    """Run the ONNX file of each integer product, without and with the exact option. Returns the outputs."""
    found = {}
    for path in sorted(products.glob("*.onnx")):
        activations = np.load(path.with_suffix(".npy"))
        for rows in BATCHES:
            for exact in (False, True):
                (output,) = session(path, exact).run(None, {"a": activations[:rows]})
                found[f"{path.stem} {rows} {exact}"] = output
    return found


def decode(exports: Path) -> dict[str, np.ndarray]:
    """Run every model of every export: a prompt, then token after token. Returns the logits."""
    found = {}
    for path in sorted(exports.iterdir()):
        for precision in contract.models_in(path):
            decoder = OnnxDecoder(path, precision=precision, threads=1)
            for rows in BATCHES:
                found[f"{path.name} {precision} {rows}"] = logits_of(decoder, token_ids(rows))
    for name in ALONE:
        for exact in (False, True):
            found[f"{name} alone {exact}"] = one_pass(exports / name / contract.model_file("w8a8"), exact)
    return found


def logits_of(decoder: OnnxDecoder, ids: np.ndarray) -> np.ndarray:
    """The logits after the prompt and after each later token, (rows, 10, V)."""
    positions = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
    logits, cache = decoder.step(ids[:, :PROMPT], None, positions[:, :PROMPT], None)
    found = [logits]
    for t in range(PROMPT, ids.shape[1]):
        logits, cache = decoder.step(ids[:, t : t + 1], None, positions[:, t : t + 1], cache)
        found.append(logits)
    return np.stack(found, 1)


def one_pass(path: Path, exact: bool) -> np.ndarray:
    """The logits of a model with a growing cache in ONNX Runtime alone, after each token of one row, (16, V)."""
    model, ids = session(path, exact), token_ids(1)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    for slot in model.get_inputs():
        if slot.name not in feed:
            _, n_head, _, head_dim = slot.shape
            feed[slot.name] = np.zeros((1, n_head, 0, head_dim), np.float32)
    (logits,) = model.run(["logits"], feed)
    return logits[0]


def session(path: Path, exact: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if exact:
        options.add_session_config_entry(EXACT, "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def main(models: Path, results: Path) -> None:
    converted = results / "converted"
    converted.mkdir()
    convert(converted)
    products: dict[str, Any] = {**multiply(models / "products")}
    logits: dict[str, Any] = {**decode(models / "exports")}
    np.savez(results / "products.npz", **products)
    np.savez(results / "logits.npz", **logits)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
