"""Every reader with randomly corrupted files: a correct result or a ConversionError, and nothing else.

The cases are the same in every run. ``make fuzz`` runs others for as long as you like.
"""

import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import worker
from checkpoints import random_checkpoint
from mutate import mutated
from paths import ROOT
from run import fuzz, fuzz_guided
from seeds import HARMFUL, MAKERS, load_seeds, make_seeds, zipped
from warm_hdf5 import WarmListing

from converters import FORMATS, UnsafeError, open_checkpoint, save_checkpoint

# Nearly all of it runs in processes of its own, which coverage does not see.
pytestmark = pytest.mark.untraced

# Cases of each format. The fast tests run a part of them, the slow tests half: a minute in total on two cores.
CASES = {
    "tf": 1000, "safetensors": 1200, "zip": 1500, "npz": 800, "legacy": 1500, "shards": 1000, "llmc": 800, "gguf": 1200, "hdf5": 1000, "hdf5_listing": 3000, "msgpack": 1200,
    "onnx": 1000, "config": 900, "tokenizer": 500, "adapter": 600,
}  # fmt: skip


@pytest.fixture(scope="session")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    make_seeds(folder)
    return folder


def test_every_reader_is_fuzzed():
    formats = {f.name for f in FORMATS if f.openers}
    names = {"bin": {"zip", "legacy"}}
    assert set().union(*(names.get(name, {name}) for name in formats)) <= set(MAKERS) == set(CASES)


