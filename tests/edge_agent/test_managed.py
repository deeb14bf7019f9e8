"""What a hub changes on a device, with real brokers, a real uplink and a real router."""

import asyncio
import contextlib
import itertools
import json
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from cloud_hub.config import HubConfig
from cloud_hub.fleet import reports
from cloud_hub.hub import Hub
from edge_agent import agent as agents
from edge_agent.config import AgentConfig
from edge_agent.errors import ReleaseRefused, StartRefused
from edge_agent.fleet.telemetry import Telemetry
from edge_agent.inference.router import Router
from edge_agent.inference.uplink import Uplink
from edge_agent.managed import Managed, Pauses
from edge_agent.runtime.providers import CPU, hardware_class
from edge_agent.update.disk import LocalDisk
from edge_agent.update.slots import Pointer, Slots, Target
from fogline_protocol import documents, grpcio_door, release
from fogline_protocol.errors import Unavailable
from fogline_protocol.inference import InferRequest
from fogline_protocol.mqtt import BrokerAddress, MqttClient, Outgoing
from fogline_protocol.v1 import fleet_pb2 as pb
from tests.brokers import beside, broker, client, eventually, needs_mosquitto, options
from tests.edge_agent import bundles
from tests.edge_agent.bundles import NOW, SURE, rows
from tests.fakes import FakeHub, Serving

DESIRED = "v1/default/d/dev/desired"
EPOCH = "v1/default/hub/epoch"
NO_FILES = "http://127.0.0.1:9"
QUICK = Pauses(ask_s=0.05, accept_s=0.05, restart_s=0.01)


class Contacts:
    """A hub's gRPC door that tells where the rest is."""

    def __init__(self, mqtt: object = "", http: str = NO_FILES, revision: int = 1) -> None:
        self.mqtt = str(mqtt)
        self.http = http
        self.revision = revision
        self.asked = 0
        self.door = Serving(
            FakeHub(), [grpcio_door.handler(reports.methods(lambda _: None, self._tell))]
        )

    def _tell(self) -> pb.ContactResponse:
        self.asked += 1
        return pb.ContactResponse(mqtt=self.mqtt, http=self.http, reported_revision=self.revision)


class Ear:
    """Hears what the device says, and says what a hub would."""

    def __init__(self, mqtt: MqttClient) -> None:
        self._mqtt = mqtt
        self.births: list[pb.DeviceState] = []
        self.reports: list[pb.Reported] = []

    async def listen(self) -> None:
        async for message in self._mqtt.messages():
            if message.topic.endswith("/reported"):
                self.reports.append(documents.parse(message.payload, pb.Reported(), ""))
            else:
                state = documents.parse(message.payload, pb.DeviceState(), "")
                if state.online:
                    self.births.append(state)
            self._mqtt.ack(message)

    async def wants(self, document: bytes) -> None:
        await self._mqtt.publish(Outgoing(DESIRED, document, retain=True))

    async def begins(self, epoch: str) -> None:
        told = documents.canonical(pb.HubEpoch(epoch=epoch))
        await self._mqtt.publish(Outgoing(EPOCH, told, retain=True))

    def codes(self, generation: int) -> set[str]:
        """Return the codes in all reports about a generation."""
        return {
            model.code
            for report in self.reports
            if report.generation == generation
            for model in report.models
        }


@contextlib.asynccontextmanager
async def ear(address: BrokerAddress) -> AsyncIterator[Ear]:
    topics = ("v1/default/d/+/reported", "v1/default/d/+/state")
    async with client(options(address, "hub", *topics)) as mqtt:
        listening = Ear(mqtt)
        async with beside(listening.listen()):
            yield listening


def desired(generation: int, **fields: Any) -> bytes:
    release = pb.DesiredRelease(
        model="double", release=1, version="1.0.0", index_target="double/1/index.json"
    )
    document = pb.Desired(schema=1, generation=generation, hub_epoch="e", releases=[release])
    return json.dumps({**json.loads(documents.canonical(document)), **fields}).encode()


def config(tmp_path: Path, hub: str, **changes: Any) -> AgentConfig:
    (tmp_path / "data").mkdir(exist_ok=True)
    return AgentConfig(
        **{
            "data": tmp_path / "data",
            "device": "dev",
            "hub": hub,
            "probation_s": 0.05,
            "threads": 1,
            **changes,
        }
    )


