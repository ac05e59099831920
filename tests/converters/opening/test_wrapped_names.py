"""A GPT-2 is found under any prefix, between the parts that wrappers add to names, and as a part of a larger model."""

import copy
import json
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoints import TINY, assert_same_bytes, random_checkpoint
from commands import assert_refused, done
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import GPT2LMHeadModel, GPT2Model
from transformers_models import assert_same_logits, language_model, save, their_config, under

from converters import CheckpointError, open_checkpoint
from converters.config import to_hf
from converters.dialects import FLAX, GGUF, KERAS, OPENAI

PREFIXES = [
    "module.",
    "_orig_mod.",
    "model.",
    "model._orig_mod.",
    "_forward_module.model.",
    "gpt2.",
    "lm.",
    "net.gpt2.",
    "pretrained_model.",
    "base_model.model.",
    "my.own.wrapper.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("body_only", [False, True], ids=["language model", "body"])
def test_a_prefix_of_all_names_is_taken_off(tmp_path, prefix, body_only):
    """Lightning's ``.ckpt`` (transformers#25205, transformers#4356), trl's ``pretrained_model``, PEFT's ``base_model.model``."""
    model = language_model()
    part = model.transformer if body_only else model
    read = open_checkpoint(save({"state_dict": under(prefix, part.state_dict())}, tmp_path, model, "x.ckpt"))
    assert_same_logits(read, model)
    assert set(read.left_out) == (set() if body_only else {"lm_head.weight"})


@pytest.mark.parametrize("prefix", ["model.", "net.gpt2.", "module."])
def test_a_prefix_is_taken_off_in_safetensors(tmp_path, prefix):
    model = language_model()
    model.config.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in under(prefix, model.state_dict()).items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    assert_same_logits(open_checkpoint(tmp_path), model)


@pytest.mark.parametrize(
    ("dialect", "prefix"),
    [(OPENAI, "scope/"), (GGUF, "text."), (KERAS, "tf_gpt2/transformer/"), (FLAX, "params/decoder/")],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_prefix_is_taken_off_in_every_dialect(tmp_path, dialect, prefix):
    tiny = random_checkpoint()
    names = dialect.write(tiny.tensors, TINY)
    bare = {name.removeprefix(dialect.prefixes[0]): tensor for name, tensor in names.items()}
    state = {prefix + name: torch.from_numpy(tensor.read()) for name, tensor in bare.items()}
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "m.safetensors"
    )
    read = open_checkpoint(tmp_path / "m.safetensors", n_head=2)
    assert read.dialect == dialect.name
    assert_same_bytes(tiny, read)


def test_nanogpt_under_a_prefix_is_not_taken_for_hugging_faces(tmp_path):
    """Only the orientation of the matrices tells the two apart."""
    model = language_model()
    state = {
        name: tensor.T.contiguous() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else tensor
        for name, tensor in model.state_dict().items()
    }
    read = open_checkpoint(save(under("model.", state), tmp_path, model))
    assert read.dialect == "nanogpt"
    assert_same_logits(read, model)


# ------------------------------------------------------------------------------------------------- parts of wrappers


def test_activation_checkpointing_and_fsdp_inside_each_block_are_taken_off(tmp_path):
    """Names of FSDP over activation checkpointing, as in Lightning-AI/litgpt#1613."""
    model = language_model()
    state = {
        "_fsdp_wrapped_module." + name.replace(".h.0.", ".h.0._fsdp_wrapped_module._checkpoint_wrapped_module."): tensor
        for name, tensor in model.state_dict().items()
    }
    read = open_checkpoint(save(state, tmp_path, model))
    assert_same_logits(read, model)
    assert read.wrappers == ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_parts_of_a_model_that_torch_compiled_are_read(tmp_path):
    model = language_model()
    wrapped = copy.deepcopy(model)
    for block in wrapped.transformer.h:
        compiled: Any = torch.compile(block.get_submodule("mlp"))
        block.add_module("mlp", compiled)
    assert "transformer.h.1.mlp._orig_mod.c_fc.weight" in wrapped.state_dict()
    assert_same_logits(open_checkpoint(save(wrapped.state_dict(), tmp_path, model)), model)


def test_the_names_that_checkpoint_wrapper_gives_parameters_are_read(tmp_path):
    model = language_model()
    wrapped = copy.deepcopy(model)
    for i, block in enumerate(wrapped.transformer.h):
        wrapped.transformer.h[i] = checkpoint_wrapper(block)
    state = dict(wrapped.named_parameters())  # state_dict() removes the part by itself
    assert any("_checkpoint_wrapped_module" in name for name in state)
    assert_same_logits(open_checkpoint(save(state, tmp_path, model)), model)


def test_opacus_grad_sample_module_is_read(tmp_path):
    """``_module.``, as in microsoft/dp-transformers#33, where a DataParallel is around it."""
    model = language_model()
    state = under("module._module.", model.state_dict())
    read = open_checkpoint(save(state, tmp_path, model))
    assert_same_logits(read, model)
    assert read.wrappers == ("module", "_module")


def test_stochastic_weight_averaging_is_read(tmp_path):
    """``torch.optim.swa_utils.AveragedModel`` has ``module.`` and the number of models, ``n_averaged``, which is no parameter."""
    model = language_model()
    averaged = torch.optim.swa_utils.AveragedModel(model.transformer)
    averaged.update_parameters(model.transformer)
    read = open_checkpoint(save(under("gpt.", averaged.state_dict()), tmp_path, model))
    assert_same_logits(read, model)
    assert read.left_out == ("gpt.n_averaged",)


def test_two_names_that_are_one_without_the_parts_of_wrappers_are_refused(tmp_path):
    model = language_model()
    state = {**model.state_dict(), "module.transformer.wte.weight": torch.zeros(40, 12)}
    with pytest.raises(CheckpointError, match=r"transformer.wte.weight and module.transformer.wte.weight are both"):
        open_checkpoint(save(state, tmp_path, model))


def test_flat_parameters_of_fsdp_are_refused_with_what_to_save_instead(tmp_path):
    """Names as in facebookresearch/dinov2#544."""
    model = language_model()
    state = {
        "_fsdp_wrapped_module._flat_param": torch.zeros(9),
        "_fsdp_wrapped_module.transformer.h.0._fsdp_wrapped_module._flat_param": torch.zeros(99),
    }
    with pytest.raises(CheckpointError, match=r"FSDP, as a slice of a vector .*StateDictType.FULL_STATE_DICT"):
        open_checkpoint(save(state, tmp_path, model))


class Symmetric(torch.nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).transpose(-1, -2)


def parametrized(linear):
    parametrize.register_parametrization(linear, "weight", Symmetric())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (parametrized, "remove_parametrizations"),
        (parametrizations.weight_norm, "remove_parametrizations"),
        (parametrizations.spectral_norm, "remove_parametrizations"),
        (torch.nn.utils.spectral_norm, "remove_spectral_norm"),
        (lambda linear: prune.l1_unstructured(linear, "weight", 0.5), "prune.remove"),
    ],
)
def test_what_a_function_makes_the_weight_of_is_refused_with_what_to_call(tmp_path, change, match):
    """A lone ``parametrizations.weight.original`` is no exception: the function has no name in the file."""
    model = language_model()
    changed = copy.deepcopy(model)
    change(changed.get_submodule("transformer.h.0.attn.c_proj"))
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(save(changed.state_dict(), tmp_path, model))


