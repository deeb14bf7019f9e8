"""NVIDIA's perf_analyzer, unmodified, against hub and agent."""

import asyncio
import json
import signal

import pytest

from tests import perf_analyzer

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(bool(perf_analyzer.missing()), reason=perf_analyzer.missing()),
]


@pytest.fixture(params=["http2", "grpcio"])
async def doors(request, make_hub, make_agent):
    """Addresses by protocol of both halves, and the model each serves."""
    hub = await make_hub("--door", request.param)
    agent = await make_agent("device", hub.endpoints["grpc"], "--door", request.param)
    return {"hub": (hub.endpoints, "digits-hub"), "agent": (agent.endpoints, "digits")}


@pytest.mark.parametrize("who", ["hub", "agent"])
async def test_it_measures_every_way_of_asking_to_the_end(doors, who):
    endpoints, model = doors[who]
    for batch, options in ((1, ()), (8, ()), (1, ("--streaming",)), (8, ("--streaming",))):
        levels = await asyncio.to_thread(
            perf_analyzer.run, endpoints["grpc"], model, "-i", "grpc", "-b", str(batch),
            "--concurrency-range", "1:16:15", *options,
        )  # fmt: skip
        assert [level.concurrency for level in levels] == [1, 16]
        for level in levels:
            assert level.per_second > 0
            assert level.server_requests > 0
            # Every request has its rows, and no row runs twice. Windows cut through batches.
            assert level.server_inferences >= batch * level.server_requests - 16 * batch
            assert 0 < level.server_executions <= level.server_inferences


@pytest.mark.parametrize("who", ["hub", "agent"])
async def test_it_measures_over_http_too(doors, who):
    endpoints, model = doors[who]
    (level,) = await asyncio.to_thread(
        perf_analyzer.run, endpoints["http"], model, "-i", "http", "-b", "8",
        "--concurrency-range", "4",
    )  # fmt: skip
    assert level.per_second > 0
    assert level.server_requests > 0


@pytest.mark.parametrize("who", ["hub", "agent"])
async def test_it_measures_with_tensors_in_shared_memory(make_hub, make_agent, who):
    hub = await make_hub("--allow-shared-memory")
    agent = await make_agent("device", hub.endpoints["grpc"], "--allow-shared-memory")
    endpoints, model = {
        "hub": (hub.endpoints, "digits-hub"),
        "agent": (agent.endpoints, "digits"),
    }[who]
    for protocol, options in (("grpc", ()), ("grpc", ("--streaming",)), ("http", ())):
        (level,) = await asyncio.to_thread(
            perf_analyzer.run, endpoints[protocol], model, "-i", protocol, "-b", "8",
            "--concurrency-range", "4", "--shared-memory", "system",
            "--output-shared-memory-size", "4096", *options,
        )  # fmt: skip
        assert level.per_second > 0
        assert level.server_inferences > 8


async def test_it_has_requests_traced(make_hub, tmp_path):
    traces = tmp_path / "traces"
    traces.mkdir()
    hub = await make_hub("--trace-dir", str(traces))
    await asyncio.to_thread(
        perf_analyzer.run, hub.endpoints["grpc"], "digits-hub", "-i", "grpc",
        "--concurrency-range", "4", "--trace-level", "TIMESTAMPS", "--trace-rate", "5",
        "--trace-count", "20", "--log-frequency", "10",
    )  # fmt: skip
    await hub.stop(signal.SIGTERM)  # what waits is written
    assert sorted(file.name for file in traces.iterdir()) == ["trace.json.0", "trace.json.1"]
    for file in traces.iterdir():
        records = json.loads(file.read_text())
        assert len({record["id"] for record in records}) == 10
