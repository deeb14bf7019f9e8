import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from edge_agent import Agent, AgentConfig, InferRequest, cli
from edge_agent.errors import ConfigRefused, ReleaseRefused, StartRefused
from fogline_protocol import grpcio_door
from fogline_protocol.client import Client
from fogline_protocol.errors import BadRequest, Overloaded
from fogline_protocol.score import Score
from fogline_protocol.v1 import fleet_pb2
from fogline_protocol.v1 import inference_pb2 as pb
from tests.edge_agent import bundles
from tests.edge_agent.bundles import SURE, UNSURE, rows
from tests.edge_agent.polling import until
from tests.fakes import FakeHub, Serving

INFER = "/inference.GRPCInferenceService/ModelInfer"


def config(tmp_path: Path, **changes: Any) -> AgentConfig:
    if not (tmp_path / "bundle").exists():
        bundles.make(tmp_path / "bundle")
    fields: dict[str, Any] = {
        "data": tmp_path / "data",
        "bundle": (tmp_path / "bundle",),
        "grpc": "127.0.0.1:0",
        "http": "127.0.0.1:0",
        "unix": str(tmp_path / "agent.sock"),
        "max_message_bytes": 1 << 17,
    }
    return AgentConfig(**{**fields, **changes})


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    async with Agent(config(tmp_path)) as running:
        yield running


async def test_the_addresses_in_use_are_written_once_all_doors_are_open(tmp_path: Path) -> None:
    file = tmp_path / "data" / "endpoints.json"
    async with Agent(config(tmp_path)) as agent:
        assert json.loads(file.read_text()) == agent.endpoints
        assert set(agent.endpoints) == {"grpc", "http", "unix"}
        assert agent.endpoints["unix"] == str(tmp_path / "agent.sock")
    assert not file.exists()
    assert not (tmp_path / "agent.sock").exists()


async def test_an_application_may_hold_the_agent_in_its_own_process(tmp_path: Path) -> None:
    async with Agent(config(tmp_path, grpc="off", http="off", unix="off")) as agent:
        assert agent.endpoints == {}
        response = await agent.infer(InferRequest("double", rows(SURE)), timeout_s=1.0)
        assert response.outputs["logits"].tolist() == [[10, 0, 0]]
        assert response.parameters["fogline.quality"] == "certified"


async def test_a_release_may_bring_a_score_of_its_own(tmp_path: Path) -> None:
    # Of [10, 0, 0] the log odds are 9.31 and the spread 4.71; of [0.2, 0, 0] -0.49 and 0.09.
    head = Score("logistic", "logits", {"bias": -3.0, "log_odds": 0.25, "spread": 1.0})
    bundles.make(tmp_path / "bundle", score=head)
    async with Agent(config(tmp_path, grpc="off", http="off", unix="off")) as agent:
        request = InferRequest(
            "double",
            rows(SURE, UNSURE),
            parameters={"fogline.per_row": True, "fogline.mode": "edge_only"},
        )
        response = await agent.infer(request, timeout_s=1.0)
    assert response.outputs["fogline.quality"].tolist() == [b"certified", b"degraded"]
    assert response.outputs["fogline.score"].tolist() == pytest.approx([0.983, 0.046], abs=1e-3)


