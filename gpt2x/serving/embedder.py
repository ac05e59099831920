"""A model for embeddings in a thread of its own. Requests take turns between its runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from converters import CheckpointError

from ..runtimes.onnx_task import OnnxTask
from ..runtimes.task_model import pad_rows
from .faults import ServingError
from .observer import Observer
from .worker import Worker

Vectors = NDArray[np.float32]
Pooling = Literal["mean", "last"]
OUTPUTS: dict[Pooling, str] = {"mean": "mean_embedding", "last": "last_token_embedding"}
MAX_RUN_TOKENS = 2048  # with padding: a run has a score for each pair of tokens of a text, and keeps every hidden state


@dataclass(eq=False)
class _Job:
    """The texts of a request.

    Attributes:
        texts: token ids.
        pooling: which embedding is returned.
        deadline: of ``time.monotonic``, after which it fails.
        result: takes the vectors, or the error.
        vectors: (n, C), complete where a text is not in ``left``.
        left: the numbers of the texts that were not run, the longest first.
    """

    texts: Sequence[Sequence[int]]
    pooling: Pooling
    deadline: float
    result: Future[Vectors]
    vectors: Vectors
    left: list[int]


class Embedder(Worker):
    """Embeds texts with one model, in a thread of its own.

    Each run has texts of one request, so a failure is its own. After each, the next request has its turn: a short request
    waits for one run of each of the others.

    Args:
        model: an export for feature extraction.
        max_batch_size: texts of a run.
        max_queue: texts that wait, at most. A request of more is taken if none waits.
        observer: is told what happens.
    """

    def __init__(self, model: OnnxTask, max_batch_size: int, max_queue: int, observer: Observer | None = None) -> None:
        super().__init__("gpt2x-embedder", "embeddings were", max_queue, observer)
        self.model = model
        self.max_batch_size = max_batch_size
        self._jobs: deque[_Job] = deque()  # the first has its turn
        self._seconds_per_text = 0.1  # on average
        self._start()

    # ------------------------------------------------------------------------------------------- from other threads

    @property
    def idle(self) -> bool:
        """Whether no request is left."""
        return not self._jobs

    def submit(self, texts: Sequence[Sequence[int]], pooling: Pooling, deadline: float) -> Future[Vectors]:
        """Queue texts, all or none of them.

        Args:
            texts: token ids that the model takes.
            deadline: of ``time.monotonic``, after which they fail.

        Returns:
            Their embeddings, (n, C). Cancel it to give them up.

        Raises:
            ServingError: if the queue is full, or no more requests are taken.
        """
        longest_first = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors = np.empty((len(texts), self.model.config.n_embd), np.float32)
        job = _Job(texts, pooling, deadline, Future(), vectors, longest_first)
        with self._wake:
            self._check_admission(len(texts))
            self._jobs.append(job)
            self._wake.notify()
        return job.result

    def _check_admission(self, texts: int) -> None:
        self._check_ready()
        waiting = self._waiting()
        if waiting and waiting + texts > self.max_queue:
            raise self._queue_full(waiting, texts, waiting * self._seconds_per_text)

    def _waiting(self) -> int:
        with self._wake:
            return sum(len(job.left) for job in self._jobs)

    # ------------------------------------------------------------------------------------------------- in its thread

    def _has_work(self) -> bool:
        return bool(self._jobs)

    def _turn(self) -> None:
        """One run, for the request whose turn it is."""
        self._remove_ended()
        if not self._jobs:
            return
        job = self._jobs[0]
        try:
            self._run(job)
        except Exception as error:
            # A run changes nothing that others have: whatever its fault is, they go on.
            self._fail(job, self._failure("a run failed", error))
        else:
            self._pass_turn(job)
        self.observer.state(self._waiting(), 0, 0, 0)

    def _remove_ended(self) -> None:
        """Remove requests that are too late or not wanted any more."""
        now = time.monotonic()
        for job in self._all():
            if job.result.cancelled():
                self._forget(job)
            elif now > job.deadline:
                self._fail(job, ServingError("generation_timeout", "the embeddings were not complete in time"))

    def _run(self, job: _Job) -> None:
        """Run the longest texts that are left."""
        started = time.monotonic()
        width = len(job.texts[job.left[0]])
        rows = max(1, min(self.max_batch_size, MAX_RUN_TOKENS // width))
        batch = job.left[:rows]
        with self._wake:
            del job.left[:rows]
        self.observer.state(self._waiting(), len(batch), 0, 0)
        ids, mask = pad_rows([job.texts[i] for i in batch])
        vectors = self.model.run(ids, mask)[OUTPUTS[job.pooling]]
        if not np.isfinite(vectors).all():
            raise CheckpointError(f"{self.model.path}: an embedding contains NaN or infinity")
        job.vectors[batch] = vectors
        self.observer.prompt_read(int(mask.sum()), 0)
        for _ in batch:
            self.observer.text_ended(0)
        self._seconds_per_text += ((time.monotonic() - started) / len(batch) - self._seconds_per_text) / 8

    def _pass_turn(self, job: _Job) -> None:
        """Complete a request, or let the others have their turn before it goes on."""
        if not job.left and self._forget(job):
            job.result.set_result(job.vectors)
        elif job.left:
            with self._wake:
                self._jobs.rotate(-1)

    def _forget(self, job: _Job) -> bool:
        """Remove a request. Returns whether its client still waits for it."""
        with self._wake:
            self._jobs.remove(job)
        waits = job.result.set_running_or_notify_cancel()
        if not waits:
            self.observer.cancelled()
        return waits

    def _fail(self, job: _Job, error: ServingError) -> None:
        if self._forget(job):
            self.observer.failed(error.code)
            job.result.set_exception(error)

    def _end_all(self, error: ServingError) -> None:
        for job in self._all():
            self._fail(job, error)

    def _all(self) -> list[_Job]:
        with self._wake:
            return list(self._jobs)
