"""The quantized types of GGUF are read as gguf-py reads them, bit for bit."""

import gguf
import numpy as np
import pytest
from commands import done
from paths import FIXTURES
from quantized import MATRICES, random_blocks, write_quantized

from converters import CheckpointError, FormatError, open_checkpoint
from converters.containers import gguf_quants
from converters.containers.gguf import open_gguf
from converters.containers.gguf_quants import QUANTS, dequantize
from converters.containers.gguf_types import QUANTIZED, TYPES, UNREAD
from converters.formats.gguf import GGUF
from gpt2x import SHAKESPEARE

KINDS = [kind.name for kind in QUANTIZED]
BY_NAME = {kind.name: kind for kind in QUANTIZED}
WRITTEN_BY_GGUF_PY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")


def theirs(kind, blocks):
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])


def ours(kind, blocks):
    return np.concatenate(list(dequantize(BY_NAME[kind], blocks.tobytes())))


def assert_same_values(kind, blocks):
    """The same bits, signed zeros too; a NaN for a NaN, whose other bits depend on the processor."""
    expected, found = theirs(kind, blocks).reshape(-1), ours(kind, blocks)
    assert found.dtype == np.float32
    assert (np.isnan(found) == np.isnan(expected)).all()
    known = ~np.isnan(expected)
    assert (found.view(np.uint32)[known] == expected.view(np.uint32)[known]).all()


def is_dequantized(kind):
    """Whether gguf-py dequantizes this type."""
    try:
        theirs(kind, random_blocks(kind, (1, 256)))
    except NotImplementedError:
        return False
    return True


def test_exactly_the_types_that_gguf_py_dequantizes_are_read():
    for kind, (values, nbytes) in gguf.GGML_QUANT_SIZES.items():
        is_read = is_dequantized(kind.name)
        assert (kind.value in TYPES) == (is_read or kind.name == "F64"), kind
        if is_read:
            entry = TYPES[kind.value]
            assert (entry.name, entry.values, entry.nbytes) == (kind.name, values, nbytes)
        elif kind.name != "F64":
            assert UNREAD[kind.value] == kind.name


def test_a_structure_has_as_many_bytes_as_its_type():
    assert {kind.name: kind.nbytes for kind in QUANTIZED} == {name: q.block.itemsize for name, q in QUANTS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_random_bytes_are_read_as_by_gguf_py(kind):
    assert_same_values(kind, random_blocks(kind, (500, 256)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("byte", [0x00, 0x7C, 0x7E, 0xFC, 0xFF])
def test_scales_that_are_zero_infinite_or_nan_are_read_as_by_gguf_py(kind, byte):
    """Blocks of one byte have it in their scales, wherever these are: 0x7c7c and 0xffff are NaN, 0x7c00 infinity."""
    blocks = random_blocks(kind, (40, 256))
    blocks[:10] = byte
    blocks[10:20, :: BY_NAME[kind].nbytes] = byte
    blocks[20:30, 1 :: BY_NAME[kind].nbytes] = byte
    blocks[30:, BY_NAME[kind].nbytes - 1 :: BY_NAME[kind].nbytes] = byte
    assert_same_values(kind, blocks)


@pytest.mark.parametrize("kind", WRITTEN_BY_GGUF_PY)
def test_what_gguf_py_quantizes_is_read_as_by_gguf_py(kind):
    weights = open_checkpoint(SHAKESPEARE).tensors["h.0.attn.c_attn.weight"].read().reshape(-1, 256)
    with np.errstate(all="ignore"):
        quantized = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind])
    assert_same_values(kind, quantized)
    is_ternary = kind.startswith("TQ")
    tolerance = np.abs(weights).max() * (1 if is_ternary else 0.2)
    assert np.abs(ours(kind, quantized) - weights.reshape(-1)).max() <= tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 7, 1025])
def test_any_number_of_blocks_is_read_in_pieces_of_a_megabyte_at_most(monkeypatch, kind, count):
    entry = BY_NAME[kind]
    data = random_blocks(kind, (count, entry.values)).tobytes()
    whole = ours(kind, np.frombuffer(data, np.uint8))
    monkeypatch.setattr(gguf_quants, "VALUES_AT_ONCE", 512)
    pieces = list(dequantize(entry, data))
    assert max(map(len, pieces)) <= 512
    assert np.concatenate(pieces).tobytes() == whole.tobytes()
    assert whole.size == count * entry.values