@contextlib.asynccontextmanager
async def made(
    options: AgentConfig, uplink: Any = None, **more: Any
) -> AsyncIterator[tuple[Managed, Router]]:
    """Join the parts as an agent does; nothing is restored and nothing runs yet."""
    async with contextlib.AsyncExitStack() as stack:
        if uplink is None:
            uplink = Uplink(agents.connection(options), max_rows=8, max_requests=2)
            await stack.enter_async_context(uplink)
        observer = Telemetry(
            device="dev", hardware_class="here", link=lambda: agents.Link("no hub", 0, 0)
        )
        router = Router(
            uplink=None, observer=observer, private=False, deadline_s=2.0, max_concurrency=8
        )
        stack.callback(router.close)
        yield Managed(options, router, uplink, version="1", hardware="here", **more), router


@contextlib.asynccontextmanager
async def managed(
    options: AgentConfig, uplink: Any = None, **more: Any
) -> AsyncIterator[tuple[Managed, Router]]:
    """The same, restored and running."""
    async with made(options, uplink, **more) as (part, router):
        await part.restore()
        async with beside(part.run()):
            yield part, router


async def answer(router: Router, model: str = "double") -> tuple[list[float], str]:
    """Return an answer of the device and the release that gave it."""
    response = await router.infer(InferRequest(model, rows(SURE)), None)
    return response.outputs["logits"][0].tolist(), str(response.parameters["fogline.release"])


# Where the hub is


@needs_mosquitto
async def test_the_hub_is_asked_remembered_and_found_again_without_being_asked(
    tmp_path: Path,
) -> None:
    async with broker(tmp_path) as mosquitto, ear(mosquitto.address) as hub:
        contacts = Contacts(mosquitto.address)
        async with contacts.door as door:
            options = config(tmp_path, door.address)
            async with managed(options):
                await eventually(lambda: hub.births and hub.reports)
        said = json.loads((options.data / "contact.json").read_text())
        assert said == {
            "mqtt": str(mosquitto.address),
            "http": NO_FILES,
            "reported_revision": 1,
        }
        # The next start: the broker is there, the hub's own door is not.
        async with managed(options):
            await eventually(lambda: len(hub.births) == 2)
        first, second = hub.births
        assert second.boot > first.boot
        assert [r.sequence for r in hub.reports] == sorted({r.sequence for r in hub.reports})


@needs_mosquitto
async def test_a_hub_that_is_not_there_yet_and_one_without_a_broker_are_asked_again(
    tmp_path: Path,
) -> None:
    contacts = Contacts()
    async with contacts.door as door:
        options = config(tmp_path, door.address)
    async with (
        managed(options, pauses=QUICK),
        broker(tmp_path) as mosquitto,
        ear(mosquitto.address) as hub,
        contacts.door,
    ):
        await eventually(lambda: contacts.asked >= 2)
        contacts.mqtt = str(mosquitto.address)
        await eventually(lambda: hub.births)


@needs_mosquitto
async def test_a_broker_that_moved_is_followed_within_seconds(tmp_path: Path) -> None:
    contacts = Contacts()
    async with contacts.door as door:
        options = config(tmp_path, door.address)
        async with broker(tmp_path / "old") as old, ear(old.address) as before:
            contacts.mqtt = str(old.address)
            part = await _enter(managed(options))
            await eventually(lambda: before.births)
        async with broker(tmp_path / "new") as new, ear(new.address) as after:
            assert new.address != old.address
            contacts.mqtt = str(new.address)
            await eventually(lambda: after.births and after.reports, within_s=10)
            # Each link counts its connections anew, and the hub must not take this for the past.
            assert after.births[0].boot > before.births[-1].boot
            await part.aclose()


async def _enter(context: Any) -> contextlib.AsyncExitStack:
    stack = contextlib.AsyncExitStack()
    await stack.enter_async_context(context)
    return stack


@needs_mosquitto
async def test_files_that_moved_are_noticed_although_the_broker_stayed(tmp_path: Path) -> None:
    async with broker(tmp_path) as mosquitto, ear(mosquitto.address) as hub:
        contacts = Contacts(mosquitto.address)
        async with contacts.door as door:
            options = config(tmp_path, door.address)
            async with managed(options):
                await eventually(lambda: hub.births and hub.reports)
                contacts.http = "http://127.0.0.1:10"
                await hub.begins("after-restart")
                file = options.data / "contact.json"
                await eventually(lambda: "127.0.0.1:10" in file.read_text(), within_s=10)
                await eventually(lambda: len(hub.births) >= 2)


