"""A cache in a device's memory: the same tokens and logits as with arrays of the CPU.

"addresses" and "handles" run the device's functions on the CPU's memory: with views of rows, as CUDA has, and without, as
WebGPU. "webgpu" runs them on a provider that has memory of its own, where it is installed: ``make test-device``.
"""

from __future__ import annotations

import functools
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from commands import assert_refused, done
from paths import FIXTURES

from converters import FormatError, open_checkpoint
from gpt2x import SHAKESPEARE, bench
from gpt2x.cli.bench import row as row_of
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.generation.beams import Beams, beam_search
from gpt2x.generation.loop import Generation
from gpt2x.generation.sampling import Sampling
from gpt2x.runtimes import onnx_model, onnx_providers, onnx_run
from gpt2x.runtimes.base import InputError
from gpt2x.runtimes.batching import RunningBatch
from gpt2x.runtimes.onnx_memory import CpuMemory, DeviceMemory, DeviceTensor, Place, bind_input
from gpt2x.runtimes.onnx_task import OnnxTask
from gpt2x.runtimes.onnxruntime import OnnxDecoder
from gpt2x.serving.metrics import Metrics
from gpt2x.serving.opening import EngineOptions, Wanted, open_models
from gpt2x.verify.metrics import measure
from gpt2x.verify.running import bounds_of
from gpt2x.verify.scenarios import one_pass

ATOL = 2e-4  # of logits, in float32
DEVICES = ("addresses", "handles", "webgpu")
CACHES = ("growing", "inplace")
GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Handles(Place):
    """The CPU's memory, as a device without addresses."""

    @property
    def has_addresses(self) -> bool:
        return False


PLACES = {"addresses": Place(), "handles": Handles()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for cache in CACHES:
        found[cache] = tmp_path_factory.mktemp("device") / cache
        export_onnx(open_checkpoint(SHAKESPEARE), found[cache], ExportOptions(cache=cache))
    return found


@functools.cache
def webgpu_fault() -> str | None:
    """Why WebGPU cannot run here; None if it can."""
    provider = onnx_providers.KNOWN["webgpu"].name
    if provider not in ort.get_available_providers():
        return f"ONNX Runtime has no {provider}; make test-device installs one"
    try:
        DeviceMemory(Place("gpu"), [provider]).upload(np.zeros(1, np.float32))
    except Exception as error:
        return f"{provider} finds no device, such as a Vulkan driver: {str(error)[-200:]}"
    return None


def avoid_wrong_attention(monkeypatch):
    """Take a cache in place on WebGPU, which gpt2x refuses, with one token a run.

    ``GroupQueryAttention`` of ONNX Runtime 1.27's WebGPU is wrong for rows of different lengths, and on SwiftShader for several
    tokens: also where a session is run without gpt2x. What is right shows that the cache stays on the device.
    """
    monkeypatch.setattr(onnx_providers, "IN_PLACE", {"WebGPU_Buf"})
    for name in ("chunk_size", "largest_chunk"):
        monkeypatch.setattr(f"gpt2x.runtimes.onnx_run.{name}", lambda *_: 1)
    monkeypatch.setattr("gpt2x.runtimes.onnx_run.FEW", 0)


def on_device(folder, device, monkeypatch):
    """A decoder with its cache on a device."""
    if device == "webgpu":
        fault = webgpu_fault()
        if fault:
            pytest.skip(fault)
        if folder.name == "inplace":
            avoid_wrong_attention(monkeypatch)
        return OnnxDecoder(folder, providers=["webgpu"])
    with monkeypatch.context() as patch:
        patch.setattr(onnx_model, "memory_of", lambda *_: DeviceMemory(PLACES[device], ["CPUExecutionProvider"]))
        return OnnxDecoder(folder)


@pytest.fixture(params=[(cache, device) for cache in CACHES for device in DEVICES], ids="-".join)
def pair(request, folders, monkeypatch):
    """A decoder on the CPU, and the same with its cache on a device."""
    cache, device = request.param
    return OnnxDecoder(folders[cache]), on_device(folders[cache], device, monkeypatch)


@pytest.fixture(params=DEVICES)
def in_place(request, folders, monkeypatch):
    """The same for a cache in place."""
    return OnnxDecoder(folders["inplace"]), on_device(folders["inplace"], request.param, monkeypatch)


def skip_on_webgpu(decoder):
    if decoder.row_cache(0).memory.place.type == "gpu":
        pytest.skip("GroupQueryAttention of ONNX Runtime 1.27's WebGPU is wrong for rows of different lengths")


def prompt(n, seed=0):
    return np.random.default_rng(seed).integers(2048, size=n).tolist()


def read(decoder, ids, cache=None, start=0):
    return decoder.step(np.array([ids]), None, np.arange(start, start + len(ids))[None], cache)


def values_of(cache):
    return cache if isinstance(cache, list) else cache.buffers


# -------------------------------------------------------------------------------------------------------- generation


def test_the_cache_is_on_the_device_from_step_to_step(pair):
    cpu, device = pair
    expected, _ = read(cpu, prompt(9))
    found, cache = read(device, prompt(9))
    np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)
    kind = DeviceTensor if device.in_place else ort.OrtValue
    assert all(isinstance(value, kind) for value in values_of(cache))
    if device.in_place:
        before = [value.value.data_ptr() for value in cache.buffers]
        read(device, [5], cache, 9)
        assert [value.value.data_ptr() for value in cache.buffers] == before


