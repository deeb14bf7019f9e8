import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.fleet import twin
from edge_agent.fleet.link import DeviceLink, DeviceLinkOptions
from fogline_protocol import documents
from fogline_protocol.mqtt import BrokerAddress, MqttClient, Outgoing
from fogline_protocol.v1 import fleet_pb2 as pb
from tests.brokers import (
    Proxy,
    ScriptedBroker,
    beside,
    broker,
    client,
    eventually,
    needs_mosquitto,
    options,
)

DESIRED = "v1/default/d/dev/desired"
EPOCH = "v1/default/hub/epoch"


class Agent:
    """Reads desired states as an agent does, and applies the newest at once."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.applied = 0
        self.link: DeviceLink | None = None
        self.considered: list[bytes] = []
        self.poison = b""

    def generation(self) -> int:
        return self.applied

    async def desired(self, payload: bytes) -> None:
        self.considered.append(payload)
        if payload == self.poison:
            raise RuntimeError("the agent stumbled")
        try:
            self.applied = max(self.applied, twin.read_desired(payload).generation)
        except twin.DesiredRefused as error:
            assert self.link is not None
            self.link.publish_reported(self.document(twin.refused([], error.refusal)))

    async def report(self) -> bytes:
        standing = twin.ModelStanding("digits", twin.Phase.COMMITTED, active_release=1)
        return self.document([standing])

    def document(self, standings: list[twin.ModelStanding]) -> bytes:
        return twin.reported("dev", next(self._numbers), self.applied, standings, twin.HAS_SERVING)


class Hub:
    """Hears everything a device says, with a client of its own."""

    def __init__(self, mqtt: MqttClient) -> None:
        self.mqtt = mqtt
        self.reports: list[pb.Reported] = []
        self.states: list[pb.DeviceState] = []
        self.telemetry: list[pb.Telemetry] = []

    async def listen(self) -> None:
        async for message in self.mqtt.messages():
            match message.topic.rpartition("/")[2]:
                case "reported":
                    self.reports.append(documents.parse(message.payload, pb.Reported(), ""))
                case "state":
                    self.states.append(documents.parse(message.payload, pb.DeviceState(), ""))
                case "tm":
                    assert message.content_type == "application/x-protobuf"
                    self.telemetry.append(pb.Telemetry.FromString(message.payload))
            self.mqtt.ack(message)

    async def wants(self, generation: int, hub_epoch: str = "e") -> None:
        document = pb.Desired(
            schema=1,
            generation=generation,
            hub_epoch=hub_epoch,
            releases=[
                pb.DesiredRelease(
                    model="digits", release=generation, version="1.0.0", index_target="digits/1/i"
                )
            ],
        )
        await self.mqtt.publish(Outgoing(DESIRED, documents.canonical(document), retain=True))

    async def begins(self, epoch: str, spread_s: float = 0.0) -> None:
        told = documents.canonical(pb.HubEpoch(epoch=epoch, spread_s=spread_s))
        await self.mqtt.publish(Outgoing(EPOCH, told, retain=True))


@contextlib.asynccontextmanager
async def hub(address: BrokerAddress) -> AsyncIterator[Hub]:
    async with client(options(address, "hub", "v1/default/d/+/+")) as mqtt:
        hub = Hub(mqtt)
        async with beside(hub.listen()):
            yield hub


def device_options(address: BrokerAddress) -> DeviceLinkOptions:
    return DeviceLinkOptions(
        address=address,
        device="dev",
        boot=3,
        agent_version="0.1.0",
        hardware_class="x86_64+avx2/CPUExecutionProvider/onnxruntime-1.32",
        will_delay_s=0,
        max_wait_s=0.05,
        watchdog_s=0.02,
    )


@contextlib.asynccontextmanager
async def device(
    address: BrokerAddress,
    agent: Agent,
    *,
    rng: Callable[[], float] = lambda: 0.5,
    waits: list[float] | None = None,
) -> AsyncIterator[DeviceLink]:
    async def wait(seconds: float) -> None:
        if waits is not None:
            waits.append(seconds)

    agent.link = DeviceLink(device_options(address), agent, rng=rng, wait=wait)
    async with beside(agent.link.run()):
        yield agent.link


@needs_mosquitto
async def test_a_device_says_that_it_lives_how_it_stands_and_that_it_leaves(tmp_path: Path) -> None:
    async with broker(tmp_path) as mosquitto, hub(mosquitto.address) as ears:
        async with device(mosquitto.address, Agent()):
            await eventually(lambda: ears.states and ears.reports)
        await eventually(lambda: len(ears.states) == 2)
    birth, farewell = ears.states
    assert (birth.online, birth.boot, birth.connection) == (True, 3, 1)
    assert (birth.agent_version, birth.device) == ("0.1.0", "dev")
    assert birth.hardware_class.startswith("x86_64")
    assert (farewell.online, farewell.connection) == (False, 1)
    assert (ears.reports[0].sequence, ears.reports[0].models[0].model) == (1, "digits")


@needs_mosquitto
async def test_a_cut_device_is_reported_by_its_will_with_the_number_of_that_connection(
    tmp_path: Path,
) -> None:
    async with (
        broker(tmp_path) as mosquitto,
        hub(mosquitto.address) as ears,
        Proxy(mosquitto.address) as proxy,
        device(proxy.address, Agent()),
    ):
        await eventually(lambda: ears.reports)
        proxy.cut()
        await eventually(lambda: len(ears.states) >= 3 and len(ears.reports) >= 2)
        said = {(state.connection, state.online) for state in ears.states}
        # Whatever order they arrive in, the counter tells that the device is back.
        assert {(1, True), (1, False), (2, True)} <= said
        assert ears.reports[1].sequence > ears.reports[0].sequence


@needs_mosquitto
async def test_a_new_epoch_is_answered_after_a_random_part_of_its_spread(tmp_path: Path) -> None:
    waits: list[float] = []
    async with (
        broker(tmp_path) as mosquitto,
        hub(mosquitto.address) as ears,
        device(mosquitto.address, Agent(), rng=lambda: 0.25, waits=waits),
    ):
        await eventually(lambda: len(ears.reports) == 1)
        await ears.begins("one", spread_s=60)
        await eventually(lambda: len(ears.reports) == 2)
        await ears.begins("one", spread_s=60)  # the same again: nothing new
        await ears.begins("two", spread_s=8)
        await eventually(lambda: len(ears.reports) == 3)
    assert waits == [0.0, 15.0, 2.0]


@needs_mosquitto
@pytest.mark.parametrize(
    "payload",
    [
        b"{",
        b'{"epoch":"x","spread_s":"Infinity"}',
        b'{"epoch":"x","spread_s":-1}',
        b'{"epoch":"x","spread_s":1e9}',
    ],
)
async def test_an_absurd_epoch_is_ignored(
    tmp_path: Path, payload: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    waits: list[float] = []
    async with (
        broker(tmp_path) as mosquitto,
        hub(mosquitto.address) as ears,
        device(mosquitto.address, Agent(), waits=waits),
    ):
        await eventually(lambda: ears.reports)
        await ears.mqtt.publish(Outgoing(EPOCH, payload))
        await ears.begins("sane", spread_s=2)
        await eventually(lambda: len(waits) == 2)
    assert waits == [0.0, 1.0]
    assert "ignored the hub's epoch" in caplog.text


@needs_mosquitto
async def test_stale_repeated_and_reordered_wishes_of_two_hubs_end_in_the_newest(
    tmp_path: Path,
) -> None:
    agent = Agent()
    async with broker(tmp_path) as mosquitto, hub(mosquitto.address) as ears:
        await ears.wants(4, "old hub")  # retained, before the device is there
        async with device(mosquitto.address, agent):
            await eventually(lambda: agent.applied == 4)
            for generation, epoch in [(7, "new"), (5, "old"), (7, "new"), (3, "old"), (6, "new")]:
                await ears.wants(generation, epoch)
            await eventually(lambda: len(agent.considered) == 6)
            assert agent.applied == 7
            await ears.wants(8, "new")
            await eventually(lambda: agent.applied == 8)
        # What lies on the broker is what the next birth is compared with.
        async with device(mosquitto.address, agent):
            await eventually(lambda: any(s.generation == 8 and s.online for s in ears.states))


@needs_mosquitto
async def test_a_malformed_and_an_oversized_wish_are_refused_aloud_and_the_next_is_heard(
    tmp_path: Path,
) -> None:
    agent = Agent()
    async with (
        broker(tmp_path) as mosquitto,
        hub(mosquitto.address) as ears,
        device(mosquitto.address, agent),
    ):
        await eventually(lambda: ears.reports)  # it hears every document, not only the last
        await ears.mqtt.publish(Outgoing(DESIRED, b"{", retain=True))
        await ears.mqtt.publish(Outgoing(DESIRED, b" " * 5000, retain=True))
        await ears.wants(2)
        await eventually(lambda: agent.applied == 2)

        def codes() -> set[str]:
            return {model.code for report in ears.reports for model in report.models}

        await eventually(lambda: codes() >= {"desired/malformed", "desired/too-large"})


@needs_mosquitto
async def test_an_agent_that_stumbles_over_a_document_keeps_its_link(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    agent = Agent()
    agent.poison = b"poison"
    async with (
        broker(tmp_path) as mosquitto,
        hub(mosquitto.address) as ears,
        device(mosquitto.address, agent) as link,
    ):
        await ears.mqtt.publish(Outgoing(DESIRED, b"poison", retain=True))
        await eventually(lambda: link.failed >= 1)
        await ears.wants(2)
        await eventually(lambda: agent.applied == 2)
    assert "the agent stumbled" in caplog.text


@needs_mosquitto
async def test_offline_costs_nothing_and_the_newest_reports_arrive_in_order_afterwards(
    tmp_path: Path,
) -> None:
    agent = Agent()
    async with (
        broker(tmp_path) as mosquitto,
        hub(mosquitto.address) as ears,
        Proxy(mosquitto.address) as way,
    ):
        await way.__aexit__()
        async with device(way.address, agent) as link:
            await eventually(lambda: "refused" in link.fault)
            assert not link.send_telemetry(pb.Telemetry(device="dev"))
            for _ in range(1000):
                link.publish_reported(agent.document([]))
            await way.__aenter__()
            await eventually(lambda: ears.reports and ears.reports[-1].sequence >= 1000)
        sequences = [report.sequence for report in ears.reports]
        assert sequences == sorted(sequences)
        assert len(sequences) <= 70


@needs_mosquitto
async def test_a_wiped_broker_is_subscribed_again_and_its_new_wishes_are_heard(
    tmp_path: Path,
) -> None:
    agent = Agent()
    first = broker(tmp_path)
    mosquitto = await first.__aenter__()
    address = mosquitto.address
    async with device(address, agent) as link:
        async with hub(address) as ears:
            await ears.wants(1)
            await eventually(lambda: agent.applied == 1)
        await first.__aexit__(None, None, None)
        await eventually(lambda: not link.is_connected)
        async with broker(tmp_path, port=address.port), hub(address) as ears:
            await ears.wants(2)
            await eventually(lambda: agent.applied == 2)


@needs_mosquitto
async def test_counts_are_sent_as_protobuf_while_there_is_a_connection(tmp_path: Path) -> None:
    counts = pb.Telemetry(device="dev", boot_id="b", sequence=4)
    async with (
        broker(tmp_path) as mosquitto,
        hub(mosquitto.address) as ears,
        device(mosquitto.address, Agent()) as link,
    ):
        await eventually(lambda: link.is_connected)
        assert link.send_telemetry(counts)
        await eventually(lambda: ears.telemetry == [counts])


async def test_a_broker_that_forbids_reports_does_not_stop_the_link() -> None:
    agent = Agent()
    async with ScriptedBroker() as scripted:
        scripted.puback_code = 0x87
        async with device(scripted.address, agent) as link:
            link.publish_reported(b"{}")
            await eventually(lambda: scripted.publishes and len(scripted.publishes[0]) >= 3)
            scripted.puback_code = 0
            link.publish_reported(b'{"after":1}')
            await eventually(lambda: any(b"after" in body for body in scripted.publishes[0]))


def test_a_device_whose_name_no_topic_can_hold_is_refused_at_the_start() -> None:
    wanted = device_options(BrokerAddress("127.0.0.1", 1, tls=False))
    with pytest.raises(ValueError, match="use 1 to 63 of a-z"):
        DeviceLink(replace(wanted, device="Dev 1"), Agent())


async def test_a_link_without_a_broker_ends_at_once_when_it_is_told_to() -> None:
    began = asyncio.get_running_loop().time()
    async with device(BrokerAddress("127.0.0.1", 1, tls=False), Agent()):
        await asyncio.sleep(0)
    assert asyncio.get_running_loop().time() - began < 1
