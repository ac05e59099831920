"""A server has nothing left after hundreds of requests, many from clients that misbehave. The benchmark sends thousands."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from paths import ROOT

SCRIPT = ROOT / "benchmarks/serve_soak.py"


@pytest.mark.slow
def test_nothing_is_left_after_hundreds_of_requests_from_clients_that_misbehave():
    done = subprocess.run([sys.executable, SCRIPT, "--requests", "300"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("300 requests in ")
    assert [line[:2] for line in lines[1:]] == ["ok"] * 5
    assert re.search(r"^ok     3 texts compared$", done.stdout, re.MULTILINE)
