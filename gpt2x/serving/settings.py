"""The limits of the server. ``docs/serving.md`` lists them."""

from __future__ import annotations

from dataclasses import dataclass

MAX_TEXTS = 128  # of one request: prompts * best_of
MAX_INPUTS = 2048  # of one request for embeddings, as OpenAI's
MAX_INPUT_TOKENS = 300_000  # of all inputs of a request together, as OpenAI's
MAX_STOPS = 16
MAX_STOP_LENGTH = 256  # characters
MAX_BIASES = 1024
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MAX_MESSAGES = 256
MAX_USER = 512  # characters
MAX_HEADERS = 32 << 10  # bytes
KEEP_ALIVE = 5  # seconds that an idle connection stays open
SPARE_DESCRIPTORS = 64  # that connections do not take


@dataclass(frozen=True)
class Settings:
    """What the operator sets.

    Attributes:
        max_body: bytes of a request.
        header_timeout: seconds from the first byte of a connection, or its opening, to the end of the headers.
        body_timeout: seconds for the body.
        generation_timeout: seconds from the end of the body to the end of the last text, with the time in the queue.
        write_timeout: seconds that a client may read nothing of a stream.
        drain_timeout: seconds that requests have to end after SIGTERM.
        max_connections: open connections.
        keys: API keys; none if the server is open.
        allowed_hosts: of the ``Host`` header; None for any.
    """

    max_body: int = 1 << 20
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    generation_timeout: float = 600.0
    write_timeout: float = 30.0
    drain_timeout: float = 60.0
    max_connections: int = 10_000
    keys: tuple[bytes, ...] = ()
    allowed_hosts: frozenset[str] | None = None
