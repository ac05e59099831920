"""``pytorch_model.bin``, zip and legacy: torch's files are read without torch, ours by torch, and nothing is executed."""

import collections
import contextlib
import io
import os
import pickle
import shutil
import struct
import zipfile

import numpy as np
import pytest
import torch
from checkpoints import TINY, arrays_of, assert_same_bytes, random_checkpoint

from converters import CheckpointError, ChecksumError, FormatError, UnsafeError, open_checkpoint, save_checkpoint
from converters.config import to_hf
from converters.containers.torch_pickle import load_pickle

both_ages = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def tensors(checkpoint=None):
    return {name: torch.from_numpy(array) for name, array in arrays_of(checkpoint or random_checkpoint()).items()}


def save(value, path, zipped=True):
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


@both_ages
@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_what_torch_wrote_is_read_to_the_same_bytes(tmp_path, tiny, zipped, kind):
    path = save(kind(tensors()), tmp_path / "pytorch_model.bin", zipped)
    back = open_checkpoint(path, n_head=2)
    assert_same_bytes(tiny, back)
    assert back.checksummed == (len(back.tensors) if zipped else 0)


@both_ages
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_number_format_is_read(tmp_path, zipped, dtype):
    path = save({n: t.to(dtype) for n, t in tensors().items()}, tmp_path / "m.bin", zipped)
    back = open_checkpoint(path, n_head=2)
    expected = tensors()["wte.weight"].to(dtype)
    assert back.tensors["wte.weight"].read().tobytes() == expected.view(torch.uint8).numpy().tobytes()


@both_ages
def test_the_state_dict_of_transformers_is_read(tmp_path, zipped):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=13, n_positions=10, n_embd=6, n_layer=2, n_head=2))
    path = save(model.state_dict(), tmp_path / "pytorch_model.bin", zipped)
    back = open_checkpoint(path, n_head=2)
    assert back.left_out == ("lm_head.weight",)
    for name, array in arrays_of(back).items():
        assert array.tobytes() == model.transformer.state_dict()[name].numpy().tobytes()


@both_ages
def test_parameters_and_views_of_one_storage_are_read(tmp_path, tiny, zipped):
    state = tensors()
    biases = torch.cat([state["h.0.ln_1.bias"], state["h.0.ln_1.weight"]])
    state["h.0.ln_1.bias"], state["h.0.ln_1.weight"] = biases[:6], biases[6:]
    state["wte.weight"] = torch.nn.Parameter(state["wte.weight"])
    state["lm_head.weight"] = state["wte.weight"]
    back = open_checkpoint(save(state, tmp_path / "m.bin", zipped), n_head=2)
    assert_same_bytes(tiny, back)


@both_ages
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_known_wrapper_is_opened_and_the_rest_left_out(tmp_path, tiny, zipped, key):
    other = {"optimizer": {"state": {0: torch.zeros(3)}, "lr": 0.1}, "epoch": 3}
    back = open_checkpoint(save({key: tensors(), **other}, tmp_path / "m.bin", zipped), n_head=2)
    assert_same_bytes(tiny, back)
    assert set(back.left_out) == {"optimizer", "epoch"}


def test_what_we_write_is_read_by_torch_safely_and_mapped(tmp_path, tiny):
    save_checkpoint(tiny, tmp_path / "m.bin")
    for mmap in (False, True):
        theirs = torch.load(tmp_path / "m.bin", weights_only=True, mmap=mmap)
        assert type(theirs) is collections.OrderedDict
        assert {n: t.numpy().tobytes() for n, t in theirs.items()} == {
            n: a.tobytes() for n, a in arrays_of(tiny).items()
        }
    assert zipfile.ZipFile(tmp_path / "m.bin").testzip() is None


def test_what_we_write_has_its_data_aligned_and_its_configuration_with_it(tmp_path, tiny):
    save_checkpoint(tiny, tmp_path / "m.bin")
    data = (tmp_path / "m.bin").read_bytes()
    for name in ("wte.weight", "h.0.attn.c_attn.weight"):
        assert data.index(tiny.tensors[name].read().tobytes()) % 64 == 0
    assert open_checkpoint(tmp_path / "m.bin").config == TINY


@pytest.mark.parametrize("name", ["F16", "BF16", "F64"])
def test_other_number_formats_are_written_as_torch_reads_them(tmp_path, tiny, name):
    from converters.tensors import DTYPES

    cast = tiny.cast(DTYPES[name])
    save_checkpoint(cast, tmp_path / "m.bin")
    theirs = torch.load(tmp_path / "m.bin", weights_only=True)["wte.weight"]
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[name]
    assert torch.equal(theirs, tensors()["wte.weight"].to(dtype))
    assert_same_bytes(cast, open_checkpoint(tmp_path / "m.bin"))


