"""Adapters of PEFT: merged, they compute what the model with its adapter computes."""

import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from checkpoints import arrays_of
from paths import FIXTURES, ROOT

from converters import CheckpointError, ConfigError, ConversionError, FormatError, open_checkpoint, save_checkpoint
from converters.adapter_config import CONFIG_FILE, read_adapter_config
from converters.heads import head_layers
from converters.tensors import DTYPES
from gpt2x.runtimes.reference import ReferenceDecoder, ReferenceTask

ADAPTERS = FIXTURES / "adapters"
BASE = ADAPTERS / "base"
EXPECTED = dict(np.load(ADAPTERS / "expected.npz"))
CLASSIFIER = FIXTURES / "adapter_of_classifier"
CLASSIFIED = dict(np.load(CLASSIFIER / "expected.npz"))
CASES = sorted(set(EXPECTED) - {"ids"} - {name for name in EXPECTED if name.endswith("_merged")})
MERGED = [name for name in CASES if f"{name}_merged" in EXPECTED]
# merge_and_unload changes the one matrix that is wte and lm_head, and computes something else than the model with its adapter.
MERGED_INTO_TIED = ["both_apart", "dora_embeddings", "dora_head", "dora_tied_pair", "embedding_alone", "embeddings", "lm_head", "resized_head", "tokens_of_both", "tokens_of_head"]  # fmt: skip
# A module of modules_to_save is a copy of its own.
UNTIED = ["embedding_and_saved_head", "head_and_saved_embedding", "resized", "saved_embedding", "saved_head"]


def logits(checkpoint, ids=None):
    """The logits of the float64 model: [B, T, V]."""
    ids = EXPECTED["ids"] if ids is None else ids
    decoder = ReferenceDecoder(checkpoint)
    positions = np.arange(ids.shape[1])[None]
    return np.concatenate([decoder.run(row[None], None, positions, None)[0] for row in ids])


def assert_equal_logits(checkpoint, expected):
    assert np.abs(logits(checkpoint) - expected).max() <= 1e-5 * np.abs(expected).max()


def opened(case, **options):
    if case == "whole":
        return open_checkpoint(ADAPTERS / case, **options)
    return open_checkpoint(BASE, adapter=ADAPTERS / case, **options)


@pytest.fixture
def copy(tmp_path):
    """A copy of an adapter, to change."""

    def make(case="c_attn"):
        return shutil.copytree(ADAPTERS / case, tmp_path / case)

    return make


