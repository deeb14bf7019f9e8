"""Real processes for the system tests: a hub and agents, started with the real commands."""

import shutil
from contextlib import AsyncExitStack

import pytest

from deploy.demo.__main__ import certified_bundle
from deploy.demo.fleet import Process, script


@pytest.fixture
async def processes():
    """Stops whatever a test put on it."""
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture(scope="session")
def edge_bundle(tmp_path_factory):
    """The digits release, certified for this machine."""
    bundle, _ = certified_bundle(tmp_path_factory.mktemp("certified"))
    return bundle


@pytest.fixture
def make_hub(tmp_path, triton_directory, processes):
    """Return a function that starts a hub; more options may be given."""

    async def make(*options, name="hub", grpc="127.0.0.1:0", http="127.0.0.1:0"):
        command = (
            script("fogline"), "serve", "--data", str(tmp_path / name), "--grpc", grpc,
            "--http", http, "--models", str(triton_directory), *options,
        )  # fmt: skip
        hub = Process(name, command, tmp_path / name, ("grpc", "http"))
        processes.push_async_callback(hub.stop)
        await hub.start()
        return hub

    return make


@pytest.fixture
def make_agent(tmp_path, edge_bundle, processes):
    """Return a function that starts an agent of the given hub address."""

    async def make(name, hub, *options):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        command = (
            script("fogline-agent"), "run", "--device", name, "--data", str(tmp_path / name),
            "--hub", hub, "--bundle", str(edge_bundle), "--grpc", "127.0.0.1:0",
            "--http", "127.0.0.1:0", "--unix", str(tmp_path / f"{name}.sock"), *options,
        )  # fmt: skip
        agent = Process(name, command, tmp_path / name, ("grpc", "http", "unix"))
        processes.push_async_callback(agent.stop)
        await agent.start()
        return agent

    return make
