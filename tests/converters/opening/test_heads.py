"""Models with other heads, ``lm_head`` under other names, and a tied or untied ``lm_head``."""

import json

import pytest
import safetensors.torch
import torch
import transformers
from commands import assert_refused, done
from safetensors import safe_open
from transformers import GPT2LMHeadModel
from transformers_models import IDS, assert_same_logits, language_model, randomize, save, their_config, under

from converters import CheckpointError, UnknownHeadsError, open_checkpoint


def shapes(read):
    return {head.kind: {name: tensor.shape for name, tensor in head.tensors.items()} for head in read.heads}


# ------------------------------------------------------------------------------------------------------ other heads

VALUE_HEADS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "trl": ("", {"v_head.summary.weight": (1, 12), "v_head.summary.bias": (1,)}),
    "trl, as Trainer saves it": (
        "pretrained_model.",
        {"v_head.summary.weight": (1, 12), "v_head.summary.bias": (1,)},
    ),
    "trl with a projection": ("", {"v_head.dense.weight": (12, 12), "v_head.summary.weight": (1, 12)}),
    "trlx": ("base_model.", {"v_head.0.weight": (24, 12), "v_head.2.weight": (1, 24), "v_head.2.bias": (1,)}),
    "OpenRLHF": ("", {"value_head.weight": (1, 12)}),
}


@pytest.mark.parametrize("case", VALUE_HEADS)
def test_a_value_head_is_left_out_and_its_shapes_are_kept(tmp_path, case):
    """trl's AutoModelForCausalLMWithValueHead (trl#86, trl#1650), CarperAI's trlx, and OpenRLHF."""
    prefix, names = VALUE_HEADS[case]
    model = language_model()
    head = {name: torch.ones(shape) for name, shape in names.items()}
    read = open_checkpoint(save({**under(prefix, model.state_dict()), **head}, tmp_path, model))
    assert_same_logits(read, model)
    assert shapes(read) == {"value": names}
    assert set(names) <= set(read.left_out)


def test_the_reward_model_of_deepspeed_chat_is_read(tmp_path):
    """deepspeedai/DeepSpeedExamples#374: ``rwtransformer.`` and ``v_head.weight``; there is no ``lm_head``."""
    model = language_model()
    state = {"v_head.weight": torch.ones(1, 12), **under("rwtransformer.", model.transformer.state_dict())}
    read = open_checkpoint(save(state, tmp_path, model))
    assert_same_logits(read, model)
    assert shapes(read) == {"value": {"v_head.weight": (1, 12)}}
    assert read.prefix == "rwtransformer."


CLASSES = [
    ("GPT2ForSequenceClassification", "sequence_classification", {"score.weight": (3, 12)}),
    ("GPT2ForTokenClassification", "token_classification", {"classifier.weight": (3, 12), "classifier.bias": (3,)}),
    ("GPT2ForQuestionAnswering", "question_answering", {"qa_outputs.weight": (2, 12), "qa_outputs.bias": (2,)}),
    (
        "GPT2DoubleHeadsModel",
        "multiple_choice",
        {"multiple_choice_head.summary.weight": (1, 12), "multiple_choice_head.summary.bias": (1,)},
    ),
]


@pytest.mark.parametrize("wrapper", ["", "module.", "net."])
@pytest.mark.parametrize(("name", "kind", "tensors"), CLASSES)
def test_the_language_model_below_every_head_of_transformers_is_read(tmp_path, name, kind, tensors, wrapper):
    labels = 2 if kind == "question_answering" else 1 if kind == "multiple_choice" else 3
    classifier = getattr(transformers, name)(their_config(num_labels=labels)).eval()
    randomize(classifier)
    if wrapper:
        classifier.config.save_pretrained(tmp_path)
        torch.save(under(wrapper, classifier.state_dict()), tmp_path / "pytorch_model.bin")
    else:
        classifier.save_pretrained(tmp_path)
    model = language_model()
    model.transformer.load_state_dict(classifier.transformer.state_dict())
    read = open_checkpoint(tmp_path)
    assert_same_logits(read, model)
    assert shapes(read) == {kind: tensors}
    assert (
        read.heads[0].tensors[next(iter(tensors))].read().tolist()
        == next(tensor for name, tensor in classifier.state_dict().items() if name == next(iter(tensors))).tolist()
    )


