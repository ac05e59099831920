"""The programs in tests/peers/clients, and what each needs."""

from __future__ import annotations

import importlib.util
import shutil
import sys

import pytest
from paths import ROOT

PROGRAMS = ROOT / "tests" / "peers" / "clients"
PACKAGES = ROOT / "examples"  # where npm installed
HUGGING_FACE = PROGRAMS / "transformers_client.py"
OPTIMUM = ROOT / ".venv-optimum" / "bin" / "python"

CLIENTS = {
    "onnxruntime": [sys.executable, PROGRAMS / "onnxruntime_client.py"],
    "onnxruntime-genai": [sys.executable, PROGRAMS / "genai_client.py"],
    "optimum": [OPTIMUM, HUGGING_FACE, "optimum.onnxruntime", "ORTModelForCausalLM"],
    "transformers": [sys.executable, HUGGING_FACE, "transformers", "AutoModelForCausalLM"],
    "transformers.js": ["node", PROGRAMS / "transformersjs_client.mjs"],
    "onnxruntime-node": ["node", PROGRAMS / "onnxruntime_node_client.mjs"],
}


def needs_module(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not (PACKAGES / "node_modules" / "onnxruntime-node").is_dir(),
    reason="the packages for Node are not installed (make test-clients)",
)
needs_optimum = pytest.mark.skipif(not OPTIMUM.exists(), reason="optimum is not installed (make test-clients)")
NEEDS = {
    "onnxruntime-genai": needs_module("onnxruntime_genai"),
    "optimum": needs_optimum,
    "transformers": needs_module("transformers"),
    "transformers.js": needs_node,
    "onnxruntime-node": needs_node,
}


def marks_of(client):
    return [NEEDS[client]] if client in NEEDS else []


def clients(*names):
    return pytest.mark.parametrize("client", [pytest.param(name, marks=marks_of(name)) for name in names])
