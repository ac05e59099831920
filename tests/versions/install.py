"""Old and new versions of the packages that run exported models, each in a folder of its own in ``.venv-versions``.

A folder that is there is kept: only what is missing is fetched. Every version is exact, and nothing brings another package:
what else a package needs comes from the environment that runs the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv-versions"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-compile"]
NPM = ["npm", "install", "--ignore-scripts", "--no-package-lock", "--no-audit", "--no-fund", "--silent", "--save-exact"]
OLD_NUMPY = "numpy==1.26.4"  # ONNX Runtime before 1.19 was built for numpy 1

# The oldest, the version before each boundary and the first after it, and the newest.
ONNXRUNTIME = (
    "1.16.3", "1.17.0", "1.17.3", "1.18.0", "1.18.1", "1.19.0", "1.20.1", "1.21.0", "1.22.1", "1.23.0", "1.23.2",
    "1.24.1", "1.26.0", "1.27.0", "1.28.0", "1.29.0", "1.32.0",
)  # fmt: skip
NEWEST = ONNXRUNTIME[-1]
# onnxruntime-genai, and the ONNX Runtime beside it: the newest, which pip installs, and the oldest that it allows.
GENAI = (("0.4.0", NEWEST), ("0.5.2", NEWEST), ("0.6.0", NEWEST), ("0.18.0", NEWEST))
OLDEST_GENAI = ("0.6.0", "1.20.1")
TRANSFORMERS_JS = ("3.0.0", "3.4.1", "3.4.2", "3.8.1", "4.2.0", "4.3.0", "4.3.2")
# optimum's version -> its packages. From 2.0 on, its part for ONNX Runtime is a package of its own.
TRANSFORMERS_4_48 = ("transformers==4.48.3", "tokenizers==0.21.4", "huggingface_hub==0.36.2")
TRANSFORMERS_4_53 = ("transformers==4.53.3", "tokenizers==0.21.4", "huggingface_hub==0.36.2")
TRANSFORMERS_4_57 = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
OPTIMUM = {
    "1.24.0": (("optimum==1.24.0",), TRANSFORMERS_4_48),
    "1.25.0": (("optimum==1.25.0",), TRANSFORMERS_4_48),
    "2.0.0": (("optimum==2.0.0", "optimum-onnx==0.0.3"), TRANSFORMERS_4_53),
    "2.1.0": (("optimum==2.1.0", "optimum-onnx==0.1.0"), TRANSFORMERS_4_57),
}


def python_packages(*requirements: str) -> Path:
    """A folder with these packages, for ``PYTHONPATH``."""
    folder = FOLDER / requirements[0].replace("==", "-")
    if not folder.is_dir():
        part = fresh(folder)
        subprocess.run([*PIP, "--target", part, *requirements], check=True)
        part.rename(folder)
    return folder


def onnxruntime(version: str) -> list[Path]:
    """The folders with a version of ONNX Runtime, and with a numpy for it."""
    numpy = [python_packages(OLD_NUMPY)] if numbers(version) < (1, 19) else []
    return [python_packages(f"onnxruntime=={version}"), *numpy]


def genai(version: str, runtime: str) -> list[Path]:
    return [python_packages(f"onnxruntime-genai=={version}"), *onnxruntime(runtime)]


def optimum(version: str) -> list[Path]:
    return [*(python_packages(*packages) for packages in OPTIMUM[version]), *onnxruntime(NEWEST)]


def transformers_js(version: str) -> Path:
    """The folder with ``node_modules``. Without the install scripts, no GPU libraries are fetched."""
    folder = FOLDER / f"transformers.js-{version}"
    if not folder.is_dir():
        part = fresh(folder)
        (part / "package.json").write_text(json.dumps({"private": True}))
        subprocess.run([*NPM, f"@huggingface/transformers@{version}"], cwd=part, check=True)
        for binaries in part.glob("node_modules/onnxruntime-node/bin/*/*"):
            if binaries.name != sys.platform:
                shutil.rmtree(binaries)
        part.rename(folder)
    return folder


def fresh(folder: Path) -> Path:
    """An empty folder beside this one, to be renamed once it is complete."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def run(program: str, task: dict, folder: Path, packages: list[Path]) -> dict:
    """What a program of this folder prints, in the versions of these packages."""
    file = folder / "task.json"
    file.write_text(json.dumps(task))
    script = Path(__file__).with_name(program)
    command = ["node", script, file, *packages] if script.suffix == ".mjs" else [sys.executable, script, file]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, packages)),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{program}, {packages[0].name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
