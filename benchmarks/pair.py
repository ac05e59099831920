"""Measure the resident memory of a pair of models, one for prompts and one for decoding, next to that of each alone.

    python benchmarks/pair.py [--pair w8a8+int4] [--block-size 32]

GPT-2 small's shape with random weights, and a cache in place. Each runs in its own process, which reads a prompt of 128 tokens
and decodes 64. The pair should take no more than both models together, less one token table. What a process takes without a
model is not counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
from models import random_model

from converters import GPT2Config
from gpt2x import ExportOptions, export_onnx

# Arguments: directory, and a precision, a pair, or "nothing". Prints anonymous and mapped megabytes as JSON.
PROGRAM = """
import json, re, sys
from pathlib import Path
import numpy as np
import onnxruntime
from gpt2x import OnnxDecoder

if sys.argv[2] != "nothing":
    decoder = OnnxDecoder(sys.argv[1], precision=sys.argv[2], threads=2)
    ids = np.random.default_rng(1).integers(decoder.n_vocab, size=(1, 128))
    logits, cache = decoder.step(ids, None, np.arange(128)[None], None)
    for place in range(128, 192):
        logits, cache = decoder.step(logits.argmax(-1)[:, None], None, np.array([[place]]), cache)
status = Path("/proc/self/status").read_text()
sizes = [int(re.search(name + r":\\s+(\\d+) kB", status)[1]) * 1024 / 1e6 for name in ("RssAnon", "RssFile")]
print(json.dumps(sizes))
"""


@dataclass(frozen=True)
class Memory:
    """Resident megabytes of a process: its own, and pages of files."""

    anonymous: float
    mapped: float

    @property
    def total(self) -> float:
        """Both."""
        return self.anonymous + self.mapped

    def without(self, other: Memory) -> Memory:
        """What it has more than another process."""
        return Memory(self.anonymous - other.anonymous, self.mapped - other.mapped)


def memory_of(folder: Path, precision: str) -> Memory:
    """The memory of a new process with this model."""
    command = [sys.executable, "-c", PROGRAM, str(folder), precision]
    return Memory(*json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def table_size(precision: str, config: GPT2Config, block: int) -> float:
    """The megabytes of a token table: its numbers, and their scales in float32."""
    width = config.n_embd
    bytes_of_row = {"w8a8": width + 4, "int8": width + 4 * width / block, "int4": width / 2 + 4 * width / block}
    return config.n_vocab * bytes_of_row.get(precision, 4 * width) / 1e6


@click.command()
@click.option("--pair", default="w8a8+int4", show_default=True, help="The precisions for prompts and for decoding.")
@click.option("--block-size", default=32, show_default=True, help="Weights that share a scale, in int8 and int4.")
def main(pair: str, block_size: int) -> None:
    """Compare the memory of a pair with that of its models."""
    singles = tuple(pair.split("+"))
    config = GPT2Config()
    with tempfile.TemporaryDirectory(prefix="gpt2x-pair-") as name:
        options = ExportOptions(singles, cache="inplace", last=True, block=block_size)
        export_onnx(random_model(config), Path(name, "m"), options, need_tokenizer=False)
        base = memory_of(Path(name, "m"), "nothing")
        found = {kind: memory_of(Path(name, "m"), kind).without(base) for kind in (*singles, pair)}
    print("| | anonymous, MB | mapped, MB | together |\n| --- | --- | --- | --- |")
    for kind, memory in found.items():
        print(f"| {kind} | {memory.anonymous:.0f} | {memory.mapped:.0f} | {memory.total:.0f} |")
    both = sum(found[single].total for single in singles)
    tables = ", ".join(f"{single} {table_size(single, config, block_size):.0f}" for single in singles)
    print(f"\nboth {both:.0f} MB, the pair {both - found[pair].total:.0f} MB less; token tables, MB: {tables}")


if __name__ == "__main__":
    main()
