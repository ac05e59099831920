"""Fuzz every reader for a given time, or repeat one case.

    python tests/fuzz/run.py --minutes 10
    python tests/fuzz/run.py --case tf:123

A case number is reproducible: the same number makes the same file, as long as seeds and mutations do not change. The files of a
failing case are kept.
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
SILENCE = 100  # seconds without output after which a worker is killed
ROUND = dict.fromkeys(MAKERS, 200) | {"hdf5": 20}  # cases of one format per round of a long run
WORKERS = 2


@dataclass
class Result:
    """The result of many cases: a count of each outcome, and descriptions of the faults."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    grown: int = 0  # maximum memory of a case, in bytes

    def add(self, other: Result) -> None:
        self.outcomes += other.outcomes
        self.faults += other.faults
        self.grown = max(self.grown, other.grown)


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
        result.faults.append(f"{name}:{begun['begun']}: {fault}")
        shutil.copytree(begun["folder"], kept / f"{name}-{begun['begun']}", dirs_exist_ok=True)
        first = begun["begun"] + step
    return result


def _listen(command: list[str], name: str, result: Result) -> tuple[dict[str, Any], str]:
    """Return the last case that a worker started, and an error if the worker did not finish."""
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
    result.grown = max(result.grown, said["grown"])
    if said["outcome"] == "done":
        result.outcomes[said["words"]] += 1
    else:
        result.outcomes["fault"] += 1
        result.faults.append(f"{name}:{said['case']}: {said['words']}")


# --------------------------------------------------------------------------------------------------------- command line


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=10, help="duration (default: 10)")
    options.add_argument("--seed", type=int, help="start at case SEED * 1,000,000 (default: random)")
    options.add_argument("--format", choices=MAKERS, action="append", help="fuzz only this format (repeatable)")
    options.add_argument("--case", metavar="FORMAT:NUMBER", help="repeat one case and print its result")
    options.add_argument(
        "--kept",
        type=Path,
        default=Path(tempfile.gettempdir(), "gpt2x-fuzz"),
        help="folder for the files of failing cases",
    )
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-seeds-") as folder:
        make_seeds(Path(folder))
        if given.case:
            name, number = given.case.split(":")
            return _report({name: fuzz(Path(folder), given.kept, name, int(number), 1)}, given.kept)
        seed = random.randrange(1, 10**6) if given.seed is None else given.seed
        print(f"seed {seed}: cases from {seed}000000", flush=True)
        return _report(_long(Path(folder), given.kept, given.format or list(MAKERS), seed, given.minutes), given.kept)


def _long(seeds: Path, kept: Path, names: list[str], seed: int, minutes: float) -> dict[str, Result]:
    """Fuzz the formats in turn, until the time is over."""
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
                print(
                    fault,
                    f"  to repeat: python tests/fuzz/run.py --case {fault.split(': ')[0]}\n",
                    sep="\n",
                    flush=True,
                )


def _report(results: dict[str, Result], kept: Path) -> int:
    for name, result in results.items():
        said = ", ".join(f"{count} {words}" for words, count in result.outcomes.most_common())
        print(f"{name:12} {sum(result.outcomes.values()):7} cases, {result.grown >> 20} MB maximum: {said}")
    faults = [fault for result in results.values() for fault in result.faults]
    if faults:
        print(f"{len(faults)} faults; the files are in {kept}. The first:", faults[0], sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
