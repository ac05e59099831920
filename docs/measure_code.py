"""Print the measures of the code that ``docs/design.md`` states:

python docs/measure_code.py density    # how dense converters and gpt2x are
python docs/measure_code.py stops      # how far the reader of an entry point goes
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tempfile
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).parents[1]
PACKAGES = ("converters", "gpt2x")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LEVELS = 2  # calls of an entry point, and calls of these
# Values, tables and files that every step uses: a reader does not leave a step for them.
EVERYWHERE = (
    "converters.checkpoint", "converters.containers.container", "converters.dtypes", "converters.errors", "converters.io",
    "converters.spec", "converters.tensors", "converters.values", "gpt2x.contract", "gpt2x.export.options",
    "gpt2x.precisions.precision", "gpt2x.tasks", "gpt2x.verify.checks", "gpt2x.weight_options",
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- density


def density() -> Iterator[str]:
    """The lengths of functions, and what there is in 1000 lines of the files, empty ones included."""
    texts = [file.read_text() for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    lengths = sorted(node.end_lineno - node.lineno + 1 for node in nodes if isinstance(node, FUNCTIONS))
    p95 = lengths[len(lengths) * 95 // 100]
    yield f"functions: median {statistics.median(lengths):.0f}, 95th percentile {p95}, longest {lengths[-1]} lines"
    counts = {
        "ternaries": sum(isinstance(node, ast.IfExp) for node in nodes),
        "comprehensions": sum(isinstance(node, COMPREHENSIONS) for node in nodes),
        "walruses": sum(isinstance(node, ast.NamedExpr) for node in nodes),
        "comment lines of their own": sum(map(own_comments, texts)),
    }
    lines = sum(len(text.splitlines()) for text in texts)
    for name, count in counts.items():
        yield f"{name}: {1000 * count / lines:.1f} in 1000 lines ({count} in {lines})"


def own_comments(text: str) -> int:
    """How many lines are a comment and nothing else."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip() for token in tokens)


# ------------------------------------------------------------------------------------------------------------- stops


def stops() -> Iterator[str]:
    """The modules that a reader of each entry point comes to, and how often it is one that was left before."""
    # Imported before, as the bodies of modules are no calls.
    import gpt2x.runtimes.onnxruntime
    from converters import open_checkpoint
    from gpt2x import SHAKESPEARE
    from gpt2x.export.onnx_directory import export_onnx
    from gpt2x.verify.report import verify

    assert gpt2x
    checkpoint = open_checkpoint(SHAKESPEARE)
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "open_checkpoint": lambda: open_checkpoint(SHAKESPEARE),
            "export_onnx": lambda: export_onnx(checkpoint, Path(folder) / "onnx"),
            "verify": lambda: verify(SHAKESPEARE, Path(folder) / "onnx"),
        }
        for name, run in runs.items():
            path = path_of(run)
            yield f"{name}: {len(path)} stops, {len(path) - len(set(path))} returns: {', '.join(path)}"


def path_of(run: Callable[[], object]) -> list[str]:
    """The modules in the order in which a call first calls each of their functions; one in a row counts once."""
    seen: set[CodeType] = set()
    path: list[str] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        name = module_of(frame)
        if event != "call" or not name or frame.f_code in seen or levels_above(frame) > LEVELS:
            return
        seen.add(frame.f_code)
        if not name.startswith(EVERYWHERE) and path[-1:] != [name]:
            path.append(name)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return path


def module_of(frame: FrameType) -> str:
    """The module of a function of the packages; empty for any other, and for a lambda or a comprehension."""
    name = str(frame.f_globals.get("__name__", ""))
    is_ours = name.startswith(PACKAGES) and not frame.f_code.co_name.startswith("<")
    return name if is_ours else ""


def levels_above(frame: FrameType) -> int:
    """How many functions of the packages are around a frame."""
    count = 0
    around = frame.f_back
    while around:
        count += bool(module_of(around))
        around = around.f_back
    return count


if __name__ == "__main__":
    for line in {"density": density, "stops": stops}[sys.argv[1]]():
        print(line)
