"""Public collections of hostile files: each is refused, and nothing in it is executed.

They are not in this repository. ``make corpora`` downloads them, and runs these tests.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import corpora
import pytest
from paths import FIXTURES
from seeds import HARMFUL

from converters import open_checkpoint, save_checkpoint

FOLDER = os.environ.get("GPT2X_CORPORA", "")
PROGRAM = Path(__file__).with_name("refuse.py")
needs_corpora = pytest.mark.skipif(not FOLDER, reason="GPT2X_CORPORA does not name a folder: run make corpora")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """An archive of torch.save with good weights."""
    path = tmp_path_factory.mktemp("model") / "m.bin"
    save_checkpoint(open_checkpoint(FIXTURES / "tf_plain"), path, "bin")
    return path


def results(*arguments):
    """What happened to each file of a folder, in a process of its own, which must not crash."""
    run = subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def assert_refused(result):
    """One clear message; the guard saw nothing executed, imported, created, and no excess of time and memory."""
    assert result["outcome"] == "done", result
    assert result["words"].startswith("refused: "), result
    message = result["words"].removeprefix("refused: ")
    first, *more = message.split("\n")  # the names of tensors, and a command, have lines of their own
    assert 10 < len(first) < 1000 and len(message) < 2000, result
    assert all(line.isprintable() for line in (first, *more)), result
    assert result["left"] == []


@needs_corpora
@pytest.mark.parametrize(("name", "count", "pickles"), [("picklescan", 109, True), ("cve_hdf5", 138, False)])
def test_every_file_of_a_corpus_is_refused(model, name, count, pickles):
    found = results(Path(FOLDER, name), *([model] if pickles else []))
    assert len({(result["file"], result["way"]) for result in found}) >= count * (2 if pickles else 1)
    for result in found:
        assert_refused(result)


def test_a_model_with_a_hostile_pickle_is_refused(model, tmp_path):
    for name, pickle in HARMFUL.items():
        (tmp_path / name).write_bytes(pickle)
    found = results(tmp_path, model)
    assert len(found) == 2 * len(HARMFUL)
    for result in found:
        assert_refused(result)


def test_the_archive_is_read_if_its_pickle_is_its_own(model, tmp_path):
    """So that it is refused above for the pickle, and for nothing else."""
    import zipfile

    with zipfile.ZipFile(model) as archive:
        (tmp_path / "own").write_bytes(archive.read("pytorch_model/data.pkl"))
    as_it_is, as_pickle = results(tmp_path, model)
    assert as_it_is["words"].startswith("refused: ")
    assert as_pickle["words"] == "read"


def test_only_the_wanted_files_of_an_archive_are_written(tmp_path):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name in ("r-1/data/a.pkl", "r-1/other/b.pkl", "r-1/../data/c.pkl", "r-1/data/../../e"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("r-1/data/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    assert corpora.extract(data.getvalue(), tmp_path / "out", ("data",)) == 1
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()] == ["out/data/a.pkl"]
