"""Every format in, every format out: the same bytes, the same logits; and files that other programs wrote."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import msgpack
import numpy as np
import pytest
import torch
from checkpoints import TINY, arrays_of, assemble, assert_same_bytes, random_checkpoint
from commands import assert_refused, done
from paths import FIXTURES

import converters.dialects as dialects
from converters import FORMATS, WRITERS, CheckpointError, ConversionError, GPT2Config, open_checkpoint, save_checkpoint
from converters.containers.container import Container
from converters.containers.safetensors import write_safetensors
from converters.dialects import DIALECTS, FLAX, KERAS, MLX, NANOGPT, SAME_NAMES, Transposed
from converters.io.publishing import new_file
from converters.spec import ARITHMETIC
from converters.tensors import BF16, F16, F32, F64
from gpt2x import SHAKESPEARE, Tokenizer, export_onnx
from gpt2x.load import model_of

NAMES = {"safetensors": "m.safetensors", "bin": "m.bin", "nanogpt": "ckpt.pt", "llmc": "m.llmc", "gguf": "m.gguf"}
BY_OTHERS = ("hdf5", "msgpack", "legacy", "mlx", "onnx", "shards")
READERS = (*WRITERS, *BY_OTHERS)


def written(checkpoint, kind, folder):
    """A file of the format ``kind``, by our writer or else by the format's own library."""
    path = folder / NAMES.get(kind, kind)
    if kind in WRITERS:
        save_checkpoint(checkpoint, path, kind)
    elif kind == "shards":
        save_checkpoint(checkpoint, path, "hf", max_shard_size=checkpoint.nbytes // 3)
    elif kind == "onnx":
        export_onnx(checkpoint, path, need_tokenizer=False)
        path = path / "onnx" / "model.onnx"
    else:
        path.mkdir()
        save_checkpoint(replace(checkpoint, tokenizer=None), path / "made", "hf")
        (path / "made" / "config.json").rename(path / "config.json")
        path = globals()[f"write_{kind}"](checkpoint, path)
    return path


def write_hdf5(checkpoint, folder):
    with h5py.File(folder / "tf_model.h5", "w") as file:
        for name, tensor in KERAS.write(checkpoint.tensors, checkpoint.config).items():
            file.create_dataset(name, data=tensor.read())
    return folder / "tf_model.h5"


def write_msgpack(checkpoint, folder):
    """As ``flax.serialization.msgpack_serialize`` packs it."""
    tree: dict = {}
    for name, tensor in FLAX.write(checkpoint.tensors, checkpoint.config).items():
        array, here = tensor.read(), tree
        *above, leaf = name.split("/")
        for key in above:
            here = here.setdefault(key, {})
        packed = msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True)
        here[leaf] = msgpack.ExtType(1, packed)
    (folder / "flax_model.msgpack").write_bytes(msgpack.packb(tree, strict_types=True))
    return folder / "flax_model.msgpack"


def write_legacy(checkpoint, folder):
    state = {name: torch.from_numpy(array) for name, array in arrays_of(checkpoint).items()}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder


def write_mlx(checkpoint, folder):
    with new_file(folder / "model.safetensors") as out:
        write_safetensors(out, MLX.write(checkpoint.tensors, checkpoint.config))
    return folder


MODELS = {"random": random_checkpoint, "shakespeare": lambda: open_checkpoint(SHAKESPEARE)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """(model, format) -> (the model, a file of it), each made once."""
    made = {}

    def source(model, kind):
        if (model, kind) not in made:
            checkpoint = MODELS[model]()
            made[model, kind] = checkpoint, written(checkpoint, kind, tmp_path_factory.mktemp(f"{model}-{kind}"))
        return made[model, kind]

    return source


def logits(checkpoint):
    """Of ten tokens: (1, 10, V)."""
    with torch.no_grad():
        return model_of(checkpoint)(torch.arange(10)[None])[0]


# ------------------------------------------------------------------------------------------------------ all pairs


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_and_every_writer_give_the_same_bytes(sources, tmp_path, model, reader, writer):
    checkpoint, path = sources(model, reader)
    read = open_checkpoint(path)
    assert_same_bytes(checkpoint, read)
    target = tmp_path / NAMES.get(writer, writer)
    save_checkpoint(read, target, writer)
    back = open_checkpoint(target)
    assert_same_bytes(checkpoint, back)
    assert not back.config.differences(checkpoint.config, ARITHMETIC)


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_gives_the_same_logits(sources, reader):
    checkpoint, path = sources("random", reader)
    assert torch.equal(logits(checkpoint), logits(open_checkpoint(path)))


ROWS = [(d, row) for d in DIALECTS for row, layout in d.table.items() if isinstance(layout, Transposed)]


@pytest.mark.parametrize(("dialect", "row"), ROWS, ids=[f"{d.name}-{row}" for d, row in ROWS])
def test_a_transpose_that_is_forgotten_is_seen_in_the_shapes_or_in_the_logits(tmp_path, monkeypatch, dialect, row):
    """The projection of attention is square: no shape says which way round it is."""
    tiny = random_checkpoint()
    files = Container("m", tmp_path, dialect.write(tiny.tensors, tiny.config))
    wrong = replace(dialect, table={**dialect.table, row: dialects.Same(dialect.table[row].name)})
    monkeypatch.setattr(dialects, "DIALECTS", (wrong,))  # another dialect might read the same names
    stated = {"n_head": 2, "activation_function": "gelu_new"}
    if row != "h.{i}.attn.c_proj.weight":
        with pytest.raises(CheckpointError):
            assemble(files, stated, "x")
        return
    assert (logits(tiny) - logits(assemble(files, stated, "x"))).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [F16, BF16, F64], ids=str)
