"""A hub's books: what its callers saw is what Prometheus and ModelStatistics say, by any door."""

import asyncio
import re
from collections import Counter
from pathlib import Path

import aiohttp
import grpc
import numpy as np
import pytest

from cloud_hub.config import HubConfig
from cloud_hub.hub import Hub
from fogline_protocol import inference
from fogline_protocol.grpc_service import INFER, STREAM
from fogline_protocol.inference import InferRequest
from fogline_protocol.v1 import inference_pb2 as pb

TEXT = Path(__file__).parents[1] / "edge_agent" / "data" / "text.onnx"  # s -> t, BYTES [n, 1]
LIMIT = 1 << 16
REQUESTS = re.compile(
    r'^fogline_hub_requests_total\{model="(.*)",outcome="(.*)",version=".*"\} (\S+)$', re.M
)
TRITON = re.compile(r"^nv_inference_request_(success|failure)\{.*\} (\S+)$", re.M)


def config(folder, **options):
    model = folder / "models" / "text" / "1"
    model.mkdir(parents=True)
    (model / "model.onnx").write_bytes(TEXT.read_bytes())
    return HubConfig(
        data=folder / "hub", models=folder / "models", grpc="127.0.0.1:0", http="127.0.0.1:0",
        mqtt="off", threads=1, max_message_bytes=LIMIT, drain_s=5.0, **options,
    )  # fmt: skip


def asked(model="text", text=b"x", *, classes=0, **parameters):
    inputs = {"s": np.array([[text]], object)}
    message = pb.ModelInferRequest.FromString(
        inference.encode_request(InferRequest(model, inputs, parameters=parameters))
    )
    if classes:
        message.outputs.add(name="t").parameters["classification"].int64_param = classes
    return message.SerializeToString()


CALLS = (
    (asked(), "text", "ok"),
    (asked(classes=1), "text", "invalid_argument"),
    (
        asked(text=b"x" * (LIMIT - 128)),
        "text",
        "resource_exhausted",
    ),  # with the answer's parameters
    (asked(**{"fogline.private": True}), "text", "permission_denied"),
    (asked("stranger"), "", "not_found"),
    (b"\xff\xff", "", "invalid_argument"),
)


async def counted(hub, requests):
    """Return the requests by model and outcome, once so many are there."""
    async with asyncio.timeout(10):
        while True:
            text = hub.metrics.render().decode()
            found = Counter({(m, o): int(float(n)) for m, o, n in REQUESTS.findall(text)})
            if found.total() >= requests:
                break
            await asyncio.sleep(0.01)
    (statistics,) = hub.server.model_statistics("text", "")
    of_model = sum(n for (model, _), n in found.items() if model)
    ok = found["text", "ok"]
    assert (statistics.success.count, statistics.fail.count) == (ok, of_model - ok)
    triton = {how: int(float(n)) for how, n in TRITON.findall(text)}
    assert triton == {"success": ok, "failure": of_model - ok}
    return found


async def status(call):
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name.lower()
    return "ok"


@pytest.mark.parametrize(
    ("door", "fronts"), [("http2", 0), ("grpcio", 0), ("http2", 1), ("grpcio", 1)]
)
async def test_every_request_is_counted_once_as_its_caller_saw_it(tmp_path, door, fronts):
    async with (
        Hub(config(tmp_path, door=door, front_processes=fronts)) as hub,
        grpc.aio.insecure_channel(hub.grpc_address) as channel,
    ):
        for data, _, outcome in CALLS:
            assert await status(channel.unary_unary(INFER)(data, timeout=20)) == outcome
        expected = Counter((model, outcome) for _, model, outcome in CALLS)
        assert await counted(hub, len(CALLS)) == expected
        streamed = [call for call in CALLS if call[2] != "resource_exhausted"]  # ends a stream
        stream = channel.stream_stream(STREAM)(iter([data for data, *_ in streamed]), timeout=20)
        answers = [pb.ModelStreamInferResponse.FromString(data) async for data in stream]
        assert [not answer.error_message for answer in answers] == [
            outcome == "ok" for *_, outcome in streamed
        ]
        expected += Counter((model, outcome) for _, model, outcome in streamed)
        assert await counted(hub, expected.total()) == expected
        assert await status(channel.unary_unary("/no/where")(b"", timeout=20)) == "unimplemented"
        text = hub.metrics.render().decode()
    assert 'fogline_hub_rejections_total{reason="unreadable"} 2.0' in text
    assert 'fogline_hub_rejections_total{reason="no_model"} 2.0' in text
    assert 'fogline_hub_rejections_total{reason="unknown_call"} 1.0' in text
    assert "stranger" not in text


async def test_rest_requests_are_in_the_same_books(tmp_path):
    tensor = {"name": "s", "datatype": "BYTES", "shape": [1, 1], "data": ["x"]}
    classes = [{"name": "t", "parameters": {"classification": 1}}]
    posts = (
        ("text", {"inputs": [tensor]}, "text", 200),
        ("text", {"inputs": [tensor], "outputs": classes}, "text", 400),
        ("text", {"inputs": 1}, "", 400),
        ("stranger", {"inputs": [tensor]}, "", 404),
        ("text", {"inputs": ["x" * LIMIT]}, "", 413),
    )
    outcomes = {200: "ok", 400: "invalid_argument", 404: "not_found", 413: "invalid_argument"}
    async with (
        Hub(config(tmp_path)) as hub,
        aiohttp.ClientSession(f"http://{hub.http_address}") as session,
    ):
        for name, document, _, expected in posts:
            async with session.post(f"/v2/models/{name}/infer", json=document) as answer:
                assert answer.status == expected
        seen = Counter((model, outcomes[status]) for *_, model, status in posts)
        assert await counted(hub, len(posts)) == seen


async def test_what_a_front_refuses_by_itself_reaches_the_hubs_books(tmp_path):
    # Its door holds so little that a burst of small calls is too much for it.
    options = {"front_processes": 1, "door_memory_bytes": 8 * LIMIT}
    async with (
        Hub(config(tmp_path, **options)) as hub,
        grpc.aio.insecure_channel(hub.grpc_address) as channel,
    ):
        calls = [channel.unary_unary(INFER)(asked(text=b"x" * 1000)) for _ in range(500)]
        seen = Counter([await status(call) for call in calls])
        found = await counted(hub, len(calls))
        refused = seen["resource_exhausted"]
        assert refused > 0
        assert found == {("text", "ok"): 500 - refused, ("", "resource_exhausted"): refused}
        text = hub.metrics.render().decode()
        assert f'fogline_hub_rejections_total{{reason="memory"}} {refused}.0' in text
        assert await status(channel.unary_unary(INFER)(b"x" * (LIMIT + 1))) == "resource_exhausted"
        found = await counted(hub, len(calls) + 1)
        assert found["", "resource_exhausted"] == refused + 1
