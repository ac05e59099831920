"""``gpt2x inspect``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import click

from ..precisions import DEFAULT
from .source import IGNORE_CONFIG_KEY, PRECISION, runnable
from .text import printable


@click.command(short_help="Show format, sizes, configuration and checksums of a model.")
@click.argument("path")
@click.option("--tensors", "show_tensors", is_flag=True, help="List every tensor.")
@click.option(
    "--precision",
    type=PRECISION,
    help="Precision of the ONNX model to show (default: fp32, or else the first).",
)
@IGNORE_CONFIG_KEY
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(
    path: str, precision: str | None, show_tensors: bool, ignore_config_keys: tuple[str, ...], as_json: bool
) -> None:
    """Show format, dialect, sizes, dtypes, configuration and checksums of PATH; of ONNX, the contract.

    \b
      gpt2x inspect models/124M
      gpt2x inspect pytorch_model.bin --tensors --json
      gpt2x inspect gpt2-onnx/

    Only names and shapes are read, not the weights. (An ONNX model is loaded with ONNX Runtime.)
    """
    facts = {**everything(runnable(path, None, precision), precision, ignore_config_keys), "path": path}
    if not show_tensors:
        facts.pop("tensor_list", None)
    click.echo(json.dumps(facts, indent=2) if as_json else printable("\n".join(lines(facts))))


def everything(path: str, precision: str | None = None, ignore_config_keys: Collection[str] = ()) -> dict[str, Any]:
    """The facts of weights, of an ONNX model, or of a directory with both."""
    from ..contract import has_onnx

    if not has_onnx(path):
        return describe(path, ignore_config_keys)
    from converters import ConversionError

    try:
        facts = describe(path, ignore_config_keys) if not path.endswith(".onnx") else {"path": path}
    except ConversionError:
        facts = {"path": path}  # no weights that gpt2x reads, only ONNX
    return {**facts, "onnx": describe_onnx(path, precision)}


def describe_onnx(path: str, precision: str | None = None) -> dict[str, Any]:
    """An ONNX model's contract and provenance."""
    from converters.config import to_hf

    from .. import contract
    from ..runtimes.onnxruntime import OnnxDecoder

    here = contract.models_in(Path(path)) if Path(path).is_dir() else {}
    if precision is None and len(here) > 1 and DEFAULT not in here:
        precision = next(iter(here))  # one of them is shown; the others are listed
    model = OnnxDecoder(path, precision=precision, optimize=False)
    said = model.metadata.get
    return {
        "precisions": list(here) or [model.precision],
        "file": str(model.path),
        "contract": said(contract.CONTRACT),
        "precision": said(contract.PRECISION),
        "cache": said(contract.CACHE),
        "block_size": int(said(contract.BLOCK, 0)) or None,
        "rounding": said(contract.ROUNDING),
        "logits": said(contract.LOGITS),
        "source": said(contract.SOURCE),
        "source_sha256": _checksums(said(contract.CHECKSUMS, "{}")),
        "gpt2x_version": said(contract.WRITER),
        "config": to_hf(model.config),
        "inputs": [{"name": n, "dtype": s.dtype, "shape": list(s.shape)} for n, s in model.inputs.items()],
        "outputs": [{"name": n, "dtype": s.dtype, "shape": list(s.shape)} for n, s in model.outputs.items()],
    }


