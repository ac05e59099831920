"""The requests of OpenAI's API. Their JSON comes from strangers: pydantic checks types and ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .faults import ServingError
from .settings import (
    MAX_BIASES,
    MAX_INPUTS,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_STOP_LENGTH,
    MAX_STOP_TOKENS,
    MAX_STOPS,
    MAX_TEXTS,
    MAX_USER,
)

MAX_INT = (1 << 63) - 1
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Name = Annotated[str, Field(max_length=256)]
# What OpenAI has and this server does not: accepted where it is null, as some clients send every field.
NOT_SUPPORTED = "Not supported: must be null."
Unsupported = Annotated[Any, Field(default=None, description=NOT_SUPPORTED)]


class Strict(BaseModel):
    """No field is converted from another type, and none is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Strict):
    """What a stream holds."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Controls(Strict):
    """The fields that completions and chat have in common."""

    model: Name | None = Field(None, description="One of /v1/models; the first by default.")
    temperature: float | None = Field(None, ge=0, le=100, description="0 for greedy decoding. Default 1.")
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_TEXTS, description="Texts for each prompt. Default 1.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: float | None = Field(None, ge=-100, le=100)
    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] | None = Field(
        None, description="Token id -> what is added to its logit."
    )
    seed: int | None = Field(None, ge=-MAX_INT - 1, le=MAX_INT, description="Makes the text reproducible.")
    user: str | None = Field(None, max_length=MAX_USER, description="Not used.")
    top_k: int | None = Field(None, ge=0, le=MAX_INT, description="Extension. 0 to disable.")
    min_p: float | None = Field(None, ge=0, le=1, description="Extension.")
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="Extension. 1 to disable.")
    min_tokens: int | None = Field(None, ge=0, le=MAX_INT, description="Extension. The text does not end before.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = Field(
        None, description="Extension. Further tokens that end a text."
    )


class CompletionRequest(Controls):
    """The body of ``/v1/completions``."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[list[TokenId]], Field(min_length=1, max_length=MAX_TEXTS)]
    ) = Field(description="Text, token ids, or a list of either.")
    max_tokens: int | None = Field(None, ge=0, le=MAX_INT, description="New tokens of a text. Default 16.")
    best_of: int | None = Field(None, ge=1, le=MAX_TEXTS, description="Texts of which the n likeliest are returned.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Alternatives for each token.")
    echo: bool | None = Field(None, description="Return the prompt, too.")
    suffix: Unsupported


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)]
    name: Name | None = None
    # Clients send back the message of an answer, with these.
    refusal: None = Field(None, description=NOT_SUPPORTED)
    annotations: None = Field(None, description=NOT_SUPPORTED)
    audio: None = Field(None, description=NOT_SUPPORTED)
    function_call: None = Field(None, description=NOT_SUPPORTED)
    tool_calls: None = Field(None, description=NOT_SUPPORTED)


class ChatRequest(Controls):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT, description="Default: what the context holds.")
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: Unsupported
    tools: Unsupported
    tool_choice: Unsupported
    parallel_tool_calls: Unsupported
    functions: Unsupported
    function_call: Unsupported
    audio: Unsupported
    modalities: Unsupported


class EmbeddingRequest(Strict):
    """The body of ``/v1/embeddings``."""

    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[list[TokenId]], Field(min_length=1, max_length=MAX_INPUTS)]
    ) = Field(description="Text, token ids, or a list of either.")
    model: Name | None = Field(None, description="One of /v1/models; the first for embeddings by default.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64 is of float32, little-endian. Default float."
    )
    pooling: Literal["mean", "last"] | None = Field(
        None, description="Extension. The mean over the tokens (default), or the last token's."
    )
    dimensions: Unsupported
    user: str | None = Field(None, max_length=MAX_USER, description="Not used.")


class TokenizeRequest(Strict):
    """The body of ``/tokenize``."""

    prompt: str
    model: Name | None = None


class DetokenizeRequest(Strict):
    """The body of ``/detokenize``."""

    tokens: list[TokenId]
    model: Name | None = None


# What fields of several types must be.
NEEDED = {
    "input": f"text, token ids, or a list of up to {MAX_INPUTS} of either",
    "stop": f"a string of 1 to {MAX_STOP_LENGTH} characters, or a list of up to {MAX_STOPS} of them",
    "content": "text, or a list of parts of type text",
}
NEEDED_FOR_COMPLETION = {**NEEDED, "prompt": "text, a list of texts, token ids, or a list of lists of token ids"}

Kind = TypeVar("Kind", bound=Strict)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """A request from its JSON.

    Raises:
        ServingError: if it is not valid, with the first field that is wrong.
    """
    try:
        found = kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error, NEEDED_FOR_COMPLETION if kind is CompletionRequest else NEEDED) from None
    for name in found.model_fields_set:
        if kind.model_fields[name].description == NOT_SUPPORTED and getattr(found, name) is not None:
            raise ServingError("unsupported_value", f"{name} is not supported: leave it out", name)
    return found


def _refusal(error: ValidationError, described: Mapping[str, str]) -> ServingError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [str(part)[:60] for part in first["loc"]]
    if first["type"] == "json_invalid":
        return ServingError(
            "invalid_json", f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}"
        )
    if not path:
        return ServingError("invalid_value", "the body must be a JSON object")
    needed = [name for name in path if name in described]
    if needed and first["type"] != "missing":
        name = needed[-1]
        return ServingError("invalid_value", f"{name} must be {described[name]}", path[0])
    name = ".".join(path)
    if first["type"] == "extra_forbidden":
        return ServingError("invalid_value", f"unknown field: {name}", path[0])
    if first["type"] == "missing":
        return ServingError("invalid_value", f"{name} is missing", path[0])
    return ServingError("invalid_value", f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}", path[0])
