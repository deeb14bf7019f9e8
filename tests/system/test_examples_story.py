"""Hard examples come back: real agents escalate, a real hub keeps, and the workshop can read it."""

import asyncio
import json
import signal
import subprocess
import time
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from deploy.demo.fleet import script
from fogline_models.data import read
from fogline_protocol import release
from fogline_protocol.client import Client
from fogline_protocol.errors import InferenceError
from fogline_protocol.inference import InferRequest

pytestmark = pytest.mark.system

QUOTA = ("--examples-quota-bytes", "100000000")


@pytest.fixture(scope="session")
def images(digits):
    with np.load(digits / "traffic.npz") as file:
        return file["input.image"]


async def ask(client, rows, **parameters):
    """Ask for everything to be answered by the hub as well, so that each row is an escalation."""
    named = {f"fogline.{key}": value for key, value in parameters.items()}
    request = InferRequest(
        "digits", {"image": rows}, parameters={"fogline.mode": "prefer_hub", **named}
    )
    answer = await client.infer(request, 20.0)
    assert answer.parameters["fogline.tier"] == "hub"
    return answer.outputs["logits"]


async def kept(hub, tenant=None):
    """Return how many examples of digits there are, by tenant's list of the hub."""
    url = f"http://{hub.endpoints['http']}/api/v1/examples"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        found = await answer.json()
    return {one["model"]: one["examples"] for one in found["models"]}


async def until_kept(hub, wanted, limit_s=20.0):
    limit = time.monotonic() + limit_s
    while (found := await kept(hub)) != wanted:
        assert time.monotonic() < limit, f"still {found}, expected {wanted}"
        await asyncio.sleep(0.05)


