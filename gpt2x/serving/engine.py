"""A model in a thread of its own. Requests join and leave its batch between steps."""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from converters import CheckpointError

from ..generation.text import TextTokenizer
from ..runtimes.base import InputError, Logits
from ..runtimes.batching import Reading, RunningBatch
from ..runtimes.onnxruntime import OnnxDecoder
from ..scoring.logits import TokenScores, joined, score_tokens
from .faults import ServingError
from .memory_plan import MemoryPlan
from .observer import Observer
from .prefix_cache import PIECE, PrefixCache
from .requests import Event, Failed, PromptRead, TextEnd, TextPiece, TextRequest
from .sequence import Sequence as Text
from .worker import Worker

log = logging.getLogger(__name__)

Sink = Callable[[list[Event]], None]
"""Takes the events of a request. It must neither block nor raise."""

Post = Callable[[Callable[[], None]], None]
"""Runs a function in the thread of the sinks. Requests with equal ones get their events of a turn in one call."""


def _in_this_thread(function: Callable[[], None]) -> None:
    function()


@dataclass(eq=False)
class Job:
    """Requests that were submitted together, and that fail together.

    Attributes:
        requests: one for each prompt.
        sink: takes the events.
        post: calls the sink.
        deadline: of ``time.monotonic``, after which it fails.
    """

    requests: Sequence[TextRequest]
    sink: Sink
    post: Post
    deadline: float
    started: float
    cancelled: bool = False
    ended: bool = False
    remaining: int = 0  # texts that are not complete
    read: set[int] = field(default_factory=set)  # prompts that were read and reported
    events: list[Event] = field(default_factory=list)  # not sent yet


@dataclass(eq=False)
class _Slot:
    """A text of a job, which waits or runs."""

    job: Job
    prompt: int
    number: int
    text: Text

    @property
    def request(self) -> TextRequest:
        return self.text.request


@dataclass
class _Reading:
    """The prompt that is being read."""

    slot: _Slot
    reading: Reading
    cached: int
    scored: bool
    scores: list[TokenScores] = field(default_factory=list)