@pytest.mark.parametrize("door", ["grpc", "unix"])
async def test_tritonclient_works_unmodified(agent: Agent, door: str) -> None:
    prefix = "unix:" if door == "unix" else ""
    client = triton.InferenceServerClient(prefix + agent.endpoints[door])
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("double")
    metadata = await client.get_model_metadata("double", as_json=True)
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "3"]}]
    tensor = triton.InferInput("x", [2, 3], "FP32")
    tensor.set_data_from_numpy(np.concatenate([SURE, UNSURE]))
    result = await client.infer(
        "double",
        [tensor],
        outputs=[triton.InferRequestedOutput("logits")],
        request_id="9",
        parameters={"fogline.per_row": True, "fogline.mode": "edge_only"},
        client_timeout=5.0,
    )
    assert result.as_numpy("logits")[:, 0].tolist() == pytest.approx([10, 0.2])
    assert result.as_numpy("fogline.quality").tolist() == [b"certified", b"degraded"]
    response = result.get_response()
    assert response.id == "9"
    assert response.parameters["fogline.tier"].string_param == "edge"
    assert response.parameters["fogline.reason"].string_param == "mode"
    assert 0.3 < response.parameters["fogline.score"].double_param < 0.4
    with pytest.raises(InferenceServerException, match="no model 'treble' on this device"):
        await client.get_model_metadata("treble")
    await client.close()


async def test_rest_says_the_same(agent: Agent) -> None:
    base = f"http://{agent.endpoints['http']}/v2"
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{base}/health/ready") as answer:
            assert answer.status == 200
        async with session.get(f"{base}/models/double") as answer:
            metadata = await answer.json()
            assert metadata["properties"]["fogline.release"] == "double@1.0.0"
        body = {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [[5, 0, 0]]}],
            "parameters": {"fogline.per_row": True},
        }
        async with session.post(f"{base}/models/double/infer", json=body) as answer:
            assert answer.status == 200
            document = await answer.json()
    assert document["parameters"]["fogline.tier"] == "edge"
    assert document["outputs"][0]["data"] == [10, 0, 0]
    assert {o["name"]: o["data"] for o in document["outputs"]}["fogline.tier"] == ["edge"]


async def test_rest_answers_no_page_that_has_pointed_its_name_here(agent: Agent) -> None:
    async with aiohttp.ClientSession() as session:
        for path in ("/v2", "/v2/models/double", "/nowhere"):
            url = f"http://{agent.endpoints['http']}{path}"
            async with session.get(url, headers={"Host": "evil.example"}) as answer:
                assert answer.status == 421


async def test_a_rest_caller_who_leaves_takes_its_work_along(
    tmp_path: Path, hub: FakeHub, door: Serving
) -> None:
    hub.gate.clear()
    body = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [0, 0, 0]}],
        "parameters": {"fogline.mode": "hub_only", "timeout": 60_000_000},
    }
    async with Agent(config(tmp_path, hub=door.address, max_concurrency=1)) as agent:
        assert agent.uplink is not None
        await until(lambda: agent.uplink is not None and agent.uplink.link_up)
        url = f"http://{agent.endpoints['http']}/v2/models/double/infer"
        async with aiohttp.ClientSession() as session:
            asked = asyncio.create_task(session.post(url, json=body))
            await until(lambda: hub.requests)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            async with asyncio.timeout(5):
                while True:  # the place that it held is free again
                    try:
                        await agent.infer(InferRequest("double", rows(SURE)))
                    except Overloaded:
                        await asyncio.sleep(0.01)
                    else:
                        break
        hub.gate.set()