def describe(path: str, ignore_config_keys: Collection[str] = ()) -> dict[str, Any]:
    """The facts of weights, without reading them."""
    from converters import open_checkpoint
    from converters.config import to_hf
    from converters.errors import UnknownHeadsError

    try:
        checkpoint = open_checkpoint(path, ignore_config_keys=ignore_config_keys)
        config = to_hf(checkpoint.config)
    except UnknownHeadsError:
        # 1 divides any n_embd: shows everything else
        checkpoint = open_checkpoint(path, n_head=1, ignore_config_keys=ignore_config_keys)
        config = {**to_hf(checkpoint.config), "n_head": None}
    notes = checkpoint.notes if config["n_head"] else ("n_head is not in the file: pass --n-head to convert it",)
    tensors = checkpoint.tensors
    return {
        "path": path,
        "format": checkpoint.format,
        "dialect": checkpoint.dialect,
        "size": checkpoint.config.size_name if config["n_head"] else None,
        "config": config,
        "tensors": len(tensors),
        "parameters": checkpoint.parameters,
        "bytes": sum(size for _, size in checkpoint.stored.values()),
        "dtypes": dict(Counter(kind for kind, _ in checkpoint.stored.values())),
        "checksums": checkpoint.checksummed,
        "tokenizer": checkpoint.tokenizer.place if checkpoint.tokenizer else None,
        "left_out": list(checkpoint.left_out),
        "notes": list(notes),
        "tensor_list": [
            {"name": name, "dtype": checkpoint.stored[name][0], "shape": list(t.shape)} for name, t in tensors.items()
        ],
    }


def _checksums(text: str) -> dict[str, str]:
    """The checksums of a model's source; none if they are invalid."""
    from converters import FormatError
    from converters.io.json import parse_json

    try:
        return {str(name): str(digest) for name, digest in parse_json(text.encode(), "").items()}
    except FormatError:
        return {}


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts as text."""
    rows = (_weights_rows(facts) if "format" in facts else []) + (_onnx_rows(facts["onnx"]) if "onnx" in facts else [])
    return [facts["path"], *(f"  {key:<10} {value}".replace("\n", "\\n") for key, value in rows)]


def _blocks(onnx: dict[str, Any]) -> str:
    sizes = f"of {onnx['block_size']}" if onnx["block_size"] else "whole columns"
    return f"{sizes}, rounded {'with calibration text' if onnx['rounding'] == 'calibrated' else 'to nearest'}"


def _onnx_rows(onnx: dict[str, Any]) -> list[tuple[str, str]]:
    config = onnx["config"]
    sizes = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    rows = [("onnx", onnx["file"]), ("sizes", ", ".join(f"{name} {config[name]}" for name in sizes))]
    if onnx["gpt2x_version"]:
        rows += [
            ("contract", f"{onnx['contract']}: {onnx['precision']}, {onnx['cache']} cache, logits of {onnx['logits']}"),
            *([("blocks", _blocks(onnx))] if onnx["rounding"] else []),
            *([("precisions", ", ".join(onnx["precisions"]))] if len(onnx["precisions"]) > 1 else []),
            ("written by", f"gpt2x {onnx['gpt2x_version']}, from {onnx['source']}"),
            *(("sha256", f"{digest}  {name}") for name, digest in onnx["source_sha256"].items()),
        ]
    for kind in ("input", "output"):
        rows += [
            (kind, f"{s['name']:<27} {s['dtype']:<7} [{', '.join(map(str, s['shape']))}]") for s in onnx[f"{kind}s"]
        ]
    return rows


def _weights_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    config = facts["config"]
    size = f" ({facts['size']})" if facts["size"] else ""
    shape = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    switches = {
        k: v for k, v in config.items() if k.startswith(("activation", "layer_norm", "scale", "reorder", "tie"))
    }
    return [
        ("format", f"{facts['format']}, dialect {facts['dialect']}"),
        (
            "model",
            f"GPT-2{size}, {facts['parameters']:,} parameters in {facts['tensors']} tensors, {facts['bytes']:,} bytes",
        ),
        ("dtypes", ", ".join(f"{n} x {d}" for d, n in facts["dtypes"].items())),
        ("config", ", ".join(f"{k} {'?' if config[k] is None else config[k]}" for k in shape)),
        ("switches", ", ".join(f"{k} {str(v).lower() if isinstance(v, bool) else v}" for k, v in switches.items())),
        (
            "checksums",
            f"{facts['checksums']} of {facts['tensors']} tensors have one"
            if facts["checksums"]
            else "none in this format",
        ),
        ("tokenizer", facts["tokenizer"] or "none beside it"),
        *(("left out", name) for name in facts["left_out"]),
        *(("note", note) for note in facts["notes"]),
        *((t["dtype"], f"{t['name']} {t['shape']}") for t in facts.get("tensor_list", [])),
    ]