# ---------------------------------------------------------------------------------------------- parts of larger models


def test_the_gpt2_of_clipcap_is_read_and_the_rest_left_out(tmp_path):
    """rmokady/CLIP_prefix_caption#76: ``gpt.`` with masks beside ``clip_project.``."""
    model = language_model()
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in (0, 1)}
    state = under("gpt.", {**model.state_dict(), **masks})
    rest = {"clip_project.model.0.weight": torch.zeros(60, 5), "clip_project.model.0.bias": torch.zeros(60)}
    read = open_checkpoint(save({**rest, **state}, tmp_path, model))
    assert_same_logits(read, model)
    assert set(rest) <= set(read.left_out)
    assert "the GPT-2 with the prefix 'gpt.transformer.' is read; 2 other tensors are left out" in " ".join(read.notes)


def test_the_gpt2_beside_a_whole_bert_is_read(tmp_path):
    """yangjianxin1/ClipCap-Chinese#14: ``gpt2.`` beside ``clip_project.bert.``."""
    model = language_model()
    rest = {
        "clip_project.prefix_const": torch.zeros(2, 12),
        "clip_project.bert.embeddings.word_embeddings.weight": torch.zeros(40, 12),
        "clip_project.bert.encoder.layer.0.attention.self.query.weight": torch.zeros(12, 12),
        "encoder.ln_f.weight": torch.zeros(12),
        "encoder.wte.weight": torch.zeros(40, 12),
    }
    read = open_checkpoint(save({**rest, **under("decoder.gpt2.", model.state_dict())}, tmp_path, model))
    assert_same_logits(read, model)
    assert set(read.left_out) - {"lm_head.weight"} == set(rest)