def raw_request(**changes: Any) -> bytes:
    message = pb.ModelInferRequest(model_name=changes.get("model", "double"))
    message.inputs.add(
        name=changes.get("name", "x"),
        datatype=changes.get("datatype", "FP32"),
        shape=changes.get("shape", [1, 3]),
    )
    message.raw_input_contents.append(changes.get("raw", struct.pack("<3f", 5, 0, 0)))
    for key, value in changes.get("parameters", {}).items():
        message.parameters[key].string_param = value
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("data", "code", "text"),
    [
        (raw_request(model="treble"), "NOT_FOUND", "no model 'treble'"),
        (raw_request(name="y"), "INVALID_ARGUMENT", "input 'x' is missing"),
        (raw_request(shape=[1, 4], raw=bytes(16)), "INVALID_ARGUMENT", "expected shape [-1, 3]"),
        (raw_request(datatype="INT32"), "INVALID_ARGUMENT", "expected datatype FP32, got INT32"),
        (raw_request(datatype="FP33"), "INVALID_ARGUMENT", "unknown datatype 'FP33'"),
        (raw_request(raw=bytes(11)), "INVALID_ARGUMENT", "expected 12 bytes"),
        (raw_request(shape=[-1, 3]), "INVALID_ARGUMENT", "negative dimension"),
        (raw_request(parameters={"fogline.mode": "x"}), "INVALID_ARGUMENT", "must be one of"),
        (b"\xff\xff\xff", "INVALID_ARGUMENT", "malformed protobuf"),
        (raw_request(raw=bytes(1 << 18)), "RESOURCE_EXHAUSTED", "larger than max"),
    ],
)
async def test_bad_input_gets_a_precise_status_and_the_agent_keeps_serving(
    agent: Agent, data: bytes, code: str, text: str
) -> None:
    async with grpc.aio.insecure_channel(agent.endpoints["grpc"]) as channel:
        call: Any = channel.unary_unary(INFER)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(data, timeout=5.0)
        assert refused.value.code().name == code
        assert text in (refused.value.details() or "")
        assert await call(raw_request(), timeout=5.0)


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("treble", '{"inputs": []}', 404, "no model 'treble'"),
        ("double", "{not json", 400, "the body is not JSON"),
        ("double", "[]", 400, "the body must be an object"),
        ("double", '{"inputs": []}', 400, "input 'x' is missing"),
        ("double", f'"{"x" * (1 << 18)}"', 413, "too large"),
        ("double/versions/7", '{"inputs": []}', 404, "has version 1, got '7'"),
    ],
)
async def test_bad_json_gets_a_precise_status_too(
    agent: Agent, path: str, body: str, status: int, text: str
) -> None:
    url = f"http://{agent.endpoints['http']}/v2/models/{path}/infer"
    async with aiohttp.ClientSession() as session, session.post(url, data=body) as answer:
        assert answer.status == status
        assert text in (await answer.json())["error"]


async def test_a_data_directory_serves_one_agent(tmp_path: Path, agent: Agent) -> None:
    with pytest.raises(StartRefused, match="in use by another agent"):
        async with Agent(config(tmp_path, unix="off")):
            pass
    assert (tmp_path / "data" / "endpoints.json").exists()  # the other's, untouched


@pytest.mark.parametrize("door", ["grpc", "http"])
async def test_a_port_in_use_is_named_with_the_flag_that_changes_it(
    tmp_path: Path, door: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(StartRefused, match=rf"cannot listen on {address}.*--{door} HOST:PORT"):
            async with Agent(config(tmp_path, **{door: address})):
                pass
    async with Agent(config(tmp_path)):  # nothing is left that would prevent the next start
        pass


async def test_addresses_that_a_killed_agent_left_mislead_nobody(tmp_path: Path) -> None:
    left = tmp_path / "data" / "endpoints.json"
    left.parent.mkdir()
    left.write_text('{"grpc": "127.0.0.1:1"}')
    with pytest.raises(ReleaseRefused):
        async with Agent(config(tmp_path, bundle=(tmp_path / "gone",))):
            pass
    assert not left.exists()


async def test_a_socket_that_answers_is_left_alone_and_a_dead_one_replaced(
    tmp_path: Path, agent: Agent
) -> None:
    path = tmp_path / "agent.sock"
    with pytest.raises(StartRefused, match="another process serves on this socket"):
        async with Agent(config(tmp_path, data=tmp_path / "other")):
            pass
    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(dead))
    async with Agent(config(tmp_path, data=tmp_path / "other", unix=str(dead))) as other:
        client = Client(f"unix:{dead}")
        assert await client.server_ready(5.0)
        await client.close()
        assert other.endpoints["unix"] == str(dead)
    plain = tmp_path / "plain"
    plain.write_text("precious")
    with pytest.raises(StartRefused, match="a file that is not a socket"):
        async with Agent(config(tmp_path, data=tmp_path / "other", unix=str(plain))):
            pass
    assert plain.read_text() == "precious"
    with pytest.raises(StartRefused, match="there is no directory"):
        async with Agent(config(tmp_path, data=tmp_path / "other", unix=str(path / "x" / "y"))):
            pass


