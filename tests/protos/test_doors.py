"""Both doors with clients that are not ours: tritonclient over gRPC, plain HTTP over REST."""

import asyncio
import io
import json
import time

import aiohttp
import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from aiohttp import web
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from fogline_protocol import client, grpc_service, grpc_transport, grpcio_door, rest_service
from fogline_protocol.errors import BadRequest, DeadlineExceeded, NotFound, Overloaded, Unavailable
from fogline_protocol.inference import InferRequest, InferResponse, ModelMetadata, ServerMetadata
from fogline_protocol.tensors import TensorSpec
from tests.protos.echo import grpc_door

IN = TensorSpec("image", "FP32", (-1, 4))


class Echo:
    """Answers with its inputs; the model's name chooses what goes wrong."""

    def __init__(self):
        self.deadlines = []

    def server_metadata(self):
        return ServerMetadata("echo", "1.2.3", ("parameters",))

    def server_ready(self):
        return True

    def model_metadata(self, name, version):
        if name == "absent":
            raise NotFound("unknown model 'absent', served are ['echo']")
        return ModelMetadata(name, ("1",), "test", (IN,), (IN,), {"fogline.digest": "ab"})

    def model_ready(self, name, version):
        return name != "cold"

    async def infer(self, request, deadline):
        self.deadlines.append(None if deadline is None else deadline - time.monotonic())
        match request.model:
            case "absent":
                raise NotFound("unknown model 'absent', served are ['echo']")
            case "full":
                raise Overloaded("come back later")
            case "late":
                raise DeadlineExceeded("too late")
            case "silent":
                raise BadRequest("")
            case "broken":
                raise ZeroDivisionError("a fault of ours")
        return InferResponse(
            request.model, "1", dict(request.inputs), request.id, dict(request.parameters)
        )


@pytest.fixture
def echo():
    return Echo()


@pytest.fixture(params=["http2", "grpcio"])
def kind(request):
    return request.param


@pytest.fixture
async def grpc_address(echo, kind):
    async with grpc_door(echo, kind=kind, max_message_bytes=1 << 20) as address:
        yield address


@pytest.fixture
async def http(echo):
    app = web.Application(client_max_size=1 << 20)
    rest_service.add_routes(app, echo)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        yield session
    await runner.cleanup()


def triton_input(name, array):
    tensor = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor


async def test_tritonclient_works_unmodified_in_the_same_process(grpc_address):
    async with triton.InferenceServerClient(grpc_address) as theirs:
        assert await theirs.is_server_live()
        assert await theirs.is_server_ready()
        assert not await theirs.is_model_ready("cold")
        assert (await theirs.get_server_metadata()).name == "echo"
        assert list((await theirs.get_model_metadata("echo")).inputs[0].shape) == [-1, 4]
        array = np.arange(8, dtype=np.float32).reshape(2, 4)
        result = await theirs.infer("echo", [triton_input("image", array)], request_id="7")
        np.testing.assert_array_equal(result.as_numpy("image"), array)
        assert result.get_response().id == "7"


async def test_every_output_has_a_raw_entry_even_an_empty_one(grpc_address):
    async with triton.InferenceServerClient(grpc_address) as theirs:
        empty = np.zeros((0, 4), np.float32)
        result = await theirs.infer("echo", [triton_input("image", empty)])
        response = result.get_response()
        assert len(response.raw_output_contents) == len(response.outputs) == 1


@pytest.mark.parametrize(
    ("model", "code", "text"),
    [
        ("absent", "NOT_FOUND", "unknown model"),
        ("full", "RESOURCE_EXHAUSTED", "come back later"),
        ("late", "DEADLINE_EXCEEDED", "too late"),
        ("silent", "INVALID_ARGUMENT", "BadRequest"),
        ("broken", "INTERNAL", "see the server's log"),
    ],
)
async def test_grpc_errors_carry_their_code_and_never_an_empty_text(
    grpc_address, model, code, text
):
    async with triton.InferenceServerClient(grpc_address) as theirs:
        with pytest.raises(InferenceServerException) as caught:
            await theirs.infer(model, [triton_input("image", np.zeros((1, 4), np.float32))])
    assert caught.value.status() == f"StatusCode.{code}"
    assert text in caught.value.message()


