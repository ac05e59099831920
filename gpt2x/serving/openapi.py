"""The paths of the server, and their description in OpenAPI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic.json_schema import models_json_schema

from .._version import __version__
from .faults import FAULTS
from .protocol import ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, Strict, TokenizeRequest


@dataclass(frozen=True)
class Path:
    """A path of the server.

    Attributes:
        path: its name.
        method: of HTTP.
        summary: what it does.
        body: what its body holds, if it has one.
        kind: the media type of its answer.
        needs_key: whether it needs an API key, where the server has one.
    """

    path: str
    method: str
    summary: str
    body: type[Strict] | None = None
    kind: str = "application/json"
    needs_key: bool = False


PATHS = (
    Path("/v1/completions", "POST", "Continue prompts.", CompletionRequest, needs_key=True),
    Path("/v1/chat/completions", "POST", "Continue a conversation.", ChatRequest, needs_key=True),
    Path(
        "/v1/embeddings",
        "POST",
        "Embeddings of texts, from a model for feature extraction.",
        EmbeddingRequest,
        needs_key=True,
    ),
    Path("/v1/models", "GET", "The models.", needs_key=True),
    Path("/v1/models/{model}", "GET", "One model.", needs_key=True),
    Path("/tokenize", "POST", "The tokens of a text.", TokenizeRequest, needs_key=True),
    Path("/detokenize", "POST", "The text of tokens.", DetokenizeRequest, needs_key=True),
    Path("/health", "GET", "Whether the process works: 200, or 500 if it must be restarted."),
    Path("/ready", "GET", "Whether it takes requests: 200, or 503 while it drains."),
    Path("/metrics", "GET", "Metrics for Prometheus.", kind="text/plain"),
    Path("/openapi.json", "GET", "This description."),
    Path("/docs", "GET", "This description as a page.", kind="text/html"),
    Path("/", "GET", "A page to try the models.", kind="text/html"),
)


def openapi() -> dict[str, Any]:
    """The description in OpenAPI 3.1."""
    bodies = [path.body for path in PATHS if path.body]
    _, definitions = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {}
    for path in PATHS:
        paths.setdefault(path.path, {})[path.method.lower()] = _operation(path)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gpt2x serve",
            "version": __version__,
            "description": "GPT-2 over an OpenAI-compatible API. docs/serving.md has the limits and all errors.",
        },
        "paths": paths,
        "components": {
            "schemas": {**definitions["$defs"], "Error": _error()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(path: Path) -> dict[str, Any]:
    refusal = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    found: dict[str, Any] = {
        "summary": path.summary,
        "operationId": f"{path.method.lower()}{path.path.replace('/', '_')}".replace("{", "").replace("}", ""),
        "responses": {
            "200": {"description": "The answer.", "content": {path.kind: {}}},
            "default": {"description": "A refusal or a failure.", "content": refusal},
        },
    }
    if "{model}" in path.path:
        name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        found["parameters"] = [name]
    if path.body:
        schema = {"$ref": f"#/components/schemas/{path.body.__name__}"}
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if path.needs_key:
        found["security"] = [{"key": []}, {}]
    return found


def _error() -> dict[str, Any]:
    text = {"type": "string"}
    fields = {
        "message": text,
        "type": text,
        "param": {"type": ["string", "null"]},
        "code": {"type": "string", "enum": list(FAULTS)},
    }
    error = {"type": "object", "properties": fields, "required": list(fields)}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}