async def test_a_bundle_that_is_not_intact_prevents_the_start(tmp_path: Path) -> None:
    told = config(tmp_path)
    vectors = tmp_path / "bundle" / "selftest.npz"
    vectors.write_bytes(vectors.read_bytes()[:-1] + b"?")
    with pytest.raises(ReleaseRefused, match=r"selftest\.npz: SHA-256 is"):
        async with Agent(told):
            pass


async def test_an_unreadable_token_is_a_matter_of_configuration(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_bytes(b"\xff")
    with pytest.raises(ConfigRefused, match="not a token"):
        Agent(config(tmp_path, hub="hub.example:1", hub_token_file=token))


async def test_requests_in_flight_finish_before_the_agent_stops(
    tmp_path: Path, hub: FakeHub, door: Serving
) -> None:
    hub.gate.clear()
    async with Agent(config(tmp_path, hub=door.address, deadline_s=10.0)) as agent:
        assert agent.uplink is not None
        client = Client(agent.endpoints["grpc"])
        asked = asyncio.create_task(client.infer(InferRequest("double", rows(UNSURE)), 5.0))
        await until(lambda: hub.requests)

        async def open_later() -> None:
            await until(lambda: agent.router.draining)
            hub.gate.set()

        opening = asyncio.create_task(open_later())
    response = await asked
    assert response.parameters["fogline.tier"] == "hub"
    await opening
    await client.close()


async def test_rest_requests_in_flight_finish_before_the_agent_stops_too(
    tmp_path: Path, hub: FakeHub, door: Serving
) -> None:
    hub.gate.clear()
    body = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [0, 0, 0]}],
        "parameters": {"fogline.mode": "hub_only", "timeout": 10_000_000},
    }
    async with aiohttp.ClientSession() as session:
        async with Agent(config(tmp_path, hub=door.address)) as agent:
            await until(lambda: agent.uplink is not None and agent.uplink.link_up)
            url = f"http://{agent.endpoints['http']}/v2/models/double/infer"
            asked = asyncio.create_task(session.post(url, json=body))
            await until(lambda: hub.requests)

            async def open_later() -> None:
                await until(lambda: agent.router.draining)
                await asyncio.sleep(0.2)  # the doors close meanwhile
                hub.gate.set()

            opening = asyncio.create_task(open_later())
        assert (await asked).status == 200
        await opening


class FleetDoor:
    """The hub's side of telemetry, as a gRPC handler."""

    def __init__(self) -> None:
        self.reports: list[fleet_pb2.Telemetry] = []
        self.handler = grpcio_door.handler({"/fogline.v1.Fleet/Report": self._report})

    async def _report(self, data: bytes, _context: Any) -> bytes:
        self.reports.append(fleet_pb2.Telemetry.FromString(data))
        return fleet_pb2.TelemetryReceipt().SerializeToString()

    def rows(self) -> dict[tuple[str, str, str], int]:
        if not self.reports:
            return {}
        return {
            (o.tier, o.quality, o.reason): o.rows
            for model in self.reports[-1].models
            for o in model.outcomes
        }


