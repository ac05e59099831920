"""A job of an engine, seen from asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.types import Receive

from .engine import Engine
from .requests import Event, Failed, TextEnd, TextRequest


@dataclass(frozen=True)
class _InLoop:
    """Runs functions in an event loop. Those of one loop are equal, so that an engine wakes it once a turn."""

    loop: asyncio.AbstractEventLoop

    def __call__(self, function: Callable[[], None]) -> None:
        # The loop is closed if the server ends before its engine.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function)


class Running:
    """Requests that an engine works on. Make it in the event loop.

    Args:
        engine: runs them.
        requests: one for each prompt.
        seconds: after which they fail.

    Raises:
        ServingError: if the queue is full, or the engine takes no more requests.
    """

    def __init__(self, engine: Engine, requests: Sequence[TextRequest], seconds: float) -> None:
        self._engine = engine
        self._left = sum(request.texts for request in requests)
        self._events: list[Event] = []  # that were not returned yet
        self._news = asyncio.Event()
        post = _InLoop(asyncio.get_running_loop())
        self._job = engine.submit(requests, self._take, time.monotonic() + seconds, post)

    @property
    def done(self) -> bool:
        """Whether all texts are complete, or the requests failed."""
        return not self._left

    def _take(self, events: list[Event]) -> None:
        self._events += events
        self._news.set()

    async def next(self) -> list[Event]:
        """The events since the last call, one or more. Call it until ``done``.

        Raises:
            ServingError: if the requests failed, after all events before that were returned.
        """
        await self._news.wait()
        first = self._events[0]
        if isinstance(first, Failed):
            self._left = 0
            raise first.error
        failed = isinstance(self._events[-1], Failed)
        count = len(self._events) - failed
        events, self._events = self._events[:count], self._events[count:]
        if not failed:
            self._news.clear()
        self._left -= sum(isinstance(event, TextEnd) for event in events)
        return events

    def cancel(self) -> None:
        """Give them up, if they are not complete."""
        if self._left:
            self._engine.cancel(self._job)


async def until_gone(receive: Receive) -> None:
    """Return when the client has gone away. The body must have been read."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
