"""rust-bert's rust_model.ot: an archive that libtorch wrote, and damaged or harmful ones."""

import io
import shutil
import zipfile

import pytest
import torch
from checkpoints import assert_same_bytes
from commands import done
from paths import FIXTURES

from converters import CheckpointError, ChecksumError, ConversionError, FormatError, UnsafeError, open_checkpoint
from gpt2x import from_pretrained
from gpt2x.runtimes.opening import kind_of

MODEL = FIXTURES / "rust_bert/rust_model.ot"
START = b"\x80\x02c__torch__\nModule\n"


@pytest.fixture
def rezipped(tmp_path):
    """Write the archive again, after a change of its members: name -> contents."""

    def write(change):
        with zipfile.ZipFile(MODEL) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
        change(members)
        with zipfile.ZipFile(tmp_path / "m.ot", "w") as archive:
            for name, data in members.items():
                kind = zipfile.ZIP_DEFLATED if "/code/" in name else zipfile.ZIP_STORED
                archive.writestr(zipfile.ZipInfo(name), data, kind)
        return tmp_path / "m.ot"

    return write


def pickled(data):
    """A change of the pickle."""
    return lambda members: members.update({"rust_model/data.pkl": data})


def test_what_libtorch_wrote_holds_the_values_that_it_was_given():
    for path in (MODEL, MODEL.parent):
        checkpoint = open_checkpoint(path)
        assert_same_bytes(open_checkpoint(FIXTURES / "tf_plain"), checkpoint)
        assert "transformer.h.0.attn.bias" in checkpoint.left_out
        assert checkpoint.checksummed == len(checkpoint.tensors)


def test_it_converts_and_it_is_weights_and_no_program(gpt2x, tmp_path):
    done(gpt2x("convert", MODEL, tmp_path / "hf"))
    assert_same_bytes(open_checkpoint(MODEL), open_checkpoint(tmp_path / "hf"))
    assert kind_of(MODEL) == "weights"
    ids = torch.tensor([[1, 5, 3]])
    with torch.no_grad():
        assert torch.equal(from_pretrained(MODEL)(ids)[0], from_pretrained(tmp_path / "hf")(ids)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_torchscript_program_is_still_a_program(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "m.pt"))
    assert kind_of(tmp_path / "m.pt") == "torchscript"
    with pytest.raises(CheckpointError, match="TorchScript"):
        open_checkpoint(tmp_path / "m.pt")


def test_an_archive_that_is_written_again_opens(rezipped):
    path = rezipped(lambda members: None)
    shutil.copy(MODEL.parent / "config.json", path.parent)
    assert_same_bytes(open_checkpoint(MODEL), open_checkpoint(path))


def test_the_code_in_it_is_not_read(rezipped):
    path = rezipped(lambda members: members.update({"rust_model/code/__torch__.py": b"import os; os.system('x')"}))
    assert_same_bytes(open_checkpoint(MODEL), open_checkpoint(path, n_head=2))


def replaced(old, new):
    def change(members):
        data = members["rust_model/data.pkl"]
        assert old in data
        members["rust_model/data.pkl"] = data.replace(old, new)

    return change


BROKEN = {
    "a module without values": (pickled(START + b")\x81."), CheckpointError, "does not only hold tensors"),
    "a module of a list": (pickled(START + b")\x81]b."), CheckpointError, "does not only hold tensors"),
    "a module in a module": (pickled(START + b")\x81}X\1\0\0\0xc__torch__\nModule\n)\x81sb."), CheckpointError, "does not only hold tensors"),
    "a module of numbers": (pickled(START + b")\x81}X\1\0\0\0xK\1sb."), CheckpointError, "does not only hold tensors"),
    "a module with arguments": (pickled(START + b"K\1\x85\x81}b."), CheckpointError, "does not only hold tensors"),
    "a call of its class": (pickled(START + b")R."), CheckpointError, "does not only hold tensors"),
    "another class": (pickled(START + b"0c__torch__\nOther\n)\x81}b."), ConversionError, ""),
    "a function": (pickled(START + b")\x81cos\nsystem\nX\4\0\0\0true\x85Rb."), UnsafeError, ""),
    "no module": (pickled(START + b"."), CheckpointError, "does not only hold tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_module_is_refused(rezipped, case):
    change, error, words = BROKEN[case]
    path = rezipped(change)
    with pytest.raises(error) as caught:
        open_checkpoint(path, n_head=2)
    assert words in str(caught.value)


def test_two_names_that_are_one_with_dots_are_refused(rezipped):
    change = replaced(b"transformer|h|0|ln_1|bias", b"transformer|h|0|ln_2.bias")
    with pytest.raises(FormatError, match="two tensors of one name"):
        open_checkpoint(rezipped(change), n_head=2)


def test_compressed_values_are_refused(tmp_path):
    with zipfile.ZipFile(MODEL) as old, zipfile.ZipFile(tmp_path / "m.ot", "w") as new:
        for info in old.infolist():
            is_small = info.filename.endswith("data/0")
            kind = zipfile.ZIP_DEFLATED if is_small else zipfile.ZIP_STORED
            new.writestr(zipfile.ZipInfo(info.filename), old.read(info), kind)
    with pytest.raises(FormatError, match="is compressed or encrypted"):
        open_checkpoint(tmp_path / "m.ot", n_head=2)


def test_a_flipped_byte_is_found(tmp_path):
    data = bytearray(MODEL.read_bytes())
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        values = archive.read("rust_model/data/1")
    data[data.index(values) + 5] ^= 1
    (tmp_path / "m.ot").write_bytes(data)
    with pytest.raises(ChecksumError):
        open_checkpoint(tmp_path / "m.ot", n_head=2).tensors["wpe.weight"].read()


def test_a_file_that_ends_anywhere_too_early_is_refused(tmp_path):
    data = MODEL.read_bytes()
    for size in range(4, len(data), 211):
        (tmp_path / "m.ot").write_bytes(data[:size])
        with pytest.raises(FormatError):
            open_checkpoint(tmp_path / "m.ot", n_head=2)
