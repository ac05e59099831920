"""Fuzz every reader for a given time, guided by coverage where Atheris is installed.

    python tests/fuzz/run.py --minutes 10

A case that fails is kept in a folder, and made smaller. To repeat it: python tests/fuzz/minimize.py FOLDER
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[2]))

from minimize import signature
from seeds import MAKERS, make_seeds

WORKER = Path(__file__).with_name("worker.py")
GUIDED = Path(__file__).with_name("guided.py")
MINIMIZE = Path(__file__).with_name("minimize.py")
SILENCE = 100  # seconds without output after which a worker is killed
ROUND = 2000  # cases of one worker in a long run that is not guided
LONGEST = 600  # seconds that a guided worker runs
SHORTEST = 5
WORKERS = 2


@dataclass(frozen=True)
class Fault:
    """A case that failed: its format, the folder that keeps it, and what happened."""

    name: str
    folder: Path
    words: str

    def __str__(self) -> str:
        return f"{self.name}: {self.words}\nkept in {self.folder}"


@dataclass
class Result:
    """The result of many cases: a count of each outcome, and the faults."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    grown: int = 0  # maximum memory of a case, in bytes
    cpu: float = 0  # seconds of the processor

    def add(self, other: Result) -> None:
        self.outcomes += other.outcomes
        self.faults += other.faults
        self.grown = max(self.grown, other.grown)
        self.cpu += other.cpu


def fuzz(seeds: Path, kept: Path, name: str, first: int, count: int, workers: int = WORKERS) -> Result:
    """Run the cases ``first`` to ``first + count`` of one format, in several processes."""
    result = Result()
    with ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(_work, seeds, kept, name, first + i, count - i, workers) for i in range(min(workers, count))
        ]
        for job in jobs:
            result.add(job.result())
    return result


def _work(seeds: Path, kept: Path, name: str, first: int, count: int, step: int) -> Result:
    """Run one worker. If it dies or hangs on a case, record a fault and start another worker after that case."""
    result, end = Result(), first + count
    while first < end:
        command = [sys.executable, str(WORKER), *map(str, (seeds, kept, name, first, end - first, step))]
        begun, fault = _listen(command, name, result)
        if not fault:
            break
        if not begun:
            raise RuntimeError(f"the worker for {name} does not start: {fault}")
        folder = kept / f"{name}-{begun['begun']}"
        result.faults.append(Fault(name, folder, fault))
        shutil.copytree(begun["folder"], folder, dirs_exist_ok=True)
        first = begun["begun"] + step
    return result


def fuzz_guided(seeds: Path, kept: Path, name: str, corpus: Path, seconds: float) -> Result:
    """Run cases of one format for some time, in one process that is guided by coverage."""
    result, end = Result(), time.monotonic() + seconds
    while (left := end - time.monotonic()) > 1:
        command = [
            sys.executable,
            str(GUIDED),
            *map(str, (seeds, kept, name, corpus, int(left), random.getrandbits(30))),
        ]
        begun, fault = _listen(command, name, result)
        if not begun:
            raise RuntimeError(f"the worker for {name} does not start: {fault}")
        case = Path(begun["folder"], "case")
        if fault and case.exists():
            folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=kept))
            shutil.copytree(case, folder, dirs_exist_ok=True)
            result.faults.append(Fault(name, folder, fault))
        elif fault:
            raise RuntimeError(f"the worker for {name} failed between two cases: {fault}")
        shutil.rmtree(begun["folder"])
    return result


def _listen(command: list[str], name: str, result: Result) -> tuple[dict[str, Any], str]:
    """Return the last case that a worker started, and an error if the worker did not finish."""
    begun: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as errors:
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        for line in _lines(worker):
            said = json.loads(line)
            if "folder" in said:
                begun = said
            else:
                _count(said, name, result)
        errors.seek(0)
        return begun, f"the worker ended with {worker.returncode}: {errors.read()[-2000:]}" if worker.returncode else ""


def _lines(worker: subprocess.Popen[str]) -> Iterator[str]:
    """Yield the output lines of a worker. Kill it if it prints nothing for SILENCE seconds."""
    heard = [time.monotonic()]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1):
            if time.monotonic() - heard[0] > SILENCE:
                worker.kill()

    threading.Thread(target=watch, daemon=True).start()
    with worker:
        for line in worker.stdout or ():
            heard[0] = time.monotonic()
            yield line
    done.set()