async def fogline(hub, *words, code=0):
    command = [script("fogline"), "data", *words, "--data", str(hub.data)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


async def exported(hub, path: Path, *options):
    await fogline(hub, "export", "digits", "--out", str(path), *options)
    with np.load(path) as file:
        return dict(file)


async def connected(processes, agent):
    client = Client(agent.endpoints["grpc"])
    processes.push_async_callback(client.close)
    return client


async def test_what_a_device_lets_the_hub_keep_comes_back_as_a_data_set(
    make_hub, make_agent, images, processes, edge_bundle, digits, tmp_path
):
    hub = await make_hub(*QUOTA)
    keeping, silent = await asyncio.gather(
        make_agent("keeping", hub.endpoints["grpc"], "--keep", "digits"),
        make_agent("silent", hub.endpoints["grpc"]),
    )
    one, other = await connected(processes, keeping), await connected(processes, silent)

    # The first answer tells the device that this hub keeps examples; from then on it sends its own.
    await ask(one, images[:1])
    local = await ask_edge(one, images[1:33])
    hub_says = await ask(one, images[1:33], source="writer-7")
    await ask(one, images[1:3], source="writer-7")  # again: the same content
    await ask(one, images[40:42], keep=False)  # an application may object
    # Without consent nothing is kept; an application may give it, request by request.
    await ask(other, images[50:60])
    await ask(other, images[60:61], keep=True)
    await ask(other, images[61:62], keep=True)
    # Private ones never leave the device, whoever consents.
    private = InferRequest(
        "digits", {"image": images[70:75]},
        parameters={"fogline.mode": "prefer_hub", "fogline.private": True, "fogline.keep": True},
    )  # fmt: skip
    answer = await one.infer(private, 20.0)
    assert answer.parameters["fogline.tier"] == "edge"
    await until_kept(hub, {"digits": 33})

    found = await exported(hub, tmp_path / "hard.npz", "--since", "1h")
    mine = found["device"] == "keeping"
    assert mine.sum() == 32
    inputs = found["input.image"][mine]
    order = [
        next(i for i, row in enumerate(inputs) if np.array_equal(row, image))
        for image in images[1:33]
    ]
    np.testing.assert_allclose(found["hub_logits"][mine][order], hub_says, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found["edge_logits"][mine][order], local, rtol=1e-3, atol=1e-3)
    assert (found["label"] == found["hub_logits"].argmax(axis=1)).all()
    assert (found["edge_label"] == found["edge_logits"].argmax(axis=1)).all()
    assert found["count"][mine][order].tolist() == [2, 2] + [1] * 30
    assert set(found["propensity"]) == {1.0}
    assert set(found["reason"]) == {"preferred"}
    assert set(found["source"]) == {"writer-7", ""}
    assert len(set(found["scene"][mine])) == 1
    bundle = release.read(edge_bundle)
    assert set(found["edge_sha256"]) <= {bundle.variant_sha256(v) for v in bundle.bundle.variants}
    assert set(found["edge_release"]) == {"digits@1.0.0"}
    assert set(found["hub_model"]) == {"digits-hub"}
    # The workshop reads it as it is.
    data = read(tmp_path / "hard.npz")
    assert data.inputs["image"].shape == (33, 1, 8, 8)
    assert "Not a uniform sample" in data.sampling

    # One device is forgotten; what it alone sent is gone, and the other's stays.
    assert "32 examples" in await fogline(hub, "delete", "--device", "keeping")
    assert await kept(hub) == {"digits": 1}
    assert "no example of digits is selected" in await fogline(
        hub, "export", "digits", "--device", "keeping", "--out", str(tmp_path / "none.npz"), code=6
    )
    assert not (tmp_path / "none.npz").exists()


async def ask_edge(client, rows):
    request = InferRequest("digits", {"image": rows}, parameters={"fogline.mode": "edge_only"})
    return (await client.infer(request, 20.0)).outputs["logits"]


async def test_audited_answers_make_the_examples_speak_of_all_requests(
    make_hub, make_agent, images, processes, tmp_path
):
    hub = await make_hub(*QUOTA)
    agent = await make_agent(
        "device", hub.endpoints["grpc"], "--keep", "digits", "--audit-rate", "0.5"
    )
    client = await connected(processes, agent)
    await ask(client, images[:1])  # tells the device that this hub keeps examples
    asked = len(np.unique(images[1:401], axis=0))
    for at in range(1, 401, 50):
        await client.infer(InferRequest("digits", {"image": images[at : at + 50]}), 20.0)
    limit = time.monotonic() + 20
    while True:  # audits come behind the answers; then nothing changes any more
        before = await kept(hub)
        await asyncio.sleep(0.5)
        if before == await kept(hub):
            break
        assert time.monotonic() < limit
    found = await exported(hub, tmp_path / "all.npz")
    audited = found["reason"] == "audit"
    assert set(found["reason"]) == {"uncertain", "audit"}
    assert set(found["propensity"][audited]) == {0.5}
    assert set(found["propensity"][~audited]) == {1.0}
    sure, unsure = found["edge_score"][audited], found["edge_score"][~audited]
    assert sure.min() > unsure.max()
    # Each stands for as many requests as its propensity says; six standard errors of a coin.
    standing_for = (1 / found["propensity"]).sum()
    assert abs(standing_for - asked) < 6 * np.sqrt(asked)


async def test_a_hub_killed_while_it_keeps_loses_at_most_what_was_queued(
    make_hub, make_agent, images, processes, tmp_path
):
    hub = await make_hub(*QUOTA)
    hub.command = (*hub.command, "--grpc", hub.endpoints["grpc"], "--http", hub.endpoints["http"])
    agent = await make_agent("device", hub.endpoints["grpc"], "--keep", "digits")
    client = await connected(processes, agent)
    stop = asyncio.Event()
    asked = failed = 0

    async def load(number):
        nonlocal asked, failed
        noise = np.random.default_rng(number)
        while not stop.is_set():
            rows = images[:8] + noise.random((8, 1, 8, 8), np.float32)
            request = InferRequest(
                "digits", {"image": rows}, parameters={"fogline.mode": "prefer_hub"}
            )
            try:
                await client.infer(request, 5.0)
                asked += 1
            except InferenceError:
                failed += 1

    loads = [asyncio.create_task(load(number)) for number in range(3)]
    seen = 0
    try:
        for _ in range(3):
            limit = time.monotonic() + 30
            while (await kept(hub)).get("digits", 0) < seen + 100:
                assert time.monotonic() < limit, "examples are not kept again"
                await asyncio.sleep(0.05)
            seen = (await kept(hub))["digits"]
            await hub.stop(signal.SIGKILL)
            await hub.start()
            assert (await kept(hub))["digits"] >= seen  # what was on the disk, is
    finally:
        stop.set()
        await asyncio.gather(*loads)
    assert failed == 0
    assert asked > 30
    found = await exported(hub, tmp_path / "x.npz", "--json")
    now = (await kept(hub))["digits"]
    assert len(found["label"]) == now
    assert len(set(found["sha256"].tolist())) == now
    assert set(found["count"]) == {1}
    # The export checks every file against its name, and left none out.
    told = json.loads(
        await fogline(hub, "export", "digits", "--json", "--out", str(tmp_path / "y.npz"))
    )
    assert told["left_out"] == 0
