"""Every metric can fail, every scenario can fail, and each says so by its name."""

from dataclasses import replace

import numpy as np
import pytest
from checkpoints import TINY, random_checkpoint

from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.runtimes.base import Decoder
from gpt2x.runtimes.onnxruntime import OnnxDecoder
from gpt2x.runtimes.opening import gpt2x_model
from gpt2x.runtimes.reference import ReferenceDecoder
from gpt2x.runtimes.transformers import Transformers
from gpt2x.verify.metrics import FP32, measure, perplexity
from gpt2x.verify.scenarios import SCENARIOS, Text, chunk_sizes, compare_greedy, compare_logits, compare_runs, verdict

IDS = [3, 1, 12, 0, 7, 7, 2, 11, 5, 9]


class Fixed(Decoder):
    """A model that returns these logits (V,) after every token."""

    runtime = "fixed logits"

    def __init__(self, *logits, n_ctx=40):
        self.row = np.array(logits, np.float32)
        self.config = replace(TINY, n_ctx=n_ctx, n_vocab=len(logits))

    def run(self, input_ids, attention_mask, position_ids, cache):
        return np.tile(self.row, (*input_ids.shape, 1)), None


# ------------------------------------------------------------------------------------------------- every metric fails

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(30, 50)).astype(np.float32) * 10
TARGETS = RNG.integers(50, size=30).tolist()


def faults(found, **bounds):
    loose = replace(FP32, **dict.fromkeys(vars(FP32), 1e9))
    return measure(LOGITS, found, TARGETS).failures(replace(loose, **bounds))


def test_equal_logits_have_no_fault_and_no_error():
    metrics = measure(LOGITS, LOGITS, TARGETS)
    assert metrics.failures(FP32) == []
    assert (metrics.max_abs_error, metrics.kl_divergence, metrics.top1_agreement, metrics.top5_agreement) == (
        0,
        0,
        1,
        1,
    )
    assert metrics.perplexity == metrics.perplexity_other


def test_the_largest_error_fails_by_its_name():
    found = LOGITS.copy()
    found[7, 7] += 0.01
    (fault,) = faults(found, max_abs_error=FP32.max_abs_error)
    assert fault.startswith("max_abs_error is 1.0")


def test_the_mean_error_fails_by_its_name():
    (fault,) = faults(LOGITS + np.float32(1e-3), mean_abs_error=FP32.mean_abs_error)
    assert fault.startswith("mean_abs_error is 1.0")


def test_the_errors_relative_to_their_position_fail_by_their_names():
    found = LOGITS.copy()
    found[3] *= 1.001
    assert [f.split()[0] for f in faults(found, max_rel_error=FP32.max_rel_error)] == ["max_rel_error"]
    assert [f.split()[0] for f in faults(found, mean_rel_error=FP32.mean_rel_error)] == ["mean_rel_error"]


def test_the_divergence_fails_by_its_name_and_a_shift_of_all_logits_is_none():
    assert faults(LOGITS + np.float32(1), kl_divergence=FP32.kl_divergence) == []
    (fault,) = faults(LOGITS * np.float32(1.01), kl_divergence=FP32.kl_divergence)
    assert fault.startswith("kl_divergence")


def test_the_perplexity_fails_by_its_name():
    (fault,) = faults(LOGITS * np.float32(1.001), perplexity=FP32.perplexity)
    assert fault.startswith("perplexity is ")


def test_another_likeliest_token_fails_by_its_name_unless_it_was_a_near_tie():
    expected = np.array([[9.0, 5.0, 4.0], [9.0, 9.0 - 1e-5, 4.0]])
    tied = expected[:, [1, 0, 2]]
    assert measure(expected[1:], tied[1:]).top1_agreement == 0
    assert measure(expected[1:], tied[1:]).failures(FP32) == []
    (fault,) = (f for f in measure(expected, tied).failures(FP32) if f.startswith("top1"))
    assert fault == "top1_agreement is 0.00%, with a gap of 4.00e+00 (bound 1.80e-04)"