# ----------------------------------------------------------------------------------------- nothing is executed


class Bomb:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@both_ages
@pytest.mark.parametrize(
    ("bomb", "name"),
    [
        (lambda path: Bomb(os.system, f"touch {path}"), "posix.system"),
        (lambda path: Bomb(eval, f"open({str(path)!r}, 'w')"), "builtins.eval"),
        (lambda path: Bomb(shutil.copy, __file__, str(path)), "shutil.copy"),
        (lambda path: Bomb(getattr, "", "upper"), "builtins.getattr"),
    ],
)
def test_a_pickle_that_asks_for_code_is_refused_by_name_and_runs_nothing(tmp_path, zipped, bomb, name):
    witness = tmp_path / "executed"
    path = save({**tensors(), "bomb": bomb(witness)}, tmp_path / "m.bin", zipped)
    with pytest.raises(UnsafeError, match=name.replace(".", r"\.")):
        open_checkpoint(path, n_head=2)
    assert not witness.exists()


def pickled(body):
    return load_pickle(io.BytesIO(b"\x80\x02" + body), "test")


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"cos\nsystem\n.", "os.system"),
        (b"\x8c\x02os\x8c\x06system\x93.", "os.system"),
        (b"(ios\nsystem\n.", "os.system"),
        (b"(cos\nsystem\no.", "os.system"),
        (b"\x82\x01.", "EXT1"),
        (b"})\x81.", "NEWOBJ"),
        (b"P1\n.", "PERSID"),
        (b"ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
        (b"})R.", "calls an unknown function"),
    ],
)
def test_an_instruction_or_a_global_off_the_list_is_refused_by_name(body, match):
    with pytest.raises(FormatError, match=match):
        pickled(body)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"N", b".", b"NN.", b"t.", b"h\x05.", b"s.", b"}N.s.", b"\x80\x09.", b"X\xff\xff\xff\x7fabc.", b"X\x05\0\0\0abc",
        b"]}e.", b"}(KNu.", b"}(]Nu.", b"Nb.", b"(((((.", b"\x8a\x05\x01.", b"Iabc\n.", b"X\x01\0\0\0\xff.", b"K\x01Q.",
        b"}(X\x01\0\0\0aNX\x01\0\0\0aNu.",
    ],
)  # fmt: skip
def test_a_pickle_that_is_not_sound_is_refused(body):
    with pytest.raises(FormatError):
        pickled(body)


def test_a_memo_of_an_absurd_index_takes_no_memory():
    assert pickled(b"Nr\xff\xff\xff\xff.") is None  # in C, pickle would allocate for 2**32 entries


def test_a_deeply_nested_pickle_is_read_without_recursion():
    assert pickled(b"(" * 100_000 + b"t" * 100_000 + b".") is not None


@pytest.mark.parametrize("body", [b"B\xff\xff\xff\x7fabc", (b"X\0\0\x50\0" + b"a" * (5 << 20)) * 2])
def test_a_pickle_that_asks_for_too_much_is_refused_before_it_fills_the_memory(body):
    with pytest.raises(FormatError, match=r"more than 8 MB|exceeds the limit of 8 MB"):
        pickled(body)


@both_ages
@pytest.mark.parametrize(
    ("value", "match"),
    [
        (lambda: [torch.zeros(2)], "a list, not a dict of tensors"),
        (lambda: {"a": 1}, "'a' is a int, not a tensor"),
        (lambda: {}, "an empty dict"),
        (lambda: {1: torch.zeros(2)}, "not a tensor|not a dict"),
        (lambda: torch.zeros(2), "a tensor, not a dict of tensors"),
        (lambda: {"a": {"b": torch.zeros(2)}}, "none of its 1 tensors has a name"),
    ],
)
def test_a_top_level_that_is_no_dict_of_tensors_is_refused(tmp_path, zipped, value, match):
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(save(value(), tmp_path / "m.bin", zipped))


@both_ages
@pytest.mark.parametrize(
    ("view", "match"),
    [
        (lambda: torch.zeros(1).expand(1000), "strides"),
        (lambda: torch.zeros(13, 12)[:, :6], "strides"),
        (lambda: torch.zeros(12, 13)[::2].t(), "strides"),
        (lambda: torch.zeros(26, 6)[::2], "strides"),
    ],
)
def test_a_view_that_is_not_plain_is_refused(tmp_path, zipped, view, match):
    with pytest.raises(FormatError, match=match):
        open_checkpoint(save({**tensors(), "wte.weight": view()}, tmp_path / "m.bin", zipped), n_head=2)