@needs_mosquitto
async def test_addresses_that_cannot_be_used_are_said_once_and_asked_again(
    tmp_path: Path,
) -> None:
    """A token travels over TLS only, so files without it are refused before anything is asked."""
    (tmp_path / "token").write_text("fgl_x")

    async with broker(tmp_path) as mosquitto, ear(mosquitto.address) as hub:

        class Door:
            http = "http://hub.example:8000"
            asked = 0

            async def call(self, path: str, request: bytes, timeout_s: float) -> bytes:
                self.asked += 1
                told = pb.ContactResponse(mqtt=str(mosquitto.address), http=self.http)
                return told.SerializeToString()

        door = Door()
        options = config(
            tmp_path,
            "hub.example:8001",
            hub_token_file=tmp_path / "token",
        )
        with capture_logs() as logs:
            async with managed(options, door, pauses=QUICK):
                await eventually(lambda: door.asked >= 5)
                door.http = "https://hub.example:8000"
                await eventually(lambda: hub.births)
        said = [line for line in logs if "cannot be used" in line["event"]]
        assert len(said) == 1
        assert "TLS only" in said[0]["why"]


# What the hub wants


@needs_mosquitto
async def test_what_is_wanted_is_fetched_committed_served_and_kept(
    tmp_path: Path, digits: Path
) -> None:
    options = HubConfig(data=tmp_path / "hub", grpc="127.0.0.1:0", http="127.0.0.1:0", threads=1)
    async with Hub(options) as hub:
        await hub.fleet.releases.accept(digits / "bundles" / "digits-hub-1.0.0")
        await hub.fleet.releases.accept(digits / "bundles" / "digits-1.0.0")
        device = config(tmp_path, hub.grpc_address)
        async with managed(device) as (part, router):
            known: list[Any] = []

            async def standing() -> str:
                known[:] = await hub.fleet.controller.twins()
                return known[0].standing if known else ""

            await until(standing, "idle")
            await hub.fleet.controller.want(None, "digits", 1)
            await until(standing, "current")
            serving = router.serving("digits")
            assert serving is not None
            assert (serving.label, serving.number) == ("digits@1.0.0", 1)
            (model,) = known[0].reported.models
            assert (model.serving.variant, model.serving.provider) == (
                serving.choice.variant.name,
                serving.choice.provider,
            )
            assert (model.serving.meant_variant, model.serving.meant_provider) == (
                serving.choice.meant
            )
            phases = [event.phase for event in await hub.fleet.controller.events("dev")]
            assert phases[0] == "committed"
            assert part.generation() == 1
        address = hub.grpc_address
    # A start without any hub serves it, and the hub that returns elsewhere is found.
    (tmp_path / "hub" / "broker" / "port").unlink()
    async with managed(device) as (_, router):
        serving = router.serving("digits")
        assert serving is not None
        assert serving.number == 1
        with socket.socket() as taken:  # so that the broker cannot have its old port
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", BrokerAddress.parse(hub.fleet.broker).port))
            taken.listen()
            async with Hub(replace(options, grpc=address)) as again:
                assert again.fleet.broker != hub.fleet.broker
                began = again.fleet.controller
                assert [one.connected for one in await began.twins()] == [False]

                async def connected() -> str:
                    return str((await began.twins())[0].connected)

                await until(connected, "True")