async def test_the_hub_learns_what_was_counted_also_what_happened_while_it_was_gone(
    tmp_path: Path, hub: FakeHub
) -> None:
    fleet = FleetDoor()
    async with Serving(hub, [fleet.handler]) as door:
        told = config(tmp_path, hub=door.address, telemetry_interval_s=0.02, device="kitchen")
        async with Agent(told) as agent:
            await agent.infer(InferRequest("double", rows(SURE, UNSURE)))
            await until(lambda: len(fleet.rows()) == 2)
            await door.stop()
            for _ in range(3):
                await agent.infer(InferRequest("double", rows(UNSURE)))
            await door.start()
            await until(lambda: ("edge", "degraded", "link") in fleet.rows())
            assert fleet.rows() == {
                ("edge", "certified", "confident"): 1,
                ("hub", "hub", "uncertain"): 1,
                ("edge", "degraded", "link"): 3,
            }
            assert fleet.reports[-1].escalation_bytes_sent > 0
            await agent.infer(InferRequest("double", rows(SURE)))
        # the last report leaves while the agent stops
        assert fleet.rows()[("edge", "certified", "confident")] == 2
        assert {report.device for report in fleet.reports} == {"kitchen"}
        assert len({report.boot_id for report in fleet.reports}) == 1


async def test_several_models_are_served_side_by_side(tmp_path: Path) -> None:
    told = config(tmp_path, bundle=(bundles.DIGITS, bundles.make(tmp_path / "other").path))
    async with Agent(told) as agent:
        assert [r.label for r in agent.router.releases()] == ["digits@1.0.0", "double@1.0.0"]
        image = np.zeros((3, 1, 8, 8), np.float32)
        response = await agent.infer(InferRequest("digits", {"image": image}))
        assert response.outputs["logits"].shape == (3, 10)
        with pytest.raises(BadRequest):
            await agent.infer(InferRequest("double", {"image": image}))


async def test_a_start_says_where_models_come_from_and_what_is_kept_of_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    closed: dict[str, Any] = {"grpc": "off", "http": "off", "unix": "off", "bundle": ()}
    async with Agent(config(tmp_path, **closed)) as agent:
        assert "models    none: give --bundle DIR" in cli._screen(agent)
    told = config(tmp_path, **closed, hub="127.0.0.1:9", keep=("digit",))
    async with Agent(told) as agent:
        screen = cli._screen(agent)
    assert "models    none so far: the hub brings them, or give --bundle DIR" in screen
    assert "what escalates of digit (not served here now), to learn" in screen
    assert "keep digit: this device serves no model digit, only none so far" in caplog.text


async def test_an_answer_that_cannot_leave_is_no_success_in_the_statistics(tmp_path: Path) -> None:
    bundles.make(tmp_path / "bundle", onnx="text.onnx", paired=False, scored=False)
    classes = {"name": "t", "parameters": {"classification": 1}}
    async with Agent(config(tmp_path)) as agent, triton_client(agent) as client:

        def counted() -> tuple[int, int]:
            (found,) = agent.router.model_statistics("", "")
            return found.success.count, found.fail.count

        def asked(text: bytes) -> triton.InferInput:
            tensor = triton.InferInput("s", [1, 1], "BYTES")
            return tensor.set_data_from_numpy(np.array([[text]], object))

        await agent.infer(InferRequest("double", {"s": np.array([[b"x"]], object)}))
        await client.infer("double", [asked(b"x")])
        await until(lambda: counted() == (2, 0))
        with pytest.raises(InferenceServerException, match="classification needs numbers"):
            await client.infer(
                "double", [asked(b"x")], outputs=[triton.InferRequestedOutput("t", class_count=1)]
            )
        with pytest.raises(InferenceServerException, match="at most 131072 are sent"):
            await client.infer("double", [asked(b"x" * ((1 << 17) - 100))])
        body = {
            "inputs": [{"name": "s", "datatype": "BYTES", "shape": [1, 1], "data": ["x"]}],
            "outputs": [classes],
        }
        async with (
            aiohttp.ClientSession() as session,
            session.post(
                f"http://{agent.endpoints['http']}/v2/models/double/infer", json=body
            ) as answer,
        ):
            assert answer.status == 400
        await until(lambda: counted() == (2, 3))


def triton_client(agent: Agent) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(agent.endpoints["grpc"])