def test_a_head_is_no_reason_to_accept_a_part_that_gpt2_does_not_have(tmp_path):
    model = language_model()
    state = {**model.transformer.state_dict(), "score.weight": torch.ones(1, 12), "wse.weight": torch.ones(2, 12)}
    with pytest.raises(CheckpointError, match=r"unknown   wse.weight$"):
        open_checkpoint(save(state, tmp_path, model))


# --------------------------------------------------------------------------------------------- lm_head by other names

OTHER_NAMES = [
    "transformer.lm_head.weight",
    "lm_head.decoder.weight",
    "lm_head.0.weight",
    "head.weight",
    "output.weight",
    "out_head.weight",
    "cls.weight",
]


def with_head_named(name, model):
    state = model.state_dict()
    state[name] = state.pop("lm_head.weight")
    return state


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_tied_lm_head_under_another_name_is_dropped(tmp_path, name):
    """transformers#594 and DialoGPT's ``medium_ft.pkl`` have ``lm_head.decoder.weight``; PEFT's CastOutputToFloat ``lm_head.0``."""
    model = language_model()
    read = open_checkpoint(save(with_head_named(name, model), tmp_path, model))
    assert_same_logits(read, model)
    assert read.left_out == ("lm_head.weight",)


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_an_untied_lm_head_under_another_name_is_kept(tmp_path, name):
    model = language_model(tie_word_embeddings=False)
    read = open_checkpoint(save(with_head_named(name, model), tmp_path, model))
    assert not read.config.tie_word_embeddings
    assert_same_logits(read, model)


def test_a_body_in_a_module_of_its_own_beside_an_lm_head_is_read(tmp_path):
    model = language_model(tie_word_embeddings=False)
    state = {**under("backbone.", model.transformer.state_dict()), "head.weight": model.lm_head.weight}
    assert_same_logits(open_checkpoint(save(state, tmp_path, model)), model)


def test_a_classifier_that_has_a_name_of_lm_head_is_left_out(tmp_path):
    model = language_model()
    state = {**under("gpt.", model.transformer.state_dict()), "head.weight": torch.ones(3, 12)}
    read = open_checkpoint(save(state, tmp_path, model))
    assert_same_logits(read, model)
    assert read.left_out == ("head.weight",)


def test_a_bias_of_an_output_layer_is_refused(tmp_path):
    model = language_model(tie_word_embeddings=False)
    state = {**with_head_named("head.weight", model), "head.bias": torch.ones(40)}
    with pytest.raises(CheckpointError, match=r"unknown   head.bias"):
        open_checkpoint(save(state, tmp_path, model))


# ------------------------------------------------------------------------------------------- one name of a tied matrix


def names_in(path):
    with safe_open(path, "pt") as file:
        return set(file.keys())


def test_one_name_of_the_tied_matrix_is_enough_as_save_model_of_safetensors_keeps(tmp_path):
    """safetensors#98: ``save_model`` stores a tensor with several names once."""
    model = language_model()
    model.config.save_pretrained(tmp_path)
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    assert "transformer.wte.weight" not in names_in(tmp_path / "model.safetensors")
    assert_same_logits(open_checkpoint(tmp_path), model)


