"""Every dialect is complete, one-to-one and invertible; and the model of a checkpoint is found in its names."""

import numpy as np
import pytest
from checkpoints import TINY, arrays_of, assemble, assert_same_bytes, random_checkpoint

from converters import Checkpoint, CheckpointError, GPT2Config, LazyTensor
from converters.containers.container import Container
from converters.dialects import (
    DIALECTS,
    HF,
    LLMS_FROM_SCRATCH,
    OPENAI,
    HeadsFirst,
    HeadsLast,
    Joined,
    Place,
    Same,
    Transposed,
    places_of,
)
from converters.spec import SPEC, rows

dialects = pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.name)


@dialects
def test_a_dialect_names_exactly_the_sixteen_parameters(dialect):
    assert set(dialect.table) == set(SPEC)
    assert len(SPEC) == 16


@dialects
def test_a_dialect_gives_148_parameters_of_gpt2_small_148_names(dialect):
    names = [dialect.names(name) for _, _, name in rows(12)]
    assert len(names) == 148
    every = [name for group in names for name in group]
    assert len(set(every)) == len(every) >= 148


@dialects
def test_a_dialect_finds_its_way_back_from_every_name(dialect):
    for prefix in dialect.prefixes:
        for row, layer, name in rows(12):
            for part, found in enumerate(dialect.names(name)):
                assert dialect.locate(prefix + found, prefix) == Place(row, layer, part)


@dialects
def test_a_dialect_writes_what_it_reads_back_to_the_same_bytes(dialect, tmp_path):
    tiny = random_checkpoint()
    written = dialect.write(tiny.tensors, tiny.config)
    back = assemble(Container("memory", tmp_path, written), {"n_head": 2}, "the test")
    assert back.dialect == dialect.name
    assert_same_bytes(tiny, back)


def test_the_kernels_of_openai_have_a_leading_axis_and_nothing_else_has():
    written = OPENAI.write(random_checkpoint().tensors, TINY)
    assert {name for name, t in written.items() if len(t.shape) == 3} == {
        f"model/h{i}/{part}/w" for i in (0, 1) for part in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
    }


def test_an_axis_of_one_that_is_no_leading_axis_stays(tmp_path):
    narrow = random_checkpoint(GPT2Config(n_layer=1, n_head=1, n_embd=1, n_ctx=3, n_vocab=2, n_inner=1))
    back = assemble(
        Container("m", tmp_path, OPENAI.write(narrow.tensors, GPT2Config())), {"n_head": 1, "n_inner": 1}, "x"
    )
    assert_same_bytes(narrow, back)


def concatenated(tensors):
    return np.concatenate([tensor.read() for tensor in tensors], axis=-1)


@pytest.mark.parametrize("layout", [Same, Transposed, HeadsLast])
def test_query_key_and_value_of_their_own_are_side_by_side_in_the_canonical_parameter(layout):
    config = random_checkpoint().config
    joined = Joined((layout("query"), layout("key"), layout("value")))
    parts = [LazyTensor.of(np.arange(i, i + 36, dtype=np.float32).reshape(6, 6)) for i in (0, 100, 200)]
    stored = [layout("x").write(part, config) for part in parts]
    whole = joined.read(stored)
    assert (whole.read() == concatenated(parts)).all()
    again = joined.write(whole, config)
    for before, after in zip(stored, again, strict=True):
        assert after.shape == before.shape
        assert (after.read() == before.read()).all()


def test_a_bias_in_heads_is_joined_to_a_vector():
    config = random_checkpoint().config
    joined = Joined((HeadsLast("query"), HeadsLast("key"), HeadsLast("value")))
    parts = [LazyTensor.of(np.arange(i, i + 6, dtype=np.float32).reshape(2, 3)) for i in (0, 10, 20)]
    whole = joined.read(parts)
    assert whole.read().tolist() == [*range(6), *range(10, 16), *range(20, 26)]
    assert [part.read().tolist() for part in joined.write(whole, config)] == [part.read().tolist() for part in parts]


def test_the_heads_of_an_output_projection_are_its_first_axis():
    config = random_checkpoint().config
    kernel = LazyTensor.of(np.arange(36, dtype=np.float32).reshape(2, 3, 6))
    matrix = HeadsFirst("output").read(kernel)
    assert (matrix.read() == kernel.read().reshape(6, 6)).all()
    assert HeadsFirst("output").write(matrix, config).shape == (2, 3, 6)


def test_parts_stored_as_linear_layers_are_streamed_without_a_transpose(monkeypatch):
    joined = Joined((Transposed("query"), Transposed("key"), Transposed("value")))
    parts = [LazyTensor.of(np.arange(i, i + 36, dtype=np.float32).reshape(6, 6)) for i in (0, 100, 200)]
    monkeypatch.setattr("converters.arrays.columns_of", None)
    rows = joined.read(parts).transposed().read()  # [out, in], as GGUF and nanoGPT store it
    assert (rows == np.concatenate([part.read() for part in parts])).all()


