"""The model story with real processes: push, want, fetch, test, switch, refuse, converge."""

import asyncio
import datetime
import json
import shutil
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from cloud_hub import operate
from cloud_hub.operate import OperationRefused
from deploy.demo.__main__ import BETTER_BUNDLE, BROKEN_BUNDLE, HUB_BUNDLE, certified_bundle
from deploy.demo.fleet import script
from deploy.demo.operator import Operator
from deploy.demo.traffic import GrpcApplication, Stream
from edge_agent.runtime.providers import CPU, hardware_class
from fogline_protocol import release

pytestmark = pytest.mark.system


@pytest.fixture(scope="session")
def traffic(digits):
    with np.load(digits / "traffic.npz") as file:
        return file["input.image"]


@pytest.fixture(scope="session")
def better_bundle(tmp_path_factory):
    bundle, _ = certified_bundle(tmp_path_factory.mktemp("better"), BETTER_BUNDLE)
    return bundle


@pytest.fixture
async def fleet(make_hub, make_agent, processes):
    """A hub that can be restarted at its addresses, two agents, their applications, an operator."""
    hub = await make_hub()
    hub.command = (*hub.command, "--grpc", hub.endpoints["grpc"], "--http", hub.endpoints["http"])
    options = ("--probation-s", "0.5", "--telemetry-interval-s", "0.2")
    agents = await asyncio.gather(
        *(make_agent(name, hub.endpoints["grpc"], *options) for name in ("first", "second"))
    )
    apps = []
    for agent in agents:
        apps.append(GrpcApplication("unix:" + agent.endpoints["unix"].removeprefix("unix:")))
        processes.push_async_callback(apps[-1].close)
    fleet = SimpleNamespace(hub=hub, agents=agents, apps=apps)
    fleet.operator = Operator(fleet)
    await fleet.operator.push(HUB_BUNDLE)
    await until_known(fleet)
    return fleet


async def until_known(fleet):
    """Wait until the hub has met every device."""
    limit = time.monotonic() + 30
    while len(await fleet.operator.devices()) < len(fleet.agents):
        assert time.monotonic() < limit, "the devices did not report in 30 s"
        await asyncio.sleep(0.05)


async def test_a_better_release_is_taken_and_a_broken_one_refused_under_load(
    fleet, better_bundle, traffic
):
    better = await fleet.operator.push(better_bundle)
    with pytest.raises(OperationRefused, match=r"self-test/failed.*top answer"):
        await fleet.operator.push(BROKEN_BUNDLE)
    broken = await fleet.operator.push(BROKEN_BUNDLE, force=True)
    async with Stream(fleet.apps, traffic, 40.0) as stream:
        await fleet.operator.want(better)
        assert await fleet.operator.until_committed(better) == 2
        switched = len(stream.answers)
        await fleet.operator.want(broken)
        refusals = await fleet.operator.until_refused(broken)
        assert set(refusals.values()) == {"self-test/deviation"}
        assert len(refusals) == 2
        # What they had is wanted again, and there is nothing left to complain about.
        await fleet.operator.want(better)
        assert await fleet.operator.until_committed(better) == 2
    assert stream.failed == 0
    assert {answer.release for answer in stream.answers[switched + 5 :]} == {"digits@1.1.0"}
    for device in await fleet.operator.devices():
        assert device["standing"] == "current"


async def test_devices_say_which_variant_answers_before_and_after_an_update(fleet, better_bundle):
    async def answering(release):
        """Return what all devices say that answers of a release, 0 being by hand."""
        limit = time.monotonic() + 30
        while True:
            said = [
                model["serving"]
                for device in await fleet.operator.devices()
                for model in device["models"]
                if model["active_release"] == str(release) and "serving" in model
            ]
            if len(said) == len(fleet.agents):
                return said
            assert time.monotonic() < limit, said
            await asyncio.sleep(0.05)

    for serving in await answering(0):
        assert serving["variant"] in ("int8-qdq", "fp32")
        assert serving["hardware_class"] == hardware_class(CPU)
    await fleet.operator.want(await fleet.operator.push(better_bundle))
    for serving in await answering(1):
        # It is certified for this very machine, so nothing of it is left aside.
        assert (serving["variant"], serving["provider"]) == ("int8-qdq", CPU)
        assert (serving["meant_variant"], serving["meant_provider"]) == ("int8-qdq", CPU)
        assert (len(serving["certificate"]), serving["aside"]) == (16, "")


