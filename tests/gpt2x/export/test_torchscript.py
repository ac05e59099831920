"""TorchScript and ``.pt2``: loaded without gpt2x, any batch, any length, cached."""

import json
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import SMALL, TINY, gentle, random_checkpoint
from commands import assert_refused, done
from paths import ROOT

from converters import ChecksumError, FormatError, GPT2Config, save_checkpoint
from gpt2x import SHAKESPEARE, Tokenizer, generate_text
from gpt2x.export.torch_program import export_pt2, export_torchscript
from gpt2x.load import model_of
from gpt2x.runtimes.base import InputError
from gpt2x.runtimes.opening import gpt2x_model, open_decoder
from gpt2x.runtimes.torch import ModuleDecoder

ALONE = """
import itertools, sys, torch
torchscript, pt2 = sys.argv[1:]
modules = torch.jit.load(torchscript), torch.export.load(pt2).module()
assert "gpt2x" not in sys.modules and "converters" not in sys.modules
torch.manual_seed(0)
for module, (B, T) in itertools.product(modules, ((1, 1), (1, 6), (3, 1), (2, 5))):
    ids = torch.randint(13, (B, T + 2))
    ones = lambda n: torch.ones(B, n, dtype=torch.int64)
    empty = [(torch.zeros(B, 2, 0, 3), torch.zeros(B, 2, 0, 3)) for _ in range(2)]
    at = lambda a, b: torch.arange(a, b).expand(B, b - a).contiguous()
    whole, present = module(ids, ones(T + 2), at(0, T + 2), empty)
    first, past = module(ids[:, :T], ones(T), at(0, T), empty)
    second, past = module(ids[:, T:T + 1], ones(T + 1), at(T, T + 1), past)
    third, past = module(ids[:, T + 1:], ones(T + 2), at(T + 1, T + 2), past)
    assert whole.shape == (B, T + 2, 13) and past[1][1].shape == (B, 2, T + 2, 3)
    torch.testing.assert_close(torch.cat((first, second, third), 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(past[0][0], present[0][0], rtol=1e-5, atol=1e-5)
print("ok")
"""


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    export_torchscript(random_checkpoint(), folder / "m.pt")
    export_pt2(random_checkpoint(), folder / "m.pt2")
    return folder


