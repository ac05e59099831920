"""Whatever happens to a conversion, there is the old file or the new one, never half; and never a lost source."""

import filecmp
import os
import random
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import assert_same_bytes, random_checkpoint
from commands import assert_refused, done
from fork_server import fork_server
from kinds import KINDS, any_file

from converters import (
    WRITERS,
    ConversionError,
    DestinationError,
    FormatError,
    GPT2Config,
    LazyTensor,
    open_checkpoint,
    save_checkpoint,
)
from converters.io.reading import File
from gpt2x import SHAKESPEARE

# Format -> the destination's name, and what else is asked for.
WRITES = {
    "safetensors": ("m.safetensors", ()),
    "bin": ("m.bin", ()),
    "nanogpt": ("ckpt.pt", ("--to", "nanogpt")),
    "llmc": ("m.bin", ("--to", "llmc")),
    "gguf": ("m.gguf", ()),
    "hf": ("hf", ()),
    "shards": ("hf", ("--max-shard-size", "5MB")),
    "tf": ("tf", ("--to", "tf")),
}
every_write = pytest.mark.parametrize("kind", WRITES)
OLD = random_checkpoint(seed=9)


def test_every_writer_is_here():
    assert set(WRITES) == {*WRITERS, "shards"}


def write_old(kind, target):
    """What was there before: the same files as the new ones have, of another model."""
    size = OLD.nbytes // 3 if kind == "shards" else None
    save_checkpoint(OLD, target, "hf" if kind == "shards" else kind, max_shard_size=size)


def contents(path):
    """Name -> bytes of a file, or of every file in a folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path.parent).as_posix(): p.read_bytes() for p in files}


def same(a, b):
    """Whether two files, or two folders of files, have the same names and bytes."""
    if not (a.is_dir() and b.is_dir()):
        return a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False)
    names = [sorted(p.name for p in folder.iterdir()) for folder in (a, b)]
    return names[0] == names[1] and all(same(a / name, b / name) for name in names[0])


def leftovers(folder):
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def remove(path):
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------- kill -9

# The process is killed where it would ask the system for so manieth change of a file or a folder; with 0 it ends by itself.
# Answers with the number of changes, too.
KILLED = """
import itertools, mmap, signal, struct

CHANGES = ("fsync", "link", "mkdir", "pwrite", "rename", "replace", "rmdir", "unlink", "write")
count = mmap.mmap(-1, 8)  # shared with the process

def counted(real, last, numbers):
    def change(*args, **options):
        number = next(numbers)
        count[:8] = struct.pack("q", number)
        if number == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)
    return change

def prepare(last, *words):
    count[:8] = bytes(8)
    numbers = itertools.count(1)
    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name), int(last), numbers))
    return words

