"""Old and new versions of the runtimes, installed for real: from the versions in ``versions.json`` on, each gives a model's
tokens, and the version before does not. ``make test-versions`` runs this; ``python tests/versions/measure.py`` writes the table.
"""

from __future__ import annotations

import json
import re

import install
import measure
import pytest
from measure import CLIENTS, DEFAULT, KINDS, SAME

from gpt2x import SHAKESPEARE, contract, from_pretrained
from gpt2x.generation.loop import Generation
from gpt2x.generation.sampling import Sampling
from gpt2x.runtimes.torch import TorchDecoder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return measure.Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def reference(models):
    return measure.references(models)


@pytest.fixture(scope="module")
def measured(models, reference):
    return measure.Measurement(models, reference)


@pytest.fixture(scope="module")
def rows():
    return json.loads(measure.TABLE.read_text())


def test_the_reference_of_float32_is_the_torch_models(models, reference):
    decoder = TorchDecoder(from_pretrained(SHAKESPEARE))
    runs = [Generation(decoder, [prompt], measure.COUNT, Sampling(temperature=0)) for prompt in models.prompts]
    expected = [[int(token) for (token,) in run] for run in runs]
    exact = [kind for kind in KINDS if kind.precision == "fp32" and kind.cache != "inplace-int8"]
    assert all(reference[kind] == expected for kind in exact)


def test_the_table_is_what_is_measured(measured, rows):
    assert measured.rows() == rows


@pytest.mark.parametrize("client", CLIENTS)
def test_each_boundary_has_a_version_before_it_that_fails(client, measured):
    for kind, outcomes in measured.of[client].items():
        first = measure.minimum(outcomes)
        before = [version for version in outcomes if install.numbers(version) < install.numbers(first)]
        assert before, kind
        assert all(outcomes[version] != SAME for version in before), kind


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_version_that_a_model_asks_for_is_the_first_that_runs_it(kind, models, measured):
    asked = contract.runtime_version(kind.precision, kind.cache, models.opset(kind))
    first = measure.minimum(measured.of["onnxruntime"][str(kind)])
    assert asked.split(".")[:2] == first.split(".")[:2]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gpt2x_runs_a_model_or_refuses_it_and_names_both_versions(kind, models, measured):
    asked = contract.runtime_version(kind.precision, kind.cache, models.opset(kind))
    for version, found in measured.gpt2x[str(kind)].items():
        if install.numbers(version) >= install.numbers(asked):
            assert found == SAME, version
        else:
            both = f"needs ONNX Runtime {re.escape(asked)} or newer; {re.escape(version)} is installed"
            assert re.fullmatch(f"FormatError: [^\n]*{both}[^\n]*", found), version


@pytest.mark.parametrize("kind", DEFAULT, ids=str)
def test_the_oldest_genai_runs_what_the_oldest_onnx_runtime_beside_it_runs(kind, models, measured, oldest_genai):
    version = install.OLDEST_GENAI[1]
    same = measured.of["onnxruntime"][str(kind)][version] == SAME
    assert (oldest_genai[kind] == SAME) == same


@pytest.fixture(scope="module")
def oldest_genai(models, reference):
    results = measure.genai_results(models, *install.OLDEST_GENAI)
    return {kind: measure.outcome(results[str(models.paths[kind])], reference[kind]) for kind in DEFAULT}
