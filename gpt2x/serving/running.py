"""A job of an engine, seen from asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence

from starlette.types import Receive

from .engine import Engine
from .requests import Event, Failed, TextEnd, TextRequest


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
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[list[Event]] = asyncio.Queue()
        self._job = engine.submit(requests, self._take, time.monotonic() + seconds)

    def _take(self, events: list[Event]) -> None:
        # The loop is closed if the server ends before its engine.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, events)

    async def events(self) -> AsyncIterator[Event]:
        """The events until all texts are complete.

        Raises:
            ServingError: if the requests failed.
        """
        while self._left:
            for event in await self._events.get():
                if isinstance(event, Failed):
                    self._left = 0
                    raise event.error
                self._left -= isinstance(event, TextEnd)
                yield event

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
