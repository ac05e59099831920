"""``verify`` says yes to what is the same, and no to every kind of difference."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import TINY, gentle, random_checkpoint
from commands import assert_refused, done
from paths import RELEASE, needs_shared

from converters import Checkpoint, GPT2Config, LazyTensor, open_checkpoint, save_checkpoint
from converters.tensors import F16
from gpt2x import SHAKESPEARE
from gpt2x.verify import packages, weights
from gpt2x.verify import report as parity
from gpt2x.verify.checks import Check
from gpt2x.verify.report import verify_checkpoints
from gpt2x.verify.report_page import page
from gpt2x.verify.scenarios import SCENARIOS


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(random_checkpoint(), "a.safetensors")


def changed(name, change):
    """The tiny model with one tensor changed."""
    tiny = random_checkpoint()
    array = change(tiny.tensors[name].read().copy())
    return replace(tiny, tensors={**tiny.tensors, name: LazyTensor.of(np.ascontiguousarray(array))})


def flip_one_bit(array):
    array.view(np.uint8).reshape(-1)[0] ^= 1  # the least significant bit of one value
    return array


def verdict(report):
    return {check.name: check.passed for check in report.checks}


# ---------------------------------------------------------------------------------------------------- what is same


def test_conversions_of_one_model_are_the_same(gpt2x):
    save_checkpoint(open_checkpoint(SHAKESPEARE), "hf")
    result = gpt2x("verify", SHAKESPEARE, "hf")
    assert result.exit_code == 0, result.output
    assert "52 of 52 tensors bit-identical" in result.stdout
    assert "same vocabulary and merges" in result.stdout
    assert "200 of 200 tokens the same" in result.stdout


def test_a_model_alone_is_compared_with_transformers(gpt2x):
    result = gpt2x("verify", SHAKESPEARE)
    assert result.exit_code == 0, result.output
    assert "against transformers" in result.stdout
    assert "200 of 200 tokens the same" in result.stdout


def test_a_model_alone_is_compared_with_the_reference_where_transformers_is_missing(gpt2x, monkeypatch):
    monkeypatch.setattr(packages, "installed", lambda module: module == "torch")
    result = gpt2x("verify", "a.safetensors")
    assert result.exit_code == 0, result.output
    assert "against float64 reference" in result.stdout


def test_weights_are_compared_without_torch(gpt2x, monkeypatch):
    monkeypatch.setattr(packages, "installed", lambda module: False)
    shutil.copy("a.safetensors", "b.safetensors")
    result = gpt2x("verify", "a.safetensors", "b.safetensors")
    assert result.exit_code == 0, result.output
    assert "pip install 'gpt2x[torch]'" in result.stdout
    alone = gpt2x("verify", "a.safetensors")
    assert alone.exit_code == 1  # nothing was compared: that is no proof


def test_the_report_is_written_as_json(gpt2x):
    result = gpt2x("verify", "a.safetensors", "a.safetensors", "--json", "report.json")
    assert result.exit_code == 0
    report = json.loads(Path("report.json").read_text())
    assert report["passed"] is True
    assert [check["name"] for check in report["checks"]] == [
        "configuration",
        "weights",
        "tokenizer",
        "run",
        "text",
        *SCENARIOS,
        "greedy tokens",
    ]
    assert json.loads(gpt2x("verify", "a.safetensors", "a.safetensors", "--json", "-").stdout) == report


def test_a_report_is_never_written_over_a_file(gpt2x):
    before = Path("a.safetensors").read_bytes()
    assert_refused(gpt2x("verify", "a.safetensors", "--json", "a.safetensors"), "already exists")
    assert Path("a.safetensors").read_bytes() == before


# ----------------------------------------------------------------------------------------- every kind of difference


@pytest.mark.parametrize(
    ("other", "failing", "words"),
    [
        (lambda: changed("h.1.ln_2.bias", flip_one_bit), {"weights"}, "h.1.ln_2.bias differs in 1 values"),
        (lambda: changed("h.0.attn.c_proj.weight", np.transpose), {"weights", "logits"}, "h.0.attn.c_proj.weight differs in 30"),
        (lambda: random_checkpoint(seed=1), {"weights", "logits"}, "0 of 28 tensors"),
        (lambda: random_checkpoint().cast(F16), {"weights", "logits"}, "is F32, not F16 (largest difference"),
        (lambda: switched(activation_function="gelu"), {"configuration", "logits"}, "activation_function is 'gelu_new', not 'gelu'"),
        (lambda: switched(layer_norm_epsilon=0.5), {"configuration", "logits"}, "layer_norm_epsilon"),
        (lambda: switched(n_head=3), {"configuration", "logits"}, "n_head is 2, not 3"),
        (lambda: switched(scale_attn_weights=False), {"configuration", "logits"}, "scale_attn_weights"),
        (lambda: switched(scale_attn_by_inverse_layer_idx=True), {"configuration", "logits"}, "scale_attn_by_inverse_layer_idx"),
        (lambda: smaller(n_layer=1), {"configuration", "weights", "logits"}, "is only in the first"),
        (lambda: smaller(n_vocab=12), {"configuration", "weights"}, "is [13, 6], not [12, 6]"),
        (lambda: smaller(n_ctx=9), {"configuration", "weights"}, "n_ctx is 10, not 9"),
        (lambda: smaller(tie_word_embeddings=False), {"configuration", "weights", "logits"}, "lm_head.weight is only in the second"),
    ],
)  # fmt: skip
def test_a_difference_is_found_named_and_exit_code_1(gpt2x, other, failing, words):
    save_checkpoint(other(), "b.safetensors")
    result = gpt2x("verify", "a.safetensors", "b.safetensors", "--json", "report.json")
    assert result.exit_code == 1, result.output
    assert words in result.stdout
    report = json.loads(Path("report.json").read_text())
    names = {check["name"] for check in report["checks"] if check["passed"] is False}
    failed = {"logits" if name in SCENARIOS else name for name in names}
    assert failed - {"greedy tokens"} == failing  # tiny models may generate the same tokens all the same


ROUNDED = {"half.safetensors": "fp16", "brain.bin": "bf16", "half.gguf": "fp16", "q.gguf": "q8_0"}


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_weights_are_proved_to_be_the_firsts_rounded(gpt2x, name):
    model, one = gentle(), "h.1.mlp.c_fc.weight"
    save_checkpoint(model, "m.safetensors")
    done(gpt2x("convert", "m.safetensors", name, "--dtype", ROUNDED[name]))
    plain = gpt2x("verify", "m.safetensors", name)
    assert plain.exit_code == 1
    assert "--rounded rounds the first model's values" in plain.stdout
    result = done(gpt2x("verify", "m.safetensors", name, "--rounded"))
    assert "28 of 28 tensors bit-identical" in result.stdout
    assert "DIFFERENT" not in result.stdout
    scaled = LazyTensor.of(model.tensors[one].read() * np.float32(1.02))
    save_checkpoint(replace(model, tensors={**model.tensors, one: scaled}), "other.safetensors")
    assert "27 of 28 tensors bit-identical" in gpt2x("verify", "other.safetensors", name, "--rounded").stdout


def test_a_value_that_does_not_fit_into_what_the_second_holds(gpt2x):
    large = changed("h.0.mlp.c_fc.weight", lambda values: values * np.float32(1e6))
    save_checkpoint(large, "large.safetensors")
    save_checkpoint(random_checkpoint().cast(F16), "half.safetensors")
    assert_refused(gpt2x("verify", "large.safetensors", "half.safetensors", "--rounded"), "does not fit into F16")


def test_models_of_other_sizes_in_one_number_format_are_no_matter_of_rounding(gpt2x):
    save_checkpoint(smaller(n_layer=1), "b.safetensors")
    assert "--rounded" not in gpt2x("verify", "a.safetensors", "b.safetensors").stdout


def test_only_weights_are_compared_as_rounded(gpt2x):
    done(gpt2x("export", SHAKESPEARE, "--onnx", "onnx", "--precision", "int8", "--no-verify"))
    assert_refused(gpt2x("verify", SHAKESPEARE, "onnx", "--rounded"), "--rounded compares weights with weights only")
    assert gpt2x("verify", "a.safetensors", "--rounded").exit_code == 2


def switched(**fields):
    """The same weights under another configuration."""
    return replace(random_checkpoint(), config=GPT2Config(**{**vars(TINY), **fields}))


def smaller(**fields):
    """The same random numbers as far as they go, in another shape."""
    config = GPT2Config(**{**vars(TINY), **fields})
    tiny, other = random_checkpoint(), random_checkpoint(config)
    shared = {
        n: tiny.tensors[n] for n in config.shapes() if n in tiny.tensors and tiny.tensors[n].shape == config.shapes()[n]
    }
    return Checkpoint(config=config, tensors={**other.tensors, **shared})


def test_another_tokenizer_is_a_difference(gpt2x):
    shipped = open_checkpoint(SHAKESPEARE)
    model = random_checkpoint(replace(TINY, n_vocab=shipped.config.n_vocab, bos_token_id=0, eos_token_id=0))
    for name in ("a", "b"):
        save_checkpoint(replace(model, tokenizer=shipped.tokenizer), name, "tf")
    assert gpt2x("verify", "a", "b").exit_code == 0
    merges = Path("b/vocab.bpe").read_text().splitlines()
    merges[5], merges[6] = merges[6], merges[5]
    Path("b/vocab.bpe").write_text("\n".join(merges) + "\n")
    result = gpt2x("verify", "a", "b")
    assert result.exit_code == 1
    assert "the vocabularies or merges differ" in result.stdout


def test_a_report_that_compared_nothing_has_not_passed():
    assert not parity.Report("a", "b", []).passed
    assert not parity.Report("a", "b", [Check("logits", None, "")]).passed


def test_the_page_of_a_rounded_model_is_headed_within_bounds():
    rounded = parity.Report("a", "b", [Check("chunks", True, "", {"inexact": True})])
    assert '<span class="passed">within bounds</span></h1>' in page(rounded)
    equal = parity.Report("a", "b", [Check("chunks", True, "", {})])
    assert '<span class="passed">same</span></h1>' in page(equal)


def test_verify_reads_each_byte_of_each_file_once(monkeypatch):
    counts = {}
    real = LazyTensor.chunks

    def counting(tensor):
        counts[id(tensor)] = counts.get(id(tensor), 0) + 1
        return real(tensor)

    monkeypatch.setattr(LazyTensor, "chunks", counting)
    monkeypatch.setattr(packages, "installed", lambda module: False)
    a, b = random_checkpoint(), random_checkpoint()
    assert verify_checkpoints(a, b).passed
    assert set(counts.values()) == {1}


# ------------------------------------------------------------------------------------------------ OpenAI's release


def with_own_table(monkeypatch, checkpoint):
    """A table of checksums like the release's, of synthetic data."""
    from converters.checkpoint import crc_of

    table = {name: {"shape": t.shape, "crc32c": crc_of(t)} for name, t in checkpoint.tensors.items()}
    monkeypatch.setattr(weights, "release_checksums", lambda: table)