def test_greedy_tokens_are_those_of_the_cpu_while_the_cache_grows(pair):
    texts = [[tokens[0] for tokens in Generation(model, [prompt(60)], 6, GREEDY)] for model in pair]
    assert texts[0] == texts[1]


def test_prompts_of_several_lengths_continue_as_on_the_cpu(pair):
    if pair[1].in_place:
        skip_on_webgpu(pair[1])
    prompts = [prompt(n, n) for n in (3, 12, 7)]
    texts = [list(Generation(model, prompts, 5, GREEDY)) for model in pair]
    assert texts[0] == texts[1]


def test_every_logit_of_a_run_comes_back(pair):
    ids = np.array([prompt(6)])
    found = [model.run(ids, None, np.arange(6)[None], None)[0] for model in pair]
    assert found[1].shape == (1, 6, 2048)
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=ATOL)


def test_beams_change_rows_on_the_device(pair):
    found = [beam_search(model, [prompt(5), prompt(5, 1)], 4, Beams(3)) for model in pair]
    for cpu, device in zip(*found, strict=True):
        assert [one.tokens for one in cpu] == [one.tokens for one in device]


def test_guesses_are_taken_back_on_the_device(pair):
    found = []
    for model in pair:
        _, cache = read(model, prompt(9))
        several, cache = model.run(np.array([prompt(4, 1)]), None, np.arange(9, 13)[None], cache)
        after, _ = read(model, [7], model.truncate(cache, 10), 10)
        found.append(np.concatenate((several[0], after)))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=ATOL)


def test_a_prompt_in_pieces_returns_only_the_last_logits(pair):
    ids = prompt(20)
    found = []
    for model in pair:
        cache = None
        for start in (0, 8, 16):
            logits, cache = read(model, ids[start : start + 8], cache, start)
        found.append(logits)
    assert found[1].shape == (1, 2048)
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=ATOL)


def test_taking_a_cache_back_to_nothing_begins_anew(pair):
    cpu, device = pair
    expected, _ = read(cpu, prompt(4, 1))
    _, cache = read(device, prompt(9))
    found, _ = read(device, prompt(4, 1), device.truncate(cache, 0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)


# ---------------------------------------------------------------------------------------------------- rows of a cache


def test_a_fork_continues_as_on_the_cpu(in_place):
    found = []
    for model in in_place:
        _, cache = read(model, prompt(9))
        assert cache.fork(0, 2) == [1, 2]
        logits, cache = model.step(np.array([[5], [6], [7]]), None, np.full((3, 1), 9), cache)
        kept = model.reorder(cache, np.array([2, 0]))
        logits_after, _ = model.step(np.array([[8], [9]]), None, np.full((2, 1), 10), kept)
        found.append(np.concatenate((logits, logits_after)))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=ATOL)


def test_sequences_join_fork_and_leave_a_running_batch_as_on_the_cpu(in_place):
    skip_on_webgpu(in_place[1])
    found = [list(_running(RunningBatch(model))) for model in in_place]
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=ATOL)


def _running(batch):
    """Logits of a batch with sequences that join, leave, and are read in pieces between steps of the others."""
    first, logits = batch.join(prompt(5))
    yield logits
    second, logits = batch.join(prompt(11, 1))
    yield logits
    reading = batch.begin()
    yield reading.read(prompt(4, 2))[-1]
    yield from batch.step({first: 3, second: 4}).values()
    yield reading.read(prompt(3, 3))[-1]
    third = batch.finish(reading)
    fork = batch.fork(second)
    yield from batch.step({first: 5, second: 6, third: 7, fork: 8}).values()
    batch.leave(first)
    yield from batch.step({second: 9, third: 10, fork: 11}).values()