def edit(folder, **values):
    """Change an adapter's configuration."""
    file = folder / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def write(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")


# ----------------------------------------------------------------------------------------------------------- merged


@pytest.mark.parametrize("case", MERGED)
def test_the_merged_model_is_that_of_merge_and_unload(case):
    assert_equal_logits(opened(case), EXPECTED[f"{case}_merged"])


@pytest.mark.parametrize("case", [name for name in CASES if name not in (*MERGED_INTO_TIED, "tokens_and_head")])
def test_the_merged_model_computes_what_the_model_with_its_adapter_computes(case):
    assert_equal_logits(opened(case), EXPECTED[case])


@pytest.mark.parametrize("case", CASES)
def test_with_untie_every_merged_model_computes_what_the_model_with_its_adapter_computes(case):
    assert_equal_logits(opened(case, tie=False), EXPECTED[case])


def test_every_adapter_changes_the_logits():
    base = logits(open_checkpoint(BASE))
    for case in CASES:
        assert np.abs(EXPECTED[case][..., :48] - base).max() > 1e-2 * np.abs(base).max(), case


@pytest.mark.parametrize("case", MERGED_INTO_TIED)
def test_a_note_says_that_the_merged_model_is_another_than_the_model_with_its_adapter(case):
    """peft#2018: merge_and_unload adds a change of lm_head to the tied embedding, too, which is another model."""
    checkpoint = opened(case)
    assert checkpoint.config.tie_word_embeddings
    [note] = [note for note in checkpoint.notes if "peft#2018" in note]
    assert "the one matrix that is wte and lm_head" in note
    assert "--untie" in note
    apart = np.abs(EXPECTED[case] - EXPECTED[f"{case}_merged"]).max()
    assert apart > 1e-2 * np.abs(EXPECTED[case]).max()


@pytest.mark.parametrize("case", MERGED_INTO_TIED)
def test_with_untie_the_changes_of_a_tied_pair_stay_apart(case):
    checkpoint = opened(case, tie=False)
    assert not checkpoint.config.tie_word_embeddings
    assert any("no longer tied" in note and "merge_and_unload would change both" in note for note in checkpoint.notes)


@pytest.mark.parametrize("case", MERGED_INTO_TIED)
def test_with_tie_the_result_is_that_of_merge_and_unload(case):
    checkpoint = opened(case, tie=True)
    assert checkpoint.config.tie_word_embeddings
    assert_equal_logits(checkpoint, EXPECTED[f"{case}_merged"])


@pytest.mark.parametrize("case", UNTIED)
def test_a_saved_module_is_a_copy_which_unties_the_pair(case):
    checkpoint = opened(case)
    assert not checkpoint.config.tie_word_embeddings
    [note] = [note for note in checkpoint.notes if "no longer tied" in note]
    assert "peft" not in note


def test_with_tie_a_saved_lm_head_is_dropped():
    checkpoint = opened("embedding_and_saved_head", tie=True)
    assert checkpoint.config.tie_word_embeddings
    merged = opened("embedding_and_saved_head").tensors["wte.weight"].read()
    assert (checkpoint.tensors["wte.weight"].read() == merged).all()


@pytest.mark.parametrize("case", ["c_attn", "tied_pair", "saved_pair", "tokens", "tokens_alone"])
@pytest.mark.parametrize("tie", [None, False])
def test_a_tied_pair_that_stays_equal_stays_tied(case, tie):
    checkpoint = opened(case, tie=tie)
    assert checkpoint.config.tie_word_embeddings
    assert not any("peft#2018" in note for note in checkpoint.notes)


def test_an_untied_base_keeps_two_matrices(tmp_path):
    save_checkpoint(opened("saved_head"), tmp_path / "base", "hf")
    before = arrays_of(open_checkpoint(tmp_path / "base"))
    after = arrays_of(open_checkpoint(tmp_path / "base", adapter=ADAPTERS / "lm_head"))
    assert (before["wte.weight"] == after["wte.weight"]).all()
    assert (before["lm_head.weight"] != after["lm_head.weight"]).any()


def test_trained_tokens_with_a_change_of_lm_head_need_untie():
    """peft 0.21's merge_and_unload drops the change of lm_head without a word."""
    with pytest.raises(CheckpointError, match=r"trains tokens, and changes lm_head by low rank.* pass --untie"):
        opened("tokens_and_head")


@pytest.mark.parametrize("value", ["wte", [1], {"wte": 1}])
def test_modules_to_save_that_are_not_a_list_of_names_are_refused(copy, value):
    folder = copy("saved_embedding")
    edit(folder, modules_to_save=value)
    with pytest.raises(ConfigError, match=r"modules_to_save is .*, not a list of names"):
        open_checkpoint(BASE, adapter=folder)


def test_only_what_the_adapter_changes_is_computed():
    base, merged = open_checkpoint(BASE), opened("one_layer")
    before, after = arrays_of(base), arrays_of(merged)
    assert {name for name in before if before[name].tobytes() != after[name].tobytes()} == {"h.1.attn.c_attn.weight"}


def test_an_adapter_of_peft_0_2_is_merged():
    """peft#276, peft#852: later versions of peft do not load its GPT-2 adapters, [2 r, in] and [2 n, r, 1]."""
    folder = FIXTURES / "adapter_of_peft_0_2"
    expected = np.load(folder / "expected.npz")
    checkpoint = open_checkpoint(BASE, adapter=folder)
    assert (
        np.abs(logits(checkpoint, expected["ids"]) - expected["logits"]).max()
        <= 1e-5 * np.abs(expected["logits"]).max()
    )
    before, after = arrays_of(open_checkpoint(BASE)), arrays_of(checkpoint)
    key = slice(16, 32)  # of c_attn's 48 outputs
    assert (before["h.0.attn.c_attn.weight"][:, key] == after["h.0.attn.c_attn.weight"][:, key]).all()


def test_a_resized_vocabulary_comes_with_the_adapter():
    """peft#1700, peft#673: tokens were added before training; loading such an adapter fails in peft until the base is resized."""
    checkpoint = opened("resized")
    assert checkpoint.config.n_vocab == 52
    assert checkpoint.tensors["lm_head.weight"].shape == (52, 16)


def test_the_names_of_a_compiled_or_sharded_model_are_read(copy):
    """peft#1886: torch.compile puts _orig_mod, FSDP _fsdp_wrapped_module, into the names of an adapter."""
    folder = copy()
    tensors = tensors_of(folder)
    prefix = "base_model.model.transformer"
    renamed = {name.replace(prefix, "base_model.model._orig_mod.transformer"): value for name, value in tensors.items()}
    renamed = {name.replace(".attn.", ".attn._fsdp_wrapped_module."): value for name, value in renamed.items()}
    write(folder, renamed)
    assert_equal_logits(open_checkpoint(BASE, adapter=folder), EXPECTED["c_attn"])


def test_an_adapter_of_the_model_without_its_head_is_read(copy):
    """Feature extraction: PEFT wraps GPT2Model, whose names have no ``transformer.``."""
    folder = copy()
    write(folder, {name.replace("transformer.", ""): value for name, value in tensors_of(folder).items()})
    assert_equal_logits(open_checkpoint(BASE, adapter=folder), EXPECTED["c_attn"])


def test_the_head_of_another_task_is_left_out(copy):
    folder = copy()
    tensors = tensors_of(folder)
    write(folder, {**tensors, "base_model.model.score.weight": np.zeros((2, 16), np.float32)})
    checkpoint = open_checkpoint(BASE, adapter=folder)
    assert "base_model.model.score.weight" in checkpoint.left_out
    assert_equal_logits(checkpoint, EXPECTED["c_attn"])


def classifier_of(checkpoint):
    """The logits of text classification, [B, N], in float64."""
    return ReferenceTask(checkpoint, "text-classification").run(CLASSIFIED["ids"])["logits"]


def base_with_head(folder):
    """The base with a head for text classification of its own."""
    shutil.copytree(BASE, folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    head = {"score.weight": np.ones((3, 16), np.float32)}
    safetensors.numpy.save_file({**tensors, **head}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_head_that_is_trained_with_an_adapter_replaces_that_of_the_base(tmp_path):
    base = base_with_head(tmp_path / "base")
    for source in (BASE, base):
        found = classifier_of(open_checkpoint(source, adapter=CLASSIFIER))
        assert np.abs(found - CLASSIFIED["logits"]).max() <= 1e-5 * np.abs(CLASSIFIED["logits"]).max()
    own = classifier_of(open_checkpoint(base, adapter=ADAPTERS / "c_attn"))
    assert (own[:, 0] == own[:, 1]).all()


def test_the_trained_head_in_a_state_dict_that_is_not_merged_replaces_the_original(tmp_path):
    tensors = safetensors.numpy.load_file(BASE / "model.safetensors")
    names = {name: f"base_model.model.{name}" for name in tensors}
    projections = [name for name in tensors if "attn.c_attn" in name]
    names |= {name: names[name].replace("c_attn.", "c_attn.base_layer.") for name in projections}
    whole = {names[name]: array for name, array in tensors.items()}
    whole["base_model.model.score.original_module.weight"] = np.ones((3, 16), np.float32)
    for name, array in tensors_of(CLASSIFIER).items():
        stem, _, end = name.rpartition(".")
        whole[f"{stem}{'.modules_to_save' if 'score' in name else ''}.default.{end}"] = array
    shutil.copytree(CLASSIFIER, tmp_path / "whole")
    shutil.copy(BASE / "config.json", tmp_path / "whole")
    (tmp_path / "whole/adapter_model.safetensors").unlink()
    safetensors.numpy.save_file(whole, tmp_path / "whole/model.safetensors", {"format": "pt"})
    found = classifier_of(open_checkpoint(tmp_path / "whole"))
    assert np.abs(found - CLASSIFIED["logits"]).max() <= 1e-5 * np.abs(CLASSIFIED["logits"]).max()


def test_a_head_that_an_adapter_changes_by_low_rank_is_refused_where_it_is_used(copy):
    folder = copy()
    factors = {f"v_head.summary.lora_{part}.weight": np.ones((4, 4), np.float32) for part in "AB"}
    write(folder, {**tensors_of(folder), **{f"base_model.model.{name}": array for name, array in factors.items()}})
    checkpoint = open_checkpoint(BASE, adapter=folder)
    assert_equal_logits(checkpoint, EXPECTED["c_attn"])
    with pytest.raises(CheckpointError, match="does not know this value head: it has v_head.summary.a") as raised:
        head_layers(checkpoint.heads, "value", 16, "it")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("case", ["c_attn", "named/words"])
def test_an_adapter_is_found_by_its_directory_and_by_its_file(case):
    for path in (ADAPTERS / case, next((ADAPTERS / case).glob("adapter_model.*"))):
        assert_equal_logits(open_checkpoint(BASE, adapter=path), EXPECTED[case.split("/")[0]])


@pytest.mark.parametrize("to", ["safetensors", "bin", "gguf", "nanogpt", "llmc", "tf", "hf"])
def test_every_format_is_written_with_the_adapter_merged(tmp_path, to):
    merged = opened("all_linear")
    save_checkpoint(merged, tmp_path / "out", to)
    gelu = "gelu_new" if to == "nanogpt" else None
    back = open_checkpoint(tmp_path / "out", n_head=2, activation_function=gelu)
    for name, array in arrays_of(merged).items():
        assert (array == back.tensors[name].read()).all(), name


@pytest.mark.parametrize("base_format", ["gguf", "nanogpt", "tf", "bin"])
def test_the_base_may_be_in_any_format(tmp_path, base_format):
    save_checkpoint(open_checkpoint(BASE), tmp_path / "base", base_format)
    gelu = "gelu_new" if base_format == "nanogpt" else None
    checkpoint = open_checkpoint(tmp_path / "base", adapter=ADAPTERS / "dora", n_head=2, activation_function=gelu)
    expected = arrays_of(opened("dora"))
    for name, tensor in checkpoint.tensors.items():
        assert tensor.read().tobytes() == expected[name].tobytes(), name


# ------------------------------------------------------------------------------------------------------------- dtype


@pytest.fixture
def half(tmp_path):
    """The base in float16."""
    return save_checkpoint(open_checkpoint(BASE), tmp_path / "half", dtype="fp16").path


def test_a_merged_tensor_has_the_dtype_of_the_base_and_is_rounded_once(half):
    exact = open_checkpoint(half, adapter=ADAPTERS / "all_linear", merged_dtype="fp64")
    rounded = open_checkpoint(half, adapter=ADAPTERS / "all_linear")
    assert {tensor.dtype.name for tensor in rounded.tensors.values()} == {"F16"}
    for name, array in arrays_of(rounded).items():
        assert (array == exact.tensors[name].read().astype(np.float16)).all(), name


def test_a_dtype_that_is_asked_for_is_not_rounded_to_that_of_the_base(half, tmp_path):
    merged = open_checkpoint(half, adapter=ADAPTERS / "c_attn", merged_dtype="fp32")
    save_checkpoint(merged, tmp_path / "out.safetensors", dtype="fp32")
    values = open_checkpoint(tmp_path / "out.safetensors").tensors["h.0.attn.c_attn.weight"].read()
    assert (values != values.astype(np.float16)).any()


def test_saved_tensors_take_the_dtype_of_the_base(half):
    merged = open_checkpoint(half, adapter=ADAPTERS / "saved_head")
    assert merged.tensors["lm_head.weight"].dtype == DTYPES["F16"]


def test_a_merged_value_that_does_not_fit_is_refused(half, copy, tmp_path):
    folder = copy()
    edit(folder, lora_alpha=1e9)
    merged = open_checkpoint(half, adapter=folder)
    with pytest.raises(ConversionError, match="h.0.attn.c_attn.weight: .* does not fit into F16"):
        save_checkpoint(merged, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_the_result_does_not_depend_on_chunks(monkeypatch):
    from converters.io import reading

    expected = arrays_of(opened("dora"))
    monkeypatch.setattr(reading, "CHUNK", 100)
    for name, array in arrays_of(opened("dora")).items():
        assert array.tobytes() == expected[name].tobytes()


# --------------------------------------------------------------------------------------------------- alone, and whole


@pytest.mark.parametrize("name", ["", "adapter_model.safetensors"])
def test_an_adapter_alone_says_what_to_type(name):
    path = ADAPTERS / "c_attn" / name
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    assert "a LoRA adapter of 'me/tiny', not a whole model" in str(error.value)
    assert f"gpt2x convert hf://me/tiny OUT --adapter {ADAPTERS / 'c_attn'}" in str(error.value)


def test_an_adapter_in_a_training_run_says_what_to_type(copy):
    folder = copy()
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin"):
        (folder / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="a LoRA adapter .* --adapter"):
        open_checkpoint(folder)


def test_a_short_name_of_a_base_becomes_an_address(copy):
    folder = copy()
    edit(folder, base_model_name_or_path="gpt2-medium")
    with pytest.raises(CheckpointError, match="gpt2x convert hf://openai-community/gpt2-medium OUT"):
        open_checkpoint(folder)


def test_an_unmerged_state_dict_is_merged_by_the_configuration_beside_it():
    checkpoint = open_checkpoint(ADAPTERS / "whole")
    assert_equal_logits(checkpoint, EXPECTED["whole"])
    assert any("merged a LoRA adapter" in note for note in checkpoint.notes)


def test_an_unmerged_state_dict_without_a_configuration_says_what_to_type(tmp_path):
    folder = shutil.copytree(ADAPTERS / "whole", tmp_path / "whole")
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(ConfigError, match=r"a model and its LoRA adapter, not merged.*lora_alpha.*--adapter DIR"):
        open_checkpoint(folder)
    assert_equal_logits(open_checkpoint(folder, adapter=ADAPTERS / "whole"), EXPECTED["whole"])


# ----------------------------------------------------------------------------------------------------------- refused


def test_an_adapter_of_a_larger_model_is_refused_in_one_line(copy, tmp_path):
    """peft#1932 and many others: the adapter was trained on another size."""
    folder = copy()
    tensors = {
        name: np.zeros([2 * n if n > 4 else n for n in value.shape], np.float32)
        for name, value in tensors_of(folder).items()
    }
    write(folder, tensors)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(BASE, adapter=folder)
    assert "does not fit" in str(error.value)
    assert "[32, 96] h.0.attn.c_attn.weight, the base's is [16, 48] (and 1 more); its base is 'me/tiny'" in str(
        error.value
    )
    assert "\n" not in str(error.value)


def test_a_layer_that_the_base_lacks_is_refused(copy):
    folder = copy()
    write(folder, {name.replace("h.1.", "h.11."): value for name, value in tensors_of(folder).items()})
    with pytest.raises(
        CheckpointError, match=r"changes h.11.attn.c_attn.weight, which the base with 2 layers does not have"
    ):
        open_checkpoint(BASE, adapter=folder)


def test_an_adapter_of_another_architecture_is_refused(copy):
    folder = copy()
    write(folder, {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros((4, 16), np.float32)})
    with pytest.raises(CheckpointError, match=r"not an adapter of a GPT-2 .*\n  unknown   base_model.*q_proj"):
        open_checkpoint(BASE, adapter=folder)


def test_tensors_that_training_in_shards_left_empty_are_refused(copy):
    """peft#2500: with DeepSpeed ZeRO-3, ``save_pretrained`` writes tensors of shape [0]."""
    folder = copy()
    write(folder, {name: np.zeros(0, np.float32) for name in tensors_of(folder)})
    with pytest.raises(CheckpointError, match="empty .* ZeRO-3 or FSDP saved it without gathering"):
        open_checkpoint(BASE, adapter=folder)


def test_a_file_without_tensors_is_refused(copy):
    """alpaca-lora#446: an adapter_model.bin of 443 bytes."""
    folder = copy()
    write(folder, {})
    with pytest.raises(CheckpointError, match="without tensors"):
        open_checkpoint(BASE, adapter=folder)


def test_a_missing_factor_is_refused(copy):
    folder = copy()
    tensors = tensors_of(folder)
    del tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    write(folder, tensors)
    with pytest.raises(CheckpointError, match="missing   lora_B of h.0.attn.c_attn.weight"):
        open_checkpoint(BASE, adapter=folder)


def test_a_rank_that_is_not_the_configuration_s_is_refused(copy):
    folder = copy()
    edit(folder, r=8)
    with pytest.raises(CheckpointError, match=r"lora_A is \[4, 16\] and lora_B is \[48, 4\], but .* states rank 8"):
        open_checkpoint(BASE, adapter=folder)


@pytest.mark.parametrize(("case", "stated"), [("dora", False), ("c_attn", True)])
def test_magnitudes_that_the_configuration_contradicts_are_refused(copy, case, stated):
    folder = copy(case)
    edit(folder, use_dora=stated)
    with pytest.raises(CheckpointError, match=f"use_dora is {str(stated).lower()}, but"):
        open_checkpoint(BASE, adapter=folder)


def test_a_truncated_vocabulary_stays_as_the_user_asked():
    with pytest.raises(CheckpointError, match=r"its .* is \[52, 16\], the base's is \[40, 16\]"):
        opened("resized", n_vocab=40)
    assert opened("c_attn", n_vocab=40).config.n_vocab == 40


def test_values_that_are_not_finite_go_into_the_result_without_a_warning(copy):
    folder = copy("dora")
    tensors = tensors_of(folder)
    tensors["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"][:] = np.inf
    write(folder, tensors)
    assert np.isnan(open_checkpoint(BASE, adapter=folder).tensors["h.0.attn.c_attn.weight"].read()).all()


def test_two_values_of_one_parameter_are_refused(copy):
    folder = copy("saved_head")
    tensors = tensors_of(folder)
    tensors["base_model.model.lm_head.modules_to_save.weight"] = tensors["base_model.model.lm_head.weight"] + 1
    write(folder, tensors)
    with pytest.raises(CheckpointError, match="duplicate .* another tensor for the same parameter"):
        open_checkpoint(BASE, adapter=folder)


def test_factors_of_an_embedding_with_trained_rows_must_be_complete(copy):
    folder = copy("tokens")
    tensors = tensors_of(folder)
    write(folder, {**tensors, "base_model.model.transformer.wte.lora_embedding_A": np.zeros((4, 48), np.float32)})
    with pytest.raises(CheckpointError, match="missing   lora_B of wte.weight"):
        open_checkpoint(BASE, adapter=folder)


def test_two_adapters_in_one_state_dict_are_refused(copy):
    folder = copy()
    tensors = {}
    for name, value in tensors_of(folder).items():
        tensors[name.replace(".weight", ".one.weight")] = value
        tensors[name.replace(".weight", ".two.weight").replace("h.0", "h.1")] = value
    write(folder, tensors)
    with pytest.raises(CheckpointError, match="several adapters"):
        open_checkpoint(BASE, adapter=folder)


def test_several_adapters_in_one_directory_are_listed(tmp_path):
    for name in ("one", "two"):
        shutil.copytree(ADAPTERS / "c_attn", tmp_path / name)
    with pytest.raises(ConfigError, match=r"several adapters \(one, two\)"):
        open_checkpoint(BASE, adapter=tmp_path)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_an_adapter_whose_base_was_changed_before_training_is_refused(copy, init):
    """MuLabPKU/PiSSA: the factors belong to what is left of the base after a part was taken out of it."""
    folder = copy()
    edit(folder, init_lora_weights=init)
    with pytest.raises(ConfigError, match="path_initial_model_for_weight_conversion"):
        open_checkpoint(BASE, adapter=folder)


@pytest.mark.parametrize(
    "key", ["alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora", "from_the_future"]
)
def test_a_setting_that_may_change_the_arithmetic_is_refused(copy, key):
    folder = copy()
    edit(folder, **{key: [1]})
    with pytest.raises(ConfigError, match=f"sets {key}, which gpt2x does not support"):
        open_checkpoint(BASE, adapter=folder)


@pytest.mark.parametrize("kind", ["IA3", "ADALORA", "LOHA", "LOKR", "VERA", "OFT"])
def test_a_type_that_only_peft_merges_is_named(copy, kind):
    folder = copy()
    edit(folder, peft_type=kind)
    for open_it in (lambda: open_checkpoint(BASE, adapter=folder), lambda: open_checkpoint(folder)):
        with pytest.raises(ConversionError, match=rf"a PEFT adapter of type {kind}.*merge_and_unload"):
            open_it()


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"])
def test_a_type_that_cannot_be_merged_is_named(copy, kind):
    folder = copy()
    edit(folder, peft_type=kind)
    with pytest.raises(ConversionError, match=rf"a PEFT adapter of type {kind}.*It cannot be merged"):
        open_checkpoint(BASE, adapter=folder)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"peft_type": None}, "it has no peft_type"),
        ({"peft_type": None, "lora_parameters": {}}, "mlx_lm.fuse"),
        ({"peft_type": None, "config": {"architecture": "lora"}, "model_class": "GPT2LMHeadModel"}, "merge_adapter"),
        ({"r": 0}, "not a positive integer"),
        ({"r": True}, "not a positive integer"),
        ({"r": "4"}, "not a positive integer"),
        ({"lora_alpha": None}, "not a finite number"),
        ({"lora_alpha": 10**400}, "not a finite number"),
        ({"lora_alpha": float("nan")}, "not a finite number"),
        ({"use_rslora": "yes"}, "not true or false"),
        ({"rank_pattern": [1]}, "not an object"),
        ({"alpha_pattern": {"(a+)+": 1}}, "is not supported"),
        ({"alpha_pattern": {"(?i)c_attn": 1}}, "is not supported"),
        ({"alpha_pattern": {"a" * 300: 1}}, "is not supported"),
        ({"alpha_pattern": {"(": 1}}, "is not supported"),
        ({"enable_lora": [True]}, "two of query, key and value"),
    ],
)
def test_an_invalid_configuration_is_refused(copy, values, match):
    folder = copy()
    edit(folder, **values)
    with pytest.raises(ConfigError, match=match):
        open_checkpoint(BASE, adapter=folder)


