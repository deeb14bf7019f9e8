"""Who calls reaches the server, by every door, and limits hold for every request."""

import asyncio
import contextlib
import math

import aiohttp
import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from aiohttp import web
from tritonclient.utils import InferenceServerException

from cloud_hub.engines.launch import Launcher
from cloud_hub.fleet.callers import Caller, CallerLimits
from cloud_hub.inference import admission
from cloud_hub.inference.admission import CALLER, LOCAL, Admission
from cloud_hub.inference.repository import Limits, Repository
from cloud_hub.inference.server import HubServer
from cloud_hub.metrics import Metrics
from fogline_protocol import grpc_service, grpc_transport, inference, rest_service
from fogline_protocol.client import Client
from fogline_protocol.errors import Overloaded
from fogline_protocol.inference import InferRequest

TOKENS = {
    "fgl_shop": Caller("shop", "till", "1"),
    "fgl_slow": Caller("farm", "barn", "2", CallerLimits(rate=0.5, burst=2)),
    "fgl_narrow": Caller("farm", "gate", "3", CallerLimits(concurrency=1)),
}
IMAGE = {"image": np.zeros((1, 1, 8, 8), np.float32)}
STREAM = f"/{grpc_service.SERVICE}/ModelStreamInfer"
INFER = f"/{grpc_service.SERVICE}/ModelInfer"
BODY = {
    "inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [0.0] * 64}]
}


async def authenticate(token):
    await asyncio.sleep(0)  # as the real one does, when it asks the database
    return TOKENS.get(token)


def bearer(token):
    return (("authorization", f"Bearer {token}"),)


class Doors:
    """A hub's inference behind both doors; notes which caller every request had."""

    def __init__(self, kind, repository, metrics, default):
        self.kind = kind
        self.metrics = metrics
        self.server = HubServer("hub", repository, metrics, Admission(default, metrics))
        self.callers = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = asyncio.Event()
        batcher = repository.find("digits-hub").batcher
        infer = batcher.infer

        async def noting(inputs, deadline, **options):
            self.callers.append((CALLER.get().tenant, options["caller"]))
            self.entered.set()
            await self.gate.wait()
            return await infer(inputs, deadline, **options)

        batcher.infer = noting

    @contextlib.asynccontextmanager
    async def open(self, *, required):
        callers = admission.Callers(authenticate, required=required, metrics=self.metrics)
        methods = {
            **grpc_service.methods(self.server, self.server),
            **grpc_service.health_methods(self.server),
        }
        door = grpc_transport.new_door(self.kind, methods, admit=admission.admitting(callers))
        port = await door.listen("127.0.0.1", 0)
        app = web.Application(middlewares=[admission.rest_middleware(callers)])
        rest_service.add_routes(app, self.server, self.server)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.address = f"127.0.0.1:{port}"
        try:
            async with (
                grpc.aio.insecure_channel(self.address) as self.channel,
                aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as self.http,
            ):
                yield self
        finally:
            self.gate.set()
            await runner.cleanup()
            await door.stop(None)

    async def unary(self, token=""):
        data = inference.encode_request(InferRequest("digits-hub", IMAGE))
        return await self.channel.unary_unary(INFER)(
            data, metadata=bearer(token) if token else None, timeout=10
        )

    async def post(self, token=""):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with self.http.post(
            "/v2/models/digits-hub/infer", json=BODY, headers=headers
        ) as answer:
            await answer.read()
            return answer


@pytest.fixture(params=["http2", "grpcio"])
def kind(request):
    return request.param


@pytest.fixture
async def repository(triton_directory):
    repository = Repository(Metrics(), Launcher(threads=1), Limits(max_batch=16))
    await repository.load_directory(triton_directory)
    yield repository
    await repository.close()


@pytest.fixture
async def doors(kind, repository):
    async with Doors(kind, repository, Metrics(), CallerLimits()).open(required=False) as doors:
        yield doors


async def test_who_calls_reaches_the_server_from_unary_calls_side_by_side(doors):
    doors.gate.clear()
    calls = [
        asyncio.ensure_future(doors.unary(token)) for token in ("", "fgl_shop", "", "fgl_slow")
    ]
    while len(doors.callers) < 4:
        await asyncio.sleep(0.001)
    doors.gate.set()
    await asyncio.gather(*calls)
    local = ("default", "local")
    assert sorted(doors.callers) == sorted([local, ("shop", "1"), local, ("farm", "2")])


async def test_who_calls_reaches_every_request_of_a_stream(doors):
    data = inference.encode_request(InferRequest("digits-hub", IMAGE))
    streams = [
        doors.channel.stream_stream(STREAM)(metadata=bearer("fgl_shop"), timeout=10),
        doors.channel.stream_stream(STREAM)(timeout=10),
    ]
    for _ in range(3):
        for stream in streams:
            await stream.write(data)
    for stream in streams:
        await stream.done_writing()
        assert len([answer async for answer in stream]) == 3
    assert sorted(doors.callers) == [("default", "local")] * 3 + [("shop", "1")] * 3


async def test_one_connection_carries_requests_of_several_callers_over_http(doors):
    for token in ("fgl_shop", "", "fgl_slow", ""):
        assert (await doors.post(token)).status == 200
    local = ("default", "local")
    assert doors.callers == [("shop", "1"), local, ("farm", "2"), local]
    assert CALLER.get() is LOCAL


