"""Heads that ``export --task`` and ``--outputs`` use: their forms, shapes and settings."""

import numpy as np
import pytest
import torch
from transformers import GPT2ForSequenceClassification
from transformers_models import language_model, randomize, save, their_config, under

from converters import CheckpointError, ConfigError, LazyTensor, open_checkpoint
from converters.head_config import choice_activation, labels_of
from converters.heads import Head, head_layers
from converters.tensors import DTYPES

WIDTH = 12


def head(kind, /, dtype="F32", **shapes):
    tensors = {}
    for name, shape in shapes.items():
        array = np.zeros(shape, np.float32 if dtype == "F32" else np.int32)
        tensors[name.replace("__", ".")] = LazyTensor.of(array, DTYPES[dtype])
    return [Head(kind, tensors)]


def test_the_layers_of_a_head_have_the_values_and_the_settings_of_the_file(tmp_path):
    labels = {0: "no", 1: "yes", 2: "perhaps"}
    ids = {name: i for i, name in labels.items()}
    model = GPT2ForSequenceClassification(
        their_config(id2label=labels, label2id=ids, problem_type="multi_label_classification")
    )
    randomize(model)
    model.save_pretrained(tmp_path)
    read = open_checkpoint(tmp_path)
    (layer,) = head_layers(read.heads, "sequence_classification", WIDTH, "it")
    assert layer.name == "score"
    assert layer.bias is None
    np.testing.assert_array_equal(layer.weight.read(), model.score.weight.detach().numpy())
    found = labels_of(read.head_settings, 3, "it")
    assert (found.names, dict(found.ids)) == (("no", "yes", "perhaps"), ids)
    assert found.problem_type == "multi_label_classification"


VALUE_HEADS: dict[str, tuple[dict[str, tuple[int, ...]], list[str]]] = {
    "trl": ({"v_head.summary.weight": (1, 12), "v_head.summary.bias": (1,)}, ["v_head.summary"]),
    "DeepSpeed-Chat": ({"v_head.weight": (1, 12)}, ["v_head"]),
    "OpenRLHF": ({"value_head.weight": (1, 12)}, ["value_head"]),
    "trlx": (
        {"v_head.0.weight": (24, 12), "v_head.0.bias": (24,), "v_head.2.weight": (1, 24), "v_head.2.bias": (1,)},
        ["v_head.0", "v_head.2"],
    ),
}


@pytest.mark.parametrize("case", VALUE_HEADS)
def test_the_layers_of_a_value_head_are_found_in_order(tmp_path, case):
    shapes, names = VALUE_HEADS[case]
    model = language_model()
    state = {name: torch.ones(shape) for name, shape in shapes.items()}
    read = open_checkpoint(save({**under("pretrained_model.", model.state_dict()), **state}, tmp_path, model))
    assert [layer.name for layer in head_layers(read.heads, "value", WIDTH, "it")] == names


@pytest.mark.parametrize(
    ("kind", "heads", "message"),
    [
        ("value", [], "it: has no value head"),
        ("sequence_classification", head("token_classification", classifier__weight=(2, 12)), "has no head for text"),
        (
            "token_classification",
            head("token_classification", classifier__weight=(2, 12)),
            "does not know this token_classification head: it has classifier.weight",
        ),
        (
            "value",
            head("value", v_head__dense__weight=(12, 12), v_head__summary__weight=(1, 12)),
            "does not know this value head",
        ),
        (
            "sequence_classification",
            head("sequence_classification", score__weight=(2, 11)),
            r"score.weight is \[2, 11\]; expected \[num_labels, 12\]",
        ),
        (
            "sequence_classification",
            head("sequence_classification", score__weight=(0, 12)),
            r"score.weight is \[0, 12\]",
        ),
        ("sequence_classification", head("sequence_classification", score__weight=()), r"score.weight is \[\]"),
        (
            "token_classification",
            head("token_classification", classifier__weight=(2, 12), classifier__bias=(3,)),
            r"classifier.bias is \[3\]; expected \[num_labels\]",
        ),
        (
            "sequence_classification",
            head("sequence_classification", "I32", score__weight=(2, 12)),
            "score.weight is I32; a parameter must be float",
        ),
    ],
)
def test_a_head_that_is_missing_or_has_another_form_is_refused_in_one_line(kind, heads, message):
    with pytest.raises(CheckpointError, match=message) as raised:
        head_layers(heads, kind, WIDTH, "it")
    assert "\n" not in str(raised.value)


def test_labels_without_names_are_called_as_in_transformers():
    found = labels_of({}, 3, "it")
    assert found.names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert found.to_hf()["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_labels": 3}, "the head has 2 outputs, but num_labels is '3'"),
        ({"num_labels": True}, "num_labels"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "the head has 2 outputs, but id2label has 3 labels"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label does not have the keys 0 to 1"),
        ({"id2label": ["a", "b"]}, "id2label is not an object of names"),
        ({"id2label": {"0": "a", "1": 5}}, "id2label is not an object of names"),
        ({"label2id": {"a": "0"}}, "label2id is not an object of numbers"),
        ({"problem_type": ["regression"]}, "problem_type is"),
    ],
)
def test_labels_that_do_not_fit_the_head_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        labels_of(settings, 2, "it")


@pytest.mark.parametrize(
    "settings",
    [
        {"summary_type": "mean"},
        {"summary_use_proj": False},
        {"summary_proj_to_labels": False},
        {"summary_activation": "relu"},
        {"summary_activation": []},
    ],
)
def test_a_multiple_choice_head_that_computes_something_else_is_refused(settings):
    (key,) = settings
    with pytest.raises(ConfigError, match=key):
        choice_activation(settings, "it")
    assert choice_activation({"summary_type": "cls_index", "summary_activation": "tanh"}, "it") == "tanh"
    assert choice_activation({}, "it") is None
