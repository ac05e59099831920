"""Run cases in one process, and print a line of JSON for each.

python tests/fuzz/worker.py SEEDS KEPT FORMAT FIRST COUNT STEP
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import pkgutil
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(1, str(Path(__file__).parents[2]))

from guard import Guard, attempt
from mutate import Case, mutated
from seeds import Seed, load_seeds
from warm_hdf5 import WarmListing

from converters import Checkpoint, ConversionError, FormatError, containers, open_checkpoint, save_checkpoint
from converters.tokenizer import build

CHECKSUMMED = ("tf", "zip")
FILES, META = "files", "case.json"  # in the folder of a case: its files, and what else is needed to repeat it
RESULT = "result.safetensors"
# Imported before monitoring starts, so that an import during a case is caused by the file.
NEEDED = [f"converters.containers.{module.name}" for module in pkgutil.iter_modules(containers.__path__)]
NEEDED += ["converters.arrays", "converters.lora_arrays"]
CODECS = ["encodings.cp437", "encodings.raw_unicode_escape", "encodings.unicode_escape", "encodings.ascii", "encodings.utf_16", "tokenizers", "stringprep"]  # fmt: skip

LISTING = WarmListing()


class Wrong(Exception):
    """A wrong result."""


@dataclass
class Checker:
    """Reads a file and converts it. The result must be complete, and equal when it is read again.

    Args:
        known: the weights that a file whose checksums were not repaired may have; None if the format has no checksums.
        converted: digests of the models whose conversion was checked. It takes longer than reading, and each is checked once.
    """

    known: list[dict[str, bytes]] | None = None
    converted: set[bytes] = field(default_factory=set)

    def check(self, folder: Path, target: str, repaired: bool = True) -> str:
        """Return what became of the file: it was read, or why it was refused.

        Raises:
            Wrong: if the result is wrong. Errors other than ConversionError are propagated.
        """
        try:
            checkpoint = open_checkpoint(folder / target, n_head=2)
            contents = bytes_of(checkpoint)
            words = _tokenizer(checkpoint)
            digest = _digest(checkpoint, contents)
            if digest not in self.converted:
                save_checkpoint(checkpoint, folder / RESULT)
        except ConversionError as error:
            return _refused(error)
        if digest not in self.converted:
            _compare(checkpoint, contents, folder / RESULT)
            self.converted.add(digest)
        if self.known is not None and not repaired and contents not in self.known:
            raise Wrong("bytes under a checksum have changed, without an error")
        return f"read{words}"


def _digest(checkpoint: Checkpoint, contents: dict[str, bytes]) -> bytes:
    """Return what identifies the model, and all else that is written with it."""
    whole = hashlib.sha256(repr(checkpoint.config).encode())
    for name, data in contents.items():
        tensor = checkpoint.tensors[name]
        whole.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + data)
    return whole.digest()


def _compare(checkpoint: Checkpoint, contents: dict[str, bytes], result: Path) -> None:
    try:
        again = open_checkpoint(result)
    except ConversionError as error:
        raise Wrong(f"the written result is refused: {error}") from error
    if bytes_of(again) != contents:
        raise Wrong("the result is another model: other bytes")
    if differences := again.config.differences(checkpoint.config):
        raise Wrong(f"the result is another model: {differences}")


def bytes_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the streamed bytes of every tensor. Check their number against the shape."""
    contents = {name: b"".join(tensor.chunks()) for name, tensor in checkpoint.tensors.items()}
    for name, tensor in checkpoint.tensors.items():
        if len(contents[name]) != tensor.nbytes:
            raise Wrong(f"{name}: {len(contents[name])} bytes of {tensor.nbytes}")
    return contents


def _tokenizer(checkpoint: Checkpoint) -> str:
    """Read the tokenizer, if there is one. It may be refused even if the weights are not."""
    if checkpoint.tokenizer is None:
        return ""
    try:
        build(checkpoint.tokenizer.vocabulary())
    except ConversionError as error:
        return f", tokenizer {_refused(error)}"
    return ", tokenizer too"


def _refused(error: ConversionError) -> str:
    assert str(error)
    return f"refused: {type(error).__name__}"


# -------------------------------------------------------------------------------------------------------- running cases


