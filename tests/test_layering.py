"""Imports run one way, and what needs no torch loads none."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

import gpt2x


def run(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_after(code: str, cwd: Path) -> set[str]:
    return set(run(f"{code}\nimport sys; print('MODULES', *sys.modules)", cwd).split("MODULES")[1].split())


WITHOUT_TORCH = (
    "converters",
    "gpt2x",
    "gpt2x.cli",
    "gpt2x.generation.loop",
    "gpt2x.scoring.score",
    "gpt2x.tokenizer",
    "gpt2x.runtimes.onnxruntime",
    "gpt2x.serving.http",
    "gpt2x.serving.opening",
)


def test_importing_them_loads_no_torch(tmp_path):
    """One after another in one process. The first one that loads torch is named."""
    code = f"import importlib, sys\nfor name in {WITHOUT_TORCH}:\n    importlib.import_module(name)\n    print(name, 'torch' in sys.modules)"
    assert run(code, tmp_path).splitlines() == [f"{name} False" for name in WITHOUT_TORCH]


def test_the_engine_of_the_server_needs_no_http(tmp_path):
    loaded = modules_after("import gpt2x.serving.engine, gpt2x.serving.memory_plan", tmp_path)
    assert not {"torch", "starlette", "uvicorn", "pydantic", "prometheus_client"} & loaded


@pytest.mark.parametrize("command", [["--help"], ["export", "--help"]])
def test_help_loads_neither_torch_numpy_nor_converters(command, tmp_path):
    loaded = modules_after(f"from gpt2x.cli import main; main({command}, standalone_mode=False)", tmp_path)
    assert not {"torch", "numpy", "rich", "converters"} & loaded


@pytest.mark.parametrize(
    "command", [["convert", str(gpt2x.SHAKESPEARE), "out.safetensors"], ["inspect", str(gpt2x.SHAKESPEARE)]]
)
def test_convert_and_inspect_load_no_torch(command, tmp_path):
    loaded = modules_after(f"from gpt2x.cli import main; main({command}, standalone_mode=False)", tmp_path)
    assert "converters" in loaded
    assert not {"torch", "transformers", "tensorflow", "tokenizers", "numpy"} & loaded


# A file -> a line that breaks the contract of that name.
BREACHES = {
    "converters imports neither": ("converters/containers/gguf.py", "import torch"),
    "containers know nothing": ("converters/containers/gguf.py", "from ..dialects import HF"),
    "the layers of gpt2x": ("gpt2x/generation/sampling.py", "from ..cli.text import printable"),
    "no circle of imports": ("converters/errors.py", "from .spec import GPT2Config"),
}


def linted(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter's judgement of the packages in a folder, by the contracts of ``pyproject.toml``."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache", "--no-logo"]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}
    )


@pytest.fixture
def packages(tmp_path):
    pytest.importorskip("importlinter")
    for name in ("converters", "gpt2x"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("shakespeare", "__pycache__"))
    return tmp_path


def test_imports_run_one_way(packages):
    result = linted(packages)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("contract", BREACHES)
def test_an_import_that_runs_the_other_way_is_found(packages, contract):
    file, line = BREACHES[contract]
    source = packages / file
    source.write_text(
        source.read_text().replace(
            "from __future__ import annotations\n", f"from __future__ import annotations\n\n{line}\n"
        )
    )
    result = linted(packages)
    assert result.returncode == 1
    broken = [row for row in result.stdout.splitlines() if row.endswith(" BROKEN") or " BROKEN (" in row]
    assert any(row.startswith(contract) for row in broken), result.stdout


def test_every_public_name_is_there():
    assert all(getattr(gpt2x, name) is not None for name in gpt2x.__all__)
    with pytest.raises(AttributeError, match="no attribute 'GPT3'"):
        _ = gpt2x.GPT3


def test_the_names_and_their_homes_agree():
    assert set(gpt2x._HOME_OF) | {"SHAKESPEARE", "__version__"} == set(gpt2x.__all__)


@pytest.mark.parametrize(("name", "missing", "extra"), [("GPT2", "torch", "torch"), ("export_onnx", "onnx", "export")])
def test_what_a_name_needs_is_said_with_the_line_to_type(tmp_path, name, missing, extra):
    code = f"""
import sys
sys.modules[{missing!r}] = None
try:
    from gpt2x import {name}
except ModuleNotFoundError as error:
    print(error)
"""
    assert run(code, tmp_path) == f"gpt2x.{name} needs {missing}: pip install 'gpt2x[{extra}]'\n"


PACKAGES = [file.parent for name in ("converters", "gpt2x") for file in sorted((ROOT / name).rglob("__init__.py"))]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: str(package.relative_to(ROOT)))
def test_each_package_lists_its_public_names_once_and_all_are_there(package):
    text = (package / "__init__.py").read_text()
    (public,) = re.findall(r"^__all__ = (\[.*?\])", text, re.M | re.S)
    modules = {file.stem for file in package.iterdir()}
    for name in ast.literal_eval(public):
        assert name in modules or re.search(rf"\b{name}\b", text.replace(public, ""))


def imports_of_private_names(folder: Path) -> list[str]:
    """Each private name that a module imports from another of the packages, with the module that imports it."""
    found = []
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.level or node.module.startswith(("converters", "gpt2x"))):
                private = [alias.name for alias in node.names if alias.name.startswith("_") and alias.name[1] != "_"]
                found += [f"{file.relative_to(folder)}: {name}" for name in private]
    return found


def test_private_names_stay_in_their_module():
    from_packages = [*imports_of_private_names(ROOT / "converters"), *imports_of_private_names(ROOT / "gpt2x")]
    assert from_packages == ["cli/__init__.py: _EXTRAS"]  # gpt2x/__init__.py has only public names


def test_an_imported_private_name_is_found(tmp_path):
    (tmp_path / "reading.py").write_text("from .protobuf import _field, varint\n")
    assert imports_of_private_names(tmp_path) == ["reading.py: _field"]