def test_keys_and_values_of_a_prompt_are_copied_and_restored(in_place):
    found = []
    for model in in_place:
        with RunningBatch(model) as batch:
            batch.join(prompt(3, 1))
            reading = batch.begin()
            reading.read(prompt(9))
            copies = reading.copy(2, 9)
            assert copies[0].shape == (6, 7, 32)
            batch.abandon(reading)
            again = batch.begin()
            again.read(prompt(9)[:2])
            again.restore(copies)
            found.append(again.read([4])[-1])
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=ATOL)


@pytest.mark.parametrize("device", ["addresses", "handles"])
@pytest.mark.parametrize("cache", CACHES)
def test_factors_of_an_adapter_are_put_on_the_device(tmp_path, monkeypatch, cache, device):
    adapters = {"all": FIXTURES / "adapters/all_linear"}
    options = ExportOptions(adapters=adapters, cache=cache)
    export_onnx(open_checkpoint(FIXTURES / "adapters/base"), tmp_path / "m", options, need_tokenizer=False)
    models = OnnxDecoder(tmp_path / "m"), on_device(tmp_path / "m", device, monkeypatch)
    plain = read(models[0], [1, 2, 3])[0]
    expected, found = (read(model.with_adapter("all"), [1, 2, 3])[0] for model in models)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)
    assert abs(found - plain).max() > 10 * ATOL


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("device", PLACES)
def test_rows_move_in_every_dtype_of_a_cache(device, dtype):
    cpu, memory = CpuMemory(), DeviceMemory(PLACES[device], ["CPUExecutionProvider"])
    array = np.arange(3 * 2 * 4 * 5).reshape(3, 2, 4, 5).astype(dtype)
    buffer = memory.upload(array)
    rows = np.array([2, 0])

    def same(found, expected):
        stored = [memory.read(found, row, 0, 3) for row in range(len(expected))]
        np.testing.assert_array_equal(np.array(stored), expected[:, :, :3])

    same(buffer, array)
    same(memory.gathered(buffer, rows, 3), cpu.gathered(array, rows, 3))
    same(memory.resized(buffer, 3, 9, 3), cpu.resized(array, 3, 9, 3))
    same(memory.zeros((2, 2, 4, 5), dtype), np.zeros((2, 2, 4, 5), dtype))
    same(memory.written(buffer, 1, 2, array[0, :, :2]), cpu.written(array.copy(), 1, 2, array[0, :, :2]))
    same(memory.copied(buffer, rows, np.array([0, 1]), 3), cpu.copied(array.copy(), rows, np.array([0, 1]), 3))


def test_memory_of_a_device_that_is_full_is_reported():
    memory = DeviceMemory(Place(), ["CPUExecutionProvider"])
    with pytest.raises(FormatError, match="ONNX Runtime cannot move the cache on the device"):
        memory.zeros((1 << 20, 1 << 20, 1 << 10, 1 << 10), "float32")


# ------------------------------------------------------------------------------------------------------ the provider


class Session:
    """A session that needs its cache in a memory of this name."""

    def __init__(self, name, providers=("SomeExecutionProvider",)):
        self.name = name
        self.device_id = 1
        self.providers = list(providers)

    def get_inputs(self):
        return [type("Input", (), {"name": name}) for name in ("input_ids", "past_key_values.0.key")]

    def get_input_memory_infos(self):
        return [type("Info", (), {"name": "Cpu", "device_id": 0}), self]

    def get_providers(self):
        return self.providers


def memory(name, in_place=True):
    return onnx_providers.memory_of(Session(name), ["CPUExecutionProvider"], in_place, FIXTURES)


def test_the_cache_is_where_the_session_needs_its_first_tensor():
    assert isinstance(memory("Cpu"), CpuMemory)
    assert memory("Cuda").place == Place("cuda", 1) and memory("WebGPU_Buf", in_place=False).place == Place("gpu", 1)
    assert isinstance(memory("Elsewhere", in_place=False), CpuMemory)
    with pytest.raises(FormatError, match="cannot keep a cache in place in Elsewhere"):
        memory("Elsewhere")
    with pytest.raises(FormatError, match="export the model with --cache growing"):
        memory("WebGPU_Buf")


def test_an_older_onnx_runtime_does_not_say_where_and_only_the_cpu_is_certain(monkeypatch):
    monkeypatch.delattr(Session, "get_input_memory_infos")
    with pytest.raises(FormatError, match="cannot keep a cache in place in an unknown memory"):
        memory("Cuda")
    session = Session("Cpu", ["CPUExecutionProvider"])
    assert isinstance(onnx_providers.memory_of(session, [], True, FIXTURES), CpuMemory)