@pytest.mark.slow
def test_both_run_in_torch_alone_for_any_batch_and_any_lengths(tiny_files, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", ALONE, str(tiny_files / "m.pt"), str(tiny_files / "m.pt2")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout == "ok\n", result.stderr


@pytest.mark.parametrize(
    ("name", "load"), [("m.pt", ModuleDecoder.from_torchscript), ("m.pt2", ModuleDecoder.from_pt2)]
)
def test_its_logits_are_the_models(tiny_files, name, load):
    decoder, model = load(tiny_files / name), model_of(random_checkpoint())
    ids = np.random.default_rng(0).integers(13, size=(3, 7))
    mask = np.ones((3, 7), np.int64)
    mask[1, :3] = mask[2, 2:4] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    with torch.no_grad():
        expected, _ = model(*map(torch.from_numpy, (ids, mask, positions)))
    logits, _ = decoder.run(ids, mask, positions, None)
    np.testing.assert_allclose(
        logits[mask == 1], expected.numpy()[mask == 1], rtol=0, atol=1e-5 * abs(expected).max().item()
    )
    assert (decoder.n_ctx, decoder.n_vocab, decoder.config) == (10, 13, TINY)


@pytest.mark.untraced
def test_the_same_loop_generates_the_same_text_from_both_as_from_the_model(tmp_path):
    model = gentle(replace(SMALL, n_vocab=2048))
    export_torchscript(model, tmp_path / "s.pt")
    export_pt2(model, tmp_path / "s.pt2")
    tokenizer, prompts = Tokenizer.from_pretrained(SHAKESPEARE), ["ROMEO:", "The king is a good man and"]
    expected = generate_text(model_of(model), tokenizer, prompts, 24, 0)
    assert len(set(expected[0])) > 8
    for name in ("s.pt", "s.pt2"):
        assert generate_text(open_decoder(tmp_path / name), tokenizer, prompts, 24, 0) == expected


@pytest.mark.parametrize(
    "switches",
    [
        {"tie_word_embeddings": False},
        {"activation_function": "gelu_fast", "scale_attn_by_inverse_layer_idx": True},
        {"activation_function": "gelu_10"},
        {"activation_function": "laplace"},
        {"activation_function": "quick_gelu"},
        {"activation_function": "relu2"},
        {"activation_function": "sqrtsoftplus"},
        {"reorder_and_upcast_attn": True, "scale_attn_weights": False, "activation_function": "relu"},
    ],
)
def test_every_kind_of_model_is_scripted(tmp_path, switches):
    checkpoint = random_checkpoint(GPT2Config(**{**vars(TINY), **switches}))
    export_torchscript(checkpoint, tmp_path / "m.pt")
    ids = np.arange(10)[None]
    logits, _ = ModuleDecoder.from_torchscript(tmp_path / "m.pt").run(ids, None, ids, None)
    with torch.no_grad():
        expected = model_of(checkpoint)(torch.from_numpy(ids))[0].numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize("name", ["m.pt", "m.pt2"])
def test_weights_are_there_once_and_no_path_is(tiny_files, name):
    size = sum(4 * t.size for t in random_checkpoint().tensors.values())
    with zipfile.ZipFile(tiny_files / name) as archive:
        data = {i.filename: archive.read(i) for i in archive.infolist()}
    weights = sum(len(v) for k, v in data.items() if re.search(r"/data/\d+$|/weight_\d+$", k))
    assert size <= weights <= size + 4096
    root = str(ROOT).encode()
    assert not [k for k, v in data.items() if root in v]


def test_verify_compares_all_four_kinds(gpt2x, tiny_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(random_checkpoint(), "a.safetensors")
    save_checkpoint(random_checkpoint(seed=1), "b.safetensors")
    for name in ("m.pt", "m.pt2"):
        assert "full context    same" in done(gpt2x("verify", "a.safetensors", tiny_files / name)).stdout
        other = gpt2x("verify", "b.safetensors", tiny_files / name)
        assert other.exit_code == 1
        assert "max_abs_error is" in other.stdout
    done(gpt2x("verify", tiny_files / "m.pt", tiny_files / "m.pt2"))
    done(gpt2x("verify", tiny_files / "m.pt", "a.safetensors"))


def test_export_writes_verifies_and_refuses_to_write_over(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(random_checkpoint(), "a.safetensors")
    out = done(gpt2x("export", "a.safetensors", "--torchscript", "m.pt")).stdout
    assert "right padding   same" in out
    before = Path("m.pt").read_bytes()
    assert_refused(gpt2x("export", "a.safetensors", "--torchscript", "m.pt"), "m.pt: already exists")
    done(gpt2x("export", "a.safetensors", "--torchscript", "m.pt", "--force"))
    assert Path("m.pt").read_bytes() == before
    assert gpt2x("export", "a.safetensors", "--pt2", "m.zip").exit_code == 2
    assert gpt2x("export", "a.safetensors").exit_code == 2
    assert sorted(p.name for p in Path().iterdir()) == ["a.safetensors", "m.pt"]


def test_a_file_that_is_not_gpt2xs_or_is_damaged_is_one_clear_error(gpt2x, tiny_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(DeprecationWarning):
        torch.jit.script(torch.nn.Linear(2, 2)).save("other.pt")
    assert_refused(gpt2x("generate", "other.pt", "x", "--tokenizer", SHAKESPEARE), "not exported by gpt2x")
    data = bytearray((tiny_files / "m.pt").read_bytes())
    with zipfile.ZipFile(tiny_files / "m.pt") as archive:
        program = next(i for i in archive.infolist() if i.filename.endswith(".py"))
    at = program.header_offset + 30 + len(program.filename) + 60
    data[at : at + 40] = bytes(40)
    Path("broken.pt").write_bytes(data)
    assert_refused(gpt2x("generate", "broken.pt", "x", "--tokenizer", SHAKESPEARE), "does not match its checksum")
    with zipfile.ZipFile(tiny_files / "m.pt") as source, zipfile.ZipFile("other.pt", "w") as target:
        for member in source.infolist():  # checksums are right here, but the program is none
            target.writestr(member, b"?" if member.filename == program.filename else source.read(member))
    assert_refused(gpt2x("generate", "other.pt", "x", "--tokenizer", SHAKESPEARE), "other.pt: torch cannot load it")
    assert_refused(gpt2x("convert", tiny_files / "m.pt", "out.safetensors"))


class OneArgument(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class OtherShape(torch.nn.Module):
    def forward(
        self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, past: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        return torch.zeros(a.shape[0], a.shape[1], 3), past


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("module", "words"), [(OneArgument, "torch cannot run it"), (OtherShape, "not logits")])
def test_a_program_that_says_it_is_a_gpt2_and_is_none(gpt2x, tmp_path, module, words):
    from converters.config import to_hf

    path = tmp_path / "other.pt"
    config = to_hf(GPT2Config(n_layer=1, n_head=1, n_embd=2, n_vocab=2048, n_ctx=32))
    torch.jit.script(module()).save(str(path), _extra_files={"config.json": json.dumps(config)})
    assert_refused(gpt2x("generate", path, "ROMEO:", "--tokenizer", SHAKESPEARE), words)
    assert_refused(gpt2x("verify", path, path), words)


def test_the_cache_does_not_remember_gradients(tiny_files):
    with pytest.warns(DeprecationWarning):
        module = torch.jit.load(tiny_files / "m.pt")
    ids, empty = torch.tensor([[1, 2]]), [(torch.zeros(1, 2, 0, 3), torch.zeros(1, 2, 0, 3)) for _ in range(2)]
    _, past = module(ids, torch.ones(1, 2, dtype=torch.int64), torch.tensor([[0, 1]]), empty)
    assert not past[0][0].requires_grad


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ["m.pt", "m.pt2"])
def test_one_flipped_bit_is_found(tiny_files, tmp_path, name):
    data = bytearray((tiny_files / name).read_bytes())
    data[len(data) // 2] ^= 0x40
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ChecksumError, match="does not match its checksum"):
        open_decoder(tmp_path / name)


@pytest.fixture(scope="module", params=["m.pt", "m.pt2", "model"])
def decoder(request, tiny_files):
    return gpt2x_model(random_checkpoint()) if request.param == "model" else open_decoder(tiny_files / request.param)


def a(*rows):
    return np.array(rows)


ID, AT = a([1, 2]), a([0, 1])


@pytest.mark.parametrize(
    ("ids", "mask", "positions", "words"),
    [
        (np.zeros((1, 0), int), None, np.zeros((1, 0), int), "the prompt is empty"),
        (a([1, 13]), None, AT, "token id 13 is outside the vocabulary of 13"),
        (a([1, -1]), None, AT, "token id -1 is outside"),
        (ID, None, a([9, 10]), "position 10 is outside the context of 10"),
        (a(1, 2), None, a(0, 1), "(batch, tokens) is needed"),
        (a([1.0, 2.0]), None, AT, "int64 is needed"),
        ([[1, 2], [1]], None, AT, "unequal lengths"),
        (ID, None, a([0]), "position_ids have the shape (1, 1), input_ids (1, 2)"),
        (ID, a([1]), AT, "attention_mask has the shape (1, 1), but 0 cached and 2 new tokens need (1, 2)"),
        (a([1, 2], [3, 4]), a([1, 1]), a([0, 1], [0, 1]), "attention_mask has the shape (1, 2)"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(decoder, ids, mask, positions, words):
    for call in (decoder.run, decoder.step):
        with pytest.raises(InputError, match=re.escape(words)):
            call(ids, mask, positions, None)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda past: past[:1], "the cache has 1 layers, the model 2"),
        (lambda past: [*past, past[0]], "the cache has 3 layers, the model 2"),
        (lambda past: [(k.half(), v.half()) for k, v in past], "the cache holds torch.float16 (1, 2, 2, 3)"),
        (lambda past: [(k, v[:, :, :1]) for k, v in past], "the cache holds torch.float32 (1, 2, 1, 3)"),
        (lambda past: [past[0], tuple(t[:, :, :1] for t in past[1])], "(1, 2, 2, 3) is needed"),
        (lambda past: [tuple(t.repeat(2, 1, 1, 1) for t in layer) for layer in past], "(2, 2, 2, 3)"),
        (lambda past: "x", "not one that an earlier step returned"),
        (lambda past: [], "not one that an earlier step returned"),
        (lambda past: (layer for layer in past), "not one that an earlier step returned"),
        (lambda past: [(k.numpy(), v.numpy()) for k, v in past], "the cache holds ndarray; torch.Tensor is needed"),
        (lambda past: [None] * 2, "not one that an earlier step returned"),
        (lambda past: 7, "not one that an earlier step returned"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(decoder, edit, words):
    _, past = decoder.run(ID, None, AT, None)
    with pytest.raises(InputError, match=re.escape(words)):
        decoder.run(a([3]), None, a([2]), edit(past))
    decoder.run(a([3]), None, a([2]), tuple(past))


@pytest.mark.parametrize("name", ["m.pt", "m.pt2"])
def test_reading_a_program_as_weights_says_what_it_is(gpt2x, tiny_files, name):
    assert_refused(
        gpt2x("inspect", tiny_files / name), "whose weights gpt2x does not read; run it with gpt2x generate or verify"
    )


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_configuration_of_other_layers_than_the_program_has(tmp_path):
    from converters.config import to_hf
    from gpt2x.export.interface import Interface

    said = json.dumps(to_hf(replace(TINY, n_layer=3)))
    torch.jit.script(Interface(model_of(random_checkpoint()))).save(
        str(tmp_path / "m.pt"), _extra_files={"config.json": said}
    )
    with pytest.raises(FormatError, match=r"a cache of 2 layers; its config\.json says 3"):
        open_decoder(tmp_path / "m.pt").run(ID, None, AT, None)


@pytest.mark.parametrize(
    ("option", "name"), [("--torchscript", "m.pt"), pytest.param("--pt2", "m.pt2", marks=pytest.mark.slow)]
)
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path, option, name):
    """As ``ulimit -f`` sets it. torch itself would end the process."""
    code = "import resource as r, sys; r.setrlimit(r.RLIMIT_FSIZE, (1 << 20, 1 << 20)); from gpt2x.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "export", str(SHAKESPEARE), option, name, "--no-verify"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (1, f"Error: {name}: cannot be written: File too large\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--torchscript", "m.pt", "--pt2", "x/../m.pt/inner.pt2"), "inner.pt2 in m.pt"),
        (("--torchscript", "m.pt", "--onnx", "m.pt/onnx"), "onnx in m.pt"),
        (("--onnx", "d", "--torchscript", "d/config.json", "--force"), "config.json in d"),
        (("--torchscript", "m.pt2", "--pt2", "./m.pt2"), "two outputs have the same path, m.pt2"),
    ],
)
def test_results_that_would_lie_in_one_another(gpt2x, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    result = gpt2x("export", SHAKESPEARE, *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_destination_below_a_file_or_a_loop_is_found_before_anything_is_written(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("loop").symlink_to("loop")
    for above in ("file", "loop"):
        result = gpt2x("export", SHAKESPEARE, "--onnx", "d", "--torchscript", f"{above}/m.pt")
        assert_refused(result, f"{above}/m.pt: cannot be written: {above} is not a directory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_long_name_and_another_name_are_the_same_file(tiny_files, tmp_path):
    export_torchscript(random_checkpoint(), tmp_path / f"{'x' * 250}.pt")
    assert (tmp_path / f"{'x' * 250}.pt").read_bytes() == (tiny_files / "m.pt").read_bytes()
