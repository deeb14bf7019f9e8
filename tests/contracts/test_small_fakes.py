"""The small fakes of single test files keep the same promises as what they stand for."""

from types import SimpleNamespace

import pytest

from cloud_hub.fleet import reports
from edge_agent.fleet.telemetry import REPORT
from edge_agent.inference.uplink import Uplink
from fogline_protocol import grpcio_door
from fogline_protocol.client import Client
from fogline_protocol.errors import InferenceError
from fogline_protocol.v1 import fleet_pb2 as pb
from tests.edge_agent.fleet.test_telemetry import Hub
from tests.edge_agent.test_agent import FleetDoor

REPORTED = pb.Telemetry(device="kiosk", boot_id="b", sequence=1).SerializeToString()


@pytest.fixture(params=["real", "fake"])
async def fleet_door(request):
    """The address of a door that takes reports, and what has arrived behind it."""
    server = grpcio_door.new_server()
    if request.param == "fake":
        door = FleetDoor()
        handler, arrived = door.handler, door.reports
    else:
        arrived = []
        handler = grpcio_door.handler(reports.methods(arrived.append, pb.ContactResponse))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield SimpleNamespace(address=f"127.0.0.1:{port}", arrived=arrived)
    await server.stop(None)


async def test_a_fleet_door_takes_a_report_and_answers_with_a_receipt(fleet_door):
    client = Client(fleet_door.address)
    answer = await client.call(REPORT, REPORTED, 10)
    assert pb.TelemetryReceipt.FromString(answer) == pb.TelemetryReceipt()
    assert [report.device for report in fleet_door.arrived] == ["kiosk"]
    await client.close()


@pytest.fixture(params=["real", "fake"])
async def hub(request, fleet_door):
    """What telemetry reports to: the uplink, or its stand-in."""
    if request.param == "fake":
        yield Hub()
        return
    async with Uplink(lambda: Client(fleet_door.address)) as uplink:
        yield uplink


async def test_a_hub_answers_a_report_or_raises_an_error_of_the_protocol(hub):
    assert isinstance(hub.link_up, bool)
    assert isinstance(await hub.call(REPORT, REPORTED, 10), bytes)
    if isinstance(hub, Hub):
        hub.error = InferenceError("gone")
        with pytest.raises(InferenceError):
            await hub.call(REPORT, REPORTED, 10)
    else:
        with pytest.raises(InferenceError):
            await hub.call("/fogline.v1.Fleet/Nothing", REPORTED, 10)