@both_ages
def test_tensors_that_overlap_in_one_storage_are_refused(tmp_path, zipped):
    state, both = tensors(), torch.zeros(10)
    state["h.0.ln_1.bias"], state["h.0.ln_2.bias"] = both[:6], both[4:]
    with pytest.raises(FormatError, match="overlap"):
        open_checkpoint(save(state, tmp_path / "m.bin", zipped), n_head=2)


@both_ages
def test_quantised_and_sparse_tensors_are_refused(tmp_path, zipped):
    sparse = torch.zeros(13, 6).to_sparse()
    with pytest.raises(FormatError, match="sparse"):
        open_checkpoint(save({**tensors(), "wte.weight": sparse}, tmp_path / "m.bin", zipped))


@both_ages
@pytest.mark.parametrize("cut", [1, 100, 3000])
def test_a_truncated_file_of_torch_is_refused(tmp_path, zipped, cut):
    path = save(tensors(), tmp_path / "m.bin", zipped)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(FormatError):
        open_checkpoint(path, n_head=2)


@both_ages
def test_bytes_behind_the_end_of_a_file_of_torch_are_refused(tmp_path, zipped):
    path = save(tensors(), tmp_path / "m.bin", zipped)
    path.write_bytes(path.read_bytes() + b"junk")
    with pytest.raises(FormatError, match="extra bytes after"):
        open_checkpoint(path, n_head=2)


@both_ages
def test_bytes_before_the_beginning_are_refused(tmp_path, zipped):
    path = save(tensors(), tmp_path / "m.bin", zipped)
    path.write_bytes(b"PK" + path.read_bytes())
    with pytest.raises(FormatError):
        open_checkpoint(path, n_head=2)


# ------------------------------------------------------------------------------------------------------- the zip


@pytest.mark.untraced
def test_every_flipped_byte_of_every_tensor_in_a_zip_is_found(tmp_path, tiny):
    path = tmp_path / "m.bin"
    save_checkpoint(tiny, path)
    sound = path.read_bytes()
    for tensor in tiny.tensors.values():
        place = sound.index(tensor.read().tobytes())
        for i in range(place, place + tensor.nbytes, 61):
            path.write_bytes(sound[:i] + bytes([sound[i] ^ 8]) + sound[i + 1 :])
            with pytest.raises(ChecksumError):
                arrays_of(open_checkpoint(path))


@pytest.mark.slow
@pytest.mark.untraced
def test_no_flipped_byte_in_a_zip_gives_other_weights(tmp_path, tiny):
    path = tmp_path / "m.bin"
    save_checkpoint(tiny, path)
    sound = path.read_bytes()
    for i in range(0, len(sound), 31):
        path.write_bytes(sound[:i] + bytes([sound[i] ^ 1]) + sound[i + 1 :])
        try:
            back = open_checkpoint(path)
            arrays_of(back)
        except (FormatError, CheckpointError):
            continue
        assert_same_bytes(tiny, back)  # a byte that nobody reads, such as a date


def rezip(path, change=lambda name, data: (name, data), extra=(), compression=zipfile.ZIP_STORED):
    """The same archive with its members changed."""
    with zipfile.ZipFile(path) as old:
        members = [(info.filename, old.read(info)) for info in old.infolist()]
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in [change(*member) for member in members] + list(extra):
            new.writestr(name, data)
    return path


@pytest.fixture
def archive(tmp_path):
    return save(tensors(), tmp_path / "archive.bin")


def test_an_archive_packed_again_is_read(archive, tiny):
    assert_same_bytes(tiny, open_checkpoint(rezip(archive), n_head=2))


def refused(path, match):
    with pytest.raises((FormatError, CheckpointError), match=match):
        arrays_of(open_checkpoint(path, n_head=2))


def test_compressed_members_are_refused(archive):
    refused(rezip(archive, compression=zipfile.ZIP_DEFLATED), "compressed or encrypted")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_members_are_refused(archive):
    refused(rezip(archive, extra=[("archive/data/0", b"")]), "duplicate")


def test_a_torchscript_archive_is_named_and_refused(tmp_path):
    path = rezip(save(tensors(), tmp_path / "script.pt"), extra=[("script/constants.pkl", b"")])
    refused(path, "TorchScript")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_real_torchscript_module_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "m.pt"))
    refused(tmp_path / "m.pt", "TorchScript")


def test_a_big_endian_archive_is_refused(archive):
    refused(rezip(archive, lambda n, d: (n, b"big") if n.endswith("byteorder") else (n, d)), "big-endian")


def test_a_member_outside_the_archives_folder_is_refused(archive):
    refused(rezip(archive, extra=[("../evil", b"")]), "outside")


def test_a_storage_of_another_size_is_refused(archive):
    refused(rezip(archive, lambda n, d: (n, d[:-4]) if n.endswith("data/0") else (n, d)), "but the pickle states")


