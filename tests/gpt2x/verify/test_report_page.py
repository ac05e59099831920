"""The page of ``verify --report`` has the verdicts of the table on the terminal."""

import re
from dataclasses import asdict

import numpy as np
import pytest

from gpt2x.cli.verify import table
from gpt2x.verify import report_page
from gpt2x.verify.checks import Check
from gpt2x.verify.metrics import FP32, measure
from gpt2x.verify.report import Report
from gpt2x.verify.report_page import EXPLAINED, page
from gpt2x.verify.scenarios import SCENARIOS


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    monkeypatch.setattr(report_page, "_svg", lambda plot: "")


def measured(**more):
    logits = np.random.default_rng(0).normal(size=(9, 13)).astype(np.float32)
    metrics = measure(logits, logits + np.float32(1e-7))
    return {**asdict(metrics), "limits": metrics.limits(FP32), **more}


SAME = Check("full context", True, "", measured())
ROUNDED = Check("full context", True, "", measured(inexact=True))
DIFFERENT = Check("one token", False, "", measured(inexact=True))
NEAR_TIE = Check("chunks", True, "", {"near_tie": True})
SKIPPED = Check("right padding", None, "not supported")


@pytest.mark.parametrize(
    ("checks", "heading", "status", "terminal"),
    [
        ([SAME, SKIPPED], "same", "passed", "The same."),
        ([SAME, ROUNDED], "within bounds", "passed", "Within the bounds"),
        ([ROUNDED, DIFFERENT], "different", "failed", "DIFFERENT: one token."),
        ([SKIPPED], "nothing compared", "failed", "Nothing was compared."),
    ],
)
def test_the_heading_is_the_verdict(checks, heading, status, terminal):
    report = Report("a", "b", checks)
    assert f'<h1>gpt2x verify: <span class="{status}">{heading}</span></h1>' in page(report)
    assert f"<title>gpt2x verify: {heading}</title>" in page(report)
    assert table(report).splitlines()[-1].startswith(terminal)


def test_each_check_has_its_verdict():
    rows = re.findall(
        r'<tr><td>([^<]*)<td class="(passed|failed|skipped)">([^<]*)',
        page(Report("a", "b", [SAME, DIFFERENT, NEAR_TIE, SKIPPED])),
    )
    assert rows == [
        ("full context", "passed", "same"),
        ("one token", "failed", "different"),
        ("chunks", "passed", "near tie"),
        ("right padding", "skipped", ""),
    ]
    assert '<td class="passed">within bounds' in page(Report("a", "b", [ROUNDED]))


def test_each_scenario_is_explained():
    assert set(SCENARIOS) <= set(EXPLAINED)