def test_one_name_of_the_tied_matrix_is_enough_as_accelerate_keeps(tmp_path):
    """accelerate#2875: ``Accelerator.save_model`` records no name that it removed."""
    model = language_model()
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    del state["transformer.wte.weight"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read = open_checkpoint(tmp_path)
    assert_same_logits(read, model)
    assert "wte.weight is not in it: lm_head.weight is taken for both, as they are tied" in read.notes


def test_the_other_name_of_a_tied_matrix_alone_is_enough(tmp_path):
    model = language_model()
    state = model.state_dict()
    del state["lm_head.weight"]
    assert_same_logits(open_checkpoint(save(state, tmp_path, model)), model)


def test_save_model_of_safetensors_records_a_name_under_any_module(tmp_path):
    """Of a tied pair with the names ``head.weight`` and ``net.wte.weight`` it keeps the first."""

    class Task(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.net = model.transformer
            self.head = model.lm_head

    model = language_model()
    model.config.save_pretrained(tmp_path)
    safetensors.torch.save_model(Task(model), str(tmp_path / "model.safetensors"))
    assert "net.wte.weight" not in names_in(tmp_path / "model.safetensors")
    assert_same_logits(open_checkpoint(tmp_path), model)


def test_a_lone_lm_head_that_is_untied_is_refused(tmp_path):
    model = language_model(tie_word_embeddings=False)
    state = model.state_dict()
    del state["transformer.wte.weight"]
    with pytest.raises(CheckpointError, match=r"missing wte.weight: .*config.json states tie_word_embeddings: false"):
        open_checkpoint(save(state, tmp_path, model).parent)


def test_a_matrix_named_head_alone_is_not_taken_for_the_embedding(tmp_path):
    """It may be a classifier's: nothing shows that it was tied."""
    model = language_model()
    state = {**model.transformer.state_dict(), "head.weight": torch.ones(3, 12)}
    del state["wte.weight"]
    with pytest.raises(CheckpointError, match=r"missing   wte.weight"):
        open_checkpoint(save(state, tmp_path, model))


# ------------------------------------------------------------------------------------------ lm_head differs from wte


def differing(tmp_path, said):
    """A directory whose ``lm_head`` differs from the embedding, and the untied model. ``said`` is in config.json."""
    model = language_model(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps({**config, **said}))
    return model


@pytest.mark.parametrize("said", [{}, {"tie_word_embeddings": True}], ids=["nothing", "tied"])
def test_an_lm_head_that_differs_is_refused_with_two_commands_that_work(gpt2x, tmp_path, said):
    """transformers 5 keeps it and warns; transformers 4 ties, which drops it. The file does not say which is meant."""
    (tmp_path / "source").mkdir()
    model = differing(tmp_path / "source", said)
    refusal = gpt2x("convert", tmp_path / "source", tmp_path / "out")
    assert_refused(refusal, "lm_head.weight differs from wte.weight")
    options = [word for word in refusal.stderr.split() if word.startswith("--")]
    assert options == ["--untie", "--tie"]
    done(gpt2x("convert", tmp_path / "source", tmp_path / "kept", "--untie"))
    done(gpt2x("convert", tmp_path / "source", tmp_path / "dropped", "--tie"))
    with torch.no_grad():
        logits = model(IDS).logits
        kept = GPT2LMHeadModel.from_pretrained(tmp_path / "kept").eval()
        dropped = GPT2LMHeadModel.from_pretrained(tmp_path / "dropped").eval()
        torch.testing.assert_close(kept(IDS).logits, logits)
        assert (dropped(IDS).logits - logits).abs().max() > 0.1
    assert not kept.config.tie_word_embeddings
    assert dropped.config.tie_word_embeddings


def test_to_keep_an_lm_head_gives_the_logits_of_transformers(tmp_path):
    model = differing(tmp_path, {"tie_word_embeddings": True})
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert_same_logits(open_checkpoint(tmp_path, tie=False), theirs)
    assert_same_logits(open_checkpoint(tmp_path, tie=False), model)


def test_to_keep_changes_nothing_of_a_tied_model(tmp_path):
    model = language_model()
    model.save_pretrained(tmp_path)
    read = open_checkpoint(tmp_path, tie=False)
    assert read.config.tie_word_embeddings
    assert_same_logits(read, model)


def test_an_untied_model_over_torchs_linear_keeps_its_lm_head(tmp_path):
    """minGPT's ``model.pt``: a bare state dict, an ``lm_head`` that is never tied, and the tanh form of GELU."""
    model = language_model(tie_word_embeddings=False)
    state = {
        name: tensor.T.contiguous() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else tensor
        for name, tensor in model.state_dict().items()
    }
    state |= {f"transformer.h.{i}.attn.bias": torch.ones(16, 16).tril()[None, None] for i in (0, 1)}
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(UnknownHeadsError):
        open_checkpoint(tmp_path / "model.pt")
    read = open_checkpoint(tmp_path / "model.pt", n_head=2, activation_function="gelu_new", tie=False)
    assert_same_logits(read, model)
