"""Imports run one way, and what needs no torch loads none."""

import ast
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


@pytest.mark.parametrize(
    "module",
    ["converters", "gpt2x", "gpt2x.cli", "gpt2x.generation.loop", "gpt2x.tokenizer", "gpt2x.runtimes.onnxruntime"],
)
def test_importing_it_loads_no_torch(module, tmp_path):
    assert "torch" not in modules_after(f"import {module}", tmp_path)


def test_help_loads_neither_torch_nor_numpy(tmp_path):
    loaded = modules_after("from gpt2x.cli import main; main(['--help'], standalone_mode=False)", tmp_path)
    assert not {"torch", "numpy", "rich"} & loaded


@pytest.mark.parametrize(
    "command", [["convert", str(gpt2x.SHAKESPEARE), "out.safetensors"], ["inspect", str(gpt2x.SHAKESPEARE)]]
)
def test_convert_and_inspect_load_no_torch(command, tmp_path):
    loaded = modules_after(f"from gpt2x.cli import main; main({command}, standalone_mode=False)", tmp_path)
    assert "converters" in loaded
    assert not {"torch", "transformers", "tensorflow", "tokenizers", "numpy"} & loaded


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).split(".")[0])
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "converters").glob("*.py")), ids=lambda p: p.name)
def test_converters_know_nothing_of_gpt2x_or_torch(path):
    assert not imports_of(path) & {"gpt2x", "torch", "transformers", "tensorflow", "converters"}


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
