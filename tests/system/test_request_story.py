"""The request story with real processes: application, agent, hub, and the loss of the hub."""

import asyncio
import signal
import time

import aiohttp
import numpy as np
import pytest

from fogline_protocol.client import Client
from fogline_protocol.errors import InferenceError
from fogline_protocol.inference import InferRequest

pytestmark = pytest.mark.system


@pytest.fixture(scope="session")
def traffic(digits):
    with np.load(digits / "traffic.npz") as file:
        return file["input.image"], file["label"]


async def ask(client, image, mode="prefer_edge", **parameters):
    request = InferRequest(
        "digits", {"image": image}, parameters={"fogline.mode": mode, **parameters}
    )
    return await client.infer(request, 5.0)


async def until(condition, what, limit_s=20.0):
    """Poll an asynchronous condition, with a deadline."""
    limit = time.monotonic() + limit_s
    while True:
        found = await condition()
        if found:
            return found
        assert time.monotonic() < limit, f"still not after {limit_s} s: {what}"
        await asyncio.sleep(0.05)


async def test_a_request_goes_all_the_way_and_survives_the_loss_of_the_hub(
    make_hub, make_agent, traffic, processes
):
    images, _ = traffic
    hub = await make_hub()
    first, second = await asyncio.gather(
        make_agent("first", hub.endpoints["grpc"]), make_agent("second", hub.endpoints["grpc"])
    )
    tcp = Client(first.endpoints["grpc"])
    unix = Client("unix:" + second.endpoints["unix"].removeprefix("unix:"))
    for client in (tcp, unix):
        processes.push_async_callback(client.close)

    # Steady: certain digits stay, the others escalate, and every answer says so.
    by_tier = {"edge": [], "hub": []}
    for at in range(120):
        client = (tcp, unix)[at % 2]
        answer = await ask(client, images[at : at + 1])
        tier = answer.parameters["fogline.tier"]
        by_tier[tier].append(at)
        assert answer.parameters["fogline.quality"] == {"edge": "certified", "hub": "hub"}[tier]
        assert 0 <= answer.parameters["fogline.score"] <= 1
        assert answer.parameters["fogline.release"]
        assert answer.parameters["fogline.reason"]
    assert len(by_tier["edge"]) > 60
    assert len(by_tier["hub"]) > 5

    # A batch is decided row by row and comes back in order.
    rows = by_tier["edge"][:3] + by_tier["hub"][:3]
    batch = await ask(tcp, images[rows], **{"fogline.per_row": True})
    assert batch.parameters["fogline.tier"] == "mixed"
    assert batch.outputs["fogline.tier"].tolist() == [b"edge"] * 3 + [b"hub"] * 3
    for at, logits in zip(rows, batch.outputs["logits"], strict=True):
        alone = await ask(tcp, images[at : at + 1])
        np.testing.assert_allclose(logits, alone.outputs["logits"][0], rtol=1e-3, atol=1e-3)

    # The hub is killed: nobody gets an error, and what was due for it is marked.
    await hub.stop(signal.SIGKILL)
    uncertain = by_tier["hub"][0]
    for at in [*range(30), uncertain]:
        answer = await ask((tcp, unix)[at % 2], images[at : at + 1])
        assert answer.parameters["fogline.tier"] == "edge"
        due = at in by_tier["hub"]
        assert answer.parameters["fogline.quality"] == ("degraded" if due else "certified")
        if due:
            assert answer.parameters["fogline.reason"] == "link"

    # It returns on the same data and ports, and escalation resumes by itself.
    hub.command = (*hub.command, "--grpc", hub.endpoints["grpc"], "--http", hub.endpoints["http"])
    await hub.start()

    async def escalates_again():
        answer = await ask(tcp, images[uncertain : uncertain + 1])
        return answer.parameters["fogline.tier"] == "hub"

    await until(escalates_again, "escalation resumes")


async def test_an_agent_starts_and_serves_without_any_hub(make_agent, traffic, processes):
    images, _ = traffic
    agent = await make_agent("alone", "127.0.0.1:9")
    client = Client(agent.endpoints["grpc"])
    processes.push_async_callback(client.close)
    qualities = set()
    for at in range(40):
        answer = await ask(client, images[at : at + 1])
        assert answer.parameters["fogline.tier"] == "edge"
        qualities.add(answer.parameters["fogline.quality"])
    assert qualities == {"certified", "degraded"}
    with pytest.raises(InferenceError):
        await ask(client, images[:1], "hub_only")


async def test_a_hub_killed_under_load_starts_again_with_its_history(
    make_hub, make_agent, traffic, processes
):
    images, _ = traffic
    hub = await make_hub()
    agent = await make_agent("device", hub.endpoints["grpc"], "--telemetry-interval-s", "0.2")
    client = Client(agent.endpoints["grpc"])
    processes.push_async_callback(client.close)
    stop = asyncio.Event()

    async def load():
        failed = 0
        at = 0
        while not stop.is_set():
            try:
                await ask(client, images[at % 100 : at % 100 + 1])
            except InferenceError:
                failed += 1
            at += 1
        return at, failed

    async def overview():
        url = f"http://{hub.endpoints['http']}/api/v1/overview"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            return await answer.json()

    async def counted(rows):
        return (await overview())["rows_total"] >= rows

    loads = [asyncio.create_task(load()) for _ in range(4)]
    hub.command = (*hub.command, "--grpc", hub.endpoints["grpc"], "--http", hub.endpoints["http"])
    for kills in range(1, 4):
        await until(lambda: counted(kills * 200), f"{kills * 200} rows are counted")  # noqa: B023
        await hub.stop(signal.SIGKILL)
        await hub.start()
    stop.set()
    outcomes = await asyncio.gather(*loads)
    assert sum(failed for _, failed in outcomes) == 0
    asked = sum(asked for asked, _ in outcomes)
    await until(lambda: counted(asked), "every row is counted")
    found = await overview()
    assert found["rows_total"] == asked
    assert found["agents_seen"] == 1


async def test_sigterm_lets_requests_in_flight_finish(make_hub, traffic, processes):
    images, _ = traffic
    hub = await make_hub("--threads", "1", "--max-queue-rows", "10000")
    client = Client(hub.endpoints["grpc"])
    processes.push_async_callback(client.close)
    big = InferRequest("digits-hub", {"image": np.tile(images[:64], (15, 1, 1, 1))})
    calls = [asyncio.create_task(client.infer(big, 30)) for _ in range(8)]
    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    await hub.stop(signal.SIGTERM)
    for answer in await asyncio.gather(*calls):
        assert answer.outputs["logits"].shape == (960, 10)
    assert hub.returncode == 0
