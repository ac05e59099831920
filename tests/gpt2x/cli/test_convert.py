"""``gpt2x convert`` and ``inspect`` as users run them; and that a destination is the old file or the new one, never half."""

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import safetensors.numpy
import torch
from checkpoints import TINY, assert_same_bytes, random_checkpoint
from commands import assert_refused, done
from fork_server import fork_server
from paths import FIXTURES

import converters.io.publishing
from converters import DestinationError, GPT2Config, open_checkpoint, save_checkpoint
from gpt2x import SHAKESPEARE


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, with the shipped model as models/124M."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SHAKESPEARE, "models/124M")
    return tmp_path


# ------------------------------------------------------------------------------------------------------ the roads


def test_the_whole_chain_gives_the_same_bytes_for_every_tensor(gpt2x):
    for step in (
        "models/124M a.safetensors",
        "a.safetensors b.bin",
        "b.bin c --to tf",
        "c d",
        "d models/back --to tf",
    ):
        done(gpt2x("convert", *step.split()))
        assert_same_bytes(open_checkpoint("models/124M"), open_checkpoint(step.split()[1]))
    for name in ("model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        assert Path("models/back", name).read_bytes() == Path("models/124M", name).read_bytes()
        assert Path("c", name).read_bytes() == Path("models/124M", name).read_bytes()


def test_a_directory_loads_in_transformers_with_the_same_bytes(gpt2x):
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel

    done(gpt2x("convert", "models/124M", "gpt2-hf/"))
    names = {p.name for p in Path("gpt2-hf").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    expected = open_checkpoint("models/124M")
    kinds: tuple[Any, ...] = (GPT2LMHeadModel, AutoModelForCausalLM)
    for kind in kinds:
        state = kind.from_pretrained("gpt2-hf").transformer.state_dict()
        assert {n: t.numpy().tobytes() for n, t in state.items()} == {
            n: t.read().tobytes() for n, t in expected.tensors.items()
        }


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bin_saved_by_transformers_is_converted(gpt2x, zipped):
    from transformers import GPT2Config as Theirs
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(Theirs(vocab_size=13, n_positions=10, n_embd=6, n_layer=2, n_head=2))
    torch.save(model.state_dict(), "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    result = done(gpt2x("convert", "pytorch_model.bin", "out.safetensors", "--n-head", 2, "--json"))
    assert json.loads(result.stdout)["left_out"] == ["lm_head.weight"]
    state = safetensors.numpy.load_file("out.safetensors")
    assert all(a.tobytes() == model.transformer.state_dict()[n].numpy().tobytes() for n, a in state.items())


def test_a_bin_directory_loads_in_transformers(gpt2x):
    from transformers import GPT2LMHeadModel

    done(gpt2x("convert", "models/124M", "hf"))
    done(gpt2x("convert", "hf", "hf/pytorch_model.bin"))
    Path("hf/model.safetensors").unlink()
    model = GPT2LMHeadModel.from_pretrained("hf")
    assert (
        model.transformer.wte.weight.detach().numpy().tobytes()
        == open_checkpoint("models/124M").tensors["wte.weight"].read().tobytes()
    )


@pytest.mark.parametrize("name", ["model.ckpt", "model.ckpt.index", "model.ckpt.data-00000-of-00001", ""])
def test_every_way_to_name_a_checkpoint_works(gpt2x, name):
    done(gpt2x("convert", f"models/124M/{name}", "out.safetensors"))
    assert_same_bytes(open_checkpoint("models/124M"), open_checkpoint("out.safetensors"))


def test_json_has_the_promised_keys(gpt2x):
    result = done(gpt2x("convert", "models/124M", "out.safetensors", "--json"))
    facts = json.loads(result.stdout)
    assert set(facts) >= {
        "source", "destination", "format_from", "format_to", "config", "tensors", "parameters", "bytes", "left_out", "checksums_verified", "seconds",
    }  # fmt: skip
    checkpoint = open_checkpoint("models/124M")
    assert (facts["source"], facts["destination"]) == ("models/124M", "out.safetensors")
    assert (facts["format_from"], facts["format_to"]) == ("tf (openai)", "safetensors")
    assert facts["tensors"] == facts["checksums_verified"] == len(checkpoint.tensors)
    assert facts["parameters"] == checkpoint.parameters
    assert facts["bytes"] == Path("out.safetensors").stat().st_size
    assert facts["config"]["n_head"] == 6
    assert facts["left_out"] == []


def test_what_is_left_out_is_listed(gpt2x):
    result = done(gpt2x("convert", FIXTURES / "tf_training", "out.safetensors"))
    assert "left out: beta1_power, beta2_power, global_step" in result.stdout
    result = done(gpt2x("convert", FIXTURES / "tf_training", "out2.safetensors", "--json"))
    assert "global_step" in json.loads(result.stdout)["left_out"]


@pytest.mark.parametrize(("option", "name"), [("fp16", "F16"), ("bf16", "BF16"), ("fp32", "F32"), ("keep", "F32")])
@pytest.mark.parametrize("target", ["out.safetensors", "out.bin", "out"])
def test_the_number_format_is_chosen(gpt2x, option, name, target):
    done(gpt2x("convert", "models/124M", target, "--dtype", option))
    back = open_checkpoint(target)
    assert {t.dtype.name for t in back.tensors.values()} == {name}
    if target == "out":
        expected = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[name]
        assert json.loads(Path("out/config.json").read_text())["torch_dtype"] == expected


def test_an_absent_tokenizer_is_said(gpt2x):
    done(gpt2x("convert", "models/124M", "out.safetensors"))
    assert "no tokenizer" in done(gpt2x("convert", "out.safetensors", "hf")).stdout
    assert "no tokenizer" not in done(gpt2x("convert", "models/124M", "hf2")).stdout


def test_a_published_size_without_configuration_is_recognised_and_said(gpt2x):
    config = GPT2Config(n_layer=6)
    zeros = {name: np.zeros(shape, np.float16) for name, shape in config.shapes().items()}
    safetensors.numpy.save_file(zeros, "distil.safetensors")
    assert "published distilgpt2" in done(gpt2x("convert", "distil.safetensors", "out.safetensors")).stdout


def test_not_a_number_is_warned_of_on_stderr(gpt2x):
    arrays = {name: t.read() for name, t in random_checkpoint().tensors.items()}
    arrays["ln_f.bias"][2] = np.nan
    safetensors.numpy.save_file(arrays, "nan.safetensors")
    result = done(gpt2x("convert", "nan.safetensors", "out.safetensors", "--n-head", 2))
    assert "Warning: ln_f.bias holds NaN or infinity" in result.stderr


def test_a_pipe_sees_no_progress_bar_and_a_terminal_sees_one(here):
    command = [sys.executable, "-m", "gpt2x", "convert", "models/124M"]
    plain = subprocess.run([*command, "a.safetensors"], capture_output=True, check=True)
    assert plain.stderr == b""
    master, slave = pty.openpty()
    subprocess.run(
        [*command, "b.safetensors"],
        stderr=slave,
        stdout=subprocess.DEVNULL,
        check=True,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(slave)
    assert b"MB" in os.read(master, 100_000)
    os.close(master)


# --------------------------------------------------------------------------------------------------------- inspect


def test_inspect_says_what_it_is(gpt2x):
    text = done(gpt2x("inspect", "models/124M")).stdout
    for word in ("tf, dialect openai", "52 x F32", "n_head 6", "52 of 52 tensors have one", "gelu_new", "tokenizer"):
        assert word in text


def test_inspect_lists_tensors_and_speaks_json(gpt2x):
    facts = json.loads(done(gpt2x("inspect", FIXTURES / "tf_fp16", "--json", "--tensors")).stdout)
    assert (facts["format"], facts["dialect"], facts["dtypes"], facts["tensors"]) == ("tf", "openai", {"F16": 28}, 28)
    assert facts["tensor_list"][0] == {"name": "wte.weight", "dtype": "F16", "shape": [13, 6]}
    assert "tensor_list" not in json.loads(done(gpt2x("inspect", FIXTURES / "tf_fp16", "--json")).stdout)


def test_inspect_works_where_the_heads_are_unknown(gpt2x):
    arrays = {name: t.read() for name, t in random_checkpoint().tensors.items()}
    safetensors.numpy.save_file(arrays, "m.safetensors")
    facts = json.loads(done(gpt2x("inspect", "m.safetensors", "--json")).stdout)
    assert facts["config"]["n_head"] is None
    assert "pass --n-head to convert it" in facts["notes"][0]
    assert "n_head ?" in done(gpt2x("inspect", "m.safetensors")).stdout


# ---------------------------------------------------------------------------------------------- what is refused


def test_a_missing_source_is_refused(gpt2x):
    assert_refused(gpt2x("convert", "nothing", "out.safetensors"), "nothing: no such file")
    assert_refused(gpt2x("inspect", "nothing"), "no such file")


@pytest.mark.parametrize("target", ["out.safetensors", "out.bin", "out", "out-tf"])
def test_convert_never_touches_an_existing_destination_without_force(gpt2x, target):
    options = ["--to", "tf"] if target == "out-tf" else []
    if "." in target:
        Path(target).write_text("precious")
    else:
        Path(target).mkdir()
        Path(target, "hparams.json" if options else "config.json").write_text("precious")
        Path(target, "notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    assert_refused(gpt2x("convert", "models/124M", target, *options), "already exists; pass --force to replace it")
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before
    done(gpt2x("convert", "models/124M", target, *options, "--force"))
    assert_same_bytes(open_checkpoint("models/124M"), open_checkpoint(target))
    if "." not in target:
        assert Path(target, "notes.txt").read_text() == "mine"
    assert not list(Path().rglob(".*"))


def test_force_does_not_turn_a_folder_into_a_file_nor_a_file_into_a_folder(gpt2x):
    Path("dir.safetensors").mkdir()
    Path("file").write_text("x")
    assert_refused(gpt2x("convert", "models/124M", "dir.safetensors", "--force"), "is a directory")
    assert_refused(gpt2x("convert", "models/124M", "file", "--force"), "is a file")


@pytest.mark.parametrize("name", ["out.pt", "out.onnx", "out.h5", "out.ckpt"])
def test_a_name_that_asks_for_a_file_that_is_not_written_is_refused(gpt2x, name):
    assert_refused(gpt2x("convert", "models/124M", name), f"does not write {Path(name).suffix}")
    assert not Path(name).exists()


def test_a_source_converted_onto_itself_is_not_lost(gpt2x):
    done(gpt2x("convert", "models/124M", "m.safetensors"))
    assert_refused(gpt2x("convert", "m.safetensors", "m.safetensors"), "already exists")
    done(gpt2x("convert", "m.safetensors", "m.safetensors", "--force"))
    assert_same_bytes(open_checkpoint("models/124M"), open_checkpoint("m.safetensors"))
    done(gpt2x("convert", "models/124M", "models/124M", "--to", "tf", "--force"))
    assert_same_bytes(open_checkpoint("m.safetensors"), open_checkpoint("models/124M"))


def test_a_damaged_source_leaves_no_partial_output(gpt2x):
    path = Path("models/124M/model.ckpt.data-00000-of-00001")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    for target in ("out.safetensors", "out.bin", "out"):
        assert_refused(gpt2x("convert", "models/124M", target), "model/wte: checksum is", "damaged")
    assert {p.name for p in Path().iterdir()} == {"models"}


def test_an_overflowing_cast_is_refused(gpt2x):
    arrays = {name: t.read() * 1e6 for name, t in random_checkpoint().tensors.items()}
    safetensors.numpy.save_file({n: a.astype(np.float32) for n, a in arrays.items()}, "m.safetensors")
    assert_refused(
        gpt2x("convert", "m.safetensors", "out.bin", "--dtype", "fp16", "--n-head", 2), "does not fit into F16"
    )
    assert not Path("out.bin").exists()


def test_another_head_count_than_stated_is_refused(gpt2x):
    assert_refused(
        gpt2x("convert", "models/124M", "out.bin", "--n-head", 4), "n_head is 6 in hparams.json, but --n-head is 4"
    )


@pytest.mark.parametrize(
    "args",
    [
        ["convert"],
        ["convert", "a"],
        ["convert", "a", "b", "--dtype", "int7"],
        ["convert", "a", "b", "--to", "x"],
        ["nonsense"],
    ],
)
def test_wrong_usage_of_convert_is_exit_code_2(gpt2x, args):
    assert gpt2x(*args).exit_code == 2


def test_a_fault_of_our_own_is_one_line_too(gpt2x, monkeypatch):
    def broken(*args, **options):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("converters.open_checkpoint", broken)
    result = gpt2x("inspect", "models/124M")
    assert result.exit_code == 1
    assert "ZeroDivisionError: oops" in result.stderr
    assert "Traceback" not in result.output


# ------------------------------------------------------------------------------------------ crashes and full disks


@pytest.mark.parametrize("target", ["out.safetensors", "out.bin", "out", "tf"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_fills_up_in_the_midst_leaves_what_was_there(gpt2x, monkeypatch, target, existing):
    to = ["--to", "tf"] if target == "tf" else []
    if existing:
        save_checkpoint(random_checkpoint(), target, "tf" if to else None)
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    written = 0
    real = os.pwrite

    def write(fd, data, offset):
        nonlocal written
        written += len(data)
        if written > 3_000_000:
            raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr("converters.io.publishing.os.pwrite", write)
        result = gpt2x("convert", "models/124M", target, *to, "--force")
    assert_refused(result, "No space left on device")
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None, reason="only root can mount a small file system"
)
def test_a_disk_that_is_really_full_leaves_what_was_there(gpt2x):
    Path("disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", "disk"], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small file system")
    try:
        save_checkpoint(random_checkpoint(), "disk/m.safetensors")
        before = Path("disk/m.safetensors").read_bytes()
        for target, options in (("disk/m.safetensors", ["--force"]), ("disk/new.bin", []), ("disk/hf", [])):
            assert_refused(gpt2x("convert", "models/124M", target, *options), "No space left on device")
        assert {p.name: p.read_bytes() for p in Path("disk").iterdir()} == {"m.safetensors": before}
    finally:
        subprocess.run(["umount", "disk"], check=True)


def test_a_read_only_destination_is_refused(gpt2x, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(
        "converters.io.publishing.os.open",
        lambda p, flags, *a: refuse() if flags & os.O_CREAT else os_open(p, flags, *a),
    )
    assert_refused(gpt2x("convert", "models/124M", "out.safetensors"), "cannot be written: Permission denied")


os_open = os.open

# The words of a command come after the number of a signal, a count, and a file for stderr. The process sends itself the signal as
# it writes for so many times.
SIGNALLED = """
import converters.io.publishing as files

def prepare(number, count, errors, *words):
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    left, real = [int(count)], os.pwrite
    def write(fd, data, offset):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), int(number))
        return real(fd, data, offset)
    files.os.pwrite = write
    return words
"""


@pytest.fixture(scope="module")
def signalled():
    """``signalled(number, count, *words)``: a ``gpt2x`` that is sent a signal at its so manieth writing."""
    with fork_server(SIGNALLED) as server:

        def run(number, count, *words):
            errors = Path("stderr").absolute()
            (code,) = server(int(number), count, errors, *words)
            return code, errors.read_text()

        yield run


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("target", "options"), [("out.safetensors", []), ("out.bin", []), ("out", []), ("tf", ["--to", "tf"])]
)
def test_an_interrupted_convert_leaves_the_old_or_the_new(signalled, here, number, target, options):
    old, new = random_checkpoint(), open_checkpoint("models/124M")
    for count in (1, 10, 40):
        shutil.rmtree(target, ignore_errors=True)
        Path(target).unlink(missing_ok=True)
        save_checkpoint(old, target, "tf" if options else None)
        words = (here / "models/124M", here / target, "--force", *options)
        code, stderr = signalled(number, count, "convert", *words)
        assert code == -signal.SIGKILL if number == signal.SIGKILL else code in (0, 1, 128 + number)
        assert code or count > 1
        left = list(Path().glob(".*.tmp"))
        assert_same_bytes(new if code == 0 else old, open_checkpoint(target))
        assert "Traceback" not in stderr
        assert number == signal.SIGKILL or left == []  # even a kill leaves only a hidden temporary beside it
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_destination_that_appears_meanwhile_is_not_overwritten(tmp_path):
    with (
        pytest.raises(DestinationError, match="was created meanwhile"),
        converters.io.publishing.new_file(tmp_path / "f") as out,
    ):
        out.write(b"ours")
        (tmp_path / "f").write_bytes(b"theirs")
    assert (tmp_path / "f").read_bytes() == b"theirs"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.skipif(sys.platform != "linux", reason="exchanging two folders in one step is Linux's")
def test_a_forced_directory_takes_its_place_in_one_step(tmp_path, monkeypatch):
    save_checkpoint(random_checkpoint(), tmp_path / "d")
    (tmp_path / "d" / "notes.txt").write_text("mine")
    (tmp_path / "d" / "more" / "empty").mkdir(parents=True)
    (tmp_path / "d" / "more" / "notes.txt").write_text("mine, too")
    (tmp_path / "d").chmod(0o750)
    monkeypatch.setattr("converters.io.publishing.os.replace", None)  # not file by file
    save_checkpoint(random_checkpoint(seed=1), tmp_path / "d", force=True)
    assert_same_bytes(random_checkpoint(seed=1), open_checkpoint(tmp_path / "d"))
    assert (tmp_path / "d" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "d" / "more" / "notes.txt").read_text() == "mine, too"
    assert (tmp_path / "d" / "more" / "empty").is_dir()
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o750
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("why", ["it is where we are", "another system"])
def test_where_a_directory_cannot_be_exchanged_its_files_are_replaced(tmp_path, monkeypatch, why):
    folder = tmp_path / "d"
    save_checkpoint(random_checkpoint(), folder)
    inode = folder.stat().st_ino
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text("mine")
    if why == "it is where we are":
        monkeypatch.chdir(folder)
    else:
        monkeypatch.setattr("ctypes.CDLL", lambda name: None)
    save_checkpoint(random_checkpoint(seed=1), folder, force=True)
    assert folder.stat().st_ino == inode
    assert_same_bytes(random_checkpoint(seed=1), open_checkpoint(folder))
    assert (folder / "onnx" / "model.onnx").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_new_files_have_the_permissions_that_the_user_asked_for(gpt2x):
    before = os.umask(0o027)
    try:
        done(gpt2x("convert", "models/124M", "out.safetensors"))
        done(gpt2x("convert", "models/124M", "out"))
    finally:
        os.umask(before)
    assert Path("out.safetensors").stat().st_mode & 0o777 == 0o640
    assert Path("out").stat().st_mode & 0o777 == 0o750


def test_memory_is_a_buffer_not_a_model(tmp_path):
    """A checkpoint of 150 MB is converted within the memory that a tiny one takes, and 20 MB."""
    code = "import resource, sys; from gpt2x.cli import main; main(sys.argv[1:], standalone_mode=False); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"

    def peak(source, target):
        run = subprocess.run(
            [sys.executable, "-c", code, "convert", source, target], capture_output=True, text=True, check=True
        )
        return int(run.stdout.split()[-1])

    large = GPT2Config(n_vocab=50257, n_ctx=1024, n_embd=384, n_layer=10, n_head=6)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in large.shapes().items()}
    safetensors.numpy.save_file(zeros, "large.safetensors", {"config": json.dumps({"n_head": 6})})
    assert Path("large.safetensors").stat().st_size > 140e6
    del zeros
    small = peak("models/124M", "small.bin")
    for target in ("large.bin", "large-copy.safetensors", "large-hf"):
        assert peak("large.safetensors", target) < small + 20_000


def test_every_command_has_a_help_whose_examples_can_be_pasted(gpt2x):
    """As far as click can tell: a command, options and arguments that there are."""
    from gpt2x.cli import main

    def parse(words):
        assert words[0] == "gpt2x"
        command = main.commands[words[1]]
        return command.make_context(words[1], words[2:])

    for name, command in main.commands.items():
        assert command.help
        text = done(gpt2x(name, "--help")).stdout
        examples = re.findall(r"^ {4}(gpt2x .+)$", text, re.M)
        assert name == "demo" or examples
        assert all(parse(shlex.split(example)).info_name == name for example in examples)
    with pytest.raises(click.UsageError):
        parse(["gpt2x", "convert", "a", "b", "--from", "tf"])


def test_the_tiny_model_has_no_two_dimensions_alike():
    sizes = [TINY.n_layer, TINY.n_embd, TINY.n_ctx, TINY.n_vocab, TINY.n_inner, 3 * TINY.n_embd, TINY.head_dim]
    assert len(set(sizes)) == len(sizes)


def test_a_signal_waits_until_the_renames_are_done_whatever_other_threads_there_are():
    """The system hands a signal to any thread that does not block it, so a mask of one thread holds nothing back."""
    done, reader, writer = [], *os.pipe()
    end = threading.Event()
    other = threading.Thread(target=end.wait)
    os.set_blocking(writer, False)
    fd = signal.set_wakeup_fd(writer)
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt), converters.io.publishing._uninterrupted():
            signal.pthread_kill(other.ident, signal.SIGINT)
            assert os.read(reader, 1) == bytes([signal.SIGINT])  # it has come to the other thread
            done.append("renamed")
        assert done == ["renamed"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.set_wakeup_fd(fd)
        end.set()
        other.join()
        os.close(reader)
        os.close(writer)