@needs_mosquitto
async def test_certificates_are_issued_replaced_and_withdrawn_under_a_running_release(
    tmp_path: Path, digits: Path
) -> None:
    options = HubConfig(data=tmp_path / "hub", grpc="127.0.0.1:0", http="127.0.0.1:0", threads=1)
    async with Hub(options) as hub:
        fleet = hub.fleet
        await fleet.releases.accept(digits / "bundles" / "digits-hub-1.0.0")
        await fleet.releases.accept(digits / "bundles" / "digits-1.0.0")
        for one in await fleet.certificates.list("digits"):
            await fleet.certificates.withdraw("digits", 1, one.id, reason="before the test")
        device = config(tmp_path, hub.grpc_address)
        async with managed(device) as (_, router):

            async def standing() -> str:
                known = await fleet.controller.twins()
                return known[0].standing if known else ""

            async def told() -> str:
                (model,) = (await fleet.controller.twins())[0].reported.models
                return str(model.serving.certificate)

            def answers() -> tuple[str, object]:
                serving = router.serving("digits")
                assert serving is not None
                certificate = serving.choice.certificate
                return (certificate.id if certificate is not None else "", serving.engine)

            await until(standing, "idle")
            await fleet.controller.want(None, "digits", 1)
            await until(standing, "current")
            serving = router.serving("digits")
            assert serving is not None
            assert answers() == ("", serving.engine)
            installed = len(await fleet.controller.events("dev"))
            (known, *_) = release.read(digits / "bundles" / "digits-1.0.0").certificates
            first = replace(
                known,
                variant=serving.choice.variant.name,
                variant_sha256=serving.directory.variant_sha256(serving.choice.variant),
                hardware_class=hardware_class(CPU),
                issued_at=NOW - timedelta(days=1),
                expires_at=NOW + timedelta(days=1),
            )
            second = replace(first, issued_at=NOW)
            # What it was measured with is another machine, so it is nothing to this device.
            other = replace(first, hardware_class="aarch64/CPUExecutionProvider/x", issued_at=NOW)
            for change, left in (
                (first, first.id),
                (other, first.id),
                (second, second.id),
                (first.id, second.id),
                (second.id, ""),
                (first, first.id),
            ):
                if isinstance(change, str):
                    await fleet.certificates.withdraw("digits", 1, change, reason="a test")
                else:
                    await fleet.certificates.issue("digits", 1, change)
                await until(told, left)
                await until(standing, "current")
                assert answers() == (left, serving.engine)
            since = len(await fleet.controller.events("dev")) - installed
            phases = [event.phase for event in await fleet.controller.events("dev")][:since]
            assert set(phases) == {"committed", "downloading"}
            slots = device.data / "releases" / "models" / "digits"
            assert len(list(slots.iterdir())) == 2
        # It is away while the certificate goes, and starts without any hub.
        await fleet.certificates.withdraw("digits", 1, first.id, reason="a test")
        async with made(device, NoHub()) as (part, router):
            await part.restore()
            assert answers()[0] == first.id
        async with managed(device) as (_, router):
            await until(told, "")
    async with made(device, NoHub()) as (part, router):
        await part.restore()
        assert answers()[0] == ""


@needs_mosquitto
async def test_what_answers_in_the_place_of_a_refused_release_loses_its_certificate_too(
    tmp_path: Path, digits: Path
) -> None:
    options = HubConfig(data=tmp_path / "hub", grpc="127.0.0.1:0", http="127.0.0.1:0", threads=1)
    async with Hub(options) as hub:
        fleet = hub.fleet
        await fleet.releases.accept(digits / "bundles" / "digits-hub-1.0.0")
        await fleet.releases.accept(digits / "bundles" / "digits-1.0.0")
        await fleet.releases.accept(digits / "bundles" / "broken" / "digits-1.2.0", force=True)
        (known, *_) = await fleet.certificates.list("digits", 1)
        bundle = release.read(digits / "bundles" / "digits-1.0.0")
        first = bundle.bundle.variants[0]
        here = replace(
            known.certificate,
            variant=first.name,
            variant_sha256=bundle.variant_sha256(first),
            hardware_class=hardware_class(CPU),
            issued_at=NOW,
        )
        await fleet.certificates.issue("digits", 1, here)
        async with managed(config(tmp_path, hub.grpc_address)):

            async def standing() -> str:
                known = await fleet.controller.twins()
                return known[0].standing if known else ""

            async def told() -> str:
                for model in (await fleet.controller.twins())[0].reported.models:
                    return f"{model.active_release} {model.serving.certificate}"
                return ""

            await until(standing, "idle")
            await fleet.controller.want(None, "digits", 1)
            await until(told, f"1 {here.id}")
            await until(standing, "current")
            await fleet.controller.want(None, "digits", 2)
            await until(standing, "failed")
            assert await told() == f"1 {here.id}"
            change = await fleet.certificates.withdraw("digits", 1, here.id, reason="a test")
            assert change.devices == ["dev"]
            others = {one.id for one in await fleet.certificates.list("digits", 1)} - {here.id}
            async with asyncio.timeout(30):
                while (await told()).partition(" ")[2] not in {"", *others}:
                    await asyncio.sleep(0.01)
            await until(standing, "failed")