def test_a_missing_storage_is_refused(archive):
    refused(rezip(archive, lambda n, d: (n.replace("data/0", "data/zero"), d)), "missing from the archive")


def test_a_zip_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.bin", "w") as z:
        z.writestr("readme.txt", "hello")
    refused(tmp_path / "m.bin", "without PyTorch's data.pkl")


def test_a_zip_with_a_comment_is_refused(archive):
    with zipfile.ZipFile(archive, "a") as z:
        z.comment = b"hello"
    refused(archive, "after the end of the zip archive|a comment")


def test_bytes_behind_the_pickle_are_refused(archive):
    refused(
        rezip(archive, lambda n, d: (n, d + b"x") if n.endswith("data.pkl") else (n, d)),
        "extra bytes after the end of the pickle",
    )


# ---------------------------------------------------------------------------------------------------- the legacy


@both_ages
def test_another_model_that_was_saved_whole_is_refused(tmp_path, zipped):
    path = save(torch.nn.Linear(2, 2), tmp_path / "m.bin", zipped)
    with pytest.raises(CheckpointError, match="none of its 2 tensors has a name of a GPT-2 parameter"):
        open_checkpoint(path)


def test_a_plain_pickle_is_refused(tmp_path):
    (tmp_path / "m.bin").write_bytes(pickle.dumps({"a": 1}))
    refused(tmp_path / "m.bin", "a pickle, but not one of torch.save")


def test_a_tar_is_named_and_refused(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "m.bin", "w") as tar:
        tar.add(__file__, "storages")
    refused(tmp_path / "m.bin", "a tar or a compressed archive")


def legacy(path, system=None, keys=None):
    """A hand-made legacy file around one tensor."""
    sound = save(tensors(), path, zipped=False).read_bytes()
    system_pickle = pickle.dumps(
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}, 2
    )
    assert system_pickle in sound
    return sound.replace(system_pickle, pickle.dumps(system, 2)) if system else sound


def test_a_big_endian_legacy_file_is_refused(tmp_path):
    path = tmp_path / "m.bin"
    path.write_bytes(legacy(path, system={"little_endian": False}))
    refused(path, "big-endian")


def test_a_count_of_values_that_differs_is_refused(tmp_path):
    path = tmp_path / "m.bin"
    sound = save(tensors(), path, zipped=False).read_bytes()
    data = tensors()["h.1.mlp.c_fc.bias"].numpy().tobytes()
    place = sound.index(data) - 8
    assert struct.unpack_from("<q", sound, place) == (24,)
    for count in (23, -1, 2**62):
        path.write_bytes(sound[:place] + struct.pack("<q", count) + sound[place + 8 :])
        refused(path, f"has {count} values, but the pickle states 24")


def test_another_protocol_is_refused(tmp_path):
    path = tmp_path / "m.bin"
    sound = save(tensors(), path, zipped=False).read_bytes()
    path.write_bytes(sound.replace(pickle.dumps(1001, 2), pickle.dumps(1002, 2), 1))
    refused(path, "unknown protocol version")


@pytest.mark.slow
@pytest.mark.untraced
def test_no_flipped_byte_in_the_pickles_of_a_legacy_file_is_anything_but_refused_or_harmless(tmp_path, tiny):
    path = tmp_path / "m.bin"
    sound = save(tensors(), path, zipped=False).read_bytes()
    end = sound.index(tensors()["wte.weight"].numpy().tobytes())
    for i in range(0, end, 23):
        path.write_bytes(sound[:i] + bytes([sound[i] ^ 4]) + sound[i + 1 :])
        with contextlib.suppress(FormatError, CheckpointError):
            arrays_of(open_checkpoint(path, n_head=2))


def test_the_configuration_beside_a_bin_is_used(tmp_path):
    import json

    (tmp_path / "config.json").write_text(json.dumps(to_hf(TINY)))
    assert open_checkpoint(save(tensors(), tmp_path / "pytorch_model.bin")).config == TINY


def test_a_number_that_is_no_float_is_refused(tmp_path):
    state = {**tensors(), "ln_f.bias": torch.zeros(6, dtype=torch.int64)}
    with pytest.raises(CheckpointError, match=r"integers  ln_f.bias is I64"):
        open_checkpoint(save(state, tmp_path / "m.bin"), n_head=2)


def test_an_empty_tensor_among_the_extras_does_no_harm(tmp_path, tiny):
    state = {**tensors(), "h.0.attn.bias": torch.zeros(0)}
    assert_same_bytes(tiny, open_checkpoint(save(state, tmp_path / "m.bin"), n_head=2))


def test_bfloat16_survives_as_its_bits(tmp_path, tiny):
    from converters.tensors import BF16

    ours = tiny.cast(BF16).tensors["wte.weight"].read()
    theirs = tensors()["wte.weight"].to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(ours, theirs)