def answer():
    return struct.unpack("q", count[:8])
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file of 20 MB with a random model."""
    config = GPT2Config(n_layer=4, n_head=4, n_embd=256, n_ctx=256, n_vocab=8000)
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    save_checkpoint(random_checkpoint(config), path)
    return path


@pytest.fixture(scope="module")
def convert():
    """``convert(last, *words)``: a ``gpt2x convert`` that is killed instead of its so manieth change on the disk."""
    with fork_server(KILLED) as server:
        yield lambda last, *words: server(last, "convert", *words)


QUICK = ("safetensors", "hf")  # one file, and a directory
KILLS = 7  # of each format, on an empty place and again over an old result: 112 in all


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in WRITES]
)
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path, large, convert, kind):
    name, options = WRITES[kind]
    before, chance = large.read_bytes(), random.Random(kind)
    for folder in ("clean", "old", "work"):
        (tmp_path / folder).mkdir()
    clean, old, target = (tmp_path / folder / name for folder in ("clean", "old", "work"))
    write_old(kind, old)
    assert convert(0, large, clean, *options)[0] == 0
    assert_same_bytes(open_checkpoint(large), open_checkpoint(clean))
    for existing in (False, True):
        words = (large, target, *options, *(["--force"] if existing else []))

        def begin(existing=existing):
            remove(target)
            if existing:
                shutil.copytree(old, target) if old.is_dir() else shutil.copy(old, target)

        begin()
        code, changes = convert(0, *words)
        assert code == 0 and same(target, clean)
        ends = (1, changes - 2, changes - 1, changes)  # the last ones put the result into its place
        for last in (*ends, *(chance.randint(2, changes - 3) for _ in range(KILLS - len(ends)))):
            begin()
            code, _ = convert(last, *words)
            left = leftovers(tmp_path / "work")
            assert code == -9
            whole = last > 1 and same(target, clean)
            assert whole or (same(target, old) if existing else not target.exists())
            assert {p.name for p in (tmp_path / "work").iterdir()} - {name} == {p.name for p in left}
            assert all(p.name.startswith(f".{name}.") and p.name.endswith(".tmp") for p in left)
            check_folder(tmp_path / "work", target)
            for path in left:
                remove(path)
    assert large.read_bytes() == before


def check_folder(folder, target):
    """What a killed conversion leaves behind is never taken for weights."""
    if target.is_dir():
        open_checkpoint(target)
    elif target.exists():
        assert open_checkpoint(folder).source == target
    else:
        with pytest.raises(FormatError, match="no weights in this directory"):
            open_checkpoint(folder)


def test_a_conversion_that_was_killed_is_done_again_beside_what_it_left(tmp_path, large, convert):
    """Without cleaning up first."""
    _, changes = convert(0, large, tmp_path / "first")
    for share in (0.3, 0.5, 0.7, 0.9):
        assert convert(int(changes * share), large, tmp_path / "again", "--force")[0] == -9
    assert convert(0, large, tmp_path / "again", "--force")[0] == 0
    assert same(tmp_path / "again", tmp_path / "first")


# ------------------------------------------------------------------------------------ disks that are full or read-only


@contextmanager
def small_disk(folder, size="4m"):
    """A file system of a few megabytes; gives what changes its options."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    folder.mkdir()

    def mount(options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode

    if mount(f"size={size}"):
        pytest.skip("this machine does not let us mount a small file system")
    try:
        yield mount
    finally:
        subprocess.run(["umount", folder], check=True)


@every_write
def test_a_full_disk_leaves_what_was_there(gpt2x, tmp_path, kind):
    name, options = WRITES[kind]
    options = ("--max-shard-size", "1MB") if kind == "shards" else options
    with small_disk(tmp_path / "disk"):
        target = tmp_path / "disk" / name
        assert_refused(gpt2x("convert", SHAKESPEARE, target, *options), name, "No space left on device")
        assert list((tmp_path / "disk").iterdir()) == []
        write_old(kind, target)
        before = contents(target)
        assert_refused(gpt2x("convert", SHAKESPEARE, target, *options, "--force"), name, "No space left on device")
        assert contents(target) == before
        assert [p.name for p in (tmp_path / "disk").iterdir()] == [name]


@every_write
def test_a_limit_on_the_size_of_files_leaves_nothing(tmp_path, kind):
    """As ``ulimit -f`` sets it; no root is needed."""
    name, options = WRITES[kind]
    code = "import resource as r, sys; r.setrlimit(r.RLIMIT_FSIZE, (1 << 20, 1 << 20)); from gpt2x.cli import main; main(sys.argv[1:])"
    run = subprocess.run(
        [sys.executable, "-c", code, "convert", SHAKESPEARE, tmp_path / name, *options], capture_output=True, text=True
    )
    assert run.returncode == 1
    assert run.stderr.startswith("Error: ") and len(run.stderr.splitlines()) == 1
    assert "cannot be written: File too large" in run.stderr
    assert list(tmp_path.iterdir()) == []


@every_write
def test_a_read_only_disk_is_refused_in_one_line(gpt2x, tmp_path, kind):
    name, options = WRITES[kind]
    with small_disk(tmp_path / "disk") as mount:
        target = tmp_path / "disk" / name
        write_old(kind, target)
        before = contents(target)
        if mount("remount,ro"):
            pytest.skip("this machine does not let us mount a read-only file system")
        for where, force in ((target, ["--force"]), (tmp_path / "disk" / "other" / name, [])):
            result = gpt2x("convert", SHAKESPEARE, where, *options, *force)
            assert_refused(result, f"{where}: cannot be written: Read-only file system")
            assert len(result.stderr.splitlines()) == 1
        assert contents(target) == before


# ---------------------------------------------------------------------------------------- a source that does not stay


def shrink(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def grow(path):
    with open(path, "ab") as file:
        file.write(b"more")


def change(path):
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 0xFF]) + data[-8:])
    os.utime(path, ns=(1, 1))