@pytest.mark.parametrize("states_it", [True, False])
@pytest.mark.parametrize("body_only", [True, False])
def test_cross_attention_of_a_language_model_is_left_out_with_a_note(tmp_path, states_it, body_only):
    """``GPT2LMHeadModel`` uses it only if it is called with ``encoder_hidden_states``."""
    model = language_model(add_cross_attention=True)
    model.config.add_cross_attention = states_it
    state = model.transformer.state_dict() if body_only else model.state_dict()
    old_mask = "h.0.crossattention.bias" if body_only else "transformer.h.0.crossattention.bias"
    read = open_checkpoint(save({**state, old_mask: torch.ones(1, 1, 16, 16)}, tmp_path, model))
    assert_same_logits(read, model)
    left_out = [name for name in read.left_out if "crossattention." in name or "ln_cross_attn." in name]
    assert len(left_out) == 2 * 8 + 1
    notes = " ".join(read.notes)
    assert "17 tensors of cross-attention (crossattention.*, ln_cross_attn.*; the first is" in notes
    assert ("add_cross_attention is true, and taken for false" in notes) == states_it


def test_a_converted_language_model_has_no_cross_attention(gpt2x, tmp_path):
    model = language_model(add_cross_attention=True)
    result = done(gpt2x("convert", save(model.state_dict(), tmp_path / "in", model).parent, tmp_path / "out"))
    assert "16 tensors of cross-attention" in result.stdout
    written = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    assert written.config.add_cross_attention is False
    assert_same_logits(open_checkpoint(tmp_path / "out"), written)
    assert_same_logits(open_checkpoint(tmp_path / "out"), model)


def test_cross_attention_beside_an_encoder_is_refused(tmp_path):
    model = language_model(add_cross_attention=True)
    state = {**model.state_dict(), "encoder.proj.weight": torch.zeros(12, 12)}
    with pytest.raises(CheckpointError, match=r"unknown   transformer.h.0.crossattention"):
        open_checkpoint(save(state, tmp_path, model))


def test_cross_attention_is_no_rest_that_can_be_left_out(tmp_path):
    """The decoder of a VisionEncoderDecoderModel has layers that the logits depend on."""
    model = language_model(add_cross_attention=True)
    model.config.add_cross_attention = False
    with pytest.raises(CheckpointError, match=r"unknown   decoder.transformer.h.0.crossattention"):
        open_checkpoint(save(under("decoder.", model.state_dict()), tmp_path, model))


@pytest.mark.parametrize("name", ["lm_head.bias", "lm_head.ln.weight", "wte.weight", "h.0.ln_1.weight"])
def test_a_tensor_around_the_gpt2_that_may_belong_to_it_is_refused(tmp_path, name):
    model = language_model()
    with pytest.raises(CheckpointError, match=f"unknown   {name}"):
        open_checkpoint(save({**model.state_dict(), name: torch.ones(40)}, tmp_path, model))


