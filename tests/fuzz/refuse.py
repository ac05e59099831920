"""Open files under the guard, in one process, and print a line of JSON for each.

    python tests/fuzz/refuse.py FOLDER [MODEL]

Each file is opened as it is. With MODEL, an archive of ``torch.save`` with good weights, each is also opened as the pickle of
that archive.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[2]))

from guard import Guard, attempt
from seeds import Seed
from worker import in_memory, prepare, settle, write

from converters import ConversionError, open_checkpoint


def main(corpus: str, model: str = "") -> None:
    settle()
    with tempfile.TemporaryDirectory(prefix="refuse-", dir=in_memory()) as top:
        sound = [Seed("model", {"m.bin": Path(model).read_bytes()}, "m.bin", ("m.bin",))] if model else []
        prepare("refuse", sound, Path(top))  # imports everything
        guard = Guard(("hdf5_listing.py",))
        files = sorted(path for path in Path(corpus).rglob("*") if path.is_file())
        cases = [(path, way) for path in files for way in ("as it is", "as data.pkl")[: 1 + bool(model)]]
        for number, (path, way) in enumerate(cases):
            data, name = path.read_bytes(), path.name
            if way == "as data.pkl":
                data, name = with_pickle(Path(model).read_bytes(), data), "m.bin"
            folder = Path(top, str(number))
            write(folder, {name: data})
            print(json.dumps({"file": path.name, "way": way, **result(guard, folder, name)}), flush=True)


def result(guard: Guard, folder: Path, name: str) -> dict[str, object]:
    """Open a file. Return what happened, the message, and the CPU seconds and memory that it took."""

    def action() -> str:
        try:
            open_checkpoint(folder / name, n_head=2)
        except ConversionError as error:
            return f"refused: {error}"
        return "read"

    before = time.process_time()
    outcome, words = attempt(guard, folder, action)
    seconds = time.process_time() - before
    left = sorted(path.name for path in folder.iterdir() if path.name != name)
    return {"outcome": outcome, "words": words, "left": left, "seconds": seconds, "memory": guard.grown}


def with_pickle(archive: bytes, pickle: bytes) -> bytes:
    """Return an archive of ``torch.save`` with another pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            data = pickle if info.filename.endswith("/data.pkl") else old.read(info)
            new.writestr(zipfile.ZipInfo(info.filename), data)
    return out.getvalue()


if __name__ == "__main__":
    main(*sys.argv[1:])
