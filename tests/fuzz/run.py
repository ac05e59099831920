"""Fuzz every reader for as long as you like, or try one case again.

    python tests/fuzz/run.py --minutes 10
    python tests/fuzz/run.py --case tf:123

A number names a case for good: the same number makes the same file, as long as the seeds and the mutations are the
same. What fails is kept, with the file that did it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[2]))

from seeds import MAKERS, make_seeds

WORKER = Path(__file__).with_name("worker.py")
SILENCE = 100  # seconds of wall time in which a worker must say something
ROUND = dict.fromkeys(MAKERS, 200) | {"hdf5": 20}  # cases in a row, of a long run
WORKERS = 2


@dataclass
class Result:
    """What came of many cases: how often what, and the faults in words."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    grown: int = 0  # bytes of memory, at most

    def add(self, other: Result) -> None:
        self.outcomes += other.outcomes
        self.faults += other.faults
        self.grown = max(self.grown, other.grown)


def fuzz(seeds: Path, kept: Path, name: str, first: int, count: int, workers: int = WORKERS) -> Result:
    """Try the cases ``first`` to ``first + count`` of one format, in some processes at once."""
    result = Result()
    with ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(_work, seeds, kept, name, first + i, count - i, workers) for i in range(min(workers, count))
        ]
        for job in jobs:
            result.add(job.result())
    return result


def _work(seeds: Path, kept: Path, name: str, first: int, count: int, step: int) -> Result:
    """One worker, and another one after it where it dies or falls silent over a case."""
    result, end = Result(), first + count
    while first < end:
        command = [sys.executable, str(WORKER), *map(str, (seeds, kept, name, first, end - first, step))]
        begun, fault = _listen(command, name, result)
        if not fault:
            break
        if not begun:
            raise RuntimeError(f"the worker for {name} does not begin: {fault}")
        result.faults.append(f"{name}:{begun['begun']}: {fault}")
        shutil.copytree(begun["folder"], kept / f"{name}-{begun['begun']}", dirs_exist_ok=True)
        first = begun["begun"] + step
    return result


def _listen(command: list[str], name: str, result: Result) -> tuple[dict[str, Any], str]:
    """The last case that a worker began, and what became of the worker if it did not come to its end."""
    begun: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as errors:
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        for line in _lines(worker):
            said = json.loads(line)
            if "begun" in said:
                begun = said
            else:
                _count(said, name, result)
        errors.seek(0)
        return begun, f"the worker ended with {worker.returncode}: {errors.read()[-2000:]}" if worker.returncode else ""


def _lines(worker: subprocess.Popen[str]) -> Iterator[str]:
    """What a worker says, until it ends; one that is silent for long is killed."""
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
    result.grown = max(result.grown, said["grown"])
    if said["outcome"] == "done":
        result.outcomes[said["words"]] += 1
    else:
        result.outcomes["fault"] += 1
        result.faults.append(f"{name}:{said['case']}: {said['words']}")


# ----------------------------------------------------------------------------------------------- the command line


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=10, help="how long; default 10")
    options.add_argument("--seed", type=int, help="where to begin, a million cases apart; drawn at random by default")
    options.add_argument("--format", choices=MAKERS, action="append", help="this one alone; may be given again")
    options.add_argument("--case", metavar="FORMAT:NUMBER", help="try this one case again, and show what comes of it")
    options.add_argument(
        "--kept", type=Path, default=Path(tempfile.gettempdir(), "gpt2x-fuzz"), help="where to keep what fails"
    )
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-seeds-") as folder:
        make_seeds(Path(folder))
        if given.case:
            name, number = given.case.split(":")
            return _report({name: fuzz(Path(folder), given.kept, name, int(number), 1)}, given.kept)
        seed = random.randrange(1, 10**6) if given.seed is None else given.seed
        print(f"seed {seed}: cases {seed}000000 and after", flush=True)
        return _report(_long(Path(folder), given.kept, given.format or list(MAKERS), seed, given.minutes), given.kept)


def _long(seeds: Path, kept: Path, names: list[str], seed: int, minutes: float) -> dict[str, Result]:
    """Round after round over the formats, until the time is up."""
    results = {name: Result() for name in names}
    number, end = dict.fromkeys(names, seed * 10**6), time.monotonic() + 60 * minutes
    while True:
        for name in names:
            if time.monotonic() > end:
                return results
            found = fuzz(seeds, kept, name, number[name], ROUND[name])
            number[name] += ROUND[name]
            results[name].add(found)
            for fault in found.faults:
                print(fault, f"  again: python tests/fuzz/run.py --case {fault.split(': ')[0]}\n", sep="\n", flush=True)


def _report(results: dict[str, Result], kept: Path) -> int:
    for name, result in results.items():
        said = ", ".join(f"{count} {words}" for words, count in result.outcomes.most_common())
        print(f"{name:12} {sum(result.outcomes.values()):7} cases, {result.grown >> 20} MB at most: {said}")
    faults = [fault for result in results.values() for fault in result.faults]
    if faults:
        print(f"{len(faults)} faults; the files are in {kept}. The first:", faults[0], sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
