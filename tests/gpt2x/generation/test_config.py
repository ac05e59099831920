"""``GenerationConfig``: every control by name, contradictions, and ``generation_config.json``."""

import json
from contextlib import nullcontext

import pytest
from transformers import GenerationConfig as TheirConfig

from converters import ConfigError
from gpt2x.generation.config import GenerationConfig, controls_beside


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_beams": 3, "temperature": 0.7}, "beam search does not sample: leave out temperature"),
        ({"num_beams": 3, "top_k": 5, "seed": 1}, "leave out top_k, seed"),
        ({"num_beams": 2, "num_return_sequences": 3}, "more than num_beams, 2"),
        ({"temperature": 0, "num_return_sequences": 2}, "greedy decoding has one result"),
        ({"length_penalty": 2.0}, "only affects beam search"),
        ({"early_stopping": True, "num_beams": 1}, "only affects beam search"),
        ({"min_new_tokens": 9, "max_new_tokens": 5}, "more than max_new_tokens, 5"),
        ({"stop_strings": ["a", ""]}, "a stop string is empty"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be above 0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"bad_words_ids": [[]]}, "at least one token id"),
        ({"logit_bias": {-3: 1.0}}, "a token id is -3"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"do_sampel": True}, "unknown control: do_sampel"),
    ],
    ids=str,
)
def test_a_contradiction_or_a_bad_value_is_an_error(values, words):
    with pytest.raises(ValueError, match=words):
        GenerationConfig.of(**values)


def write(folder, **values):
    (folder / "generation_config.json").write_text(json.dumps(values))
    return controls_beside(folder)


def test_a_file_that_transformers_wrote_is_read(tmp_path):
    TheirConfig(
        do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.2, eos_token_id=[5, 6], bad_words_ids=[[1, 2]],
        max_new_tokens=33, stop_strings=["END"], pad_token_id=5, sequence_bias=[[[3], 1.5]],
    ).save_pretrained(tmp_path)  # fmt: skip
    config = GenerationConfig.of(**controls_beside(tmp_path).values)
    sampling = config.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (0.7, 0.9, 50, 1.2)
    assert sampling.bad_words_ids == ((1, 2),)
    assert sampling.sequence_bias == {(3,): 1.5}
    assert (config.end_tokens(9), config.max_new_tokens, config.stop_strings) == ((5, 6), 33, ("END",))


def test_sampling_controls_count_only_where_do_sample_is_true(tmp_path):
    assert write(tmp_path, temperature=0.7, top_k=5, repetition_penalty=1.1).values == {"repetition_penalty": 1.1}
    assert write(tmp_path, do_sample=False, temperature=0.7).values == {"temperature": 0.0}
    assert write(tmp_path, do_sample=True).values == {"top_k": 50}
    assert write(tmp_path, do_sample=True, num_beams=1, length_penalty=2.0).values == {"top_k": 50}


def test_the_file_of_openai_s_gpt2_changes_nothing_but_the_end_token(tmp_path):
    found = write(
        tmp_path, _from_model_config=True, bos_token_id=50256, eos_token_id=50256, transformers_version="4.26"
    )
    assert (found.values, found.unsupported) == ({"eos_token_id": (50256,)}, [])


def test_keys_with_an_effect_that_gpt2x_lacks_are_listed(tmp_path):
    found = write(
        tmp_path, penalty_alpha=0.6, num_beam_groups=1, epsilon_cutoff=0.0, guidance_scale=1.5, output_scores=True
    )
    assert found.unsupported == ["penalty_alpha", "guidance_scale"]


def test_sampled_beams_are_listed_as_unsupported(tmp_path):
    found = write(tmp_path, do_sample=True, num_beams=4, temperature=0.7)
    assert (found.values, found.unsupported) == ({"num_beams": 4}, ["do_sample with num_beams"])
    assert write(tmp_path, do_sample=True, num_beams=1).unsupported == []
    assert write(tmp_path, do_sample=False, num_beams=4).unsupported == []


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": "hot"}, {"top_k": 1.5}, {"eos_token_id": ["a"]}, {"bad_words_ids": 3}, {"sequence_bias": [[1]]},
        {"stop_strings": [3]}, {"top_p": 10**400}, {"early_stopping": 4}, {"num_beams": True}, {"suppress_tokens": {"a": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_an_error(tmp_path, values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        write(tmp_path, **values)


@pytest.mark.parametrize(("stated", "found"), [(-1, ()), ([-1, 6], (6,)), ([], ()), (6, (6,))], ids=str)
def test_a_negative_end_token_ends_no_text(tmp_path, stated, found):
    """As in transformers, which trl and others rely on to read a text to its limit."""
    assert write(tmp_path, eos_token_id=stated).config({}).end_tokens(9) == found


def test_max_length_counts_the_prompt():
    config = GenerationConfig.of(max_length=20)
    assert (config.new_tokens(15), config.new_tokens(25)) == (5, 0)


@pytest.mark.parametrize(
    ("file", "given", "merged"),
    [
        ({"temperature": 0.7, "top_k": 50}, {"top_k": 3}, {"temperature": 0.7, "top_k": 3}),
        ({"temperature": 0.7, "top_k": 50}, {"num_beams": 3}, {"num_beams": 3}),
        ({"num_beams": 3, "length_penalty": 2.0}, {"temperature": 0.5}, {"temperature": 0.5}),
        ({"max_length": 20}, {"max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"num_beams": 4, "num_return_sequences": 4}, {"num_beams": 2}, {"num_beams": 2}),
        ({"min_new_tokens": 20}, {"max_new_tokens": 5}, {"max_new_tokens": 5}),
    ],
    ids=str,
)
def test_options_take_precedence_over_what_contradicts_them(tmp_path, file, given, merged):
    from gpt2x.generation.config import FileControls

    assert FileControls(file).merged(given) == merged


@pytest.mark.parametrize(
    ("file", "given", "error", "words"),
    [
        ({"repetition_penalty": -1.0}, {"temperature": 0}, ConfigError, "generation_config.json: repetition_penalty is -1"),
        ({"repetition_penalty": 1.2}, {"temperature": -1}, ValueError, "^temperature is -1"),
        ({"num_beams": 10**9}, {}, ConfigError, "num_beams is 1000000000; it must be 1 to 1024"),
        ({"do_sample": True, "num_return_sequences": 10**9}, {}, ConfigError, "num_return_sequences is 1000000000"),
        ({"num_return_sequences": 3}, {"max_new_tokens": 5}, None, ""),
        ({"num_beams": 3}, {"length_penalty": 2.0}, None, ""),
    ],
    ids=str,
)  # fmt: skip
def test_an_invalid_value_is_a_fault_of_the_file_or_of_the_option(tmp_path, file, given, error, words):
    found = write(tmp_path, **file)
    with pytest.raises(error, match=words) if error else nullcontext():
        found.config(given)
