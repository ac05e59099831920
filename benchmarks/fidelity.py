"""Compare the accuracy of quantized models with float32, on held-out text: gpt2x's precisions and llama.cpp's, for the model
that ships with gpt2x.

    python benchmarks/fidelity.py --text shakespeare.txt --skip 1003954 --calibrate beginning.txt --llama PYTHON

The text is split into windows of 256 tokens, the model's context. The reference is gpt2x's PyTorch model. The divergence is
KL(reference || other) of the next-token distribution, in nats, over all positions. llama.cpp's cache is float32 here, so that
only weights are compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from gpt2x.contract import data_file, model_file

MODEL = Path(__file__).parents[1] / "gpt2x" / "shakespeare"
WINDOW = 256
CHARACTERS = 60_000
QUANTIZED = ("F32", "Q8_0", "Q4_0")  # llama.cpp's

# gpt2x's exports: precisions, options, and whether to export with --calibrate, too.
IN_PLACE, IN_BYTES, GROWING = ("--cache", "inplace"), ("--cache", "inplace-int8"), ("--cache", "growing")
EXPORTS = (
    (("fp32", "fp16"), IN_PLACE, False),
    *((("int8", "int4"), (*IN_PLACE, "--block-size", size), True) for size in ("16", "32", "64", "128")),
    (("w8a8",), IN_PLACE, True),
    (("fp32", "int8"), IN_BYTES, True),
    (("fp32", "fp16", "int8", "w8a8", "int4"), GROWING, False),
)

# The last argument of each program is its output file. ids: (windows, WINDOW); logits: (windows, WINDOW, V), float32.
REFERENCE = """
import sys
from pathlib import Path
import numpy as np
from converters import open_checkpoint
from gpt2x.runtimes.opening import gpt2x_model
from gpt2x.tokenizer import Tokenizer
model, text, skip, characters, window, ids_file, target = sys.argv[1:]
text = Path(text).read_text(encoding="utf-8")[int(skip):][:int(characters)]
ids = np.array(Tokenizer.from_pretrained(model).encode(text), np.int64)
n, window = len(ids) // int(window), int(window)
assert n, "the text is shorter than one window"
ids = ids[: n * window].reshape(n, window)
subject = gpt2x_model(open_checkpoint(model))
np.save(ids_file, ids)
np.save(target, np.concatenate([subject.run(row[None], None, np.arange(window)[None], None)[0] for row in ids]))
"""

GPT2X = """
import sys
import numpy as np
from gpt2x.runtimes.onnxruntime import OnnxDecoder
path, precision, ids, target = sys.argv[1:]
decoder = OnnxDecoder(path, precision=precision)
ids = np.load(ids)
places = np.arange(ids.shape[1])[None]
np.save(target, np.concatenate([decoder.run(row[None], None, places, None)[0] for row in ids]))
"""

LLAMA = """
import sys
import numpy as np
import llama_cpp
path, ids, target = sys.argv[1:]
ids = np.load(ids)
n = ids.shape[1]
F32 = 0
model = llama_cpp.Llama(
    path, n_ctx=n, n_batch=n, n_ubatch=n, logits_all=True, verbose=False, type_k=F32, type_v=F32)
def logits(row):
    model.reset()
    model.eval(row.tolist())
    return np.array(model.scores[:n], np.float32)
np.save(target, np.stack([logits(row) for row in ids]))
"""


class Found(NamedTuple):
    """A model, compared with the reference."""

    name: str
    size_mb: float
    mean_kl: float
    max_kl: float
    perplexity: float  # relative difference
    agreement: float  # share of positions with the same most likely token


def quietly(command: list[Any]) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x


def compare(name: str, size: int, ids: NDArray[Any], reference: Path, logits: Path) -> Found:
    """Compare the logits of one model with the reference's, one window at a time."""
    ours, theirs = np.load(reference, mmap_mode="r"), np.load(logits, mmap_mode="r")
    assert ours.shape == theirs.shape == (*ids.shape, ours.shape[2]), (name, ours.shape, theirs.shape)
    divergence, losses, same = [], [], []
    for window, a, b in zip(ids, map(log_softmax, ours), map(log_softmax, theirs), strict=True):
        divergence.append((np.exp(a) * (a - b)).sum(-1))
        places, following = np.arange(len(window) - 1), window[1:]
        losses.append((-a[places, following].mean(), -b[places, following].mean()))
        same.append(a.argmax(-1) == b.argmax(-1))
    was, now = np.exp(np.mean(losses, axis=0))
    kl = np.array(divergence)
    return Found(name, size / 1e6, kl.mean(), kl.max(), now / was - 1, float(np.mean(same)))


