"""gpt2x serve's application on Ray Serve: replicas, autoscaling, streaming, and retries.

    pip install 'gpt2x[serve]' 'ray[serve]'
    ray start --head --resources '{"gateway": 1}'
    serve run app:build model=gpt2-onnx/ --app-dir examples/ray_serve

A ``Gateway`` on the head node takes the requests, and sends each to a replica of ``Model``. If the replica or its node dies,
an answer of which nothing was sent yet is asked of another replica. A stream of which a part was sent ends with an error.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, MutableMapping
from contextlib import aclosing
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from gpt2x.serving.app import Server
from gpt2x.serving.metrics import Metrics
from gpt2x.serving.opening import EngineOptions, open_models, wanted_models
from gpt2x.serving.settings import Settings

log = logging.getLogger("ray.serve")

ATTEMPTS = 5
MAX_BODY = 1 << 20
LOST = "the replica that wrote this text was lost"
UNAVAILABLE = f"no replica completed the request in {ATTEMPTS} attempts"
DIED = (RayActorError, RayServeException)
HOP_BY_HOP = {"connection", "content-length", "transfer-encoding", "date", "server"}

Message = MutableMapping[str, Any]  # of ASGI


@serve.deployment(
    name="model",
    max_ongoing_requests=64,
    health_check_period_s=5,
    graceful_shutdown_timeout_s=70,
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 16},
)
class Model:
    """A replica: the ASGI application of ``gpt2x serve``, with an engine and a cache of its own.

    Args:
        model: a directory that ``gpt2x export --onnx --cache inplace`` wrote.
        name: what clients call it.
        options: ``EngineOptions``.
    """

    def __init__(self, model: str, name: str, options: dict[str, Any]) -> None:
        metrics = Metrics()
        self.models = open_models(wanted_models([model], [], name), EngineOptions(**options), metrics)
        self.app = Server(self.models, Settings(max_body=MAX_BODY), metrics).app()

    def check_health(self) -> None:
        """Ray replaces a replica that raises."""
        if not self.models.alive:
            raise RuntimeError("the model has failed")

    def __del__(self) -> None:
        self.models.close()

    async def answer(self, scope: Message, body: bytes) -> AsyncIterator[Message]:
        """Run one request. Yields the messages that the application sends."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if left:
                return left.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.create_task(self._run(scope, receive, sent))
        try:
            while (message := await sent.get()) is not None:
                yield message
            await task
        finally:
            gone.set()  # the application gives up what the client no longer reads

    async def _run(self, scope: Message, receive: Any, sent: asyncio.Queue[Message | None]) -> None:
        try:
            await self.app(scope, receive, sent.put)
        finally:
            await sent.put(None)


@serve.deployment(
    name="gateway",
    max_ongoing_requests=1000,
    # The head node alone has this resource, so the loss of another node loses no request.
    ray_actor_options={"num_cpus": 0, "resources": {"gateway": 0.1}},
)
class Gateway:
    """Takes requests, and sends each to a replica of the model."""

    def __init__(self, model: DeploymentHandle) -> None:
        self.model = model.options(stream=True, method_name="answer")

    async def __call__(self, request: Request) -> Response:
        body = await _body_of(request)
        if body is None:
            return _error(413, "request_too_large", f"the body exceeds {MAX_BODY} bytes")
        scope = _scope_of(request)
        for attempt in range(ATTEMPTS):
            try:
                return await self._attempt(scope, body)
            except DIED as error:
                log.warning("attempt %d: %s: trying another replica", attempt + 1, type(error).__name__)
                await asyncio.sleep(0.1 * 2**attempt)
        return _error(503, "replica_lost", UNAVAILABLE)

    async def _attempt(self, scope: Message, body: bytes) -> Response:
        """Ask a replica.

        Raises:
            RayActorError: if it died before a part of its answer was passed on.
        """
        messages = self.model.remote(scope, body)
        start = await anext(messages)
        headers = _headers_of(start)
        first = await anext(messages)
        if headers.get("content-type", "").startswith("text/event-stream"):
            return StreamingResponse(_stream(first, messages), start["status"], headers)
        parts = [first["body"]]
        async for message in messages:
            parts.append(message.get("body", b""))
        return Response(b"".join(parts), start["status"], headers)


async def _stream(first: Message, messages: Any) -> AsyncIterator[bytes]:
    """The parts of a stream. If its replica dies, the last is an error in place of ``[DONE]``."""
    yield first["body"]
    try:
        async for message in messages:
            yield message.get("body", b"")
    except DIED:
        yield b"data: " + json.dumps(_error_json("replica_lost", LOST)).encode() + b"\n\n"


async def _body_of(request: Request) -> bytes | None:
    """The body; None if it is too large."""
    parts, size = [], 0
    async with aclosing(request.stream()) as stream:
        async for part in stream:
            parts.append(part)
            size += len(part)
            if size > MAX_BODY:
                return None
    return b"".join(parts)


def _scope_of(request: Request) -> Message:
    """What the application needs of a request. Other parts of its scope cannot be sent to another process."""
    names = (
        "type",
        "http_version",
        "method",
        "path",
        "raw_path",
        "query_string",
        "headers",
        "scheme",
        "client",
        "server",
    )
    scope = {name: request.scope[name] for name in names if name in request.scope}
    return {**scope, "root_path": "", "asgi": {"version": "3.0"}}


def _headers_of(start: Message) -> dict[str, str]:
    headers = {name.decode().lower(): value.decode() for name, value in start.get("headers", [])}
    return {name: value for name, value in headers.items() if name not in HOP_BY_HOP}


def _error(status: int, code: str, message: str) -> Response:
    return JSONResponse(_error_json(code, message), status)


def _error_json(code: str, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


def build(args: dict[str, str]) -> serve.Application:
    """The application, for ``serve run app:build model=DIR name=gpt2 threads=2 replicas=2``.

    Without ``replicas``, Ray chooses their number by the load.
    """
    options = {"threads": int(args.get("threads", "1")), "cache_memory": int(args.get("cache_memory", str(1 << 30)))}
    model: Any = Model  # what the decorator makes of it is Ray's
    gateway: Any = Gateway
    model = model.options(ray_actor_options={"num_cpus": options["threads"]})
    if "replicas" in args:
        model = model.options(num_replicas=int(args["replicas"]), autoscaling_config=None)
    if "replicas_per_node" in args:
        model = model.options(max_replicas_per_node=int(args["replicas_per_node"]))
    application: serve.Application = gateway.bind(model.bind(args["model"], args.get("name", "gpt2"), options))
    return application
