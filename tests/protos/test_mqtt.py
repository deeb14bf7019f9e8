import asyncio
import gc
import logging
import math
import socket
from dataclasses import replace
from pathlib import Path

import paho.mqtt.client
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fogline_protocol.mqtt import (
    JSON,
    MAX_PACKET_BYTES,
    Backoff,
    BadAddress,
    BrokerAddress,
    Message,
    MqttClient,
    NotAcknowledged,
    Outgoing,
    PacketTooLarge,
    PublishRefused,
    SpoolFull,
    Will,
    liveness_fault,
)
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


def nowhere() -> BrokerAddress:
    """An address at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return BrokerAddress("127.0.0.1", probe.getsockname()[1], tls=False)


# Addresses


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("mqtt://hub", BrokerAddress("hub", 1883, tls=False)),
        ("mqtts://hub.example", BrokerAddress("hub.example", 8883, tls=True)),
        ("mqtt://127.0.0.1:1", BrokerAddress("127.0.0.1", 1, tls=False)),
        ("mqtt://[::1]:1884/", BrokerAddress("::1", 1884, tls=False)),
    ],
)
def test_an_address_is_read_and_written(url: str, address: BrokerAddress) -> None:
    assert BrokerAddress.parse(url) == address
    assert BrokerAddress.parse(str(address)) == address


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hub:1883",
        "http://hub",
        "mqtt://",
        "mqtt://hub:0",
        "mqtt://hub:65536",
        "mqtt://hub:x",
        "mqtt://hub/topic",
        "mqtt://hub?x=1",
        "mqtt://[::1",
        "mqtt://a..b",
        "mqtt://" + "a" * 64,
    ],
)
def test_what_is_no_address_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(BadAddress, match="expected mqtt://HOST:PORT"):
        BrokerAddress.parse(url)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(BadAddress) as refusal:
        BrokerAddress.parse("mqtt://user:secret@hub")
    assert "secret" not in str(refusal.value)


# Waiting


def test_waits_are_a_random_part_of_a_doubling_ceiling() -> None:
    parts = iter([0.5, 0.25, 1.0, 0.0, 0.75, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    backoff = Backoff(lambda: next(parts))
    waits = [backoff.next_wait_s() for _ in range(11)]
    assert waits == [0.5, 0.5, 4.0, 0.0, 12.0, 16.0, 32.0, 64.0, 128.0, 150.0, 150.0]


def test_a_connection_that_did_not_hold_does_not_shorten_the_wait() -> None:
    backoff = Backoff(lambda: 1.0)
    for _ in range(4):
        backoff.next_wait_s()
    backoff.held(15.9)
    assert backoff.next_wait_s() == 16.0
    backoff.held(32.0)
    assert backoff.next_wait_s() == 1.0


@given(st.lists(st.floats(0, 1, exclude_max=True), max_size=2000))
def test_no_wait_is_ever_negative_or_beyond_the_limit(parts: list[float]) -> None:
    backoff = Backoff(iter(parts).__next__)
    assert all(0 <= backoff.next_wait_s() < 300 for _ in parts)


async def test_attempts_go_on_for_ever_with_full_jitter() -> None:
    waits: list[float] = []
    done = asyncio.Event()

    async def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 12:
            done.set()
            await asyncio.Event().wait()

    wanted = replace(options(nowhere(), "a"), max_wait_s=300.0)
    mqtt = MqttClient(wanted, rng=lambda: 0.5, wait=wait)
    async with beside(mqtt.connect()), asyncio.timeout(15):
        await done.wait()
    assert waits == [min(300, 2**n) / 2 for n in range(12)]
    assert "refused" in mqtt.last_fault


# The watchdog


def test_a_connection_is_dead_without_its_thread_or_after_two_silent_keepalives() -> None:
    def fault(now: float, *, thread_alive: bool = True) -> str | None:
        return liveness_fault(now=now, heard_at=0, keepalive_s=60, thread_alive=thread_alive)

    assert fault(121) is None
    assert fault(123) == "nothing was heard from the broker for 123 s"
    assert fault(0, thread_alive=False) == "the network thread has died"


async def test_the_death_of_the_network_thread_is_noticed_and_repaired() -> None:
    async with ScriptedBroker() as scripted, client(options(scripted.address, "victim")) as mqtt:
        (victim,) = (
            one
            for one in gc.get_objects()
            if type(one) is paho.mqtt.client.Client and one.is_connected()
        )
        # Its thread ends without a word to anybody, as after an exception in a callback.
        await asyncio.to_thread(victim.loop_stop)
        await eventually(lambda: mqtt.last_fault == "the network thread has died")
        await mqtt.publish(Outgoing("x", b"after"))
        assert mqtt.connection == 2


@pytest.mark.parametrize(
    "nonsense",
    [b"\x30\x02\xff\xff", b"\x30\x05\x00\x01x\x01\x7f", b"\xf0\x00", b"\x30\x04\x00\x01\xff\x00"],
    ids=["topic beyond packet", "unknown property", "unknown packet", "topic not UTF-8"],
)
async def test_a_broker_that_talks_nonsense_costs_a_connection_and_no_more(
    nonsense: bytes,
) -> None:
    async with ScriptedBroker() as scripted:
        scripted.after_subscription = nonsense
        mqtt = MqttClient(options(scripted.address, "a", "x"))
        async with beside(mqtt.connect()):
            await eventually(lambda: mqtt.connection > 2)
            scripted.after_subscription = b""
            await mqtt.publish(Outgoing("x", b"after"))


async def test_a_broker_that_stops_acknowledging_is_left_and_nothing_is_lost() -> None:
    async with ScriptedBroker() as scripted:
        scripted.puback_code = None
        wanted = replace(options(scripted.address, "a"), acknowledge_within_s=0.1)
        async with client(wanted) as mqtt:
            publishing = asyncio.ensure_future(mqtt.publish(Outgoing("x", b"1")))
            await eventually(lambda: "not acknowledged" in mqtt.last_fault)
            scripted.puback_code = 0
            await publishing


@needs_mosquitto
async def test_a_broker_that_falls_silent_is_noticed_by_its_missing_answer(tmp_path: Path) -> None:
    async with (
        broker(tmp_path) as mosquitto,
        Proxy(mosquitto.address) as proxy,
        client(replace(options(proxy.address, "a"), keepalive_s=1)) as mqtt,
    ):
        proxy.mute.set()
        await eventually(lambda: not mqtt.is_connected)
        proxy.mute.clear()
        await eventually(lambda: mqtt.is_connected)


# Refusals


async def test_a_refused_message_names_its_reason_code() -> None:
    async with ScriptedBroker() as scripted:
        scripted.puback_code = 0x87
        async with client(options(scripted.address, "a")) as mqtt:
            with pytest.raises(PublishRefused, match=r"x: Not authorized \(reason code 135\)"):
                await mqtt.publish(Outgoing("x", b"1"))


async def test_a_refused_connection_and_a_refused_subscription_are_named() -> None:
    async with ScriptedBroker() as scripted:
        scripted.connack = bytes([0, 0x87, 0])
        mqtt = MqttClient(options(scripted.address, "a", "f/#"))
        async with beside(mqtt.connect()):
            await eventually(lambda: "Not authorized (reason code 135)" in mqtt.last_fault)
            scripted.connack, scripted.suback_code = bytes([0, 0, 0]), 0x87
            await eventually(lambda: "to subscribe us to f/# (Not authorized)" in mqtt.last_fault)
            assert not mqtt.is_connected


async def test_a_packet_beyond_64_kilobytes_is_refused_before_it_leaves() -> None:
    mqtt = MqttClient(options(nowhere(), "a"))
    with pytest.raises(PacketTooLarge, match="at most 65536 bytes"):
        await mqtt.publish(Outgoing("x", bytes(MAX_PACKET_BYTES)))
    with pytest.raises(PacketTooLarge):
        mqtt.send(Outgoing("x" * 100, bytes(MAX_PACKET_BYTES - 100)))


async def test_a_full_spool_refuses_at_once_and_those_who_left_make_room() -> None:
    mqtt = MqttClient(replace(options(nowhere(), "a"), spool_limit=2))
    waiting = [asyncio.ensure_future(mqtt.publish(Outgoing("x", b"1"))) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(SpoolFull):
        await mqtt.publish(Outgoing("x", b"2"))
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    with pytest.raises(NotAcknowledged):
        await mqtt.publish(Outgoing("x", b"3"), timeout_s=0.01)


async def test_without_a_broker_a_publish_fails_by_name_in_its_time() -> None:
    mqtt = MqttClient(options(nowhere(), "a"))
    async with beside(mqtt.connect()):
        began = asyncio.get_running_loop().time()
        with pytest.raises(NotAcknowledged, match=r"within 0\.2 s"):
            await mqtt.publish(Outgoing("x", b"1"), timeout_s=0.2)
        assert asyncio.get_running_loop().time() - began < 2
        assert mqtt.send(Outgoing("x", b"1")) is False


async def test_whoever_still_waits_when_the_client_ends_is_told() -> None:
    mqtt = MqttClient(options(nowhere(), "a"))
    async with beside(mqtt.connect()):
        waiting = asyncio.ensure_future(mqtt.publish(Outgoing("x", b"1")))
        await asyncio.sleep(0)
    with pytest.raises(NotAcknowledged, match="the client was closed"):
        await waiting


# Limits


async def test_no_reconnect_sends_more_than_the_limit_of_outstanding_messages() -> None:
    async with ScriptedBroker() as scripted:
        scripted.puback_code = None
        wanted = replace(
            options(scripted.address, "a"), max_outstanding=5, acknowledge_within_s=0.05
        )
        async with client(wanted) as mqtt:
            tasks = [
                asyncio.ensure_future(mqtt.publish(Outgoing("x", b"%02d" % n))) for n in range(50)
            ]
            await eventually(lambda: mqtt.connection >= 4)
            assert {len(sent) for sent in scripted.publishes[:3]} == {5}
            # What was sent first is first again, in its order.
            firsts = [b"%02d" % n for n in range(5)]
            assert all([body[-2:] for body in sent] == firsts for sent in scripted.publishes[:3])
            scripted.puback_code = 0
            await asyncio.gather(*tasks)
            assert len({body[-2:] for body in scripted.publishes[-1]}) <= 50


async def test_a_broker_with_a_smaller_receive_maximum_is_obeyed() -> None:
    async with ScriptedBroker() as scripted:
        scripted.connack = bytes([0, 0, 3, 0x21, 0, 2])
        scripted.puback_code = None
        async with client(options(scripted.address, "a")) as mqtt:
            tasks = [asyncio.ensure_future(mqtt.publish(Outgoing("x", b"1"))) for _ in range(9)]
            await eventually(lambda: len(scripted.publishes[0]) == 2)
            await asyncio.sleep(0)
            assert len(scripted.publishes[0]) == 2
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


# A real broker


@needs_mosquitto
async def test_a_message_arrives_with_all_that_was_said_about_it(tmp_path: Path) -> None:
    async with broker(tmp_path) as mosquitto, client(options(mosquitto.address, "a")) as mqtt:
        sent = Outgoing(
            "x/y",
            b"\x00\xff",
            retain=True,
            expiry_s=60,
            content_type=JSON,
            user_properties=(("schema", "1"), ("traceparent", "0-1")),
        )
        await mqtt.publish(sent)
        async with client(options(mosquitto.address, "b", "x/+")) as other:
            message = await anext(other.messages())
            assert message == Message(
                topic="x/y",
                payload=b"\x00\xff",
                qos=1,
                retained=True,
                content_type=JSON,
                user_properties={"schema": "1", "traceparent": "0-1"},
                connection=1,
                packet=1,
            )
            other.ack(message)
            assert mqtt.send(Outgoing("x/z", b"now"))
            assert (await anext(other.messages())).qos == 0


@needs_mosquitto
async def test_a_broker_that_appears_late_gets_what_was_published_before(tmp_path: Path) -> None:
    address = nowhere()
    mqtt = MqttClient(options(address, "a", "x"))
    async with beside(mqtt.connect()):
        early = asyncio.ensure_future(mqtt.publish(Outgoing("x", b"early")))
        await eventually(lambda: mqtt.connection >= 2)
        async with broker(tmp_path, port=address.port):
            await early
            assert (await anext(mqtt.messages())).payload == b"early"


@needs_mosquitto
async def test_the_log_has_an_outage_once_and_its_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fogline_protocol.mqtt")
    address = nowhere()
    mqtt = MqttClient(options(address, "a", "x"))
    async with beside(mqtt.connect()):
        await eventually(lambda: mqtt.connection >= 4)
        async with broker(tmp_path, port=address.port):
            await mqtt.connected()
        await eventually(lambda: not mqtt.is_connected)
        await eventually(lambda: "refused" in mqtt.last_fault)
        await eventually(lambda: mqtt.connection >= 8)
    told = [record.getMessage().split(": ")[2].partition(";")[0] for record in caplog.records]
    refused = "[Errno 111] Connection refused"
    assert told[:2] == [refused, "connected"]
    assert told.count(refused) == 2


@needs_mosquitto
async def test_a_publish_into_a_dead_broker_resolves_after_its_return(tmp_path: Path) -> None:
    address = nowhere()
    async with broker(tmp_path, port=address.port):
        mqtt = MqttClient(options(address, "a"))
        running = asyncio.ensure_future(mqtt.connect())
        await mqtt.connected()
    late = asyncio.ensure_future(mqtt.publish(Outgoing("x", b"late")))
    await eventually(lambda: not mqtt.is_connected)
    assert not late.done()
    async with beside(running), broker(tmp_path, port=address.port):
        await late


@needs_mosquitto
async def test_an_unacknowledged_message_comes_again_and_an_acknowledged_one_does_not(
    tmp_path: Path,
) -> None:
    async with broker(tmp_path) as mosquitto, Proxy(mosquitto.address) as proxy:
        wanted = options(proxy.address, "device", "x", clean_start=False)
        async with client(wanted) as mqtt, client(options(mosquitto.address, "hub")) as hub:
            await hub.publish(Outgoing("x", b"1"))
            await hub.publish(Outgoing("x", b"2"))
            first, second = await mqtt.batch(limit=2, within_s=15)
            mqtt.ack(first)
            # An answer to our own message proves that the broker has read the acknowledgement.
            await mqtt.publish(Outgoing("y", b""))
            proxy.cut()
            again = await anext(mqtt.messages())
            assert (again.payload, again.connection) == (second.payload, second.connection + 1)
            mqtt.ack(second)  # of a connection that has ended: ignored
            mqtt.ack(again)


@needs_mosquitto
async def test_1000_messages_survive_a_slow_link_that_is_cut_again_and_again(
    tmp_path: Path,
) -> None:
    async with broker(tmp_path) as mosquitto, Proxy(mosquitto.address) as proxy:
        proxy.delay_s, proxy.cut_after_bytes = 0.001, 20_000
        got: set[bytes] = set()

        async def take(hub: MqttClient) -> None:
            async for message in hub.messages():
                got.add(message.payload)
                hub.ack(message)

        wanted = replace(options(proxy.address, "device"), max_outstanding=50)
        async with (
            client(options(mosquitto.address, "hub", "r")) as hub,
            beside(take(hub)),
            client(wanted) as device,
        ):
            everything = [b"%04d" % n + bytes(96) for n in range(1000)]
            async with asyncio.TaskGroup() as group:
                for payload in everything:
                    group.create_task(device.publish(Outgoing("r", payload)))
            await eventually(lambda: got == set(everything))
        assert proxy.connections >= 4


@needs_mosquitto
async def test_the_will_is_heard_after_a_cut_and_not_after_a_polite_end(tmp_path: Path) -> None:
    def will(number: int) -> Will:
        return Will(Outgoing("will", b"%d" % number))

    async with (
        broker(tmp_path) as mosquitto,
        Proxy(mosquitto.address) as proxy,
        client(options(mosquitto.address, "hub", "will")) as hub,
    ):
        async with client(replace(options(proxy.address, "device"), will=will)) as device:
            proxy.cut()
            assert (await anext(hub.messages())).payload == b"1"
            await eventually(lambda: device.is_connected and device.connection == 2)
        await hub.publish(Outgoing("will", b"end"))
        assert (await anext(hub.messages())).payload == b"end"


@needs_mosquitto
async def test_a_second_client_of_the_same_name_ends_the_first_and_both_back_off(
    tmp_path: Path,
) -> None:
    waits: list[float] = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)
        await asyncio.sleep(0.02)

    async with broker(tmp_path) as mosquitto:
        wanted = replace(options(mosquitto.address, "same"), max_wait_s=300.0)
        one, two = (MqttClient(wanted, rng=lambda: 0.5, wait=wait) for _ in range(2))
        async with beside(one.connect()), beside(two.connect()):
            await eventually(lambda: len(waits) >= 10)
    # Connections succeed all the time, and still the waits grow.
    assert max(waits) >= 8 * min(waits)


def test_a_ceiling_stays_finite_after_years_of_failures() -> None:
    backoff = Backoff(lambda: 1.0, max_s=math.inf)
    for _ in range(5000):
        assert math.isfinite(backoff.next_wait_s())
