"""``gpt2x inspect``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import click

from ..precisions import DEFAULT
from .source import PRECISION, runnable, weight_options, with_local_adapter
from .text import printable

if TYPE_CHECKING:
    from converters.heads import Head

    from ..runtimes.adapter_files import AdapterFile
    from ..weight_options import WeightOptions


@click.command(short_help="Show format, sizes, configuration and checksums of a model.")
@click.argument("path")
@click.option("--tensors", "show_tensors", is_flag=True, help="List every tensor.")
@click.option(
    "--precision",
    type=PRECISION,
    help="Precision of the ONNX model to show (default: fp32, or else the first).",
)
@weight_options("PATH")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: str, precision: str | None, show_tensors: bool, as_json: bool, weights: WeightOptions) -> None:
    """Show format, dialect, sizes, dtypes, configuration and checksums of PATH; of ONNX, the contract.

    \b
      gpt2x inspect models/124M
      gpt2x inspect pytorch_model.bin --tensors --json
      gpt2x inspect gpt2-onnx/
      gpt2x inspect lora/

    Only names and shapes are read, not the weights. (An ONNX model is loaded with ONNX Runtime.)
    """
    from ..weight_options import why_weights

    if why_weights(weights):
        facts = describe(runnable(path, "torch"), **with_local_adapter(weights))
    else:
        facts = everything(runnable(path, None, precision), precision, **weights)
    facts = {**facts, "path": path}
    if not show_tensors:
        facts.pop("tensor_list", None)
    click.echo(json.dumps(facts, indent=2) if as_json else printable("\n".join(lines(facts))))


def everything(path: str, precision: str | None = None, **weights: Unpack[WeightOptions]) -> dict[str, Any]:
    """The facts of weights, of an ONNX model, or of a directory with both."""
    from ..contract import has_onnx

    if not has_onnx(path):
        return describe_adapter(path) if is_adapter(path) else describe(path, **weights)
    from converters import ConversionError

    try:
        facts = describe(path, **weights) if not path.endswith(".onnx") else {"path": path}
    except ConversionError:
        facts = {"path": path}  # no weights that gpt2x reads, only ONNX
    return {**facts, "onnx": describe_onnx(path, precision)}


def describe_onnx(path: str, precision: str | None = None) -> dict[str, Any]:
    """An ONNX model's contract and provenance."""
    from converters.config import to_hf

    from .. import contract
    from ..runtimes.onnx_task import OnnxTask
    from ..runtimes.onnxruntime import OnnxDecoder
    from ..runtimes.opening import task_of_export
    from ..tasks import GENERATION

    here = contract.models_in(Path(path)) if Path(path).is_dir() else {}
    if precision is None and len(here) > 1 and DEFAULT not in here:
        precision = next(iter(here))  # one of them is shown; the others are listed
    task = task_of_export(path, precision)
    opened = OnnxDecoder if task == GENERATION else OnnxTask
    model = opened(path, precision=precision, optimize=False)
    said = model.metadata.get
    adapters = [] if isinstance(model, OnnxTask) else [model.adapter_file(name) for name in model.adapters]
    return {
        "precisions": list(here) or [model.precision],
        "file": str(model.path),
        "task": task,
        "labels": list(model.labels.names) if isinstance(model, OnnxTask) and model.labels else [],
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
        "adapters": [_stored_adapter(file) for file in adapters],
        "inputs": _values(model.inputs),
        "outputs": _values(model.outputs),
    }


