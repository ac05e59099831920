"""Repeat a case that failed, and make it smaller, as long as it fails in the same place.

    python tests/fuzz/minimize.py FOLDER

Writes FOLDER/smallest, with the same files as FOLDER. ``run.py`` does this for each fault that it finds.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[2]))

from guard import Guard
from mutate import Case
from seeds import load_seeds, make_seeds
from worker import Checker, in_memory, keep, kept_case, prepare, run, settle

SECONDS = 20


def signature(words: str) -> str:
    """Return what cases with the same fault have in common: the kind of error, and the lines of code."""
    lines = words.splitlines()
    return "\n".join([lines[0].split(":")[0], *(line for line in lines if line.startswith("  File "))])


class Minimizer:
    """Repeats cases of one format."""

    def __init__(self, top: Path, checker: Checker) -> None:
        self.top, self.checker = top, checker
        self.guard = Guard(("hdf5_listing.py",))

    def fault(self, case: Case) -> str:
        """Run a case. Return its fault, or an empty string."""
        folder = self.top / "case"
        outcome, words = run(self.guard, folder, case, self.checker)
        shutil.rmtree(folder)
        return words if outcome == "fault" else ""

    def smallest(self, case: Case, fault: str, seconds: float = SECONDS) -> Case:
        """Return the smallest case that was found in some seconds, with the same fault."""
        end = time.monotonic() + seconds
        while True:
            simple = self._simpler(case, fault, end)
            if simple is None:
                return case
            case = simple

    def _simpler(self, case: Case, fault: str, end: float) -> Case | None:
        for each in simpler(case):
            if time.monotonic() > end:
                return None
            if self._same(each, fault):
                return each
        return None

    def _same(self, case: Case, fault: str) -> bool:
        return signature(self.fault(case) or "none") == signature(fault)


def simpler(case: Case) -> Iterator[Case]:
    """Yield cases that are simpler: with a file as in the seed, with bytes as in the seed, or without some bytes."""
    for name in case.seed.changed:
        data, sound = case.files[name], case.seed.files[name]
        if data == sound:
            continue
        for smaller in (sound, *_simpler_bytes(data, sound)):
            yield replace(case, files={**case.files, name: smaller})


def _simpler_bytes(data: bytes, sound: bytes) -> Iterator[bytes]:
    size = len(data)
    while size:
        for at in range(0, len(data), size):
            end = min(at + size, len(data))
            restored = data[:at] + sound[at:end] + data[end:]
            if restored != data and len(restored) == len(data):
                yield restored
        size //= 2
    size = len(data)
    while size:
        for at in range(0, len(data), size):
            yield data[:at] + data[at + size :]
        size //= 2


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="folder of the case")
    options.add_argument("--seeds", type=Path, help="folder of its format's seeds (default: make them)")
    given = options.parse_args()
    settle()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=in_memory()) as top:
        name = given.folder.absolute().name.rpartition("-")[0]
        if given.seeds is None:
            make_seeds(Path(top, "seeds"))
        return minimize(given.folder, name, given.seeds or Path(top, "seeds", name), Path(top))


def minimize(folder: Path, name: str, seeds_folder: Path, top: Path) -> int:
    seeds = load_seeds(seeds_folder)
    case = kept_case(folder, seeds)
    minimizer = Minimizer(top, prepare(name, seeds, top))
    fault = minimizer.fault(case)
    if not fault:
        print("repeated: no fault")
        return 0
    print(fault)
    smallest = minimizer.smallest(case, fault)
    shutil.rmtree(folder / "smallest", ignore_errors=True)
    keep(smallest, folder / "smallest")
    changed = [f"{name}: {len(data)} bytes" for name, data in smallest.files.items() if data != case.seed.files[name]]
    print(f"smallest case: {folder / 'smallest'}, changed from the seed {case.seed.name!r}:", *changed, sep="\n  ")
    return 1


if __name__ == "__main__":
    sys.exit(main())
