"""Seed files for the fuzzer: small valid files of every format, and some malicious ones."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "fixtures"
sys.path.append(str(Path(__file__).parents[1] / "support"))
META = "seed.json"


@dataclass(frozen=True)
class Seed:
    """Files by name, the file to open ("" is their directory), and the files to mutate.

    ``sound`` is True if the unchanged files must be read, False if they must be refused.
    """

    name: str
    files: dict[str, bytes]
    target: str
    changed: tuple[str, ...]
    sound: bool = True


def load_seeds(folder: Path) -> list[Seed]:
    """Return the seeds of one format that ``make_seeds`` wrote, in a fixed order."""
    seeds = []
    for place in sorted(folder.iterdir()):
        meta = json.loads((place / META).read_bytes())
        inside = [p for p in sorted(place.rglob("*")) if p.is_file() and p.name != META]
        files = {p.relative_to(place).as_posix(): p.read_bytes() for p in inside}
        seeds.append(Seed(place.name, files, meta["target"], tuple(meta["changed"] or files), meta["sound"]))
    return seeds


def make_seeds(folder: Path) -> None:
    """Write the seeds of every format: ``folder/FORMAT/SEED/files``. All have the weights of ``tf_plain``."""
    for name, make in MAKERS.items():
        (folder / name).mkdir(parents=True)
        make(folder / name)


def _meta(place: Path, target: str, changed: tuple[str, ...] = (), sound: bool = True) -> None:
    (place / META).write_text(json.dumps({"target": target, "changed": changed, "sound": sound}))


def _fixture(folder: Path, path: str, target: str, changed: tuple[str, ...] = (), extra: str = "") -> Path:
    """Copy a fixture: a file, or all files of a directory."""
    place = folder / path.replace("/", "-")
    source = FIXTURES / path
    if source.is_dir():
        shutil.copytree(source, place)
    else:
        place.mkdir()
        shutil.copy(source, place)
    if extra:
        shutil.copy(FIXTURES / extra, place)
    _meta(place, target, changed)
    return place


def _plain():
    from converters import open_checkpoint

    return replace(open_checkpoint(FIXTURES / "tf_plain"), source=None)


def _saved(folder: Path, name: str, file: str, to: str, **options: Any) -> Path:
    """Write the weights of ``tf_plain`` in another format, with gpt2x's writer."""
    from converters import save_checkpoint

    (folder / name).mkdir()
    save_checkpoint(_plain(), folder / name / file, to, **options)
    _meta(folder / name, file)
    return folder / name


def _shallow(folder: Path, name: str) -> Path:
    """Write a Hugging Face directory with one layer of ``tf_plain``, for cases that do not change the weights."""
    from converters import save_checkpoint

    plain = _plain()
    config = replace(plain.config, n_layer=1)
    tensors = {name: plain.tensors[name] for name in config.shapes()}
    save_checkpoint(replace(plain, config=config, tensors=tensors), folder / name, "hf")
    return folder / name


# -------------------------------------------------------------------------------------------------------------- formats


def _tf(folder: Path) -> None:
    objects = ("model.ckpt.index", "model.ckpt.data-00000-of-00001")
    _fixture(folder, "keras_objects/weights", "", objects)
    for name in ("tf_plain", "tf_partitioned", "tf_two_shards", "tf_training"):
        _fixture(folder, name, "")


def _safetensors(folder: Path) -> None:
    _saved(folder, "ours", "m.safetensors", "safetensors")
    _fixture(folder, "mlx", "model.safetensors", ("model.safetensors",))


