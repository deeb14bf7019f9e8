"""Switching releases under load: what a caller of the agent sees while it happens."""

import asyncio
import tempfile
import time
from pathlib import Path

import numpy as np

from edge_agent.agent import Agent
from edge_agent.config import AgentConfig
from edge_agent.runtime import release as releases
from fogline_protocol.client import Client
from fogline_protocol.errors import InferenceError
from fogline_protocol.inference import InferRequest

BUNDLES = Path("models/digits/bundles")
SECONDS = 4.0
CALLERS = 2


def main() -> None:
    """Measure and print."""
    asyncio.run(_measure())


async def _measure() -> None:
    first, second = BUNDLES / "digits-1.0.0", BUNDLES / "digits-1.1.0"
    with tempfile.TemporaryDirectory() as folder:
        config = AgentConfig(
            data=Path(folder), bundle=(first,), grpc="127.0.0.1:0", http="off", threads=1
        )
        async with Agent(config) as agent:
            client = Client(agent.endpoints["grpc"])
            quiet, _ = await _under_load(client)
            switched: list[Path] = []
            switching = asyncio.create_task(_keep_switching(agent, (second, first), switched))
            during, failed = await _under_load(client)
            switching.cancel()
            await client.close()
    print(f"p99 of local answers over gRPC while the release is switched {len(switched)} times in "
          f"{SECONDS:.0f} s: {during:.2f} ms, without: {quiet:.2f} ms, "
          f"ratio {during / quiet:.2f} (budget 1.5), failed {failed}")  # fmt: skip


async def _keep_switching(agent: Agent, bundles: tuple[Path, ...], switched: list[Path]) -> None:
    """Load and install one release after the other, as an update does, twice a second."""
    while True:
        for bundle in bundles:
            directory = await asyncio.to_thread(releases.read, bundle)
            agent.router.install(await asyncio.to_thread(releases.load, directory, threads=1))
            switched.append(bundle)
            await asyncio.sleep(0.5)


async def _under_load(client: Client) -> tuple[float, int]:
    image = np.random.default_rng(0).random((1, 1, 8, 8), np.float32)
    request = InferRequest("digits", {"image": image}, parameters={"fogline.mode": "edge_only"})
    taken: list[float] = []
    failed = 0
    end = time.perf_counter() + SECONDS

    async def call() -> None:
        nonlocal failed
        while time.perf_counter() < end:
            started = time.perf_counter()
            try:
                await client.infer(request, 2.0)
            except InferenceError:
                failed += 1
            taken.append(time.perf_counter() - started)
            await asyncio.sleep(0.004)  # steady, not saturating: a device has work to do

    await asyncio.gather(*(call() for _ in range(CALLERS)))
    return float(np.percentile(taken, 99)) * 1000, failed
