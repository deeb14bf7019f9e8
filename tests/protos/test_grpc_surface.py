"""The gRPC door beyond the six core calls, with tritonclient and with its own descriptors."""

import asyncio

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
import tritonclient.grpc.model_config_pb2 as their_config
import tritonclient.grpc.service_pb2 as theirs
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from fogline_protocol.client import Client
from fogline_protocol.errors import BadRequest, NotFound
from fogline_protocol.grpc_calls import STREAM_IN_FLIGHT
from fogline_protocol.grpc_service import HEALTH, SERVICE
from fogline_protocol.v1 import inference_pb2 as pb
from fogline_protocol.v1 import model_config_pb2
from tests.protos.echo import EchoServer, grpc_door


@pytest.fixture
def echo():
    return EchoServer()


@pytest.fixture(params=["http2", "grpcio"])
def kind(request):
    return request.param


@pytest.fixture
async def address(echo, kind):
    async with grpc_door(echo, echo, kind=kind) as address:
        yield address


@pytest.fixture
async def client(address):
    async with triton.InferenceServerClient(address) as client:
        yield client


def given(array, name="x"):
    tensor = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor


ROW = np.array([[0.25, 3.0, -1.0, 3.0]], np.float32)


def differences(ours, other, path=""):
    for field in ours.fields:
        twin = other.fields_by_name.get(field.name)
        if twin is None:
            yield f"{path}{ours.name}.{field.name} is ours alone"
        elif (field.number, field.type, field.is_repeated) != (
            twin.number,
            twin.type,
            twin.is_repeated,
        ):
            yield f"{path}{ours.name}.{field.name} differs"
    for nested in ours.nested_types:
        if nested.name in other.nested_types_by_name:
            yield from differences(nested, other.nested_types_by_name[nested.name], ours.name + ".")


def test_every_message_has_the_numbers_and_types_of_tritons():
    found = []
    for ours, other in ((pb, theirs), (model_config_pb2, their_config)):
        for name, message in ours.DESCRIPTOR.message_types_by_name.items():
            if not name.startswith("HealthCheck"):
                found += differences(message, other.DESCRIPTOR.message_types_by_name[name])
    # The Open Inference file has it, Triton's has not.
    assert found == ["ModelMetadataResponse.properties is ours alone"]
    service = "GRPCInferenceService"
    assert set(pb.DESCRIPTOR.services_by_name[service].methods_by_name) == set(
        theirs.DESCRIPTOR.services_by_name[service].methods_by_name
    )


async def test_the_configuration_has_no_batch_dimension_and_the_metadata_have_it(client):
    config = (await client.get_model_config("echo")).config
    assert (config.max_batch_size, list(config.input[0].dims)) == (8, [4])
    assert config.input[0].data_type == their_config.TYPE_FP32
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert not config.model_transaction_policy.decoupled
    metadata = await client.get_model_metadata("echo")
    assert list(metadata.inputs[0].shape) == [-1, 4]


async def test_the_queue_statistic_grows_with_every_request(client):
    for count in range(1, 4):
        await client.infer("echo", [given(ROW)])
        (found,) = (await client.get_inference_statistics("echo")).model_stats
        assert found.inference_stats.queue.count == count
    assert found.inference_stats.queue.ns == 15
    assert (found.version, found.inference_count, found.execution_count) == ("1", 3, 3)
    assert [(b.batch_size, b.compute_infer.count) for b in found.batch_stats] == [(1, 3)]
    assert found.last_inference > 1_700_000_000_000
    assert (await client.get_inference_statistics()).model_stats[0].name == "echo"


async def test_an_absent_model_is_not_found_by_any_call(client):
    for call in (client.get_model_config, client.get_inference_statistics):
        with pytest.raises(InferenceServerException, match="unknown model 'absent'") as caught:
            await call("absent")
        assert caught.value.status() == "StatusCode.NOT_FOUND"


