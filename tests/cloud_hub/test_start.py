"""A hub that starts: who is answered when, before all of it is there."""

import asyncio
import contextlib
import subprocess
import sys

import numpy as np
import pytest

from cloud_hub.config import HubConfig
from cloud_hub.fleet import reports
from cloud_hub.fleet.fleet import Fleet
from cloud_hub.hub import Hub
from fogline_protocol.client import Client
from fogline_protocol.errors import NotFound, Unavailable
from fogline_protocol.inference import InferRequest
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


def test_what_the_first_answer_does_not_need_is_not_imported_before_it():
    program = """
import sys
import cloud_hub.cli, cloud_hub.hub
heavy = {"aiohttp", "alembic", "cryptography", "jinja2", "paho", "rich", "tuf"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
