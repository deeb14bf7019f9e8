import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from cloud_hub.fleet.link import (
    Arrival,
    DocumentRefused,
    HubLink,
    HubLinkOptions,
    Memory,
    Sighting,
    judge_memory,
    read,
)
from fogline_protocol import documents
from fogline_protocol.mqtt import BrokerAddress, Message, MqttClient, NotAcknowledged, Outgoing
from fogline_protocol.topics import TopicError
from fogline_protocol.v1 import fleet_pb2 as pb
from tests.brokers import Proxy, beside, broker, client, eventually, needs_mosquitto, options


class Ledger:
    """A controller that keeps its rows in lists and can be told to fail."""

    def __init__(self) -> None:
        self.committed: list[Arrival] = []
        self.batches: list[int] = []
        self.forgotten = 0
        self.epochs: list[str] = []
        self.poison: Callable[[Arrival], bool] = lambda _: False

    async def commit(self, arrivals: Sequence[Arrival]) -> None:
        await asyncio.sleep(0)
        if any(self.poison(arrival) for arrival in arrivals):
            raise RuntimeError("the disk is full")
        self.batches.append(len(arrivals))
        self.committed.extend(arrivals)

    async def broker_forgot(self) -> None:
        self.forgotten += 1

    async def epoch_published(self, epoch: str) -> None:
        self.epochs.append(epoch)


@contextlib.asynccontextmanager
async def hub(
    address: BrokerAddress,
    ledger: Ledger,
    last_epoch: str | None = None,
    name: str = "e",
) -> AsyncIterator[HubLink]:
    """A hub whose epochs are e1, e2, ..."""
    numbers = itertools.count(1)
    link = HubLink(
        HubLinkOptions(address=address, max_wait_s=0.05, repair_base_s=0.01),
        ledger,
        last_epoch=last_epoch,
        new_epoch=lambda: f"{name}{next(numbers)}",
    )
    async with beside(link.run()):
        yield link


def reported(device: str, sequence: int = 1, *, topic_device: str | None = None) -> Outgoing:
    document = pb.Reported(schema=1, device=device, sequence=sequence, generation=1)
    return Outgoing(
        f"v1/default/d/{topic_device or device}/reported", documents.canonical(document)
    )


async def publish_all(mqtt: MqttClient, messages: Sequence[Outgoing]) -> None:
    async with asyncio.TaskGroup() as group:
        for message in messages:
            group.create_task(mqtt.publish(message))


# What a document may be


def arrived(topic: str, payload: bytes, **properties: str) -> Message:
    return Message(topic, payload, 1, False, "", properties, 1, 1)


def test_documents_are_read_by_their_topic() -> None:
    state = pb.DeviceState(schema=1, device="a", online=True, connection=3)
    arrival = read(arrived("v1/acme/d/a/state", documents.canonical(state)))
    assert arrival == Arrival("acme", "a", state)
    serving = pb.Serving(variant="int8", provider="CPU", meant_variant="int8", aside="nothing")
    model = pb.ReportedModel(model="digits", active_release=2, serving=serving)
    report = pb.Reported(schema=1, device="a", sequence=1, models=[model])
    arrival = read(arrived("v1/acme/d/a/reported", documents.canonical(report)))
    assert arrival == Arrival("acme", "a", report)
    counts = pb.Telemetry(device="a", boot_id="x", sequence=9)
    assert read(arrived("v1/acme/d/a/tm", counts.SerializeToString(), schema="1")) == Arrival(
        "acme", "a", counts
    )


@pytest.mark.parametrize(
    ("topic", "payload", "reason"),
    [
        ("v1/default/d/a/reported", b"", "reported document"),
        ("v1/default/d/a/reported", b"{", "reported document"),
        ("v1/default/d/a/reported", b"\xff\xfe", "reported document"),
        ("v1/default/d/a/reported", b'{"schema":1,"device":"a","x":1}', 'no field named "x"'),
        ("v1/default/d/a/reported", b'{"schema":1,"device":"b"}', "belongs to 'a'"),
        ("v1/default/d/a/reported", b'{"schema":1}', "belongs to 'a'"),
        ("v1/default/d/a/reported", b'{"schema":2,"device":"a"}', "this hub reads 1"),
        (
            "v1/default/d/a/reported",
            b'{"schema":1,"device":"a","sequence":"9007199254740993"}',
            "sequence 9007199254740993 is absurd",
        ),
        (
            "v1/default/d/a/state",
            b'{"schema":1,"device":"a","generation":"18446744073709551615"}',
            "generation 18446744073709551615 is absurd",
        ),
        ("v1/default/d/a/state", b"null", "document"),
        ("v1/default/d/a/tm", b"\xff\xff\xff", "pars"),
        ("v1/default/d/a/tm", b"\x0a\x01b", "belongs to 'a'"),
        ("v1/default/d/a/desired", b"{}", "hub's to publish"),
        ("v1/default/d/A/reported", b"{}", "cannot be part of a topic"),
        ("elsewhere", b"{}", "is not ours"),
    ],
)
def test_a_document_that_its_topic_does_not_allow_is_refused_with_the_reason(
    topic: str, payload: bytes, reason: str
) -> None:
    with pytest.raises(DocumentRefused, match=reason):
        read(arrived(topic, payload))