@pytest.mark.parametrize("writer", ["safetensors", "bin", "hf", "tf", "nanogpt"])
def test_formats_without_a_number_format_of_their_own_keep_any(tmp_path, dtype, writer):
    narrow = random_checkpoint().cast(dtype)
    save_checkpoint(narrow, tmp_path / "m", writer)
    assert_same_bytes(narrow, open_checkpoint(tmp_path / "m"))


@pytest.mark.parametrize(("writer", "dtype"), [("llmc", BF16), ("llmc", F16), ("gguf", BF16), ("gguf", F16)], ids=str)
def test_what_llmc_and_gguf_widen_is_the_same_when_narrowed_again(tmp_path, writer, dtype):
    narrow = random_checkpoint().cast(dtype)
    save_checkpoint(narrow, tmp_path / "m", writer)
    assert_same_bytes(narrow, open_checkpoint(tmp_path / "m").cast(dtype))


@pytest.mark.parametrize("writer", ["llmc", "gguf"])
def test_float64_is_refused_where_it_cannot_be_held_and_rounded_where_that_is_asked_for(tmp_path, writer):
    wide = random_checkpoint().cast(F64)
    with pytest.raises(CheckpointError, match="--dtype fp32"):
        save_checkpoint(wide, tmp_path / "m", writer)
    save_checkpoint(wide, tmp_path / "m", writer, dtype="fp32")
    assert_same_bytes(random_checkpoint(), open_checkpoint(tmp_path / "m"))


def test_a_conversion_from_one_transposed_layout_to_another_transposes_nothing(tmp_path, monkeypatch):
    save_checkpoint(random_checkpoint(), tmp_path / "ckpt.pt", "nanogpt")
    opened = open_checkpoint(tmp_path / "ckpt.pt")
    monkeypatch.setattr("converters.arrays.columns_of", None)
    save_checkpoint(opened, tmp_path / "m.gguf")


def test_a_large_matrix_is_transposed_a_block_at_a_time(monkeypatch):
    from converters import LazyTensor

    monkeypatch.setattr("converters.tensors.TRANSPOSED", 200)
    array = np.arange(17 * 23, dtype=np.float32).reshape(17, 23)
    turned = LazyTensor.of(array).transposed()
    assert (turned.read() == array.T).all()
    assert turned.transposed().read().tobytes() == array.tobytes()


# ------------------------------------------------------------------------------------------- files that others wrote


@pytest.mark.parametrize(
    ("path", "format", "dialect"),
    [
        ("keras/tf_model.h5", "hdf5", "keras"),
        ("keras_2019", "hdf5", "keras"),
        ("flax", "msgpack", "flax"),
        ("mlx", "safetensors", "mlx"),
        ("mlx/model.safetensors", "safetensors", "mlx"),
        ("nanogpt/ckpt.pt", "bin", "nanogpt"),
        ("llmc/gpt2.bin", "llmc", "llmc"),
        ("onnx_optimum", "onnx", "hf"),
        ("onnx_optimum/model.onnx", "onnx", "hf"),
    ],
)
def test_what_another_program_wrote_holds_the_values_that_it_was_given(path, format, dialect):
    """``tf_plain`` is TensorFlow's own file of the same values."""
    read = open_checkpoint(FIXTURES / path)
    assert (read.format, read.dialect) == (format, dialect)
    assert_same_bytes(open_checkpoint(FIXTURES / "tf_plain"), read)


def test_llmcs_bfloat16_is_the_same_model_rounded():
    expected = open_checkpoint(FIXTURES / "tf_plain").cast(BF16)
    assert_same_bytes(expected, open_checkpoint(FIXTURES / "llmc/gpt2_bf16.bin"))


