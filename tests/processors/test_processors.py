"""gpt2x on emulated processors: the bytes that the converters write, and the logits of every precision and cache.

``make test-processors`` fetches QEMU and an arm64 Python. A processor that cannot be emulated is skipped, with the reason.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import inside
import numpy as np
import onnx
import pytest
from checkpoints import random_checkpoint

from converters import Checkpoint, GPT2Config, LazyTensor
from gpt2x import contract, precisions
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.load import model_of
from gpt2x.runtimes.onnxruntime import OnnxDecoder
from gpt2x.runtimes.torch import TorchDecoder
from gpt2x.verify.exact_arithmetic import rounded_model
from gpt2x.verify.metrics import measure, widened
from gpt2x.verify.running import bounds_of, times_exact

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-processors"
DEBIAN = ENVIRONMENT / "aarch64"  # the files of an arm64 Debian
CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=64, n_ctx=40, n_vocab=50, bos_token_id=0, eos_token_id=0)
PRECISIONS = tuple(precisions.PRECISIONS)
CACHES = tuple(contract.CACHES)
SATURATING = ("growing", "inplace")  # the scales of an 8-bit cache are those of the weights before
TIMEOUT = 300  # seconds
K, N = 64, 24  # shape of the weights of an integer product


# ------------------------------------------------------------------------------------------------------- the processors


def with_vnni() -> str:
    """This machine's ``/proc/cpuinfo``, if its processor had VNNI. QEMU shows the host's, whatever it emulates."""
    return Path("/proc/cpuinfo").read_text().replace("flags\t\t: ", "flags\t\t: avx2 avx512_vnni avx_vnni ")


def arm(part: str, features: str) -> str:
    """``/proc/cpuinfo`` of an Arm processor with two cores. ONNX Runtime 1.28 and later crash on an x86 one."""
    lines = [
        f"Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid {features}",
        "CPU implementer\t: 0x41",
        "CPU architecture: 8",
        "CPU variant\t: 0x0",
        f"CPU part\t: {part}",
        "CPU revision\t: 1",
    ]
    return "".join("\n".join([f"processor\t: {core}", *lines, "", ""]) for core in range(2))


@dataclass(frozen=True)
class Processor:
    """An emulated processor, and the Python that runs on it.

    Args:
        name: QEMU's.
        cpuinfo: the content of ``/proc/cpuinfo`` there.
        saturates: whether ONNX Runtime's products of uint8 and int8 saturate at 16 bits.
        root: where the system's files are, if not this machine's.
    """

    name: str
    architecture: str
    cpuinfo: Callable[[], str]
    saturates: bool = False
    root: Path | None = None

    def emulator(self) -> str | None:
        fetched = ENVIRONMENT / f"qemu-{self.architecture}-static"
        return str(fetched) if fetched.is_file() else shutil.which(f"qemu-{self.architecture}")

    def python(self) -> Path:
        return self.root / "usr/bin/python3.11" if self.root else Path(sys.executable)

    def unavailable(self) -> str | None:
        """Why this processor cannot be emulated here."""
        if self.emulator() is None:
            return f"no qemu-{self.architecture} (make test-processors fetches it where there is apt)"
        if not self.python().is_file():
            return f"no Python for {self.architecture} (make test-processors fetches it where there is apt)"
        if self.root is None and platform.machine() != self.architecture:
            return f"this Python is not for {self.architecture}"
        return None

    def run(self, prefix: Path, *arguments: object) -> None:
        """Run Python with these arguments. Files in ``prefix`` hide the machine's own."""
        (prefix / "proc").mkdir(parents=True)
        (prefix / "proc/cpuinfo").write_text(self.cpuinfo())
        packages = [ROOT]
        if self.root:
            (prefix / "lib").symlink_to(self.root / "lib")
            (prefix / "usr").symlink_to(self.root / "usr")
            packages.append(self.root / "site")
        command = [self.emulator(), "-cpu", self.name, "-L", prefix, self.python(), *arguments]
        done = subprocess.run(
            [str(part) for part in command],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, packages))},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, f"{done.args}\n{done.stdout}{done.stderr[-3000:]}"


PROCESSORS = (
    Processor("Haswell", "x86_64", with_vnni, saturates=True),  # AVX2 without VNNI
    Processor("neoverse-n1", "aarch64", lambda: arm("0xd0c", "atomics fphp asimdhp asimddp"), root=DEBIAN),
    Processor("cortex-a72", "aarch64", lambda: arm("0xd08", ""), root=DEBIAN),  # neither dot products nor float16
)


# ----------------------------------------------------------------------------------------------------------- the models


