"""``gpt2x serve``."""

from __future__ import annotations

import logging
import re
import sys
from typing import TYPE_CHECKING

import click

from .running import PROVIDER, THREADS
from .source import RunPrecision
from .text import read_whole_text

if TYPE_CHECKING:
    import socket

    from ..serving.models import Models

MAX_KEYS = 1 << 20  # bytes of their file
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _size(_: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """A size such as 512M or 4G, in bytes."""
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)(?:i?B)?", value)
    if match is None or int(match[1]) == 0:
        raise click.BadParameter(f"{value!r} is not a size: write 512M or 4G", param=option)
    return int(match[1]) * UNITS[match[2]]


SECONDS = click.FloatRange(min=0.1, max=86_400)


@click.command(short_help="Serve models over an OpenAI-compatible API.")
@click.argument("models", metavar="DIR...", nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 for a free one.",
)
@click.option(
    "--precision",
    "precisions",
    type=RunPrecision(),
    multiple=True,
    help="Precision of the ONNX model, or a pair such as w8a8+int4 (repeatable; default: fp32).",
)
@click.option("--model-name", metavar="NAME", help="Name of the model in requests (default: the directory's name).")
@click.option(
    "--max-batch-size",
    type=click.IntRange(1, 1024),
    default=32,
    show_default=True,
    help="Maximum number of texts in a batch.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(1, 100_000),
    default=256,
    show_default=True,
    help="Maximum number of waiting texts.",
)
@click.option(
    "--max-context",
    type=click.IntRange(min=2),
    help="Maximum length of a prompt and its text in tokens (default: the model's context).",
)
@click.option(
    "--cache-memory",
    callback=_size,
    metavar="SIZE",
    help="Memory for the KV cache (default: half of the machine's memory).",
)
@THREADS
@PROVIDER
@click.option("--api-key", "key_file", type=click.Path(), metavar="FILE", help="File with API keys, one per line.")
@click.option("--allowed-host", "hosts", metavar="NAME", multiple=True, help="Accept this Host header (repeatable).")
@click.option(
    "--max-body",
    callback=_size,
    metavar="SIZE",
    default="1M",
    show_default=True,
    help="Maximum size of a request body.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Maximum number of open connections.",
)
@click.option(
    "--header-timeout", type=SECONDS, default=10, show_default=True, help="Seconds until the headers must be complete."
)
@click.option(
    "--body-timeout", type=SECONDS, default=30, show_default=True, help="Seconds until the body must be complete."
)
@click.option(
    "--generation-timeout",
    type=SECONDS,
    default=600,
    show_default=True,
    help="Seconds until the response must be complete.",
)
@click.option(
    "--drain-timeout", type=SECONDS, default=60, show_default=True, help="Seconds to complete requests after SIGTERM."
)
def serve(
    models: tuple[str, ...], host: str, port: int, precisions: tuple[str, ...], model_name: str | None,
    max_batch_size: int, max_queue: int, max_context: int | None, cache_memory: int | None, threads: int | None,
    provider: str | None, key_file: str | None, hosts: tuple[str, ...], max_body: int, max_connections: int, header_timeout: float,
    body_timeout: float, generation_timeout: float, drain_timeout: float,
) -> None:  # fmt: skip
    """Serve each DIR, which gpt2x export --onnx wrote, over an OpenAI-compatible API: text of an export with --cache inplace, and
    embeddings of one with --task feature-extraction.

    \b
      gpt2x serve gpt2-onnx/ --port 8000
      gpt2x serve gpt2=gpt2-onnx/ tuned=tuned-onnx/
      gpt2x serve gpt2-onnx/ --precision fp32 --precision w8a8
      gpt2x serve gpt2=gpt2-onnx/onnx/model_int8.onnx tuned=tuned-onnx/
      gpt2x serve gpt2-onnx/ embed=gpt2-embeddings-onnx/

    DIR can be NAME=DIR, or one .onnx file in it. Adapters in DIR are served as NAME:ADAPTER. This needs pip install 'gpt2x[serve]', and no torch.
    """
    from ..runtimes.onnx_providers import CPU
    from ..serving.app import Server
    from ..serving.http import is_loopback, listen
    from ..serving.http import serve as run
    from ..serving.metrics import Metrics
    from ..serving.opening import EngineOptions, open_models, wanted_models
    from ..serving.settings import Settings

    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # not every client that sends no HTTP
    keys = _keys(key_file)
    try:
        wanted = wanted_models(models, precisions, model_name)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    try:
        listener = listen(host, port)
    except OSError as error:
        raise click.ClickException(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    try:
        local = is_loopback(listener)
        settings = Settings(
            max_body=max_body,
            header_timeout=header_timeout,
            body_timeout=body_timeout,
            generation_timeout=generation_timeout,
            drain_timeout=drain_timeout,
            max_connections=max_connections,
            keys=keys,
            allowed_hosts=_allowed_hosts(hosts, local and not keys),
        )
        if not local and not keys:
            click.echo(f"Warning: {host} is open to other machines, and there is no --api-key.", err=True)
        metrics = Metrics()
        options = EngineOptions(max_batch_size, max_queue, threads, max_context, cache_memory, provider or CPU)
        opened = open_models(wanted, options, metrics)
        server = Server(opened, settings, metrics)
        run(server, listener, lambda: _announce(opened, listener))
    finally:
        listener.close()


def _keys(path: str | None) -> tuple[bytes, ...]:
    from ..serving.access import parse_keys

    if path is None:
        return ()
    text = read_whole_text(path, MAX_KEYS)
    try:
        return parse_keys(text)
    except ValueError as error:
        raise click.ClickException(f"{path}: {error}") from None


def _allowed_hosts(given: tuple[str, ...], local: bool) -> frozenset[str] | None:
    """The names in the Host header that are answered. A local server without keys answers only to its own."""
    from ..serving.http import LOOPBACK

    if "*" in given or not (given or local):
        return None
    return LOOPBACK | {name.lower() for name in given}


def _announce(models: Models, listener: socket.socket) -> None:
    from ..serving.http import address_of
    from ..serving.models import TextModel

    for model in models:
        if not isinstance(model, TextModel):
            click.echo(f"{model.name}: {model.precision}, embeddings of texts of up to {model.context} tokens")
            continue
        plan = model.engine.plan
        megabytes = (plan.rows * plan.row_bytes + plan.prefix_bytes) / 1e6
        click.echo(
            f"{model.name}: {model.precision}, {plan.rows} texts of {plan.context} tokens at once, "
            f"up to {megabytes:.0f} MB of cache"
        )
    click.echo(f"Listening on {address_of(listener)}")