# ------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A file whose matrices are of five types, as llama-quantize mixes them; and their bytes."""
    path = tmp_path_factory.mktemp("mixed") / "m.gguf"
    kinds = dict(zip(MATRICES, ("Q6_K", "Q4_K", "IQ1_S", "MXFP4", "Q2_K"), strict=True))
    return path, kinds, write_quantized(path, kinds)


def test_a_file_of_several_types_is_read_as_float32(mixed):
    path, kinds, written = mixed
    container = open_gguf(path)
    for name, blocks in written.items():
        kind = kinds[name.removesuffix(".weight")]
        tensor = container.tensors[name]
        expected = theirs(kind, blocks)
        assert tensor.dtype.name == "F32"
        assert tensor.stored == (kind, blocks.nbytes)
        assert tensor.shape == expected.shape
        assert np.array_equal(tensor.read(), expected, equal_nan=True)


def test_inspect_names_the_types_and_convert_says_that_they_are_written_as_float32(mixed, gpt2x, tmp_path):
    path, _, _ = mixed
    text = done(gpt2x("inspect", path)).output
    assert "1 x Q6_K, 1 x Q4_K, 1 x IQ1_S, 1 x MXFP4, 1 x Q2_K" in text
    text = done(gpt2x("convert", FIXTURES / "gguf/Q4_0.gguf", tmp_path / "m.gguf")).output
    assert "5 tensors are quantized (5 x Q4_0): they are read as F32" in text
    assert "the quantized tensors are written as F32" in text
    text = done(gpt2x("convert", FIXTURES / "gguf/Q4_0.gguf", tmp_path / "m.safetensors")).output
    assert "5 tensors are quantized (5 x Q4_0): they are read as F32" in text
    text = done(gpt2x("convert", FIXTURES / "gguf/F32.gguf", tmp_path / "plain.gguf")).output
    assert "quantized" not in text


def test_a_file_of_ggufs_own_writer_converts_to_the_values_that_gguf_py_reads(gpt2x, tmp_path):
    done(gpt2x("convert", FIXTURES / "gguf/Q4_0.gguf", tmp_path / "m.safetensors"))
    read = open_checkpoint(tmp_path / "m.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(FIXTURES / "gguf/Q4_0.gguf").tensors}
    for ours_, name in (("h.0.mlp.c_fc.weight", "blk.0.ffn_up.weight"), ("wte.weight", "token_embd.weight")):
        expected = theirs("Q4_0", tensors[name].data)
        assert (read.tensors[ours_].read() == (expected if name.startswith("token") else expected.T)).all()


def test_a_file_that_ends_inside_a_block_is_refused(mixed, tmp_path):
    path, _, _ = mixed
    data = path.read_bytes()
    for size in (len(data) - 40, len(data) // 2, len(data) // 3):
        (tmp_path / "m.gguf").write_bytes(data[:size])
        with pytest.raises(FormatError, match=r"but its tensors end at byte"):
            open_checkpoint(tmp_path / "m.gguf")


def test_rounding_to_a_type_that_gpt2x_does_not_write_is_refused(gpt2x):
    result = gpt2x("verify", FIXTURES / "gguf/F32.gguf", FIXTURES / "gguf/Q4_0.gguf", "--rounded")
    assert result.exit_code == 1
    assert "stored as Q4_0, to which gpt2x cannot round; compare without --rounded" in result.output


def test_every_type_is_in_the_list_of_formats():
    assert set(KINDS) <= set(GGUF.reads)


def test_a_type_that_is_not_read_is_refused_by_name(mixed, tmp_path):
    path, _, _ = mixed
    data = path.read_bytes()
    name = b"token_embd.weight"
    place = data.index(name) + len(name) + 4 + 2 * 8  # after the rank and two sizes
    assert data[place] == TYPES[14].number
    (tmp_path / "m.gguf").write_bytes(data[:place] + b"\x0f" + data[place + 1 :])
    with pytest.raises(CheckpointError, match=r"the type Q8_K is not supported"):
        open_checkpoint(tmp_path / "m.gguf")