def _zip(folder: Path) -> None:
    import torch

    _saved(folder, "ours", "m.bin", "bin")
    _saved(folder, "ours_nanogpt", "ckpt.pt", "nanogpt")
    _fixture(folder, "nanogpt/ckpt.pt", "ckpt.pt")
    _fixture(folder, "nanogpt_no_bias/ckpt.pt", "ckpt.pt")
    _fixture(folder, "rust_bert/rust_model.ot", "rust_model.ot")
    (folder / "torch").mkdir()
    torch.save(_tensors(), folder / "torch/m.bin")
    _meta(folder / "torch", "m.bin")
    _zip64(folder / "torch/m.bin", folder / "zip64")
    _fixture(folder, "torch_runs/lightning.ckpt", "lightning.ckpt")
    _fixture(folder, "torch_runs/numpy_1.pt", "numpy_1.pt")
    for name, saved in _runs().items():
        (folder / name).mkdir()
        torch.save(saved, folder / name / "m.bin")
        _meta(folder / name, "m.bin")
    for name, pickle in HARMFUL.items():
        _harmful(folder / f"harmful_{name}", zipped(pickle))


def _zip64(source: Path, place: Path) -> None:
    """Write the same archive with a zip64 end record, as archives of more than 4 GiB have."""
    data = source.read_bytes()
    body = data[: data.rindex(b"PK\x05\x06")]
    body = body[: body.rindex(b"PK\x06\x06")] if b"PK\x06\x06" in body else body
    count, size, start = struct.unpack("<H2L", data[-12:-2])
    wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(body), 1)
    place.mkdir()
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
    (place / "m.bin").write_bytes(body + wide + locator + end)
    _meta(place, "m.bin")


def _npz(folder: Path) -> None:
    import numpy as np

    arrays = {name: tensor.read() for name, tensor in _plain().tensors.items()}
    fortran = {name: np.asfortranarray(array) for name, array in arrays.items()}
    objects = {**arrays, "ln_f.bias": np.array([object] * 6)}
    for name, saved in (("numpy", arrays), ("fortran", fortran), ("objects", objects)):
        (folder / name).mkdir()
        _savez(folder / name / "m.npz", saved)
        _meta(folder / name, "m.npz", sound=name != "objects")


def _savez(path, arrays):
    import numpy as np

    np.savez(path, **arrays)


def _legacy(folder: Path) -> None:
    import torch

    wrapped = {"state_dict": _tensors(), "epoch": 3}
    for name, saved in {"torch": _tensors(), "wrapped": wrapped, **_runs()}.items():
        (folder / name).mkdir()
        torch.save(saved, folder / name / "m.bin", _use_new_zipfile_serialization=False)
        _meta(folder / name, "m.bin")
    start = (folder / "torch/m.bin").read_bytes()[:100]
    for name, pickle in HARMFUL.items():
        _harmful(folder / f"harmful_{name}", start[: start.index(b".", 20) + 1] + pickle)


def _tensors():
    import torch

    return {name: torch.from_numpy(tensor.read()) for name, tensor in _plain().tensors.items()}


def _runs() -> dict[str, Any]:
    """Return what a training run leaves: objects beside the weights, weights at a depth, a model that was saved whole."""
    import argparse
    import datetime

    import numpy as np
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from converters.config import to_hf

    config = to_hf(_plain().config)
    model = GPT2LMHeadModel(GPT2Config(**config))
    model.transformer.load_state_dict(_tensors())
    objects = {
        "args": argparse.Namespace(lr=1e-3, out=Path("runs")),
        "loss": np.mean([3.1, 3.2]),
        "losses": np.array([3.1, 3.2]),
        "began": datetime.datetime(2024, 5, 1),
        "done": {1, 2},
        "device": torch.device("cpu"),
        "optimizer": torch.optim.AdamW(model.parameters()),
    }
    return {
        "objects": {"model_state_dict": _tensors(), **objects},
        "deep": {"checkpoint": [{"model": {"weights": _tensors()}, "config": argparse.Namespace(**config)}]},
        "whole": model,
    }


def _text(text: bytes) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text


