"""Run cases in one process, and print a line of JSON for each.

python tests/fuzz/worker.py SEEDS KEPT FORMAT FIRST COUNT STEP
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[2]))

from guard import Guard, attempt
from mutate import mutated
from seeds import Seed, load_seeds

from converters import Checkpoint, ConversionError, FormatError, open_checkpoint, save_checkpoint
from converters.tokenizer import build

CHECKSUMMED = ("tf", "zip")
# Imported before monitoring starts, so that an import during a case is caused by the file.
CONTAINERS = (
    "onnx",
    "gguf",
    "gguf_quants",
    "hdf5",
    "keras_shards",
    "msgpack",
    "llmc",
    "npz",
    "torch_zip",
    "torch_legacy",
)
NEEDED = [*(f"converters.containers.{name}" for name in CONTAINERS), "converters.arrays", "converters.lora_arrays"]
CODECS = ["encodings.cp437", "encodings.raw_unicode_escape", "encodings.unicode_escape", "encodings.ascii", "encodings.utf_16", "tokenizers", "stringprep"]  # fmt: skip


class Wrong(Exception):
    """A wrong result."""


def check(folder: Path, target: str, known: list[dict[str, bytes]] | None = None) -> str:
    """Read a file and convert it. The result must be complete, equal when it is read again, and one of ``known``.

    Raises:
        Wrong: if it is not. Errors other than ConversionError are propagated.
    """
    try:
        checkpoint = open_checkpoint(folder / target, n_head=2)
        contents = bytes_of(checkpoint)
        words = _tokenizer(checkpoint)
        save_checkpoint(checkpoint, folder / "result.safetensors")
    except ConversionError as error:
        return _refused(error)
    try:
        again = open_checkpoint(folder / "result.safetensors")
    except ConversionError as error:
        raise Wrong(f"the written result is refused: {error}") from error
    if bytes_of(again) != contents or (differences := again.config.differences(checkpoint.config)):
        raise Wrong(f"the result is another model: {differences if bytes_of(again) == contents else 'other bytes'}")
    if known is not None and contents not in known:
        raise Wrong("bytes under a checksum have changed, without an error")
    return f"read{words}"


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


def case(rng: random.Random, seeds: list[Seed], folder: Path, known: list[dict[str, bytes]] | None):
    """Write the files of one case. Return the action to run on them."""
    seed, files, repaired = mutated(rng, seeds)
    write(folder, files)
    expected = {*files, "result.safetensors"}

    def action() -> str:
        words = check(folder, seed.target, None if repaired else known)
        strange = [
            p.name for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in expected
        ]
        if strange:
            raise Wrong(f"left {strange[0]} behind")
        return words

    return action


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def warm_up(seeds: list[Seed], top: Path) -> list[dict[str, bytes]]:
    """Read every unchanged seed, which imports all modules. Return the weights of the valid seeds."""
    for name in NEEDED + CODECS:
        importlib.import_module(name)
    known = []
    for seed in seeds:
        folder = top / seed.name
        write(folder, seed.files)
        outcome = check(folder, seed.target)
        if outcome.startswith("read") != seed.sound:
            raise Wrong(f"{seed.name}, unchanged: {outcome}")
        if seed.sound:
            known.append(bytes_of(open_checkpoint(folder / seed.target, n_head=2)))
    with tempfile.NamedTemporaryFile(suffix=".bin", dir=top) as empty, contextlib.suppress(FormatError):
        open_checkpoint(empty.name)
    return known


def main(seeds_folder: str, kept: str, name: str, first: str, count: str, step: str) -> None:
    warnings.simplefilter("error")
    os.fsync = lambda fd: None  # fsync would take most of the time, and is not needed here
    seeds = load_seeds(Path(seeds_folder) / name)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as top:
        known = warm_up(seeds, Path(top))
        guard = Guard(("hdf5_listing.py",))
        for number in range(int(first), int(first) + int(count), int(step)):
            folder = Path(tempfile.mkdtemp(prefix=f"{number}-", dir=top))
            action = case(random.Random(f"{name}:{number}"), seeds, folder, known if name in CHECKSUMMED else None)
            _announce({"begun": number, "folder": str(folder)})
            outcome, words = attempt(guard, folder, action)
            if outcome == "fault":
                shutil.copytree(folder, Path(kept) / f"{name}-{number}", dirs_exist_ok=True)
            _announce({"case": number, "outcome": outcome, "words": words, "grown": guard.grown})
            shutil.rmtree(folder)


def _announce(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