def trained_size() -> Checkpoint:
    """Random weights of the size that trained ones have."""
    tensors = {}
    for name, tensor in random_checkpoint(CONFIG).tensors.items():
        gain = name.split(".")[-2].startswith("ln_") and name.endswith("weight")
        array = tensor.read() * (0.1 if len(tensor.shape) == 2 else 0.02) + gain
        tensors[name] = LazyTensor.of(array.astype(np.float32))
    return Checkpoint(config=CONFIG, tensors=tensors)


def of_large_weights() -> Checkpoint:
    """Matrices whose numbers are all near the largest, of either sign: rounded alone, pairs of them would saturate."""
    checkpoint = trained_size()
    tensors = dict(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) == 2 and name != "wpe.weight":
            array = tensor.read()
            tensors[name] = LazyTensor.of(np.copysign(0.1 + 0.1 * np.abs(array), array).astype(np.float32))
    return Checkpoint(config=CONFIG, tensors=tensors)


def saturate(directory: Path) -> None:
    """Set every weight of a w8a8 model to 127 or -127: the sum of two products then exceeds 16 bits.

    gpt2x 0.1.0 wrote such pairs of weights, and no metadata about them; other exporters do the same.
    """
    file = directory / contract.model_file("w8a8")
    model = onnx.load(file, load_external_data=False)
    kept = [entry for entry in model.metadata_props if entry.key != contract.PAIRS]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    file.write_bytes(model.SerializeToString())
    data = np.memmap(file.parent / contract.data_file("w8a8"), np.int8, "r+")
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2:
            place = {entry.key: entry.value for entry in tensor.external_data}
            start, length = int(place["offset"]), int(place["length"])
            weights = data[start : start + length]
            weights[:] = np.where(weights < 0, -127, 127)
    data.flush()


def in_pairs(*choices: tuple[int, int]) -> np.ndarray:
    """Weights (K, N) whose rows 2i and 2i + 1 are one of the choices."""
    pairs = np.random.default_rng(0).choice(np.array(choices, np.int8), (K // 2, N))
    return pairs.transpose(0, 2, 1).reshape(K, N)


# Saturation is at 32767: 255 times 128 is below, and 255 times 129 above.
WEIGHTS = {
    "largest": in_pairs((127, 127)),
    "random": np.random.default_rng(0).integers(-127, 128, (K, N), np.int8),
    "sum 129": in_pairs((127, 2), (64, 65), (-29, -100)),
    "sum 128": in_pairs((127, 1), (64, 64), (-28, -100), (-127, 127)),
}


def write_products(folder: Path) -> dict[str, np.ndarray]:
    """An ONNX file for each product of uint8 and int8, and its input. Returns the exact outputs."""
    activations = np.random.default_rng(0).integers(200, 256, (max(inside.BATCHES), K), np.uint8)
    activations[0] = 255
    for name, weights in WEIGHTS.items():
        onnx.save(product(weights), folder / f"{name}.onnx")
        np.save(folder / f"{name}.npy", activations)
    return {name: activations.astype(np.int32) @ weights.astype(np.int32) for name, weights in WEIGHTS.items()}


def product(weights: np.ndarray) -> onnx.ModelProto:
    rows = onnx.helper.make_tensor_value_info("a", onnx.TensorProto.UINT8, ["rows", K])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, ["rows", N])
    node = onnx.helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    graph = onnx.helper.make_graph([node], "product", [rows], [output], [onnx.numpy_helper.from_array(weights, "b")])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)


@dataclass(frozen=True)
class Models:
    """The folder for ``inside.py``, and the expected results."""

    folder: Path
    products: dict[str, np.ndarray]
    logits: dict[int, np.ndarray]  # rows -> (rows * 10, V), of the source in torch
    bounds: dict[str, precisions.Bounds]  # "cache precision rows" -> how far the logits may be from these
    alone: dict[str, np.ndarray]  # name -> (16, V), of exact products


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    folder, checkpoint = tmp_path_factory.mktemp("models"), trained_size()
    exports = folder / "exports"
    for cache in CACHES:
        export_onnx(checkpoint, exports / cache, ExportOptions(PRECISIONS, cache), need_tokenizer=False)
    for cache in SATURATING:
        path = exports / f"saturating-{cache}"
        export_onnx(checkpoint, path, ExportOptions(("w8a8",), cache), need_tokenizer=False)
        saturate(path)
    export_onnx(of_large_weights(), exports / "large-growing", ExportOptions(("w8a8",)), need_tokenizer=False)
    (folder / "products").mkdir()
    logits = {rows: torch_logits(TorchDecoder(model_of(checkpoint)), rows) for rows in inside.BATCHES}
    return Models(
        folder,
        write_products(folder / "products"),
        logits,
        bounds_of_exports(checkpoint, exports, logits),
        {name: inside.one_pass(exports / name / contract.model_file("w8a8"), exact=True) for name in inside.ALONE},
    )


