"""The socket side: uvicorn, with limits of time and number for connections, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import Server, error_json
from .faults import ServingError
from .settings import KEEP_ALIVE, MAX_HEADERS, SPARE_DESCRIPTORS, Settings

log = logging.getLogger(__name__)

BACKLOG = 2048
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP protocol with limits.

    uvicorn itself waits for headers without a limit, and accepts connections until there are no descriptors.
    """

    guarded: ClassVar[Server]
    most: ClassVar[int]  # connections
    _headers_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    @property
    def _settings(self) -> Settings:
        return self.guarded.settings

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.guarded.metrics.connections.set(len(self.connections))
        if len(self.connections) > self.most:
            self._refuse("too_many_connections", f"{self.most} connections are open: repeat the request later")
            return
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.guarded.metrics.connections.set(len(self.connections))
        for timer in (self._headers_timer, self._write_timer):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch_headers()

    def _watch_headers(self) -> None:
        """Limit the time until the headers of the next request are complete."""
        waiting = self.conn.their_state is h11.IDLE
        fresh = self.cycle is None  # no request yet; later ones wait for as long as an idle connection may
        begun = bool(self.conn.trailing_data[0])
        if waiting and (fresh or begun):
            if self._headers_timer is None:
                self._headers_timer = self.loop.call_later(self._settings.header_timeout, self._too_slow)
        elif self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _too_slow(self) -> None:
        seconds = self._settings.header_timeout
        self._refuse("request_timeout", f"the headers did not arrive within {seconds:g} seconds")

    def send_400_response(self, msg: str) -> None:
        self._refuse("invalid_http", "the request is not valid HTTP, or its headers exceed the limit")

    def _refuse(self, code: str, message: str) -> None:
        if self.transport.is_closing():
            return
        error = ServingError(code, message)
        self.guarded.metrics.errors.labels(code).inc()
        self.transport.write(raw_response(error))
        self.transport.close()

    def pause_writing(self) -> None:
        """The client does not read: limit the time until it does."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._settings.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def guarded_protocol(server: Server) -> type[GuardedProtocol]:
    """The protocol with the limits of a server. uvicorn makes an object of it for each connection."""

    class Guarded(GuardedProtocol):
        guarded = server
        most = most_connections(server.settings.max_connections)

    return Guarded


def raw_response(error: ServingError) -> bytes:
    """A whole HTTP response for an error, after which the connection is closed."""
    body = json.dumps(error_json(error)).encode()
    head = (
        f"HTTP/1.1 {error.fault.status} {error.code}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n"
    )
    if error.fault.status == 503:
        head += "retry-after: 1\r\n"
    return head.encode() + b"\r\n" + body


def most_connections(wanted: int) -> int:
    """As many connections as the limit of descriptors allows, after it was raised as far as possible."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + SPARE_DESCRIPTORS
    limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        soft = limit
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, soft - SPARE_DESCRIPTORS))


class DrainingServer(uvicorn.Server):
    """uvicorn, which ends in order: at SIGTERM it takes no more requests, and ends when those that it has are complete.

    A second signal, or the end of the time for draining, ends those as well.
    """

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # uvicorn's own raises the signal again at the end, so that a clean end would look like a kill.
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        first = not self.should_exit
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_drain if first else self._end_drain)

    def _begin_drain(self) -> None:
        for model in self._server.models:
            model.worker.drain()
        assert self._loop
        self._loop.call_later(self._server.settings.drain_timeout, self._end_drain)
        log.info("draining for at most %g seconds", self._server.settings.drain_timeout)

    def _end_drain(self) -> None:
        error = ServingError("shutting_down", "the server ended before the answer was complete")
        for model in self._server.models:
            model.worker.abort(error)


def uvicorn_of(server: Server) -> DrainingServer:
    """uvicorn with the limits of a server."""
    settings = server.settings
    config = uvicorn.Config(
        server.app(),
        http=guarded_protocol(server),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADERS,
        timeout_keep_alive=KEEP_ALIVE,
        # The engines end what is late themselves; this is for clients that do not read it.
        timeout_graceful_shutdown=int(settings.drain_timeout) + 5,
        backlog=BACKLOG,
    )
    return DrainingServer(config, server)


def serve(server: Server, listener: socket.socket, announce: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, and then until the requests are complete. Closes the models.

    Args:
        server: the handlers.
        listener: a socket that listens.
        announce: is called when connections are accepted.
    """
    running = uvicorn_of(server)
    announce()
    try:
        running.run(sockets=[listener])
    finally:
        server.models.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        OSError: if the address is in use or unknown.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(BACKLOG)
    except BaseException:
        made.close()
        raise
    return made


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches a socket."""
    address = str(listener.getsockname()[0])
    return address == "::1" or address.startswith("127.")


def address_of(listener: socket.socket) -> str:
    """The URL of a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