async def test_the_repository_is_listed_and_asked(client, echo):
    index = (await client.get_model_repository_index()).models
    assert [(m.name, m.version, m.state, m.reason) for m in index] == [
        ("echo", "1", "READY", ""),
        ("broken", "2", "UNAVAILABLE", "not a model"),
    ]
    await client.load_model("echo", config="{}")
    await client.unload_model("echo")
    assert echo.calls == [("load", "echo", ("config",)), ("unload", "echo")]


async def test_whatever_is_not_offered_is_unimplemented_with_a_text(kind):
    async with (
        grpc_door(EchoServer(), kind=kind) as bare,
        triton.InferenceServerClient(bare) as client,
    ):
        for call in (
            client.get_model_repository_index,
            client.get_system_shared_memory_status,
            client.get_cuda_shared_memory_status,
            client.unregister_system_shared_memory,
            client.unregister_cuda_shared_memory,
            client.get_trace_settings,
            client.get_log_settings,
        ):
            with pytest.raises(InferenceServerException, match="not offered") as caught:
                await call()
            assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


async def test_no_refusal_has_an_empty_text(address):
    methods = [*pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name, "NoSuch"]
    refusals = 0
    async with grpc.aio.insecure_channel(address) as channel:
        for name in methods:
            if name == "ModelStreamInfer":
                continue
            try:
                await channel.unary_unary(f"/{SERVICE}/{name}")(b"\xff")
            except grpc.aio.AioRpcError as error:
                refusals += 1
                # Triton's C++ client takes an error without a text for success.
                if not error.details():
                    pytest.fail(f"{name} refuses without a text")
    assert refusals >= len(methods) - 4  # the server's own calls read no request


async def test_health_follows_readiness(address, echo):
    ours = Client(address)

    async def status(service):
        request = pb.HealthCheckRequest(service=service).SerializeToString()
        return pb.HealthCheckResponse.FromString(await ours.call(f"/{HEALTH}/Check", request))

    assert (await status("")).status == 1
    assert (await status(SERVICE)).status == 1
    echo.ready = False
    assert (await status("")).status == 2
    with pytest.raises(NotFound, match="unknown service 'other'"):
        await status("other")
    await ours.close()


async def test_classification_ranks_and_names_the_best(client, echo):
    wanted = triton.InferRequestedOutput("x", class_count=3)
    rows = np.concatenate([ROW, -ROW])
    result = await client.infer("echo", [given(rows)], outputs=[wanted])
    assert result.as_numpy("x").tolist() == [
        [b"3.000000:1:dog", b"3.000000:3", b"0.250000:0:cat"],
        [b"1.000000:2", b"-0.250000:0:cat", b"-3.000000:1:dog"],
    ]
    with pytest.raises(InferenceServerException, match="needs numbers"):
        await client.infer("echo", [given(np.array([[b"a"]], dtype=object))], outputs=[wanted])


async def test_only_the_outputs_asked_for_come_back_each_with_a_raw_entry(client):
    asked = [triton.InferRequestedOutput("b")]
    result = await client.infer("echo", [given(ROW, "a"), given(ROW, "b")], outputs=asked)
    response = result.get_response()
    assert [output.name for output in response.outputs] == ["b"]
    assert len(response.raw_output_contents) == 1
    assert not response.outputs[0].HasField("contents")


async def test_a_message_beyond_the_default_limit_of_grpc_is_taken_and_given(client):
    big = np.zeros((320_000, 4), np.float32)  # 5 MB, grpcio refuses more than 4 by default
    result = await client.infer("echo", [given(big)])
    assert result.as_numpy("x").nbytes == big.nbytes


async def test_the_parameter_that_the_cpp_client_always_sends_is_accepted(address):
    ours = Client(address)
    request = pb.ModelInferRequest(model_name="echo")
    request.parameters["triton_enable_empty_final_response"].bool_param = False
    await ours.call(f"/{SERVICE}/ModelInfer", request.SerializeToString())
    request.parameters["triton_other"].bool_param = True
    with pytest.raises(BadRequest, match="reserved"):
        await ours.call(f"/{SERVICE}/ModelInfer", request.SerializeToString())
    await ours.close()