async def fogline(*words):
    """Run the operator's real command and return what it printed."""
    command = await asyncio.create_subprocess_exec(
        script("fogline"), *map(str, words), stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await command.communicate()
    assert command.returncode == 0, printed
    return json.loads(printed)


async def until_answered(apps, image, quality, certificate=None):
    """Ask until every application is answered like this; return the seconds that it took."""
    began = time.monotonic()
    for app in apps:
        while True:
            _, said = await app.ask(image, "prefer_edge")
            if (
                said["fogline.quality"] == quality
                and said.get("fogline.certificate") == certificate
            ):
                break
            assert time.monotonic() < began + 30, said
            await asyncio.sleep(0.02)
    return time.monotonic() - began


async def test_a_certificate_is_withdrawn_and_issued_again_in_the_field(
    fleet, better_bundle, traffic, tmp_path
):
    better = await fleet.operator.push(better_bundle)
    here = ("--data", fleet.hub.data, "--json")
    known = {c.id: c for c in release.read(better_bundle).certificates}
    for id, certificate in known.items():
        if certificate.variant != "int8-qdq":  # else devices would go over to that variant
            await fogline("certificate", "withdraw", better, id, "--reason", "unused", *here)
    await fleet.operator.want(better)
    assert await fleet.operator.until_committed(better) == 2
    first, second = fleet.apps
    (serving,) = {m["serving"]["certificate"]
                  for d in await fleet.operator.devices() for m in d["models"]}  # fmt: skip
    certificate = known[serving]
    for n in range(len(traffic)):  # until one that the device answers by itself
        sure = traffic[n : n + 1]
        if (await second.ask(sure, "edge_only"))[1]["fogline.quality"] == "certified":
            break
    await until_answered(fleet.apps, sure, "certified", certificate.id)
    victim = fleet.agents[0]
    async with Stream([second], traffic, 40.0) as stream:
        gone = await fogline(
            "certificate", "withdraw", better, certificate.id, "--reason", "drift", *here
        )
        assert gone["devices"] == ["first", "second"]
        # Whether it has heard of it or not: it must not matter.
        await victim.stop(signal.SIGKILL)
        assert await until_answered([second], sure, "hub") < 5.0
        withdrawn = len(stream.answers)
        await victim.start()
        assert await until_answered([first], sure, "hub") < 10.0
    assert {answer.quality for answer in stream.answers[withdrawn:]} == {"hub"}
    another = replace(certificate, issued_at=datetime.datetime.now(datetime.UTC))
    file = tmp_path / "another.json"
    file.write_bytes(another.to_json())
    async with Stream(fleet.apps, traffic, 40.0) as loaded:
        (made,) = await fogline("certificate", "issue", better, file, *here)
        assert (made["id"], made["devices"]) == (another.id, ["first", "second"])
        assert await until_answered(fleet.apps, sure, "certified", another.id) < 5.0
    assert (stream.failed, loaded.failed) == (0, 0)
    assert {answer.release for answer in stream.answers + loaded.answers} == {"digits@1.1.0"}
    assert await fleet.operator.until_committed(better) == 2
    for device in await fleet.operator.devices():
        (model,) = device["models"]
        assert model["serving"]["certificate"] == another.id


async def test_a_hub_killed_right_after_a_withdrawal_tells_it_after_its_return(
    fleet, better_bundle, traffic
):
    better = await fleet.operator.push(better_bundle)
    await fleet.operator.want(better)
    assert await fleet.operator.until_committed(better) == 2
    url = operate.HubUrl(f"http://{fleet.hub.endpoints['http']}")
    path = f"/api/v1/releases/{better.replace('@', '/')}/certificates"
    fleet_broker(fleet).kill()  # so that nothing can leave before the hub dies
    for one in await operate.call(url, "GET", f"/api/v1/certificates?model={better.split('@')[0]}"):
        await operate.call(url, "POST", f"{path}/{one['id']}/withdrawal", body={"reason": "drift"})
    await fleet.hub.stop(signal.SIGKILL)
    await fleet.hub.start()
    await until_answered(fleet.apps, traffic[:1], "hub")
    for device in await fleet.operator.devices():
        assert device["models"][0]["active_release"] == "1"


async def test_a_broker_that_dies_and_comes_back_empty_costs_nothing(fleet, better_bundle):
    better = await fleet.operator.push(better_bundle)
    broker = fleet_broker(fleet)
    broker.kill()
    await fleet.operator.want(better)
    assert await fleet.operator.until_committed(better) == 2


async def test_a_hub_killed_with_a_wish_unpublished_publishes_it_after_its_return(
    fleet, better_bundle
):
    better = await fleet.operator.push(better_bundle)
    fleet_broker(fleet).kill()  # so that nothing can leave before the hub dies
    await fleet.operator.want(better)
    await fleet.hub.stop(signal.SIGKILL)
    await fleet.hub.start()
    assert await fleet.operator.until_committed(better) == 2


async def test_a_device_killed_while_it_downloads_arrives_after_its_return(fleet, better_bundle):
    better = await fleet.operator.push(better_bundle)
    victim = fleet.agents[0]
    models = victim.data / "releases" / "models"
    await fleet.operator.want(better)
    limit = time.monotonic() + 30
    while not any(models.glob("*/*.part")) and time.monotonic() < limit:
        await asyncio.sleep(0.001)
    await victim.stop(signal.SIGKILL)
    await victim.start()
    assert await fleet.operator.until_committed(better) == 2


async def test_a_device_starts_from_what_it_has_without_any_hub(
    fleet, better_bundle, traffic, processes
):
    better = await fleet.operator.push(better_bundle)
    await fleet.operator.want(better)
    assert await fleet.operator.until_committed(better) == 2
    await fleet.hub.stop(signal.SIGKILL)
    device = fleet.agents[0]
    await device.stop(signal.SIGKILL)
    await device.start()
    application = GrpcApplication("unix:" + device.endpoints["unix"].removeprefix("unix:"))
    processes.push_async_callback(application.close)
    _, said = await application.ask(traffic[:1], "edge_only")
    assert said["fogline.release"] == "digits@1.1.0"


async def test_a_device_whose_release_rotted_falls_back_to_the_one_before(
    fleet, better_bundle, traffic, processes
):
    better = await fleet.operator.push(better_bundle)
    await fleet.operator.want(better)
    assert await fleet.operator.until_committed(better) == 2
    device = fleet.agents[0]
    await device.stop(signal.SIGKILL)
    for model in (device.data / "releases" / "models").glob("*/*/variants/*.onnx"):
        content = bytearray(model.read_bytes())
        content[len(content) // 2] ^= 1
        copy = model.with_suffix(".rotten")
        copy.write_bytes(content)
        shutil.move(copy, model)
    await device.start()
    application = GrpcApplication("unix:" + device.endpoints["unix"].removeprefix("unix:"))
    processes.push_async_callback(application.close)
    _, said = await application.ask(traffic[:1], "edge_only")
    assert said["fogline.release"] in ("digits@1.0.0", "digits@1.1.0")
    # The hub is there, so the damaged release is fetched again.
    assert await fleet.operator.until_committed(better) == 2


def fleet_broker(fleet):
    """Return the hub's broker process."""
    import psutil

    for child in psutil.Process(fleet.hub.pid).children(recursive=True):
        if child.name() == "mosquitto":
            return child
    raise AssertionError("the hub runs no broker")
