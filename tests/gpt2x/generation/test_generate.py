"""Generation: sampling, stop conditions, batches, streaming; the same tokens as transformers."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import TINY, random_checkpoint

from gpt2x import SHAKESPEARE, PromptError, Tokenizer, from_pretrained, generate_text
from gpt2x.generation.loop import Generation
from gpt2x.generation.sampling import Sampling
from gpt2x.generation.text import TextStream
from gpt2x.load import model_of
from gpt2x.runtimes.base import Decoder
from gpt2x.runtimes.torch import TorchDecoder


@pytest.fixture(scope="module")
def model():
    return from_pretrained(SHAKESPEARE)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(SHAKESPEARE)


class Scripted(Decoder):
    """A decoder that repeats the same tokens, whatever its input. ``fed`` lists the inputs."""

    runtime = "a script"

    def __init__(self, script, n_ctx=10, n_vocab=13):
        self.config = replace(TINY, n_ctx=n_ctx, n_vocab=n_vocab)
        self.script = itertools.cycle(script)
        self.fed = []

    def run(self, input_ids, attention_mask, position_ids, cache):
        raise NotImplementedError

    def step(self, input_ids, attention_mask, position_ids, cache):
        self.fed.append((input_ids, attention_mask, position_ids))
        token = next(self.script)
        return np.eye(self.n_vocab, dtype=np.float32)[[token] * len(input_ids)], cache


GREEDY = Sampling(temperature=0)


def tokens_of(generation):
    return [list(row) for row in zip(*generation, strict=True)]


# ------------------------------------------------------------------------------------------------------- sampling


LOGITS = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04], np.float32))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.4, 0.3, 0.2, 0.06, 0.04]),
        (Sampling(top_k=0, top_p=1), [0.4, 0.3, 0.2, 0.06, 0.04]),
        (Sampling(top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
        (Sampling(top_k=99), [0.4, 0.3, 0.2, 0.06, 0.04]),
        (Sampling(top_p=0.5), [4 / 7, 3 / 7, 0, 0, 0]),
        (Sampling(top_p=0.05), [1, 0, 0, 0, 0]),
        (Sampling(top_p=0), [1, 0, 0, 0, 0]),
        (Sampling(temperature=0.5), np.array([16, 9, 4, 0.36, 0.16]) / 29.52),
        (Sampling(temperature=1e-9), [1, 0, 0, 0, 0]),
        # Each after the one before: top-k of 3 leaves 4/9, 3/9, 2/9; then p = 0.7 leaves the first two.
        (Sampling(top_k=3, top_p=0.7), [4 / 7, 3 / 7, 0, 0, 0]),
        # Temperature first: it sharpens to 0.54, 0.30, 0.14, ..., of which 0.5 needs only one.
        (Sampling(temperature=0.5, top_p=0.5), [1, 0, 0, 0, 0]),
    ],
)
def test_probabilities_follow_temperature_then_top_k_then_top_p(sampling, expected):
    np.testing.assert_allclose(sampling.probabilities(LOGITS), expected, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"top_k": 20}, {"top_p": 0.9}, {"temperature": 1.3, "top_k": 50, "top_p": 0.6}]
)
def test_probabilities_equal_those_of_transformers(options):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(size=500).astype(np.float32) * 3
    x = torch.from_numpy(logits)[None]
    for name, warper in (
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
    ):
        if name in options:
            x = warper(options[name])(None, x)
    np.testing.assert_allclose(Sampling(**options).probabilities(logits), x.softmax(-1)[0].numpy(), atol=1e-6)


def test_samples_follow_the_probabilities():
    sampling = Sampling(seed=0)
    (generator,) = sampling.generators(1)
    counts = np.bincount([sampling.choose(LOGITS, generator) for _ in range(5000)], minlength=5) / 5000
    np.testing.assert_allclose(counts, [0.4, 0.3, 0.2, 0.06, 0.04], atol=0.03)


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 1.1}, {"top_p": -0.1}]
)
def test_a_setting_that_means_nothing_is_an_error(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)


# ------------------------------------------------------------------------------------------------------- the loop


def test_max_new_tokens_are_new_tokens():
    generation = Generation(Scripted([1, 2, 3]), [[5, 5]], 4, GREEDY)
    assert tokens_of(generation) == [[1, 2, 3, 1]]
    assert generation.finish == ["length"]


def test_no_token_is_computed_that_nobody_asked_for():
    decoder = Scripted([1])
    assert list(Generation(decoder, [[5]], 0, GREEDY)) == []
    assert decoder.fed == []
    list(Generation(decoder, [[5]], 3, GREEDY))
    assert len(decoder.fed) == 3


def test_it_stops_at_the_end_of_text_without_saying_it():
    generation = Generation(Scripted([1, 2, 12, 3]), [[5]], 8, GREEDY, eos_token_id=12)
    assert tokens_of(generation) == [[1, 2, None]]
    assert generation.finish == ["stop"]


def test_it_stops_where_the_context_is_full():
    generation = Generation(Scripted([1]), [[5] * 7], 8, GREEDY)
    assert tokens_of(generation) == [[1, 1, 1]]
    assert generation.finish == ["context"]


def test_a_prompt_that_fills_the_context_leaves_no_room():
    generation = Generation(Scripted([1]), [[5] * 10], 8, GREEDY)
    assert list(generation) == []
    assert generation.finish == ["context"]


def test_rows_end_each_for_its_own_reason():
    generation = Generation(Scripted([1]), [[5] * 9, [5] * 3], 4, GREEDY)
    assert tokens_of(generation) == [[1, None, None, None], [1, 1, 1, 1]]
    assert generation.finish == ["context", "length"]


def test_unequal_prompts_are_padded_on_the_left_with_their_own_positions():
    decoder = Scripted([1])
    list(Generation(decoder, [[5, 6, 7], [8]], 2, GREEDY))
    ids, mask, positions = decoder.fed[0]
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    ids, mask, positions = decoder.fed[1]
    assert (ids.tolist(), mask.tolist(), positions.tolist()) == ([[1], [1]], [[1, 1, 1, 1], [0, 0, 1, 1]], [[3], [1]])


def test_equal_prompts_need_no_mask():
    decoder = Scripted([1])
    list(Generation(decoder, [[5, 6], [7, 8]], 2, GREEDY))
    assert all(mask is None for _, mask, _ in decoder.fed)


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([], "the prompt is empty"),
        ([1] * 11, "has 11 tokens; the model's context is 10"),
        ([13], "outside the model's vocabulary of 13"),
        ([-1], "outside"),
    ],
)
def test_a_prompt_that_the_model_cannot_take_is_an_error(prompt, match):
    with pytest.raises(PromptError, match=match):
        Generation(Scripted([1]), [[1, 2], prompt], 5)


# ----------------------------------------------------------------------------------------------------------- text


PROMPTS = ["ROMEO:", "To be, or not to be, that is the question:\nWhether", "O"]


def test_it_returns_prompt_and_continuation(model, tokenizer):
    text = generate_text(model, tokenizer, "ROMEO:", 20, 0.8, 40, 0.95, seed=1)
    assert text.startswith("ROMEO:")
    assert 0 < len(tokenizer.encode(text)) - len(tokenizer.encode("ROMEO:")) <= 20


def test_a_seed_makes_it_repeatable_and_another_changes_it(model, tokenizer):
    one, same, other = (generate_text(model, tokenizer, "ROMEO:", 30, seed=s) for s in (1, 1, 2))
    assert one == same != other
    assert generate_text(model, tokenizer, "ROMEO:", 30) != generate_text(model, tokenizer, "ROMEO:", 30)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "seed": 5}])
def test_a_stream_joined_is_the_text(model, tokenizer, options):
    whole = generate_text(model, tokenizer, "ROMEO:", 40, **options)
    pieces = list(generate_text(model, tokenizer, "ROMEO:", 40, stream=True, **options))
    assert pieces[0] == "ROMEO:"
    assert len(pieces) > 10
    assert "".join(pieces) == whole


def test_a_list_of_unequal_prompts_gives_the_texts_of_each_alone(model, tokenizer):
    together = generate_text(model, tokenizer, PROMPTS, 40, 0)
    assert together == [generate_text(model, tokenizer, prompt, 40, 0) for prompt in PROMPTS]
    steps = list(generate_text(model, tokenizer, PROMPTS, 40, 0, stream=True))
    assert ["".join(row) for row in zip(*steps, strict=True)] == together


def test_an_empty_list_gives_an_empty_list(model, tokenizer):
    assert generate_text(model, tokenizer, [], 5) == []


def test_rows_of_a_seeded_batch_are_different(model, tokenizer):
    a, b = generate_text(model, tokenizer, ["ROMEO:", "ROMEO:"], 30, seed=1)
    assert a != b
    assert a == generate_text(model, tokenizer, "ROMEO:", 30, seed=1)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Any:
    from transformers import GPT2LMHeadModel

    from converters import open_checkpoint, save_checkpoint

    folder = tmp_path_factory.mktemp("hf") / "hf"
    save_checkpoint(open_checkpoint(SHAKESPEARE), folder)
    return GPT2LMHeadModel.from_pretrained(folder)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_equals_that_of_transformers_token_for_token(model, tokenizer, theirs, prompt):
    ids = tokenizer.encode(prompt)
    n = min(200, 256 - len(ids))
    out = theirs.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=n,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    generation = Generation(TorchDecoder(model), [ids], n, GREEDY)
    assert [*ids, *tokens_of(generation)[0]] == out[0].tolist()


def test_tokenizers_of_transformers_and_tokenizers_serve_as_well(model, tokenizer, tmp_path):
    import tokenizers
    from transformers import AutoTokenizer

    from converters import open_checkpoint, save_checkpoint

    save_checkpoint(open_checkpoint(SHAKESPEARE), tmp_path / "hf")
    expected = generate_text(model, tokenizer, "ROMEO:", 30, 0)
    auto = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert generate_text(model, auto, "ROMEO:", 30, 0) == expected
    auto.clean_up_tokenization_spaces = True  # would eat the space in " ,"
    assert generate_text(model, auto, "ROMEO:", 30, 0) == expected
    bare = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert generate_text(model, bare, "ROMEO:", 30, 0) == expected


def test_characters_of_several_tokens_come_whole(tokenizer):
    text = "☃ 🤖 é ok"
    stream, pieces = TextStream(tokenizer), []
    for token in tokenizer.encode(text):
        pieces.append(stream.push(token))
    pieces.append(stream.push(None))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_never_comes_whole_is_said_at_the_end(tokenizer):
    ids = tokenizer.encode("🤖")[:-1]
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, ids), stream.push(None)]) == tokenizer.decode(ids)


def test_the_model_is_told_apart_from_its_tokenizer_when_they_do_not_fit(tokenizer):
    with pytest.raises(PromptError, match="does the tokenizer belong to another model"):
        generate_text(model_of(random_checkpoint()), tokenizer, "ROMEO:", 5)


def test_a_length_that_means_nothing_is_an_error(model, tokenizer):
    with pytest.raises(ValueError, match="max_len is -1"):
        generate_text(model, tokenizer, "ROMEO:", -1)


def test_the_end_of_text_ends_a_real_text(model, tokenizer):
    """The model is made to say <|endoftext|> after its third token, whatever it thinks."""

    class Ending(TorchDecoder):
        steps = 0

        def step(self, *args):
            logits, cache = super().step(*args)
            self.steps += 1
            if self.steps == 4:
                logits[:, tokenizer.eos_token_id] = 1e9
            return logits, cache

    text = generate_text(Ending(model), tokenizer, "ROMEO:", 50, 0)
    assert len(tokenizer.encode(text)) - len(tokenizer.encode("ROMEO:")) <= 3
    assert "<|endoftext|>" not in text


def test_an_n_gram_longer_than_every_text_is_an_error(model, tokenizer):
    with pytest.raises(ValueError, match="no_repeat_ngram_size is 9, larger than the text, which has at most 6 tokens"):
        generate_text(model, tokenizer, ["ROMEO:", "A"], 4, 0, no_repeat_ngram_size=9)
    assert generate_text(model, tokenizer, [], 4, 0, no_repeat_ngram_size=9) == []