def _values(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, dtype and shape of a model's inputs or outputs."""
    return [{"name": name, "dtype": value.dtype, "shape": list(value.shape)} for name, value in values.items()]


def _stored_adapter(file: AdapterFile) -> dict[str, Any]:
    """The facts of an adapter beside an ONNX model."""
    return {"name": file.name, "file": str(file.path), "summary": file.summary(), "ranks": file.ranks}


def is_adapter(path: str) -> bool:
    """Whether a directory holds a PEFT adapter, and no whole model."""
    from converters.adapter_config import lone_adapter
    from converters.formats import WEIGHTS
    from converters.io.reading import files_in

    folder = Path(path)
    return folder.is_dir() and not files_in(folder, WEIGHTS) and lone_adapter(folder) is not None


def describe_adapter(path: str) -> dict[str, Any]:
    """The facts of an adapter; of one that is not LoRA, its type and what to do with it.

    Raises:
        ConversionError: if it is LoRA, and not of a GPT-2.
    """
    from converters.adapter_config import CONFIG_FILE, adapter_folder, how_to_merge, is_merged, read_adapter_config
    from converters.opening.adapter import adapter_in

    folder = adapter_folder(Path(path)) or Path(path)
    config = read_adapter_config(folder / CONFIG_FILE)
    if not is_merged(config.kind):
        facts = {"adapter": config.kind, "base": config.base or None, "summary": how_to_merge(config, folder)}
        return {"path": path, **facts, "changes": {}, "rows": {}, "replaced": [], "left_out": []}
    adapter = adapter_in(path)
    changes = {name: {"rank": change.rank, "scale": change.scale} for name, change in adapter.factors.items()}
    return {
        "path": path,
        "adapter": adapter.config.kind,
        "base": adapter.config.base or None,
        "summary": adapter.summary(),
        "changes": changes,
        "rows": {name: list(rows.indices) for name, rows in adapter.rows.items()},
        "replaced": list(adapter.replaced),
        "left_out": list(adapter.left_out),
    }


def describe(path: str, **weights: Unpack[WeightOptions]) -> dict[str, Any]:
    """The facts of weights that are opened by these options, without reading them."""
    from converters import open_checkpoint
    from converters.config import to_hf
    from converters.errors import UnknownHeadsError

    try:
        checkpoint = open_checkpoint(path, **weights)
        config = to_hf(checkpoint.config)
    except UnknownHeadsError:
        # 1 divides any n_embd: shows everything else.
        weights["n_head"] = 1
        checkpoint = open_checkpoint(path, **weights)
        config = {**to_hf(checkpoint.config), "n_head": None}
    notes = checkpoint.notes if config["n_head"] else ("n_head is not in the file: pass --n-head to convert it",)
    tensors = checkpoint.tensors
    return {
        "path": path,
        "format": checkpoint.format,
        "dialect": checkpoint.dialect,
        "entry": checkpoint.entry or None,
        "wrapper": {"prefix": checkpoint.prefix, "parts": list(checkpoint.wrappers)},
        "heads": [_head(head) for head in checkpoint.heads],
        "size": checkpoint.config.size_name if config["n_head"] else None,
        "config": config,
        "tensors": len(tensors),
        "parameters": checkpoint.parameters,
        "bytes": sum(size for _, size in checkpoint.stored.values()),
        "dtypes": dict(Counter(kind for kind, _ in checkpoint.stored.values())),
        "checksums": checkpoint.checksummed,
        "tokenizer": checkpoint.tokenizer.place if checkpoint.tokenizer else None,
        "tokenizer_kind": checkpoint.tokenizer.kind if checkpoint.tokenizer else None,
        "left_out": list(checkpoint.left_out),
        "notes": list(notes),
        "tensor_list": [
            {"name": name, "dtype": checkpoint.stored[name][0], "shape": list(t.shape)} for name, t in tensors.items()
        ],
    }


def _head(head: Head) -> dict[str, Any]:
    """The kind of a head, and its tensors."""
    tensors = [{"name": name, "dtype": t.dtype.name, "shape": list(t.shape)} for name, t in head.tensors.items()]
    return {"kind": head.kind, "tensors": tensors}


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
    if "adapter" in facts:
        rows = _adapter_rows(facts)
    return [facts["path"], *(f"  {key:<10} {value}".replace("\n", "\\n") for key, value in rows)]


def _adapter_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        ("adapter", f"PEFT {facts['adapter']}: {facts['summary']}"),
        ("base", facts["base"] or "not stated"),
        *(
            ("low rank", f"{name}, rank {change['rank']}, scale {change['scale']:g}")
            for name, change in facts["changes"].items()
        ),
        *(("rows", f"{len(indices)} of {name}") for name, indices in facts["rows"].items()),
        *_rows("replaced", facts["replaced"]),
        *_rows("left out", facts["left_out"]),
    ]


def _rows(key: str, values: Iterable[str]) -> list[tuple[str, str]]:
    """A row with this key for each value."""
    return [(key, value) for value in values]


