"""What a model has done since the server started, as the statistics extension counts it.

Three rules are easy to get wrong, and clients depend on them: ``queue`` counts every request,
batched or not (perf_analyzer finds the version that serves by it); the compute durations
count every request with the time of the whole batch it was in; and on the REST side every
count is a number, which protobuf's own JSON mapping would not make it.

Source: triton-inference-server/server docs/protocol/extension_statistics.md.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fogline_protocol.outcomes import OK
from fogline_protocol.v1 import inference_pb2 as pb


@dataclass(slots=True)
class Duration:
    """How often something happened and how long it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """Count ``count`` more that took ``ns`` together."""
        self.count += count
        self.ns += ns


@dataclass(slots=True)
class BatchStatistics:
    """Executions of one batch size."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


REQUESTS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output",
            "cache_hit", "cache_miss")  # fmt: skip
COMPUTE = ("compute_input", "compute_infer", "compute_output")


@dataclass(slots=True)
class ModelStatistics:
    """The counts of one version of one model. Written by whoever serves it, on one thread."""

    name: str
    version: str
    last_inference_ms: int = 0  # since the epoch
    inference_count: int = 0  # rows
    execution_count: int = 0  # batches
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    cache_hit: Duration = field(default_factory=Duration)
    cache_miss: Duration = field(default_factory=Duration)
    batches: dict[int, BatchStatistics] = field(default_factory=dict)  # by rows

    def ended(self, outcome: str, seconds: float) -> None:
        """Count one request that found this model; whatever was not answered has failed."""
        (self.success if outcome == OK else self.fail).add(round(seconds * 1e9))

    def executed(
        self, rows: int, queued_ns: Sequence[int], input_ns: int, infer_ns: int, output_ns: int
    ) -> None:
        """Count one execution of ``rows`` rows; one waiting time per request in it."""
        self.last_inference_ms = time.time_ns() // 1_000_000
        self.inference_count += rows
        self.execution_count += 1
        requests = len(queued_ns)
        self.queue.add(sum(queued_ns), requests)
        batch = self.batches.get(rows)
        if batch is None:
            batch = self.batches[rows] = BatchStatistics()
        self.compute_input.add(input_ns * requests, requests)
        self.compute_infer.add(infer_ns * requests, requests)
        self.compute_output.add(output_ns * requests, requests)
        batch.compute_input.add(input_ns)
        batch.compute_infer.add(infer_ns)
        batch.compute_output.add(output_ns)

    def split(self, rows: int, max_batch: int, infer_ns: int) -> None:
        """Count one request that was run in parts of ``max_batch`` rows, one after the other."""
        parts = -(-rows // max_batch)
        for part in range(parts):
            size = min(max_batch, rows - part * max_batch)
            # One request, so it waited once; what it took is spread over its parts.
            self.executed(size, (0,) if part == 0 else (), 0, infer_ns // parts, 0)


def encode(models: Sequence[ModelStatistics]) -> bytes:
    """Return the counts as a ``ModelStatisticsResponse``."""
    return pb.ModelStatisticsResponse(
        model_stats=[
            pb.ModelStatistics(
                name=model.name,
                version=model.version,
                last_inference=model.last_inference_ms,
                inference_count=model.inference_count,
                execution_count=model.execution_count,
                inference_stats=pb.InferStatistics(**_messages(model, REQUESTS)),
                batch_stats=[
                    pb.InferBatchStatistics(batch_size=rows, **_messages(batch, COMPUTE))
                    for rows, batch in sorted(model.batches.items())
                ],
            )
            for model in models
        ]
    ).SerializeToString()


def document(models: Sequence[ModelStatistics]) -> dict[str, Any]:
    """Return the counts as a JSON-ready document."""
    return {
        "model_stats": [
            {
                "name": model.name,
                "version": model.version,
                "last_inference": model.last_inference_ms,
                "inference_count": model.inference_count,
                "execution_count": model.execution_count,
                "inference_stats": _documents(model, REQUESTS),
                "batch_stats": [
                    {"batch_size": rows, **_documents(batch, COMPUTE)}
                    for rows, batch in sorted(model.batches.items())
                ],
            }
            for model in models
        ]
    }


def _messages(holder: object, names: Sequence[str]) -> Mapping[str, pb.StatisticDuration]:
    return {name: pb.StatisticDuration(count=d.count, ns=d.ns) for name, d in _of(holder, names)}


def _documents(holder: object, names: Sequence[str]) -> Mapping[str, Mapping[str, int]]:
    return {name: {"count": d.count, "ns": d.ns} for name, d in _of(holder, names)}


def _of(holder: object, names: Sequence[str]) -> list[tuple[str, Duration]]:
    return [(name, getattr(holder, name)) for name in names]
