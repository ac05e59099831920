"""Run cases drawn by Hypothesis. It shrinks a failing case to a minimal one, and runs it first the next time.

python tests/fuzz/shrink.py --examples 500 gguf onnx
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[2]))

from guard import Guard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutate import mutated
from seeds import MAKERS, load_seeds, make_seeds
from worker import in_memory, prepare, run, settle


def shrink(name: str, examples: int, seeds_folder: Path, guard: Guard) -> None:
    """Run some cases of one format.

    Raises:
        AssertionError: for the minimal failing case, with the blob that reproduces it.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=in_memory()) as top:
        seeds = load_seeds(seeds_folder / name)
        checker = prepare(name, seeds, Path(top))

        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
        @given(st.randoms(use_true_random=False))
        def every_case_is_read_or_refused(rng: random.Random) -> None:
            folder = Path(top, "case")
            with contextlib.chdir(top):  # the guard changes the working directory
                outcome, words = run(guard, folder, mutated(rng, seeds), checker)
            shutil.rmtree(folder)
            assert outcome != "fault", f"{name}: {words}"

        every_case_is_read_or_refused()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", default=list(MAKERS), help="default: all")
    parser.add_argument("--examples", type=int, default=300, help="cases of each format (default: 300)")
    arguments = parser.parse_args()
    settle()
    with tempfile.TemporaryDirectory(prefix="seeds-") as folder:
        make_seeds(Path(folder))
        guard = Guard(("hdf5_listing.py",))
        for name in arguments.formats:
            shrink(name, arguments.examples, Path(folder), guard)
            print(f"{name}: {arguments.examples} examples, no failure")


if __name__ == "__main__":
    main()
