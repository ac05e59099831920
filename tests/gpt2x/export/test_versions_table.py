"""The committed table of minimum versions, which ``make test-versions`` measures, against the versions that gpt2x writes into its models."""

from __future__ import annotations

import json

import onnx
import pytest
from checkpoints import random_checkpoint
from paths import ROOT

from converters import GPT2Config
from gpt2x import contract
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.precisions import PRECISIONS

ROWS = json.loads((ROOT / "tests" / "versions" / "versions.json").read_text())
DEFAULT = {(row["cache"], row["precision"]): row for row in ROWS if row["default"]}
CONFIG = GPT2Config(n_layer=1, n_head=2, n_embd=64, n_ctx=16, n_vocab=50, bos_token_id=0, eos_token_id=0)


def test_the_table_has_every_precision_with_every_cache():
    assert DEFAULT.keys() == {(cache, precision) for cache in contract.CACHES for precision in PRECISIONS}


def test_every_minimum_of_the_table_was_found():
    assert not [row for row in ROWS if None in row.values()]


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{row['cache']}-{row['precision']}-{row['opset']}-{row['default']}"
)
def test_the_required_version_of_onnx_runtime_is_the_measured_one(row):
    asked = contract.runtime_version(row["precision"], row["cache"], row["opset"])
    assert asked.split(".")[:2] == row["onnxruntime"].split(".")[:2]


@pytest.mark.parametrize("cache", contract.CACHES)
def test_an_export_has_the_opset_and_the_version_of_the_table(cache, tmp_path):
    precisions = tuple(PRECISIONS)
    export_onnx(random_checkpoint(CONFIG), tmp_path / "out", ExportOptions(precisions, cache), need_tokenizer=False)
    for precision in precisions:
        model = onnx.load(tmp_path / "out" / contract.model_file(precision), load_external_data=False)
        facts, row = {entry.key: entry.value for entry in model.metadata_props}, DEFAULT[cache, precision]
        assert model.opset_import[0].version == row["opset"]
        assert facts[contract.RUNTIME].split(".")[:2] == row["onnxruntime"].split(".")[:2]


@pytest.mark.parametrize("client", [*contract.CLIENTS, "transformers.js"])
def test_the_minimum_of_a_client_is_the_measured_one(client):
    for (cache, _), row in DEFAULT.items():
        assert contract.client_version(client, cache, row["onnxruntime"]) == row[client]


def test_a_card_states_the_transformers_js_that_has_the_onnx_runtime_of_the_opset(tmp_path):
    export_onnx(random_checkpoint(CONFIG), tmp_path / "m", ExportOptions(opset=23), need_tokenizer=False)
    (line,) = [line for line in (tmp_path / "m" / "README.md").read_text().splitlines() if "transformers.js >=" in line]
    assert "transformers.js >= 4.0.0" in line


def test_the_readme_has_the_measured_versions():
    text = (ROOT / "README.md").read_text()
    lines = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in text.splitlines()
        if "inplace" in line or "growing" in line
    ]
    table = [line for line in lines if len(line) == 6]
    said = {(cells[0].split()[0], p.strip()): cells[2:] for cells in table for p in cells[1].split(",")}
    clients = ("onnxruntime-genai", "optimum", "transformers.js")
    measured = {
        key: [".".join(row["onnxruntime"].split(".")[:2]), *(row[client] for client in clients)]
        for key, row in DEFAULT.items()
    }
    assert said == measured