@pytest.mark.parametrize("indices", [None, [3, 7], [3, 3, 7], [3, 7, -1], [3, 7, 48], {"wte": [1]}, [3, 7, 1.0]])
def test_rows_that_the_configuration_does_not_list_are_refused(copy, indices):
    folder = copy("tokens")
    edit(folder, trainable_token_indices=indices)
    with pytest.raises(CheckpointError, match="rows"):
        open_checkpoint(BASE, adapter=folder)


def test_an_added_vocabulary_of_the_embedding_alone_needs_its_head(copy):
    folder = copy("resized")
    tensors = tensors_of(folder)
    del tensors["base_model.model.lm_head.weight"]
    write(folder, tensors)
    with pytest.raises(CheckpointError, match="a token embedding of 52 rows, but lm_head has 48"):
        open_checkpoint(BASE, adapter=folder)
    assert open_checkpoint(BASE, adapter=folder, tie=True).config.n_vocab == 52


@pytest.mark.parametrize(
    ("path", "match"),
    [("absent", "no such file"), (".", "no adapter_config.json"), ("hf://me/words", "use gpt2x.fetch")],
)
def test_a_path_without_an_adapter_is_refused(tmp_path, monkeypatch, path, match):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversionError, match=match):
        open_checkpoint(BASE, adapter=path)


