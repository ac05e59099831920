"""safetensors: files of the library are read, ours are read by the library, and broken headers are refused."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy
from checkpoints import TINY, arrays_of, assert_same_bytes, random_checkpoint

from converters import FormatError, open_checkpoint, save_checkpoint
from converters.config import to_hf
from converters.containers.safetensors import open_safetensors


def test_a_written_file_reads_back_to_the_same_bytes_and_configuration(tmp_path, tiny):
    save_checkpoint(tiny, tmp_path / "m.safetensors")
    back = open_checkpoint(tmp_path / "m.safetensors")
    assert_same_bytes(tiny, back)
    assert back.config == TINY
    assert back.notes == ()


def test_the_tensors_are_laid_out_byte_for_byte_as_the_library_lays_them_out(tmp_path, tiny):
    save_checkpoint(tiny, tmp_path / "ours.safetensors")
    safetensors.numpy.save_file(arrays_of(tiny), tmp_path / "theirs.safetensors", {"format": "pt"})
    ours, theirs = ((tmp_path / f"{who}.safetensors").read_bytes() for who in ("ours", "theirs"))
    (n_ours,), (n_theirs,) = struct.unpack("<Q", ours[:8]), struct.unpack("<Q", theirs[:8])
    assert ours[8 + n_ours :] == theirs[8 + n_theirs :]
    header_ours, header_theirs = json.loads(ours[8 : 8 + n_ours]), json.loads(theirs[8 : 8 + n_theirs])
    assert list(header_ours) == list(header_theirs)
    assert header_ours.pop("__metadata__") == {"format": "pt", "config": json.dumps(to_hf(TINY))}
    header_theirs.pop("__metadata__")
    assert header_ours == header_theirs


def test_two_conversions_of_one_source_are_the_same_file(tmp_path, tiny):
    for name in ("a", "b"):
        save_checkpoint(tiny, tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_library_reads_what_we_wrote(tmp_path, tiny):
    save_checkpoint(tiny, tmp_path / "m.safetensors")
    theirs = safetensors.numpy.load_file(tmp_path / "m.safetensors")
    assert {n: a.tobytes() for n, a in theirs.items()} == {n: a.tobytes() for n, a in arrays_of(tiny).items()}


def test_a_file_of_the_library_is_read_with_its_prefix_masks_and_copy_of_the_output(tmp_path, tiny):
    arrays = {f"transformer.{name}": array for name, array in arrays_of(tiny).items()}
    arrays["transformer.h.0.attn.bias"] = np.ones((1, 1, 10, 10), np.float32)
    arrays["transformer.h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
    arrays["lm_head.weight"] = arrays["transformer.wte.weight"].copy()
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    back = open_checkpoint(tmp_path / "model.safetensors", n_head=2)
    assert_same_bytes(tiny, back)
    assert set(back.left_out) == {"transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias", "lm_head.weight"}


def header_file(path, header, data=b"\0" * 24, size=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if size is None else size) + raw + data)
    return path


def entry(dtype="F32", shape=(6,), offsets=(0, 24), **extra):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **extra}


def test_the_headers_that_the_tests_write_are_sound(tmp_path):
    container = open_safetensors(header_file(tmp_path / "f", {"a": entry()}))
    assert container.tensors["a"].read().tolist() == [0] * 6


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"a": entry(offsets=(4, 28))}, "4 bytes belong to no tensor|truncated"),
        ({"a": entry(shape=(5,), offsets=(0, 20))}, "4 bytes belong to no tensor"),
        ({"a": entry(shape=(3,), offsets=(0, 12)), "b": entry(shape=(2,), offsets=(16, 24))}, "4 bytes belong to no"),
        ({"a": entry(), "b": entry()}, "overlaps"),
        ({"a": entry(shape=(4,), offsets=(0, 16)), "b": entry(shape=(4,), offsets=(8, 24))}, "overlaps"),
        ({"a": entry(shape=(7,), offsets=(0, 28))}, "truncated"),
        ({"a": entry(shape=(5,))}, "24 bytes, but shape"),
        ({"a": entry(shape=(-6,))}, "invalid shape"),
        ({"a": entry(shape=(6.0,))}, "invalid shape"),
        ({"a": entry(shape=(True,) * 6)}, "invalid shape"),
        ({"a": entry(shape=(2**62, 2**62))}, "invalid shape"),
        ({"a": entry(shape=(1,) * 9 + (6,))}, "invalid shape"),
        ({"a": entry(offsets=(24, 0))}, "invalid offsets"),
        ({"a": entry(offsets=(-24, 0))}, "invalid offsets"),
        ({"a": entry(offsets=(0, 24, 24))}, "invalid offsets"),
        ({"a": entry(offsets=(0, 2**70))}, "invalid offsets"),
        ({"a": entry(dtype="F31")}, "unknown dtype 'F31'"),
        ({"a": entry(dtype="F8_E4M3")}, "quantized"),
        ({"a": entry(dtype=["F32"])}, "unknown dtype"),
        ({"a": entry(extra=1)}, "and nothing else"),
        ({"a": {"dtype": "F32"}}, "must hold dtype, shape and data_offsets"),
        ({"a": 5}, "must hold dtype, shape and data_offsets"),
        ({"a\0b": entry()}, "invalid tensor name"),
        ({"a": entry(), "__metadata__": {"format": 1}}, "table of strings"),
        ({"a": entry(), "__metadata__": {"config": "{"}}, "invalid JSON"),
        (b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), "duplicate key 'a'"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[6],"data_offsets":[0,24]}}', "duplicate key 'dtype'"),
        (b'{"a":\xff}', "not UTF-8"),
        (b'{"a":', "invalid JSON"),
        (b"{" + b'"a":{' * 100_000, "invalid JSON"),
        (b'{"a":%s}' % (b"[" * 100_000), "invalid JSON"),
        (b"[1,2,3]", "does not begin with"),
        (b'{"a":' + b"9" * 5000 + b"}", "invalid JSON"),
    ],
)  # fmt: skip
def test_a_header_that_is_not_sound_is_refused(tmp_path, header, match):
    with pytest.raises(FormatError, match=match):
        open_checkpoint(header_file(tmp_path / "f.safetensors", header))


@pytest.mark.parametrize(
    ("size", "match"),
    [
        (0, "truncated"),
        (1, "truncated"),
        (10_000, "truncated"),
        (2**63, "which exceeds the limit of 100000000"),
        (100_000_001, "which exceeds the limit of 100000000"),
    ],
)
def test_a_header_of_an_impossible_size_is_refused(tmp_path, size, match):
    with pytest.raises(FormatError, match=match):
        open_safetensors(header_file(tmp_path / "f", {"a": entry()}, size=size))


@pytest.mark.parametrize("size", [1, 7, 9])
def test_a_file_too_short_for_a_header_is_refused(tmp_path, size):
    (tmp_path / "f.safetensors").write_bytes(b"\0" * size)
    with pytest.raises(FormatError, match="truncated"):
        open_checkpoint(tmp_path / "f.safetensors")


@pytest.mark.parametrize("cut", [1, 100, 3000])
def test_a_truncated_safetensors_file_is_refused(tmp_path, tiny, cut):
    path = tmp_path / "m.safetensors"
    save_checkpoint(tiny, path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(FormatError, match="truncated"):
        open_checkpoint(path)


def test_bytes_behind_the_last_tensor_are_refused(tmp_path, tiny):
    path = tmp_path / "m.safetensors"
    save_checkpoint(tiny, path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(FormatError, match="1 bytes belong to no tensor"):
        open_checkpoint(path)


def test_the_file_is_recognised_by_its_content_not_its_name(tmp_path, tiny):
    save_checkpoint(tiny, tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").rename(tmp_path / "weights.dat")
    assert_same_bytes(tiny, open_checkpoint(tmp_path / "weights.dat"))


def test_a_file_that_puts_its_tensors_at_odd_places_loads(tmp_path):
    from gpt2x.load import load_model
    from gpt2x.model import GPT2

    tiny = random_checkpoint()
    header = {name: entry(shape=t.shape, offsets=(0, 0)) for name, t in tiny.tensors.items()}
    position, data = 0, b""
    for name, tensor in tiny.tensors.items():
        header[name]["data_offsets"] = [position, position := position + tensor.nbytes]
        data += tensor.read().tobytes()
    raw = json.dumps(header).encode()
    raw += b" " * ((3 - len(raw)) % 4)  # the data begins at a place that no float32 may have
    header_file(tmp_path / "odd.safetensors", raw, data)
    model = load_model(GPT2(13, 6, 2, 2, 24, 10), tmp_path / "odd.safetensors")
    assert model.wte.weight.detach().numpy().tobytes() == tiny.tensors["wte.weight"].read().tobytes()
