"""Run cases in one process, guided by coverage: a case that reaches new code is kept, and mutated again.

    python tests/fuzz/guided.py SEEDS KEPT FORMAT CORPUS SECONDS SEED

Needs Atheris, which counts the branches that a case takes in ``converters``, and chooses the next case to mutate. Prints a line
of JSON each second, and one for each fault.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, deque
from pathlib import Path

import atheris

sys.path.insert(1, str(Path(__file__).parents[2]))

# The cases of these do not change the weights. What finds names in them is not instrumented, which would take a third of the time.
SAME_WEIGHTS = ("config", "tokenizer")
OF_NAMES = ["converters.dialects", "converters.opening.recognise_dialect"]
excluded = OF_NAMES if set(SAME_WEIGHTS) & set(sys.argv[1:]) else []

# Instruments the package while the other modules of the fuzzer import it.
with atheris.instrument_imports(include=["converters"], exclude=excluded):
    from guard import Guard
    from minimize import signature
    from mutate import Case, mutated_again
    from seeds import Seed, load_seeds
    from worker import Checker, cpu_time, in_memory, prepare, run, settle

RECENT = 40  # cases from which parts are taken
SAME = 3  # cases with one fault that are kept
GROWTH = 3  # how much larger than the largest seed a case may become


class Fuzzer:
    """The functions that Atheris calls: one mutates a case, the other runs it.

    Atheris knows a case as bytes: a line of JSON, then the files that may be mutated. The others are those of the seed.
    """

    def __init__(self, seeds: list[Seed], kept: Path, name: str, top: Path, checker: Checker) -> None:
        self.seeds = {seed.name: seed for seed in seeds}
        self.kept, self.name, self.top, self.checker = kept, name, top, checker
        self.guard = Guard(("hdf5_listing.py",))
        self.recent: deque[bytes] = deque(
            (seed.files[file] for seed in seeds for file in seed.changed), maxlen=RECENT + 4 * len(seeds)
        )
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.grown = 0
        self.told, self.cpu = time.monotonic(), cpu_time()

    def mutate(self, data: bytes, max_size: int, seed: int) -> bytes:
        """Return a mutation of a case."""
        rng = random.Random(seed)
        case = self.unpack(data) or self.unmodified(rng.choice(list(self.seeds.values())))
        if rng.random() < 0.25:
            case = self.mutated_by_library(rng, case)
        else:
            case = mutated_again(rng, case, list(self.recent))
        self.recent.append(case.files[rng.choice(case.seed.changed)])
        packed = pack(case)
        return packed if len(packed) <= max_size else data

    def mutated_by_library(self, rng: random.Random, case: Case) -> Case:
        """Return the case with a mutation of Atheris, which inserts values that the code compared with."""
        name = rng.choice(case.seed.changed)
        data = case.files[name]
        return Case(case.seed, {**case.files, name: atheris.Mutate(data, len(data) + 64)}, case.repaired)

    def run(self, data: bytes) -> None:
        """Run a case. Each second, report what happened since the last report."""
        if case := self.unpack(data):
            folder = self.top / "case"
            outcome, words = run(self.guard, folder, case, self.checker)
            self.grown = max(self.grown, self.guard.grown)
            if outcome == "fault":
                self.keep(folder, words)
            self.outcomes[words if outcome == "done" else outcome] += 1
            shutil.rmtree(folder)
        if time.monotonic() > self.told + 1:
            self.report()

    def keep(self, folder: Path, words: str) -> None:
        """Keep the files of a case that failed, unless several with the same fault are kept."""
        fault = signature(words)
        self.faults[fault] += 1
        if self.faults[fault] <= SAME:
            to = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=self.kept))
            shutil.copytree(folder, to, dirs_exist_ok=True)
            announce({"fault": words, "kept": str(to)})

    def report(self) -> None:
        cpu = cpu_time()
        announce({"outcomes": self.outcomes, "grown": self.grown, "cpu": cpu - self.cpu})
        self.outcomes, self.cpu = Counter(), cpu
        self.told = time.monotonic()

    def unmodified(self, seed: Seed) -> Case:
        return Case(seed, seed.files, False)

    def unpack(self, data: bytes) -> Case | None:
        """Return the case that ``pack`` packed; None for anything else, such as the empty bytes that Atheris starts with."""
        line, newline, contents = data.partition(b"\n")
        try:
            meta = json.loads(line) if newline else {}
        except ValueError:
            return None
        seed = self.seeds.get(meta.get("seed"))
        if seed is None or meta["files"].keys() != set(seed.changed):
            return None  # of a corpus that was made with other seeds
        files = dict(seed.files)
        at = 0
        for name, size in meta["files"].items():
            files[name] = contents[at : at + size]
            at += size
        return Case(seed, files, meta["repaired"])


def pack(case: Case) -> bytes:
    """Return a case as bytes."""
    contents = [case.files[name] for name in case.seed.changed]
    sizes = dict(zip(case.seed.changed, map(len, contents), strict=True))
    meta = {"seed": case.seed.name, "files": sizes, "repaired": case.repaired}
    return json.dumps(meta).encode() + b"\n" + b"".join(contents)


def announce(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


def main(seeds_folder: str, kept: str, name: str, corpus: str, seconds: str, seed: str) -> None:
    settle()
    seeds = load_seeds(Path(seeds_folder) / name)
    top = tempfile.mkdtemp(prefix="fuzz-", dir=in_memory())
    announce({"folder": top})
    fuzzer = Fuzzer(seeds, Path(kept), name, Path(top), prepare(name, seeds, Path(top)))
    unmodified = [pack(fuzzer.unmodified(each)) for each in seeds]
    for number, packed in enumerate(unmodified):
        Path(corpus, f"seed-{number}").write_bytes(packed)
    limits = {"max_total_time": seconds, "max_len": GROWTH * max(map(len, unmodified)), "seed": seed}
    # The guard limits time and memory.
    limits |= {"timeout": 0, "rss_limit_mb": 0, "malloc_limit_mb": 0, "verbosity": 0, "artifact_prefix": f"{top}/"}
    atheris.Setup(
        ["fuzz", *(f"-{key}={value}" for key, value in limits.items()), corpus],
        fuzzer.run,
        custom_mutator=fuzzer.mutate,
    )
    atheris.Fuzz()  # ends the process


if __name__ == "__main__":
    main(*sys.argv[1:])
