"""Speculative decoding: the tokens of plain decoding if greedy, its distribution if sampled, whatever the guesses."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import SMALL, TINY, gentle, random_checkpoint

from gpt2x import SHAKESPEARE, Tokenizer, generate_text, open_checkpoint
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.export.torch_program import export_pt2, export_torchscript
from gpt2x.generation import speculate
from gpt2x.generation.config import GenerationConfig
from gpt2x.generation.generate import continuations
from gpt2x.generation.guesses import MODEL, Draft, Drafter, Lookup, PromptLookup
from gpt2x.generation.loop import Generation
from gpt2x.generation.pace import Pace, Prices
from gpt2x.generation.sampling import Chooser, Sampling
from gpt2x.generation.speculate import prices_of
from gpt2x.runtimes.base import Decoder, InputError
from gpt2x.runtimes.onnx_run import InPlaceRun
from gpt2x.runtimes.onnxruntime import OnnxDecoder
from gpt2x.runtimes.opening import gpt2x_model, open_decoder
from gpt2x.runtimes.reference import ReferenceDecoder
from gpt2x.runtimes.transformers import Transformers

GREEDY = Sampling(temperature=0)
PRECISIONS = ("fp32", "fp16", "int8", "int4", "w8a8")
CACHES = ("growing", "inplace", "inplace-int8")
CORIOLANUS = SHAKESPEARE.parent / "coriolanus.txt"


@pytest.fixture
def eager(monkeypatch):
    """Guesses are always made, of each kind in turn, also where they fail or near ties are likely."""

    def choose(self, levels, most):
        return (levels[most % len(levels)], min(most, 5)) if levels else (MODEL, 0)

    monkeypatch.setattr(Pace, "choose", choose)
    monkeypatch.setattr(Pace, "checked", lambda self, level, guesses, right: None)
    monkeypatch.setattr(speculate, "RISK", np.inf)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speculate")
    for cache in CACHES:
        export_onnx(open_checkpoint(SHAKESPEARE), folder / cache, ExportOptions(PRECISIONS, cache))
    return folder


@pytest.fixture(scope="module")
def prompts():
    tokens = Tokenizer.from_pretrained(SHAKESPEARE).encode(CORIOLANUS.read_text())
    return [tokens[start : start + 60] for start in range(0, 360, 120)]


def continued(decoder, prompt, new, sampling=GREEDY, guesses=None, end=None):
    generation = Generation(decoder, [prompt], new, sampling, end, speculate=guesses)
    tokens = [token for (token,) in generation]
    return tokens, generation.finish, generation.speculation


# --------------------------------------------------------------------------------------------------- greedy decoding


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_greedy_tokens_are_those_of_plain_decoding_in_every_precision_and_cache(
    exported, prompts, precision, cache, eager
):
    decoder = OnnxDecoder(exported / cache, precision=precision)
    draft = Draft(OnnxDecoder(exported / "inplace", precision="int4"))
    for prompt in prompts[: 3 if precision == "fp32" else 2]:
        expected = continued(decoder, prompt, 60)
        for guesses in (PromptLookup(), draft):
            found = continued(decoder, prompt, 60, guesses=guesses)
            assert found[:2] == expected[:2]
            assert found[2].right > 0


def test_of_two_models_the_one_that_decodes_checks_every_guess(exported, prompts, eager, monkeypatch):
    """The other reads long runs, which are prompts."""
    monkeypatch.setattr(Pace, "choose", lambda self, levels, most: (MODEL, min(most, max(self.counts))))
    decoder = OnnxDecoder(exported / "inplace", precision="w8a8+int4")
    draft = Draft(OnnxDecoder(exported / "inplace-int8", precision="int4"), 64)
    expected = continued(decoder, prompts[0], 80)[0]
    runs_of_decoder = []
    read = InPlaceRun._prefill_chunk

    def counted(self, ids, *others):
        if self is decoder.in_place_run():
            runs_of_decoder.append(len(ids))
        return read(self, ids, *others)

    monkeypatch.setattr(InPlaceRun, "_prefill_chunk", counted)
    tokens, _, counts = continued(decoder, prompts[0], 80, guesses=draft)
    assert tokens == expected and counts.guesses > 0
    assert runs_of_decoder == [len(prompts[0])]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_decides_by_itself_when_to_guess_and_the_tokens_stay(exported, prompts, precision):
    decoder = OnnxDecoder(exported / "inplace-int8", precision=precision)
    for prompt in prompts:
        found = continued(decoder, prompt, 120, guesses=PromptLookup())
        assert found[:2] == continued(decoder, prompt, 120)[:2]


def test_texts_that_repeat_themselves_take_far_fewer_runs(exported, prompts, monkeypatch):
    monkeypatch.setattr(Prices, "measured", lambda self, tokens, seconds: None)  # no clock
    decoder = OnnxDecoder(exported / "inplace", precision="fp32")
    loop = prompts[0][:20] * 3
    _, _, counts = continued(decoder, loop, 150, guesses=PromptLookup())
    assert counts.tokens == 150 and counts.runs < 110
    assert counts.right > 0.5 * counts.guesses


def runtimes(folder):
    checkpoint = gentle()
    export_torchscript(checkpoint, folder / "m.ts")
    export_pt2(checkpoint, folder / "m.pt2")
    return [
        gpt2x_model(checkpoint),
        Transformers(checkpoint),
        ReferenceDecoder(checkpoint),
        open_decoder(folder / "m.ts"),
        open_decoder(folder / "m.pt2"),
    ]


@pytest.mark.slow
@pytest.mark.untraced
def test_every_runtime_takes_its_cache_back(tmp_path, eager):
    rng = np.random.default_rng(0)
    decoders = runtimes(tmp_path)
    theirs = decoders[1]
    for _ in range(3):
        prompt = [*rng.integers(97, size=8).tolist()] * 2
        ids = torch.tensor([prompt])
        whole = theirs.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        for decoder, guesses in itertools.product(decoders, (PromptLookup(), Draft(decoders[0]))):
            tokens, finish, counts = continued(decoder, prompt, 20, guesses=guesses)
            assert tokens == whole[0, len(prompt) :].tolist(), decoder.runtime
            assert finish == ["length"] and counts.guesses > 0


CONTROLS = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 3},
    {"presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"bad_words_ids": [[3], [5, 6]], "logit_bias": {8: 0.5}},
    {"min_new_tokens": 12},
    {"min_length": 25},
    {"suppress_tokens": list(range(40))},
    {"processors": [lambda tokens, logits: np.where(np.arange(97) % 2 == len(tokens) % 2, logits, -np.inf)]},
]


@pytest.mark.parametrize("controls", CONTROLS)
@pytest.mark.parametrize("new", [1, 2, 9, 100])
def test_controls_see_the_guessed_tokens_and_texts_end_where_they_did(controls, new, eager):
    decoder = gpt2x_model(random_checkpoint(replace(SMALL, n_ctx=40)))
    sampling = Sampling(temperature=0, **controls)
    for seed in range(4):
        prompt = np.random.default_rng(seed).integers(97, size=7).tolist() * 2
        for end in (None, (10, 20, 30, 40, 50, 60, 70, 80)):
            expected = continued(decoder, prompt, new, sampling, end=end)
            for guesses in (PromptLookup(ngram=2), Draft(decoder)):
                assert continued(decoder, prompt, new, sampling, guesses, end)[:2] == expected[:2]


def test_stop_strings_end_a_text_within_a_run(exported, prompts, eager):
    decoder = OnnxDecoder(exported / "inplace", precision="fp32")
    tokenizer = Tokenizer.from_pretrained(SHAKESPEARE)
    for stop in (["\n"], ["the"], [",", "."]):
        plain = GenerationConfig.of(max_new_tokens=60, temperature=0, stop_strings=stop)
        guessing = replace(plain, speculate=PromptLookup(ngram=2))
        assert continuations(decoder, tokenizer, prompts[:1], guessing) == continuations(
            decoder, tokenizer, prompts[:1], plain
        )


# -------------------------------------------------------------------------------------------------------- near ties


class Rounding(Decoder):
    """A model whose runs of several tokens differ from runs of one token by almost half of its ``near_tie``, and whose
    cache remembers which tokens came from which. Its best two logits are often tied."""

    runtime = "a model that rounds"
    can_truncate = True
    near_tie = 1e-3

    def __init__(self, gap):
        self.config = replace(TINY, n_ctx=80, n_vocab=11)
        self.gap = gap

    def run(self, input_ids, attention_mask, position_ids, cache):
        tokens, noise = cache or ([], [])
        several = input_ids.shape[1] > 1 and bool(tokens)
        rows = []
        for token in input_ids[0].tolist():
            tokens, noise = [*tokens, token], [*noise, several]
            rows.append(self._logits(tokens, noise))
        return np.array([rows], np.float32), (tokens, noise)

    def _logits(self, tokens, noise):
        rng = np.random.default_rng(sum(tokens[-4:]) + 7 * tokens[-1])
        order = rng.permutation(11)
        logits = -np.arange(11.0)
        logits[1] = -self.gap * rng.random()  # nearly as good as the best
        if any(noise):
            spread = np.random.default_rng([len(tokens), *tokens[-3:]]).uniform(-1, 1, 11)
            logits += 0.49 * self.near_tie * 10 * spread
        return logits[order]

    def truncate(self, cache, length):
        tokens, noise = cache
        return tokens[:length], noise[:length]


@pytest.mark.parametrize("gap", [0.0, 1e-2, 0.1])
@pytest.mark.parametrize("guesses", [PromptLookup(ngram=2), Draft(Rounding(1e-2))])
def test_near_ties_are_decided_as_plain_decoding_decides_them(gap, guesses, eager):
    decoder = Rounding(gap)
    again = right = 0
    for seed in range(10):
        prompt = np.random.default_rng(seed).integers(11, size=6).tolist() * 2
        tokens, _, counts = continued(decoder, prompt, 60, guesses=guesses)
        assert tokens == continued(decoder, prompt, 60)[0]
        again += counts.again
        right += counts.right
    assert again > 0
    assert right > 0 or gap == 0


def test_without_the_decision_near_ties_change_the_text(eager, monkeypatch):
    monkeypatch.setattr(speculate.Ties, "check", lambda self, logits, scores: False)
    decoder = Rounding(1e-2)
    prompt = [1, 2, 3, 4, 5, 6] * 2
    assert continued(decoder, prompt, 60, guesses=PromptLookup(ngram=2))[0] != continued(decoder, prompt, 60)[0]


def test_where_near_ties_are_likely_nothing_is_guessed():
    decoder = Rounding(1e-2)
    prompt = [1, 2, 3, 4, 5, 6] * 2
    _, _, counts = continued(decoder, prompt, 60, guesses=PromptLookup(ngram=2))
    assert counts.again <= 5
    assert counts.runs <= 62


def test_a_promise_of_the_same_bits_is_checked(eager):
    decoder = Rounding(1e-2)
    decoder.same_in_runs = True
    for seed in range(5):
        prompt = np.random.default_rng(seed).integers(11, size=6).tolist() * 2
        found = continued(decoder, prompt, 60, guesses=PromptLookup(ngram=2))[0]
        assert found == continued(decoder, prompt, 60)[0]
    assert speculate.AGREES[decoder] is False


def test_a_model_that_keeps_the_promise_decides_nothing(eager):
    decoder = Markov(0)
    decoder.same_in_runs, decoder.near_tie = True, 1.0  # without the promise, everything would be a tie
    tokens, _, counts = continued(decoder, PROMPT[:12], 40, guesses=PromptLookup(ngram=2))
    assert speculate.AGREES[decoder] is True
    assert counts.again == 0 and counts.right > 0
    assert tokens == continued(Markov(0), PROMPT[:12], 40)[0]


# --------------------------------------------------------------------------------------------------------- sampling


class Markov(Decoder):
    """A model of 5 tokens whose logits depend on the last two."""

    runtime = "a table"
    can_truncate = True

    def __init__(self, seed):
        self.config = replace(TINY, n_ctx=60, n_vocab=5)
        self.table = np.random.default_rng(seed).normal(size=(5, 5, 5)).astype(np.float32) * 1.5

    def run(self, input_ids, attention_mask, position_ids, cache):
        tokens = [*(cache or []), *input_ids[0].tolist()]
        first = len(tokens) - input_ids.shape[1]
        rows = [self.table[tokens[max(0, i - 1)], tokens[i]] for i in range(first, len(tokens))]
        return np.array([rows]), tokens

    def truncate(self, cache, length):
        return cache[:length]


PROMPT = np.random.default_rng(3).integers(5, size=40).tolist()


def exact_distribution(decoder, sampling, length):
    """The probability of each continuation."""
    choose = Chooser(sampling, len(PROMPT), (), np.random.default_rng())
    known = {(): 1.0}
    for _ in range(length):
        longer = {}
        for new, probability in known.items():
            tokens = [*PROMPT, *new]
            p = sampling.probabilities(choose.scores(tokens, decoder.table[tokens[-2], tokens[-1]]))
            longer |= {(*new, token): probability * p[token] for token in range(5) if p[token] > 0}
        known = longer
    return known


GUESSERS = [PromptLookup(ngram=2), Draft(Markov(1)), Draft(Markov(0))]
SAMPLED = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.0, "top_k": 3},
    {"top_p": 0.8},
    {"repetition_penalty": 1.8},
    {"temperature": 0.9, "top_k": 4, "top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
]


def one_each(controls, guesser):
    """Each kind of controls with one guesser in ``make test``, and with the others among the slow tests."""
    return () if controls % len(GUESSERS) == guesser else pytest.mark.slow


@pytest.mark.untraced
@pytest.mark.parametrize(
    ("controls", "guesses"),
    [
        pytest.param(controls, guesses, marks=one_each(i, j))
        for i, controls in enumerate(SAMPLED)
        for j, guesses in enumerate(GUESSERS)
    ],
)
def test_samples_have_the_exact_distribution(guesses, controls, eager):
    decoder, n = Markov(0), 1000
    sampling = Sampling(**controls)
    expected = exact_distribution(decoder, sampling, 3)
    assert sum(expected.values()) == pytest.approx(1)
    rng = np.random.default_rng(0)
    found: Counter[tuple[int, ...]] = Counter()
    for _ in range(n):
        generation = Generation(decoder, [PROMPT], 3, sampling, generators=[rng], speculate=guesses)
        found[tuple(token for (token,) in generation)] += 1
    assert set(found) <= set(expected)
    common = [key for key, p in expected.items() if n * p >= 5]
    counts = np.array([*(found[key] for key in common), 0.0])
    wanted = np.array([*(n * expected[key] for key in common), 0.0])
    counts[-1], wanted[-1] = n - counts.sum(), n - wanted.sum()
    used = wanted > 1e-6
    statistic = float(((counts - wanted)[used] ** 2 / wanted[used]).sum())
    freedom = int(used.sum()) - 1
    # Wilson and Hilferty: chi-squared to the power of a third is nearly normal. The seed is fixed, 4 is 1 in 30,000.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert z < 4


@pytest.mark.untraced
def test_accepting_every_guess_would_show(monkeypatch, eager):
    def always(self, p, guess):
        return (guess.token, True) if guess else (self.choose.draw(p), False)

    monkeypatch.setattr(speculate.SpeculativeText, "_sample", always)
    decoder, sampling, rng = Markov(0), Sampling(), np.random.default_rng(0)
    expected = exact_distribution(decoder, sampling, 3)
    found: Counter[tuple[int, ...]] = Counter()
    for _ in range(500):
        generation = Generation(decoder, [PROMPT], 3, sampling, generators=[rng], speculate=PromptLookup(ngram=2))
        found[tuple(token for (token,) in generation)] += 1
    ((often, count),) = found.most_common(1)
    assert count / 500 > 2 * expected[often]


def test_a_seed_gives_the_same_text_whatever_the_clock_says(exported, prompts, monkeypatch):
    decoder = OnnxDecoder(exported / "inplace", precision="fp32")
    sampling = Sampling(temperature=0.7, top_k=20, seed=5)
    first = continued(decoder, prompts[0], 80, sampling, PromptLookup(ngram=2))[0]
    clock = itertools.count(step=7.0)
    monkeypatch.setattr("gpt2x.generation.speculate.time.perf_counter", lambda: next(clock))
    assert continued(decoder, prompts[0], 80, sampling, PromptLookup(ngram=2))[0] == first


# -------------------------------------------------------------------------------------------------------- the pace


def account_after(pace, steps, right):
    """Make steps in which ``right(guesses)`` of the guesses are right. Returns tokens and their price."""
    tokens, price = 0, 0.0
    while tokens < steps:
        level, guesses = pace.choose([MODEL], 50)
        if guesses:
            hit = right(guesses)
            pace.checked(level, guesses, hit)
            price += pace.price(level, guesses)
            tokens += hit + 1
        else:
            pace.step()
            price += 1
            tokens += 1
    return tokens, price


@pytest.mark.untraced
@pytest.mark.parametrize("slope", [0.05, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("guess_price", [0.0, 0.1, 0.3, 1.0])
def test_guesses_that_fail_cost_less_than_three_percent(slope, guess_price):
    tokens, price = account_after(Pace(7, Prices(slope, guess_price, measures=False)), 200, lambda guesses: 0)
    assert price <= tokens / 0.97


def test_guesses_that_are_right_are_made_in_great_numbers():
    tokens, price = account_after(Pace(7, Prices(0.15, 0.0, measures=False)), 200, lambda guesses: guesses)
    assert price < 0.35 * tokens


def test_a_bad_stretch_ends_the_guesses_and_a_good_one_begins_them_again():
    pace = Pace(7, Prices(0.15, 0.0, measures=False))
    account_after(pace, 100, lambda guesses: 0)
    tokens, price = account_after(pace, 400, lambda guesses: guesses)
    assert price < 0.6 * tokens


def test_of_two_kinds_of_guesses_the_one_that_gains_more_is_made():
    pace = Pace(7, Prices(0.1, 0.1, measures=False))
    for _ in range(5):
        pace.checked(MODEL, 7, 7)
        pace.checked(3, 7, 1)
    assert pace.choose([3, MODEL], 50) == (MODEL, 7)
    for _ in range(20):
        pace.checked(3, 7, 7)
    assert pace.choose([3, MODEL], 50) == (3, 7), "looking up costs nothing"
    assert pace.choose([], 50) == (MODEL, 0)


def test_prices_are_measured_and_carried_over_to_other_numbers_of_tokens():
    prices = Prices(0.15, 0.1, measures=True)
    prices.measured(1, 9)  # the first one does not count
    prices.measured(5, 99)
    assert prices.of(5) == pytest.approx(1.6)
    for _ in range(50):
        prices.measured(1, 1)
        prices.measured(5, 3)
        prices.guessed(2, 0.6)
    assert prices.of(5) == pytest.approx(3, abs=0.01)
    assert prices.of(3) == pytest.approx(2, abs=0.01)
    assert prices.guess == pytest.approx(0.3, abs=0.01)
    unmeasured = Prices(0.15, 0.1, measures=False)
    for _ in range(3):
        unmeasured.measured(1, 1)
        unmeasured.measured(5, 3)
        unmeasured.guessed(2, 0.6)
    assert unmeasured.of(5) == pytest.approx(1.6)
    assert unmeasured.guess == 0.1


def test_one_run_that_was_delayed_does_not_end_the_guesses():
    prices = Prices(0.15, 0.0, measures=True)
    for seconds in (1, 1, 1, 1000, 1):
        prices.measured(1, seconds)
        prices.measured(4, seconds)
    assert prices.of(4) < 2


def test_prices_stay_for_the_next_text_unless_it_is_sampled(exported, prompts):
    decoder = OnnxDecoder(exported / "inplace", precision="fp32")
    guesses = PromptLookup()
    continued(decoder, prompts[0], 40, guesses=guesses)
    measured = prices_of(decoder, guesses, 0.0, greedy=True)
    assert measured is prices_of(decoder, guesses, 0.0, greedy=True)
    assert measured.slope != decoder.several_price
    assert prices_of(decoder, guesses, 0.0, greedy=False).slope == decoder.several_price


# ------------------------------------------------------------------------------------------------------ the guesses


def test_the_longest_ngram_is_looked_up_and_its_latest_occurrence_counts():
    lookup = Lookup(3)
    text = [1, 2, 3, 7, 8, 2, 3, 9, 9, 1, 2, 3]
    assert lookup.levels(text) == [3]
    assert [guess.token for guess in lookup.guess(3, text, 2)] == [7, 8]
    text += [5, 2, 3]
    assert lookup.levels(text) == [2]
    assert [guess.token for guess in lookup.guess(2, text, 3)] == [5, 2, 3]
    assert lookup.levels([*text, 4]) == []


def test_a_text_that_repeats_itself_is_guessed_beyond_its_end():
    lookup = Lookup(3)
    text = [9, 1, 2, 1, 2, 1, 2]
    assert lookup.levels(text) == [3]
    assert [guess.token for guess in lookup.guess(3, text, 5)] == [1, 2, 1, 2, 1]


class Recorded(Markov):
    """The same, with a list of what it was given."""

    def __init__(self, seed):
        super().__init__(seed)
        self.seen = []

    def run(self, input_ids, attention_mask, position_ids, cache):
        self.seen.append(input_ids[0].tolist())
        return super().run(input_ids, attention_mask, position_ids, cache)


def test_a_draft_model_runs_each_token_once_but_those_that_were_refused():
    decoder = Recorded(1)
    seen = decoder.seen
    drafter = Drafter(decoder, Chooser(GREEDY, 0, (), np.random.default_rng()), 0.1)
    text = [0, 1, 2]
    first = [guess.token for guess in drafter.guess(MODEL, text, 3)]
    assert seen == [[0, 1, 2], [first[0]], [first[1]]]
    seen.clear()
    text += [first[0], (first[1] + 1) % 5]
    drafter.guess(MODEL, text, 1)
    assert seen == [[text[-1]]], "the accepted guess is in the cache"


def test_a_draft_model_with_a_short_context_stops_guessing(eager):
    decoder = gpt2x_model(random_checkpoint(replace(SMALL, n_ctx=40)))
    draft = Draft(gpt2x_model(random_checkpoint(replace(SMALL, n_ctx=20), 1)))
    tokens, finish, counts = continued(decoder, [1, 2, 3], 60, guesses=draft)
    assert (tokens, finish) == continued(decoder, [1, 2, 3], 60)[:2]
    assert finish == ["context"] and counts.guesses > 0


# --------------------------------------------------------------------------------------------------- what is refused


def test_what_cannot_be_guessed_for_is_refused_in_one_line(tmp_path):
    export_onnx(gentle(), tmp_path / "last", ExportOptions(("fp32",), last=True), need_tokenizer=False)
    last = OnnxDecoder(tmp_path / "last")
    with pytest.raises(InputError, match="returns the logits of the last token only"):
        Generation(last, [[1, 2]], 3, GREEDY, speculate=PromptLookup())
    decoder = gpt2x_model(gentle())
    with pytest.raises(InputError, match="the draft model's vocabulary is 13, the model's 97"):
        Generation(decoder, [[1, 2]], 3, GREEDY, speculate=Draft(gpt2x_model(random_checkpoint())))
    plain = Markov(0)
    plain.can_truncate = False
    with pytest.raises(InputError, match="cannot truncate its cache"):
        Generation(plain, [[1, 2]], 3, GREEDY, speculate=PromptLookup())
    with pytest.raises(InputError, match="cannot truncate its cache"):
        Generation(Markov(0), [[1, 2]], 3, GREEDY, speculate=Draft(plain))
    for wrong in (lambda: PromptLookup(0), lambda: PromptLookup(ngram=0), lambda: Draft(plain, 0)):
        with pytest.raises(ValueError, match="it must be"):
            wrong()
    with pytest.raises(ValueError, match="beam search"):
        GenerationConfig.of(num_beams=2, speculate=PromptLookup())


def test_larger_batches_decode_plainly(eager):
    decoder = gpt2x_model(gentle())
    prompts = [[1, 2, 3] * 3, [4, 5, 6, 7]]
    plain = Generation(decoder, prompts, 8, GREEDY)
    guessing = Generation(decoder, prompts, 8, GREEDY, speculate=PromptLookup())
    assert list(plain) == list(guessing)
    assert guessing.speculation.runs == 0


def test_generate_text_takes_it_as_a_control(exported, eager):
    decoder = OnnxDecoder(exported / "inplace", precision="fp32")
    tokenizer = Tokenizer.from_pretrained(SHAKESPEARE)
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nFirst"
    plain = generate_text(decoder, tokenizer, text, 40, temperature=0)
    assert generate_text(decoder, tokenizer, text, 40, temperature=0, speculate=PromptLookup()) == plain
    pieces = generate_text(decoder, tokenizer, text, 40, temperature=0, speculate=PromptLookup(), stream=True)
    assert "".join(pieces) == plain
