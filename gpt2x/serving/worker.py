"""A model in a thread of its own: how it begins, takes requests, and ends."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod

from converters import CheckpointError

from .faults import ServingError
from .observer import Observer

log = logging.getLogger(__name__)

MAX_RETRY = 60  # seconds


class Worker(ABC):
    """Runs a model in a thread of its own, turn by turn. The thread starts with ``_start``.

    Args:
        name: of the thread.
        answer: what a request gets, for messages.
        max_queue: texts that wait, at most.
        observer: is told what happens.
    """

    def __init__(self, name: str, answer: str, max_queue: int, observer: Observer | None) -> None:
        self.max_queue = max_queue
        self.observer = observer or Observer()
        self._answer = answer
        self._draining = False
        self._stopped = False
        self._failed = False
        self._abort: ServingError | None = None
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    # What differs. In the thread, except that ``_has_work`` is called with the lock.

    @abstractmethod
    def _has_work(self) -> bool:
        """Whether a request is left."""

    @abstractmethod
    def _turn(self) -> None:
        """A part of the work."""

    @abstractmethod
    def _end_all(self, error: ServingError) -> None:
        """End every request with an error."""

    # ------------------------------------------------------------------------------------------- from other threads

    def _start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive() and not self._failed

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self.alive and not self._draining

    def drain(self) -> None:
        """Take no more requests. What was admitted goes on."""
        with self._wake:
            self._draining = True

    def abort(self, error: ServingError) -> None:
        """End every request with an error, before the next turn."""
        with self._wake:
            self._draining = True
            self._abort = error

    def close(self) -> None:
        """End every request and the thread."""
        with self._wake:
            self._stopped = True
            self._draining = True
            self._wake.notify()
        self._thread.join()

    def _check_ready(self) -> None:
        if self._draining:
            raise ServingError("shutting_down", "the server is shutting down: send the request to another server")
        if not self.alive:
            raise ServingError("model_failed", "the model has failed: restart the server")

    def _queue_full(self, waiting: int, texts: int, seconds: float) -> ServingError:
        """The refusal of a request of so many texts, which may be repeated after so many seconds."""
        return ServingError(
            "queue_full",
            f"{waiting} texts are waiting, and this request has {texts}: the limit is {self.max_queue}",
            retry_after=max(1, min(MAX_RETRY, round(seconds))),
        )

    # ------------------------------------------------------------------------------------------------- in its thread

    def _main(self) -> None:
        try:
            while self._wait():
                if self._abort:
                    self._end_all(self._abort)
                self._turn()
        except BaseException as error:
            log.exception("%s has failed", self._thread.name)
            # Nothing is admitted any more, so that no request is left without an answer.
            with self._wake:
                self._failed = True
            self._end_all(ServingError("model_failed", f"the model has failed: {type(error).__name__}"))
            raise
        self._end_all(ServingError("shutting_down", f"the server was shut down before the {self._answer} complete"))

    def _failure(self, what: str, error: Exception) -> ServingError:
        """Log why a part of the work failed. Returns what its requests are told."""
        if isinstance(error, MemoryError):
            log.error("out of memory: %s", what)
            return ServingError("out_of_memory", "the server ran out of memory: repeat the request later")
        if isinstance(error, CheckpointError):
            log.error("%s: %s", what, error)
            return ServingError("model_failed", "the model failed: the server's log has the reason")
        log.error("%s", what, exc_info=error)
        return ServingError("model_failed", "the server failed: its log has the reason")

    def _wait(self) -> bool:
        """Wait for work. Returns False at the end."""
        with self._wake:
            while not self._stopped and not self._has_work():
                self._wake.wait()
            return not self._stopped