def _count(said: dict[str, Any], name: str, result: Result) -> None:
    if "fault" in said:
        result.faults.append(Fault(name, Path(said["kept"]), said["fault"]))
    else:
        result.outcomes += Counter(said["outcomes"])
        result.grown = max(result.grown, said["grown"])
        result.cpu += said["cpu"]


# --------------------------------------------------------------------------------------------------------- command line


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=10, help="duration (default: 10)")
    options.add_argument("--format", choices=MAKERS, action="append", help="fuzz only this format (repeatable)")
    options.add_argument("--random", action="store_true", help="mutate the seeds only, without a guide")
    options.add_argument(
        "--kept",
        type=Path,
        default=Path(tempfile.gettempdir(), "gpt2x-fuzz"),
        help="folder for the files of failing cases, and for the corpus, which later runs continue",
    )
    given = options.parse_args()
    guided = not given.random and importlib.util.find_spec("atheris") is not None
    print("guided by coverage" if guided else "not guided by coverage, which needs Atheris", flush=True)
    names = given.format or list(MAKERS)
    with tempfile.TemporaryDirectory(prefix="fuzz-seeds-") as folder:
        make_seeds(Path(folder))
        run = _guided(Path(folder), given.kept) if guided else _random(Path(folder), given.kept)
        results = _long(run, Path(folder), names, 60 * given.minutes)
        return _report(results, given.kept)


def _guided(seeds: Path, kept: Path) -> Callable[[str, float], Result]:
    def run(name: str, seconds: float) -> Result:
        corpus = kept / "corpus" / name
        corpus.mkdir(parents=True, exist_ok=True)
        return fuzz_guided(seeds, kept, name, corpus, seconds)

    return run


def _random(seeds: Path, kept: Path) -> Callable[[str, float], Result]:
    numbers = itertools.count(random.randrange(10**9), ROUND)

    def run(name: str, seconds: float) -> Result:
        result, end = Result(), time.monotonic() + seconds
        while time.monotonic() < end:
            result.add(fuzz(seeds, kept, name, next(numbers), ROUND, workers=1))
        return result

    return run


def _long(run: Callable[[str, float], Result], seeds: Path, names: list[str], seconds: float) -> dict[str, Result]:
    """Fuzz the formats in turn, until the time is over: two at a time, or two workers for one format."""
    results = {name: Result() for name in names}
    end = time.monotonic() + seconds
    rounds = math.ceil(WORKERS * seconds / LONGEST / len(names))
    turns = random.sample(names, len(names)) * max(rounds, WORKERS if len(names) == 1 else 1)

    def work() -> None:
        while turns:
            # Every turn that is left gets the same time, however long those before took.
            left = WORKERS * (end - time.monotonic()) / len(turns)
            name = turns.pop()
            found = run(name, max(SHORTEST, min(left, end - time.monotonic())))
            results[name].add(found)
            for fault in first_of_each(found.faults):
                print(fault, minimized(fault.folder, seeds / name), sep="\n", flush=True)

    with ThreadPoolExecutor(WORKERS) as pool:
        for job in [pool.submit(work) for _ in range(WORKERS)]:
            job.result()
    return results


def first_of_each(faults: list[Fault]) -> list[Fault]:
    """Return one case of each fault."""
    return list({signature(fault.words): fault for fault in reversed(faults)}.values())


def minimized(folder: Path, seeds: Path) -> str:
    """Make a case smaller. Return what became of it."""
    command = [sys.executable, str(MINIMIZE), "--seeds", str(seeds), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _report(results: dict[str, Result], kept: Path) -> int:
    for name, result in results.items():
        said = ", ".join(f"{count} {words}" for words, count in result.outcomes.most_common())
        cases = result.outcomes.total()
        rate = f"{1000 * result.cpu / max(1, cases):.1f} ms of CPU each, {result.grown / 2**20:.1f} MB maximum"
        print(f"{name:12} {cases:7} cases, {rate}: {said}")
    faults = [fault for result in results.values() for fault in result.faults]
    if faults:
        print(f"{len(faults)} faults; the files are in {kept}. The first:", faults[0], sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