@pytest.mark.parametrize(
    ("key", "field", "value"),
    [
        ("priority", "string_param", "high"),
        ("priority", "int64_param", -1),
        ("timeout", "double_param", 0.5),
        ("timeout", "int64_param", -5),
    ],
)
async def test_priority_and_timeout_must_be_whole_numbers(address, key, field, value):
    ours = Client(address)
    request = pb.ModelInferRequest(model_name="echo")
    setattr(request.parameters[key], field, value)
    with pytest.raises(BadRequest, match=key):
        await ours.call(f"/{SERVICE}/ModelInfer", request.SerializeToString())
    await ours.close()


async def test_shared_memory_is_refused_with_a_text(client):
    tensor = triton.InferInput("x", [1, 4], "FP32")
    tensor.set_shared_memory("region", 16)
    with pytest.raises(InferenceServerException, match="shared memory is not offered") as caught:
        await client.infer("echo", [tensor])
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


def asks(*requests):
    async def stream():
        for request in requests:
            yield {"model_name": "echo", "inputs": [given(ROW)], **request}

    return stream()


async def asks_and_waits(request):
    """Ask once: who asked again while the stream ends would be told that it has, by grpcio."""
    async for first in asks(request):
        yield first
    await asyncio.Event().wait()


async def test_a_stream_answers_in_order_whichever_is_done_first(client, echo):
    echo.gates["first"] = asyncio.Event()

    async def stream():
        yield {"model_name": "echo", "inputs": [given(ROW)], "request_id": "first"}
        yield {"model_name": "echo", "inputs": [given(ROW)], "request_id": "second"}
        while len(echo.calls) < 2:  # the second runs while the first waits
            await asyncio.sleep(0)
        echo.gates["first"].set()

    found = [
        (result.get_response().id, error) async for result, error in client.stream_infer(stream())
    ]
    assert found == [("first", None), ("second", None)]


async def test_an_error_in_a_stream_is_in_band_with_its_id_and_the_stream_goes_on(client):
    refused = {"request_id": "bad", "parameters": {"refuse": True}}
    found = []
    async for result, error in client.stream_infer(asks(refused, {"request_id": "good"})):
        found.append((error and error.message(), result and result.get_response().id))
    assert found[0][0] == "refused as asked"
    assert found[1] == (None, "good")


async def test_an_error_ends_the_stream_with_a_status_if_the_caller_wants_that(client):
    refused = {"request_id": "bad", "parameters": {"refuse": True}}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in client.stream_infer(
            asks_and_waits(refused), headers={"triton_grpc_error": "true"}
        ):
            pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "refused as asked"


async def test_stream_messages_carry_id_and_the_mark_of_the_last_response(address):
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(
            iter([pb.ModelInferRequest(model_name="absent", id="7").SerializeToString(), b"\xff"])
        )
        messages = [pb.ModelStreamInferResponse.FromString(data) async for data in call]
    assert [m.infer_response.id for m in messages] == ["7", ""]
    assert "unknown model" in messages[0].error_message
    assert "malformed" in messages[1].error_message


async def test_a_good_stream_answer_is_marked_final(address):
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(
            iter([pb.ModelInferRequest(model_name="echo", id="1").SerializeToString()])
        )
        (message,) = [pb.ModelStreamInferResponse.FromString(data) async for data in call]
    assert message.infer_response.parameters["triton_final_response"].bool_param
    assert not message.error_message


async def test_a_caller_who_leaves_a_stream_takes_its_work_along(address, echo):
    echo.gates["0"] = asyncio.Event()
    cancelled = []
    answer = echo.infer

    async def watched(request, deadline):
        try:
            return await answer(request, deadline)
        except asyncio.CancelledError:
            cancelled.append(request)
            raise

    echo.infer = watched
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")()
        request = pb.ModelInferRequest(model_name="echo", id="0").SerializeToString()
        for _ in range(STREAM_IN_FLIGHT + 10):  # more than are taken in
            await call.write(request)
        async with asyncio.timeout(5):
            while len(echo.calls) < 10:
                await asyncio.sleep(0.001)
            call.cancel()
            while len(cancelled) < len(echo.calls):  # every one, not just the next in line
                await asyncio.sleep(0.001)
    assert len(echo.calls) <= STREAM_IN_FLIGHT + 2