def test_telemetry_of_an_unknown_schema_is_refused() -> None:
    with pytest.raises(DocumentRefused, match="schema '2'"):
        read(arrived("v1/default/d/a/tm", b"", schema="2"))


@pytest.mark.parametrize(
    ("epoch", "retained", "memory"),
    [
        ("old", True, Memory.KEPT),
        ("strange", True, Memory.LOST),
        ("", True, Memory.LOST),
        ("own", False, Memory.LOST),
        ("another hub's", False, Memory.UNKNOWN),
    ],
)
def test_the_first_epoch_tells_what_the_broker_remembers(
    epoch: str, retained: bool, memory: Memory
) -> None:
    sighting = Sighting(1, "default", epoch, retained)
    assert judge_memory(sighting, known={"old", "older"}, own="own") is memory


# With a real broker


@needs_mosquitto
async def test_1000_reports_are_committed_in_batches_each_once_and_in_order(
    tmp_path: Path,
) -> None:
    ledger = Ledger()
    async with (
        broker(tmp_path) as mosquitto,
        hub(mosquitto.address, ledger),
        client(options(mosquitto.address, "devices")) as devices,
    ):
        await eventually(lambda: ledger.epochs)
        await publish_all(devices, [reported(f"d{n % 10}", sequence=n) for n in range(1000)])
        await eventually(lambda: len(ledger.committed) >= 1000)
    sequences: dict[str, list[int]] = {}
    for arrival in ledger.committed:
        assert isinstance(arrival.document, pb.Reported)
        sequences.setdefault(arrival.device, []).append(arrival.document.sequence)
    assert sequences == {f"d{n}": list(range(n, 1000, 10)) for n in range(10)}
    assert max(ledger.batches) <= 200
    assert len(ledger.batches) < 100


@needs_mosquitto
async def test_nonsense_is_counted_and_dropped_and_costs_nobody_else_a_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger()
    async with (
        broker(tmp_path) as mosquitto,
        hub(mosquitto.address, ledger) as link,
        client(options(mosquitto.address, "devices")) as devices,
    ):
        await eventually(lambda: ledger.epochs)
        # More than the broker would ever leave unacknowledged with the hub.
        forged = [reported("victim", topic_device="forger")] * 400
        broken = [Outgoing("v1/default/d/a/state", b"{" * 60_000)] * 300
        await publish_all(devices, [*forged, *broken, reported("honest")])
        devices.send(Outgoing("v1/default/d/a/tm", b"\xff"))
        await eventually(lambda: ledger.committed and link.refused["tm"])
    assert [arrival.device for arrival in ledger.committed] == ["honest"]
    assert link.refused == {"reported": 400, "state": 300, "tm": 1}
    assert "v1/default/d/forger/reported: it speaks of device 'victim'" in caplog.text


@needs_mosquitto
async def test_a_new_epoch_begins_every_connection_and_only_a_wiped_broker_has_forgotten(
    tmp_path: Path,
) -> None:
    ledger = Ledger()
    async with contextlib.AsyncExitStack() as stack:
        first = broker(tmp_path)
        mosquitto = await first.__aenter__()
        proxy = await stack.enter_async_context(Proxy(mosquitto.address))
        link = await stack.enter_async_context(hub(proxy.address, ledger))
        await eventually(lambda: ledger.forgotten == 1)  # it was empty at the start
        assert ledger.epochs == ["e1"]
        proxy.cut()
        await eventually(lambda: len(ledger.epochs) == 2)
        async with client(options(mosquitto.address, "x", "v1/default/hub/epoch")) as other:
            told = documents.parse((await anext(other.messages())).payload, pb.HubEpoch(), "")
            assert (told.epoch, told.spread_s) == (link.epoch, 2.0)
        assert ledger.forgotten == 1
        await first.__aexit__(None, None, None)  # without persistence this wipes it
        await stack.enter_async_context(broker(tmp_path, port=mosquitto.address.port))
        await eventually(lambda: ledger.forgotten == 2)
        assert link.epoch == ledger.epochs[-1] == f"e{len(ledger.epochs)}"


