"""Every row of the table of situations, from real small files: what is said, and that its command works.

Public sources of the situations, beside those in the docstrings: huggingface/transformers#27923 and microsoft/OmniParser#34 (a
pointer of Git LFS in place of weights); huggingface/transformers#13605 and GanjinZero/CODER#2 (``pytorch_model.bin`` that a
browser unpacks); huggingface/huggingface_hub#1388 (links of the cache that lead nowhere); nuwandda/
stable-diffusion-aging-time-lapse#1 and d3vilh/stable-diffusion-howto#1 (a server's answer in place of a file);
pytorch/torchtitan#307 and huggingface/accelerate#2772 (``.distcp``); hyn2028/llm-cxr#5 (a ZeRO-3 run);
NVIDIA/Megatron-LM#37 (Megatron's names); the specification of AppleDouble (RFC 1740).
"""

import gzip
import io
import json
import shlex
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile

import gguf
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import torch.distributed.checkpoint.state_dict_saver as dcp
from checkpoints import arrays_of, assert_same_bytes, random_checkpoint
from paths import FIXTURES

from converters import ConversionError, open_checkpoint, save_checkpoint
from converters.config import to_hf
from converters.opening.situations import SITUATIONS

WEIGHTS = random_checkpoint()

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process saves, as it is meant


def torch_arrays():
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays_of(WEIGHTS).items()}


def hf(path):
    save_checkpoint(WEIGHTS, path)
    return path