@pytest.mark.parametrize(("kind", "dtype"), [("F32", F32), ("F16", F16), ("BF16", BF16)])
def test_a_gguf_of_its_own_writer_holds_the_values_that_it_was_given(kind, dtype):
    read = open_checkpoint(FIXTURES / f"gguf/{kind}.gguf")
    given = np.load(FIXTURES / "wide.npz")
    for name, tensor in read.tensors.items():
        array = given[dialects.GGUF.names(name)[0]]
        array = array.T if isinstance(dialects.GGUF.layout(name), Transposed) else array
        matrix = array.ndim == 2 and name != "wpe.weight"
        assert tensor.dtype == (dtype if matrix else F32)
        wanted = converted(array, tensor.dtype)
        assert tensor.read().tobytes() == wanted.tobytes(), name
    assert read.config.n_head == 2
    assert read.config.layer_norm_epsilon == 1e-5
    assert read.tokenizer.vocabulary().ids["ab"] == 10


def converted(array, dtype):
    from converters import LazyTensor

    return LazyTensor.of(np.ascontiguousarray(array)).cast(dtype, "x").read()


def test_q8_0_of_ggufs_own_writer_reads_as_what_it_stands_for_and_is_said_to_be_lossy(tmp_path):
    import gguf

    read = open_checkpoint(FIXTURES / "gguf/Q8_0.gguf")
    given = np.load(FIXTURES / "wide.npz")["blk.0.ffn_up.weight"]
    rounded = gguf.quants.quantize(given, gguf.GGMLQuantizationType.Q8_0)
    assert (
        gguf.quants.dequantize(rounded, gguf.GGMLQuantizationType.Q8_0) == read.tensors["h.0.mlp.c_fc.weight"].read().T
    ).all()
    assert "Q8_0" in read.notes[0]


def test_q8_0_is_rounded_as_ggufs_own_writer_rounds_it(tmp_path):
    """The same blocks, bit for bit; and so within half a step of each block's scale, and what its float16 loses."""
    save_checkpoint(open_checkpoint(FIXTURES / "gguf/F32.gguf"), tmp_path / "ours.gguf", dtype="q8_0")
    ours, theirs = (open_checkpoint(path) for path in (tmp_path / "ours.gguf", FIXTURES / "gguf/Q8_0.gguf"))
    assert_same_bytes(theirs, ours)
    before, after = (
        open_checkpoint(FIXTURES / "gguf/F32.gguf").tensors["wte.weight"].read(),
        ours.tensors["wte.weight"].read(),
    )
    step = np.abs(before).max(axis=1, keepdims=True) / 127
    assert (np.abs(before - after) <= step * (0.5 + 127 * 2**-11)).all()


def test_other_programs_quantized_weights_are_refused():
    with pytest.raises(CheckpointError, match="quantized by MLX"):
        open_checkpoint(FIXTURES / "mlx_quantised")


