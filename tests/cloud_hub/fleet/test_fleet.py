"""The hub's side of the model story, joined, with a broker of its own."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update
from structlog.testing import capture_logs

from cloud_hub.errors import ModelRefused
from cloud_hub.fleet.devices import Device, Devices
from cloud_hub.fleet.fleet import Fleet
from cloud_hub.fleet.golden import Engine
from cloud_hub.fleet.link import REVISION, Arrival
from cloud_hub.store import schema
from cloud_hub.store.store import Store
from fogline_protocol import documents
from fogline_protocol.mqtt import BrokerAddress, MqttClient, Outgoing
from fogline_protocol.v1 import fleet_pb2 as pb
from tests.brokers import beside, client, eventually, needs_mosquitto, options

KIOSK = Device("kiosk", 0.0, 0.0, "1", "here", "closed", 1)


def no_engine(path: Path) -> Engine:
    raise ModelRefused("nothing runs here")


@dataclass
class Stage:
    store: Store
    devices: Devices
    fleet: Fleet
    counted: list[pb.Telemetry]

    async def tell(self, *said: Any) -> None:
        await self.fleet.controller.commit([Arrival("default", one.device, one) for one in said])

    def online(self) -> bool:
        return self.devices.online(KIOSK, 1.0)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    data = tmp_path / "data"
    data.mkdir()
    store = await Store.open(f"sqlite:///{data / 'hub.sqlite'}")
    devices = Devices([], 30.0)
    devices.seen(KIOSK)
    counted: list[pb.Telemetry] = []

    async def forget(device: str) -> None:
        devices.forget(device)

    fleet = Fleet(store, data, no_engine, devices, counted.append, forget)
    yield Stage(store, devices, fleet, counted)
    await store.close()


def state(online: bool, connection: int = 1) -> pb.DeviceState:
    return pb.DeviceState(schema=1, device="kiosk", online=online, boot=1, connection=connection)


RELEASE = {
    "model": "digits", "number": 1, "version": "1.0.0", "bundle_sha256": "a" * 64,
    "accepted_at": 0.0, "forced": False, "size_bytes": 1, "document": "{}",
    "index_document": "{}", "self_test": "{}", "report": "",
}  # fmt: skip


async def add_release(store: Store, **certificates: tuple[float, float | None]) -> None:
    """Insert a release; certificates are id = (expires in seconds, withdrawn at)."""
    certificate = {
        "model": "digits", "release": 1, "variant": "fp32", "hardware_class": "here",
        "issued_at": 0.0, "document": "{}", "attached_at": 0.0, "reason": "",
    }  # fmt: skip

    def write(connection: Any) -> None:
        connection.execute(insert(schema.release).values(**RELEASE))
        for name, (expires_in_s, withdrawn_at) in certificates.items():
            connection.execute(
                insert(schema.certificate).values(
                    **certificate,
                    id=name,
                    expires_at=time.time() + expires_in_s,
                    withdrawn_at=withdrawn_at,
                )
            )

    await store.write(write)


@contextlib.asynccontextmanager
async def device_of(fleet: Fleet) -> AsyncIterator[list[pb.Desired]]:
    """Hear the desired states of the kiosk."""
    heard: list[pb.Desired] = []

    async def listen(mqtt: MqttClient) -> None:
        async for message in mqtt.messages():
            heard.append(documents.parse(message.payload, pb.Desired(), ""))
            mqtt.ack(message)

    topic = "v1/default/d/kiosk/desired"
    wanted = options(BrokerAddress.parse(fleet.broker), "kiosk", topic)
    async with client(wanted) as mqtt, beside(listen(mqtt)):
        yield heard


async def test_presence_follows_the_newest_connection_only(stage: Stage) -> None:
    await stage.tell(state(True, 1), state(True, 2))
    await stage.tell(state(False, 1))  # the will of a connection that the device has left behind
    assert stage.online()
    await stage.tell(state(False, 2))
    assert not stage.online()


async def test_counts_from_the_broker_obey_the_rules_of_the_other_door(stage: Stage) -> None:
    hostile = pb.Telemetry(device="kiosk", boot_id="b", sequence=1)
    hostile.models.add(model="m").latencies.add(tier="edge", bounds_s=[2, 1], counts=[1])
    honest = pb.Telemetry(device="kiosk", boot_id="b", sequence=2)
    with capture_logs() as logs:
        await stage.tell(hostile, honest)
    assert stage.counted == [honest]
    assert [line["event"] for line in logs] == ["dropped counts"]


async def test_without_a_broker_the_reason_is_known_and_devices_are_told_so(
    stage: Stage,
) -> None:
    async with stage.fleet.running("off"):
        assert stage.fleet.trouble == "switched off with --mqtt off"
        assert not stage.fleet.broker_reached
        assert stage.fleet.contact("http://h:1") == pb.ContactResponse(
            http="http://h:1", reported_revision=REVISION
        )


@needs_mosquitto
async def test_devices_are_told_where_broker_and_files_are_once_both_are_there(
    stage: Stage,
) -> None:
    async with stage.fleet.running(""):
        await eventually(lambda: stage.fleet.broker_reached)
        told = stage.fleet.contact("http://127.0.0.1:8000")
        assert (told.mqtt, told.http) == (stage.fleet.broker, "http://127.0.0.1:8000")
        assert told.reported_revision == REVISION
        # The gRPC door opens before the HTTP door has a port.
        assert stage.fleet.contact("http://") == pb.ContactResponse()


@needs_mosquitto
async def test_a_wish_reaches_the_device_with_the_certificates_that_hold(stage: Stage) -> None:
    async with stage.fleet.running(""), device_of(stage.fleet) as heard:
        await add_release(stage.store, holds=(60, None), expired=(-1, None), withdrawn=(60, 1.0))
        await stage.tell(state(True))
        await stage.fleet.controller.want(None, "digits", 1)
        await eventually(lambda: heard)
    (wanted,) = heard[-1].releases
    assert (wanted.index_target, list(wanted.certificate_targets)) == (
        "digits/1/index.json",
        ["certificates/digits/1/holds.json"],
    )


@needs_mosquitto
async def test_what_devices_say_over_the_broker_is_kept(stage: Stage) -> None:
    async with stage.fleet.running(""):
        address = BrokerAddress.parse(stage.fleet.broker)
        await eventually(lambda: stage.fleet.broker_reached)
        async with client(options(address, "kiosk")) as mqtt:
            report = pb.Reported(schema=1, device="kiosk", sequence=7)
            await mqtt.publish(Outgoing("v1/default/d/kiosk/reported", documents.canonical(report)))
            async with asyncio.timeout(20):
                while not (twins := await stage.fleet.controller.twins()):
                    await asyncio.sleep(0.005)
    assert [twin.reported.sequence for twin in twins] == [7]


@needs_mosquitto
async def test_a_part_that_fails_is_logged_with_its_trace_and_started_again(stage: Stage) -> None:
    """A row that no version of us wrote stands for a mistake of our own."""
    twin = schema.twin
    await add_release(stage.store)
    await stage.tell(state(True))

    def damage(text: str) -> Any:
        return lambda c: c.execute(update(twin).values(desired=text, generation=5))

    await stage.store.write(damage("no JSON"))
    with capture_logs() as logs:
        async with stage.fleet.running(""), device_of(stage.fleet) as heard:
            await eventually(lambda: [line for line in logs if "started again" in line["event"]])
            await stage.store.write(damage('{"digits": 1}'))
            await eventually(lambda: heard)
            assert stage.fleet.broker_reached
    failures = [line for line in logs if "started again" in line["event"]]
    assert {line["part"] for line in failures} == {"devices"}
    assert all(line["exc_info"] for line in failures)
    published = select(twin.c.published_generation)
    assert heard[-1].generation == 5
    assert await stage.store.read(lambda c: c.execute(published).scalar()) in (0, 5)
