"""A hub that starts: who is answered when, before all of it is there."""

import asyncio
import contextlib
import subprocess
import sys
import time
from dataclasses import replace

import grpc
import numpy as np
import pytest

from cloud_hub.config import HubConfig
from cloud_hub.errors import StartRefused, StoreFailed
from cloud_hub.fleet import reports
from cloud_hub.fleet.fleet import Fleet
from cloud_hub.hub import Hub
from cloud_hub.store.store import Store
from fogline_protocol import grpc_service
from fogline_protocol.client import Client
from fogline_protocol.errors import NotFound, Unavailable
from fogline_protocol.inference import InferRequest
from fogline_protocol.v1.fleet_pb2 import Telemetry
from tests.edge_agent.polling import until

IMAGE = {"image": np.zeros((1, 1, 8, 8), np.float32)}


@pytest.fixture
def config(tmp_path, triton_directory):
    return HubConfig(
        data=tmp_path / "hub", grpc="127.0.0.1:0", http="127.0.0.1:0", mqtt="off",
        models=triton_directory, threads=1,
    )  # fmt: skip


@pytest.fixture
def fleet(monkeypatch):
    """A fleet that starts when it is let."""
    gate = asyncio.Event()
    running = Fleet.running

    @contextlib.asynccontextmanager
    async def gated(self, mqtt):
        await gate.wait()
        async with running(self, mqtt):
            yield

    monkeypatch.setattr(Fleet, "running", gated)
    return gate


async def test_models_of_the_directory_answer_while_the_fleet_starts(config, fleet):
    hub = Hub(config)
    async with contextlib.AsyncExitStack() as stack:
        starting = asyncio.create_task(stack.enter_async_context(hub))
        await until(lambda: hub.grpc_address)
        client = Client(hub.grpc_address)
        stack.push_async_callback(client.close)
        assert (await client.infer(InferRequest("digits-hub", IMAGE), 10)).outputs
        assert not await client.server_ready(10)
        # It may be one of the registry's: its caller is to come back.
        with pytest.raises(Unavailable, match="starting"):
            await client.infer(InferRequest("other", IMAGE), 10)
        contact = f"/{reports.SERVICE}/Contact"
        asked = reports.ContactRequest(device="dev").SerializeToString()
        assert await client.call(contact, asked, 10) == b""
        assert not (config.data / "endpoints.json").exists()

        fleet.set()
        await starting
        assert await client.server_ready(10)
        with pytest.raises(NotFound):
            await client.infer(InferRequest("other", IMAGE), 10)
        assert await client.call(contact, asked, 10) != b""
        assert (config.data / "endpoints.json").exists()


async def test_a_start_that_fails_late_closes_the_door_that_was_open(config, fleet):
    hub = Hub(config)
    starting = asyncio.create_task(hub.__aenter__())
    await until(lambda: hub.grpc_address)
    starting.cancel()
    await asyncio.wait([starting])
    host, _, port = hub.grpc_address.rpartition(":")
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, int(port))
    fleet.set()
    async with Hub(config):  # and the data directory is free again
        pass


@pytest.fixture
def database(monkeypatch):
    """A database that opens when it is let."""
    gate = asyncio.Event()
    opening = Store.open

    async def gated(url):
        await gate.wait()
        return await opening(url)

    monkeypatch.setattr(Store, "open", gated)
    return gate


async def test_callers_are_answered_and_counts_put_off_until_the_database_is_open(config, database):
    database.set()
    async with Hub(config) as hub:
        secret = await hub.identity.create("acme", "", 60.0, time.time())
    database.clear()
    hub = Hub(config)
    async with contextlib.AsyncExitStack() as stack:
        starting = asyncio.create_task(stack.enter_async_context(hub))
        await until(lambda: hub.grpc_address)
        client = Client(hub.grpc_address)
        stack.push_async_callback(client.close)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(hub.grpc_address))
        live = channel.unary_unary(f"/{grpc_service.SERVICE}/ServerLive")
        known, stranger = (
            live(b"", metadata=(("authorization", f"Bearer {token}"),), timeout=20)
            for token in (secret, "fgl_nobody")
        )
        await live(b"")  # on the connection of the other two, after them
        assert not known.done()
        assert not stranger.done()
        assert (await client.infer(InferRequest("digits-hub", IMAGE), 10)).outputs
        report = Telemetry(device="dev", boot_id="b", sequence=1).SerializeToString()
        with pytest.raises(Unavailable, match="starting"):
            await client.call(f"/{reports.SERVICE}/Report", report, 10)

        database.set()
        await starting
        await known
        with pytest.raises(grpc.aio.AioRpcError, match="the token is unknown"):
            await stranger
        await client.call(f"/{reports.SERVICE}/Report", report, 10)
        assert [device.name for device in hub.devices.all()] == ["dev"]


async def test_a_door_for_other_machines_stays_closed_until_tokens_are_known(
    config, database, monkeypatch
):
    monkeypatch.setattr("cloud_hub.hub.is_loopback", lambda address: address == config.http)
    hub = Hub(replace(config, grpc="localhost:0"))
    starting = asyncio.create_task(hub.__aenter__())
    await until(lambda: hub.repository.find_all("", ""))
    assert not hub.grpc_address
    database.set()
    with pytest.raises(StartRefused, match="no valid token exists"):
        await starting
    assert not hub.grpc_address


async def test_a_hub_whose_database_cannot_be_opened_does_not_stay(config):
    config.data.mkdir()
    (config.data / "hub.sqlite").write_bytes(b"no database, whatever its name " * 99)
    hub = Hub(config)
    with pytest.raises(StoreFailed, match="file is not a database"):
        await hub.__aenter__()
    host, _, port = hub.grpc_address.rpartition(":")
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, int(port))


# Each of them takes megabytes and tens of milliseconds: what a start must do without.
HEAVY = {
    "aiohttp", "alembic", "cryptography", "grpc", "jinja2", "paho", "pydantic", "rich",
    "sqlalchemy", "tuf",
}  # fmt: skip


def test_what_the_first_answer_does_not_need_is_not_imported_before_it():
    program = f"""
import sys
import cloud_hub.cli, cloud_hub.hub
assert not {HEAVY} & sys.modules.keys(), {HEAVY} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_a_hub_at_rest_does_not_need_is_never_imported(tmp_path, triton_directory):
    program = f"""
import asyncio, sys
from pathlib import Path
import cloud_hub.cli  # as the command does
from cloud_hub.config import HubConfig
from cloud_hub.hub import Hub

async def main():
    config = HubConfig(
        data=Path({str(tmp_path / "hub")!r}), models=Path({str(triton_directory)!r}),
        grpc="127.0.0.1:0", http="127.0.0.1:0", mqtt="off", threads=1,
    )
    async with Hub(config):
        unwanted = {{"alembic", "grpc", "psycopg", "pydantic", "rich"}} & sys.modules.keys()
        assert not unwanted, unwanted

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", program], check=True)