def test_other_five_likeliest_tokens_fail_by_their_name_and_their_order_does_not_matter():
    expected = np.arange(10.0)[None]
    other_order = expected[:, [0, 1, 2, 3, 4, 9, 8, 7, 6, 5]]
    assert measure(expected, other_order).top5_agreement == 1
    other_set = expected[:, [0, 1, 2, 3, 5, 4, 6, 7, 8, 9]]
    (fault,) = (f for f in measure(expected, other_set).failures(FP32) if f.startswith("top5"))
    assert fault == "top5_agreement is 0.00%, with a gap of 1.00e+00 (bound 1.80e-04)"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_numbers_fail(bad):
    found = LOGITS.copy()
    found[0, 0] = bad
    assert measure(LOGITS, found).failures(FP32)
    assert measure(found, LOGITS).failures(FP32)


def test_the_verdict_names_what_failed():
    check = verdict("chunks", measure(LOGITS, LOGITS * 2, TARGETS))
    assert check.passed is False
    for name in ("max_abs_error", "mean_abs_error", "max_rel_error", "mean_rel_error", "kl_divergence", "perplexity"):
        assert name in check.result


def test_the_perplexity_is_that_of_the_tokens_that_came():
    even = np.zeros((4, 8))
    assert perplexity(even, [0, 1, 2, 3]) == pytest.approx(8)
    sure = np.full((2, 8), -100.0)
    sure[[0, 1], [3, 5]] = 0
    assert perplexity(sure, [3, 5]) == pytest.approx(1)


def test_the_kl_divergence_is_the_textbooks():
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    assert measure(np.log(p), np.log(q)).kl_divergence == pytest.approx(0.25 * np.log(2))


def test_metrics_do_not_depend_on_how_many_positions_are_compared_at_a_time():
    long = np.tile(LOGITS, (7, 1))
    assert measure(long, long * np.float32(1.001)).kl_divergence == pytest.approx(
        measure(LOGITS, LOGITS * np.float32(1.001)).kl_divergence
    )


# --------------------------------------------------------------------------------------------------- the protocol


def test_every_runtime_declares_what_it_is(tmp_path):
    tiny = random_checkpoint()
    export_onnx(tiny, tmp_path / "m", ExportOptions(("fp16",), last=True), need_tokenizer=False)
    onnx = OnnxDecoder(tmp_path / "m")
    assert (onnx.precision, onnx.cache_kind, onnx.last_only) == ("fp16", "growing", True)
    assert onnx.path == tmp_path / "m/onnx/model_fp16.onnx"
    assert onnx.unoptimized().path == onnx.path
    for decoder in (gpt2x_model(tiny), Transformers(tiny), ReferenceDecoder(tiny)):
        assert (decoder.precision, decoder.cache_kind, decoder.last_only) == ("fp32", "growing", False)
        assert decoder.path is None
        assert decoder.unoptimized() is None
    for decoder in (onnx, gpt2x_model(tiny), Transformers(tiny), ReferenceDecoder(tiny)):
        assert (decoder.n_ctx, decoder.n_vocab, decoder.config) == (10, 13, tiny.config)


def test_a_runtime_that_only_runs_also_steps():
    logits, _ = Fixed(1.0, 2.0).step(np.array([[0, 1, 0]]), None, np.arange(3)[None], None)
    assert logits.tolist() == [[1.0, 2.0]]


# ----------------------------------------------------------------------------------------------- every scenario fails


class Faulty(Decoder):
    """The tiny model with one fault in how it is run."""

    runtime = "faulty"

    def __init__(self, fault, config=TINY):
        self.right = gpt2x_model(random_checkpoint(config))
        self.fault = fault
        self.config = self.right.config

    def run(self, input_ids, attention_mask, position_ids, cache):
        ids, mask, positions, cache = self.fault(input_ids, attention_mask, position_ids, cache)
        return self.right.run(ids, mask, positions, cache)


def forgets_the_cache(ids, mask, positions, cache):
    return ids, None, positions, None


def ignores_the_mask(ids, mask, positions, cache):
    return ids, None, positions, cache


def ignores_positions(ids, mask, positions, cache):
    return ids, mask, np.zeros_like(positions), cache


def mixes_rows(ids, mask, positions, cache):
    return ids[::-1].copy(), mask, positions, cache


def shifts_cached_positions(ids, mask, positions, cache):
    return ids, mask, positions - (cache is not None), cache


def swaps_tokens(ids, mask, positions, cache):
    return (ids + 1) % TINY.n_vocab, mask, positions, cache


