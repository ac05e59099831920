"""Any format: what is missing, unknown, contradicted or not weights at all is said, everything at once."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from checkpoints import TINY, arrays_of, assemble, assert_same_bytes, random_checkpoint

from converters import (
    Checkpoint,
    CheckpointError,
    ConfigError,
    ConversionError,
    FormatError,
    GPT2Config,
    LazyTensor,
    UnknownHeadsError,
    UnsafeError,
    open_checkpoint,
    save_checkpoint,
)
from converters.config import from_hf, to_hf
from converters.formats.tensorflow import from_hparams, to_hparams
from converters.tensors import BF16, F16, F32, F64

# -------------------------------------------------------------------------------------------------- the shard index


@pytest.fixture
def shards(tmp_path, tiny):
    """Two safetensors shards and their index."""
    names = list(tiny.tensors)
    arrays = arrays_of(tiny)
    weight_map = {}
    for number, part in ((1, names[:9]), (2, names[9:])):
        file = f"model-{number:05}-of-00002.safetensors"
        safetensors.numpy.save_file({name: arrays[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(TINY)))
    write_index(tmp_path, weight_map)
    return tmp_path


def write_index(folder, weight_map, **more):
    value = {"metadata": {}, "weight_map": weight_map, **more}
    (folder / "model.safetensors.index.json").write_text(json.dumps(value))


def weight_map(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize("name", ["", "model.safetensors.index.json"])
def test_shards_open_as_one(shards, tiny, name):
    back = open_checkpoint(shards / name)
    assert back.format == "safetensors shards"
    assert_same_bytes(tiny, back)


def test_shards_of_transformers_open_as_one(tmp_path):
    from transformers import GPT2Config as TheirConfig
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(TheirConfig(vocab_size=13, n_positions=10, n_embd=6, n_layer=2, n_head=2))
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    for name, array in arrays_of(open_checkpoint(tmp_path)).items():
        assert array.tobytes() == model.transformer.state_dict()[name].numpy().tobytes()


@pytest.mark.parametrize("zipped", [True, False])
def test_shards_of_bin_files_open_as_one(tmp_path, tiny, zipped):
    names = list(tiny.tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
    for file, part in parts.items():
        state = {name: torch.from_numpy(tiny.tensors[name].read()) for name in part}
        torch.save(state, tmp_path / file, _use_new_zipfile_serialization=zipped)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same_bytes(tiny, open_checkpoint(tmp_path, n_head=2))


@pytest.mark.parametrize(
    "name", ["../m.safetensors", "/etc/passwd", "a/../../m", "..", ".", "", "a\\..\\b", "a\0b", "./m"]
)
def test_a_path_that_leaves_the_folder_is_refused(shards, name):
    write_index(shards, {**weight_map(shards), "wte.weight": name})
    with pytest.raises(UnsafeError, match="not a file beside it"):
        open_checkpoint(shards)


def test_a_missing_shard_is_refused(shards):
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match="model-00002-of-00002.safetensors: no such file") as error:
        open_checkpoint(shards)
    assert str(error.value).endswith(
        "missing: 1 of the 2 files that model.safetensors.index.json names: model-00002-of-00002.safetensors; "
        "download or copy again what is missing"
    )


def test_a_name_in_two_shards_is_refused(shards, tiny):
    arrays = {name: tiny.tensors[name].read() for name, f in weight_map(shards).items() if f.startswith("model-00002")}
    arrays["wte.weight"] = tiny.tensors["wte.weight"].read()
    safetensors.numpy.save_file(arrays, shards / "model-00002-of-00002.safetensors")
    with pytest.raises(FormatError, match="wte.weight is in two of its files"):
        open_checkpoint(shards)


def test_a_name_that_the_index_does_not_list_is_refused(shards):
    index = weight_map(shards)
    del index["wte.weight"]
    write_index(shards, index)
    with pytest.raises(FormatError, match="holds wte.weight, but the index states otherwise"):
        open_checkpoint(shards)


def test_a_name_that_no_shard_holds_is_refused(shards):
    write_index(shards, {**weight_map(shards), "ghost": "model-00001-of-00002.safetensors"})
    with pytest.raises(FormatError, match="ghost is not in"):
        open_checkpoint(shards)


@pytest.mark.parametrize("value", [{}, [], None, {"a": 1}, "x"])
def test_an_index_without_a_sound_map_is_refused(shards, value):
    write_index(shards, value)
    with pytest.raises(FormatError, match="no valid weight_map"):
        open_checkpoint(shards)


# ------------------------------------------------------------------------------------------ tensors of any format


def saved(tmp_path, change):
    """A safetensors file of changed arrays, without a configuration."""
    arrays = arrays_of(random_checkpoint())
    change(arrays)
    safetensors.numpy.save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def opened(tmp_path, change, **options):
    return open_checkpoint(saved(tmp_path, change), **{"n_head": 2, **options})


def test_everything_missing_is_listed_at_once(tmp_path):
    def change(arrays):
        del arrays["h.1.ln_2.bias"], arrays["wpe.weight"]

    with pytest.raises(CheckpointError) as error:
        opened(tmp_path, change)
    assert str(error.value) == (
        f"{tmp_path}/m.safetensors: not a GPT-2 checkpoint (closest dialect: hf)\n"
        "  missing   wpe.weight\n"
        "  missing   h.1.ln_2.bias"
    )


def test_an_unknown_tensor_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"unknown   h.0.attn.rotary"):
        opened(tmp_path, lambda arrays: arrays.update({"h.0.attn.rotary": np.zeros(3, np.float32)}))


def test_a_missing_layer_between_others_is_refused(tmp_path):
    def change(arrays):
        for name in [n for n in arrays if n.startswith("h.1.")]:
            arrays[name.replace("h.1.", "h.7.")] = arrays.pop(name)

    with pytest.raises(CheckpointError, match="gap       layer 1 is missing, but there is a layer 7"):
        opened(tmp_path, change)


def test_mixed_orientation_is_refused(tmp_path):
    def change(arrays):
        arrays["h.1.attn.c_attn.weight"] = arrays["h.1.attn.c_attn.weight"].T

    with pytest.raises(CheckpointError, match=r"h.1.attn.c_attn.weight is \(18, 6\), .* needs \(6, 18\)"):
        opened(tmp_path, change)


def test_integers_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="integers  ln_f.bias is I32"):
        opened(tmp_path, lambda arrays: arrays.update({"ln_f.bias": np.zeros(6, np.int32)}))


def test_a_width_that_the_heads_do_not_divide_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="n_embd 6 is not divisible by n_head 4"):
        opened(tmp_path, lambda arrays: None, n_head=4)


def test_matrices_that_are_none_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="must be matrices"):
        opened(tmp_path, lambda arrays: arrays.update({"wte.weight": np.zeros(6, np.float32)}))


def test_a_file_of_something_else_is_refused(tmp_path):
    safetensors.numpy.save_file({"bert.pooler": np.zeros(3, np.float32)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="none of its 1 tensors has a name of a GPT-2 parameter"):
        open_checkpoint(tmp_path / "m.safetensors")


def test_a_long_list_of_faults_is_cut(tmp_path):
    with pytest.raises(CheckpointError, match="and 10 more"):
        opened(tmp_path, lambda arrays: arrays.update({f"x{i}": np.zeros(1, np.float32) for i in range(30)}))


# ------------------------------------------------------------------------------------------------------- lm_head


def other_head(arrays):
    arrays["lm_head.weight"] = arrays["wte.weight"] + 1


def test_a_copy_of_the_embedding_is_dropped(tmp_path):
    back = opened(tmp_path, lambda arrays: arrays.update({"lm_head.weight": arrays["wte.weight"]}))
    assert back.left_out == ("lm_head.weight",)
    assert back.config.tie_word_embeddings


def test_an_output_that_differs_is_refused_unless_it_is_dropped_on_purpose(tmp_path):
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from wte.weight.*\n.*--tie"):
        opened(tmp_path, other_head)
    tied = opened(tmp_path, other_head, tie=True)
    assert "lm_head.weight" not in tied.tensors
    assert tied.left_out == ("lm_head.weight",)


def test_an_untied_output_is_the_seventeenth_parameter(tmp_path):
    saved(tmp_path, other_head)
    (tmp_path / "config.json").write_text(json.dumps({**to_hf(TINY), "tie_word_embeddings": False}))
    untied = open_checkpoint(tmp_path)
    assert untied.tensors["lm_head.weight"].shape == (13, 6)
    save_checkpoint(untied, tmp_path / "hf")
    assert_same_bytes(untied, open_checkpoint(tmp_path / "hf"))
    with pytest.raises(CheckpointError, match="untied lm_head"):
        save_checkpoint(untied, tmp_path / "tf", "tf")
    assert not (tmp_path / "tf").exists()


def test_an_untied_output_that_is_missing_is_refused(tmp_path):
    saved(tmp_path, lambda arrays: None)
    (tmp_path / "config.json").write_text(json.dumps({**to_hf(TINY), "tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"missing   lm_head.weight"):
        open_checkpoint(tmp_path)


# -------------------------------------------------------------------------------------------------- configuration


def test_heads_are_asked_for_where_nothing_states_them(tmp_path):
    with pytest.raises(UnknownHeadsError, match="--n-head N"):
        opened(tmp_path, lambda arrays: None, n_head=None)
    back = opened(tmp_path, lambda arrays: None)
    assert back.config.n_head == 2
    assert back.notes == ("n_head is 2, as given",)


def lazy(config):
    """A checkpoint of a published size without its gigabytes."""
    from converters.containers.container import Container

    def never():
        raise AssertionError("nothing is read")

    tensors = {name: LazyTensor(F32, shape, never) for name, shape in config.shapes().items()}
    return lambda stated, n_head=None: assemble(
        Container("m", Path("m"), tensors), stated, "config.json", n_head=n_head
    )


@pytest.mark.parametrize(
    ("size", "layers", "width", "heads", "parameters"),
    [
        ("124M", 12, 768, 12, 124_439_808),
        ("355M", 24, 1024, 16, 354_823_168),
        ("774M", 36, 1280, 20, 774_030_080),
        ("1558M", 48, 1600, 25, 1_557_611_200),
        ("distilgpt2", 6, 768, 12, 81_912_576),
    ],
)
def test_a_published_size_is_recognised_and_said(size, layers, width, heads, parameters):
    opened = lazy(GPT2Config(n_layer=layers, n_embd=width, n_head=heads))({})
    assert opened.config.n_head == heads
    assert opened.config.size_name == size
    assert opened.parameters == parameters
    assert size in opened.notes[0]


def test_other_heads_than_the_published_size_has_are_refused():
    with pytest.raises(ConfigError, match="published 124M, which has 12 heads, but --n-head is 16"):
        lazy(GPT2Config())({}, n_head=16)


def test_heads_that_contradict_the_configuration_are_refused():
    with pytest.raises(ConfigError, match=r"n_head is 12 in config.json, but --n-head is 16"):
        lazy(GPT2Config())({"n_head": 12}, n_head=16)


def test_a_configuration_that_the_shapes_contradict_is_refused_with_every_contradiction():
    with pytest.raises(ConfigError) as error:
        lazy(GPT2Config())({"n_ctx": 512, "n_vocab": 50256, "n_head": 12})
    assert "n_ctx is 1024 in the tensors, 512 in config.json" in str(error.value)
    assert "n_vocab is 50257 in the tensors, 50256 in config.json" in str(error.value)


def test_a_configuration_without_a_feed_forward_width_means_four_times_the_width():
    narrow = lazy(GPT2Config(n_inner=1024))
    with pytest.raises(ConfigError, match="n_inner is 1024 in the tensors, 3072 in config.json"):
        narrow(from_hf({"n_embd": 768, "n_head": 12, "n_inner": None}, "config.json"))
    assert narrow(from_hf({"n_embd": 768, "n_head": 12, "n_inner": 1024}, "config.json")).config.n_inner == 1024


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "gelu"},
        {"n_inner": 7},
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        {"layer_norm_epsilon": 1e-6, "scale_attn_weights": False, "tie_word_embeddings": False},
        {"resid_pdrop": 0.0, "eos_token_id": None, "bos_token_id": 3},
    ],
)
def test_a_configuration_survives_its_file(change):
    config = GPT2Config(**{**vars(TINY), **change})
    assert GPT2Config(**from_hf(json.loads(json.dumps(to_hf(config))), "x")) == config


def test_transformers_and_gpt2x_read_one_configuration_alike(tmp_path):
    from transformers import GPT2Config as Theirs

    theirs = Theirs(vocab_size=13, n_positions=10, n_embd=6, n_layer=2, n_head=2, activation_function="gelu", n_inner=7)
    theirs.save_pretrained(tmp_path)
    ours = GPT2Config(**from_hf(json.loads((tmp_path / "config.json").read_text()), "x"))
    (tmp_path / "config.json").write_text(json.dumps(to_hf(ours)))
    back = Theirs.from_pretrained(tmp_path)
    for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function"):
        assert getattr(back, key) == getattr(theirs, key)


@pytest.mark.parametrize(
    "raw",
    [
        {"attn_mult": 2.0},
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"quantization_config": {"bits": 4}},
        {"add_cross_attention": True},
        {"pruned_heads": {"0": [1]}},
        {"some_new_switch": 1},
    ],
)
def test_a_key_that_may_change_the_arithmetic_is_refused(raw):
    with pytest.raises(ConfigError, match=next(iter(raw))):
        from_hf({**to_hf(TINY), "architectures": ["OwnGPT2"], **raw}, "config.json")


@pytest.mark.parametrize(
    "raw", [{"add_cross_attention": False}, {"pruned_heads": {}}, {"use_cache": True}, {"auto_map": None}]
)
def test_a_key_that_is_off_or_does_no_arithmetic_is_let_pass(raw):
    from_hf({**to_hf(TINY), **raw}, "config.json")


def test_the_published_configuration_of_2019_is_read():
    raw = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
        "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
        "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
        "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
        "summary_use_proj": True, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    }  # fmt: skip
    assert GPT2Config(**from_hf(raw, "x")) == GPT2Config()


def test_another_kind_of_model_is_refused():
    with pytest.raises(ConfigError, match="model_type is 'llama'"):
        from_hf({"model_type": "llama"}, "config.json")


@pytest.mark.parametrize("raw", [{"n_vocab": 13}, {**to_hparams(TINY), "n_experts": 8}])
def test_hparams_of_something_else_are_refused(raw):
    with pytest.raises(ConfigError, match="not the hparams of a GPT-2"):
        from_hparams(raw, "hparams.json")


@pytest.mark.parametrize(
    "fields",
    [
        {"n_layer": 0}, {"n_head": -1}, {"n_embd": 7}, {"n_vocab": 1.5}, {"n_ctx": True}, {"n_ctx": None}, {"n_inner": "x"},
        {"activation_function": "gelu_quick"}, {"activation_function": 3}, {"layer_norm_epsilon": 0}, {"layer_norm_epsilon": float("nan")},
        {"scale_attn_weights": 1}, {"tie_word_embeddings": "yes"}, {"resid_pdrop": 1.5}, {"initializer_range": -1},
        {"n_layer": 2**40}, {"n_head": []},
    ],
)  # fmt: skip
def test_an_impossible_configuration_is_refused(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        GPT2Config(**{**vars(TINY), "n_inner": 24, **fields})


def test_every_fault_of_a_configuration_is_listed():
    with pytest.raises(ConfigError) as error:
        GPT2Config(n_layer=0, activation_function="x")
    assert "n_layer" in str(error.value)
    assert "activation_function" in str(error.value)


def test_a_broken_configuration_file_is_refused(tmp_path, tiny):
    save_checkpoint(tiny, tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text("{")
    with pytest.raises(FormatError, match="invalid JSON"):
        open_checkpoint(tmp_path / "hf")


def test_two_configurations_that_disagree_are_refused(tmp_path, tiny):
    save_checkpoint(tiny, tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**to_hf(TINY), "activation_function": "gelu"}))
    with pytest.raises(
        CheckpointError, match="activation_function is 'gelu_new' in model.safetensors, 'gelu' in config.json"
    ):
        open_checkpoint(tmp_path / "hf")
    assert open_checkpoint(tmp_path / "hf" / "model.safetensors").config == TINY  # alone, it speaks for itself


# ------------------------------------------------------------------------------------ files that are no weights


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548105171\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page"),
        (b"\n  <html>", "a web page"),
        (b"\x1f\x8b\x08" + b"\0" * 40, "compressed archive"),
        (b"hello, world, this is text", "unknown format"),
        (b"\x80\x04\x95", "a pickle, but not one of torch.save"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_in_the_place_of_weights_is_named_from_its_directory_too(tmp_path, content, match, name):
    if name == "model.safetensors" and content[:5] == b"hello":
        match = "header"
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(FormatError, match=match):
            open_checkpoint(path)


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        open_checkpoint(tmp_path / "nothing")


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FormatError, match="no weights in this directory"):
        open_checkpoint(tmp_path)


def test_a_folder_with_several_weight_files_asks_which(tmp_path, tiny):
    for name in ("a", "b"):
        save_checkpoint(tiny, tmp_path / f"{name}.safetensors")
    with pytest.raises(FormatError, match="several weight files"):
        open_checkpoint(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    assert_same_bytes(tiny, open_checkpoint(tmp_path))


def test_a_pipe_or_device_is_refused_without_waiting_for_it(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(FormatError, match="not a regular file"):
            open_checkpoint(path)


def test_a_source_that_shrinks_while_it_is_read_is_noticed(tmp_path, tiny):
    save_checkpoint(tiny, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    with open(tmp_path / "m.safetensors", "r+b") as f:
        f.truncate(1000)
    with pytest.raises(FormatError, match="changed while it was read"):
        arrays_of(checkpoint)


def test_a_source_that_changes_while_it_is_read_is_noticed(tmp_path, tiny):
    import os

    save_checkpoint(tiny, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    with open(tmp_path / "m.safetensors", "r+b") as f:
        f.seek(-4, 2)
        f.write(b"\0\0\0\0")
    os.utime(tmp_path / "m.safetensors", ns=(1, 1))
    with pytest.raises(FormatError, match="changed while it was read"):
        arrays_of(checkpoint)


# ---------------------------------------------------------------------------------------------------------- casts


@pytest.mark.parametrize(("dtype", "name"), [(F16, "float16"), (BF16, "bfloat16"), (F64, "float64")])
def test_casts_round_as_torch_rounds(dtype, name):
    rng = np.random.default_rng(0)
    special = [0.0, -0.0, 1.0009765625, 1.00048828125, 6e-8, 2e-8, 65504, -65519.9, 1 / 3, np.inf, -np.inf, np.nan]
    values = np.concatenate([rng.normal(size=100_000).astype(np.float32), np.array(special, np.float32)])
    ours = LazyTensor.of(values).cast(dtype, "x").read()
    theirs = torch.from_numpy(values).to(getattr(torch, name))
    finite_or_inf = ~np.isnan(values)  # a NaN stays one, but its payload is nobody's promise
    raw = theirs.view(torch.uint8).numpy().view(dtype.numpy)
    assert ours[finite_or_inf].tobytes() == raw[finite_or_inf].tobytes()
    assert np.isnan(LazyTensor.of(ours, dtype).cast(F64, "x").read()[~finite_or_inf]).all()


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_widening_is_exact_and_narrowing_again_gives_the_same_bits(dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    narrow = LazyTensor.of(bits, BF16) if dtype == BF16 else LazyTensor.of(bits.view(np.float16))
    back = narrow.cast(F32, "x").cast(dtype, "x").read().view(np.uint16)
    wide = narrow.cast(F32, "x").read()
    assert np.array_equal(back[~np.isnan(wide)], bits[~np.isnan(wide)])


def test_a_cast_that_overflows_is_refused_and_leaves_nothing(tmp_path):
    tensors = dict(random_checkpoint().tensors)
    tensors["ln_f.bias"] = LazyTensor.of(np.array([1, 2, 3, 4, 5, 70_000], np.float32))
    large = Checkpoint(config=TINY, tensors=tensors)
    with pytest.raises(ConversionError, match=r"ln_f.bias: 70000 does not fit into F16"):
        save_checkpoint(large.cast(F16), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(large.cast(BF16), tmp_path / "m.safetensors")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64])
def test_what_is_not_finite_in_any_number_format_is_warned_of_by_name(tmp_path, value, dtype):
    tensors = dict(random_checkpoint().tensors)
    tensors["h.1.ln_1.bias"] = LazyTensor.of(np.array([1, 2, value, 4, 5, 6], np.float32))
    warnings = []
    save_checkpoint(
        Checkpoint(config=TINY, tensors=tensors).cast(dtype), tmp_path / "m.safetensors", warn=warnings.append
    )
    assert warnings == ["h.1.ln_1.bias holds NaN or infinity"]


def test_large_finite_values_are_not_warned_of(tmp_path):
    tensors = dict(random_checkpoint().tensors)
    tensors["ln_f.bias"] = LazyTensor.of(np.full(6, 3e38, np.float32))  # their sum overflows
    warnings = []
    save_checkpoint(Checkpoint(config=TINY, tensors=tensors), tmp_path / "m.safetensors", warn=warnings.append)
    assert warnings == []