class Engine(Worker):
    """Continues prompts with one model, in a thread of its own.

    Each turn of the thread reads at most one piece of a prompt, and then adds a token to every text that runs. So texts
    do not wait for a long prompt, only for a piece of it.

    Args:
        decoder: the model. Its cache must stay in place. ``close`` leaves it open, as others may share its memory.
        tokenizer: its tokenizer.
        plan: sequences and memory.
        max_queue: texts that wait, at most.
        observer: is told what happens.

    Raises:
        InputError: if the decoder's cache grows.
        MemoryError: if there is no memory for the cache.
    """

    def __init__(
        self, decoder: OnnxDecoder, tokenizer: TextTokenizer, plan: MemoryPlan, max_queue: int,
        observer: Observer | None = None,
    ) -> None:  # fmt: skip
        super().__init__("gpt2x-engine", "text was", max_queue, observer)
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.plan = plan
        self.prefix = PrefixCache(plan.prefix_bytes)
        self._batch = RunningBatch(decoder)
        self._batch.reserve(plan.rows, plan.context)
        self._waiting: deque[_Slot] = deque()
        self._running: dict[int, _Slot] = {}  # by the number of the sequence in the batch
        self._reading: _Reading | None = None
        self._with_events: list[Job] = []  # jobs whose events were not sent yet
        self._jobs: set[Job] = set()  # that have not ended
        self._seconds_per_text = 1.0  # how long a text runs, on average
        self._start()

    # ------------------------------------------------------------------------------------------- from other threads

    @property
    def idle(self) -> bool:
        """Whether no job is left."""
        with self._wake:
            return not self._jobs

    def submit(self, requests: Sequence[TextRequest], sink: Sink, deadline: float, post: Post = _in_this_thread) -> Job:
        """Queue requests, all or none of them.

        Args:
            requests: one for each prompt.
            sink: takes their events.
            deadline: of ``time.monotonic``, after which they fail.
            post: calls the sink; by default in the engine's thread.

        Raises:
            ServingError: if the queue is full, or the engine takes no more requests.
        """
        slots_of = sum(request.texts for request in requests)
        job = Job(requests, sink, post, deadline, time.monotonic(), remaining=slots_of)
        slots = [
            _Slot(job, i, number, Text(request, number, self.tokenizer, self.plan.context))
            for i, request in enumerate(requests)
            for number in range(request.texts)
        ]
        with self._wake:
            self._check_admission(len(slots))
            self._waiting.extend(slots)
            self._jobs.add(job)
            self._wake.notify()
        return job

    def _check_admission(self, texts: int) -> None:
        self._check_ready()
        waiting = len(self._waiting)
        taken = len(self._running) + (self._reading is not None)
        # A text that waits only until its prompt is read, because a row is free for it, does not count.
        free = self.plan.rows - taken
        # A request of more texts than may wait is taken if no other waits: to repeat it would never help.
        if waiting and waiting + texts > self.max_queue + free:
            turns = (waiting + self.plan.rows) / self.plan.rows
            raise self._queue_full(waiting, texts, turns * self._seconds_per_text)

    def cancel(self, job: Job) -> None:
        """Give up a job. Its rows are free before the next step."""
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    def close(self) -> None:
        """End every job and the thread, and free the cache."""
        super().close()
        self._batch.close()

    # ------------------------------------------------------------------------------------------------- in its thread

    def _has_work(self) -> bool:
        return bool(self._waiting or self._running or self._reading)

    def _turn(self) -> None:
        self._remove_ended()
        try:
            self._read_piece()
            self._step()
        except (MemoryError, CheckpointError) as error:
            self._fail_running(self._failure("a step failed, and with it every running request", error))
        cached = sum(self._batch.length(sequence) for sequence in self._running)
        self.observer.state(len(self._waiting), len(self._running), cached, self.prefix.nbytes)
        # Last, as the threads that it wakes compete with this one until the model runs again.
        self._send()

    def _all(self) -> list[Job]:
        with self._wake:
            return list(self._jobs)

    def _remove_ended(self) -> None:
        """End jobs that are too late, and remove what was cancelled or has failed."""
        now = time.monotonic()
        for job in self._all():
            if now > job.deadline:
                self._fail(job, ServingError("generation_timeout", "the texts were not complete in time"))
        self._leave()
        with self._wake:
            waiting, self._waiting = self._waiting, deque()
            for slot in waiting:
                if slot.job.ended or slot.job.cancelled:
                    self._end(slot.job)
                else:
                    self._waiting.append(slot)
        reading = self._reading
        if reading and (reading.slot.job.ended or reading.slot.job.cancelled):
            self._batch.abandon(reading.reading)
            self._reading = None
            self._end(reading.slot.job)

    def _leave(self) -> None:
        """Free the rows of texts that are complete or not wanted any more."""
        for sequence, slot in list(self._running.items()):
            if slot.text.finish or slot.job.ended or slot.job.cancelled:
                self._batch.leave(sequence)
                del self._running[sequence]
                if slot.job.cancelled:
                    self._end(slot.job)

    def _end(self, job: Job) -> None:
        """Forget a job."""
        with self._wake:
            known = job in self._jobs
            self._jobs.discard(job)
        if known and job.cancelled and not job.ended:
            self.observer.cancelled()
        job.ended = True

    def _fail(self, job: Job, error: ServingError) -> None:
        if job.ended or job.cancelled:
            return
        self._end(job)
        self.observer.failed(error.code)
        job.events.append(Failed(error))
        _send([job])

    def _end_all(self, error: ServingError) -> None:
        for job in self._all():
            self._fail(job, error)

    def _fail_running(self, error: ServingError) -> None:
        """Fail what may have been changed by a step that failed, and begin with an empty cache."""
        reading = [self._reading.slot] if self._reading else []
        for slot in [*self._running.values(), *reading]:
            self._fail(slot.job, error)
        self._running.clear()
        self._reading = None
        self._batch.close()
        self._batch.reserve(self.plan.rows, self.plan.context)

    # --------------------------------------------------------------------------------------------------- a prompt

    def _read_piece(self) -> None:
        """Read a piece of the prompt that is being read, or of the next one."""
        current = self._reading or self._begin()
        if current is None:
            return
        prompt = current.slot.request.prompt
        start = current.reading.length
        stop = min(start + PIECE, len(prompt))
        logits = current.reading.read(prompt[start:stop], every=current.scored)
        if current.scored:
            self._score_piece(current, logits, start)
        if stop - start == PIECE and not self.prefix.has(prompt[:stop]):
            self.prefix.add(prompt[:stop], current.reading.copy(start, stop))
        if stop == len(prompt):
            self._finish_reading(current, logits[-1])

    def _begin(self) -> _Reading | None:
        """Begin with the next prompt, if there is a row for it."""
        if len(self._running) >= self.plan.rows:
            return None
        with self._wake:
            if not self._waiting:
                return None
            slot = self._waiting.popleft()
        reading = self._batch.begin()
        # Scores need the logits of every token, which are not kept.
        scored = slot.request.score_prompt and slot.prompt not in slot.job.read
        blocks = [] if scored else self.prefix.find(slot.request.prompt)
        for block in blocks:
            reading.restore(block)
        self._reading = _Reading(slot, reading, reading.length, scored)
        return self._reading

    def _score_piece(self, current: _Reading, logits: Logits, start: int) -> None:
        """Score the tokens after each of a piece."""
        request = current.slot.request
        targets = np.array(request.prompt[start + 1 : start + 1 + len(logits)])
        if len(targets):
            scores = score_tokens(logits[: len(targets)], targets, request.logprobs or 0, self.decoder.threads)
            current.scores.append(scores)

    def _finish_reading(self, current: _Reading, logits: Logits) -> None:
        """Let the text join the batch, and with it the other texts of its prompt that find a row."""
        slot = current.slot
        self._reading = None
        scores = joined(current.scores) if current.scores else None
        # A prompt is read again for texts that found no row the first time.
        if slot.prompt not in slot.job.read:
            slot.job.read.add(slot.prompt)
            self._add(slot.job, PromptRead(slot.prompt, current.cached, scores))
        self.observer.prompt_read(len(slot.request.prompt), current.cached)
        sequence = self._batch.finish(current.reading)
        self._begin_text(sequence, slot, logits)
        for sibling in self._siblings(slot):
            self._begin_text(self._batch.fork(sequence), sibling, logits)

    def _siblings(self, slot: _Slot) -> list[_Slot]:
        found: list[_Slot] = []
        with self._wake:
            while self._waiting and len(self._running) + len(found) < self.plan.rows:
                other = self._waiting[0]
                if other.job is not slot.job or other.prompt != slot.prompt:
                    break
                found.append(self._waiting.popleft())
        return found

    def _begin_text(self, sequence: int, slot: _Slot, logits: Logits) -> None:
        self._running[sequence] = slot
        if slot.text.finish is None:
            self._take(slot, logits)
            self.observer.first_token(time.monotonic() - slot.job.started)
        else:
            self._collect(slot)

    # ----------------------------------------------------------------------------------------------------- a step

    def _step(self) -> None:
        """Add a token to every text that runs."""
        self._leave()
        if not self._running:
            return
        started = time.monotonic()
        last = {sequence: slot.text.tokens[-1] for sequence, slot in self._running.items()}
        logits_of = self._batch.step(last)
        for sequence, slot in self._running.items():
            self._take(slot, logits_of[sequence])
        self.observer.stepped(len(last), time.monotonic() - started)

    def _take(self, slot: _Slot, logits: Logits) -> None:
        """Let a text choose its next token. What is wrong with its controls, or its logits, fails its job alone."""
        try:
            slot.text.take(logits)
        except InputError as error:
            self._fail(slot.job, ServingError("no_token_left", str(error)))
            return
        except CheckpointError as error:
            log.error("%s", error)
            self._fail(slot.job, ServingError("model_failed", str(error)))
            return
        except Exception as error:
            # The choice of a token changes nothing that others have: whatever its fault is, they go on.
            self._fail(slot.job, self._failure("choosing a token failed", error))
            return
        self._collect(slot)

    def _collect(self, slot: _Slot) -> None:
        """Add what a text has to show to the events of its job."""
        text, job = slot.text, slot.job
        piece, tokens = text.piece()
        if piece or tokens:
            self._add(job, TextPiece(slot.prompt, slot.number, piece, tokens))
        if text.finish is None:
            return
        self._add(job, TextEnd(slot.prompt, slot.number, text.finish, text.new_tokens, text.log_probability))
        job.remaining -= 1
        self.observer.text_ended(text.new_tokens)
        seconds = time.monotonic() - job.started
        self._seconds_per_text += (seconds - self._seconds_per_text) / 8
        if not job.remaining:
            self._end(job)

    def _add(self, job: Job, event: Event) -> None:
        if not job.events:
            self._with_events.append(job)
        job.events.append(event)

    def _send(self) -> None:
        """Send the events of a turn."""
        jobs, self._with_events = self._with_events, []
        _send(jobs)


def _send(jobs: Sequence[Job]) -> None:
    """Send the events of jobs: all those of a job at once, and in one call those that are for the same thread.

    Each call may wake a thread, which then holds the interpreter's lock while the next is made.
    """
    calls: dict[Post, list[Callable[[], None]]] = defaultdict(list)
    for job in jobs:
        events, job.events = job.events, []
        if events and not job.cancelled:
            calls[job.post].append(partial(job.sink, events))
    for post, deliveries in calls.items():
        post(partial(_call_all, deliveries))


def _call_all(functions: Sequence[Callable[[], None]]) -> None:
    for function in functions:
        function()
