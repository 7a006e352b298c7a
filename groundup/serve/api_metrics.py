"""How is the server doing? Figures of engine and requests as Prometheus reads them, in a registry of the app's own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from groundup.serve.api_models import Served

if TYPE_CHECKING:
    from groundup.infer.worker import Handle

GAUGES = {
    "running": "Answers that are computed side by side",
    "waiting": "Answers that wait for room",
    "blocks_used": "Blocks of the key-value cache in use",
    "blocks_total": "Blocks of the key-value cache",
}
COUNTERS = {
    "prompt_tokens": "Prompt tokens taken",
    "generated_tokens": "Tokens generated",
    "drafted": "Tokens guessed ahead",
    "accepted": "Guessed tokens that were right",
    "cached_tokens": "Prompt tokens found in the prefix cache",
    "preemptions": "Answers that were pushed out and computed again",
}
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """All figures of one app. paths: those that requests are counted under; every other is "other"."""

    def __init__(self, served: Sequence[Served], paths: Sequence[str]) -> None:
        self.registry = CollectorRegistry()
        self.paths = frozenset(paths)
        self.requests = Counter(
            "groundup_requests", "Requests answered, by path and status", ["path", "status"], registry=self.registry
        )
        self.first_token = Histogram(
            "groundup_time_to_first_token_seconds", "From taking a request to its first token", ["model"],
            buckets=_SLOW, registry=self.registry,
        )  # fmt: skip
        self.per_token = Histogram(
            "groundup_time_per_output_token_seconds", "Between two tokens of an answer, its mean", ["model"],
            buckets=_FAST, registry=self.registry,
        )  # fmt: skip
        self.whole = Histogram(
            "groundup_request_seconds", "From taking a request to its last token", ["model"],
            buckets=_SLOW, registry=self.registry,
        )  # fmt: skip
        self.registry.register(_Engines(served))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Clock:
    """Times one request, from now on."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        self._start = time.monotonic()

    def finished(self, handle: Handle) -> None:
        """All was said. The time per token is that of one answer, where there are several side by side."""
        now, first = time.monotonic(), handle.first_token or self._start
        steps = max(len(sequence.output_ids) for request in handle.requests for sequence in request.sequences) - 1
        self._metrics.first_token.labels(self._model).observe(first - self._start)
        self._metrics.whole.labels(self._model).observe(now - self._start)
        if steps > 0:
            self._metrics.per_token.labels(self._model).observe((now - first) / steps)


class CountRequests:
    """Middleware that counts what was answered with which status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            path = scope["path"] if scope["path"] in self.metrics.paths else "other"
            self.metrics.requests.labels(path, str(status)).inc()


class _Engines:
    """The engines' own figures, read when they are asked for."""

    def __init__(self, served: Sequence[Served]) -> None:
        self._served = served

    def collect(self) -> Iterator[Metric]:
        for family, texts in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, text in texts.items():
                metric = family(f"groundup_{name}", text, labels=["model"])
                for one in self._served:
                    metric.add_metric([one.name], one.worker.stats.get(name, 0))
                yield metric
