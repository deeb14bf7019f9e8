"""What Prometheus reads at /metrics. Names: fogline_hub_<what>_<unit>, seconds and bytes.

Beside them stand the names that Triton's users already chart (``nv_inference_*``, ``nv_cache_*``).
They are read from the statistics of the protocol when somebody asks, so they cannot differ from
what ModelStatistics answers. There is no ``nv_gpu_*``: the engines of this process use no GPU.

One registry per hub, so that several hubs can live in one process, as in the tests. Tiny models
make the CPU per request the limit of a hub, so whatever is counted per request is bound once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from fogline_protocol.statistics import Duration, ModelStatistics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LABELS = ("model", "version")


class Served(NamedTuple):
    """What a scrape reads of one version of a model."""

    statistics: ModelStatistics
    engines: int
    waiting_requests: int
    waiting_rows: int
    memory_bytes: int  # of the engines' own processes


class Metrics:
    """The hub's counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, CPU, open files
        PlatformCollector(registry=self.registry)
        # Counts of the protocol go on, like ours, when a version is loaded anew.
        self._statistics: dict[tuple[str, str], ModelStatistics] = {}
        self._requests = Counter(
            "fogline_hub_requests",
            "Requests by outcome, each once: ok, cancelled by the caller, or the status of the "
            "error that it got; without a model those that were refused before they had one",
            (*_LABELS, "outcome"),
            registry=self.registry,
        )
        self._request_seconds = Histogram(
            "fogline_hub_request_seconds", "From door to answer", _LABELS,
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._queue_seconds = Histogram(
            "fogline_hub_queue_seconds", "Waiting for an engine", _LABELS,
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._compute_seconds = Histogram(
            "fogline_hub_compute_seconds", "One run of an engine", _LABELS,
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._batch_rows = Histogram(
            "fogline_hub_batch_rows", "Rows in one run", _LABELS,
            buckets=_ROWS, registry=self.registry,
        )  # fmt: skip
        self._expired = Counter(
            "fogline_hub_expired", "Requests whose time was up in the queue", _LABELS,
            registry=self.registry,
        )  # fmt: skip
        self._rejections = Counter(
            "fogline_hub_rejections",
            "Why requests were not let in or lost their place: rate or concurrency of the caller, "
            "queue_full, expired, overdue, draining, unauthenticated, unreadable, no_model, memory "
            "of the doors, large_json, front_calls; unknown_call: calls that nothing here answers",
            ("reason",),
            registry=self.registry,
        )
        # Whatever they named: what strangers choose must not make new series.
        self._refused = _Requests(self._requests, ("", ""))
        self._rejected: dict[str, Counter] = {}
        self._busy: dict[tuple[str, str], _Busy] = {}
        self.registry.register(_BusyAtScrape(self._busy))

    def watch(self, models: Callable[[], Iterable[Served]]) -> None:
        """Read what ``models`` returns at every scrape."""
        self.registry.register(_AtScrape(models))

    def watch_cache(self, bytes_kept: Callable[[], int]) -> None:
        """Read at every scrape how many bytes of answers are kept."""
        gauge = Gauge(
            "fogline_hub_cache_bytes", "Bytes of answers that are kept", registry=self.registry
        )
        gauge.set_function(bytes_kept)

    def of_examples(self) -> "ExampleMetrics":
        """Return what the keeper of examples reports to. Once per hub."""
        return ExampleMetrics(self.registry)

    def request_refused(self, outcome: str) -> None:
        """Count one request that found no model."""
        self._refused.count(outcome)

    def rejected(self, reason: str, count: int = 1) -> None:
        """Count why requests were not let in, or lost their place in a queue."""
        child = self._rejected.get(reason)
        if child is None:
            child = self._rejected[reason] = self._rejections.labels(reason)
        child.inc(count)

    def of_model(self, model: str, version: str) -> "ModelMetrics":
        """Return what the batcher of one model reports to."""
        statistics = self._statistics.setdefault((model, version), ModelStatistics(model, version))
        return ModelMetrics(
            statistics,
            _Requests(self._requests, (model, version)),
            self._request_seconds.labels(model, version),
            self._queue_seconds.labels(model, version),
            self._compute_seconds.labels(model, version),
            self._batch_rows.labels(model, version),
            self._expired.labels(model, version),
            self._busy.setdefault((model, version), _Busy()),
            self.rejected,
        )

    def render(self) -> bytes:
        """Return the exposition text."""
        return generate_latest(self.registry)


class _Requests:
    """The requests of one version of one model by outcome."""

    def __init__(self, requests: Counter, labels: tuple[str, str]) -> None:
        self._requests = requests
        self._labels = labels
        self._outcomes: dict[str, Counter] = {}

    def count(self, outcome: str) -> None:
        child = self._outcomes.get(outcome)
        if child is None:
            child = self._outcomes[outcome] = self._requests.labels(*self._labels, outcome)
        child.inc()


class ModelMetrics:
    """What one version of one model reports to: Prometheus and the statistics of the protocol."""

    def __init__(
        self,
        statistics: ModelStatistics,
        requests: _Requests,
        request_seconds: Histogram,
        queue: Histogram,
        compute: Histogram,
        rows: Histogram,
        expired: Counter,
        busy: "_Busy",
        rejected: Callable[[str, int], None],
    ) -> None:
        self.statistics = statistics
        self._count_request = requests.count
        self._observe_request = request_seconds.observe
        self._queue = queue
        self._compute = compute
        self._rows = rows
        self._expired = expired
        self._busy = busy
        self._rejected = rejected

    def request_ended(self, outcome: str, seconds: float) -> None:
        """Count one request that found this model, when its caller is told the outcome."""
        self._count_request(outcome)
        self._observe_request(seconds)
        self.statistics.ended(outcome, seconds)

    def batch_ran(
        self, rows: int, queued_s: Sequence[float], compute: tuple[float, float, float]
    ) -> None:
        """A batch ran; the seconds of ``compute`` went into joining, running and parting it."""
        seconds = sum(compute)
        self._rows.observe(rows)
        self._compute.observe(seconds)
        self._busy.seconds += seconds
        observe = self._queue.observe
        for queued in queued_s:
            observe(queued)
        join_ns, run_ns, part_ns = (round(part * 1e9) for part in compute)
        self.statistics.executed(
            rows, [round(queued * 1e9) for queued in queued_s], join_ns, run_ns, part_ns
        )

    def batch_failed(self, queued_s: Sequence[float], busy_s: float) -> None:
        """A batch failed in the engine after ``busy_s``."""
        self._busy.seconds += busy_s
        self._waited(queued_s)

    def requests_expired(self, queued_s: Sequence[float]) -> None:
        """Requests ran out of time in the queue."""
        self._expired.inc(len(queued_s))
        self._waited(queued_s)

    def request_rejected(self, reason: str) -> None:
        """A request was refused a place in the queue, or lost it."""
        self._rejected(reason, 1)

    def _waited(self, queued_s: Sequence[float]) -> None:
        for seconds in queued_s:
            self._queue.observe(seconds)
        self.statistics.queue.add(round(sum(queued_s) * 1e9), len(queued_s))


class ExampleMetrics:
    """What the keeper of examples reports to.

    No label is a device's word: what strangers may choose must not make new series.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._kept = Counter(
            "fogline_hub_examples",
            "Examples kept: of a new content, or again of a known one",
            ("content",),
            registry=registry,
        )
        self._dropped = Counter(
            "fogline_hub_examples_dropped",
            "Examples that could have been kept and were not: queue_full, too_large, disk, database",
            ("reason",),
            registry=registry,
        )
        self._evicted = Counter(
            "fogline_hub_examples_evicted",
            "Examples that had been kept and went: quota, retention",
            ("reason",),
            registry=registry,
        )

    def watch(self, kept: Callable[[], int], queued: Callable[[], int]) -> None:
        """Read at every scrape how many bytes are kept and how many wait for the disk."""
        for name, text, of in (
            ("fogline_hub_examples_bytes", "Bytes of examples that are kept", kept),
            (
                "fogline_hub_examples_queue_bytes",
                "Bytes of examples that wait for the disk",
                queued,
            ),
        ):
            Gauge(name, text, registry=self._registry).set_function(of)

    def kept(self, new: int, again: int) -> None:
        """Count examples that are on the disk now."""
        self._kept.labels("new").inc(new)
        self._kept.labels("again").inc(again)

    def dropped(self, reason: str, count: int) -> None:
        """Count examples that were not kept."""
        self._dropped.labels(reason).inc(count)

    def evicted(self, reason: str, count: int) -> None:
        """Count examples that were deleted without anybody asking for it."""
        self._evicted.labels(reason).inc(count)


@dataclass(slots=True)
class _Busy:
    """How long the engines of one version of a model have worked, over all its loads."""

    seconds: float = 0.0


class _BusyAtScrape(Collector):
    def __init__(self, busy: Mapping[tuple[str, str], _Busy]) -> None:
        self._busy = busy

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "fogline_hub_engine_busy_seconds",
            "Engines at work; its rate over fogline_hub_engines is their busy share",
            labels=_LABELS,
        )
        for labels, busy in self._busy.items():
            family.add_metric(labels, busy.seconds)
        yield family


class _AtScrape(Collector):
    """What is read when somebody asks: the queues, and Triton's names."""

    def __init__(self, models: Callable[[], Iterable[Served]]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        models = list(self._models())
        for name, text, of in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            for model in models:
                gauge.add_metric(_labels(model), of(model))
            yield gauge
        for name, text, count in _TRITON:
            # Not a counter: prometheus_client would call it ..._total, which nobody charts.
            family = UnknownMetricFamily(name, text, labels=_LABELS)
            for model in models:
                family.add_metric(_labels(model), count(model.statistics))
            yield family


def _labels(model: Served) -> tuple[str, str]:
    return model.statistics.name, model.statistics.version


def _us(duration: Duration) -> int:
    return duration.ns // 1000


_GAUGES: Sequence[tuple[str, str, Callable[[Served], int]]] = (
    ("fogline_hub_queue_requests", "Requests waiting for an engine", lambda m: m.waiting_requests),
    ("fogline_hub_queue_rows", "Rows waiting for an engine", lambda m: m.waiting_rows),
    ("fogline_hub_engines", "Engines that serve the model", lambda m: m.engines),
    (
        "fogline_hub_engine_memory_bytes",
        "Resident memory of the child processes that run the model",
        lambda m: m.memory_bytes,
    ),
    (
        "nv_inference_pending_request_count",
        "Requests waiting for an engine",
        lambda m: m.waiting_requests,
    ),
)

# Source: triton-inference-server/server docs/user_guide/metrics.md.
_TRITON: Sequence[tuple[str, str, Callable[[ModelStatistics], int]]] = (
    ("nv_inference_request_success", "Requests answered", lambda s: s.success.count),
    ("nv_inference_request_failure", "Requests not answered", lambda s: s.fail.count),
    ("nv_inference_count", "Rows inferred, without cached ones", lambda s: s.inference_count),
    ("nv_inference_exec_count", "Runs of an engine", lambda s: s.execution_count),
    (
        "nv_inference_request_duration_us",
        "From door to answer, in sum",
        lambda s: _us(s.success),
    ),
    ("nv_inference_queue_duration_us", "Waiting for an engine, in sum", lambda s: _us(s.queue)),
    (
        "nv_inference_compute_input_duration_us",
        "Joining the inputs of requests, in sum",
        lambda s: _us(s.compute_input),
    ),
    (
        "nv_inference_compute_infer_duration_us",
        "Runs of an engine, in sum over requests",
        lambda s: _us(s.compute_infer),
    ),
    (
        "nv_inference_compute_output_duration_us",
        "Handing out the outputs, in sum",
        lambda s: _us(s.compute_output),
    ),
    ("nv_cache_num_hits_per_model", "Answers from the cache", lambda s: s.cache_hit.count),
    ("nv_cache_num_misses_per_model", "Answers not in the cache", lambda s: s.cache_miss.count),
    ("nv_cache_hit_duration_per_model", "Look-ups that hit, in us", lambda s: _us(s.cache_hit)),
    (
        "nv_cache_miss_duration_per_model",
        "Look-ups that missed, in us",
        lambda s: _us(s.cache_miss),
    ),
)