def bounds_of_exports(
    checkpoint: Checkpoint, exports: Path, logits: dict[int, np.ndarray]
) -> dict[str, precisions.Bounds]:
    """As verify judges a model: by its precision, and by what exact arithmetic gives on this very model."""
    found = {}
    for cache in CACHES:
        for precision in PRECISIONS:
            exported = OnnxDecoder(exports / cache, precision=precision)
            exact: Any = rounded_model(checkpoint, exported)
            for rows in inside.BATCHES:
                lost = measure(logits[rows], torch_logits(exact, rows))
                found[f"{cache} {precision} {rows}"] = widened(bounds_of(exported), lost, times_exact(exported))
    return found


def torch_logits(decoder: TorchDecoder, rows: int) -> np.ndarray:
    ids = inside.token_ids(rows)
    positions = np.tile(np.arange(ids.shape[1]), (rows, 1))
    logits, _ = decoder.run(ids, None, positions, None)
    return flat(logits[:, inside.PROMPT - 1 :])


def flat(logits: np.ndarray) -> np.ndarray:
    """Logits (rows, T, V) as (rows * T, V)."""
    return logits.reshape(-1, logits.shape[-1])


# ------------------------------------------------------------------------------------------------------------ the tests


@dataclass(frozen=True)
class Results:
    """What ``inside.py`` wrote on a processor."""

    processor: Processor
    converted: Path
    products: dict[str, np.ndarray]
    logits: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=PROCESSORS, ids=lambda processor: processor.name)
def processor(request) -> Processor:
    if reason := request.param.unavailable():
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module")
def results(processor, models, tmp_path_factory) -> Results:
    folder = tmp_path_factory.mktemp("results")
    processor.run(folder / "prefix", inside.__file__, models.folder, folder)
    arrays = [dict(np.load(folder / name)) for name in ("products.npz", "logits.npz")]
    return Results(processor, folder / "converted", *arrays)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """What the converters write on this machine."""
    folder = tmp_path_factory.mktemp("converted")
    inside.convert(folder)
    return folder


def test_the_converters_write_the_same_bytes_on_every_processor(results, converted):
    expected, found = files_in(converted), files_in(results.converted)
    assert expected.keys() == found.keys()
    assert not [name for name in expected if expected[name] != found[name]]


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("rows", inside.BATCHES)
@pytest.mark.parametrize("name", ["largest", "random", "sum 129"])
def test_products_of_uint8_and_int8_saturate_on_x86_without_vnni_alone(results, models, name, rows):
    exact = np.array_equal(results.products[f"{name} {rows} False"], models.products[name][:rows])
    assert exact != results.processor.saturates


@pytest.mark.parametrize("rows", inside.BATCHES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_products_are_exact_with_the_session_option(results, models, name, rows):
    assert np.array_equal(results.products[f"{name} {rows} True"], models.products[name][:rows])


@pytest.mark.parametrize("rows", inside.BATCHES)
def test_products_are_exact_without_the_option_where_each_pair_of_weights_sums_to_128_at_most(results, models, rows):
    assert np.array_equal(results.products[f"sum 128 {rows} False"], models.products["sum 128"][:rows])


@pytest.mark.parametrize("rows", inside.BATCHES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cache", CACHES)
def test_every_precision_with_every_cache_is_within_its_bounds(results, models, cache, precision, rows):
    name = f"{cache} {precision} {rows}"
    assert not measure(models.logits[rows], flat(results.logits[name])).failures(models.bounds[name])


@pytest.mark.parametrize("name", inside.ALONE)
def test_onnx_runtime_alone_runs_w8a8_exactly_with_the_option(results, models, name):
    assert relative_error(models.alone[name], results.logits[f"{name} alone True"]) < 0.02


def test_onnx_runtime_alone_saturates_w8a8_whose_weights_do_not_come_in_pairs(results, models):
    error = relative_error(models.alone["saturating-growing"], results.logits["saturating-growing alone False"])
    assert (error > 0.2) == results.processor.saturates


def test_onnx_runtime_alone_runs_exported_w8a8_exactly_without_the_option(results, models):
    assert relative_error(models.alone["large-growing"], results.logits["large-growing alone False"]) < 0.02


@pytest.mark.parametrize("cache", SATURATING)
def test_gpt2x_runs_w8a8_of_version_0_1_0_exactly_on_every_processor(results, models, cache):
    expected = models.alone["saturating-growing"][inside.PROMPT - 1 :]
    assert relative_error(expected, results.logits[f"saturating-{cache} w8a8 1"][0]) < 0.02


def relative_error(expected: np.ndarray, found: np.ndarray) -> float:
    """The largest difference, relative to the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