def export(python: Path, target: Path, precisions: tuple[str, ...], options: tuple[str, ...]) -> None:
    how = ["--precision", ",".join(precisions), *options, "--no-verify"]
    quietly([python, "-P", "-m", "gpt2x", "export", MODEL, "--onnx", target, *how])


def called(precision: str, options: tuple[str, ...], calibrated: bool) -> str:
    """Return a model's name, such as ``gpt2x int8, block 32, calibrated``."""
    given = dict(zip(options[::2], options[1::2], strict=True))
    block = f", block {given['--block-size']}" if "--block-size" in given else ""
    cache = "" if given["--cache"] == "inplace" else f", {given['--cache']} cache"
    return f"gpt2x {precision}{block}{cache}" + (", calibrated" if calibrated else "")


def weights_of(folder: Path, precision: str) -> int:
    """Return the bytes of the weight file. A small model can have its weights in the graph's file."""
    data = folder / "onnx" / data_file(precision)
    return (data if data.is_file() else folder / model_file(precision)).stat().st_size


def gpt2x_models(python: Path, work: Path, ids: Path, reference: Path, calibrate: Path | None) -> list[Found]:
    found: list[Found] = []
    target, rows = work / "logits.npy", np.load(ids)
    for precisions, options, rounded in EXPORTS:
        for text in (None, calibrate) if rounded and calibrate else (None,):
            folder = work / f"gpt2x-{len(found)}"
            export(python, folder, precisions, (*options, "--calibrate", str(text)) if text else options)
            for precision in precisions:
                quietly([python, "-P", "-W", "ignore", "-c", GPT2X, folder, precision, ids, target])
                name = called(precision, options, bool(text))
                found.append(compare(name, weights_of(folder, precision), rows, reference, target))
    return found


def llama_models(llama: Path, python: Path, work: Path, ids: Path, reference: Path) -> list[Found]:
    found, target, source, rows = [], work / "logits.npy", work / "hf", np.load(ids)
    quietly([python, "-P", "-m", "gpt2x", "convert", MODEL, source])
    for kind in QUANTIZED:
        model = work / f"{kind}.gguf"
        quietly([llama, Path(__file__).with_name("to_gguf.py"), source, model, kind])
        quietly([llama, "-P", "-W", "ignore", "-c", LLAMA, model, ids, target])
        found.append(compare(f"llama.cpp {kind}", model.stat().st_size, rows, reference, target))
    return found


def show(found: list[Found]) -> None:
    print("| | weights, MB | KL | largest KL | perplexity | top-1 |\n" + "| --- " * 6 + "|")
    for f in found:
        print(
            f"| {f.name} | {f.size_mb:.2f} | {f.mean_kl:.2e} | {f.max_kl:.2e} | {f.perplexity:+.4%} | {f.agreement:.2%} |"
        )


PATH = click.Path(path_type=Path)


@click.command()
@click.option("--text", type=PATH, required=True, help="Held-out text.")
@click.option("--skip", default=0, show_default=True, help=f"Skip N characters, then read {CHARACTERS:,}.")
@click.option("--calibrate", type=PATH, help="Calibration text (GPTQ), like --text but without overlap.")
@click.option("--llama", type=PATH, help="Python with llama-cpp-python, gguf and safetensors.")
@click.option("--gpt2x", "python", type=PATH, default=Path(sys.executable), help="Python with gpt2x[export].")
@click.option("--json", "answer", type=PATH, help="Write all results to this file.")
def main(text: Path, skip: int, calibrate: Path | None, llama: Path | None, python: Path, answer: Path | None) -> None:
    """Compare quantized models with float32. Parts without an option are skipped."""
    with tempfile.TemporaryDirectory(prefix="gpt2x-fidelity-") as name:
        work = Path(name)
        ids, reference = work / "ids.npy", work / "reference.npy"
        quietly([python, "-P", "-W", "ignore", "-c", REFERENCE, MODEL, text, skip, CHARACTERS, WINDOW, ids, reference])
        windows = len(np.load(ids))
        print(f"{windows * WINDOW:,} tokens in {windows} windows of {WINDOW}\n", flush=True)
        found = gpt2x_models(python, work, ids, reference, calibrate)
        if llama:
            found += llama_models(llama, python, work, ids, reference)
    show(found)
    if answer:
        answer.write_text(json.dumps([f._asdict() for f in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
