"""What the console reads of devices: since when they are there, and how their rows ended."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import Connection

from cloud_hub.fleet.controller import Answered, Controller
from cloud_hub.fleet.devices import Device, Devices
from cloud_hub.fleet.link import Arrival
from cloud_hub.fleet.outbox import WantedRelease
from cloud_hub.store import schema
from cloud_hub.store.store import Store
from fogline_protocol.v1 import fleet_pb2 as pb


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await Store.open(f"sqlite:///{tmp_path / 'hub.sqlite'}")
    yield opened
    await opened.close()


def device(name: str, at: float) -> Device:
    return Device(name, at, at, "0.1.0", "x86_64/cpu", "closed", 1)


def wanted(connection: Connection, model: str, number: int) -> WantedRelease:
    return WantedRelease(model, number, "1.0.0", "index", ())


def controller(store: Store) -> Controller:
    return Controller(store, wanted=wanted, telemetry=lambda _: None, seen=lambda _: None)


def test_a_device_is_online_since_it_returned_and_silent_since_it_was_last_seen() -> None:
    devices = Devices([], offline_after_s=30)
    for at in (100, 110, 120):
        devices.seen(device("kiosk", at))
    (kiosk,) = devices.all()
    assert devices.since(kiosk, now=130) == 100
    assert devices.since(kiosk, now=150) == 120  # silent for 30 s
    devices.seen(device("kiosk", 160))
    devices.seen(device("kiosk", 170))
    assert devices.since(devices.all()[0], now=171) == 160


def test_a_will_ends_a_presence() -> None:
    devices = Devices([], offline_after_s=30)
    devices.seen(device("kiosk", 100))
    devices.left("kiosk")
    devices.seen(device("kiosk", 105))
    assert devices.since(devices.all()[0], now=106) == 105


def test_after_a_restart_of_the_hub_presence_counts_from_what_it_knew() -> None:
    devices = Devices([device("kiosk", 100)], offline_after_s=30)
    devices.seen(device("kiosk", 110))
    assert devices.since(devices.all()[0], now=111) == 100


async def test_rows_are_counted_by_outcome_since_a_moment(store: Store) -> None:
    def count(connection: Connection) -> None:
        for name in ("kiosk", "gate"):
            connection.execute(
                schema.device.insert().values(
                    name=name,
                    first_seen=0,
                    last_seen=0,
                    agent_version="",
                    hardware_class="",
                    link="",
                    rss_bytes=0,
                )
            )
        for minute, name, tier, rows in (
            (9, "kiosk", "edge", 1000),  # too old
            (10, "kiosk", "edge", 3),
            (11, "kiosk", "edge", 4),
            (11, "kiosk", "hub", 9),
            (11, "gate", "hub", 50),
        ):
            connection.execute(
                schema.outcome.insert().values(
                    minute=minute,
                    device=name,
                    model="digits",
                    release="digits@1",
                    tier=tier,
                    quality="certified",
                    reason="score",
                    rows=rows,
                )
            )

    await store.write(count)
    assert await controller(store).answered("kiosk", since=630.0) == [
        Answered("digits", "hub", "certified", "score", 9),
        Answered("digits", "edge", "certified", "score", 7),
    ]
    assert await controller(store).answered("nobody", since=0) == []


async def test_every_change_raises_the_revision_and_reading_does_not(store: Store) -> None:
    one = controller(store)
    await one.commit([Arrival("default", "kiosk", pb.Reported(schema=1, sequence=1))])
    assert one.revision == 1
    await one.want(["kiosk"], "digits", 1)
    assert one.revision == 2
    await one.broker_forgot()
    assert one.revision == 3
    await one.twins()
    await one.events("kiosk")
    assert one.revision == 3
