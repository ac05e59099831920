"""The same with a live TensorFlow: it reads what we write, and we read what it writes. ``make test-tensorflow``."""

import numpy as np
import pytest

from converters import Checkpoint, GPT2Config, LazyTensor, open_checkpoint, save_checkpoint
from converters.dialects import OPENAI
from converters.tensors import BF16, F16, F32
from gpt2x import SHAKESPEARE

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed (make test-tensorflow installs it)")

CONFIG = GPT2Config(n_layer=11, n_head=2, n_embd=6, n_ctx=10, n_vocab=13)


def checkpoint(seed=0):
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in CONFIG.shapes().items()}
    return Checkpoint(config=CONFIG, tensors={name: LazyTensor.of(array) for name, array in arrays.items()})


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_tensorflow_reads_what_we_write(tmp_path, dtype):
    ours = checkpoint().cast(dtype)
    save_checkpoint(ours, tmp_path / "tf", "tf")
    reader = tf.train.load_checkpoint(str(tmp_path / "tf"))  # by the file "checkpoint"
    assert set(reader.get_variable_to_shape_map()) == {OPENAI.names(name)[0] for name in ours.tensors}
    for name, tensor in ours.tensors.items():
        theirs = reader.get_tensor(OPENAI.names(name)[0])
        assert theirs.tobytes() == tensor.read().tobytes()


def test_tensorflow_reads_the_shipped_model():
    reader = tf.train.load_checkpoint(str(SHAKESPEARE / "model.ckpt"))
    for name, tensor in open_checkpoint(SHAKESPEARE).tensors.items():
        assert reader.get_tensor(OPENAI.names(name)[0]).tobytes() == tensor.read().tobytes()


@pytest.mark.parametrize("parts", [None, 3])
def test_we_read_what_tensorflow_writes(tmp_path, parts):
    v1, ours = tf.compat.v1, checkpoint()
    written = OPENAI.write(ours.tensors, ours.config)
    with tf.Graph().as_default(), v1.Session() as session:
        for name, tensor in ours.tensors.items():
            value = tensor.read().reshape(written[OPENAI.names(name)[0]].shape)

            def part(shape, dtype=None, partition_info=None, value=value):
                start = partition_info.var_offset if partition_info else [0] * value.ndim
                return value[tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))]

            split = v1.fixed_size_partitioner(parts) if parts and name == "wte.weight" else None
            v1.get_variable(OPENAI.names(name)[0], value.shape, tf.float32, part, partitioner=split)
        session.run(v1.global_variables_initializer())
        v1.train.Saver().save(session, str(tmp_path / "model.ckpt"))  # with its .meta, as OpenAI published it
    theirs = open_checkpoint(tmp_path, n_head=2)
    assert theirs.checksummed == len(theirs.tensors)
    for name, tensor in ours.tensors.items():
        assert theirs.tensors[name].read().tobytes() == tensor.read().tobytes()


def test_a_round_trip_through_tensorflow_gives_the_same_file(tmp_path):
    v1 = tf.compat.v1
    save_checkpoint(checkpoint(), tmp_path / "ours", "tf")
    reader = tf.train.load_checkpoint(str(tmp_path / "ours"))
    with tf.Graph().as_default(), v1.Session() as session:
        for name in reader.get_variable_to_shape_map():
            v1.get_variable(name, initializer=reader.get_tensor(name))
        session.run(v1.global_variables_initializer())
        v1.train.Saver().save(session, str(tmp_path / "theirs" / "model.ckpt"), write_meta_graph=False)
    for name in ("model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