@pytest.mark.parametrize("kind", ["tf", "safetensors", "bin", "hf"])
def test_every_format_is_certified_by_the_checksums(gpt2x, monkeypatch, kind):
    deep = random_checkpoint(GPT2Config(n_layer=12, n_head=2, n_embd=6, n_ctx=10, n_vocab=13))
    with_own_table(monkeypatch, deep)
    target = {"safetensors": "m.safetensors", "bin": "m.bin"}.get(kind, kind)
    save_checkpoint(deep, target, kind)
    result = gpt2x("verify", target, "--against", "openai-124M")
    assert result.exit_code == 0, result.output
    assert "148 of 148 tensors bit-identical to OpenAI's release" in result.stdout


def test_one_flipped_bit_is_no_longer_the_release(gpt2x, monkeypatch):
    with_own_table(monkeypatch, random_checkpoint())
    save_checkpoint(changed("ln_f.weight", flip_one_bit), "b.safetensors")
    result = gpt2x("verify", "b.safetensors", "--against", "openai-124M")
    assert result.exit_code == 1
    assert "27 of 28 tensors bit-identical" in result.stdout
    assert "ln_f.weight" in result.stdout


def test_another_model_is_not_the_release(gpt2x):
    result = gpt2x("verify", SHAKESPEARE, "--against", "openai-124M")
    assert result.exit_code == 1
    assert "0 of 148" in result.stdout


def test_the_table_has_gpt2_smalls_148_tensors():
    table = weights.release_checksums()
    assert {name: facts["shape"] for name, facts in table.items()} == GPT2Config().shapes()
    assert len(table) == 148


@needs_shared
def test_the_table_is_that_of_openais_own_index():
    from converters.containers.tf_bundle import Entry
    from converters.dialects import OPENAI
    from converters.io.reading import File
    from converters.io.sstable import read_table, unmask

    real = dict(read_table(File(RELEASE / "model.ckpt.index")))
    for name, facts in weights.release_checksums().items():
        assert unmask(Entry.parse(real[OPENAI.names(name)[0].encode()], name).crc) == facts["crc32c"]


def test_b_and_against_together_are_wrong_usage(gpt2x):
    assert gpt2x("verify", "a.safetensors", "a.safetensors", "--against", "openai-124M").exit_code == 2


def test_a_broken_file_is_one_clear_error(gpt2x):
    Path("b.safetensors").write_bytes(Path("a.safetensors").read_bytes()[:-3])
    assert_refused(gpt2x("verify", "a.safetensors", "b.safetensors"), "truncated")