# Pickles that create a file named "fuzzed" if anything in them is called.
HARMFUL = {
    "system": b"\x80\x02cos\nsystem\n" + _text(b"touch fuzzed") + b"\x85R.",
    "eval": b"\x80\x02cbuiltins\neval\n" + _text(b"open('fuzzed', 'w')") + b"\x85R.",
    "stack": b"\x80\x04" + _text(b"posix") + _text(b"system") + b"\x93" + _text(b"touch fuzzed") + b"\x85R.",
    "inst": b"\x80\x02(" + _text(b"touch fuzzed") + b"ios\nsystem\n.",
    "build": b"\x80\x02ccollections\nOrderedDict\n)R}" + _text(b"__reduce__") + b"cos\nsystem\nsb.",
    "open": b"\x80\x02cio\nopen\n" + _text(b"fuzzed") + _text(b"w") + b"\x86R.",
    "torch": b"\x80\x02ctorch.serialization\nload\n" + _text(b"fuzzed") + b"\x85R.",
}


def zipped(pickle: bytes) -> bytes:
    """Return a torch.save archive with this pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in (("m/data.pkl", pickle), ("m/version", b"3\n")):
            archive.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()


def _harmful(place: Path, data: bytes) -> None:
    place.mkdir()
    (place / "m.bin").write_bytes(data)
    _meta(place, "m.bin", sound=False)


def _shards(folder: Path) -> None:
    size = _plain().nbytes
    _meta(_saved(folder, "ours", "m", "hf", max_shard_size=size // 2), "m", ("m/model.safetensors.index.json",))
    place = _saved(folder, "two", "m", "hf", max_shard_size=size // 2 + 2000)
    _meta(place, "m/model.safetensors.index.json", tuple(f"m/{p.name}" for p in sorted((place / "m").glob("model*"))))


def _llmc(folder: Path) -> None:
    _fixture(folder, "llmc/gpt2.bin", "gpt2.bin")
    _fixture(folder, "llmc/gpt2_bf16.bin", "gpt2_bf16.bin")


def _gguf(folder: Path) -> None:
    for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0"):
        _fixture(folder, f"gguf/{kind}.gguf", f"{kind}.gguf")
    parts = tuple(f"wide-{number:05d}-of-00003.gguf" for number in (1, 2, 3))
    _fixture(folder, "gguf_split/plain", parts[0], parts)
    from quantized import MATRICES, write_quantized

    kinds = ("MXFP4", "IQ1_S", "IQ1_M", "IQ2_XXS", "TQ1_0")  # small ones
    (folder / "quantized").mkdir()
    write_quantized(folder / "quantized/m.gguf", dict(zip(MATRICES, kinds, strict=True)))
    _meta(folder / "quantized", "m.gguf")
    _saved(folder, "ours", "m.gguf", "gguf")


def _hdf5(folder: Path) -> None:
    import h5py

    for name in ("keras", "keras_2019"):
        _first_layer(_fixture(folder, name, "tf_model.h5", ("tf_model.h5",)), "tf_model.h5", "h_._1")
    place = _fixture(folder, "keras_hub", "", ("model.weights.h5", "config.json"))
    _first_layer(place, "model.weights.h5", "transformer_decoder_1")
    _fixture(folder, "keras_hub_shards", "", ("model_00001.weights.h5", "model.weights.json"))
    place = _fixture(folder, "keras/tf_model.h5", "tf_model.h5", ("tf_model.h5",))
    with h5py.File(place / "tf_model.h5", "a") as file:
        file["elsewhere"] = h5py.ExternalLink("/etc/hostname", "/x")
        file.create_dataset("outside", (4,), "f4", external=[("/etc/hostname", 0, 16)])
    _meta(place, "tf_model.h5", sound=False)


def _first_layer(place: Path, name: str, second: str) -> None:
    """Drop the second of two layers: the library takes most of the time of a case, for each data set."""
    import h5py

    def copy(source: Any, target: Any) -> None:
        target.attrs.update(source.attrs)
        for key, item in source.items():
            if isinstance(item, h5py.Dataset):
                source.copy(item, target, key)
            elif key != second:
                copy(item, target.create_group(key))

    with h5py.File(place / name) as whole, h5py.File(place / "first.h5", "w") as first:
        copy(whole, first)
    (place / "first.h5").replace(place / name)
    text = (place / "config.json").read_text()
    (place / "config.json").write_text(
        text.replace('"n_layer": 2', '"n_layer": 1').replace('"num_layers": 2', '"num_layers": 1')
    )


def _hdf5_listing(folder: Path) -> None:
    """What ``hdf5_listing.py`` prints for a file. The reader must not trust it, because a file may take over that process."""
    from converters.containers import hdf5_listing

    place = _fixture(folder, "keras/tf_model.h5", "tf_model.h5", ("listing.json",))
    command = [sys.executable, str(hdf5_listing.__file__), str(place / "tf_model.h5")]
    (place / "listing.json").write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)


def _msgpack(folder: Path) -> None:
    import msgpack

    _fixture(folder, "flax", "flax_model.msgpack", ("flax_model.msgpack",))
    place = _fixture(folder, "flax/flax_model.msgpack", "flax_model.msgpack")
    tree = msgpack.unpackb((place / "flax_model.msgpack").read_bytes(), strict_map_key=False)
    shape, kind, data = msgpack.unpackb(tree["transformer"]["wte"]["embedding"].data)
    parts = [data[i : i + 100] for i in range(0, len(data), 100)]
    chunks = {str(i): msgpack.ExtType(1, msgpack.packb(((len(p) // 4,), kind, p))) for i, p in enumerate(parts)}
    whole = {"__msgpack_chunked_array__": True, "shape": {"0": shape[0], "1": shape[1]}, "chunks": chunks}
    tree["transformer"]["wte"]["embedding"] = whole
    (place / "flax_model.msgpack").write_bytes(msgpack.packb(tree))


def _onnx(folder: Path) -> None:
    from gpt2x import export_onnx

    _fixture(folder, "onnx_optimum", "model.onnx", ("model.onnx",))
    export_onnx(_plain(), folder / "ours", need_tokenizer=False)
    _meta(folder / "ours", "onnx/model.onnx", ("onnx/model.onnx",))


def _config(folder: Path) -> None:
    from converters.config import to_hf
    from converters.formats.tensorflow import to_hparams

    for name, words in (("config.json", to_hf), ("hparams.json", to_hparams)):
        place = _shallow(folder, name)
        (place / "config.json").unlink()
        (place / name).write_text(json.dumps(words(replace(_plain().config, n_layer=1))))
        _meta(place, "", (name,))
    place = _saved(folder, "nanogpt", "ckpt.pt", "nanogpt")
    _meta(place, "ckpt.pt", ("config.json",))
    (place / "config.json").write_text('{"activation_function": "gelu_new", "eos_token_id": [1, 2]}')


def _tokenizer(folder: Path) -> None:
    from converters.added_tokens import usual_token
    from converters.tokenizer import Vocabulary, build

    ids = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "<|endoftext|>": 5, "é": 6}
    pair = {
        "vocab.json": json.dumps(ids),
        "merges.txt": "#version: 0.2\na b\nab c\n",
        "added_tokens.json": '{"<pad>": 7}',
    }
    vocabulary = Vocabulary({**ids, "<pad>": 7}, [("a", "b"), ("ab", "c")], (usual_token("<pad>", special=True),))
    for name, files in (("pair", pair), ("whole", {"tokenizer.json": build(vocabulary).to_str()})):
        place = _shallow(folder, name)
        for file, text in files.items():
            (place / file).write_text(text, encoding="utf-8")
        _meta(place, "", tuple(files))


def _adapter(folder: Path) -> None:
    """A model with its adapter in one state dict, and the adapter's configuration beside it."""
    _fixture(folder, "adapters/whole", "", ("pytorch_model.bin",)).rename(folder / "tensors")
    _fixture(folder, "adapters/whole", "", ("adapter_config.json",)).rename(folder / "configuration")


MAKERS: dict[str, Callable[[Path], None]] = {
    "tf": _tf, "safetensors": _safetensors, "zip": _zip, "npz": _npz, "legacy": _legacy, "shards": _shards, "llmc": _llmc,
    "gguf": _gguf, "hdf5": _hdf5, "hdf5_listing": _hdf5_listing, "msgpack": _msgpack, "onnx": _onnx, "config": _config, "tokenizer": _tokenizer,
    "adapter": _adapter,
}  # fmt: skip