@pytest.mark.parametrize("letter", ["n", "é", "\0"])
async def test_a_text_that_quotes_something_long_does_not_lose_its_status(
    grpc_address, echo, letter
):
    async def refuse(request, deadline):
        raise NotFound(f"unknown model {letter * 100_000}")

    echo.infer = refuse
    ours = client.Client(grpc_address)
    with pytest.raises(NotFound, match="unknown model"):
        await ours.infer(InferRequest("echo", {}))
    await ours.close()


async def test_a_call_that_the_server_cancels_as_it_stops_is_worth_another_try(echo):
    async def cancels(request, context):
        await context.abort(grpc.StatusCode.CANCELLED, "")

    server = grpcio_door.new_server()
    method = grpc.unary_unary_rpc_method_handler(cancels)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(grpc_service.SERVICE, {"ModelInfer": method}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ours = client.Client(f"127.0.0.1:{port}")
    with pytest.raises(Unavailable, match="CANCELLED"):
        await ours.infer(InferRequest("echo", {}))
    await ours.close()
    await grpcio_door.stop(server, 1.0)


async def test_a_closed_connection_is_no_answer_of_the_server(grpc_address):
    ours = client.Client(grpc_address)
    await ours.close()
    with pytest.raises(Unavailable, match="closed"):
        await ours.infer(InferRequest("echo", {}))


async def test_a_message_over_the_limit_is_refused_and_the_next_one_served(grpc_address):
    async with triton.InferenceServerClient(grpc_address) as theirs:
        big = triton_input("image", np.zeros((1 << 18, 4), np.float32))
        with pytest.raises(InferenceServerException, match="larger than max"):
            await theirs.infer("echo", [big])
        small = np.zeros((1, 4), np.float32)
        assert (await theirs.infer("echo", [triton_input("image", small)])) is not None


async def test_garbage_on_the_grpc_door_is_the_callers_fault(grpc_address):
    ours = client.Client(grpc_address)
    with pytest.raises(BadRequest, match="malformed"):
        await ours.call("/inference.GRPCInferenceService/ModelInfer", b"\xff\xff\xff")
    await ours.close()


async def test_the_smaller_of_deadline_and_timeout_reaches_the_server(grpc_address, echo):
    ours = client.Client(grpc_address)
    request = InferRequest("echo", {"image": np.zeros((1, 4), np.float32)})
    await ours.infer(request)
    await ours.infer(request, timeout_s=50.0)
    request.parameters = {"timeout": 2_000_000}
    await ours.infer(request, timeout_s=50.0)
    await ours.close()
    assert echo.deadlines[0] is None
    assert 45 < echo.deadlines[1] < 55  # grpc rounds on the wire
    assert 1 < echo.deadlines[2] <= 2


async def test_our_client_counts_bytes_and_keeps_parameters(grpc_address):
    ours = client.Client(grpc_address)
    parameters = {"fogline.mode": "hub_only", "flag": True, "n": 3, "x": 0.5}
    request = InferRequest("echo", {"image": np.ones((1, 4), np.float32)}, parameters=parameters)
    response = await ours.infer(request)
    assert response.parameters == parameters
    assert ours.bytes_sent >= 16
    assert ours.bytes_received >= 16
    assert (await ours.model_metadata("echo")).properties == {"fogline.digest": "ab"}
    assert await ours.server_ready()
    await ours.close()


async def test_our_client_names_an_absent_server(unused_tcp_port):
    ours = client.Client(f"127.0.0.1:{unused_tcp_port}")
    with pytest.raises(Unavailable):
        await ours.infer(InferRequest("echo", {}), timeout_s=5)
    await ours.close()


async def test_a_caller_with_all_the_time_in_the_world_is_not_late_at_once(grpc_address):
    ours = client.Client(grpc_address)
    request = InferRequest("echo", {}, parameters={"timeout": (1 << 63) - 1})
    assert (await ours.infer(request, timeout_s=(1 << 63) / 1e6)).model == "echo"
    await ours.close()


async def test_two_servers_never_share_a_port(grpc_address, kind):
    host, _, port = grpc_address.rpartition(":")
    for other in ("http2", "grpcio"):
        second = grpc_transport.new_door(other, {})
        with pytest.raises(OSError, match=r"Failed to bind|Address already in use"):
            await second.listen(host, int(port))
        await second.stop(None)


async def test_rest_answers_json(http):
    body = {
        "id": "9",
        "parameters": {"fogline.mode": "edge_only"},
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 4], "data": [[1, 2, 3, 4]]}],
    }
    async with http.post("/v2/models/echo/infer", json=body) as answer:
        assert answer.status == 200
        document = await answer.json()
    assert document["id"] == "9"
    assert document["outputs"] == [
        {"name": "image", "datatype": "FP32", "shape": [1, 4], "data": [1.0, 2.0, 3.0, 4.0]}
    ]
    async with http.get("/v2/models/echo/versions/1") as answer:
        assert (await answer.json())["inputs"][0]["shape"] == [-1, 4]
    async with http.get("/v2/health/ready") as answer:
        assert answer.status == 200
    async with http.get("/v2/models/cold/ready") as answer:
        assert answer.status == 503


@pytest.mark.parametrize(
    ("model", "body", "status", "text"),
    [
        ("echo", b"{", 400, "not JSON"),
        ("echo", b"[" * 100_000, 400, "not JSON"),
        ("echo", b"[]", 400, "the body must be an object, got list"),
        ("echo", b"{}", 400, "inputs must be a list"),
        ("echo", b'{"inputs":[{}]}', 400, "inputs[0].name must be a text"),
        (
            "echo",
            b'{"inputs":[{"name":"i","datatype":"FP32","shape":[2],"data":[1]}]}',
            400,
            "input 'i': expected 2 values",
        ),
        (
            "echo",
            b'{"inputs":[{"name":"i","datatype":"FP32","shape":["x"],"data":[1]}]}',
            400,
            "whole numbers",
        ),
        ("absent", b'{"inputs":[]}', 404, "unknown model"),
        ("full", b'{"inputs":[]}', 429, "come back later"),
        ("broken", b'{"inputs":[]}', 500, "see the server's log"),
        ("echo", b" " * (2 << 20), 413, "too large"),
        ("echo", b'{"inputs":[],"parameters":{"n":18446744073709551616}}', 400, "64 bits"),
        ("echo", b'{"inputs":[],"parameters":{"timeout":1%s}}' % (b"0" * 400), 400, "64 bits"),
        ("echo", b'{"inputs":[],"parameters":{"t":"\\ud800"}}', 400, "Unicode"),
        ("echo", b'{"inputs":[],"parameters":{"\\ud800":1}}', 400, "Unicode"),
        ("echo", b'{"inputs":[],"parameters":{"timeout":"soon"}}', 400, "whole microseconds"),
    ],
)
async def test_rest_refuses_bad_input_precisely_and_keeps_serving(http, model, body, status, text):
    async with http.post(f"/v2/models/{model}/infer", data=io.BytesIO(body)) as answer:
        assert answer.status == status
        assert text in (await answer.json())["error"]
    async with http.get("/v2/health/live") as answer:
        assert answer.status == 200


async def test_rest_carries_texts_whether_the_engine_gives_bytes_or_str(http, echo):
    async def answer(request, deadline):
        texts = np.array([b"caf\xc3\xa9", "caf\u00e9"], dtype=object)
        return InferResponse("echo", "1", {"t": texts})

    echo.infer = answer
    async with http.post("/v2/models/echo/infer", data=b'{"inputs":[]}') as reply:
        assert (await reply.json())["outputs"][0]["data"] == ["caf\u00e9", "caf\u00e9"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": "[oops"}, 421),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
async def test_a_local_door_answers_no_page_from_elsewhere(echo, headers, status):
    app = web.Application(middlewares=[rest_service.local_only])
    rest_service.add_routes(app, echo)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as session,
        session.post("/v2/models/echo/infer", data=b'{"inputs":[]}', headers=headers) as answer,
    ):
        assert answer.status == status
        assert ("error" in await answer.json()) == (status != 200)
    await runner.cleanup()


async def test_rest_says_when_json_cannot_carry_a_value(http):
    body = json.dumps(
        {"inputs": [{"name": "i", "datatype": "FP32", "shape": [1], "data": [float("inf")]}]}
    )
    async with http.post("/v2/models/echo/infer", data=body) as answer:
        assert answer.status == 501
        assert "not finite" in (await answer.json())["error"]


async def test_a_caller_who_leaves_takes_its_work_along(grpc_address, echo):
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def never(request, deadline):
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    echo.infer = never
    ours = client.Client(grpc_address)
    call = asyncio.create_task(ours.infer(InferRequest("echo", {})))
    await started.wait()
    call.cancel()
    async with asyncio.timeout(5):
        await cancelled.wait()
    await ours.close()
