"""What Prometheus reads from /metrics. Nothing in it names a prompt or a client."""

from __future__ import annotations

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from transfusion.generate import Done

METRICS_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            *_named("requests", "HTTP requests"), ("route", "status"), registry=self.registry
        )
        self.seconds = self._seconds("request_seconds", "Until an HTTP answer is complete", "route")
        self.first_byte = self._seconds("first_byte_seconds", "Until the first byte of a streamed answer")
        self.answers = Gauge(*_named("answers", "Answers under way and waiting"), registry=self.registry)
        self.ended = Counter(
            *_named("answers_ended", "Answers by how they ended"), ("reason",), registry=self.registry
        )
        self.tokens = Counter(*_named("text_tokens", "Text tokens made"), registry=self.registry)
        self.images = Counter(*_named("images", "Images made"), registry=self.registry)
        self.positions = Counter(
            *_named("prompt_positions", "Tokens and patches of prompts"), registry=self.registry
        )
        self.tick = self._seconds("tick_seconds", "One tick of the engine")

    def _seconds(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(*_named(name, text), labels, registry=self.registry, buckets=_SECONDS)

    def answered(self, done: Done) -> None:
        """Count an answer that has ended."""
        self.ended.labels(done.reason).inc()
        self.tokens.inc(done.tokens)
        self.images.inc(done.images)
        self.positions.inc(done.prompt_positions)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)


def _named(name: str, text: str) -> tuple[str, str]:
    return f"transfusion_{name}", text