@pytest.mark.parametrize(
    ("shape", "dtype"), [((6, 5), np.float32), ((5, 6), np.float32), ((6,), np.float32), ((6, 6), np.float16)]
)
def test_parts_of_different_shapes_or_dtypes_are_refused(tmp_path, shape, dtype):
    tiny = random_checkpoint()
    written = LLMS_FROM_SCRATCH.write(tiny.tensors, tiny.config)
    written["trf_blocks.1.att.W_key.weight"] = LazyTensor.of(np.zeros(shape, dtype))
    with pytest.raises(CheckpointError, match=r"shape +trf_blocks\.1\.att\.W_"):
        assemble(Container("m", tmp_path, written), {"n_head": 2}, "x")


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_missing_part_is_named(tmp_path, kind):
    tiny = random_checkpoint()
    written = LLMS_FROM_SCRATCH.write(tiny.tensors, tiny.config)
    del written[f"trf_blocks.1.att.W_key.{kind}"]
    with pytest.raises(CheckpointError, match=rf"missing   trf_blocks\.1\.att\.W_key\.{kind}$"):
        assemble(Container("m", tmp_path, written), {"n_head": 2}, "x")


def test_query_key_and_value_without_biases_get_zeros_and_a_note(tmp_path):
    tiny = random_checkpoint()
    written = LLMS_FROM_SCRATCH.write(tiny.tensors, tiny.config)
    unbiased = {name: tensor for name, tensor in written.items() if not (".W_" in name and name.endswith("bias"))}
    back = assemble(Container("m", tmp_path, unbiased), {"n_head": 2}, "x")
    assert back.tensors["h.1.attn.c_attn.bias"].read().tolist() == [0] * 18
    assert back.notes == ("it has no biases h.{i}.attn.c_attn.bias; zeros are used",)


@pytest.mark.parametrize(
    ("template", "name", "layer"),
    [
        ("h.{i}.ln_1.bias", "h.0.ln_1.bias", 0),
        ("h.{i}.ln_1.bias", "h.11.ln_1.bias", 11),
        ("h.{i}.ln_1.bias", "h.01.ln_1.bias", None),
        ("h.{i}.ln_1.bias", "h..ln_1.bias", None),
        ("h.{i}.ln_1.bias", "h.-1.ln_1.bias", None),
        ("h.{i}.ln_1.bias", "h.²ln_1.bias", None),
        ("h.{i}.ln_1.bias", "h.99999999999.ln_1.bias", None),
        ("h.{i}.attn.bias", "h.0.attn.c_attn.bias", None),
        ("wte.weight", "wte.weight", -1),
        ("wte.weight", "xwte.weight", None),
    ],
)
def test_a_template_matches_whole_names_with_plain_numbers(template, name, layer):
    assert dict(places_of(name)).get(template) == layer


def test_the_mask_is_left_out_only_at_its_exact_name(tmp_path):
    tiny = random_checkpoint()
    masks = {f"h.{i}.attn.{name}": tiny.tensors["ln_f.bias"] for i in (0, 1) for name in ("bias", "masked_bias")}
    back = assemble(Container("m", tmp_path, {**tiny.tensors, **masks}), {"n_head": 2}, "x")
    assert set(back.left_out) == set(masks)
    assert "h.0.attn.c_attn.bias" in back.tensors


def test_a_prefix_is_taken_off(tmp_path):
    tiny = random_checkpoint()
    prefixed = {f"transformer.{name}": tensor for name, tensor in tiny.tensors.items()}
    assert_same_bytes(tiny, assemble(Container("m", tmp_path, prefixed), {"n_head": 2}, "x"))


def test_mixed_prefixes_are_refused(tmp_path):
    tensors = dict(random_checkpoint().tensors)
    tensors["transformer.ln_f.bias"] = tensors.pop("ln_f.bias")
    with pytest.raises(CheckpointError, match=r"missing   ln_f.bias\n  unknown   transformer.ln_f.bias"):
        assemble(Container("m", tmp_path, tensors), {"n_head": 2}, "x")


def test_only_the_published_arithmetic_can_be_written_as_openais():
    with pytest.raises(CheckpointError, match="activation_function is 'gelu', not 'gelu_new'"):
        OPENAI.write({}, GPT2Config(activation_function="gelu"))
    with pytest.raises(CheckpointError, match="n_inner is 1024"):
        OPENAI.write({}, GPT2Config(n_inner=1024))
    OPENAI.write({}, GPT2Config(activation_function="gelu_pytorch_tanh"))


def test_an_untied_output_cannot_be_written_as_openais_but_as_hugging_faces():
    untied = random_checkpoint(GPT2Config(**{**vars(TINY), "tie_word_embeddings": False}))
    assert "lm_head.weight" in HF.write(untied.tensors, untied.config)
    with pytest.raises(CheckpointError, match="untied lm_head"):
        OPENAI.write(untied.tensors, untied.config)


def test_a_checkpoint_is_complete_by_construction():
    tensors = dict(random_checkpoint().tensors)
    tensors["extra"] = tensors.pop("h.1.ln_2.bias")
    tensors["ln_f.bias"] = tensors["wte.weight"]
    with pytest.raises(CheckpointError) as error:
        Checkpoint(config=TINY, tensors=tensors)
    assert "missing   h.1.ln_2.bias" in str(error.value)
    assert "unknown   extra" in str(error.value)
    assert "shape     ln_f.bias is (13, 6), the configuration needs (6,)" in str(error.value)


def test_canonical_order_does_not_depend_on_the_file(tmp_path):
    tiny = random_checkpoint()
    shuffled = dict(sorted(tiny.tensors.items(), reverse=True))
    back = assemble(Container("m", tmp_path, shuffled), {"n_head": 2}, "x")
    assert list(arrays_of(back)) == list(TINY.shapes())
