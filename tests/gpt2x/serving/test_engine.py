"""The engine without HTTP: what a request gets does not depend on the others."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time

import numpy as np
import pytest
from live_server import LIMIT, held, wait_for

from converters import CheckpointError
from gpt2x.generation.config import GenerationConfig
from gpt2x.generation.generate import continuations
from gpt2x.generation.sampling import Sampling
from gpt2x.runtimes.base import InputError
from gpt2x.runtimes.onnxruntime import OnnxDecoder
from gpt2x.scoring.spans import Span, score_spans
from gpt2x.serving.engine import Engine
from gpt2x.serving.faults import ServingError
from gpt2x.serving.memory_plan import BudgetError, MemoryPlan, bytes_per_token, plan_memory
from gpt2x.serving.observer import Observer
from gpt2x.serving.prefix_cache import PIECE, PrefixCache
from gpt2x.serving.requests import Failed, PromptRead, TextEnd, TextPiece, TextRequest


class Client:
    """Submits requests, and collects what comes back."""

    def __init__(self, engine, *requests, limit=LIMIT):
        self.events = queue.Queue()
        self.seen = []
        self.left = sum(request.texts for request in requests)
        self.job = engine.submit(requests, self.take, time.monotonic() + limit)

    def take(self, events):
        for event in events:
            self.events.put(event)

    def next(self):
        event = self.events.get(timeout=LIMIT)
        self.seen.append(event)
        if isinstance(event, Failed):
            raise event.error
        self.left -= isinstance(event, TextEnd)
        return event

    def wait(self):
        while self.left:
            self.next()
        return self

    def wait_for_piece(self):
        while not isinstance(self.next(), TextPiece):
            pass
        return self

    def texts(self):
        """The texts by (prompt, number)."""
        self.wait()
        found = {}
        for event in self.seen:
            if isinstance(event, TextEnd):
                found.setdefault((event.prompt, event.text), "")
            if isinstance(event, TextPiece):
                key = event.prompt, event.text
                found[key] = found.get(key, "") + event.piece
        return found

    def ids(self):
        """The tokens of the first text."""
        self.wait()
        pieces = [event for event in self.seen if isinstance(event, TextPiece) and (event.prompt, event.text) == (0, 0)]
        return [token.id for piece in pieces for token in piece.tokens]

    def scores(self):
        """The log-probabilities of the first text."""
        self.wait()
        pieces = [event for event in self.seen if isinstance(event, TextPiece) and (event.prompt, event.text) == (0, 0)]
        return [float(token.score.log_probabilities[0]) for piece in pieces for token in piece.tokens]


class Recorder(Observer):
    def __init__(self):
        self.rows = []
        self.read = []
        self.ended = []
        self.cancels = threading.Event()
        self.codes = []

    def stepped(self, rows, seconds):
        self.rows.append(rows)

    def prompt_read(self, tokens, cached):
        self.read.append(tokens)

    def cancelled(self):
        self.cancels.set()

    def failed(self, code):
        self.codes.append(code)


@pytest.fixture(scope="module")
def model(exported):
    return OnnxDecoder(exported)


@pytest.fixture
def engine_of(exported, tokenizer):
    made = []

    def make(rows=4, context=256, max_queue=64, prefix=1 << 24, observer=None, precision="fp32"):
        decoder = OnnxDecoder(exported, precision=precision)
        made.append(Engine(decoder, tokenizer, MemoryPlan(rows, context, 0, prefix), max_queue, observer))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def prompt(n, seed=0):
    return tuple(np.random.default_rng(seed).integers(2000, size=n).tolist())


def request(ids, n=20, seed=1, **others):
    return TextRequest(tuple(ids), n, Sampling(seed=seed, temperature=0.9, top_p=0.95), **others)


# ------------------------------------------------------------------------------------------------------- determinism


def test_a_seeded_request_gives_the_same_tokens_and_scores_alone_and_in_any_batch(engine_of):
    wanted = request(prompt(70), 30, seed=7, logprobs=0)
    alone = Client(engine_of(rows=1, prefix=0), wanted)
    expected = alone.ids(), alone.scores()
    for rows, before in ((4, 3), (8, 0), (16, 20)):
        engine = engine_of(rows=rows, max_queue=99)
        others = [Client(engine, request(prompt(3 + 11 * i, i), 10 + i, seed=None)) for i in range(before)]
        client = Client(engine, wanted)
        others += [Client(engine, request(prompt(150 + i, i), 9, seed=None)) for i in range(5)]
        assert (client.ids(), client.scores()) == expected
        for other in others:
            other.wait()


def test_greedy_tokens_are_those_of_generate(engine_of, model, tokenizer):
    ids = tokenizer.encode("ROMEO:\nWhat light through yonder window breaks")
    client = Client(engine_of(), TextRequest(tuple(ids), 40, Sampling(temperature=0)))
    config = GenerationConfig.of(max_new_tokens=40, temperature=0, eos_token_id=())
    ((expected,),) = continuations(model, tokenizer, [ids], config)
    assert client.ids() == expected.tokens
    assert client.texts()[0, 0] == expected.text


def test_texts_of_one_prompt_share_its_reading(engine_of):
    recorder = Recorder()
    client = Client(engine_of(rows=4, observer=recorder), request(prompt(90), 12, texts=4))
    assert len(client.texts()) == 4
    assert recorder.read == [90]


def test_texts_of_one_prompt_differ_and_each_is_the_same_alone_whatever_rows_are_free(engine_of):
    wanted = request(prompt(90), 12, seed=3, texts=6)
    wide = Client(engine_of(rows=8), wanted).texts()
    narrow = Client(engine_of(rows=2), wanted).texts()
    assert wide == narrow
    assert len(set(wide.values())) == 6
    assert Client(engine_of(rows=1), dataclasses.replace(wanted, texts=1)).texts()[0, 0] == wide[0, 0]


@pytest.mark.parametrize("precision", ["fp32", "w8a8"])
def test_a_prompt_that_begins_like_an_earlier_one_reuses_its_rows_and_gives_the_same_bits(engine_of, precision):
    shared = prompt(2 * PIECE + 10)
    wanted = request([*shared, *prompt(30, 5)], 20, seed=2, logprobs=0)
    fresh = Client(engine_of(prefix=0, precision=precision), wanted)
    engine = engine_of(precision=precision)
    Client(engine, request([*shared, *prompt(50, 6)], 3)).wait()
    reused = Client(engine, wanted)
    assert (reused.ids(), reused.scores()) == (fresh.ids(), fresh.scores())
    (read,) = [event for event in reused.seen if isinstance(event, PromptRead)]
    assert read.cached == 2 * PIECE


def test_the_scores_of_a_prompt_are_those_of_gpt2x_score(engine_of, model):
    ids = prompt(150)
    client = Client(engine_of(), TextRequest(ids, 0, logprobs=3, score_prompt=True)).wait()
    (read,) = [event for event in client.seen if isinstance(event, PromptRead)]
    (expected,) = score_spans(model, [Span(np.array(ids), 1)], 3)
    np.testing.assert_allclose(read.scores.log_probabilities, expected.log_probabilities, atol=2e-5)
    np.testing.assert_array_equal(read.scores.alternatives.ids, expected.alternatives.ids)


# ------------------------------------------------------------------------------------------------- joining and leaving


def test_requests_of_one_thread_get_their_events_of_a_turn_in_one_call(engine_of):
    engine = engine_of(rows=4)
    calls, events = queue.Queue(), []
    ends = time.monotonic() + LIMIT
    with held(engine, rows=3):
        for seed in range(3):
            engine.submit([request(prompt(5), 6, seed)], events.append, ends, calls.put)
        wait_for(lambda: len(engine._running) == 3)
    wait_for(lambda: engine.idle)
    engine.close()  # its last turn is over
    while not calls.empty():
        before = len(events)
        calls.get()()
        # All three have a token in each turn after the last of their prompts was read.
        if len(events) - before == 3:
            break
    else:
        pytest.fail("each request had a call of its own")
    while not calls.empty():
        calls.get()()
    assert sum(isinstance(event, TextEnd) for sent in events for event in sent) == 3


def test_running_texts_get_a_token_between_two_pieces_of_a_long_prompt(engine_of):
    order = []
    engine = engine_of()
    read, step = engine._read_piece, engine._batch.step

    def read_piece():
        if engine._reading or engine._waiting:
            order.append("read")
        read()

    def one_step(tokens):
        order.append("step")
        return step(tokens)

    engine._read_piece = read_piece
    engine._batch.step = one_step
    with engine._wake:  # the thread takes neither before both wait
        first = Client(engine, request(prompt(5), 200))
        long = Client(engine, request(prompt(3 * PIECE + 20), 5))
    long.wait()
    assert any(isinstance(event, TextEnd) for event in long.seen)
    first.wait()
    reads = [i for i, what in enumerate(order) if what == "read"]
    # The first prompt is one piece, the second four; a step follows each of them.
    assert len(reads) == 5
    assert [order[i + 1] for i in reads] == ["step"] * 5


def test_a_cancelled_request_frees_its_row_within_a_step(engine_of):
    recorder = Recorder()
    engine = engine_of(rows=2, observer=recorder)
    step, steps = engine._batch.step, []

    def one_step(tokens):
        steps.append(set(tokens))
        return step(tokens)

    engine._batch.step = one_step
    with held(engine, rows=2):
        with engine._wake:  # the thread takes none before all wait
            stays = Client(engine, request(prompt(5), 240))
            goes = Client(engine, request(prompt(6), 240))
            waits = Client(engine, request(prompt(7), 3))
        wait_for(lambda: len(engine._running) == 2)
        (sequence,) = [number for number, slot in engine._running.items() if slot.job is goes.job]
        engine.cancel(goes.job)
        begun = len(steps)
    waits.wait()
    stays.wait()
    assert recorder.cancels.is_set()
    assert not any(sequence in tokens for tokens in steps[begun + 1 :])
    assert any(len(tokens) == 2 for tokens in steps[begun + 1 :])  # the waiting text took the row
    assert engine.idle


def test_a_request_that_is_cancelled_while_it_waits_or_is_read(engine_of):
    engine = engine_of(rows=1)
    with held(engine):
        first = Client(engine, request(prompt(5), 200))
        wait_for(lambda: engine._running)
        waiting = Client(engine, request(prompt(6), 200))
        engine.cancel(waiting.job)
        engine.cancel(first.job)
    assert Client(engine, request(prompt(200), 2)).wait().left == 0
    assert engine.idle and not waiting.seen


def test_requests_with_several_prompts_and_more_texts_than_rows(engine_of):
    engine = engine_of(rows=3)
    requests = [request(prompt(4 + i, i), 6, texts=2) for i in range(5)]
    together = Client(engine, *requests).texts()
    assert sorted(together) == [(i, j) for i in range(5) for j in range(2)]
    assert Client(engine, requests[3]).texts()[0, 1] == together[3, 1]


# ------------------------------------------------------------------------------------------------------ ends of texts


def test_a_stop_string_never_shows_nor_do_its_tokens(engine_of, tokenizer):
    engine = engine_of()
    ids = tuple(tokenizer.encode("ROMEO:\n"))
    free = Client(engine, TextRequest(ids, 60, Sampling(temperature=0)))
    whole = free.texts()[0, 0]
    stop = whole[20:26]
    client = Client(engine, TextRequest(ids, 60, Sampling(temperature=0), stop_strings=(stop,), logprobs=1))
    assert client.texts()[0, 0] == whole[: whole.index(stop)]
    assert client.seen[-1].reason == "stop"
    shown = tokenizer.decode(client.ids())
    assert whole.startswith(shown[: whole.index(stop)])
    for event in client.seen:
        if isinstance(event, TextPiece):
            assert all(token.offset < whole.index(stop) for token in event.tokens)


def test_a_text_ends_at_an_end_token_at_its_limit_and_at_the_end_of_the_context(engine_of):
    engine = engine_of(context=64)
    ids = prompt(10)
    free = Client(engine, TextRequest(ids, 8, Sampling(temperature=0), logprobs=0))
    third = free.ids()[2]
    stopped = Client(engine, TextRequest(ids, 8, Sampling(temperature=0), end_tokens=(third,), logprobs=0))
    first = free.ids().index(third)
    assert stopped.ids() == free.ids()[:first] and stopped.seen[-1].reason == "stop"
    full = Client(engine, TextRequest(ids, 100, Sampling(temperature=0), logprobs=0))
    assert len(full.ids()) == 64 + 1 - 10 and full.seen[-1].reason == "length"
    nothing = Client(engine, TextRequest(ids, 0, Sampling(temperature=0)))
    assert nothing.texts() == {(0, 0): ""} and nothing.seen[-1].tokens == 0


def test_a_character_of_several_tokens_is_never_split(engine_of, tokenizer):
    ids = tokenizer.encode("é🙂")
    bias = dict.fromkeys(ids, 50.0)
    sampling = Sampling(seed=1, logit_bias=bias, temperature=1.5)
    client = Client(engine_of(), TextRequest(prompt(3), 60, sampling, logprobs=0))
    client.wait()
    pieces = [event for event in client.seen if isinstance(event, TextPiece)]
    assert "".join(piece.piece for piece in pieces) == tokenizer.decode(client.ids())
    assert len([piece for piece in pieces if piece.piece]) < len(client.ids())


# ------------------------------------------------------------------------------------------------------------- limits


def test_a_full_queue_refuses_with_the_seconds_to_wait_and_admits_later(engine_of):
    engine = engine_of(rows=1, max_queue=2)
    with held(engine):
        running = Client(engine, request(prompt(5), 200))
        wait_for(lambda: engine._running)
        waiting = [Client(engine, request(prompt(5), 2)) for _ in range(2)]
        with pytest.raises(ServingError, match="2 texts are waiting") as refused:
            Client(engine, request(prompt(5), 2))
    assert refused.value.code == "queue_full" and 1 <= refused.value.retry_after <= 60
    for client in (running, *waiting):
        client.wait()
    assert Client(engine, request(prompt(5), 2)).wait().left == 0


def test_texts_that_have_a_free_row_take_no_place_in_the_queue(engine_of):
    engine = engine_of(rows=4, max_queue=2)
    with held(engine):
        clients = [Client(engine, request(prompt(5), 200))]
        wait_for(lambda: engine._running)
        # Three more rows are free, and two texts may wait.
        clients += [Client(engine, request(prompt(5), 2)) for _ in range(5)]
        with pytest.raises(ServingError, match="5 texts are waiting"):
            Client(engine, request(prompt(5), 2))
    for client in clients:
        client.wait()


def test_a_request_of_more_texts_than_may_wait_is_taken_if_no_other_waits(engine_of):
    engine = engine_of(rows=2, max_queue=2)
    with held(engine):
        clients = [Client(engine, request(prompt(5), 2, texts=12))]
        wait_for(lambda: engine._running)
        with pytest.raises(ServingError, match="this request has 12: the limit is 2"):
            Client(engine, request(prompt(5), 2, texts=12))
    assert len(clients[0].texts()) == 12


def test_a_request_that_is_late_fails_and_the_others_go_on(engine_of):
    engine = engine_of(rows=2)
    other = Client(engine, request(prompt(4), 100))
    late = Client(engine, request(prompt(5), 240), limit=0.0)
    with pytest.raises(ServingError) as failed:
        late.wait()
    assert failed.value.code == "generation_timeout"
    other.wait()


def test_draining_refuses_new_requests_and_finishes_those_that_were_admitted(engine_of):
    engine = engine_of(rows=1)
    clients = [Client(engine, request(prompt(5 + i), 30)) for i in range(4)]
    engine.drain()
    with pytest.raises(ServingError) as refused:
        Client(engine, request(prompt(5), 2))
    assert refused.value.code == "shutting_down" and not engine.ready
    for client in clients:
        client.wait()
    assert engine.idle


def test_an_engine_that_is_aborted_or_closed_fails_every_request(engine_of):
    engine = engine_of(rows=1)
    with held(engine):
        clients = [Client(engine, request(prompt(5), 250)) for _ in range(3)]
        wait_for(lambda: engine._running)
        engine.abort(ServingError("shutting_down", "too late"))
    for client in clients:
        with pytest.raises(ServingError, match="too late"):
            client.wait()
    other = engine_of(rows=1)
    with held(other):
        client = Client(other, request(prompt(5), 250))
        wait_for(lambda: other._running)
        closing = threading.Thread(target=other.close)
        closing.start()
        wait_for(lambda: other._stopped)
    closing.join()
    with pytest.raises(ServingError, match="shut down"):
        client.wait()
    assert not other.alive


def test_memory_that_runs_out_in_a_step_fails_what_runs_and_the_next_request_is_served(engine_of):
    engine = engine_of()
    expected = Client(engine, request(prompt(9), 10)).texts()
    step = engine._batch.step

    def scarce(tokens):
        engine._batch.step = step
        raise MemoryError

    engine._batch.step = scarce
    client = Client(engine, request(prompt(9), 50))
    with pytest.raises(ServingError) as failed:
        client.wait()
    assert failed.value.code == "out_of_memory"
    assert Client(engine, request(prompt(9), 10)).texts() == expected


@pytest.mark.parametrize("error", [CheckpointError("the logits contain NaN"), ValueError("probabilities contain NaN")])
def test_logits_that_are_not_finite_fail_one_request_alone(engine_of, monkeypatch, error):
    recorder = Recorder()
    engine = engine_of(observer=recorder)
    good = Client(engine, request(prompt(5), 100)).wait_for_piece()
    monkeypatch.setattr("gpt2x.serving.sequence.Sequence.take", _failing_for(prompt(6), error))
    bad = Client(engine, request(prompt(6), 5))
    with pytest.raises(ServingError) as failed:
        bad.wait()
    assert failed.value.code == "model_failed" and recorder.codes == ["model_failed"]
    good.wait()


def _failing_for(ids, error):
    from gpt2x.serving.sequence import Sequence

    take = Sequence.take

    def failing(self, logits):
        if self.request.prompt == ids:
            raise error
        take(self, logits)

    return failing


def test_controls_that_rule_out_every_token_fail_their_request(engine_of):
    sampling = Sampling(suppress_tokens=tuple(range(2048)))
    with pytest.raises(ServingError) as failed:
        Client(engine_of(), TextRequest(prompt(3), 5, sampling)).wait()
    assert failed.value.code == "no_token_left"


def test_a_fault_in_the_thread_ends_it_and_every_request(engine_of, monkeypatch):
    engine = engine_of()
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    engine._batch.step = lambda tokens: 1 / 0
    with pytest.raises(ServingError, match="ZeroDivisionError"):
        Client(engine, request(prompt(3), 5)).wait()
    engine._thread.join()
    assert not engine.alive and not engine.ready
    with pytest.raises(ServingError, match="restart the server"):
        Client(engine, request(prompt(3), 5))


def test_an_engine_that_is_failing_admits_nothing_that_it_would_never_answer(engine_of, monkeypatch):
    refusals = []

    class Retrying(Observer):
        """Repeats a request at once, while the thread ends."""

        def failed(self, code):
            with pytest.raises(ServingError, match="restart the server") as refused:
                Client(engine, request(prompt(3), 5))
            refusals.append(refused.value.code)

    engine = engine_of(observer=Retrying())
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    engine._batch.step = lambda tokens: 1 / 0
    with pytest.raises(ServingError, match="ZeroDivisionError"):
        Client(engine, request(prompt(3), 5)).wait()
    engine._thread.join()
    assert refusals == ["model_failed"]


# ------------------------------------------------------------------------------------------------------------- memory


def test_a_budget_is_divided_between_sequences_and_the_prefix_cache(model):
    per_token = 2 * 4 * 192 * 4
    assert bytes_per_token(model) == per_token
    row = 256 * per_token
    assert plan_memory(model, 8, None, 4 * row) == MemoryPlan(3, 256, row, row)
    assert plan_memory(model, 2, None, 100 * row) == MemoryPlan(2, 256, row, 2 * row)
    assert plan_memory(model, 8, 100, 4 * row) == MemoryPlan(6, 100, row // 2, row)
    assert plan_memory(model, 8, None, row) == MemoryPlan(1, 256, row, 0)
    with pytest.raises(BudgetError, match="raise --cache-memory, or lower --max-context"):
        plan_memory(model, 8, None, row - 1)


def test_the_cache_of_an_engine_takes_the_planned_memory_and_never_more(engine_of, model):
    plan = plan_memory(model, 3, 100, 1 << 30)
    engine = engine_of(rows=3, context=100)
    assert engine._batch.cache.nbytes == 3 * plan.row_bytes
    for i in range(6):
        Client(engine, request(prompt(90, i), 10, texts=2)).wait()
    assert engine._batch.cache.nbytes == 3 * plan.row_bytes
    assert engine.prefix.nbytes <= engine.plan.prefix_bytes


def test_a_prefix_cache_keeps_to_its_budget_and_forgets_what_was_not_used_for_longest():
    block = [np.zeros((1, PIECE, 4), np.float32)]
    size = block[0].nbytes
    cache = PrefixCache(2 * size)
    a, b, c = (prompt(PIECE, seed) for seed in range(3))
    for tokens in (a, b):
        cache.add(tokens, block)
    assert len(cache.find((*a, 1))) == 1
    cache.add(c, block)
    assert (len(cache), cache.nbytes) == (2, 2 * size)
    assert cache.has(a) and cache.has(c) and not cache.has(b)
    assert cache.find(a) == []  # its last token is always read
    small = PrefixCache(size - 1)
    small.add(a, block)
    assert (len(small), small.nbytes) == (0, 0)


def test_a_growing_cache_is_refused_with_what_to_export(tmp_path, tokenizer):
    from checkpoints import gentle

    from gpt2x.export.onnx_directory import export_onnx

    export_onnx(gentle(), tmp_path / "m", need_tokenizer=False)
    decoder = OnnxDecoder(tmp_path / "m")
    with pytest.raises(InputError, match="its cache grows; export the model with --cache inplace"):
        plan_memory(decoder, 8, None, 1 << 30)