def _sizes(config: dict[str, Any]) -> str:
    """The sizes as text; ``?`` for one that is not known."""
    found = []
    for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        size = config[name]
        found.append(f"{name} {'?' if size is None else size}")
    return ", ".join(found)


def _switches(config: dict[str, Any]) -> str:
    """The switches as text, with ``true`` and ``false`` as in JSON."""
    found = []
    for key, value in config.items():
        if key.startswith(("activation", "layer_norm", "scale", "reorder", "tie")):
            found.append(f"{key} {str(value).lower() if isinstance(value, bool) else value}")
    return ", ".join(found)


def _blocks(onnx: dict[str, Any]) -> str:
    sizes = f"of {onnx['block_size']}" if onnx["block_size"] else "whole columns"
    return f"{sizes}, rounded {'with calibration text' if onnx['rounding'] == 'calibrated' else 'to nearest'}"


def _contract(onnx: dict[str, Any]) -> str:
    """What a model computes, in a line."""
    if onnx["cache"] is None:
        return f"{onnx['contract']}: {onnx['precision']}, {onnx['task']}"
    return f"{onnx['contract']}: {onnx['precision']}, {onnx['cache']} cache, logits of {onnx['logits']}"


def _labels(names: list[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


def _onnx_rows(onnx: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("onnx", onnx["file"]), ("sizes", _sizes(onnx["config"]))]
    if onnx["gpt2x_version"]:
        rows += [
            ("contract", _contract(onnx)),
            *([("labels", _labels(onnx["labels"]))] if onnx["labels"] else []),
            *([("blocks", _blocks(onnx))] if onnx["rounding"] else []),
            *([("precisions", ", ".join(onnx["precisions"]))] if len(onnx["precisions"]) > 1 else []),
            *(("adapter", f"{one['name']}: {one['summary']}") for one in onnx["adapters"]),
            ("written by", f"gpt2x {onnx['gpt2x_version']}, from {onnx['source']}"),
            *(("sha256", f"{digest}  {name}") for name, digest in onnx["source_sha256"].items()),
        ]
    for kind in ("input", "output"):
        rows += [
            (kind, f"{s['name']:<27} {s['dtype']:<7} [{', '.join(map(str, s['shape']))}]") for s in onnx[f"{kind}s"]
        ]
    return rows


def _wrapper_rows(wrapper: dict[str, Any]) -> list[tuple[str, str]]:
    """What wrappers put into the names of tensors; no row if there is nothing."""
    found = []
    if wrapper["prefix"]:
        found.append(f"prefix {wrapper['prefix']}")
    found += wrapper["parts"]
    return [("wrapper", ", ".join(found))] if found else []


def _head_text(head: dict[str, Any]) -> str:
    tensors = ", ".join(f"{tensor['name']} {tensor['shape']}" for tensor in head["tensors"])
    return f"{head['kind']}: {tensors}"


def _entry(entry: str | None) -> str:
    """Where the weights are in their file, unless they are all that it holds."""
    return f", entry {entry}" if entry and entry != "." else ""


def _weights_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    config = facts["config"]
    size = f" ({facts['size']})" if facts["size"] else ""
    return [
        ("format", f"{facts['format']}, dialect {facts['dialect']}{_entry(facts['entry'])}"),
        *_wrapper_rows(facts["wrapper"]),
        (
            "model",
            f"GPT-2{size}, {facts['parameters']:,} parameters in {facts['tensors']} tensors, {facts['bytes']:,} bytes",
        ),
        ("dtypes", ", ".join(f"{n} x {d}" for d, n in facts["dtypes"].items())),
        ("config", _sizes(config)),
        ("switches", _switches(config)),
        (
            "checksums",
            f"{facts['checksums']} of {facts['tensors']} tensors have one"
            if facts["checksums"]
            else "none in this format",
        ),
        ("tokenizer", f"{facts['tokenizer_kind']}; {facts['tokenizer']}" if facts["tokenizer"] else "none beside it"),
        *_rows("head", map(_head_text, facts["heads"])),
        *_rows("left out", facts["left_out"]),
        *_rows("note", facts["notes"]),
        *((t["dtype"], f"{t['name']} {t['shape']}") for t in facts.get("tensor_list", [])),
    ]