def config_in(path):
    """The folder, with the configuration of a GPT-2."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(to_hf(WEIGHTS.config)))
    return path


def folder(*names, config=False):
    """A folder that holds files of these names with a few bytes."""

    def make(path):
        path = path / "m"
        path.mkdir()
        if config:
            (path / "config.json").write_text("{}")
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(b"\1\2\3\4")
        return path

    return make


def file(name, data=b"\1\2\3\4" * 20):
    def make(path):
        (path / name).write_bytes(data)
        return path / name

    return make


def tensors(config=None, **dtypes):
    """A safetensors file with tensors of these names and dtypes, two values each."""

    def make(path):
        arrays = {name: torch.ones(2).to(dtype) for name, dtype in dtypes.items()}
        safetensors.torch.save_file(arrays, path / "model.safetensors")
        if config:
            (path / "config.json").write_text(json.dumps(config))
        return path

    return make


def dotted(config=None, **dtypes):
    return tensors(config, **{name.replace("__", "."): dtype for name, dtype in dtypes.items()})


# ------------------------------------------------------------------------------- what the real programs write


def fsdp(path):
    """accelerate saves ``{"model": state_dict}`` with torch.distributed.checkpoint (``save_fsdp_model``)."""
    path = config_in(path / "run")
    distributed(path / "pytorch_model_fsdp_0")
    torch.save({}, path / "training_args.bin")
    return path


def distributed(path):
    dcp.save({"model": torch_arrays()}, checkpoint_id=path, no_dist=True)
    return path


def distributed_with_config(path):
    return distributed(config_in(path / "run"))


def zero3(path):
    """Source: ``_get_zero_ckpt_name`` and ``_get_ckpt_name`` in DeepSpeed's ``runtime/engine.py``."""
    step = path / "run" / "global_step100"
    step.mkdir(parents=True)
    for rank in (0, 1):
        torch.save({"module": None}, step / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save({}, step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    (path / "run" / "latest").write_text("global_step100")
    return path / "run"


def unpacked(path):
    folder = config_in(path / "run")
    torch.save(torch_arrays(), folder / "archive.bin")
    with zipfile.ZipFile(folder / "archive.bin") as archive:
        archive.extractall(folder)
    (folder / "archive.bin").unlink()
    return folder / "archive"


def broken_links(path):
    snapshot = path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    return snapshot


def below(path):
    hf(path / "models" / "124M")
    return path / "models"


def zipped(path):
    with zipfile.ZipFile(path / "model.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for part in hf(path / "hf").iterdir():
            archive.write(part, part.name)
    return path / "model.zip"


def tarred(path, name="model.tar.gz"):
    with tarfile.open(path / name, "w:gz") as archive:
        archive.add(hf(path / "hf"), "model")
    return path / name


def nemo(path):
    return tarred(path, "gpt2.nemo")


def shard(path):
    save_checkpoint(WEIGHTS, path / "hf", max_shard_size="2KB")
    return sorted((path / "hf").glob("model-*.safetensors"))[0]


def other_gguf(path):
    writer = gguf.GGUFWriter(str(path / "m.gguf"), "llama")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path / "m.gguf"


def without(ending):
    def make(path):
        shutil.copytree(FIXTURES / "tf_plain", path / "tf")
        gone = next(file for file in (path / "tf").iterdir() if ending in file.name)
        prefix = (path / "tf" / gone.name.split(ending)[0]).with_suffix(".ckpt")
        gone.unlink()
        return next(prefix.parent.glob("*.data-*" if ending == ".index" else "*.index"))

    return make


def saved_model(path):
    """The variables of a SavedModel are an object-based checkpoint; this one is TensorFlow's own."""
    variables = path / "saved" / "variables"
    variables.mkdir(parents=True)
    for source in (FIXTURES / "tf_object_based").glob("model.ckpt-1.*"):
        shutil.copy(source, variables / source.name.replace("model.ckpt-1", "variables"))
    (path / "saved" / "saved_model.pb").write_bytes(b"\x08\x01")
    return path / "saved"


def broken_link(path):
    (path / "model.safetensors").symlink_to("../blobs/0123")
    return path / "model.safetensors"


def float8(path):
    arrays = torch_arrays()
    arrays["h.0.attn.c_attn.weight"] = arrays["h.0.attn.c_attn.weight"].to(torch.float8_e4m3fn)
    config_in(path)
    safetensors.torch.save_file(arrays, path / "model.safetensors")
    return path / "model.safetensors"


def ctranslate2(path):
    """Source: ``ModelSpec._serialize`` in CTranslate2's ``specs/model_spec.py``: version, then name with its length."""
    name = b"TransformerDecoderSpec\0"
    (path / "model.bin").write_bytes(struct.pack("<IH", 6, len(name)) + name + bytes(64))
    (path / "config.json").write_text('{"bos_token": "<|endoftext|>"}')
    (path / "vocabulary.json").write_text("[]")
    return path


def hub_root(path):
    for name in ("models--gpt2", "models--distilgpt2"):
        (path / name / "snapshots").mkdir(parents=True)
    return path


def beside_weights(path):
    """What the Trainer writes into a folder."""
    shutil.copy(FIXTURES / "adapters" / "base" / "model.safetensors", path)
    (path / "optimizer.pt").write_bytes(b"PK\3\4" + bytes(100))
    return path / "optimizer.pt"


def npy(path):
    np.save(path / "wte.npy", np.ones(3))
    return path / "wte.npy"


F32, I8, I32, F8 = torch.float32, torch.int8, torch.int32, torch.float8_e4m3fn
C_FC = "h__0__mlp__c_fc"

# What a row of the table has -> what makes it.
CASES = {
    "an FSDP run": fsdp,
    "a distributed checkpoint": distributed_with_config,
    "a DeepSpeed ZeRO-3 run": zero3,
    "a DeepSpeed run with tensor parallelism": folder("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"),
    "a Megatron-LM run": folder("latest_checkpointed_iteration.txt", "iter_0005000/mp_rank_00/model_optim_rng.pt"),
    "a checkpoint of Orbax": folder("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "d/0"),
    "the steps of Orbax": folder("999/_CHECKPOINT_METADATA", "999/default/_METADATA", "1000/default/manifest.ocdbt"),
    "a SavedModel without its variables": folder("saved_model.pb"),
    "an OpenVINO model": folder("openvino_model.xml", config=True),
    "a Core ML package": folder("gpt2.mlpackage/Manifest.json"),
    "a TensorRT engine": folder("rank0.engine", config=True),
    "a `pytorch_model.bin` that a browser": unpacked,
    "a copy of a snapshot": broken_links,
    "an interrupted download": folder("model.safetensors.part", config=True),
    "the Hub's cache": hub_root,
    "weights one or two folders below": below,
    "a configuration or a tokenizer": folder("tokenizer.json", config=True),
    "a pointer of Git LFS": file("m.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548105171\n"),
    "a web page": file("m.safetensors", b"<!DOCTYPE html><html><body>Sign in</body></html>"),
    "a server's answer": file("m.bin", b"Entry not found"),
    "an empty file": file("m.bin", b""),
    "a file of zeros": file("m.bin", bytes(4096)),
    "the partial file": file("m.bin.incomplete"),
    "what macOS stores": file("._m.bin", b"\0\5\x16\7" + bytes(80)),
    "an archive of NeMo": nemo,
    "a tar archive": tarred,
    "one array of NumPy": npy,
    "a zip archive": zipped,
    "the configuration or the tokenizer": file("config.json", b'{"model_type": "gpt2"}'),
    "a TensorFlow Lite model": file("m.tflite", b"\x1c\0\0\0TFL3" + bytes(500)),
    "the state of an llm.c run": file("state.bin", struct.pack("<I", 20240527) + bytes(2000)),
    "a ggml file": file("ggml-model-f16.bin", b"lmgg" + bytes(200)),
    "the state of a training run": lambda path: beside_weights(path),
    "the state of a training run alone": file("optimizer.pt"),
    "one file of a DeepSpeed": file("zero_pp_rank_0_mp_rank_00_model_states.pt"),
    "one file of a distributed": file("__0_0.distcp", b"PK\3\4" + bytes(100)),
    "the data of an ONNX model": file("model.onnx_data"),
    "one file of an OpenVINO": file("openvino_model.bin"),
    "a CTranslate2 model": ctranslate2,
    "a Core ML model": file("gpt2.mlmodel"),
    "one file of a TensorRT": file("rank0.engine"),
    "one shard of several": shard,
    "a GGUF file of another": other_gguf,
    "a TensorFlow checkpoint without its index": without(".index"),
    "a TensorFlow checkpoint without its data": without(".data-"),
    "a TensorFlow V1": lambda path: shutil.copy(FIXTURES / "tf_v1" / "model.ckpt", path / "m.ckpt"),
    "a SavedModel of TensorFlow 2": saved_model,
    "a broken symbolic link": broken_link,
    "a pickle that": file("m.bin", b"\x80\x04\x95" + bytes(40)),
    "weights quantized by bitsandbytes": dotted(**{f"{C_FC}__weight": I8, f"{C_FC}__SCB": F32}),
    "weights quantized by AWQ": dotted(**{f"{C_FC}__qweight": I32, f"{C_FC}__qzeros": I32}),
    "weights quantized by GPTQ": dotted(**{f"{C_FC}__qweight": I32, f"{C_FC}__qzeros": I32, f"{C_FC}__g_idx": I32}),
    "weights quantized by optimum-quanto": dotted(**{f"{C_FC}__weight___data": I8, f"{C_FC}__weight___scale": F32}),
    "weights quantized by PyTorch": dotted(**{f"{C_FC}__scale": F32, f"{C_FC}__zero_point": F32}),
    "weights quantized by MLX": lambda path: FIXTURES / "mlx_quantised",
    "weights in float8 or integers": dotted(**{f"{C_FC}__weight": F8, f"{C_FC}__weight_scale": F32}),
    "weights in float8, without": float8,
    "another model, by its": dotted({"model_type": "llama"}, model__embed_tokens__weight=F32),
    "another activation function": dotted({"activation_function": "prelu"}, wte__weight=F32),
    "another model, by the": dotted(transformer__h__0__attn__attention__q_proj__weight=F32),
}  # fmt: skip


def case_of(row):
    """The case whose key begins the row; of two, the longer one."""
    return max((key for key in CASES if row.what.startswith(key)), key=len, default=None)


def refusal(path):
    with pytest.raises(ConversionError) as found:
        open_checkpoint(path)
    return str(found.value)


def test_every_row_of_the_table_has_a_case_and_every_case_a_row():
    assert sorted(filter(None, map(case_of, SITUATIONS))) == sorted(CASES)
    assert len(SITUATIONS) == len(CASES)


@pytest.mark.parametrize("row", SITUATIONS, ids=lambda row: row.what)
def test_each_situation_is_named_in_one_sentence_with_the_next_step(tmp_path, row):
    message = refusal(CASES[case_of(row)](tmp_path))
    fixed = row.sentence.split("{")
    assert fixed[0].strip(" ('") in message
    for part in fixed[1:]:
        assert part.split("}", 1)[-1].strip(" ('") in message
    assert ("\nand pass " in message) == bool(row.command)
    assert len(message.splitlines()) <= 3


# --------------------------------------------------------------------------------------------- commands, as they are typed


def run(command, cwd):
    command = command.replace("python ", f"{sys.executable} ", 1)
    subprocess.run(command, shell=True, check=True, cwd=cwd, capture_output=True, timeout=300)


@pytest.mark.slow  # torch starts anew for each
@pytest.mark.parametrize("make", [fsdp, distributed_with_config, unpacked, zipped, float8])
def test_the_command_of_a_refusal_makes_what_it_says(tmp_path, make):
    """In a folder whose name a shell would split."""
    if make is unpacked and shutil.which("zip") is None:
        pytest.skip("needs zip")
    place = tmp_path / "my folder's"
    place.mkdir()
    path = make(place)
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    _, command, result = refusal(path).splitlines()
    run(command.strip(), tmp_path)
    assert all(file.read_bytes() == data for file, data in before.items())
    (made,) = shlex.split(result.removeprefix("and pass "))
    checkpoint = open_checkpoint(made, n_head=2)
    if make is not float8:
        assert_same_bytes(WEIGHTS, checkpoint)


@pytest.mark.parametrize(("name", "data"), [("model.tar.gz", None), ("model.bin.gz", b"weights")])
def test_an_archive_is_unpacked_by_the_command_and_kept(tmp_path, name, data):
    path = tmp_path / name
    if data:
        path.write_bytes(gzip.compress(data))
    else:
        tarred(tmp_path, name)
    command = refusal(path).split("with '")[1].split("'")[0]
    run(command, tmp_path)
    assert path.exists()
    assert (tmp_path / ("model.bin" if data else "model/model.safetensors")).exists()


# --------------------------------------------------------------------------------------------- what the table must not do


def test_a_gpt2_with_a_fault_of_its_own_keeps_its_message(tmp_path):
    arrays = arrays_of(WEIGHTS)
    del arrays["h.1.ln_2.bias"]
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    assert "missing   h.1.ln_2.bias" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["optimizer.pt", "model-00001-of-00003.bin", "adapter_model.bin"])
def test_a_name_alone_keeps_no_file_from_being_read(tmp_path, name):
    config_in(tmp_path)
    torch.save(torch_arrays(), tmp_path / name)
    assert_same_bytes(WEIGHTS, open_checkpoint(tmp_path / name))


def test_braces_in_a_name_are_no_fields(tmp_path):
    (tmp_path / "{path}.bin").write_bytes(b"Entry not found {text}")
    assert "{path}.bin: a server's answer" in refusal(tmp_path / "{path}.bin")


def test_an_archive_in_memory_is_not_mistaken(tmp_path):
    """A zip archive that cannot be listed is refused by the reader of PyTorch's files."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("a.npy", b"")
    (tmp_path / "m.bin").write_bytes(data.getvalue()[:-30])
    assert "not a valid zip archive" in refusal(tmp_path / "m.bin")