async def test_a_wrong_token_is_refused_even_where_none_is_needed(doors):
    with pytest.raises(grpc.aio.AioRpcError, match="unknown, revoked or expired") as found:
        await doors.unary("fgl_guess")
    assert found.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert (await doors.post("fgl_guess")).status == 401
    assert doors.callers == []
    text = doors.metrics.render().decode()
    assert 'fogline_hub_rejections_total{reason="unauthenticated"} 2.0' in text


async def test_where_a_token_is_needed_nobody_else_gets_in(kind, repository):
    async with Doors(kind, repository, Metrics(), CallerLimits()).open(required=True) as doors:
        with pytest.raises(grpc.aio.AioRpcError, match="wants to know its callers"):
            await doors.unary()
        assert (await doors.post()).status == 401
        await doors.unary("fgl_shop")
        assert (await doors.post("fgl_shop")).status == 200
        await doors.channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=10)
        assert (await doors.http.get("/v2/health/ready")).status == 200
        assert doors.callers == [("shop", "1")] * 2


async def test_a_rate_holds_over_all_doors_and_says_when_to_come_back(doors):
    await doors.unary("fgl_slow")
    assert (await doors.post("fgl_slow")).status == 200
    with pytest.raises(
        grpc.aio.AioRpcError, match=r"'barn' of tenant 'farm' may make 0\.5"
    ) as found:
        await doors.unary("fgl_slow")
    assert found.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    hint = dict(found.value.trailing_metadata())["grpc-retry-pushback-ms"]
    assert 1000 < int(hint) <= 2000
    answer = await doors.post("fgl_slow")
    assert (answer.status, answer.headers["Retry-After"]) == (429, "2")
    await doors.unary("fgl_shop")  # nobody else is held
    text = doors.metrics.render().decode()
    assert 'fogline_hub_rejections_total{reason="rate"} 2.0' in text


async def test_a_rate_holds_for_every_request_of_a_stream(doors):
    answers = []

    async def requests():
        for number in range(4):
            image = triton_input()
            yield {"model_name": "digits-hub", "inputs": [image], "request_id": str(number)}

    async with triton.InferenceServerClient(doors.address) as client:
        responses = client.stream_infer(requests(), headers={"authorization": "Bearer fgl_slow"})
        async for result, error in responses:
            answers.append(error or result)
    assert [isinstance(a, InferenceServerException) for a in answers] == [False, False, True, True]
    assert "may make 0.5 requests a second" in str(answers[2])


def triton_input():
    image = triton.InferInput("image", [1, 1, 8, 8], "FP32")
    image.set_data_from_numpy(IMAGE["image"])
    return image


async def test_a_stream_says_when_to_come_back_beside_the_request_that_was_refused(doors):
    stream = doors.channel.stream_stream(STREAM)(metadata=bearer("fgl_slow"), timeout=10)
    for _ in range(3):
        await stream.write(inference.encode_request(InferRequest("digits-hub", IMAGE, id="x")))
    await stream.done_writing()
    refused = [inference.pb.ModelStreamInferResponse.FromString(a) async for a in stream][2]
    parameters = refused.infer_response.parameters
    assert 0 < parameters["fogline.retry_after_s"].double_param <= 2
    assert refused.infer_response.id == "x"


async def test_requests_at_once_are_limited_and_one_that_leaves_makes_room(doors):
    doors.gate.clear()
    first = asyncio.ensure_future(doors.unary("fgl_narrow"))
    await doors.entered.wait()
    with pytest.raises(grpc.aio.AioRpcError, match="1 requests at once"):
        await doors.unary("fgl_narrow")
    await doors_free(doors, first)
    doors.gate.set()
    await doors.unary("fgl_narrow")


async def doors_free(doors, call):
    """Break a call off and wait until the hub has noticed."""
    call.cancel()
    account = doors.server._admission._accounts["3"][1]
    while account.in_flight:
        await asyncio.sleep(0.001)


async def test_limits_of_the_hub_hold_for_whoever_has_none_of_its_own(kind, repository):
    default = CallerLimits(rate=0.01)
    async with Doors(kind, repository, Metrics(), default).open(required=False) as doors:
        for token in ("", "fgl_shop"):
            await doors.unary(token)
            with pytest.raises(grpc.aio.AioRpcError, match=r"0\.01 requests a second"):
                await doors.unary(token)
        for _ in range(2):
            await doors.unary("fgl_slow")


async def test_our_client_hands_the_hint_on(doors):
    doors.server._admission = Admission(CallerLimits(rate=0.01), doors.metrics)
    client = Client(doors.address)
    await client.infer(InferRequest("digits-hub", IMAGE), 10)
    with pytest.raises(Overloaded) as found:
        await client.infer(InferRequest("digits-hub", IMAGE), 10)
    assert 90 < found.value.retry_after_s <= 100
    await client.close()


@pytest.mark.parametrize(
    ("sent", "read"),
    [("1500", 1.5), ("0", 0.0), ("-1", math.inf), ("soon", math.inf), ("9" * 5000, math.inf)],
)
def test_a_hint_is_read_as_the_proposal_says(sent, read):
    from fogline_protocol import grpc_calls

    assert grpc_calls.retry_after_s((("x", "y"), (grpc_calls.PUSHBACK, sent))) == read
    assert grpc_calls.retry_after_s(None) is None
