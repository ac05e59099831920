"""The server without a socket: an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..generation.prompts import check_vocabulary
from ..runtimes.base import PromptError
from . import openapi
from .access import check_framing, check_host, check_key, read_body
from .answers import Answer, ChatAnswer, embeddings_json, sent_event
from .embedder import Vectors
from .faults import ServingError
from .metrics import Metrics
from .models import Models, ServedModel, TextModel
from .protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Strict,
    TokenizeRequest,
    parse,
)
from .requests import Event
from .running import Running, until_gone
from .settings import Settings
from .translate import Prepared, prepare_chat, prepare_completion, prepare_embeddings, tokens_of

log = logging.getLogger(__name__)

PAGE = files(__package__) / "page"
PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/docs.js": ("docs.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
SAFE = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
# After these, a part of the body may still be under way.
CLOSING = {
    "invalid_http", "request_too_large", "request_timeout", "unsupported_media_type", "invalid_api_key", "host_not_allowed",
}  # fmt: skip
Handler = Callable[[Request], Awaitable[Response]]


class Server:
    """The handlers of all paths.

    Args:
        models: what is served.
        settings: the limits.
        metrics: where what happens is counted.
    """

    def __init__(self, models: Models, settings: Settings, metrics: Metrics) -> None:
        self.models = models
        self.settings = settings
        self.metrics = metrics

    def app(self) -> ASGIApp:
        """The ASGI application."""
        handlers: dict[str, Handler] = {
            "/v1/completions": self.completions,
            "/v1/chat/completions": self.chat,
            "/v1/embeddings": self.embeddings,
            "/v1/models": self.list_models,
            "/v1/models/{model}": self.show_model,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
            "/health": self.health,
            "/ready": self.ready,
            "/metrics": self.show_metrics,
            "/openapi.json": self.describe,
            **dict.fromkeys(PAGES, self.page),
        }
        known = {path.path: path for path in openapi.PATHS}
        routes = []
        for path, handler in handlers.items():
            described = known.get(path)
            guarded = self._guarded(handler, described.needs_key if described else False)
            # A model's name may have slashes, as those of the Hub do.
            pattern = path.replace("{model}", "{model:path}")
            routes.append(Route(pattern, guarded, methods=[described.method if described else "GET"]))
        app = Starlette(
            routes=routes,
            exception_handlers={
                ServingError: self._refuse,
                HTTPException: self._refuse_http,
                Exception: self._fail,
            },
        )
        # A path with a slash too many is an error in OpenAI's form, like any other unknown path.
        app.router.redirect_slashes = False
        return self._counted(app, set(handlers))

    # ------------------------------------------------------------------------------------------------ around handlers

    def _guarded(self, handler: Handler, needs_key: bool) -> Handler:
        async def guarded(request: Request) -> Response:
            check_framing(request)
            check_host(request, self.settings.allowed_hosts)
            if needs_key:
                check_key(request, self.settings.keys)
            return await handler(request)

        return guarded

    def _counted(self, app: ASGIApp, paths: set[str]) -> ASGIApp:
        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            path = scope.get("path", "")
            label = path if path in paths else "other"

            async def counting(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self.metrics.requests.labels(label, str(message["status"])).inc()
                await send(message)

            await app(scope, receive, counting)

        return counted

    async def _refuse(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, ServingError)
        self.metrics.errors.labels(error.code).inc()
        headers = {}
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
        if error.code == "invalid_api_key":
            headers["WWW-Authenticate"] = "Bearer"
        if error.code in CLOSING:
            headers["Connection"] = "close"
        return JSONResponse(error_json(error), error.fault.status, headers)

    async def _refuse_http(self, request: Request, error: Exception) -> Response:
        """What Starlette refuses: unknown paths and methods."""
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            code, message = "method_not_allowed", f"{request.url.path[:100]} does not take {request.method[:20]}"
        else:
            code, message = "not_found", f"there is no path {request.url.path[:100]}: /openapi.json lists all"
        response = await self._refuse(request, ServingError(code, message))
        response.headers.update(error.headers or {})
        return response

    async def _fail(self, request: Request, error: Exception) -> Response:
        log.error("%s: %s: %s", request.url.path, type(error).__name__, error)
        return await self._refuse(request, ServingError("model_failed", "the server failed: its log has the reason"))

    async def _parse(self, request: Request, kind: type[Strict]) -> Any:
        body = await read_body(request, self.settings)
        return await run_in_threadpool(parse, kind, body)

    # --------------------------------------------------------------------------------------------------- generation

    async def completions(self, request: Request) -> Response:
        """``/v1/completions``."""
        body = await self._parse(request, CompletionRequest)
        prepared = await run_in_threadpool(prepare_completion, body, self.models.text_model(body.model))
        return await self._generate(request, prepared, Answer(prepared))

    async def chat(self, request: Request) -> Response:
        """``/v1/chat/completions``."""
        body = await self._parse(request, ChatRequest)
        prepared = await run_in_threadpool(prepare_chat, body, self.models.text_model(body.model))
        return await self._generate(request, prepared, ChatAnswer(prepared))

    async def _generate(self, request: Request, prepared: Prepared, answer: Answer) -> Response:
        running = Running(prepared.model.engine, prepared.requests, self.settings.generation_timeout)
        try:
            if not prepared.stream:
                done = await _unless_gone(request, _add_all(answer, running))
                if done is None:
                    running.cancel()
                    return Response(status_code=400)  # nobody reads it
                return JSONResponse(answer.whole())
            # Until the first event, a failure has its own status code.
            first = await _unless_gone(request, running.next())
            if first is None:
                running.cancel()
                return Response(status_code=400)
            return Stream(self, running, first, answer)
        except BaseException:
            running.cancel()
            raise

    async def embeddings(self, request: Request) -> Response:
        """``/v1/embeddings``."""
        body = await self._parse(request, EmbeddingRequest)
        model = self.models.embedding_model(body.model)
        inputs = await run_in_threadpool(prepare_embeddings, body, model)
        deadline = time.monotonic() + self.settings.generation_timeout
        result = model.embedder.submit(inputs, body.pooling or "mean", deadline)
        vectors = await _unless_gone(request, asyncio.wrap_future(result))
        if vectors is None:
            return Response(status_code=400)  # nobody reads it
        return await run_in_threadpool(_embeddings_response, body, model.name, vectors, sum(map(len, inputs)))

    # ------------------------------------------------------------------------------------------------------- the rest

    async def list_models(self, _: Request) -> Response:
        """``/v1/models``."""
        return JSONResponse({"object": "list", "data": [_model_json(model) for model in self.models]})

    async def show_model(self, request: Request) -> Response:
        """``/v1/models/NAME``."""
        return JSONResponse(_model_json(self.models.find(request.path_params["model"])))

    async def tokenize(self, request: Request) -> Response:
        """``/tokenize``."""
        body = await self._parse(request, TokenizeRequest)
        model = self.models.find(body.model)
        tokens = await run_in_threadpool(tokens_of, model, body.prompt)
        return JSONResponse({"count": len(tokens), "max_model_len": model.context, "tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        """``/detokenize``."""
        body = await self._parse(request, DetokenizeRequest)
        model = self.models.find(body.model)
        try:
            check_vocabulary(model, body.tokens)
        except PromptError as error:
            raise ServingError("invalid_value", str(error), "tokens") from None
        text = await run_in_threadpool(model.tokenizer.decode, body.tokens)
        return JSONResponse({"prompt": text})

    async def health(self, _: Request) -> Response:
        """``/health``."""
        if not self.models.alive:
            raise ServingError("model_failed", "a model has failed: restart the server")
        return JSONResponse({"status": "alive"})

    async def ready(self, _: Request) -> Response:
        """``/ready``."""
        if not self.models.ready:
            raise ServingError("shutting_down", "the server takes no requests")
        return JSONResponse({"status": "ready"})

    async def show_metrics(self, _: Request) -> Response:
        """``/metrics``."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def describe(self, _: Request) -> Response:
        """``/openapi.json``."""
        return JSONResponse(openapi.openapi())

    async def page(self, request: Request) -> Response:
        """The web pages."""
        name, kind = PAGES[request.url.path]
        return Response((PAGE / name).read_bytes(), media_type=kind, headers=SAFE)