def test_an_adapter_without_weights_is_refused(copy):
    folder = copy()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FormatError, match="no weights of an adapter"):
        open_checkpoint(BASE, adapter=folder)


def test_a_pickle_that_would_run_code_is_not_run(copy):
    folder = copy("named") / "words"
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(ConversionError):
        open_checkpoint(BASE, adapter=folder)


def test_patterns_are_those_of_peft(copy):
    """A pattern matches the end of a name, from a dot on; the first one counts."""
    folder = copy()
    edit(folder, alpha_pattern={"attn": 1, "h.1.attn.c_attn": 2, r"h\.[02]\.attn\.c_(attn|proj)": 3, "c_attn": 4})
    config = read_adapter_config(folder / CONFIG_FILE)
    scales = [config.scale_of(f"transformer.h.{i}.attn.c_attn") * 4 for i in range(3)]
    assert scales == [3, 2, 3]
    assert config.scale_of("transformer.h.3.attn.c_attn") * 4 == 4
    assert config.scale_of("transformer.wte") * 4 == 8


# ------------------------------------------------------------------------------------------------- the real programs


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_adapters_that_peft_writes_now_are_merged(tmp_path):
    script = FIXTURES / "make_adapters.py"
    subprocess.run([sys.executable, script, tmp_path / "adapters"], check=True, cwd=ROOT, capture_output=True)
    expected = dict(np.load(tmp_path / "adapters" / "expected.npz"))
    base = tmp_path / "adapters" / "base"
    for case in CASES:
        folder = tmp_path / "adapters" / case
        if case == "whole":
            assert_equal_logits(open_checkpoint(folder), expected[case])
            continue
        assert_equal_logits(open_checkpoint(base, adapter=folder, tie=False), expected[case])
        if case in MERGED:
            assert_equal_logits(open_checkpoint(base, adapter=folder), expected[f"{case}_merged"])
