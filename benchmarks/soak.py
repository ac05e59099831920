"""Measure the resident memory of one decoder over hundreds of requests of mixed lengths and batch sizes, next to plain
``session.run``.

    python benchmarks/soak.py [--requests 550] [--cache growing|inplace] [DIR]

Without DIR, it exports a random model of 14 million parameters and a context of 1024. Each runs in its own process. The decoder
should stay within 10% of its memory after 50 requests, and below 1.2 times the final memory of ``session.run``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from models import random_model

from converters import GPT2Config
from gpt2x import ExportOptions, export_onnx

SETTLED = 50  # requests after which memory should not grow
EVERY = 10

# Arguments: directory, number of requests, "decoder" or "session". Prints the resident megabytes after every ten requests.
PROGRAM = """
import json, os, sys
import numpy as np
import onnxruntime as ort
from gpt2x import Generation, OnnxDecoder, Sampling

folder, requests, which = sys.argv[1], int(sys.argv[2]), sys.argv[3]
random = np.random.default_rng(1)
decoder = OnnxDecoder(folder, threads=1)
heads, width, n_ctx, n_vocab = decoder.config.n_head, decoder.config.head_dim, decoder.n_ctx, decoder.n_vocab
if which == "session":
    path, options = str(decoder.path), ort.SessionOptions()
    del decoder
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options)
    names = [i.name for i in session.get_inputs()[3:]]

def plainly(prompts, new):
    longest = max(map(len, prompts))
    ids, mask = np.zeros((len(prompts), longest), np.int64), np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt):], mask[row, longest - len(prompt):] = prompt, 1
    places = np.maximum(mask.cumsum(1) - 1, 0)
    past = dict.fromkeys(names, np.zeros((len(prompts), heads, 0, width), np.float32))
    for _ in range(new):
        logits, *present = session.run(None, {"input_ids": ids, "attention_mask": mask, "position_ids": places} | past)
        past, ids, places = dict(zip(names, present)), logits[:, -1:].argmax(-1), places[:, -1:] + 1
        mask = np.concatenate((mask, np.ones_like(ids)), 1)

seen = []
for request in range(1, requests + 1):
    rows, new = int(random.integers(1, 5)), int(random.integers(1, 10))
    length = int(random.integers(5, n_ctx - 50))
    prompts = [random.integers(0, n_vocab, length - row).tolist() for row in range(rows)]
    if which == "session":
        plainly(prompts, new)
    else:
        list(Generation(decoder, prompts, new, Sampling(temperature=0)))
    if request % 10 == 0:
        seen.append(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
print(json.dumps(seen))
"""


def small_model(folder: Path, cache: str) -> Path:
    """Export a model of 14 million parameters. Its cache can be larger than its weights."""
    config = GPT2Config(n_layer=6, n_head=6, n_embd=384, n_ctx=1024, n_vocab=8192, bos_token_id=0, eos_token_id=0)
    export_onnx(random_model(config), folder, ExportOptions(cache=cache), need_tokenizer=False)
    return folder


def memory(folder: Path, requests: int, which: str) -> list[float]:
    """Return the resident megabytes after every ten requests."""
    command = [sys.executable, "-c", PROGRAM, str(folder), str(requests), which]
    found: list[float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


@click.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--requests", default=550, show_default=True, help="Number of requests.")
@click.option("--cache", type=click.Choice(["growing", "inplace"]), default="growing", show_default=True)
def main(folder: Path | None, requests: int, cache: str) -> None:
    """Measure the memory of OnnxDecoder and of plain session.run."""
    with tempfile.TemporaryDirectory(prefix="gpt2x-soak-") as name:
        folder = folder or small_model(Path(name) / "model", cache)
        for which in ("decoder", "session"):
            found = memory(folder, requests, which)
            settled = found[SETTLED // EVERY - 1 :]
            print(f"{which}: {found[0]:.0f} MB after {EVERY} requests, {settled[0]:.0f} after {SETTLED}, "
                  f"{min(settled):.0f} to {max(settled):.0f} after that, {found[-1]:.0f} at the end", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