def vanish(path):
    path.unlink()


def give_way(path):
    """Another program puts a new version in its place, as gpt2x itself does."""
    path.with_name("new").write_bytes(b"another")
    os.replace(path.with_name("new"), path)


def one_of(folder, kind):
    """A source of a kind: one of those of the refusals, a file of llm.c, or shards."""
    if kind == "shards":
        save_checkpoint(random_checkpoint(), folder / "hf", max_shard_size=random_checkpoint().nbytes // 3)
        return folder / "hf"
    if kind == "llmc":
        save_checkpoint(random_checkpoint(), folder / "m.llmc", "llmc")
        return folder / "m.llmc"
    return any_file(folder, kind)


@pytest.fixture
def striking(monkeypatch):
    """While a file of weights is read, between two of its chunks, something happens to it, once."""

    def begin(strike):
        real, struck = File.chunks, []

        def chunks(self, offset, size):
            for number, chunk in enumerate(real(self, offset, size)):
                yield chunk
                if number == 1 and not struck:
                    struck.append(self.path)
                    strike(self.path)

        monkeypatch.setattr(File, "chunks", chunks)
        monkeypatch.setattr("converters.io.reading.CHUNK", 64)
        return struck

    return begin


every_source = pytest.mark.parametrize("kind", [*KINDS, "llmc", "shards"])


@every_source
@pytest.mark.parametrize("strike", [shrink, empty, grow, change])
def test_a_source_that_changes_while_it_is_read_is_refused_and_leaves_nothing(tmp_path, striking, kind, strike):
    checkpoint = open_checkpoint(one_of(tmp_path, kind), n_head=2)
    (tmp_path / "out").mkdir()
    struck = striking(strike)
    with pytest.raises(FormatError) as error:
        save_checkpoint(checkpoint, tmp_path / "out" / "m.safetensors")
    assert str(error.value) == f"{struck[0]}: changed while it was read"
    assert list((tmp_path / "out").iterdir()) == []


@every_source
@pytest.mark.parametrize("strike", [vanish, give_way])
def test_a_source_that_is_removed_or_replaced_while_it_is_read_is_read_to_its_end(tmp_path, striking, kind, strike):
    checkpoint = open_checkpoint(one_of(tmp_path, kind), n_head=2)
    assert striking(strike) == []
    save_checkpoint(checkpoint, tmp_path / "m.safetensors.out", "safetensors")
    assert_same_bytes(random_checkpoint(), open_checkpoint(tmp_path / "m.safetensors.out", n_head=2))


@pytest.mark.parametrize("kind", [kind for kind in WRITES if kind != "shards"])
def test_a_source_that_shrinks_leaves_an_old_result_as_it_was(tmp_path, striking, kind):
    source = any_file(tmp_path, "model.safetensors")
    target = tmp_path / "out" / WRITES[kind][0]
    write_old(kind, target)
    before, checkpoint = contents(target), open_checkpoint(source, n_head=2)
    struck = striking(shrink)
    with pytest.raises(FormatError, match="changed while it was read"):
        save_checkpoint(checkpoint, target, kind, force=True)
    assert struck == [source]
    assert contents(target) == before
    assert leftovers(tmp_path / "out") == []


def test_a_fault_of_the_disk_that_is_read_from_is_one_clear_error(tmp_path, monkeypatch):
    def broken():
        raise OSError(5, "Input/output error")
        yield

    checkpoint = random_checkpoint()
    tensors = {name: replace(tensor, stream=broken) for name, tensor in checkpoint.tensors.items()}
    with pytest.raises(ConversionError, match="Input/output error"):
        save_checkpoint(replace(checkpoint, tensors=tensors), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------- SRC and DST are, or hold, one another


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A file, a folder of Hugging Face's, shards and a TensorFlow checkpoint, each with links to it."""
    monkeypatch.chdir(tmp_path)
    tiny = random_checkpoint()
    save_checkpoint(tiny, "m.safetensors")
    save_checkpoint(tiny, "hf")
    save_checkpoint(tiny, "shards", max_shard_size=tiny.nbytes // 3)
    save_checkpoint(tiny, "tf", "tf")
    Path("link.safetensors").symlink_to("m.safetensors")
    os.link("m.safetensors", "twin.safetensors")
    Path("hf-link").symlink_to("hf")
    Path("tf-link").symlink_to("tf")
    assert Path("shards/model-00001-of-00004.safetensors").is_file()
    Path("sub").mkdir()
    return tmp_path


SAME = {
    "the same name": "m.safetensors m.safetensors",
    "the same name, said otherwise": "m.safetensors sub/../m.safetensors",
    "a link to it": "m.safetensors link.safetensors",
    "what it is a link to": "link.safetensors m.safetensors",
    "a link and itself": "link.safetensors link.safetensors",
    "another name of the same file": "m.safetensors twin.safetensors",
    "a folder and itself": "hf hf",
    "a folder and itself, with a slash": "hf hf/",
    "a folder and a link to it": "hf hf-link",
    "a link to a folder, and that": "hf-link hf",
    "a folder of TensorFlow and itself": "tf tf --to tf",
    "a prefix of TensorFlow and its folder": "tf/model.ckpt tf --to tf",
    "a folder of TensorFlow and a link to it": "tf tf-link --to tf",
    "a file and its folder": "hf/model.safetensors hf",
    "a folder and its file": "hf hf/model.safetensors",
}


def sources():
    return {name: contents(Path(name)) for name in ("m.safetensors", "twin.safetensors", "hf", "shards", "tf")}


@pytest.mark.parametrize("words", [pytest.param(words, id=sentence) for sentence, words in SAME.items()])
def test_a_source_that_is_the_destination_is_left_alone_and_with_force_is_not_lost(here, gpt2x, words):
    before = sources()
    result = gpt2x("convert", *words.split())
    assert_refused(result, f"{Path(words.split()[1])}: already exists; pass --force to replace it")
    assert len(result.stderr.splitlines()) == 1
    assert sources() == before
    done(gpt2x("convert", *words.split(), "--force"))
    for name in before:
        assert_same_bytes(random_checkpoint(), open_checkpoint(name))
    assert_same_bytes(random_checkpoint(), open_checkpoint(words.split()[1]))
    assert leftovers(here) == []


INSIDE = {
    "a file in the source's folder": "hf hf/out.safetensors",
    "another format in the source's folder": "hf hf/out.gguf",
    "a folder in the source's folder": "hf hf/sub",
    "a folder of TensorFlow in the source's folder": "hf hf/sub --to tf",
    "a file in the folder of TensorFlow": "tf tf/out.bin",
    "a folder in the folder of shards": "shards shards/deep/er",
    "a folder in the place of TensorFlow's own": "tf/model.ckpt.index tf/hf",
}


@pytest.mark.parametrize("words", [pytest.param(words, id=sentence) for sentence, words in INSIDE.items()])
def test_a_destination_inside_the_source_lies_beside_what_was_there(here, gpt2x, words):
    before = sources()
    done(gpt2x("convert", *words.split()))
    after = sources()
    for name, files in before.items():
        assert files.items() <= after[name].items()
        assert_same_bytes(random_checkpoint(), open_checkpoint(name))
    assert_same_bytes(random_checkpoint(), open_checkpoint(words.split()[1]))


REFUSED = {
    "another format into the source's folder": ("hf hf --to tf --force", "hf: holds config.json, which would be read together"),
    "Hugging Face's into the folder of TensorFlow": ("tf tf --force", "tf: holds checkpoint, which would be read together"),
    "one file into the folder of shards": ("shards shards --force", "holds model.safetensors.index.json, which would be read together"),
    "shards into the folder of one file": ("hf hf --max-shard-size 2KB --force", "holds model.safetensors, which would be read together"),
    "a folder in the place of the source": ("m.safetensors m.safetensors --to hf --force", "is a file, which cannot be replaced by a directory"),
    "a file in the place of the source's folder": ("hf hf --to bin --force", "is a directory, which cannot be replaced by a file"),
    "a file below a file": ("m.safetensors m.safetensors/out.bin", "m.safetensors/out.bin: "),
    "a folder below a file": ("m.safetensors m.safetensors/deep/hf", "m.safetensors/deep/hf: "),
    "a shard of the source": ("shards shards/model-00001-of-00004.safetensors --force", "is one of several files of the source"),
    "the data of the source": ("tf tf/model.ckpt.data-00000-of-00001 --to bin --force", "is one of several files of the source"),
    "the index of the source": ("tf tf/model.ckpt.index --to bin --force", "is one of several files of the source"),
    "the index of the source's shards": ("shards shards/model.safetensors.index.json --to bin --force", "is one of several files of the source"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"), [pytest.param(words, said, id=sentence) for sentence, (words, said) in REFUSED.items()]
)
def test_what_would_harm_the_source_is_refused_in_one_line(here, gpt2x, words, said):
    before = sources()
    result = gpt2x("convert", *words.split())
    assert_refused(result, said)
    assert len(result.stderr.splitlines()) == 1
    assert sources() == before
    assert leftovers(here) == []


def test_a_result_around_its_source_keeps_what_else_is_there(here, gpt2x):
    """SRC lies deep inside DST."""
    save_checkpoint(random_checkpoint(seed=3), "outer/model.safetensors")
    save_checkpoint(random_checkpoint(), "outer/deep/source.safetensors")
    Path("outer/notes.txt").write_text("mine")
    assert_refused(gpt2x("convert", "outer/deep/source.safetensors", "outer"), "outer: already exists")
    done(gpt2x("convert", "outer/deep/source.safetensors", "outer", "--force"))
    for path in ("outer", "outer/deep/source.safetensors"):
        assert_same_bytes(random_checkpoint(), open_checkpoint(path))
    assert Path("outer/notes.txt").read_text() == "mine"


def test_the_folder_that_one_is_in_can_be_the_destination(here, gpt2x):
    assert_refused(gpt2x("convert", "m.safetensors", "."), "already exists")
    done(gpt2x("convert", "m.safetensors", ".", "--force"))
    assert_same_bytes(random_checkpoint(), open_checkpoint("."))
    assert_same_bytes(random_checkpoint(), open_checkpoint("m.safetensors"))


def test_a_model_in_memory_has_no_source_to_lose(tmp_path):
    tensors = {name: LazyTensor.of(tensor.read()) for name, tensor in random_checkpoint().tensors.items()}
    memory = replace(random_checkpoint(), tensors=tensors)
    save_checkpoint(memory, tmp_path / "m.safetensors")
    with pytest.raises(DestinationError, match="already exists"):
        save_checkpoint(memory, tmp_path / "m.safetensors")
    save_checkpoint(memory, tmp_path / "m.safetensors", force=True)
    assert_same_bytes(memory, open_checkpoint(tmp_path / "m.safetensors"))


INTERRUPTED = """
import os, random, signal, sys
from converters.io.publishing import Output

class Stop(BaseException):
    pass

def stop(number, frame):
    raise Stop

def write(output):
    while True:
        output.position = 0
        output.write(bytes(64))

def once(fd):
    output = Output(fd)
    try:
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(2e-5, 1e-3))
        write(output)
    finally:
        output.abandon()

signal.signal(signal.SIGALRM, stop)
chance = random.Random(0)
with open(sys.argv[1], "wb") as file:
    for _ in range(300):
        try:
            once(file.fileno())
        except Stop:
            pass
"""


def test_a_signal_at_any_moment_of_writing_leaves_no_lock_behind(tmp_path):
    # Of a queue with Python's locks, one in fifty such signals left the writer and its thread waiting for each other.
    ran = subprocess.run(
        [sys.executable, "-P", "-c", INTERRUPTED, tmp_path / "f"], capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr
