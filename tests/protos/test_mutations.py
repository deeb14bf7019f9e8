"""Whatever arrives at a door is answered or refused: never a crash, a hang or a fault of ours."""

import asyncio
import json
import random

import aiohttp
import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fogline_protocol import inference, rest_codec
from fogline_protocol.errors import InferenceError
from fogline_protocol.grpc_service import SERVICE
from fogline_protocol.inference import InferResponse
from fogline_protocol.tensors import DTYPES
from fogline_protocol.v1 import inference_pb2 as pb
from tests.protos.echo import EchoServer, grpc_door, rest_door

MANY = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])

dims = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 2**31, 2**62, 2**63 - 1])
shapes = st.lists(dims, max_size=40)
datatypes = st.sampled_from([*DTYPES, "", "FP8", "fp32"])
texts = st.sampled_from(["", "x", "y", "triton_x", "timeout", "priority", "shared_memory_region"])
raws = st.binary(max_size=40)


@st.composite
def parameters(draw):
    kind = draw(st.sampled_from(["bool", "int64", "string", "double", "uint64", None]))
    value = {
        "bool": True,
        "int64": draw(st.integers(-(2**63), 2**63 - 1)),
        "string": "text",
        "double": draw(st.floats()),
        "uint64": draw(st.integers(0, 2**64 - 1)),
        None: None,
    }[kind]
    return pb.InferParameter() if kind is None else pb.InferParameter(**{f"{kind}_param": value})


@st.composite
def messages(draw):
    names = st.dictionaries(texts, parameters(), max_size=2)
    message = pb.ModelInferRequest(
        model_name="echo",
        id=draw(texts),
        parameters=draw(names),
        raw_input_contents=draw(st.lists(raws, max_size=3)),
    )
    for _ in range(draw(st.integers(0, 3))):
        tensor = message.inputs.add(
            name=draw(texts), datatype=draw(datatypes), shape=draw(shapes), parameters=draw(names)
        )
        if draw(st.booleans()):
            tensor.contents.fp32_contents.extend(draw(st.lists(st.floats(width=32), max_size=4)))
            tensor.contents.int_contents.extend(
                draw(st.lists(st.integers(-9, 2**31 - 1), max_size=4))
            )
            tensor.contents.uint_contents.extend(
                draw(st.lists(st.integers(0, 2**32 - 1), max_size=4))
            )
            tensor.contents.bytes_contents.extend(draw(st.lists(raws, max_size=4)))
    for _ in range(draw(st.integers(0, 2))):
        message.outputs.add(
            name=draw(texts),
            parameters=draw(st.dictionaries(st.just("classification"), parameters())),
        )
    return message.SerializeToString()


@st.composite
def damaged(draw):
    data = bytearray(draw(messages()))
    for _ in range(draw(st.integers(0, 4))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@MANY
@given(messages() | damaged() | st.binary(max_size=100))
def test_any_bytes_are_a_request_that_can_be_sent_on_or_are_refused_with_a_text(data):
    try:
        request = inference.decode_request(data)
        inference.timeout_s(request.parameters)
    except InferenceError as error:
        inference.encode_stream_error(inference.request_id(data), error)
        return
    # What was taken in can be passed to the hub and told back.
    inference.encode_request(request)
    inference.encode_stream_response(
        InferResponse("echo", "1", request.inputs, request.id, request.parameters)
    )


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([*DTYPES, "x", "\ud800", "", "binary_data_size", "classification"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "inputs",
                    "outputs",
                    "name",
                    "shape",
                    "datatype",
                    "data",
                    "parameters",
                    "id",
                    "binary_data_size",
                    "binary_data",
                    "classification",
                    "binary_data_output",
                    "timeout",
                    "\udc00",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)
json_tensors = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["x", "y"]),
        "datatype": datatypes,
        "shape": st.lists(st.integers(-1, 4) | dims, max_size=3),
    },
    optional={
        "data": st.lists(json_values, max_size=5),
        "parameters": st.fixed_dictionaries(
            {}, optional={"binary_data_size": st.integers(-1, 9) | json_values}
        ),
    },
)
json_requests = st.fixed_dictionaries(
    {"inputs": st.lists(json_tensors, max_size=3)},
    optional={"parameters": json_values, "outputs": json_values, "id": json_values},
)


@MANY
@given(json_values | json_requests, raws, st.none() | st.text(max_size=5))
def test_any_json_and_any_bytes_behind_it_are_answered_or_refused(document, tail, header):
    text = json.dumps(document).encode()
    try:
        head, binary = rest_codec.split_body(text + tail, header or str(len(text)))
        request, wish = rest_codec.decode_request("echo", "", head, binary)
        rest_codec.encode_response(
            InferResponse("echo", "1", request.inputs, request.id, request.parameters), wish
        )
    except InferenceError:
        return
    inference.encode_request(request)


@pytest.mark.parametrize("kind", ["http2", "grpcio"])
async def test_the_live_doors_survive_a_storm_of_damaged_requests(kind):
    """1,000 requests per door, each damaged in some way; then both still answer."""
    draw = random.Random(7)
    whole = pb.ModelInferRequest(model_name="echo", id="1", raw_input_contents=[bytes(16)])
    whole.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    good = whole.SerializeToString()
    good_json = json.dumps(
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
    ).encode()

    def hurt(data):
        data = bytearray(data)
        for _ in range(draw.randint(1, 6)):
            match draw.randint(0, 2):
                case 0:
                    data[draw.randrange(len(data))] = draw.randrange(256)
                case 1:
                    del data[draw.randint(1, len(data)) :]
                case 2:
                    at = draw.randrange(len(data))
                    data[at:at] = draw.randbytes(draw.randint(1, 9))
        return bytes(data)

    server = EchoServer()
    outcomes = {"answered": 0, "refused": 0}
    async with (
        grpc_door(server, kind=kind) as grpc_address,
        rest_door(server) as rest_address,
        grpc.aio.insecure_channel(grpc_address) as channel,
        aiohttp.ClientSession(f"http://{rest_address}") as session,
        asyncio.timeout(60),
    ):
        infer = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")

        async def over_grpc(data):
            try:
                await infer(data)
                outcomes["answered"] += 1
            except grpc.aio.AioRpcError as error:
                outcomes["refused"] += 1
                if error.code() is grpc.StatusCode.INTERNAL or not error.details():
                    pytest.fail(f"{data!r}: {error.code()} {error.details()!r}")

        async def over_rest(data):
            headers = {}
            if draw.random() < 0.3:
                headers["Inference-Header-Content-Length"] = str(draw.randint(0, len(data) + 3))
            async with session.post("/v2/models/echo/infer", data=data, headers=headers) as answer:
                assert answer.status in (200, 400, 501), await answer.text()
                outcomes["answered" if answer.status == 200 else "refused"] += 1
                await answer.read()

        for _ in range(20):
            await asyncio.gather(*(over_grpc(hurt(good)) for _ in range(25)))
            await asyncio.gather(*(over_rest(hurt(good_json)) for _ in range(50)))
        sent = [hurt(good) for _ in range(500)]
        answers = [pb.ModelStreamInferResponse.FromString(a) async for a in stream(iter(sent))]
        assert len(answers) == len(sent)
        for answer in answers:
            assert "see the server's log" not in answer.error_message
        await over_grpc(good)
        await over_rest(good_json)
    assert sum(outcomes.values()) == 20 * 75 + 2
    assert outcomes["answered"] > 0
    assert outcomes["refused"] > 0