@pytest.mark.parametrize(
    ("first", "second"), [("actor.", "critic."), ("model.", "ema."), ("student.", "teacher."), ("model.", "model.ema.")]
)
def test_two_gpt2s_are_refused_by_prefix_until_one_is_chosen(gpt2x, tmp_path, first, second):
    one, two = language_model(1), language_model(2)
    path = save({**under(first, one.state_dict()), **under(second, two.state_dict())}, tmp_path, one)
    with pytest.raises(CheckpointError, match=f"2 GPT-2s in it.*'{first}transformer.' and '{second}transformer.'"):
        open_checkpoint(path)
    assert_same_logits(open_checkpoint(path, prefix=f"{first}transformer"), one)
    chosen = open_checkpoint(path, prefix=second)
    assert_same_logits(chosen, two)
    assert f"{first}transformer.wte.weight" in chosen.left_out
    refusal = gpt2x("convert", path, tmp_path / "out.safetensors")
    assert_refused(refusal)
    option = refusal.stderr.rsplit("such as ", 1)[1].split()
    done(gpt2x("convert", path, tmp_path / "out.safetensors", *option))
    assert_same_logits(open_checkpoint(tmp_path / "out.safetensors"), one)


def test_an_actor_and_a_critic_with_a_value_head_are_two_gpt2s(tmp_path):
    actor, critic = language_model(1), language_model(2)
    state = {**under("actor.", actor.state_dict()), **under("critic.", critic.transformer.state_dict())}
    path = save({**state, "critic.v_head.weight": torch.zeros(1, 12)}, tmp_path, actor)
    with pytest.raises(CheckpointError, match=r"'actor.transformer.' and 'critic.'"):
        open_checkpoint(path)
    read = open_checkpoint(path, prefix="critic")
    assert_same_logits(read, critic)
    assert [head.kind for head in read.heads] == ["value"]


def test_a_prefix_under_which_is_no_gpt2_is_refused(tmp_path):
    model = language_model()
    path = save(under("actor.", model.state_dict()), tmp_path, model)
    with pytest.raises(
        CheckpointError, match=r"no GPT-2 under the prefix 'act'; there is one under 'actor.transformer.'"
    ):
        open_checkpoint(path, prefix="act")


def test_one_gpt2_under_two_prefixes_is_read(tmp_path):
    """A module that is an attribute of two others: ``state_dict()`` names its tensors twice."""

    class Task(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
            self.body = model.transformer

    model = language_model()
    assert_same_logits(open_checkpoint(save(Task(model).state_dict(), tmp_path, model)), model)


# --------------------------------------------------------------------------------------------------------- inspect


def test_inspect_shows_the_wrapper_and_the_head(gpt2x, tmp_path):
    model = language_model()
    state = under("module.actor.", model.state_dict())
    state["module.actor.v_head.summary.weight"] = torch.zeros(1, 12)
    path = save(state, tmp_path, model)
    facts = json.loads(done(gpt2x("inspect", path, "--json")).stdout)
    assert facts["dialect"] == "hf"
    assert facts["wrapper"] == {"prefix": "actor.", "parts": ["module"]}
    tensors = [{"name": "v_head.summary.weight", "dtype": "F32", "shape": [1, 12]}]
    assert facts["heads"] == [{"kind": "value", "tensors": tensors}]
    text = done(gpt2x("inspect", path)).stdout
    assert "wrapper    prefix actor., module" in text
    assert "head       value: v_head.summary.weight [1, 12]" in text


def test_inspect_shows_no_wrapper_where_there_is_none(gpt2x, tmp_path):
    model = language_model()
    model.save_pretrained(tmp_path)
    facts = json.loads(done(gpt2x("inspect", tmp_path, "--json")).stdout)
    assert facts["wrapper"] == {"prefix": "", "parts": []}
    assert facts["heads"] == []
    assert "  wrapper  " not in done(gpt2x("inspect", tmp_path)).stdout


def test_a_body_of_transformers_alone_is_tied(tmp_path):
    body = GPT2Model(their_config()).eval()
    body.save_pretrained(tmp_path)
    model = language_model()
    model.transformer.load_state_dict(body.state_dict())
    read = open_checkpoint(tmp_path)
    assert to_hf(read.config)["tie_word_embeddings"]
    assert_same_logits(read, model)