def run(guard: Guard, folder: Path, case: Case, checker: Checker) -> tuple[str, str]:
    """Write a case to a new folder, and read it under the guard. Return ("done", its result) or ("fault", a description)."""
    keep(case, folder)

    inside = folder / FILES
    outcome, words = attempt(guard, inside, lambda: checker.check(inside, case.seed.target, case.repaired))
    strange = files_in(inside) - case.files.keys() - {RESULT}
    if outcome == "done" and strange:
        return "fault", f"left {min(strange)} behind"
    return outcome, words


def keep(case: Case, folder: Path) -> None:
    """Write the files of a case to a new folder, with what is needed to repeat it."""
    write(folder / FILES, case.files)
    meta = {"seed": case.seed.name, "repaired": case.repaired}
    (folder / META).write_text(json.dumps(meta))


def kept_case(folder: Path, seeds: list[Seed]) -> Case:
    """Return the case that ``keep`` wrote."""
    meta = json.loads((folder / META).read_bytes())
    seed = next(seed for seed in seeds if seed.name == meta["seed"])
    files = {name: (folder / FILES / name).read_bytes() for name in seed.files}
    return Case(seed, files, meta["repaired"])


def files_in(folder: Path) -> set[str]:
    """Return the paths of all files in a folder, relative to it."""
    found = set()
    for place, _, names in os.walk(folder):
        found |= {os.path.relpath(os.path.join(place, name), folder) for name in names}
    return found


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, data in files.items():
        if "/" in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def prepare(name: str, seeds: list[Seed], top: Path) -> Checker:
    """Read every unchanged seed, which imports all modules. Return the checker for cases of this format."""
    if name == "hdf5_listing":
        answer_with_listing()
    if name == "hdf5":
        list_in_a_warm_process()
    for module in NEEDED + CODECS:
        importlib.import_module(module)
    known = []
    for seed in seeds:
        folder = top / seed.name
        write(folder, seed.files)
        outcome = Checker().check(folder, seed.target)
        if outcome.startswith("read") != seed.sound:
            raise Wrong(f"{seed.name}, unchanged: {outcome}")
        if seed.sound:
            known.append(bytes_of(open_checkpoint(folder / seed.target, n_head=2)))
    with tempfile.NamedTemporaryFile(suffix=".bin", dir=top) as empty, contextlib.suppress(FormatError):
        open_checkpoint(empty.name)
    return Checker(known if name in CHECKSUMMED else None)


def answer_with_listing() -> None:
    """Let the HDF5 reader take its listing from a file beside the weights, instead of from h5py in a process of its own."""
    from converters.containers import hdf5

    def answer(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        listing = Path(command[5]).with_name("listing.json").read_bytes()
        return subprocess.CompletedProcess(command, 0, listing, b"")

    hdf5.subprocess = SimpleNamespace(run=answer, DEVNULL=None, TimeoutExpired=subprocess.TimeoutExpired)  # type: ignore[assignment, attr-defined]


def list_in_a_warm_process() -> None:
    """Let the HDF5 reader start no Python for each file: a process that has imported h5py lists many."""
    from converters.containers import hdf5

    hdf5.subprocess = SimpleNamespace(  # type: ignore[assignment, attr-defined]
        run=LISTING.run, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )


def main(seeds_folder: str, kept: str, name: str, first: str, count: str, step: str) -> None:
    settle()
    seeds = load_seeds(Path(seeds_folder) / name)
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=in_memory()) as top:
        checker = prepare(name, seeds, Path(top))
        guard = Guard(("hdf5_listing.py",))
        for number in range(int(first), int(first) + int(count), int(step)):
            folder = Path(top, f"case-{number}")
            _announce({"begun": number, "folder": str(folder)})
            case = mutated(random.Random(f"{name}:{number}"), seeds)
            before = cpu_time()
            outcome, words = run(guard, folder, case, checker)
            cpu = cpu_time() - before
            if outcome == "fault":
                to = Path(kept) / f"{name}-{number}"
                shutil.copytree(folder, to, dirs_exist_ok=True)
                _announce({"fault": words, "kept": str(to)})
            words = words if outcome == "done" else outcome
            _announce({"outcomes": {words: 1}, "grown": guard.grown, "cpu": cpu})
            shutil.rmtree(folder)


def cpu_time() -> float:
    """Return the time of the processor that this process and those that list HDF5 files took, in seconds."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + LISTING.cpu


def settle() -> None:
    """Prepare a process for cases: warnings are errors, and nothing waits for the disk."""
    warnings.simplefilter("error")
    os.fsync = lambda fd: None


def in_memory() -> str | None:
    """Return a folder that is not on a disk, if there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _announce(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