def test_ggufs_own_reader_finds_in_ours_what_was_written(tmp_path):
    import gguf

    checkpoint = open_checkpoint(SHAKESPEARE)
    save_checkpoint(checkpoint, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    arrays = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, tensor in dialects.GGUF.write(checkpoint.tensors, checkpoint.config).items():
        assert (arrays[name] == tensor.read()).all()
    assert len(arrays) == len(checkpoint.tensors)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    assert facts["general.architecture"] == "gpt2"
    assert facts["gpt2.attention.head_count"] == checkpoint.config.n_head
    vocabulary = checkpoint.tokenizer.vocabulary()
    assert [facts["tokenizer.ggml.tokens"][i] for i in vocabulary.ids.values()] == list(vocabulary.ids)
    assert facts["tokenizer.ggml.merges"] == [" ".join(pair) for pair in vocabulary.merges]


def test_the_tokenizer_goes_into_a_gguf_and_comes_out_of_it(tmp_path, gpt2x):
    done(gpt2x("convert", SHAKESPEARE, tmp_path / "m.gguf"))
    done(gpt2x("convert", tmp_path / "m.gguf", tmp_path / "hf"))
    expected = Tokenizer.from_pretrained(SHAKESPEARE)
    for place in ("m.gguf", "hf"):
        tokenizer = Tokenizer.from_pretrained(tmp_path / place)
        text = "ROMEO: But soft!<|endoftext|> é"
        assert tokenizer.encode(text) == expected.encode(text)
    assert Tokenizer.from_pretrained(tmp_path / "m.gguf").vocab_size == expected.vocab_size


def test_without_h5py_keras_files_say_what_to_install(gpt2x, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = gpt2x("convert", FIXTURES / "keras/tf_model.h5", tmp_path / "m.safetensors")
    assert_refused(result, "this needs h5py: pip install 'gpt2x[formats]'")


def test_a_flax_array_in_chunks_is_one_tensor(tmp_path):
    """Flax cuts what is larger than 1 GiB; here the same at 100 bytes."""
    save_checkpoint(open_checkpoint(FIXTURES / "flax"), tmp_path / "expected.safetensors")
    tree = msgpack.unpackb((FIXTURES / "flax/flax_model.msgpack").read_bytes(), strict_map_key=False)
    shape, kind, data = msgpack.unpackb(tree["transformer"]["wte"]["embedding"].data)
    parts = [data[i : i + 100] for i in range(0, len(data), 100)]
    chunks = {str(i): msgpack.ExtType(1, msgpack.packb(((len(p) // 4,), kind, p))) for i, p in enumerate(parts)}
    whole = {"__msgpack_chunked_array__": True, "shape": {"0": shape[0], "1": shape[1]}, "chunks": chunks}
    tree["transformer"]["wte"]["embedding"] = whole
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack.packb(tree))
    assert_same_bytes(open_checkpoint(FIXTURES / "flax"), open_checkpoint(tmp_path / "flax_model.msgpack", n_head=2))


# ------------------------------------------------------------------------------------------------------ nanoGPT


def test_nanogpts_optimizer_and_run_data_are_left_out_and_listed():
    read = open_checkpoint(FIXTURES / "nanogpt/ckpt.pt")
    assert {"optimizer", "iter_num", "best_val_loss", "config"} <= set(read.left_out)
    assert read.config.n_head == 2


def test_nanogpt_computes_the_exact_gelu_unless_something_beside_it_says_otherwise(tmp_path):
    read = open_checkpoint(FIXTURES / "nanogpt/ckpt.pt")
    assert read.config.activation_function == "gelu"
    assert any("activation_function is gelu" in note for note in read.notes)
    (tmp_path / "ckpt.pt").write_bytes((FIXTURES / "nanogpt/ckpt.pt").read_bytes())
    (tmp_path / "config.json").write_text('{"activation_function": "gelu_new"}')
    assert open_checkpoint(tmp_path / "ckpt.pt").config.activation_function == "gelu_new"


def test_a_nanogpt_without_biases_gets_zeros():
    read, full = (arrays_of(open_checkpoint(FIXTURES / f"{name}/ckpt.pt")) for name in ("nanogpt_no_bias", "nanogpt"))
    for name, array in full.items():
        assert (read[name] == (0 if name.endswith(".bias") else array)).all(), name


def test_some_biases_missing_is_another_matter(tmp_path):
    tensors = dict(NANOGPT.write(random_checkpoint().tensors, TINY))
    del tensors["transformer.h.0.ln_1.bias"]
    with pytest.raises(CheckpointError, match=r"missing   transformer.h.0.ln_1.bias"):
        assemble(Container("bin", tmp_path, tensors), {"n_head": 2}, "x")


def test_what_we_write_for_nanogpt_loads_as_its_code_loads_it(tmp_path):
    save_checkpoint(open_checkpoint(SHAKESPEARE), tmp_path / "ckpt.pt", "nanogpt")
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert set(saved["model_args"]) == {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert saved["model"]["lm_head.weight"].data_ptr() == saved["model"]["transformer.wte.weight"].data_ptr()
    assert saved["model"]["transformer.h.0.attn.c_attn.weight"].shape == (3 * 192, 192)


@pytest.mark.parametrize("key", ["use_rmsnorm", "n_kv_head"])
def test_a_fork_of_nanogpt_with_other_arithmetic_is_refused(tmp_path, key):
    saved = torch.load(FIXTURES / "nanogpt/ckpt.pt", weights_only=True)
    saved["model_args"][key] = 1
    torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(ConversionError, match=key):
        open_checkpoint(tmp_path / "ckpt.pt")


def test_padding_of_the_vocabulary_stays_unless_the_user_drops_it(tmp_path, gpt2x):
    """Trained rows of padding take part in the softmax: the user decides."""
    padded = random_checkpoint(GPT2Config(n_layer=1, n_head=1, n_embd=2, n_ctx=4, n_vocab=50304))
    save_checkpoint(padded, tmp_path / "ckpt.pt", "nanogpt")
    output = done(gpt2x("convert", tmp_path / "ckpt.pt", tmp_path / "all")).output
    assert "pass --n-vocab with the number of tokens of its tokenizer" in output
    assert "--n-vocab 50257" not in output  # the rows of added tokens would be lost
    assert open_checkpoint(tmp_path / "all").config.n_vocab == 50304
    done(gpt2x("convert", tmp_path / "ckpt.pt", tmp_path / "some", "--n-vocab", 50257))
    trimmed = open_checkpoint(tmp_path / "some")
    assert trimmed.config.n_vocab == 50257
    assert (trimmed.tensors["wte.weight"].read() == padded.tensors["wte.weight"].read()[:50257]).all()
    assert_refused(
        gpt2x("convert", tmp_path / "ckpt.pt", tmp_path / "more", "--n-vocab", 50305),
        "fewer than the 50305 rows of --n-vocab",
    )


def test_a_checksum_is_verified_even_of_a_vocabulary_that_is_trimmed(tmp_path):
    save_checkpoint(random_checkpoint(), tmp_path / "tf", "tf")
    data = bytearray((tmp_path / "tf/model.ckpt.data-00000-of-00001").read_bytes())
    data[-1] ^= 1  # of wte, the last tensor in the file
    (tmp_path / "tf/model.ckpt.data-00000-of-00001").write_bytes(data)
    (tmp_path / "tf/hparams.json").unlink()
    with pytest.raises(ConversionError, match="checksum"):
        save_checkpoint(open_checkpoint(tmp_path / "tf", n_head=2, n_vocab=5), tmp_path / "m.safetensors")


# ------------------------------------------------------------------------------- the output, switches and limits


def untied():
    return random_checkpoint(replace(TINY, tie_word_embeddings=False))


@pytest.mark.parametrize("writer", ["safetensors", "bin", "hf", "gguf"])
def test_an_output_of_its_own_is_kept_where_the_format_can_say_so(tmp_path, writer):
    save_checkpoint(untied(), tmp_path / "m", writer)
    back = open_checkpoint(tmp_path / "m")
    assert not back.config.tie_word_embeddings
    assert_same_bytes(untied(), back)


@pytest.mark.parametrize("writer", ["tf", "llmc", "nanogpt"])
def test_an_output_of_its_own_is_refused_elsewhere(tmp_path, writer):
    with pytest.raises(CheckpointError, match="untied lm_head"):
        save_checkpoint(untied(), tmp_path / "m", writer)
    assert list(tmp_path.iterdir()) == []


SWITCHED = [("activation_function", "relu"), ("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False)]


@pytest.mark.parametrize(("switch", "value"), SWITCHED)
@pytest.mark.parametrize("writer", ["tf", "llmc", "gguf", "nanogpt"])
def test_a_model_that_their_code_does_not_compute_is_not_written(tmp_path, writer, switch, value):
    with pytest.raises(CheckpointError, match=f"{switch} is {value!r}"):
        save_checkpoint(random_checkpoint(replace(TINY, **{switch: value})), tmp_path / "m", writer)
    assert list(tmp_path.iterdir()) == []


def test_gguf_keeps_another_epsilon_and_another_width(tmp_path):
    config = replace(TINY, layer_norm_epsilon=3e-6, n_inner=7)
    save_checkpoint(random_checkpoint(config), tmp_path / "m.gguf")
    assert not open_checkpoint(tmp_path / "m.gguf").config.differences(config)


def test_two_names_for_one_parameter_are_refused(tmp_path):
    tensors = dict(KERAS.write(random_checkpoint().tensors, TINY))
    prefix = KERAS.prefixes[0]
    tensors[f"{prefix}wte/embeddings:0"] = tensors[f"{prefix}wte/weight:0"]
    with pytest.raises(CheckpointError, match=r"duplicate .*wte/embeddings:0 is wte.weight"):
        assemble(Container("hdf5", tmp_path, tensors), {"n_head": 2}, "x")


def test_an_output_in_onnx_that_is_no_copy_of_the_embedding_is_refused(tmp_path):
    import onnx

    model = onnx.load(FIXTURES / "onnx_optimum/model.onnx")
    head = next(t for t in model.graph.initializer if t.name.startswith("onnx::MatMul"))
    head.raw_data = bytes(len(head.raw_data))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="lm_head.weight differs from wte.weight"):
        open_checkpoint(tmp_path / "model.onnx", n_head=2)
    assert open_checkpoint(tmp_path / "model.onnx", n_head=2, tie=True).config.tie_word_embeddings


def test_the_names_of_a_merged_decoder_are_those_of_its_parts(tmp_path):
    """optimum's ``merge_decoders`` puts ``_merged_0`` behind every name that both decoders have."""
    import onnx

    model = onnx.load(FIXTURES / "onnx_optimum/model.onnx")
    for tensor in model.graph.initializer:
        tensor.name += "_merged_0"
    onnx.save(model, tmp_path / "decoder_model_merged.onnx")
    read = open_checkpoint(tmp_path, n_head=2)
    assert_same_bytes(open_checkpoint(FIXTURES / "tf_plain"), read)
    assert read.left_out == ("lm_head.weight",)


def test_verify_reads_each_byte_of_two_files_once(tmp_path, monkeypatch):
    """Also where one of them has to be transposed."""
    from converters.io.reading import File
    from gpt2x.verify.weights import compare_weights

    checkpoint = open_checkpoint(SHAKESPEARE)
    save_checkpoint(checkpoint, tmp_path / "m.gguf")
    save_checkpoint(checkpoint, tmp_path / "m.safetensors")
    files = [open_checkpoint(tmp_path / name) for name in ("m.gguf", "m.safetensors")]
    seen: dict[Path, int] = {}
    real = File.chunks

    def counting(file, offset, size):
        seen[file.path] = seen.get(file.path, 0) + size
        return real(file, offset, size)

    monkeypatch.setattr(File, "chunks", counting)
    assert compare_weights(*files).passed
    assert seen == dict.fromkeys((tmp_path / "m.gguf", tmp_path / "m.safetensors"), checkpoint.nbytes)


def test_a_quantised_onnx_model_is_refused(tmp_path):
    from gpt2x.export.onnx_directory import ExportOptions

    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "q", ExportOptions(precisions=("int8", "w8a8", "int4")))
    for name in ("model_quantized.onnx", "model_int8.onnx", "model_q4.onnx"):
        with pytest.raises(CheckpointError, match="quantized"):
            open_checkpoint(tmp_path / "q/onnx" / name)


# ------------------------------------------------------------------------------------------------------ shards


def test_shards_are_named_and_sized_as_transformers_does_it(tmp_path):
    from transformers import GPT2LMHeadModel

    checkpoint = open_checkpoint(SHAKESPEARE)
    save_checkpoint(checkpoint, tmp_path / "hf", max_shard_size="3MB")
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all((tmp_path / "hf" / name).stat().st_size < 3_010_000 for name in files)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").state_dict()
    for name, array in arrays_of(checkpoint).items():
        assert (theirs[f"transformer.{name}"].numpy() == array).all()


@pytest.mark.parametrize("size", ["0", "-1", "5 apples", "", "1e9", "5PB", "5"])
def test_a_size_that_is_none_is_refused(tmp_path, size, gpt2x):
    assert_refused(gpt2x("convert", SHAKESPEARE, tmp_path / "hf", "--max-shard-size", size), "is not a size")


@pytest.mark.parametrize("target", ["m.safetensors", "m.gguf", "m.bin"])
def test_one_file_is_not_split(tmp_path, target, gpt2x):
    assert_refused(gpt2x("convert", SHAKESPEARE, tmp_path / target, "--max-shard-size", "1MB"), "only a directory")


def test_q8_0_is_refused_outside_gguf_before_anything_is_read(gpt2x, tmp_path):
    assert_refused(
        gpt2x("convert", tmp_path / "absent", tmp_path / "m.bin", "--dtype", "q8_0"), "bin can store F64, F32"
    )


def test_every_writer_is_in_the_list_and_on_the_command_line(gpt2x):
    from converters.dtypes import NAMES
    from gpt2x.cli.convert import DTYPES

    assert f"--to [{'|'.join(WRITERS)}]" in gpt2x("convert", "--help").stdout
    assert set(WRITERS) == {f.name for f in FORMATS if f.writes} - {"shards"}
    assert {d for f in FORMATS for d in f.writes} == set(NAMES.values())
    assert {*DTYPES, "fp64"} == set(NAMES)


def test_every_dialect_is_usual_in_a_format_that_exists():
    every = (*DIALECTS, *SAME_NAMES)
    assert {name for f in FORMATS for name in f.dialects} == {d.name for d in every}
    assert {name for d in every for name in d.formats} <= {f.name for f in FORMATS}


# ------------------------------------------------------------------------------------------- what newcomers ran into


def test_the_end_of_text_is_where_the_tokenizer_or_gpt2_has_it_and_else_nowhere(tmp_path):
    """Not at the last row: of a padded vocabulary that is padding, of characters it is a letter."""
    config: dict[str, Any] = {"n_layer": 1, "n_head": 1, "n_embd": 2, "n_ctx": 4}
    for n_vocab, end in ((50304, 50256), (65, None)):
        save_checkpoint(random_checkpoint(GPT2Config(n_vocab=n_vocab, **config)), tmp_path / f"{n_vocab}", "llmc")
        assert open_checkpoint(tmp_path / f"{n_vocab}").config.eos_token_id == end
    shutil.copytree(SHAKESPEARE, tmp_path / "tokenizer")
    for name in ("checkpoint", "hparams.json", "model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        (tmp_path / "tokenizer" / name).unlink()
    save_checkpoint(random_checkpoint(GPT2Config(n_vocab=2112, **config)), tmp_path / "tokenizer/ckpt.pt", "llmc")
    assert open_checkpoint(tmp_path / "tokenizer").config.eos_token_id == 2047


def test_an_activation_that_no_file_states_is_asked_for_by_name(gpt2x, tmp_path):
    ckpt = FIXTURES / "nanogpt/ckpt.pt"
    assert_refused(gpt2x("convert", ckpt, tmp_path / "m.gguf"), "--activation-function gelu_new")
    done(gpt2x("convert", ckpt, tmp_path / "m.gguf", "--activation-function", "gelu_new"))
    assert open_checkpoint(tmp_path / "m.gguf").config.activation_function == "gelu_new"
    assert_refused(gpt2x("convert", tmp_path / "m.gguf", tmp_path / "x", "--activation-function", "swish"), "swish")
    save_checkpoint(random_checkpoint(), tmp_path / "hf")
    assert_refused(
        gpt2x("convert", tmp_path / "hf", tmp_path / "x", "--activation-function", "relu"), "disagree", "gelu_new"
    )


def test_a_tokenizer_from_elsewhere_goes_along(gpt2x, tmp_path):
    save_checkpoint(open_checkpoint(SHAKESPEARE), tmp_path / "m.bin")
    done(gpt2x("convert", SHAKESPEARE, tmp_path / "t.gguf"))
    (tmp_path / "alone").mkdir()
    (tmp_path / "m.bin").rename(tmp_path / "alone/m.bin")
    for place in (SHAKESPEARE, tmp_path / "t.gguf"):
        done(gpt2x("convert", tmp_path / "alone/m.bin", tmp_path / "hf", "--tokenizer", place, "--force"))
        assert Tokenizer.from_pretrained(tmp_path / "hf").vocab_size == 2048


def test_inspect_says_what_a_quantised_file_holds(gpt2x):
    text = done(gpt2x("inspect", FIXTURES / "gguf/Q8_0.gguf")).output
    assert "F32" in text
    assert "5 x Q8_0" in text
    assert "in the file, 13 tokens" in text


def test_what_lies_in_a_folder_called_onnx_belongs_to_the_folder_above(tmp_path):
    checkpoint = open_checkpoint(SHAKESPEARE)
    export_onnx(checkpoint, tmp_path / "d")
    read = open_checkpoint(tmp_path / "d/onnx/model.onnx")
    assert read.tokenizer.vocabulary() == checkpoint.tokenizer.vocabulary()


@pytest.mark.parametrize("name", ["openai-community/gpt2", "gpt2", "distilgpt2"])
def test_the_name_of_a_model_on_the_hub_is_met_with_its_address(gpt2x, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert_refused(gpt2x("convert", name, "x"), "no such file", f"{name.split('/')[-1]}", "hf://")


def test_an_address_is_no_path(tmp_path):
    with pytest.raises(ConversionError, match=r"gpt2x.fetch"):
        open_checkpoint("openai://124M")


@pytest.mark.parametrize(("size", "files"), [("1.5MB", 7), ("10MiB", 1)])
def test_sizes_may_have_a_point_and_a_larger_tensor_is_said(tmp_path, size, files):
    saved = save_checkpoint(open_checkpoint(SHAKESPEARE), tmp_path / "hf", max_shard_size=size)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == files
    assert any("wte.weight alone has 1,572,864 bytes" in note for note in saved.notes) == (files > 1)


def test_a_broken_tokenizer_beside_a_file_does_not_keep_it_from_being_read(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes((FIXTURES / "nanogpt/ckpt.pt").read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    assert open_checkpoint(tmp_path / "ckpt.pt").config.eos_token_id is None


# --------------------------------------------------------------------------------------------- what a review found


def with_vocabulary(folder, ids, merges=(), **settings):
    """A directory with a tokenizer of these tokens alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return folder


def test_a_stated_id_stays_and_the_tokenizer_gives_what_is_not_stated(tmp_path):
    with_vocabulary(tmp_path / "hf", {"a": 0, "<|endoftext|>": 7})
    with new_file(tmp_path / "hf/model.safetensors") as out:
        write_safetensors(out, random_checkpoint().tensors)
    (tmp_path / "hf/config.json").write_text(json.dumps({"n_head": 2, "bos_token_id": 3}))
    config = open_checkpoint(tmp_path / "hf").config
    assert (config.bos_token_id, config.eos_token_id) == (3, 7)


def test_the_ids_of_openais_layout_are_the_tokenizers_and_what_is_lost_is_said(tmp_path):
    with_vocabulary(tmp_path / "t", {"a": 0, "<|endoftext|>": 7})
    source = open_checkpoint(FIXTURES / "tf_plain", tokenizer=tmp_path / "t")
    assert source.config.eos_token_id == 7
    save_checkpoint(source, tmp_path / "tf", "tf")
    assert open_checkpoint(tmp_path / "tf").config.eos_token_id == 7
    other = replace(source, config=replace(source.config, eos_token_id=5))
    assert any("token ids" in note for note in save_checkpoint(other, tmp_path / "other", "tf").notes)


def test_a_tokenizer_that_does_not_fit_or_cannot_be_said_is_noted(tmp_path):
    with_vocabulary(tmp_path / "t", {"a": 0, "<|endoftext|>": 70})
    wide = open_checkpoint(FIXTURES / "tf_plain", tokenizer=tmp_path / "t")
    assert (
        "the tokenizer has a token id of 70, but the model's n_vocab is 13"
        in save_checkpoint(wide, tmp_path / "hf").notes
    )
    spaced = open_checkpoint(SHAKESPEARE)
    vocabulary = replace(spaced.tokenizer.vocabulary(), add_prefix_space=True)
    spaced = replace(spaced, tokenizer=replace(spaced.tokenizer, inside=vocabulary))
    for kind in ("tf", "gguf"):
        assert any("add_prefix_space" in note for note in save_checkpoint(spaced, tmp_path / kind, kind).notes)
    assert not any("add_prefix_space" in note for note in save_checkpoint(spaced, tmp_path / "back").notes)
    assert open_checkpoint(tmp_path / "back").tokenizer.vocabulary().add_prefix_space


@pytest.mark.parametrize("line", [("tokenizer.ggml.pre", "llama-bpe"), ("tokenizer.ggml.add_bos_token", True)])
def test_a_gguf_that_cuts_text_otherwise_does_not_pass_its_tokenizer_on(tmp_path, line):
    from converters.containers import gguf
    from converters.formats.gguf import tokenizer_metadata

    checkpoint = open_checkpoint(SHAKESPEARE)
    tokens = tokenizer_metadata(checkpoint.tokenizer.vocabulary(), 2048) | dict([line])
    metadata = {"general.architecture": "gpt2", "gpt2.attention.head_count": 6, **tokens}
    with new_file(tmp_path / "m.gguf") as out:
        gguf.write_gguf(out, dialects.GGUF.write(checkpoint.tensors, checkpoint.config), metadata)
    read = open_checkpoint(tmp_path / "m.gguf")
    assert read.tokenizer is None
    assert any("is not used" in note for note in read.notes)


@pytest.mark.parametrize("change", ["lightning", "params"])
def test_what_wrappers_put_before_names_is_taken_off(tmp_path, change):
    tiny = random_checkpoint()
    names = {"lightning": lambda n: f"model.transformer.{n}", "params": None}[change]
    if names:
        tensors = {names(name): tensor for name, tensor in tiny.tensors.items()}
        tensors["model.lm_head.weight"] = tiny.tensors["wte.weight"]
    else:
        written = FLAX.write({**tiny.tensors, "lm_head.weight": tiny.tensors["wte.weight"]}, TINY)
        tensors = {f"params/{name}": tensor for name, tensor in written.items()}
    assert_same_bytes(tiny, assemble(Container("m", tmp_path, tensors), {"n_head": 2}, "x"))


def test_a_name_of_absurd_length_is_refused_at_once(tmp_path):
    tensors = {**random_checkpoint().tensors, "h." + "1." * 100_000: random_checkpoint().tensors["wte.weight"]}
    with pytest.raises(CheckpointError, match="has 200002 characters"):
        assemble(Container("m", tmp_path, tensors), {"n_head": 2}, "x")


def test_a_header_that_asks_for_very_many_layers_takes_no_memory(tmp_path):
    import struct

    header = struct.pack("<256i", 20240326, 3, 1024, 50257, 1000, 12, 768, 50304, *[0] * 248)
    (tmp_path / "m.bin").write_bytes(header)
    with pytest.raises(ConversionError, match="1024 bytes, but its header needs"):
        open_checkpoint(tmp_path / "m.bin")


def test_shards_may_carry_their_configuration_in_any_of_them_and_a_model_of_its_own_is_no_shard(tmp_path):
    tiny = random_checkpoint()
    names = list(tiny.tensors)
    for i, part in enumerate((names[:5], names[5:])):
        with new_file(tmp_path / f"{i}.safetensors") as out:
            config = {"n_head": 2, "model_type": "gpt2"} if i else None
            write_safetensors(out, {name: tiny.tensors[name] for name in part}, config)
    places = {name: f"{0 if name in names[:5] else 1}.safetensors" for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert_same_bytes(tiny, open_checkpoint(tmp_path))
    save_checkpoint(tiny, tmp_path / "m.gguf")
    places = dict.fromkeys(dialects.GGUF.write(tiny.tensors, TINY), "m.gguf")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ConversionError, match="not a shard but a whole model"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("name", "stored"), [("fp16", "F16"), ("F16", "F16"), ("fp64", "F64"), ("bf16", "BF16")])
def test_a_dtype_has_the_name_of_the_command_line_or_of_safetensors(tmp_path, name, stored):
    save_checkpoint(random_checkpoint(), tmp_path / "m.safetensors", dtype=name)
    assert {kind for kind, _ in open_checkpoint(tmp_path / "m.safetensors").stored.values()} == {stored}
