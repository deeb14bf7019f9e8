import asyncio
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cloud_hub.fleet.mosquitto import (
    Mosquitto,
    MosquittoFailed,
    MosquittoMissing,
    configuration,
    find_executable,
)
from fogline_protocol.mqtt import MAX_PACKET_BYTES, Outgoing
from tests.brokers import beside, broker, client, eventually, needs_mosquitto, options, shell

pytestmark = needs_mosquitto


def brokers_below(directory: Path) -> list[psutil.Process]:
    """Every live Mosquitto that was started from ``directory``, whoever its parent is."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        words = process.info["cmdline"] or []
        if process.info["name"] == "mosquitto" and any(str(directory) in word for word in words):
            found.append(process)
    return found


async def listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


async def test_a_started_broker_carries_messages_and_a_stopped_one_is_gone(tmp_path: Path) -> None:
    async with broker(tmp_path) as mosquitto:
        async with client(options(mosquitto.address, "a", "x")) as mqtt:
            await mqtt.publish(Outgoing("x", b"1"))
            message = await anext(mqtt.messages())
        assert message.payload == b"1"
        assert len(brokers_below(tmp_path)) == 1
    assert brokers_below(tmp_path) == []
    assert not mosquitto.running


async def test_it_starts_from_a_data_directory_that_only_its_owner_may_enter(
    tmp_path: Path,
) -> None:
    closed = tmp_path / "data"
    closed.mkdir(mode=0o700)
    async with broker(closed) as mosquitto:
        assert mosquitto.running


async def test_a_broker_that_dies_is_started_again_on_the_same_port(tmp_path: Path) -> None:
    async with broker(tmp_path) as mosquitto, beside(mosquitto.watch()):
        port = mosquitto.address.port
        for restarts in (1, 2):
            (process,) = brokers_below(tmp_path)
            process.kill()
            await eventually(lambda n=restarts: mosquitto.restarts == n)  # type: ignore[misc]
            await eventually(lambda: brokers_below(tmp_path) and mosquitto.running)
            async with client(options(mosquitto.address, "a")):
                assert mosquitto.address.port == port


async def test_a_broker_whose_keeper_is_killed_is_replaced_not_doubled(tmp_path: Path) -> None:
    async with broker(tmp_path) as mosquitto, beside(mosquitto.watch()):
        (process,) = brokers_below(tmp_path)
        keeper = process.parent()
        assert keeper is not None
        keeper.kill()
        await eventually(lambda: mosquitto.restarts == 1 and mosquitto.running)
        await eventually(lambda: len(brokers_below(tmp_path)) == 1)
        assert brokers_below(tmp_path)[0].pid != process.pid


HUB = """
import asyncio, sys
from pathlib import Path
from cloud_hub.fleet.mosquitto import Mosquitto

async def main():
    mosquitto = Mosquitto(Path(sys.argv[1]))
    await mosquitto.start()
    print(mosquitto.address.port, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
async def test_the_broker_does_not_outlive_its_hub(tmp_path: Path, sign: signal.Signals) -> None:
    hub = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        HUB,
        str(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert hub.stdout is not None
    port = int(await hub.stdout.readline())
    assert await listens(port)
    hub.send_signal(sign)
    await hub.wait()
    await eventually(lambda: not brokers_below(tmp_path))


async def test_the_next_hub_listens_where_the_last_one_did(tmp_path: Path) -> None:
    async with broker(tmp_path) as first:
        port = first.address.port
    async with broker(tmp_path) as second:
        assert second.address.port == port


async def test_a_port_that_is_taken_meanwhile_is_given_up_for_another(tmp_path: Path) -> None:
    async with broker(tmp_path) as first:
        port = first.address.port
    strangers = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", port)
    async with strangers, broker(tmp_path) as second:
        assert second.address.port != port


async def test_a_given_port_that_is_taken_is_refused_with_the_brokers_own_words(
    tmp_path: Path,
) -> None:
    strangers = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0)
    async with strangers:
        port = strangers.sockets[0].getsockname()[1]
        with pytest.raises(MosquittoFailed, match=f"port {port} .*in use"):
            await Mosquitto(tmp_path, port=port).start()


async def test_a_start_says_where_the_broker_is_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "cloud_hub.fleet.mosquitto"):
        async with broker(tmp_path) as mosquitto:
            said = [record.getMessage() for record in caplog.records]
    assert said == [f"mosquitto listens at {mosquitto.address}"]


async def test_a_missing_mosquitto_is_named_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MosquittoMissing, match="apt-get install mosquitto"):
        await Mosquitto(tmp_path, executable=tmp_path / "none").start()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("cloud_hub.fleet.mosquitto._BESIDE_PATH", (str(tmp_path),))
    with pytest.raises(MosquittoMissing, match="inference is served without it"):
        find_executable()


async def test_something_that_is_no_broker_fails_by_name(tmp_path: Path) -> None:
    with pytest.raises(MosquittoFailed, match="ended with code 1: it said nothing"):
        await Mosquitto(tmp_path, executable=shell()).start()
    assert not brokers_below(tmp_path)


def test_the_configuration_has_no_limit_that_drops_messages_silently() -> None:
    lines = configuration(1883).splitlines()
    assert "max_queued_messages 0" in lines
    assert "max_inflight_messages 1000" in lines
    assert "persistence false" in lines
    assert "listener 1883 127.0.0.1" in lines
    assert f"message_size_limit {MAX_PACKET_BYTES}" in lines


async def test_a_wildcard_subscriber_receives_every_one_of_3000_retained_messages(
    tmp_path: Path,
) -> None:
    async with broker(tmp_path) as mosquitto:
        async with client(options(mosquitto.address, "a")) as mqtt:
            for start in range(0, 3000, 500):
                await asyncio.gather(
                    *(
                        mqtt.publish(Outgoing(f"r/{n}", b"%d" % n, retain=True))
                        for n in range(start, start + 500)
                    )
                )
        got = set()
        async with client(options(mosquitto.address, "b", "r/+")) as mqtt:
            async for message in mqtt.messages():
                got.add(message.payload)
                mqtt.ack(message)
                if len(got) == 3000:
                    break
    assert got == {b"%d" % n for n in range(3000)}


def test_the_tests_see_no_broker_of_another_test(tmp_path: Path) -> None:
    assert os.path.isdir(tmp_path)
    assert brokers_below(tmp_path) == []