def test_tokens_are_bound_in_each_step_where_they_are_needed_on_a_device_and_the_cache_on_the_cpu(folders, monkeypatch):
    """CUDA, for example, has no attention in place to a float32 cache. Binding copies the tokens to the device."""
    held = []

    def bind_a_copy(binding, name, tensor):
        if name in ("input_ids", "position_ids"):
            tensor = tensor.copy()
            held.append(tensor)
        bind_input(binding, name, tensor)

    expected = read_one_by_one(OnnxDecoder(folders["inplace"]), prompt(6))
    monkeypatch.setattr(onnx_run, "bind_input", bind_a_copy)
    monkeypatch.setattr(onnx_run, "reads_on_cpu", lambda *_: False)
    assert np.array_equal(read_one_by_one(OnnxDecoder(folders["inplace"]), prompt(6)), expected)
    monkeypatch.setattr(onnx_run, "reads_on_cpu", lambda *_: True)
    assert not np.array_equal(read_one_by_one(OnnxDecoder(folders["inplace"]), prompt(6)), expected)


def read_one_by_one(decoder, ids):
    """The last logits after tokens that were read one at a time."""
    cache = None
    for place, token in enumerate(ids):
        logits, cache = read(decoder, [token], cache, place)
    return logits


def test_where_a_session_needs_tokens(monkeypatch):
    assert onnx_providers.reads_on_cpu(Session("Cuda"), ["input_ids"])
    assert not onnx_providers.reads_on_cpu(Session("Cuda"), ["input_ids", "past_key_values.0.key"])
    monkeypatch.delattr(Session, "get_input_memory_infos")
    assert not onnx_providers.reads_on_cpu(Session("Cuda"), ["input_ids"])
    assert onnx_providers.reads_on_cpu(Session("Cpu", ["CPUExecutionProvider"]), ["input_ids"])


def test_a_batch_keeps_the_logits_of_few_rows_only(folders):
    rows = onnx_run.KEPT + 2
    batch = RunningBatch(OnnxDecoder(folders["inplace"]))
    batch.reserve(rows, 16)
    sequences = []
    for row in range(rows):
        sequences.append(batch.join([row + 1])[0])
        batch.step(dict.fromkeys(sequences, 5))
    kept = [step.logits is not None for step in batch.cache.bound.values()]
    assert kept == [True] * onnx_run.KEPT + [False] * 2


def test_a_provider_may_be_one_name_and_may_have_options(folders):
    accepted: list[Any] = ["cpu", ["cpu"], [("cpu", {})], [("CPUExecutionProvider", {})]]
    for providers in accepted:
        OnnxDecoder(folders["inplace"], providers=providers)
    refused: list[Any] = [[1], ("CPUExecutionProvider", {}), [("cpu", 1)], [("cpu",)]]
    for providers in refused:
        with pytest.raises(InputError, match="is neither a name"):
            OnnxDecoder(folders["inplace"], providers=providers)


def test_a_provider_that_onnx_runtime_leaves_out_is_refused():
    session = Session("Cpu", ["CPUExecutionProvider"])
    onnx_providers.check_used(session, ["CPUExecutionProvider"], FIXTURES)
    with pytest.raises(FormatError, match="cannot start CUDAExecutionProvider, and would use CPUExecutionProvider"):
        onnx_providers.check_used(session, [("CUDAExecutionProvider", {})], FIXTURES)


def test_a_provider_that_is_not_installed_is_refused_with_the_package_that_has_it(folders, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(InputError, match="pip uninstall onnxruntime; pip install onnxruntime-gpu"):
        OnnxDecoder(folders["inplace"], providers=["cuda", "cpu"])
    OnnxDecoder(folders["inplace"], providers=["cpu"])


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "MODEL", "x"),
        ("score", "MODEL", "TEXT"),
        ("bench", "MODEL", "--prompt", "2", "--new", "1"),
        ("bench", "MODEL", "--prompt", "2", "--new", "2", "--speculate", "lookup"),
        ("verify", "SOURCE", "MODEL"),
        ("serve", "MODEL", "--port", "0"),
    ],
    ids=" ".join,
)
def test_every_command_that_runs_onnx_names_the_package_of_a_provider(gpt2x, folders, tmp_path, monkeypatch, command):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    (tmp_path / "text").write_text("My lord")
    places = {"SOURCE": SHAKESPEARE, "MODEL": folders["inplace"], "TEXT": tmp_path / "text"}
    result = gpt2x(*(places.get(part, part) for part in command), "--provider", "cuda")
    assert_refused(result, "has no CUDAExecutionProvider", "pip install onnxruntime-gpu")