@pytest.mark.parametrize(
    ("fault", "failing"),
    [
        (forgets_the_cache, {"token by token", "chunks"}),
        (ignores_the_mask, {"left padding", "right padding"}),
        (
            ignores_positions,
            {"full context", "chunks", "batch rows", "left padding", "right padding", "token by token"},
        ),
        (mixes_rows, {"batch rows", "left padding", "right padding"}),
        (shifts_cached_positions, {"token by token", "chunks"}),
        (swaps_tokens, set(SCENARIOS)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_fault_is_found_by_the_scenarios_that_can_see_it(fault, failing):
    text = Text(gpt2x_model(random_checkpoint()), IDS)
    checks = {name: compare_logits(name, Faulty(fault), text).passed for name in SCENARIOS}
    assert failing <= {name for name, passed in checks.items() if not passed}


LONG = replace(TINY, n_ctx=200)


def forgets_what_is_far_back(ids, mask, positions, cache):
    if cache is None or cache[0][0].shape[2] <= 190:
        return ids, mask, positions, cache
    return ids, None, positions, [(k[:, :, -9:], v[:, :, -9:]) for k, v in cache]


def forgets_the_cache_before_large_pieces(ids, mask, positions, cache):
    return (ids, None, positions, None) if cache and ids.shape[1] > 32 else (ids, mask, positions, cache)


def repeats_the_first_of_many_rows(ids, mask, positions, cache):
    return ids if len(ids) <= 3 else np.repeat(ids[:1], len(ids), 0), mask, positions, cache


@pytest.mark.parametrize(
    ("fault", "failing"),
    [
        (forgets_what_is_far_back, {"chunks"}),
        (forgets_the_cache_before_large_pieces, {"chunks"}),
        (repeats_the_first_of_many_rows, {"batch rows"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_faults_that_only_a_long_context_or_a_large_batch_shows_are_found(fault, failing):
    ids = np.random.default_rng(0).integers(LONG.n_vocab, size=LONG.n_ctx).tolist()
    text = Text(gpt2x_model(random_checkpoint(LONG)), ids)
    checks = {name: compare_logits(name, Faulty(fault, LONG), text).passed for name in SCENARIOS}
    assert failing == {name for name, passed in checks.items() if not passed}


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 10, 33, 64, 256, 1024])
def test_the_pieces_make_up_the_context(n):
    sizes = chunk_sizes(n)
    assert sum(sizes) == n
    assert min(sizes) > 0
    if n >= 256:
        assert max(sizes) > n // 2
        assert sizes[-16:] == [1] * 16


def test_a_sound_model_passes_every_scenario():
    model = gpt2x_model(random_checkpoint())
    assert {check.name: check.passed for check in compare_runs(model, model, IDS)} == dict.fromkeys(
        [*SCENARIOS, "greedy tokens"], True
    )


@pytest.mark.parametrize("length", [1, 2, 3, 4, 6])
def test_a_context_of_a_few_tokens_is_enough(length):
    config = replace(TINY, n_ctx=length)
    model = gpt2x_model(random_checkpoint(config))
    assert all(check.passed for check in compare_runs(model, model, IDS[:length]))


# ---------------------------------------------------------------------------------------------------- greedy decoding


def test_a_clear_difference_of_greedy_tokens_fails_and_a_near_tie_is_reported_as_one():
    yardstick = Fixed(1.0, 2.0, 0.0)
    clear = compare_greedy(yardstick, Fixed(3.0, 2.0, 0.0), [0], error=1e-6)
    assert clear.passed is False
    assert clear.details["first_difference"] == 0
    tie = compare_greedy(Fixed(1.0, 1.0 + 1e-6, 0.0), Fixed(1.0, 1.0 - 1e-7, 0.0), [0], error=1e-6)
    assert tie.passed is True
    assert tie.details["near_tie"] is True
    assert "a near tie" in tie.result


def test_logits_with_nan_give_no_greedy_tokens():
    check = compare_greedy(Fixed(1.0, 2.0), Fixed(1.0, np.nan), [0], error=1e-6)
    assert check.passed is False
    assert check.result == "none: the second model's logits contain NaN or infinity"


def test_greedy_tokens_fill_the_context_up_to_200():
    assert compare_greedy(Fixed(1, 2, n_ctx=40), Fixed(1, 2, n_ctx=40), [0] * 4, 0).details["tokens"] == 36
    assert compare_greedy(Fixed(1, 2, n_ctx=400), Fixed(1, 2, n_ctx=400), [0] * 4, 0).details["tokens"] == 200
