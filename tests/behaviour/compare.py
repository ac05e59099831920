"""Compare what two checkouts of gpt2x write: every file, byte by byte, and the JSON of inspect, convert and verify.

    python tests/behaviour/compare.py produce CHECKOUT FOLDER   # once for each checkout, run by this Python
    python tests/behaviour/compare.py compare FOLDER FOLDER     # exit code 1 where something differs

For changes that move code and change nothing that a user sees. Of JSON, keys, numbers and single words are compared; of longer
text, only that it is there, as wording may change.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

FIXTURES = Path(__file__).parents[1] / "fixtures"
SOURCE = Path(__file__).parents[2] / "gpt2x/shakespeare"
SAID = "said.json"
CONVERSIONS = {
    "model.safetensors": [],
    "model.bin": [],
    "model.gguf": [],
    "q8_0.gguf": ["--dtype", "q8_0"],
    "half.safetensors": ["--dtype", "fp16"],
    "bf16.bin": ["--dtype", "bf16"],
    "hf": [],
    "shards": ["--max-shard-size", "200KB"],
    "tf": ["--to", "tf"],
    "tf16": ["--to", "tf", "--dtype", "fp16"],
    "ckpt.pt": ["--to", "nanogpt"],
    "llmc.bin": ["--to", "llmc"],
    "llmc16.bin": ["--to", "llmc", "--dtype", "bf16"],
}
PRECISIONS = ("fp32", "fp16", "int8", "w8a8", "int4")
EXPORTS = {
    **{f"{cache}": ["--precision", ",".join(PRECISIONS), "--cache", cache] for cache in ("growing", "inplace", "inplace-int8")},
    "last": ["--logits", "last", "--opset", "23"],
    "one": ["--single-file", "--precision", "fp32,int8", "--safetensors"],
    "low": ["--precision", "int8,int4,w8a8", "--block-size", "64", "--opset", "21"],
}  # fmt: skip


def run(checkout: Path, folder: Path, *arguments: object) -> str:
    """The output of a gpt2x command of a checkout; the exit code is part of it."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "NO_COLOR": "1", "SOURCE_DATE_EPOCH": "0"}
    command = [sys.executable, "-m", "gpt2x", *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{checkout}: {command}: {done.stderr}")
    return f"{done.stdout}\nexit code {done.returncode}"


def produce(checkout: Path, folder: Path) -> dict[str, str]:
    """Write everything in a folder. Returns name -> JSON that the commands printed."""
    said = {}
    for name, options in CONVERSIONS.items():
        said[f"convert {name}"] = run(checkout, folder, "convert", SOURCE, name, *options, "--json")
        said[f"inspect {name}"] = run(checkout, folder, "inspect", name, "--tensors", "--json")
        said[f"verify {name}"] = run(checkout, folder, "verify", SOURCE, name, "--rounded", "--json", "-")
    for path in sorted(FIXTURES.iterdir()):
        if path.is_dir():
            said[f"inspect {path.name}"] = run(checkout, folder, "inspect", path, "--tensors", "--json")
            said[f"convert {path.name}"] = run(
                checkout, folder, "convert", path, f"from-{path.name}.safetensors", "--json"
            )
    for name, options in EXPORTS.items():
        run(checkout, folder, "export", SOURCE, "--onnx", name, *options, "--no-verify")
        precisions = options[options.index("--precision") + 1].split(",") if "--precision" in options else ["fp32"]
        for precision in precisions:
            said[f"inspect {name} {precision}"] = run(
                checkout, folder, "inspect", name, "--precision", precision, "--json"
            )
            said[f"verify {name} {precision}"] = run(
                checkout, folder, "verify", SOURCE, name, "--precision", precision, "--json", "-"
            )
    for name, option in (("model.torchscript", "--torchscript"), ("model.pt2", "--pt2")):
        run(checkout, folder, "export", SOURCE, option, name, "--no-verify")
        said[f"inspect {name}"] = run(checkout, folder, "inspect", name, "--json")
        said[f"verify {name}"] = run(checkout, folder, "verify", SOURCE, name, "--json", "-")
    return said


# ------------------------------------------------------------------------------------------------------- comparing


def contents(file: Path) -> Any:
    """What must stay the same of a file: the bytes, or the program of one that holds versions or paths."""
    if file.suffix == ".onnx":
        model = onnx.load(file, load_external_data=False)
        model.producer_version = ""
        kept = {p.key: p.value for p in model.metadata_props if p.key != "gpt2x.version"}
        del model.metadata_props[:]
        return hashlib.sha256(model.SerializeToString()).hexdigest(), kept
    if file.suffix == ".md":
        return "text"
    if file.suffix == ".pt2":
        program = torch.export.load(file)
        return re.sub(r"(?m)^\s*# File.*$", "", str(program.graph)), tensors(program.state_dict)
    if file.suffix == ".torchscript":
        module = torch.jit.load(file)
        return str(module.inlined_graph.copy()).split("# ")[0], module.code, tensors(module.state_dict())
    return hashlib.sha256(file.read_bytes()).hexdigest()


def tensors(state: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(np.ascontiguousarray(t.detach()).tobytes()).hexdigest() for name, t in state.items()}


def comparable(value: Any) -> Any:
    """JSON without wording: its keys, numbers and answers; a string by its presence."""
    if isinstance(value, dict):
        return {key: comparable(part) for key, part in value.items() if key != "seconds"}
    if isinstance(value, list):
        return [comparable(part) for part in value]
    if isinstance(value, str) and (" " in value or "/" in value):
        return "text"
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value


def parsed(output: str) -> Any:
    """The JSON and the exit code of an output."""
    body, code = output.rsplit("\n", 1)
    return (comparable(json.loads(body)) if body.strip().startswith(("{", "[")) else "text"), code


def compare(before: Path, after: Path) -> int:
    """List the differences of what two checkouts produced."""
    folders = (before, after)
    said = [json.loads((folder / SAID).read_text()) for folder in folders]
    names = [{str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} - {SAID} for folder in folders]
    faults = [f"file of one side only: {name}" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        if contents(before / name) != contents(after / name):
            faults.append(f"file differs: {name}")
    faults += [f"JSON differs: {key}" for key in said[0] if parsed(said[0][key]) != parsed(said[1].get(key, ""))]
    print(f"{len(names[0])} files and {len(said[0])} commands compared")
    print("\n".join(faults) or "no differences")
    return 1 if faults else 0


def main(command: str, first: Path, second: Path) -> int:
    if command == "compare":
        return compare(first, second)
    second.mkdir(parents=True)
    said = produce(first.resolve(), second)
    (second / SAID).write_text(json.dumps(said, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
