"""Choosing a token looks at few of the vocabulary, and chooses what sorting all of it would choose."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2x.generation.processors import NEVER, TopP, apply, nucleus, softmax, sorted_nucleus
from gpt2x.generation.sampling import NO_TOKENS, Chooser, Sampling

V = 5000
MASSES = (0.0, 0.05, 0.5, 0.9, 0.99, 0.999999, 1 - 1e-9, 1 - 1e-12)


def logits_of(kind, seed):
    """Logits (V,), float32."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(V).astype(np.float32)
    match kind:
        case "random":
            return normal * 3
        case "tied":
            return np.round(normal * 2)
        case "all tied":
            return np.full(V, np.float32(-31.5))
        case "peaked":
            normal[rng.integers(V)] = 60
            return normal
        case "few possible":
            normal[rng.permutation(V)[3:]] = NEVER
            return normal
        case "almost tied":
            return normal * np.float32(1e-30)
    raise AssertionError(kind)


KINDS = ("random", "tied", "all tied", "peaked", "few possible", "almost tied")

CONTROLS = (
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": V},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"top_p": 1 - 1e-12},
    {"top_k": 50, "top_p": 0.9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 0.05, "temperature": 1.5},
    {"top_k": 50, "min_p": 0.05, "top_p": 0.95},
    {"top_p": 0.9, "min_p": 0.01},
    {"typical_p": 0.8, "top_k": 100},
    {"typical_p": 0.8, "min_p": 0.01},
    {"repetition_penalty": 1.3, "top_p": 0.9, "temperature": 0.8},
)


class SortedTopP(TopP):
    """``TopP`` that sorts every token."""

    def __call__(self, tokens, logits):
        narrowed = np.full_like(logits, NEVER)
        kept = sorted_nucleus(softmax(logits), self.p)
        narrowed[kept] = logits[kept]
        return narrowed


def slowly(sampling, logits):
    """The distribution (V,), with every processor on every token."""
    warpers = [SortedTopP(one.p) if isinstance(one, TopP) else one for one in sampling.warpers()]
    return softmax(apply(warpers, NO_TOKENS, logits.astype(np.float64)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_nucleus_is_what_sorting_every_token_finds(kind):
    for seed in range(5):
        p = softmax(logits_of(kind, seed).astype(np.float64))
        for mass in MASSES:
            assert sorted(nucleus(p, mass)) == sorted(sorted_nucleus(p, mass)), mass


def test_a_nucleus_sorts_every_token_only_for_a_mass_of_almost_one(monkeypatch):
    asked = []
    monkeypatch.setattr("gpt2x.generation.processors.sorted_nucleus", lambda p, mass: asked.append(mass))
    p = softmax(logits_of("random", 0).astype(np.float64))
    for mass in MASSES:
        nucleus(p, mass)
    assert asked == [1 - 1e-9, 1 - 1e-12]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", CONTROLS, ids=str)
def test_the_tokens_of_a_seed_are_those_of_the_whole_distribution(kind, options):
    sampling = Sampling(**options, seed=3)
    choose = Chooser(sampling, 0, (), np.random.default_rng(3))
    generator = np.random.default_rng(3)
    text = [1, 2, 3, 3, 1]
    for seed in range(10):
        logits = logits_of(kind, seed)
        expected = slowly(sampling, choose.scores(text, logits))
        np.testing.assert_allclose(sampling.probabilities(choose.scores(text, logits)), expected, rtol=1e-12)
        assert choose(text, logits) == generator.choice(V, p=expected)


def test_tokens_are_tied_where_the_temperature_makes_them_equal():
    # 1e-30 and 2e-30 are different logits, and the same distance below 10 in float64.
    logits = np.array([10, 1e-30, 2e-30, 3e-30, -1], np.float32)
    assert np.count_nonzero(Sampling(top_k=2).probabilities(logits)) == 4


def test_probabilities_that_are_not_numbers_are_not_drawn_from():
    (generator,) = Sampling().generators(1)
    with pytest.raises(ValueError, match="NaN"):
        Chooser(Sampling(), 0, (), generator).draw(np.array([0.5, np.nan]))
