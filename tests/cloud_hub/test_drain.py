"""A hub that is told to stop: who is told what, at real doors, and in which order."""

import asyncio
import contextlib
import time

import aiohttp
import grpc
import numpy as np
import pytest

from cloud_hub.config import HubConfig
from cloud_hub.hub import Hub
from fogline_protocol import inference
from fogline_protocol.client import Client
from fogline_protocol.errors import Unavailable
from fogline_protocol.grpc_service import SERVICE
from fogline_protocol.inference import InferRequest
from tests.edge_agent.polling import until

REQUEST = InferRequest("digits-hub", {"image": np.zeros((1, 1, 8, 8), np.float32)}, id="x")
BODY = {
    "inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [0.0] * 64}]
}
URL = "/v2/models/digits-hub/infer"


class Staged:
    """A running hub with clients, and a gate in front of its model."""

    def __init__(self, hub, client, http, stream, parts):
        self.hub, self.client, self.http, self.stream = hub, client, http, stream
        self._parts = parts
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = 0
        batcher = hub.repository.find("digits-hub").batcher
        infer = batcher.infer

        async def gated(*arguments, **options):
            self.entered += 1
            await self.gate.wait()
            return await infer(*arguments, **options)

        batcher.infer = gated

    def stop(self):
        return asyncio.create_task(self._parts.aclose())

    async def held(self):
        """One request by every door, none of them answered."""
        self.gate.clear()
        await self.stream.write(inference.encode_request(REQUEST))
        calls = (
            asyncio.create_task(self.client.infer(REQUEST, 20)),
            asyncio.create_task(self.post()),
            asyncio.create_task(self.stream.read()),
        )
        await until(lambda: self.entered == 3)
        return calls

    async def post(self):
        async with self.http.post(URL, json=BODY) as answer:
            await answer.read()
            return answer

    async def ready(self):
        """What every probe says."""
        check = await self.client.call("/grpc.health.v1.Health/Check", b"", 10)
        model_ready = inference.pb.ModelReadyRequest(name="digits-hub").SerializeToString()
        model = await self.client.call(f"/{SERVICE}/ModelReady", model_ready, 10)
        paths = ("/readyz", "/v2/health/ready", "/v2/models/digits-hub/ready")
        return [
            inference.pb.HealthCheckResponse.FromString(check).status == 1,
            await self.client.server_ready(10),
            inference.pb.ModelReadyResponse.FromString(model).ready,
            *[(await self.http.get(path)).status == 200 for path in paths],
        ]


@pytest.fixture(params=["http2", "grpcio"])
async def stage(request, tmp_path, triton_directory):
    async with contextlib.AsyncExitStack() as stack:

        async def make(**options):
            config = HubConfig(
                data=tmp_path / "hub", grpc="127.0.0.1:0", http="127.0.0.1:0", mqtt="off",
                models=triton_directory, threads=1, door=request.param, **options,
            )  # fmt: skip
            parts = contextlib.AsyncExitStack()
            stack.push_async_callback(parts.aclose)
            hub = await parts.enter_async_context(Hub(config))
            client = Client(hub.grpc_address)
            stack.push_async_callback(client.close)
            http = await stack.enter_async_context(
                aiohttp.ClientSession(f"http://{hub.http_address}")
            )
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(hub.grpc_address))
            stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(timeout=20)
            await stream.write(inference.encode_request(REQUEST))
            await stream.read()
            return Staged(hub, client, http, stream, parts)

        yield make


async def test_a_hub_says_that_it_is_not_ready_while_it_still_serves(stage):
    hub = await stage(drain_notice_s=5.0)
    assert await hub.ready() == [True] * 6
    stopping = hub.stop()
    await until(lambda: hub.hub.server.draining)
    assert await hub.ready() == [False] * 6
    assert not (hub.hub.config.data / "endpoints.json").exists()
    await hub.client.infer(REQUEST, 10)
    assert (await hub.post()).status == 200
    await hub.stream.write(inference.encode_request(REQUEST))
    answer = inference.pb.ModelStreamInferResponse.FromString(await hub.stream.read())
    assert not answer.error_message
    stopping.cancel()
    await asyncio.wait([stopping])


async def test_what_is_in_flight_is_answered_while_what_is_new_is_refused_with_a_hint(stage):
    hub = await stage(drain_notice_s=0.0, drain_s=20.0)
    calls = await hub.held()
    stopping = hub.stop()
    await until(lambda: hub.hub.server.refusing)
    with pytest.raises(Unavailable, match="shutting down: ask another one") as refused:
        await hub.client.infer(REQUEST, 10)
    assert refused.value.retry_after_s == 1.0
    answer = await hub.post()
    assert answer.status == 503
    assert answer.headers["Retry-After"] == "1"
    await hub.stream.write(inference.encode_request(REQUEST))
    assert not any(call.done() for call in calls)
    text = hub.hub.metrics.render().decode()
    hub.gate.set()
    unary, rest, streamed = await asyncio.gather(*calls)
    assert unary.outputs
    assert rest.status == 200
    streamed = inference.pb.ModelStreamInferResponse.FromString(streamed)
    assert not streamed.error_message
    late = inference.pb.ModelStreamInferResponse.FromString(await hub.stream.read())
    assert "shutting down" in late.error_message
    assert late.infer_response.parameters["fogline.retry_after_s"].double_param == 1
    assert 'fogline_hub_rejections_total{reason="draining"}' in text
    started = time.monotonic()
    await stopping
    assert time.monotonic() - started < 10  # nobody waits for the rest of drain_s


async def test_what_never_ends_is_broken_off_when_the_time_is_up(stage, caplog):
    hub = await stage(drain_notice_s=0.0, drain_s=0.3)
    calls = await hub.held()
    await hub.stop()
    results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
    assert isinstance(results[0], Unavailable)
    assert isinstance(results[1], aiohttp.ClientError)
    assert "3 requests are broken off" in caplog.text


async def test_a_stream_that_lies_idle_does_not_hold_the_hub(stage):
    hub = await stage(drain_notice_s=0.0, drain_s=60.0)
    started = time.monotonic()
    await hub.stop()
    assert time.monotonic() - started < 20
