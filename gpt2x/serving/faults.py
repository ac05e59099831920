"""Everything that the server refuses or fails at, each with its status code. ``docs/serving.md`` has this table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A kind of failure.

    Attributes:
        status: of HTTP.
        type: OpenAI's ``error.type``.
        when: what causes it, for the documentation.
        remedy: what to do, for the documentation.
    """

    status: int
    type: str
    when: str
    remedy: str


INVALID = "invalid_request_error"
OVERLOADED = "overloaded_error"
SERVER = "server_error"

# ``error.code`` -> the fault.
FAULTS = {
    "invalid_http": Fault(
        400, INVALID, "The request is not valid HTTP, states the end of its body twice, or has headers above 32 kB.",
        "Correct the client.",
    ),
    "invalid_json": Fault(400, INVALID, "The body is not valid JSON.", "Correct the body."),
    "invalid_value": Fault(
        400, INVALID, "A field is missing, unknown, of the wrong type, or out of range.", "The message names the field."
    ),
    "unsupported_value": Fault(
        400, INVALID, "The field or the combination exists in OpenAI's API, but this server or model does not support it.", "Leave it out."
    ),
    "context_length_exceeded": Fault(
        400, INVALID, "The prompt and `max_tokens` together, or an input, exceed the context.", "Shorten one of them."
    ),
    "no_token_left": Fault(400, INVALID, "The controls rule out every token.", "Remove a control."),
    "no_chat_template": Fault(
        400, INVALID, "The tokenizer of the model has no chat template.", "Use `/v1/completions`."
    ),
    "invalid_chat_template": Fault(
        400, INVALID, "The chat template refuses the messages, or fails.", "Change the messages, or the template."
    ),
    "invalid_api_key": Fault(
        401, "authentication_error", "The request has no API key, or one that is not in the file.", "Send `Authorization: Bearer KEY`."
    ),
    "host_not_allowed": Fault(
        403, INVALID, "The server is local and has no API key, and the `Host` header names another host.",
        "Start the server with `--allowed-host NAME`, or with `--api-key`.",
    ),
    "model_not_found": Fault(404, INVALID, "There is no such model.", "`/v1/models` lists the models."),
    "not_exported": Fault(
        404, INVALID, "The model was exported for another task.", "Name another model, or export one for the task: `gpt2x export --task TASK`."
    ),
    "not_found": Fault(404, INVALID, "There is no such path.", "`/openapi.json` lists the paths."),
    "method_not_allowed": Fault(405, INVALID, "The path does not support the method.", "`/openapi.json` lists the methods."),
    "request_timeout": Fault(408, INVALID, "The headers or the body did not arrive in time.", "Send the request again, without pauses."),
    "request_too_large": Fault(413, INVALID, "The body exceeds the limit.", "Split the request, or raise `--max-body`."),
    "unsupported_media_type": Fault(
        415, INVALID, "The body is not `application/json`, or it is compressed.", "Send `Content-Type: application/json`, uncompressed."
    ),
    "queue_full": Fault(
        429, OVERLOADED, "Too many texts are waiting.", "Repeat it after the seconds in `Retry-After`, or raise `--max-queue`."
    ),
    "model_failed": Fault(
        500, SERVER, "The model failed, or its logits contain NaN.", "Read the server's log, and check the model with `gpt2x verify`."
    ),
    "out_of_memory": Fault(503, OVERLOADED, "Memory ran out in a step.", "Lower `--max-batch-size` or `--cache-memory`."),
    "too_many_connections": Fault(
        503, OVERLOADED, "The limit of open connections is reached.", "Repeat it later, or raise `--max-connections`."
    ),
    "shutting_down": Fault(
        503, OVERLOADED, "The server is draining after SIGTERM, or its limit for draining has passed.",
        "Send it to another server.",
    ),
    "generation_timeout": Fault(
        504, SERVER, "The answer was not complete in time.", "Lower `max_tokens`, or raise `--generation-timeout`."
    ),
}  # fmt: skip


class ServingError(Exception):
    """A request that is refused, or that failed.

    Args:
        code: a key of ``FAULTS``.
        message: what is wrong, and what to do.
        param: the field of the request.
        retry_after: seconds after which to repeat the request.
    """

    def __init__(self, code: str, message: str, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.fault = FAULTS[code]
        self.message = message
        self.param = param
        self.retry_after = retry_after
