"""Metrics for Prometheus."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import generate_latest

from .observer import Observer

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """All metrics of a server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        counter = partial(Counter, namespace="gpt2x", registry=self.registry)
        gauge = partial(Gauge, namespace="gpt2x", registry=self.registry)
        histogram = partial(Histogram, namespace="gpt2x", registry=self.registry)
        model = ["model"]
        self.requests = counter("requests", "HTTP requests.", ["path", "status"])
        self.errors = counter("errors", "Errors, by code.", ["code"])
        self.connections = gauge("open_connections", "Open connections.")
        self.queue = gauge("queue_texts", "Waiting texts.", model)
        self.running = gauge("running_texts", "Running texts.", model)
        self.batch = histogram("batch_size", "Texts in a decoding step.", model, buckets=ROWS)
        self.first = histogram(
            "time_to_first_token_seconds", "Time from the request to the first token of a text.", model, buckets=SECONDS
        )  # fmt: skip
        self.per_token = histogram(
            "time_per_token_seconds",
            "Time of a decoding step, which adds a token to every text.",
            model,
            buckets=SECONDS,
        )
        self.read = counter("prompt_tokens", "Prompt tokens.", model)
        self.cached = counter("cached_prompt_tokens", "Prompt tokens from the prefix cache.", model)
        self.generated = counter("generated_tokens", "New tokens.", model)
        self.texts = counter("texts", "Complete texts.", model)
        self.cancelled = counter("cancelled_requests", "Requests whose client disconnected.", model)
        self.cache_tokens = gauge("cache_tokens", "Tokens in the cache.", model)
        self.cache_use = gauge("cache_use_ratio", "Share of the cache that is in use.", model)
        self.prefix = gauge("prefix_cache_bytes", "Size of the prefix cache.", model)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class EngineMetrics(Observer):
    """The metrics of one model.

    Args:
        metrics: where they are.
        model: its name.
        cache_tokens: tokens that its cache holds, if it has one.
    """

    def __init__(self, metrics: Metrics, model: str, cache_tokens: int = 1) -> None:
        self._capacity = cache_tokens
        self._queue = metrics.queue.labels(model)
        self._running = metrics.running.labels(model)
        self._batch = metrics.batch.labels(model)
        self._first = metrics.first.labels(model)
        self._per_token = metrics.per_token.labels(model)
        self._read = metrics.read.labels(model)
        self._cached = metrics.cached.labels(model)
        self._generated = metrics.generated.labels(model)
        self._texts = metrics.texts.labels(model)
        self._cancelled = metrics.cancelled.labels(model)
        self._cache_tokens = metrics.cache_tokens.labels(model)
        self._cache_use = metrics.cache_use.labels(model)
        self._prefix = metrics.prefix.labels(model)

    def prompt_read(self, tokens: int, cached: int) -> None:
        self._read.inc(tokens)
        self._cached.inc(cached)

    def stepped(self, rows: int, seconds: float) -> None:
        self._batch.observe(rows)
        self._per_token.observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def text_ended(self, tokens: int) -> None:
        self._texts.inc()
        self._generated.inc(tokens)

    def cancelled(self) -> None:
        self._cancelled.inc()

    def state(self, waiting: int, running: int, cache_tokens: int, prefix_bytes: int) -> None:
        self._queue.set(waiting)
        self._running.set(running)
        self._cache_tokens.set(cache_tokens)
        self._cache_use.set(cache_tokens / self._capacity)
        self._prefix.set(prefix_bytes)
