"""A cache that stays in place: the same logits as a growing one, in buffers that are written where they lie; and
sequences that join and leave a running batch."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from checkpoints import SMALL, SWITCHES, TINY, gentle, random_checkpoint
from commands import assert_refused

from converters import GPT2Config, open_checkpoint, save_checkpoint
from gpt2x import SHAKESPEARE
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.generation.generate import generate_text
from gpt2x.generation.loop import Generation
from gpt2x.generation.sampling import Sampling
from gpt2x.runtimes.base import InputError
from gpt2x.runtimes.batching import RunningBatch
from gpt2x.runtimes.kv_cache import RowCache
from gpt2x.runtimes.onnxruntime import OnnxDecoder
from gpt2x.runtimes.opening import gpt2x_model
from gpt2x.runtimes.processor import TILES_OFF
from gpt2x.runtimes.reference import Reference
from gpt2x.tokenizer import Tokenizer
from gpt2x.verify.report import verify_export


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inplace") / "shakespeare"
    export_onnx(open_checkpoint(SHAKESPEARE), folder, ExportOptions(("fp32", "int8"), "inplace"))
    return folder


@pytest.fixture(scope="module")
def decoder(shakespeare):
    return OnnxDecoder(shakespeare)


@pytest.fixture(scope="module")
def torch_model():
    return gpt2x_model(open_checkpoint(SHAKESPEARE))


def prompt(n, seed=0):
    return np.random.default_rng(seed).integers(2048, size=n).tolist()


def continued(model, ids, n):
    return [tokens[0] for tokens in Generation(model, [ids], n, Sampling(temperature=0))]


# ------------------------------------------------------------------------------------------------------------- the file


def test_the_graph_attends_with_one_operator_that_writes_in_place_and_says_which_contract_it_has(shakespeare):
    path = shakespeare / "onnx/model.onnx"
    onnx.checker.check_model(path)
    model = onnx.load(path, load_external_data=False)
    kinds = [(node.domain, node.op_type) for node in model.graph.node]
    assert kinds.count(("com.microsoft", "GroupQueryAttention")) == 4
    assert {domain for domain, _ in kinds} == {"", "com.microsoft"}
    assert not {"Attention", "Where", "Split"} & {kind for _, kind in kinds}, "what nothing uses is left out"
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts["gpt2x.contract"] == "2" and facts["gpt2x.cache"] == "inplace"
    names = [value.name for value in model.graph.input]
    assert names[:3] == ["input_ids", "attention_mask", "position_ids"] and len(names) == 3 + 2 * 4
    card = (shakespeare / "README.md").read_text()
    assert "ORT_GQA_DISABLE_FLASH_ATTENTION=1" in card
    assert "contract 2" in card and "on the right" in card and "gives silently wrong results" in card


def test_the_cards_client_runs_with_a_cache_that_is_given_and_taken(shakespeare, decoder):
    card = (shakespeare / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=shakespeare, capture_output=True, text=True, check=True)
    tokenizer = Tokenizer.from_pretrained(shakespeare)
    text = generate_text(decoder, tokenizer, "Once upon a time", 64, 0)
    assert done.stdout == text.removeprefix("Once upon a time") + "\n"


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: ", ".join(f"{k}={v}" for k, v in s.items()) or "plain")
@pytest.mark.parametrize("last", [False, True])
def test_every_kind_of_model_gives_the_models_logits_with_a_cache_in_place(tmp_path, switches, last):
    config = GPT2Config(**{**vars(TINY), "n_embd": 48, "n_inner": None, **switches})
    checkpoint = random_checkpoint(config)
    export_onnx(checkpoint, tmp_path / "m", ExportOptions(cache="inplace", last=last), need_tokenizer=False)
    report = verify_export(checkpoint, tmp_path / "m")
    assert [(c.name, c.result) for c in report.checks if c.passed is False] == []


# ---------------------------------------------------------------------------------------------------------- one buffer


def test_a_step_writes_into_the_buffers_it_is_given(decoder):
    _, cache = decoder.step(np.array([prompt(5)]), None, np.arange(5)[None], None)
    before, where = [b.copy() for b in cache.buffers], [b.ctypes.data for b in cache.buffers]
    _, after = decoder.step(np.array([[7]]), None, np.array([[5]]), cache)
    assert after is cache and [b.ctypes.data for b in cache.buffers] == where
    for old, new in zip(before, cache.buffers, strict=True):
        np.testing.assert_array_equal(old[:, :, :5], new[:, :, :5])
        assert (old[:, :, 5] == 0).all() and (new[:, :, 5] != 0).any()


def test_room_doubles_up_to_the_context_and_what_is_in_it_stays(decoder, torch_model):
    ids = prompt(60)
    sizes = []
    logits, cache = decoder.step(np.array([ids]), None, np.arange(60)[None], None)
    for position in range(60, 256):
        sizes.append(cache.capacity)
        token = int(logits[0].argmax())
        ids.append(token)
        logits, cache = decoder.step(np.array([[token]]), None, np.array([[position]]), cache)
    assert sorted(set(sizes)) == [64, 128, 256] and cache.capacity == 256
    expected, _ = torch_model.run(np.array([ids]), None, np.arange(256)[None], None)
    np.testing.assert_allclose(logits[0], expected[0, -1], atol=1e-4)


def test_generated_text_is_that_of_the_torch_model_for_prompts_of_any_lengths(decoder, torch_model):
    prompts = [prompt(n, n) for n in (1, 30, 7, 200)]
    rows = []
    for model in (decoder, torch_model):
        generation = Generation(model, prompts, 80, Sampling(temperature=0))
        rows.append(list(zip(*generation, strict=True)))
        assert generation.finish == ["length", "length", "length", "context"]
    assert rows[0] == rows[1]


def test_a_row_may_go_on_from_anywhere_it_has_been(decoder):
    ids = prompt(20)
    expected, _ = decoder.step(np.array([[*ids[:10], 3]]), None, np.arange(11)[None], None)
    _, cache = decoder.step(np.array([ids]), None, np.arange(20)[None], None)
    again, cache = decoder.step(np.array([[3]]), None, np.array([[10]]), cache)
    np.testing.assert_allclose(again, expected, atol=1e-5)
    assert cache.lengths.tolist() == [11]


def test_a_model_that_gives_every_logit_takes_a_prompt_in_smaller_pieces_and_gives_the_same(decoder, monkeypatch):
    from gpt2x.runtimes import onnx_run

    ids = np.array([prompt(100)])
    whole, _ = decoder.run(ids, None, np.arange(100)[None], None)
    monkeypatch.setattr(onnx_run, "LOGITS", 1)
    pieces, _ = decoder.run(ids, None, np.arange(100)[None], None)
    np.testing.assert_allclose(whole, pieces, atol=1e-5)
    assert whole.shape == (1, 100, 2048)


@pytest.fixture
def seen(monkeypatch):
    """What the environment says of tiled attention whenever a session is made."""
    found: list[str | None] = []
    session = ort.InferenceSession

    def made(*args, **options):
        found.append(os.environ.get(TILES_OFF))
        return session(*args, **options)

    monkeypatch.setattr(ort, "InferenceSession", made)
    monkeypatch.delenv(TILES_OFF, raising=False)
    return found


def processor(monkeypatch, *, reads_in_tiles):
    """Pretend to run on a processor on which tiled attention reads prompts well, or does not."""
    monkeypatch.setattr("gpt2x.runtimes.onnx_model.tiles_read_prompts_well", lambda: reads_in_tiles)


@pytest.mark.parametrize(("cache", "well", "said", "expected"), [
    ("inplace", False, None, "1"), ("inplace", True, None, None), ("inplace", False, "0", "0"),
    ("inplace", True, "1", "1"), ("inplace-int8", False, None, None), ("growing", False, None, None),
])  # fmt: skip
def test_prompts_in_place_are_read_in_tiles_where_that_is_fast_unless_the_user_says_otherwise(
    tmp_path, monkeypatch, seen, cache, well, said, expected
):
    processor(monkeypatch, reads_in_tiles=well)
    if said is not None:
        monkeypatch.setenv(TILES_OFF, said)
    export_onnx(gentle(), tmp_path / "d", ExportOptions(("fp32",), cache), need_tokenizer=False)
    seen.clear()
    OnnxDecoder(tmp_path / "d")
    assert seen == [expected]
    assert os.environ.get(TILES_OFF) == said


@pytest.mark.parametrize("well", [False, True])
def test_of_two_models_only_the_one_that_decodes_has_tiled_attention(tmp_path, monkeypatch, seen, well):
    processor(monkeypatch, reads_in_tiles=well)
    export_onnx(gentle(), tmp_path / "d", ExportOptions(("fp32", "int8"), "inplace"), need_tokenizer=False)
    seen.clear()
    decoder = OnnxDecoder(tmp_path / "d", prefill="int8", decode="fp32")
    assert seen == [None, "1"]  # the model that decodes is opened first
    assert decoder.step(np.array([[1, 2, 3]]), None, np.arange(3)[None], None)[0].shape == (1, decoder.n_vocab)


@pytest.mark.parametrize("well", [False, True])
def test_both_kinds_of_attention_compute_the_same(tmp_path, monkeypatch, well):
    monkeypatch.delenv(TILES_OFF, raising=False)
    processor(monkeypatch, reads_in_tiles=well)
    model = gentle()
    export_onnx(model, tmp_path / "d", ExportOptions(("fp32",), "inplace"), need_tokenizer=False)
    ids = np.arange(1, 41)[None]
    expected = Reference(model)(ids[0].tolist())[None]
    decoder = OnnxDecoder(tmp_path / "d")
    found, cache = decoder.run(ids[:, :30], None, np.arange(30)[None], None)
    parts = [found]
    for position in range(30, 40):
        found, cache = decoder.run(ids[:, position : position + 1], None, np.array([[position]]), cache)
        parts.append(found)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-4)


def test_caches_of_two_generations_do_not_touch_one_another(decoder):
    alone = [continued(decoder, prompt(9, seed), 12) for seed in (1, 2)]
    one, two = (iter(Generation(decoder, [prompt(9, s)], 12, Sampling(temperature=0))) for s in (1, 2))
    found = [(a[0], b[0]) for a, b in zip(one, two, strict=True)]
    assert [list(row) for row in zip(*found, strict=True)] == alone


def test_threads_share_a_decoder_each_with_a_cache_of_its_own(decoder):
    from concurrent.futures import ThreadPoolExecutor

    alone = [continued(decoder, prompt(9, seed), 60) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: continued(decoder, prompt(9, seed), 60), range(4)))
    assert together == alone


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("ids", "mask", "positions", "words"),
    [
        ([[1]], None, [[7]], r"row 0 holds 5 tokens, and its new positions \[7\] do not follow"),
        ([[1, 2]], None, [[5, 7]], "do not follow"),
        ([[1, 2]], None, [[6, 5]], "do not follow"),
        (
            [[1]],
            [[1, 1, 1]],
            [[5]],
            r"attention_mask has the shape \(1, 3\), but 5 earlier and 1 new slots need \(1, 6\)",
        ),
        ([[1], [2]], None, [[5], [5]], "the cache has 1 rows, input_ids 2"),
        ([[1]], None, [[256]], "position 256 is outside the context of 256"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(decoder, ids, mask, positions, words):
    _, cache = decoder.step(np.array([prompt(5)]), None, np.arange(5)[None], None)
    before = [buffer.copy() for buffer in cache.buffers]
    with pytest.raises(InputError, match=words):
        decoder.step(np.array(ids), None if mask is None else np.array(mask), np.array(positions), cache)
    assert all((a == b).all() for a, b in zip(before, cache.buffers, strict=True))
    assert cache.lengths.tolist() == [5]


def test_a_mask_that_changes_for_earlier_slots_is_refused(decoder):
    _, cache = decoder.step(np.array([prompt(5)]), None, np.arange(5)[None], None)
    with pytest.raises(InputError, match="attention_mask has changed for earlier slots"):
        decoder.step(np.array([[1]]), np.array([[1, 1, 0, 1, 1, 1]]), np.array([[5]]), cache)
    decoder.step(np.array([[1]]), np.ones((1, 6), np.int64), np.array([[5]]), cache)


def test_memory_that_ends_while_room_is_made_leaves_a_good_cache(decoder, monkeypatch):

    batch = RunningBatch(decoder)
    number, _ = batch.join(prompt(64))
    zeros, made = np.zeros, []

    def scarce(shape, dtype):
        made.append(shape)
        if len(made) == 3:
            raise MemoryError
        return zeros(shape, dtype)

    with monkeypatch.context() as patch:
        patch.setattr("gpt2x.runtimes.kv_cache.np.zeros", scarce)
        with pytest.raises(MemoryError):
            batch.step({number: 5})
    found = batch.step({number: 5})[number]
    expected, _ = decoder.step(np.array([[*prompt(64), 5]]), None, np.arange(65)[None], None)
    np.testing.assert_allclose(found, expected[0], atol=1e-4)


@pytest.mark.parametrize("ids", ["hello", None, 5, [1.5], ["a"]])
def test_a_prompt_that_is_not_token_ids(decoder, ids):
    with pytest.raises(InputError):
        RunningBatch(decoder).join(ids)


def test_a_model_whose_heads_onnx_runtime_cannot_take_is_refused_at_export(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(random_checkpoint(), "m.safetensors")
    result = gpt2x("export", "m.safetensors", "--onnx", "d", "--cache", "inplace", "--no-tokenizer")
    assert_refused(result, "this model has 3", "--cache growing")
    assert not (tmp_path / "d").exists()


def test_a_cache_of_another_model_is_refused(decoder, tmp_path):
    export_onnx(gentle(), tmp_path / "m", ExportOptions(cache="inplace"), need_tokenizer=False)
    other = OnnxDecoder(tmp_path / "m")
    for cache in (other.row_cache(1), [1, 2], "cache"):
        with pytest.raises(InputError, match="not one that an earlier step of this model returned"):
            decoder.step(np.array([[1]]), None, np.array([[0]]), cache)


# ------------------------------------------------------------------------------------------------------- a running batch


def test_sequences_join_and_leave_between_steps_and_each_gets_what_it_would_get_alone(decoder):
    prompts = {name: prompt(n, n) for name, n in (("a", 3), ("b", 70), ("c", 1), ("d", 20), ("e", 130))}
    plan = {0: "ab", 4: "c", 9: "d", 15: "e"}  # step -> who joins
    stays = {"a": 12, "b": 20, "c": 5, "d": 30, "e": 25}
    batch, running, found = RunningBatch(decoder), {}, {}
    for step in range(60):
        for name in plan.get(step, ""):
            number, logits = batch.join(prompts[name])
            running[number], found[name] = name, [int(logits.argmax())]
        for number, name in list(running.items()):
            if len(found[name]) >= stays[name]:
                batch.leave(number)
                del running[number]
        after = batch.step({number: found[name][-1] for number, name in running.items()})
        for number, logits in after.items():
            found[running[number]].append(int(logits.argmax()))
    assert len(batch) == 0
    assert found == {name: continued(decoder, prompts[name], stays[name]) for name in prompts}


def test_the_lengths_of_a_running_batch(decoder):
    batch = RunningBatch(decoder)
    first, _ = batch.join(prompt(4))
    second, _ = batch.join(prompt(9))
    batch.step({first: 1, second: 2})
    assert (len(batch), batch.length(first), batch.length(second)) == (2, 5, 10)
    batch.leave(first)
    assert (len(batch), batch.length(second)) == (1, 10)
    third, _ = batch.join(prompt(2))
    assert batch.length(third) == 2 and third not in (first, second)


def test_a_running_batch_says_what_is_wrong_and_goes_on(decoder, tmp_path):
    batch = RunningBatch(decoder)
    number, logits = batch.join(prompt(255))
    assert logits.shape == (2048,)
    for tokens, words in (
        ({}, f"no token for sequence {number}"),
        ({number: 1, 99: 2}, "sequence 99 is not in the batch"),
        ({number: 2048}, "token id 2048 is outside the vocabulary"),
    ):
        with pytest.raises(InputError, match=words):
            batch.step(tokens)
    batch.step({number: 1})
    with pytest.raises(InputError, match=r"sequence 0 fills the context of 256 tokens: call leave"):
        batch.step({number: 1})
    for ids, words in (([], "the prompt is empty"), (prompt(257), "the prompt has 257 tokens"), ([-1], "token id -1")):
        with pytest.raises(InputError, match=words):
            batch.join(ids)
    with pytest.raises(InputError, match="sequence 5 is not in the batch"):
        batch.leave(5)
    batch.leave(number)
    assert batch.step({}) == {}
    export_onnx(gentle(), tmp_path / "m", need_tokenizer=False)
    with pytest.raises(InputError, match="its cache grows"):
        RunningBatch(OnnxDecoder(tmp_path / "m"))


def test_room_for_rows_doubles_and_keeps_what_is_there():
    cache = RowCache(1, tensors=2, n_head=2, head_dim=3, n_ctx=100, dtype=np.float32)
    cache.reserve(1, 10)
    cache.buffers[1][0, :, :10] = 5
    cache.lengths[0] = 10
    cache.reserve(2, 65)
    assert cache.buffers[0].shape == (2, 2, 100, 3) and cache.capacity == 100
    assert (cache.buffers[1][0, :, :10] == 5).all() and (cache.buffers[1][0, :, 10:] == 0).all()
    cache.reserve(3, 1)
    assert len(cache.lengths) == 4 and cache.nbytes == 2 * 4 * 2 * 100 * 3 * 4


def test_int8_in_a_running_batch_is_as_near_as_alone(shakespeare):
    decoder = OnnxDecoder(shakespeare, precision="int8")
    batch = RunningBatch(decoder)
    numbers = {batch.join(prompt(n, n))[0]: n for n in (5, 50, 11)}
    found = batch.step(dict.fromkeys(numbers, 17))
    for number, n in numbers.items():
        expected, _ = decoder.step(np.array([[*prompt(n, n), 17]]), None, np.arange(n + 1)[None], None)
        assert np.abs(found[number] - expected[0]).max() < 2e-2 * np.abs(expected).max()


@pytest.mark.slow
def test_a_cache_of_8_bits_takes_a_quarter_and_is_nearer_than_8_bit_weights(tmp_path, shakespeare):
    source = open_checkpoint(SHAKESPEARE)
    export_onnx(source, tmp_path / "d", ExportOptions(("fp32",), "inplace-int8"))
    decoder = OnnxDecoder(tmp_path / "d")
    caches = [
        model.step(np.array([prompt(9)]), None, np.arange(9)[None], None)[1]
        for model in (decoder, OnnxDecoder(shakespeare))
    ]
    assert 4 * caches[0].nbytes == caches[1].nbytes
    reports = verify_export(source, tmp_path / "d"), verify_export(source, shakespeare, precision="int8")
    kl = [next(c for c in r.checks if c.name == "full context").details["kl_divergence"] for r in reports]
    assert reports[0].passed and kl[0] < kl[1]
    assert "int8 values" in (tmp_path / "d/README.md").read_text()


def test_scales_of_an_8_bit_cache_cover_what_a_text_shows_and_more():
    from gpt2x.precisions.calibrate import cache_scales

    source = open_checkpoint(SHAKESPEARE)
    ids = prompt(300)
    scales = cache_scales(source, ids)
    decoder: Any = gpt2x_model(source)
    _, present = decoder.model.hidden(torch.tensor([ids[:256]]))
    assert len(scales) == 4
    for pair, found in zip(scales, present, strict=True):
        for scale, x in zip(pair, found, strict=True):
            assert scale.shape == (6, 1, 32) and scale.dtype == np.float32
            largest = x.abs().amax((0, 2)).detach().numpy()[:, None]
            assert (scale * 127 >= 1.49 * largest).all() and (scale * 127 >= 0.33 * largest.max()).all()


def test_a_prompt_of_the_whole_context_fits(tmp_path):
    checkpoint = gentle(SMALL)
    export_onnx(checkpoint, tmp_path / "m", ExportOptions(cache="inplace", last=True), need_tokenizer=False)
    ids = np.arange(40)[None]
    logits, cache = OnnxDecoder(tmp_path / "m").step(ids, None, ids, None)
    expected, _ = gpt2x_model(checkpoint).step(ids, None, ids, None)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert cache.capacity == 40


# ---------------------------------------------------------------------------------------------------- shared prompts


def test_a_fork_continues_as_the_prompt_read_again_would(decoder):
    ids = prompt(30)
    _, cache = decoder.step(np.array([ids]), None, np.arange(30)[None], None)
    assert cache.fork(0, 2) == [1, 2]
    assert cache.lengths.tolist() == [30, 30, 30]
    tokens = np.array([[5], [6], [7]])
    found, cache = decoder.step(tokens, None, np.full((3, 1), 30), cache)
    for row, token in enumerate(tokens[:, 0].tolist()):
        _, own = decoder.step(np.array([ids]), None, np.arange(30)[None], None)
        expected, _ = decoder.step(np.array([[token]]), None, np.array([[30]]), own)
        np.testing.assert_array_equal(found[row], expected[0])


def test_a_fork_is_independent_of_the_row_that_it_was(decoder):
    cache = decoder.row_cache(1)
    decoder.run(np.array([prompt(20)]), None, np.arange(20)[None], cache)
    cache.fork(0)
    before = [buffer[1, :, :20].copy() for buffer in cache.buffers]
    cache.truncate(10)
    for buffer in cache.buffers:
        buffer[0] = 0
    assert all((old == buffer[1, :, :20]).all() for old, buffer in zip(before, cache.buffers, strict=True))


def test_a_sequence_of_a_running_batch_forks_without_reading_its_prompt_again(decoder, monkeypatch):
    ids = prompt(40)
    with RunningBatch(decoder) as batch:
        first, logits = batch.join(ids)
        other, _ = batch.join(prompt(7, 1))
        monkeypatch.setattr(type(decoder.in_place_run()), "prefill", None)
        second = batch.fork(first)
        assert batch.length(second) == 40 and len(batch) == 3
        found = batch.step({first: 3, other: 4, second: 5})
        with pytest.raises(InputError, match="sequence 9 is not in the batch"):
            batch.fork(9)
    monkeypatch.undo()
    for sequence, token in ((first, 3), (second, 5)):
        with RunningBatch(decoder) as batch:
            alone, _ = batch.join(ids)
            expected = batch.step({alone: token})[alone]
        np.testing.assert_allclose(found[sequence], expected, atol=1e-4)
    assert int(logits.argmax()) >= 0


def test_a_row_is_taken_back_and_runs_of_several_tokens_keep_their_bindings(decoder):
    ids = prompt(40)
    whole, _ = decoder.run(np.array([ids]), None, np.arange(40)[None], None)
    _, cache = decoder.step(np.array([ids[:20]]), None, np.arange(20)[None], None)
    for wrong in ([1, 2, 3, 4], [9, 8, 7, 6]):
        decoder.run(np.array([wrong]), None, np.arange(20, 24)[None], cache)
        cache = decoder.truncate(cache, 20)
    bound = dict(cache.bound)
    found, cache = decoder.run(np.array([ids[20:24]]), None, np.arange(20, 24)[None], cache)
    assert cache.bound == bound and len(bound) == 1
    np.testing.assert_allclose(found[0], whole[0, 20:24], atol=1e-4)
    assert cache.lengths.tolist() == [24]