@needs_mosquitto
async def test_a_restarted_hub_knows_its_broker_by_the_epoch_it_remembers(tmp_path: Path) -> None:
    async with broker(tmp_path) as mosquitto:
        first = Ledger()
        async with hub(mosquitto.address, first, name="one"):
            await eventually(lambda: first.forgotten)
        again = Ledger()
        async with hub(mosquitto.address, again, last_epoch="one1", name="two"):
            await eventually(lambda: again.epochs)
            # The verdict comes after the epoch; a report behind it is committed later still.
            async with client(options(mosquitto.address, "d")) as device:
                await device.publish(reported("d"))
                await eventually(lambda: again.committed)
        assert again.forgotten == 0
        stranger = Ledger()
        async with hub(mosquitto.address, stranger, last_epoch="one1", name="three"):
            await eventually(lambda: stranger.forgotten == 1)


@needs_mosquitto
async def test_a_poisonous_document_spoils_neither_its_batch_nor_the_link(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.poison = lambda arrival: arrival.device == "poison"
    async with (
        broker(tmp_path) as mosquitto,
        hub(mosquitto.address, ledger) as link,
        client(options(mosquitto.address, "devices")) as devices,
    ):
        await eventually(lambda: ledger.epochs)
        epochs = len(ledger.epochs)
        await publish_all(devices, [reported(name) for name in ("a", "poison", "b")])
        await eventually(lambda: {one.device for one in ledger.committed} == {"a", "b"})
        assert link.failed >= 1
        # What could not be committed was acknowledged; a new epoch asks for it again.
        await eventually(lambda: len(ledger.epochs) > epochs)
        ledger.poison = lambda _: False
        await devices.publish(reported("poison"))
        await eventually(lambda: "poison" in {one.device for one in ledger.committed})


@needs_mosquitto
async def test_desired_states_of_1000_devices_lie_on_the_broker_for_whoever_comes_later(
    tmp_path: Path,
) -> None:
    async with broker(tmp_path) as mosquitto, hub(mosquitto.address, Ledger()) as link:
        async with asyncio.TaskGroup() as group:
            for n in range(1000):
                wanted = pb.Desired(schema=1, generation=n + 1, hub_epoch="e1")
                group.create_task(link.publish_desired("default", f"d{n}", wanted))
        async with client(options(mosquitto.address, "x", "v1/default/d/+/desired")) as late:
            found = {}
            async for message in late.messages():
                late.ack(message)
                assert (message.retained, message.content_type) == (True, "application/json")
                assert message.user_properties == {"schema": "1"}
                document = documents.parse(message.payload, pb.Desired(), "")
                found[message.topic] = document.generation
                if len(found) == 1000:
                    break
        assert found == {f"v1/default/d/d{n}/desired": n + 1 for n in range(1000)}
        await link.remove_desired("default", "d7")
        async with client(options(mosquitto.address, "y", "v1/default/d/d7/desired")) as late:
            await late.publish(Outgoing("v1/default/d/d7/desired", b"live"))
            assert (await anext(late.messages())).payload == b"live"


async def test_a_desired_state_that_cannot_be_published_is_refused_by_name() -> None:
    link = HubLink(
        HubLinkOptions(address=BrokerAddress("127.0.0.1", 1, tls=False)),
        Ledger(),
        last_epoch=None,
    )
    with pytest.raises(TopicError):
        await link.publish_desired("default", "a/b", pb.Desired())
    large = pb.Desired(releases=[pb.DesiredRelease(model="m" * 4096)])
    with pytest.raises(ValueError, match="at most 4096"):
        await link.publish_desired("default", "a", large)
    with pytest.raises(NotAcknowledged):
        await link.publish_desired("default", "a", pb.Desired(), timeout_s=0.01)


@needs_mosquitto
async def test_a_hub_that_starts_before_its_broker_serves_it_when_it_appears(
    tmp_path: Path,
) -> None:
    async with broker(tmp_path) as mosquitto:
        address = mosquitto.address
    ledger = Ledger()
    async with hub(address, ledger) as link:
        await eventually(lambda: "refused" in link.fault)
        early = asyncio.ensure_future(
            link.publish_desired("default", "a", pb.Desired(schema=1, generation=1))
        )
        async with broker(tmp_path, port=address.port):
            await early
            await eventually(lambda: ledger.forgotten == 1 and link.is_connected)


@needs_mosquitto
async def test_two_hubs_share_the_reports_and_each_is_committed_once(tmp_path: Path) -> None:
    one, two = Ledger(), Ledger()
    async with (
        broker(tmp_path) as mosquitto,
        hub(mosquitto.address, one, name="one"),
        hub(mosquitto.address, two, name="two"),
        client(options(mosquitto.address, "devices")) as devices,
    ):
        await eventually(lambda: one.epochs and two.epochs)
        await publish_all(devices, [reported("a", sequence=n) for n in range(200)])
        await eventually(lambda: len(one.committed) + len(two.committed) >= 200)
        everything = [
            arrival.document.sequence
            for arrival in one.committed + two.committed
            if isinstance(arrival.document, pb.Reported)
        ]
    assert sorted(everything) == list(range(200))
    assert one.committed
    assert two.committed