class NoHub:
    """A way to a hub that is away."""

    async def call(self, path: str, request: bytes, timeout_s: float) -> bytes:
        raise Unavailable("nobody is there")


async def until(value: Callable[[], Any], wanted: str) -> None:
    async with asyncio.timeout(30):
        while (found := await value()) != wanted:
            await asyncio.sleep(0.01)
    assert found == wanted


@needs_mosquitto
async def test_what_is_refused_is_reported_with_its_code_and_the_next_wish_is_heard(
    tmp_path: Path,
) -> None:
    bundles.make(tmp_path / "bundle")
    async with broker(tmp_path) as mosquitto, ear(mosquitto.address) as hub:
        contacts = Contacts(mosquitto.address)
        async with contacts.door as door:
            options = config(tmp_path, door.address, bundle=(tmp_path / "bundle",))
            async with managed(options) as (part, router):
                await eventually(lambda: hub.reports)
                await hub.wants(b"no json")
                await eventually(lambda: "desired/malformed" in hub.codes(0))
                await hub.wants(desired(3, schema=2))
                await eventually(lambda: "desired/schema" in hub.codes(0))
                await hub.wants(desired(4, releases=[{"model": "../up", "release": "1"}]))
                await eventually(lambda: "desired/model" in hub.codes(4))
                await hub.wants(desired(1 << 53))
                await eventually(lambda: "desired/malformed" in hub.codes(1 << 53))
                told = len(hub.reports)
                await hub.wants(b"")  # an operator cleared the topic
                await hub.wants(desired(5))
                await eventually(lambda: part.generation() == 5)
                await eventually(lambda: any(r.generation == 5 for r in hub.reports))
                assert {r.generation for r in hub.reports[told:]} == {5}
                # Older ones are an ordinary event.
                await hub.wants(desired(2))
                assert await answer(router) == ([10, 0, 0], "double@1.0.0")
                assert part.generation() == 5


@needs_mosquitto
async def test_a_wish_that_the_disk_does_not_take_is_reported_and_accepted_later(
    tmp_path: Path,
) -> None:
    async with (
        broker(tmp_path) as mosquitto,
        ear(mosquitto.address) as hub,
        Contacts(mosquitto.address).door as door,
    ):
        options = config(tmp_path, door.address)
        async with managed(options, pauses=QUICK) as (part, _):
            await eventually(lambda: hub.reports)
            obstacle = options.data / "releases" / "device.json.tmp"
            obstacle.mkdir()
            await hub.wants(desired(7))
            await eventually(lambda: hub.codes(7))
            assert hub.codes(7) == {"disk/fault"}
            assert part.generation() == 0
            obstacle.rmdir()
            await eventually(lambda: part.generation() == 7)


# What answers


@needs_mosquitto
async def test_a_bundle_given_by_hand_is_reported_with_its_variant_from_the_start(
    tmp_path: Path,
) -> None:
    made = bundles.make(tmp_path / "bundle", variants=("int8", "fp32"), certified=False)
    certificate = bundles.add_certificate(made, "fp32")
    async with broker(tmp_path) as mosquitto, ear(mosquitto.address) as hub:
        async with Contacts(mosquitto.address).door as door:
            options = config(tmp_path, door.address, bundle=(tmp_path / "bundle",))
            async with managed(options):
                await eventually(lambda: any(r.models[0].serving.variant for r in hub.reports))
        (model,) = hub.reports[-1].models
        assert (model.model, model.active_release, model.active_version) == ("double", 0, "1.0.0")
        assert (model.phase, model.desired_release) == ("committed", 0)
        assert model.serving == pb.Serving(
            variant="fp32",
            provider="CPUExecutionProvider",
            hardware_class=certificate.hardware_class,
            certificate=certificate.id,
            meant_variant="int8",
            meant_provider="CPUExecutionProvider",
            aside="int8 on CPUExecutionProvider: no certificate was issued for it",
        )