@pytest.mark.parametrize("share", [20, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_a_corrupted_file_is_read_correctly_or_refused(seeds, tmp_path, name, share):
    cases = max(30, CASES[name] // share)
    result = fuzz(seeds, tmp_path, name, 0, cases, workers=1 if share > 2 else 2)
    assert not result.faults, "\n\n".join(map(str, result.faults))
    assert result.outcomes.total() == cases
    read = sum(count for words, count in result.outcomes.items() if "refused" not in words)
    assert 0 < read < cases, f"all cases have the same outcome, so this tests nothing: {result.outcomes}"


@pytest.mark.parametrize("name", HARMFUL)
def test_a_pickle_that_calls_code_is_refused_and_nothing_is_executed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.bin").write_bytes(zipped(HARMFUL[name]))
    with pytest.raises(UnsafeError):
        open_checkpoint(tmp_path / "m.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["m.bin"]


# ------------------------------------------------------------------------------------------------- tests of the harness


FAKES = {
    "honest": ("pass", None),
    "another error": ("raise ValueError('no ConversionError')", "ValueError: no ConversionError"),
    "a hang": ("while True: pass", "timeout"),
    "memory": ("bytes(400 << 20)", "MemoryError"),
    "memory little by little": ("keep = [bytes(1 << 20) for i in range(400)]", "MemoryError"),
    "a file elsewhere": ("open('/etc/hostname')", "outside its folder"),
    "a file above": ("open('../x', 'w')", "outside its folder"),
    "a folder elsewhere": ("os.listdir('/')", "outside its folder"),
    "a file elsewhere, with the error suppressed": ("with contextlib.suppress(BaseException): open('/etc/hostname')", "outside its folder"),
    "a socket": ("socket.socket()", "socket.__new__"),
    "a program": ("os.system('true')", "os.system"),
    "another program": ("subprocess.run(['true'])", "subprocess.Popen"),
    "code": ("exec('1')", "compile"),
    "an import": ("import this", "import"),
    "a map": ("mmap.mmap(-1, 10)", "mmap"),
    "a thread that fails": ("t = threading.Thread(target=int, args=('x',)); t.start(); t.join()", "an error in a thread"),
    "a recursion": ("f = lambda: f(); f()", "RecursionError"),
}  # fmt: skip
PROGRAM = """
import contextlib, mmap, os, socket, subprocess, sys, threading
sys.path.insert(0, {here!r})
import guard
from pathlib import Path
guard.CPU_SECONDS = 1
def action():
    {body}
    return "read"
print(*guard.attempt(guard.Guard(), Path.cwd(), action))
"""


@pytest.mark.parametrize("fake", FAKES)
def test_the_guard_detects_what_a_reader_must_not_do(tmp_path, fake):
    body, fault = FAKES[fake]
    program = PROGRAM.format(here=str(Path(__file__).parent), body=body)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=True
    )
    assert done.stdout.startswith("fault" if fault else "done read"), done.stdout
    assert (fault or "") in done.stdout


LISTING = """
import os, sys, time
def main(path):
    if path == "crash": os.abort()
    if path == "hang": time.sleep(99)
    if path == "second" and hasattr(main, "seen"): os.abort()
    if path == "fail": raise ValueError
    if path == "open": import h5py; main.seen = h5py.File("x", "w", driver="core", backing_store=False)
    if path == "memory": main.seen = bytearray(9 << 20)
    if path == "state": main.seen = True
    print(path, hasattr(main, "seen"), os.getpid() if path == "process" else "")
if __name__ == "__main__":
    main(sys.argv[1])
"""


@pytest.fixture
def warm(tmp_path):
    """``warm(path)``: a file listed by a child of a process that has imported h5py."""
    (tmp_path / "listing.py").write_text(LISTING)
    listing = WarmListing()

    def run(path, timeout=600.0):
        command = [sys.executable, "-I", "-W", "ignore", str(tmp_path / "listing.py"), path, *sys.path[1:]]
        done = listing.run(command, timeout=timeout, env={}, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        return done.returncode, done.stdout.decode()

    yield run
    listing.close()


def test_a_file_that_crashes_or_hangs_the_hdf5_library_ends_a_fork_only(warm):
    assert warm("first") == (0, "first False \n")
    assert warm("crash") == (-signal.SIGABRT, "")
    with pytest.raises(subprocess.TimeoutExpired):
        warm("hang", timeout=0.1)
    assert warm("fail") == (1, "")
    assert warm("last") == (0, "last False \n")


def test_one_child_lists_many_files(warm):
    assert warm("first") == (0, "first False \n")
    assert warm("state") == (0, "state True \n")
    assert warm("last") == (0, "last True \n")


@pytest.mark.parametrize("path", ["open", "memory"])
def test_a_child_in_which_a_file_leaves_something_lists_no_other(warm, path):
    assert warm("first") == (0, "first False \n")
    assert warm(path) == (0, f"{path} True \n")
    assert warm("last") == (0, "last False \n")


def test_a_file_that_crashes_a_child_only_after_others_is_listed_by_a_child_of_its_own(warm):
    assert warm("state") == (0, "state True \n")
    assert warm("second") == (0, "second False \n")


def test_a_listing_that_differs_in_a_new_process_is_a_fault(warm):
    with pytest.raises(RuntimeError, match="a new process returns"):
        warm("process")


DYING = {"aborts": ("os.abort()", "ended with -6"), "is silent": ("time.sleep(99)", "ended with -9"), "fails": ("1 / 0", "ZeroDivisionError")}  # fmt: skip


class Clock:
    """A clock that jumps once, shortly after the last output of a worker. So load on the machine cannot cause a timeout."""

    calls = 0

    def monotonic(self):
        self.calls += Path("last").exists()
        return 1000.0 * (self.calls > 3)


@pytest.mark.parametrize("fake", DYING)
def test_a_worker_that_dies_is_a_fault_and_the_next_case_runs(tmp_path, monkeypatch, fake):
    body, fault = DYING[fake]
    (tmp_path / "worker.py").write_text(
        "import json, os, sys, time\n"
        "for n in range(int(sys.argv[4]), int(sys.argv[4]) + int(sys.argv[5])):\n"
        f"    print(json.dumps({{'begun': n, 'folder': {str(tmp_path / 'case')!r}}}), flush=True)\n"
        f"    if n == 1: open('last', 'w').close(); {body}\n"
        "    print(json.dumps({'outcomes': {'read': 1}, 'grown': 0, 'cpu': 0}), flush=True)\n"
    )
    (tmp_path / "case").mkdir()
    monkeypatch.setattr("run.WORKER", tmp_path / "worker.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("run.time", Clock())
    result = fuzz(tmp_path, tmp_path / "kept", "tf", 0, 3, workers=1)
    assert result.outcomes["read"] == 2
    assert [(f.name, f.folder) for f in result.faults] == [("tf", tmp_path / "kept/tf-1")]
    assert result.faults[0].words.startswith("the worker") and fault in result.faults[0].words


def test_a_result_that_is_a_different_model_is_a_fault(tmp_path, monkeypatch):
    save_checkpoint(random_checkpoint(), tmp_path / "m.safetensors")
    assert worker.Checker().check(tmp_path, "m.safetensors") == "read"
    (tmp_path / "result.safetensors").unlink()
    readers: Any = iter([lambda path, n_head: random_checkpoint(), lambda path: random_checkpoint(seed=1)])
    monkeypatch.setattr(worker, "open_checkpoint", lambda *args, **options: next(readers)(*args, **options))
    with pytest.raises(worker.Wrong, match="another model: other bytes"):
        worker.Checker().check(tmp_path, "m.safetensors")


def test_a_model_is_converted_once(tmp_path):
    save_checkpoint(random_checkpoint(), tmp_path / "m.safetensors")
    save_checkpoint(random_checkpoint(seed=1), tmp_path / "n.safetensors")
    checker = worker.Checker()
    written = []
    for name in ("m.safetensors", "m.safetensors", "n.safetensors"):
        assert checker.check(tmp_path, name) == "read"
        written.append((tmp_path / "result.safetensors").exists())
        (tmp_path / "result.safetensors").unlink(missing_ok=True)
    assert written == [True, False, True]


def test_a_reader_that_ignores_a_checksum_is_a_fault(tmp_path):
    save_checkpoint(random_checkpoint(), tmp_path / "m.safetensors")
    other = worker.bytes_of(random_checkpoint(seed=1))
    with pytest.raises(worker.Wrong, match="bytes under a checksum have changed"):
        worker.Checker([other]).check(tmp_path, "m.safetensors", repaired=False)


def test_a_case_number_is_reproducible(seeds):
    tried = [mutated(random.Random("tf:7"), load_seeds(seeds / "tf")).files for _ in range(2)]
    assert tried[0] == tried[1]


# What a case allocates, and the megabytes that must show, within 2: the kernel counts pages in batches.
ALLOCATES = {
    "nothing": ("pass", 0),
    "100 MB": ("b'x' * (100 << 20)", 100),
    "100 MB, freed before, twice": ("b'x' * (100 << 20)", 100),
    "30 MB in small parts": ("[b'x' * 3000 + bytes([i % 256]) for i in range(10 << 10)]", 30),
    "30 MB in small parts, freed before, twice": ("[b'x' * 3000 + bytes([i % 256]) for i in range(10 << 10)]", 30),
}


@pytest.mark.parametrize("allocates", ALLOCATES)
def test_the_memory_of_a_case_shows(tmp_path, allocates):
    body, megabytes = ALLOCATES[allocates]
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import guard\n"
        "from pathlib import Path\n"
        "all_cases = guard.Guard()\n"
        "def action():\n"
        f"    {body}\n"
        "    return 'read'\n"
        f"for _ in range({3 if 'twice' in allocates else 1}):\n"
        "    print(guard.attempt(all_cases, Path.cwd(), action)[0], all_cases.grown)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    for line in run.stdout.splitlines():
        outcome, grown = line.split()
        assert outcome == "done"
        assert (megabytes - 2) << 20 <= int(grown) < (megabytes + 10) << 20


def test_the_memory_of_a_reader_shows_in_the_result(seeds, tmp_path, monkeypatch):
    """A worker whose reader allocates 100 MB in each case."""
    code = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(ROOT)!r}]; import worker\n"
        "real = worker.open_checkpoint\n"
        "def hungry(*args, **options):\n"
        "    b'x' * (100 << 20)\n"
        "    return real(*args, **options)\n"
        "worker.open_checkpoint = hungry; worker.main(*sys.argv[1:])"
    )
    (tmp_path / "hungry.py").write_text(code)
    monkeypatch.setattr("run.WORKER", tmp_path / "hungry.py")
    result = fuzz(seeds, tmp_path, "llmc", 0, 3, workers=1)
    assert not result.faults
    assert 98 << 20 <= result.grown < 120 << 20


# A reader that fails for one byte, and the minimizing of a case in which that byte and many others are changed.
ONE_BYTE = """
import random, sys
from pathlib import Path
sys.path[:0] = [{here!r}, {root!r}]
import minimize, seeds, worker
real = worker.open_checkpoint
def failing(path, **options):
    data = Path(path).read_bytes()
    if data[200:201] == b"7":
        raise ValueError("the byte is 7")
    return real(path, **options)
worker.open_checkpoint = failing
seed = seeds.load_seeds(Path({seeds!r}))[0]
data = bytearray(seed.files["gpt2.bin"])
for at in range(100, 400):
    data[at] = data[at] ^ 85
data[200] = ord("7")
case = worker.Case(seed, {{"gpt2.bin": bytes(data) + b"more"}}, False)
worker.keep(case, Path("llmc-1"))
Path("top").mkdir()
worker.settle()
print(minimize.minimize(Path("llmc-1").absolute(), "llmc", Path({seeds!r}), Path("top").absolute()))
"""


@pytest.mark.slow
def test_a_case_that_fails_is_made_smaller(seeds, tmp_path):
    program = ONE_BYTE.format(here=str(Path(__file__).parent), root=str(ROOT), seeds=str(seeds / "llmc"))
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "ValueError: the byte is 7" in run.stdout, run.stderr
    assert run.stdout.endswith("gpt2.bin: 201 bytes\n1\n")
    smallest = (tmp_path / "llmc-1/smallest/files/gpt2.bin").read_bytes()
    sound = (seeds / "llmc/llmc-gpt2.bin/gpt2.bin").read_bytes()
    assert smallest == sound[:200] + b"7"


@pytest.mark.slow
def test_coverage_adds_cases_to_the_corpus(seeds, tmp_path):
    pytest.importorskip("atheris")
    (tmp_path / "corpus").mkdir()
    result = fuzz_guided(seeds, tmp_path, "llmc", tmp_path / "corpus", seconds=20)
    assert not result.faults, "\n\n".join(map(str, result.faults))
    assert result.outcomes.total() > 2
    assert len(list((tmp_path / "corpus").iterdir())) > len(load_seeds(seeds / "llmc"))


# ----------------------------------------------------------------------------------------------------------- Hypothesis


@pytest.mark.slow
def test_hypothesis_runs_cases_without_a_failure(seeds, tmp_path):
    program = Path(__file__).with_name("shrink.py")
    command = [sys.executable, str(program), "--examples", "40", "msgpack", "llmc"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout == "msgpack: 40 examples, no failure\nllmc: 40 examples, no failure\n", run.stderr


@pytest.mark.slow
def test_hypothesis_shrinks_a_failing_case(tmp_path):
    """A reader that fails for every invalid llm.c file. The minimal case is an empty file."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import worker, shrink\n"
        "def refused(error): raise ValueError('tripped')\n"
        "worker._refused = refused; sys.argv[1:] = ['llmc']; shrink.main()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1
    assert "llmc: fault" in run.stderr or "llmc: ValueError: tripped" in run.stderr
    assert "reproduce_failure" in run.stderr