class Stream(Response):
    """Texts as server-sent events. A client that goes away ends them.

    Args:
        server: counts errors.
        running: the requests.
        first: their first events.
        answer: makes pieces of events.
    """

    def __init__(self, server: Server, running: Running, first: list[Event], answer: Answer) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._server = server
        self._running = running
        self._first = first
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._running.cancel()
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        events = self._first
        try:
            while not self._running.done:
                data = b"".join(map(self._answer.stream, events))
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                events = await self._running.next()
            end = b"".join(map(self._answer.stream, events)) + self._answer.stream_end()
        except ServingError as error:
            self._server.metrics.errors.labels(error.code).inc()
            end = sent_event(error_json(error))
        await send({"type": "http.response.body", "body": end, "more_body": False})


def error_json(error: ServingError) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {
        "error": {
            "message": error.message,
            "type": error.fault.type,
            "param": error.param,
            "code": error.code,
        }
    }


async def _unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of some work; None if the client goes away before."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_gone(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, gone):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone


async def _add_all(answer: Answer, running: Running) -> bool:
    """Take all events. Returns True."""
    while not running.done:
        for event in await running.next():
            answer.add(event)
    return True


def _embeddings_response(body: EmbeddingRequest, model: str, vectors: Vectors, tokens: int) -> Response:
    return JSONResponse(embeddings_json(model, vectors, tokens, body.encoding_format == "base64"))


def _model_json(model: ServedModel) -> dict[str, Any]:
    found = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "gpt2x",
        "max_model_len": model.context,
        "precision": model.precision,
        "task": model.task,
    }
    if isinstance(model, TextModel):
        found["adapter"] = model.engine.decoder.adapter
        found["chat"] = model.chat is not None
    return found