@needs_mosquitto
async def test_an_older_hub_hears_nothing_that_it_cannot_read_and_a_newer_one_at_once_all(
    tmp_path: Path,
) -> None:
    bundles.make(tmp_path / "bundle")
    async with broker(tmp_path) as mosquitto, ear(mosquitto.address) as hub:
        contacts = Contacts(mosquitto.address, revision=0)
        async with contacts.door as door:
            options = config(tmp_path, door.address, bundle=(tmp_path / "bundle",))
            async with managed(options, pauses=QUICK):
                await eventually(lambda: hub.reports and contacts.asked >= 2)
                assert not any(m.HasField("serving") for r in hub.reports for m in r.models)
                contacts.revision = 1
                await hub.begins("the hub was updated")
                await eventually(lambda: hub.reports[-1].models[0].serving.variant == "fp32")
                contacts.revision = 0
                await hub.begins("and taken back")
                await eventually(lambda: not hub.reports[-1].models[0].HasField("serving"))
                assert len(hub.births) == 1  # nobody had to connect anew for it


@needs_mosquitto
async def test_another_variant_of_the_same_release_is_reported_by_itself(tmp_path: Path) -> None:
    bundles.make(tmp_path / "hub", variants=("int8", "fp32"), certified=False)

    def said() -> tuple[int, str] | None:
        for model in hub.reports[-1].models if hub.reports else ():
            return model.active_release, model.serving.variant
        return None

    async with broker(tmp_path) as mosquitto, ear(mosquitto.address) as hub:
        async with Contacts(mosquitto.address).door as door:
            options = config(tmp_path, door.address)
            commit(options.data / "releases", tmp_path / "hub", number=4)
            async with managed(options) as (_, router):
                await eventually(lambda: said() == (4, "int8"))
                serving = router.serving("double")
                assert serving is not None
            # A certificate of the other variant has come, and nothing else.
            bundles.add_certificate(serving.directory, "fp32")
            async with managed(options):
                await eventually(lambda: said() == (4, "fp32"))
        assert [r.generation for r in hub.reports] == [0] * len(hub.reports)


@needs_mosquitto
async def test_a_refused_wish_leaves_what_was_installed_by_hand_as_it_is(tmp_path: Path) -> None:
    bundles.make(tmp_path / "bundle")
    async with broker(tmp_path) as mosquitto, ear(mosquitto.address) as hub:
        async with Contacts(mosquitto.address).door as door:
            options = config(tmp_path, door.address, bundle=(tmp_path / "bundle",))
            async with managed(options):
                await eventually(lambda: hub.reports)
                await hub.wants(desired(3, releases=[{"model": "../up", "release": "1"}]))
                await eventually(lambda: hub.codes(3))
        nobody, double = hub.reports[-1].models
        assert (nobody.model, nobody.phase, nobody.code) == ("", "rejected", "desired/model")
        assert (double.model, double.phase, double.code) == ("double", "committed", "")


# What the device has


def commit(root: Path, bundle: Path, number: int = 1) -> None:
    """Leave on the disk what an updater leaves after it committed to a bundle."""
    root.mkdir(parents=True, exist_ok=True)
    slots = Slots(LocalDisk(root))
    slots.open()
    model = json.loads((bundle / "bundle.json").read_text())
    target = Target(
        model["model"], number, model["version"], f"{model['model']}/{number}/index.json"
    )
    shutil.copytree(bundle, root / slots.stage(target), dirs_exist_ok=True)
    slots.seal(target, {})
    slots.put(Pointer(target.model, generation=1, committed=target))


def unloadable(path: Path) -> Path:
    """Write a bundle that is intact and no runtime loads."""
    bundles.make(path, version="2.0.0")
    (path / "fp32.onnx").write_bytes(b"no model")
    root = json.loads((path / "bundle.json").read_text())
    root["files"]["fp32.onnx"] = {
        "sha256": documents.sha256(b"no model"),
        "bytes": "8",
    }
    (path / "bundle.json").write_text(json.dumps(root))
    return path


async def test_a_committed_release_wins_over_the_bundle_given_by_hand(tmp_path: Path) -> None:
    bundles.make(tmp_path / "hand")
    bundles.make(tmp_path / "hub", version="2.0.0")
    options = config(tmp_path, "127.0.0.1:9", bundle=(tmp_path / "hand",))
    commit(options.data / "releases", tmp_path / "hub", number=4)
    async with made(options) as (part, router):
        await part.restore()
        assert (await answer(router))[1] == "double@2.0.0"
        # Taking it back leads to what was there before the hub.
        await part.serving.activate("double", None)
        assert (await answer(router))[1] == "double@1.0.0"
        # Until the slots say so, too, nothing is claimed of what answers.
        part._revision = 1
        (model,) = documents.parse(await part.report(), pb.Reported(), "").models
        assert (model.active_release, model.HasField("serving")) == (4, False)


