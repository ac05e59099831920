"""Files made to do harm: small ones that would cost much memory or time, or quietly give other weights."""

import io
import json
import os
import struct
import time
import zipfile
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from bundles import Bundle, raw_index, refused
from checkpoints import TINY, arrays_of, random_checkpoint

from converters import (
    CheckpointError,
    ConversionError,
    DestinationError,
    FormatError,
    GPT2Config,
    TokenizerError,
    UnsafeError,
    find_tokenizer,
    open_checkpoint,
    save_checkpoint,
)
from converters.config import to_hf
from converters.containers.torch_pickle import load_pickle
from converters.io.json import parse_json
from converters.io.protobuf import varint
from gpt2x import SHAKESPEARE, Tokenizer


@pytest.fixture(autouse=True)
def at_once():
    """Nothing here may take long: most takes some hundredths of a second."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 60


def tensors(checkpoint=None):
    return {name: torch.from_numpy(array) for name, array in arrays_of(checkpoint or random_checkpoint()).items()}


def pickled(body):
    return load_pickle(io.BytesIO(b"\x80\x02" + body), "test")


# ----------------------------------------------------------------------------------------------------- the pickle


@pytest.mark.parametrize("zipped", [True, False])
def test_a_negated_view_is_refused_for_its_bytes_have_the_other_sign(tmp_path, zipped):
    state = tensors()
    state["h.0.attn.c_attn.bias"] = torch._neg_view(state["h.0.attn.c_attn.bias"])
    torch.save(state, tmp_path / "m.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError, match="negated"):
        open_checkpoint(tmp_path / "m.bin", n_head=2)


def test_parameters_that_share_their_values_are_refused(tmp_path):
    state = tensors()
    state["h.0.ln_1.bias"] = state["ln_f.bias"]
    torch.save(state, tmp_path / "m.bin")
    with pytest.raises(FormatError, match="overlap"):
        open_checkpoint(tmp_path / "m.bin", n_head=2)


@pytest.mark.parametrize(
    "beside", [{"lm_head.weight": torch.zeros(13, 6)}, {"model": {"wte.weight": torch.zeros(13, 6)}}]
)
def test_weights_beside_a_wrapper_are_not_taken_for_run_data(tmp_path, beside):
    torch.save({"state_dict": tensors(), **beside}, tmp_path / "m.bin")
    with pytest.raises(CheckpointError, match="both hold tensors"):
        open_checkpoint(tmp_path / "m.bin", n_head=2)


DOUBLING = b"".join(b"q%ch%c\x86" % (i, i) for i in range(25))


@pytest.mark.parametrize(
    "body",
    [
        b"ctorch\ndevice\n)" + DOUBLING + b"\x85R.",  # would be 2**25 items if anybody printed it
        b"](" + b"K\1" * 100_000 + b"eq\0ctorch\nSize\nq\1" + b"h\1h\0\x85R" * 20_000 + b".",
        b"]((K\1K\1teq\0ccollections\nOrderedDict\nq\1" + b"h\1h\0\x85R" * 20_000 + b".",
        b"}(" + b"".join(b"\x8a\x0a" + ((2**61 - 1) * (i + 1)).to_bytes(10, "little") + b"N" for i in range(60_000)) + b"u.",
        b"N" + b"".join(b"p%d\n" % (k * (2**61 - 1)) for k in range(40_000)) + b".",
        b"}\x8b" + struct.pack("<I", 3000) + b"\x01" * 3000 + b"Ns.",
        b"X\x03\0\0\0\xed\xa0\x80.",  # a lone surrogate
        b"(" * 500_000 + b".",
    ],
)  # fmt: skip
def test_a_pickle_that_would_take_for_ever_is_refused_or_read_at_once(body):
    try:
        pickled(body)
    except FormatError:
        return
    assert body.startswith((b"ctorch\ndevice", b"]((K")), "only what is harmless may pass"


def test_stray_bytes_between_the_members_of_a_zip_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.bin", "w") as z:
        z.writestr("archive/data.pkl", b"\x80\x02}.")
    data = (tmp_path / "m.bin").read_bytes()
    place = data.index(b"PK\x01\x02")
    end = struct.unpack("<I", data[-6:-2])[0]
    changed = data[:place] + b"x" * 8 + data[place:-6] + struct.pack("<I", end + 8) + data[-2:]
    (tmp_path / "m.bin").write_bytes(changed)
    with pytest.raises(FormatError, match="stray bytes"):
        open_checkpoint(tmp_path / "m.bin")


# ------------------------------------------------------------------------------------------------------ TensorFlow


@pytest.fixture
def bundle(tmp_path):
    return Bundle(tmp_path / "tf")


def test_names_that_grow_out_of_one_another_take_no_memory(bundle):
    block = b"\0" + varint(4000) + b"\0" + b"a" * 4000
    for length in range(4000, 60_000):
        block += varint(length) + b"\x01\0b"
    raw_index(bundle.index, block + struct.pack("<2I", 0, 1))
    refused(bundle, "invalid entry")


@pytest.mark.parametrize(("count", "extents"), [(6000, 1), (1, 490_000)])
def test_slices_without_number_are_refused_at_once(bundle, count, extents):
    body = b"\x0a\x00" * extents
    shape = b"\x12\x05\x12\x03\x08" + varint(6000)
    bundle.write(model__wte=b"\x08\x01" + shape + (b"\x3a" + varint(len(body)) + body) * count)
    refused(bundle, "slices of one variable|outside the shape")


def test_a_slice_of_no_variable_is_refused(bundle):
    bundle.raw[b"\0stray"] = bundle.raw[b"model/ln_f/b"]
    bundle.data.write_bytes(bundle.data.read_bytes())
    entry = bundle.entry("model/ln_f/b", shape=(0,), size=0, crc=0xA282EAD8)
    bundle.raw[b"\0stray"] = entry
    bundle.write()
    refused(bundle, "a slice of an unknown variable")


def test_a_state_file_of_blank_lines_is_read_at_once(bundle):
    (bundle.folder / "checkpoint").write_bytes(b"\n" * 65_536)
    bundle.open()


def test_a_stray_index_does_not_hide_a_good_file(tmp_path):
    save_checkpoint(random_checkpoint(), tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index").write_bytes(b"junk")
    assert open_checkpoint(tmp_path / "model.safetensors").format == "safetensors"


# ----------------------------------------------------------------------------------------------------- JSON, names


def test_a_name_there_twice_among_many_is_found_at_once():
    names = ",".join(f'"{i}":0' for i in range(200_000))
    with pytest.raises(FormatError, match="duplicate"):
        parse_json(f'{{{names},"0":0}}'.encode(), "x")


@pytest.mark.parametrize("text", ['{"a":"\\ud800"}', '{"\\udfff":1}'])
def test_a_string_that_is_no_text_is_refused(text):
    with pytest.raises(FormatError, match="not valid Unicode"):
        parse_json(text.encode(), "x")


@pytest.mark.parametrize("key", ["layer_norm_epsilon", "resid_pdrop", "initializer_range", "vocab_size", "n_head"])
@pytest.mark.parametrize("value", [10**400, -(10**400), [], {}, "1", None, True])
def test_a_number_that_is_none_is_refused(tmp_path, key, value):
    save_checkpoint(random_checkpoint(), tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**to_hf(TINY), key: value}))
    with pytest.raises(ConversionError, match=r"config|configuration"):
        open_checkpoint(tmp_path / "hf")


@pytest.mark.parametrize(
    "name",
    [
        "x" * 300,
        "\ud800.bin",
        "a\nb",
        ".index",
        "..index",
        ".data-00000-of-00001",
        "model.safetensors.index.json",
        "a.json",
    ],
)
def test_a_shard_of_an_absurd_name_is_refused(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    with pytest.raises(FormatError):
        open_checkpoint(tmp_path)


def test_a_shard_behind_a_linked_folder_is_refused_and_a_linked_shard_is_not(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").mkdir()
    arrays = arrays_of(random_checkpoint())
    safetensors.numpy.save_file(arrays, tmp_path / "elsewhere" / "m.safetensors")
    (tmp_path / "model" / "sub").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "model" / "m.safetensors").symlink_to(tmp_path / "elsewhere" / "m.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(arrays, "sub/m.safetensors")}))
    with pytest.raises(UnsafeError):
        open_checkpoint(tmp_path / "model", n_head=2)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(arrays, "m.safetensors")}))
    assert len(open_checkpoint(tmp_path / "model", n_head=2).tensors) == 28


def test_shards_whose_configurations_disagree_are_refused(tmp_path):
    for heads in (2, 3):
        config = GPT2Config(**{**vars(TINY), "n_head": heads})
        save_checkpoint(random_checkpoint(config), tmp_path / f"{heads}.bin")
    weight_map = dict.fromkeys(TINY.shapes(), "2.bin") | {"ghost": "3.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FormatError):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "\ud800", "d/.index", "."])
def test_a_source_of_an_absurd_name_is_one_clear_error(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversionError):
        open_checkpoint(path)


@pytest.mark.parametrize("path", ["/etc/hostname/x.bin", "a\0b.bin", "x" * 300 + ".bin", "/proc/x.bin"])
def test_a_destination_of_an_absurd_name_is_one_clear_error(path):
    with pytest.raises(ConversionError):
        save_checkpoint(random_checkpoint(), path)


def test_a_long_legal_name_is_written(tmp_path):
    save_checkpoint(random_checkpoint(), tmp_path / ("😀" * 61 + ".bin"))
    assert [p.name for p in tmp_path.iterdir()] == ["😀" * 61 + ".bin"]


def test_lengths_that_look_like_other_formats_do_not_hide_a_safetensors_file(tmp_path):
    for magic in (b"PK", b"\x80\x05", b"\x1f\x8b"):
        length = int.from_bytes(magic + b"\x01", "little")
        header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
        (tmp_path / "m.dat").write_bytes(struct.pack("<Q", length) + header + bytes(4))
        with pytest.raises(CheckpointError, match="none of its 1 tensors has a name of a GPT-2 parameter"):
            open_checkpoint(tmp_path / "m.dat")


# --------------------------------------------------------------------------------------------- two truths in one


def test_two_configuration_files_that_disagree_are_refused(tmp_path):
    save_checkpoint(random_checkpoint(GPT2Config(**{**vars(TINY), "n_head": 3})), tmp_path / "tf", "tf")
    (tmp_path / "tf" / "config.json").write_text('{"model_type": "gpt2", "n_head": 2}')
    with pytest.raises(CheckpointError, match=r"n_head is 2 in config.json, 3 in hparams.json"):
        open_checkpoint(tmp_path / "tf")


@pytest.mark.parametrize(("first", "second", "stale"), [("hf", "tf", "config.json"), ("tf", "hf", "checkpoint")])
def test_a_forced_result_is_never_read_together_with_what_was_there(tmp_path, first, second, stale):
    save_checkpoint(random_checkpoint(), tmp_path / "d", first)
    before = {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()}
    with pytest.raises(DestinationError, match=f"holds {stale}, which would be read together"):
        save_checkpoint(random_checkpoint(seed=1), tmp_path / "d", second, force=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()} == before


def test_a_folder_in_the_place_of_a_file_stops_the_whole_result(tmp_path):
    (tmp_path / "d" / "model.safetensors").mkdir(parents=True)
    (tmp_path / "d" / "config.json").write_text("old")
    with pytest.raises(DestinationError, match="is a directory"):
        save_checkpoint(random_checkpoint(), tmp_path / "d", "hf", force=True)
    assert (tmp_path / "d" / "config.json").read_text() == "old"


def test_force_does_not_replace_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "m.bin")
    with pytest.raises(DestinationError, match="neither a file nor a directory"):
        save_checkpoint(random_checkpoint(), tmp_path / "m.bin", force=True)


# --------------------------------------------------------------------------------------------------- the tokenizer


def tokenizer_json(**changes):
    hf: dict[str, Any] = {
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "added_tokens": [{"id": 2, "content": "<|endoftext|>"}],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 3}, "merges": [["a", "b"]]},
    }
    for key, value in changes.items():
        (hf["model"] if key in ("vocab", "merges", "dropout", "type", "ignore_merges") else hf)[key] = value
    return json.dumps(hf)


def test_the_test_bench_itself_makes_a_sound_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    assert Tokenizer.from_pretrained(tmp_path).encode("abba<|endoftext|>") == [3, 1, 0, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"added_tokens": 5}, {"added_tokens": [1]}, {"added_tokens": [{}]}, {"added_tokens": [{"id": 4, "content": []}]},
        {"added_tokens": [{"id": [], "content": "x"}]}, {"added_tokens": [{"id": 0, "content": "x"}]},
        {"merges": 5}, {"merges": [5]}, {"merges": ["a b c"]}, {"merges": [["a"]]}, {"merges": [[1, 2]]}, {"merges": [["a", "zz"]]},
        {"vocab": {"a": True, "b": False}}, {"vocab": []}, {"vocab": {"a": -1}}, {"vocab": {"a": 2**31 - 1}},
        {"type": "WordPiece"}, {"dropout": 0.9}, {"ignore_merges": True}, {"pre_tokenizer": None}, {"pre_tokenizer": {"type": "Whitespace"}},
        {"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, {"model": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_tokenizer_json_that_is_unsound_or_not_gpt2s_is_refused(tmp_path, changes):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(**changes))
    with pytest.raises(TokenizerError):
        Tokenizer.from_pretrained(tmp_path)
    checkpoint = random_checkpoint()
    with pytest.raises(TokenizerError):
        save_checkpoint(replace(checkpoint, tokenizer=find_tokenizer(tmp_path)), tmp_path / "tf", "tf")
        Tokenizer.from_pretrained(tmp_path / "tf")


def test_a_vocabulary_of_one_absurd_id_is_refused_at_once(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a":2147483647}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(TokenizerError, match="exceeds the limit of 1000000"):
        Tokenizer.from_pretrained(tmp_path)


def test_settings_beside_the_vocabulary_do_not_change_the_ids(tmp_path):
    save_checkpoint(open_checkpoint(SHAKESPEARE), tmp_path / "hf")
    raw = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    raw["truncation"] = {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    raw["padding"] = {
        "strategy": {"Fixed": 200},
        "direction": "Right",
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
        "pad_to_multiple_of": None,
    }
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(raw))
    text = "To be, or not to be, that is the question"
    assert Tokenizer.from_pretrained(tmp_path / "hf").encode(text) == Tokenizer.from_pretrained(SHAKESPEARE).encode(
        text
    )


def test_added_tokens_stand_for_themselves(tmp_path):
    (tmp_path / "tokenizer.json").write_text(
        tokenizer_json(added_tokens=[{"id": 2, "content": "<|endoftext|>"}, {"id": 4, "content": "<pad>"}])
    )
    assert Tokenizer.from_pretrained(tmp_path).encode("a<pad>b") == [0, 4, 1]


# ------------------------------------------------------------------------------------------------------ the terminal


def test_control_characters_from_a_file_do_not_reach_the_terminal(gpt2x, tmp_path):
    arrays = arrays_of(random_checkpoint())
    arrays["evil\x1b[2J\x07"] = np.zeros(1, np.float32)
    safetensors.numpy.save_file(arrays, tmp_path / "m.safetensors")
    result = gpt2x("inspect", tmp_path / "m.safetensors")
    assert result.exit_code == 1
    assert "\x1b" not in result.output
    assert "\\x1b[2J" in result.stderr
