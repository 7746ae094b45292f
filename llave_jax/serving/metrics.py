"""What the server counts, in Prometheus' form."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from llave_jax.serving.batcher import Observer

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics(Observer):
    """The server's metrics, in a registry of their own.

    Args:
      waiting: the number of items that wait, asked for whenever metrics are read.
      unfinished: the number of items that wait or are being embedded.
    """

    def __init__(self, waiting: Callable[[], int], unfinished: Callable[[], int]):
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "llave_requests", "Requests answered.", ["route", "status"], registry=registry
        )
        self._latency = Histogram(
            "llave_request_seconds",
            "From a request's head to the end of its response.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._items = Counter(
            "llave_items", "Items of requests.", ["kind", "outcome"], registry=registry
        )
        self._tokens = Counter(
            "llave_tokens", "Tokens embedded, with prompts and visual tokens.", registry=registry
        )
        self._batches = Counter("llave_batches", "Batches computed.", registry=registry)
        self._batch_items = Histogram(
            "llave_batch_items",
            "Items in a batch.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
            registry=registry,
        )
        self._fill = Histogram(
            "llave_batch_fill",
            "Share of a batch's tokens that are used.",
            buckets=tuple(n / 10 for n in range(1, 11)),
            registry=registry,
        )
        self._stages = Histogram(
            "llave_stage_seconds",
            "Seconds of an item in the stages queue, prepare and pack, and of a batch in the stage device.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        for name, text, value in (
            ("llave_queue_items", "Items that wait to be prepared.", waiting),
            ("llave_unfinished_items", "Items that wait or are being embedded.", unfinished),
        ):
            Gauge(name, text, registry=registry).set_function(value)
        self.ready = Gauge("llave_ready", "1 once the server is warmed up.", registry=registry)
        ProcessCollector(registry=registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered.

        Args:
          route: a name of few, never the client's path.
          status: of the response; 499 if the client left.
          seconds: it took.
        """
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def items(self, kind: str, outcome: str, count: int = 1) -> None:
        """Items of a request have an outcome.

        Args:
          kind: `text`, `image` or `video`.
          outcome: `ok`, `error` or `cancelled`.
          count: how many.
        """
        self._items.labels(kind, outcome).inc(count)

    def batch(self, items: int, tokens: int, room: int) -> None:
        """As of `Observer`."""
        self._batches.inc()
        self._tokens.inc(tokens)
        self._batch_items.observe(items)
        self._fill.observe(tokens / max(room, 1))

    def stage(self, name: str, seconds: float) -> None:
        """As of `Observer`."""
        self._stages.labels(name).observe(seconds)

    def text(self) -> bytes:
        """All metrics, in Prometheus' text form."""
        return generate_latest(self._registry)
