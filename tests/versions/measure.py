"""The first version of each runtime that gives a model's tokens: ``python measure.py`` writes ``versions.json``, and prints it
as a table.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import install
import onnx

from converters import open_checkpoint
from gpt2x import SHAKESPEARE, Tokenizer, contract
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.precisions import PRECISIONS

TABLE = Path(__file__).with_name("versions.json")
TEXTS = ["My lord, I", "O, my good lord, not"]  # never nearer a tie than 0.015
COUNT = 24
CLIENTS = ("onnxruntime", "onnxruntime-genai", "optimum", "transformers.js")
SAME = "same"


@dataclass(frozen=True)
class Kind:
    """One model: ``opset`` is what ``--opset`` is told; None by default."""

    cache: str
    precision: str
    opset: int | None = None

    def __str__(self) -> str:
        return f"{self.cache} {self.precision}" + (f" --opset {self.opset}" if self.opset else "")


DEFAULT = [Kind(cache, precision) for cache in contract.CACHES for precision in PRECISIONS]
# What needs another version of ONNX Runtime than by default.
OF_OPSET = [
    *(Kind(cache, "int8", 20) for cache in contract.CACHES),
    *(Kind(cache, precision, 21) for cache in ("growing", "inplace") for precision in ("fp32", "w8a8")),
    *(Kind(cache, precision, 22) for cache in ("growing", "inplace") for precision in ("fp32", "int8")),
    *(Kind(cache, precision, 23) for cache in contract.CACHES for precision in PRECISIONS),
]
KINDS = [*DEFAULT, *OF_OPSET]
Outcomes = dict[str, dict[str, str]]  # kind -> version -> SAME, or what happened instead


class Models:
    """Every kind of model, each in a directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: dict[Kind, Path] = {}
        source = open_checkpoint(SHAKESPEARE)
        for kind in KINDS:
            path = folder / str(kind).replace(" ", "_")
            export_onnx(source, path, ExportOptions((kind.precision,), kind.cache, opset=kind.opset))
            self.paths[kind] = path
        tokenizer = Tokenizer.from_pretrained(SHAKESPEARE)
        self.prompts = [[int(i) for i in tokenizer.encode(text)] for text in TEXTS]

    def file(self, kind: Kind) -> str:
        return str(self.paths[kind] / contract.model_file(kind.precision))

    def opset(self, kind: Kind) -> int:
        return int(onnx.load(self.file(kind), load_external_data=False).opset_import[0].version)

    def task(self, **more: object) -> dict[str, object]:
        return {"prompts": self.prompts, "count": COUNT, **more}


def onnxruntime_results(models: Models, version: str) -> dict:
    """What ``run_onnxruntime.py`` found in one version, for the paths of all kinds."""
    task = models.task(models=[models.file(kind) for kind in KINDS], gpt2x=True)
    results = install.run("run_onnxruntime.py", task, models.folder, install.onnxruntime(version))
    assert results["version"] == version
    return results


def genai_results(models: Models, version: str, runtime: str) -> dict:
    paths = [str(models.paths[kind]) for kind in DEFAULT]
    return install.run("run_genai.py", models.task(models=paths), models.folder, install.genai(version, runtime))


def optimum_results(models: Models, version: str) -> dict:
    paths = [str(models.paths[kind]) for kind in DEFAULT]
    files = [Path(models.file(kind)).name for kind in DEFAULT]
    task = models.task(models=paths, files=files)
    try:
        return install.run("run_optimum.py", task, models.folder, install.optimum(version))
    except RuntimeError as error:  # a version that cannot be imported
        return {path: {"error": str(error)} for path in paths}


def transformers_js_results(models: Models, version: str) -> dict:
    """One process a model: after one that fails to load, older versions load no other."""
    packages, results = [install.transformers_js(version)], {}
    for kind in DEFAULT:
        task = models.task(
            models=[str(models.paths[kind])], dtypes=[PRECISIONS[kind.precision].transformers_js], prompts=TEXTS
        )
        results |= install.run("run_transformersjs.mjs", task, models.folder, packages)
    return results


def outcome(result: Mapping, expected: Sequence) -> str:
    if "error" in result:
        return str(result["error"])
    return SAME if result["tokens"] == expected else "other tokens"


def minimum(outcomes: Mapping[str, str]) -> str | None:
    """The first version from which on every version gives the same tokens; the newest must."""
    first = None
    for version in sorted(outcomes, key=install.numbers, reverse=True):
        if outcomes[version] != SAME:
            break
        first = version
    return first


class Measurement:
    """What every version of every runtime gives. ``reference``: kind -> tokens after each prompt."""

    def __init__(self, models: Models, reference: Mapping[Kind, Sequence]) -> None:
        self.models = models
        self.gpt2x: Outcomes = {str(kind): {} for kind in KINDS}
        self.of: dict[str, Outcomes] = {client: {str(kind): {} for kind in DEFAULT} for client in CLIENTS}
        self.of["onnxruntime"] = {str(kind): {} for kind in KINDS}
        for version in install.ONNXRUNTIME:
            results = onnxruntime_results(models, version)
            for kind in KINDS:
                file, tokens = models.file(kind), reference[kind]
                self.of["onnxruntime"][str(kind)][version] = outcome(results["plain"][file], tokens)
                self.gpt2x[str(kind)][version] = outcome(results["gpt2x"][file], tokens)
        for client, version, results in self._others():
            for kind in DEFAULT:
                self.of[client][str(kind)][version] = outcome(results[str(models.paths[kind])], reference[kind])

    def _others(self) -> Iterator[tuple[str, str, dict]]:
        for version, runtime in install.GENAI:
            yield "onnxruntime-genai", version, genai_results(self.models, version, runtime)
        for version in install.OPTIMUM:
            yield "optimum", version, optimum_results(self.models, version)
        for version in install.TRANSFORMERS_JS:
            yield "transformers.js", version, transformers_js_results(self.models, version)

    def rows(self) -> list[dict[str, object]]:
        """The table: of each kind its opset, and the first version of each runtime."""
        return [
            {
                "cache": kind.cache,
                "precision": kind.precision,
                "opset": self.models.opset(kind),
                "default": kind.opset is None,
                **{client: minimum(found[str(kind)]) for client, found in self.of.items() if str(kind) in found},
            }
            for kind in KINDS
        ]


def markdown(rows: Sequence[Mapping]) -> str:
    """The rows of what is exported by default."""
    lines = [f"| cache | precision | {' | '.join(CLIENTS)} |", f"| {' | '.join(['---'] * (2 + len(CLIENTS)))} |"]
    for row in rows:
        if row["default"]:
            lines.append(f"| {' | '.join(str(row[key]) for key in ('cache', 'precision', *CLIENTS))} |")
    return "\n".join(lines)


def references(models: Models) -> dict[Kind, list]:
    """gpt2x's own tokens, in the ONNX Runtime at hand."""
    from run_onnxruntime import run_gpt2x

    return {kind: run_gpt2x(models.file(kind), models.prompts, COUNT) for kind in KINDS}


def table_text(rows: Sequence[Mapping]) -> str:
    return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        models = Models(Path(folder))
        rows = Measurement(models, references(models)).rows()
    TABLE.write_text(table_text(rows))
    print(markdown(rows))
