"""What Prometheus reads at /metrics. Names: fogline_hub_<what>_<unit>, seconds and bytes.

One registry per hub, so that several hubs can live in one process, as in the tests.
"""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from fogline_protocol.statistics import ModelStatistics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The hub's counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        # Counts of the protocol go on, like ours, when a version is loaded anew.
        self._statistics: dict[tuple[str, str], ModelStatistics] = {}
        labels = ("model", "version")
        self._requests = Counter(
            "fogline_hub_requests",
            "Requests by outcome: ok, cancelled by the caller, or the status of the error",
            (*labels, "outcome"),
            registry=self.registry,
        )
        self._request_seconds = Histogram(
            "fogline_hub_request_seconds", "From door to answer", labels,
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._queue_seconds = Histogram(
            "fogline_hub_queue_seconds", "Waiting for an engine", labels,
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._compute_seconds = Histogram(
            "fogline_hub_compute_seconds", "One run of an engine", labels,
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._batch_rows = Histogram(
            "fogline_hub_batch_rows", "Rows in one run", labels,
            buckets=_ROWS, registry=self.registry,
        )  # fmt: skip
        self._expired = Counter(
            "fogline_hub_expired", "Requests whose deadline passed in the queue", labels,
            registry=self.registry,
        )  # fmt: skip

    def request_done(self, model: str, version: str, outcome: str, seconds: float) -> None:
        """Count one request that found its model."""
        self._requests.labels(model, version, outcome).inc()
        self._request_seconds.labels(model, version).observe(seconds)

    def of_model(self, model: str, version: str) -> "ModelMetrics":
        """Return what the batcher of one model reports to."""
        statistics = self._statistics.setdefault((model, version), ModelStatistics(model, version))
        return ModelMetrics(
            statistics,
            self._queue_seconds.labels(model, version),
            self._compute_seconds.labels(model, version),
            self._batch_rows.labels(model, version),
            self._expired.labels(model, version),
        )

    def render(self) -> bytes:
        """Return the exposition text."""
        return generate_latest(self.registry)


class ModelMetrics:
    """What one version of one model reports to: Prometheus and the statistics of the protocol."""

    def __init__(
        self,
        statistics: ModelStatistics,
        queue: Histogram,
        compute: Histogram,
        rows: Histogram,
        expired: Counter,
    ) -> None:
        self.statistics = statistics
        self._queue = queue
        self._compute = compute
        self._rows = rows
        self._expired = expired

    def batch_ran(
        self, rows: int, queued_s: Sequence[float], compute: tuple[float, float, float]
    ) -> None:
        """A batch ran; the seconds of ``compute`` went into joining, running and parting it."""
        self._rows.observe(rows)
        self._compute.observe(sum(compute))
        for seconds in queued_s:
            self._queue.observe(seconds)
        join_ns, run_ns, part_ns = (round(seconds * 1e9) for seconds in compute)
        self.statistics.executed(
            rows, [round(seconds * 1e9) for seconds in queued_s], join_ns, run_ns, part_ns
        )

    def batch_failed(self, queued_s: Sequence[float]) -> None:
        """A batch failed in the engine."""
        self._waited(queued_s)

    def requests_expired(self, queued_s: Sequence[float]) -> None:
        """Requests ran out of time in the queue."""
        self._expired.inc(len(queued_s))
        self._waited(queued_s)

    def _waited(self, queued_s: Sequence[float]) -> None:
        for seconds in queued_s:
            self._queue.observe(seconds)
        self.statistics.queue.add(round(sum(queued_s) * 1e9), len(queued_s))
