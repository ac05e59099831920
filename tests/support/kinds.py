"""Files of every kind, of a tiny model, written by other libraries."""

from __future__ import annotations

import gguf
import h5py
import msgpack
import numpy as np
import onnx
import safetensors.numpy
import torch
from checkpoints import random_checkpoint

from converters import LazyTensor
from converters.containers.tf_bundle import write_bundle
from converters.dialects import FLAX, GGUF, HF, KERAS, MLX, NANOGPT, OPENAI
from converters.spec import LM_HEAD


def named_by(dialect, checkpoint=None):
    """A tiny model's arrays under a dialect's names and in its layouts."""
    checkpoint = checkpoint or random_checkpoint()
    return {name: tensor.read() for name, tensor in dialect.write(checkpoint.tensors, checkpoint.config).items()}


def flax_array(array=None, shape=None, kind=None, data=None, code=1):
    """One array as Flax packs it, or with something else in a place."""
    array = np.ones(6, np.float32) if array is None else array
    parts = [
        list(array.shape) if shape is None else shape, kind or array.dtype.name, array.tobytes() if data is None else data,
    ]  # fmt: skip
    return msgpack.ExtType(code, msgpack.packb(parts, use_bin_type=True))


def onnx_model(arrays=None):
    tensors = [
        onnx.numpy_helper.from_array(array, name)
        for name, array in (named_by(HF) if arrays is None else arrays).items()
    ]
    return onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], tensors))


def write_safetensors(path, arrays):
    safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def write_zip(path, arrays, **options):
    torch.save({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}, path, **options)


def write_legacy(path, arrays):
    write_zip(path, arrays, _use_new_zipfile_serialization=False)


def write_nanogpt(path, arrays):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 6, "block_size": 10, "vocab_size": 13, "bias": True}
    torch.save(
        {"model": {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in arrays.items()}, "model_args": sizes}, path
    )


def write_npz(path, arrays):
    np.savez(path, **arrays)


def write_tf(path, arrays):
    write_bundle(
        path.with_name("model.ckpt"), {name: LazyTensor.of(np.ascontiguousarray(a)) for name, a in arrays.items()}
    )


def write_hdf5(path, arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)


def write_flax(path, arrays):
    tree: dict = {}
    for name, array in arrays.items():
        *above, last = name.split("/")
        here = tree
        for key in above:
            here = here.setdefault(key, {})
        here[last] = flax_array(np.ascontiguousarray(array))
    path.write_bytes(msgpack.packb(tree))


def write_onnx(path, arrays):
    onnx.save(onnx_model({name: np.ascontiguousarray(a) for name, a in arrays.items()}), path)


def write_gguf(path, arrays):
    writer = gguf.GGUFWriter(path, "gpt2")
    for name, array in arrays.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# What people call such a file -> its dialect, and how it is written from arrays under that dialect's names.
KINDS = {
    "model.safetensors": (HF, write_safetensors),
    "mlx.safetensors": (MLX, write_safetensors),
    "pytorch_model.bin": (HF, write_zip),
    "legacy.bin": (HF, write_legacy),
    "model.npz": (HF, write_npz),
    "ckpt.pt": (NANOGPT, write_nanogpt),
    "model.ckpt.index": (OPENAI, write_tf),
    "tf_model.h5": (KERAS, write_hdf5),
    "flax_model.msgpack": (FLAX, write_flax),
    "model.onnx": (HF, write_onnx),
    "m.gguf": (GGUF, write_gguf),
}


def name_in(kind, canonical):
    dialect = KINDS[kind][0]
    return canonical if canonical == LM_HEAD else dialect.prefixes[0] + dialect.names(canonical)[0]


def any_file(folder, kind, change=lambda arrays: None, checkpoint=None):
    """A file of this kind, of a tiny model's arrays after a change."""
    dialect, write = KINDS[kind]
    arrays = named_by(dialect, checkpoint)
    change(arrays)
    write(folder / kind, arrays)
    return folder / kind.removesuffix(".index")
