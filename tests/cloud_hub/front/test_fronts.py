"""A hub behind front processes answers as one without, and outlives each of them."""

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton

from cloud_hub.config import HubConfig
from cloud_hub.errors import StartRefused
from cloud_hub.hub import Hub
from fogline_protocol import grpc_service
from fogline_protocol.client import Client
from fogline_protocol.errors import (
    DeadlineExceeded,
    InferenceError,
    NotFound,
    Unavailable,
    Unsupported,
)
from fogline_protocol.inference import InferRequest
from fogline_protocol.v1 import inference_pb2 as pb

DOUBLE = Path(__file__).parents[2] / "edge_agent" / "data" / "double.onnx"  # x FP32 [n, 3]


def config(folder, **options):
    model = folder / "models" / "double" / "1"
    model.mkdir(parents=True, exist_ok=True)
    (model / "model.onnx").write_bytes(DOUBLE.read_bytes())
    chosen = {
        "data": folder / "hub", "models": folder / "models", "grpc": "127.0.0.1:0",
        "http": "127.0.0.1:0", "mqtt": "off", "threads": 1, "front_processes": 2,
        "max_queue_rows": 200_000, "max_batch": 4096, "drain_s": 5.0,
    }  # fmt: skip
    return HubConfig(**{**chosen, **options})


@pytest.fixture
async def hub(tmp_path):
    async with Hub(config(tmp_path)) as hub:
        yield hub


@pytest.fixture
async def client(hub):
    client = Client(hub.grpc_address)
    yield client
    await client.close()


def ask(rows, value=1.0):
    return InferRequest("double", {"x": np.full((rows, 3), value, np.float32)})


async def answered(client, request, timeout_s=10.0):
    (output,) = (await client.infer(request, timeout_s)).outputs.values()
    return output


async def test_every_caller_gets_its_own_answer_and_all_are_counted_once(hub, client):
    clients = [Client(hub.grpc_address) for _ in range(6)]  # the kernel spreads connections
    requests = [ask(1 + n % 3, float(n)) for n in range(60)]
    answers = await asyncio.gather(
        *(answered(clients[n % 6], request) for n, request in enumerate(requests))
    )
    for request, answer in zip(requests, answers, strict=True):
        np.testing.assert_array_equal(answer, 2 * request.inputs["x"])
    (found,) = hub.server.model_statistics("double", "1")
    assert found.success.count == found.queue.count == 60
    assert found.inference_count == sum(len(request.inputs["x"]) for request in requests)
    for one in clients:
        await one.close()


async def test_a_request_of_megabytes_passes_in_shared_memory(hub, client):
    request = ask(150_000, 3.0)  # 1.8 MB
    answer = await answered(client, request)
    assert answer.shape == (150_000, 3)
    assert (answer == 6.0).all()


async def test_refusals_arrive_with_their_class_and_text(client):
    with pytest.raises(NotFound, match="unknown model 'nobody'"):
        await client.infer(InferRequest("nobody", ask(1).inputs), 5.0)
    with pytest.raises(Unsupported, match=r"/no\.Such/Method is not offered"):
        await client.call("/no.Such/Method", b"", 5.0)
    assert await client.call(f"/{grpc_service.HEALTH}/Check", b"", 5.0)


async def test_a_deadline_holds_through_a_front(hub, client):
    model = hub.repository.find("double")
    held = asyncio.Event()
    run = model.engine.run

    async def hold(inputs, deadline=None):
        await held.wait()
        return await run(inputs)

    model.engine.run = hold
    with pytest.raises(DeadlineExceeded):
        await client.infer(ask(1), 0.2)
    held.set()
    assert (await answered(client, ask(1)) == 2.0).all()
    (found,) = hub.server.model_statistics("double", "1")
    assert found.success.count + found.fail.count == 2


async def test_a_stream_is_answered_in_order_and_outlives_a_faulty_request(hub):
    async def requests():
        for at in range(6):
            x = triton.InferInput("x", [1, 3 if at != 2 else 4], "FP32")
            x.set_data_from_numpy(np.full((1, 3 if at != 2 else 4), at, np.float32))
            yield {"model_name": "double", "inputs": [x], "request_id": str(at)}

    async with triton.InferenceServerClient(hub.grpc_address) as theirs:
        found = [
            (answer.get_response().id if answer else "", str(error or ""))
            async for answer, error in theirs.stream_infer(requests())
        ]
    assert [id for id, error in found if not error] == ["0", "1", "3", "4", "5"]
    assert "expected shape" in found[2][1]


async def test_a_front_that_dies_is_replaced_and_costs_only_its_own_connections(hub):
    before = set(hub.fronts.pids)
    victim = next(iter(before))
    os.kill(victim, signal.SIGKILL)
    async with asyncio.timeout(30):
        while len(set(hub.fronts.pids) - {victim}) < 2:
            await asyncio.sleep(0.01)
    assert len(set(hub.fronts.pids) & before) == 1
    clients = [Client(hub.grpc_address) for _ in range(6)]
    for one in clients:
        assert (await answered(one, ask(1)) == 2.0).all()
        await one.close()


async def test_fronts_end_with_their_hub_and_answer_what_they_had_taken(tmp_path):
    hub = Hub(config(tmp_path))
    async with hub:
        pids = hub.fronts.pids
        model = hub.repository.find("double")
        held, running = asyncio.Event(), asyncio.Event()
        run = model.engine.run

        async def hold(inputs, deadline=None):
            running.set()
            await held.wait()
            return await run(inputs)

        model.engine.run = hold
        client = Client(hub.grpc_address)
        asked = asyncio.create_task(answered(client, ask(1)))
        await running.wait()
        asyncio.get_running_loop().call_later(0.5, held.set)
    assert (await asked == 2.0).all()
    with pytest.raises(Unavailable):
        await client.infer(ask(1), 2.0)
    await client.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_second_hub_does_not_share_the_port_in_silence(hub, tmp_path):
    second = config(tmp_path / "second", grpc=hub.grpc_address)
    with pytest.raises(StartRefused, match=r"cannot listen on .* --grpc"):
        async with Hub(second):
            pass
    with pytest.raises(StartRefused, match=r"cannot listen on"):
        async with Hub(replace(second, front_processes=0)):
            pass


async def test_callers_who_leave_by_the_hundred_leave_nothing_behind(hub, client):
    async def leave(n):
        call = asyncio.create_task(client.infer(ask(1 + n), 10.0))
        await asyncio.sleep(0.001 * (n % 7))
        call.cancel()
        try:
            await call
        except (asyncio.CancelledError, InferenceError):
            return

    await asyncio.gather(*(leave(n) for n in range(300)))
    assert (await answered(client, ask(2)) == 2.0).all()
    async with asyncio.timeout(10):
        while any(front.end.calls for front in hub.fronts._fronts.values()):
            await asyncio.sleep(0.01)


async def test_an_empty_message_of_a_stream_is_a_faulty_request_and_not_a_question(hub):
    async with grpc.aio.insecure_channel(hub.grpc_address) as channel:
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
        await stream.write(b"")
        answer = pb.ModelStreamInferResponse.FromString(await stream.read())
        stream.cancel()
    assert "unknown model ''" in answer.error_message