def test_the_cpu_is_a_provider_of_every_command(gpt2x, folders):
    folder, cpu = folders["inplace"], ("--provider", "cpu")
    done(gpt2x("generate", folder, "x", *cpu, "--temperature", "0", "--max-new-tokens", "2"))
    head, line = done(gpt2x("bench", folder, *cpu, "--prompt", "2", "--new", "2", "--threads", "1")).stdout.splitlines()
    assert "bandwidth" in head and "%" in line
    assert "The same." in done(gpt2x("verify", SHAKESPEARE, folder, *cpu)).stdout


def test_a_provider_is_refused_where_weights_would_run(gpt2x, folders):
    said = "a provider is for ONNX, and this would be run as weights"
    assert_refused(gpt2x("generate", SHAKESPEARE, "x", "--provider", "cpu"), said)
    assert_refused(gpt2x("verify", SHAKESPEARE, SHAKESPEARE, "--provider", "cpu"), said)
    result = gpt2x("verify", SHAKESPEARE, "--provider", "cpu")
    assert result.exit_code == 2 and "--provider applies to B, which is missing" in result.stderr


def test_a_bench_on_a_device_states_no_share_of_the_memory_bandwidth(folders, monkeypatch):
    monkeypatch.setattr(bench, "CPU", "another")  # so that this run counts as one on a device
    run = bench.measure(str(folders["inplace"]), "fp32", 2, 1, 1, 1, "cpu")
    assert run["bandwidth_share"] is None
    assert " -  " in row_of(run)


# ------------------------------------------------------------------------------------------------- WebGPU, by its package


@pytest.fixture
def webgpu():
    """Skip where WebGPU cannot run."""
    fault = webgpu_fault()
    if fault:
        pytest.skip(fault)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device") / "quantized"
    export_onnx(open_checkpoint(SHAKESPEARE), folder, ExportOptions(("fp32", "int8", "w8a8", "int4")))
    return folder


@pytest.mark.parametrize("precision", ["fp32", "int8", "w8a8", "int4"])
def test_webgpu_is_within_the_bounds_of_each_precision(webgpu, quantized, precision):
    """Tokens may differ from the CPU's in int8 and int4, so the logits are compared, as ``verify`` does."""
    ids = prompt(40)
    model = OnnxDecoder(quantized, precision=precision, providers=["webgpu"])
    assert "WebGpuExecutionProvider" in model.runtime
    expected = one_pass(OnnxDecoder(quantized, precision="fp32"), ids)
    assert measure(expected, one_pass(model, ids), ids[1:]).failures(bounds_of(model)) == []


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_webgpu_rounds_no_activations_as_the_cpu_does_not_without_fusion(webgpu, quantized, precision):
    """Where a CPU fuses DequantizeLinear and MatMul, it rounds the activations to 8 bits. That is the difference."""
    ids = prompt(40)
    cpu = OnnxDecoder(quantized, precision=precision)
    found = one_pass(OnnxDecoder(quantized, precision=precision, providers=["webgpu"]), ids)
    exact = cpu.unoptimized()
    assert exact is not None
    np.testing.assert_allclose(found, one_pass(exact, ids), rtol=0, atol=ATOL)
    assert abs(found - one_pass(cpu, ids)).max() > 10 * ATOL


def test_webgpu_serves_embeddings(webgpu, tmp_path):
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "m", ExportOptions(task="feature-extraction"))
    options = EngineOptions(threads=1, provider="webgpu")
    with closing(open_models([Wanted("embed", tmp_path / "m", None)], options, Metrics())) as models:
        model = models.embedding_model("embed").embedder.model
        assert "WebGpuExecutionProvider" in model.runtime
        ids = np.array([prompt(6)])
        found, expected = model.run(ids), OnnxTask(tmp_path / "m").run(ids)
    np.testing.assert_allclose(found["mean_embedding"], expected["mean_embedding"], rtol=0, atol=ATOL)


def test_webgpu_is_a_provider_of_bench_and_refused_by_serve(webgpu, gpt2x, folders):
    options = ("--provider", "webgpu", "--prompt", "2", "--new", "2", "--threads", "1")
    assert " -  " in done(gpt2x("bench", folders["growing"], *options)).stdout
    result = gpt2x("serve", folders["inplace"], "--port", "0", "--provider", "webgpu")
    assert_refused(result, "its cache in place would be in WebGPU_Buf, where gpt2x cannot keep one")