async def test_a_committed_release_that_does_not_load_any_more_gives_way_and_the_hub_learns_it(
    tmp_path: Path,
) -> None:
    bundles.make(tmp_path / "hand")
    options = config(tmp_path, "127.0.0.1:9", bundle=(tmp_path / "hand",))
    commit(options.data / "releases", unloadable(tmp_path / "hub"), number=4)
    async with made(options) as (part, router):
        await part.restore()
        assert (await answer(router))[1] == "double@1.0.0"
        (model,) = documents.parse(await part.report(), pb.Reported(), "").models
        assert (model.active_release, model.phase) == (0, "rolled-back")
        assert model.code == "start/load"
        assert "does not load any more" in model.sentence
    async with made(replace(options, bundle=())) as (part, router):
        await part.restore()
        assert router.serving("double") is None


async def test_a_broken_bundle_given_by_hand_stops_a_start_only_if_nothing_else_serves(
    tmp_path: Path,
) -> None:
    options = config(tmp_path, "127.0.0.1:9", bundle=(unloadable(tmp_path / "hand"),))
    async with made(options) as (part, _):
        with pytest.raises(ReleaseRefused):
            await part.restore()
    bundles.make(tmp_path / "hub", version="2.0.0")
    commit(options.data / "releases", tmp_path / "hub")
    async with made(options) as (part, router):
        await part.restore()
        assert (await answer(router))[1] == "double@2.0.0"


async def test_a_bundle_given_by_hand_that_answers_wrongly_does_not_answer(tmp_path: Path) -> None:
    bundles.make(tmp_path / "hand", factor=-1.0)
    options = config(tmp_path, "127.0.0.1:9", bundle=(tmp_path / "hand",))
    async with made(options) as (part, router):
        with pytest.raises(ReleaseRefused, match="failed its self-test"):
            await part.restore()
        assert router.serving("double") is None


async def test_a_data_directory_that_cannot_be_read_refuses_the_start(tmp_path: Path) -> None:
    options = config(tmp_path, "127.0.0.1:9")
    async with made(options) as (part, _):
        (options.data / "releases" / "models").write_bytes(b"")  # a file instead of a folder
        with pytest.raises(StartRefused, match="data directory"):
            await part.restore()


# Our own mistakes


@needs_mosquitto
async def test_a_mistake_of_our_own_is_logged_with_its_trace_and_everything_starts_again(
    tmp_path: Path,
) -> None:
    bundles.make(tmp_path / "hand")
    bundles.make(tmp_path / "hub", version="2.0.0")
    async with broker(tmp_path) as mosquitto, ear(mosquitto.address) as hub:

        class Stumbling:
            left = 2

            async def call(self, path: str, request: bytes, timeout_s: float) -> bytes:
                if self.left:
                    self.left -= 1
                    raise ZeroDivisionError
                told = pb.ContactResponse(mqtt=str(mosquitto.address), http=NO_FILES)
                return told.SerializeToString()

        options = config(tmp_path, "127.0.0.1:9", bundle=(tmp_path / "hand",))
        commit(options.data / "releases", tmp_path / "hub")
        with capture_logs() as logs:
            async with managed(options, Stumbling(), pauses=QUICK) as (part, router):
                first = part.updater
                await eventually(lambda: hub.reports)
                assert part.updater is not first
                assert (await answer(router))[1] == "double@2.0.0"
                # What is wanted now is heard by the updater that works.
                await hub.wants(desired(9))
                await eventually(lambda: part.generation() == 9)
        failures = [line for line in logs if "started again" in line["event"]]
        assert len(failures) == 2
        assert all(line["log_level"] == "error" and line["exc_info"] for line in failures)


async def test_a_cancelled_device_leaves_nothing_running(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    async with made(config(tmp_path, "127.0.0.1:9"), _Silent()) as (part, _):
        await part.restore()
        for turns in itertools.chain(range(30), [0]):
            task = asyncio.ensure_future(part.run())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 10)
            assert asyncio.all_tasks() == before
            part.updater = part._new_updater()
            await asyncio.to_thread(part.updater.restore)


class _Silent:
    """A hub that never answers."""

    async def call(self, path: str, request: bytes, timeout_s: float) -> bytes:
        await asyncio.Event().wait()
        return b""
