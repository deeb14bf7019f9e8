"""What the tests of everything that speaks MQTT need: a real broker, and a bad way to it."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from cloud_hub.fleet.mosquitto import Mosquitto, MosquittoMissing, find_executable
from fogline_protocol.mqtt import BrokerAddress, MqttClient, MqttOptions


def _installed() -> bool:
    try:
        find_executable()
    except MosquittoMissing:
        return False
    return True


# In CI a missing broker is a failure, not a reason to test less.
needs_mosquitto = pytest.mark.skipif(
    not _installed() and "CI" not in os.environ,
    reason="Mosquitto is not installed: apt-get install mosquitto",
)


async def eventually(
    holds: Callable[[], object], within_s: float = 30.0, what: str | None = None
) -> None:
    """Poll until ``holds`` returns something true; fail when the deadline has passed."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while not holds():
        if loop.time() > deadline:
            pytest.fail(f"not within {within_s:g} s: {what or holds}")
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def beside(coroutine: Awaitable[object]) -> AsyncIterator[asyncio.Future[object]]:
    """Run something beside the test, and end it with the test; its own failure is the test's."""
    task = asyncio.ensure_future(coroutine)
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def broker(directory: Path, port: int = 0) -> AsyncIterator[Mosquitto]:
    """A broker that nobody restarts."""
    mosquitto = Mosquitto(directory / "mosquitto", port=port)
    await mosquitto.start()
    try:
        yield mosquitto
    finally:
        await mosquitto.stop()


def options(
    address: BrokerAddress, client_id: str, *subscriptions: str, clean_start: bool = True
) -> MqttOptions:
    return MqttOptions(
        address=address,
        client_id=client_id,
        clean_start=clean_start,
        session_expiry_s=0 if clean_start else 3600,
        subscriptions=subscriptions,
        watchdog_s=0.02,
        max_wait_s=0.05,
    )


@contextlib.asynccontextmanager
async def client(wanted: MqttOptions) -> AsyncIterator[MqttClient]:
    """A client that stands."""
    mqtt = MqttClient(wanted)
    async with beside(mqtt.connect()):
        async with asyncio.timeout(30):
            await mqtt.connected()
        yield mqtt


class Proxy:
    """The way to the broker: it delays, swallows, cuts, and can be closed altogether."""

    def __init__(self, target: BrokerAddress) -> None:
        self._target = target
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._flows: set[asyncio.Task[None]] = set()
        self.port = 0
        self.delay_s = 0.0
        self.connections = 0
        self.cut_after_bytes: int | None = None  # of what a client has sent
        self.mute = asyncio.Event()  # set: what the broker says is swallowed

    @property
    def address(self) -> BrokerAddress:
        return BrokerAddress("127.0.0.1", self.port, tls=False)

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for flow in self._flows:
            flow.cancel()
        await asyncio.gather(*self._flows, return_exceptions=True)
        await self._server.wait_closed()

    def cut(self) -> None:
        """Break every connection in the middle of whatever it carries."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._flows.add(task)
        task.add_done_callback(self._flows.discard)
        self.connections += 1
        self._writers.add(writer)
        up_writer = None
        try:
            up_reader, up_writer = await asyncio.open_connection(
                self._target.host, self._target.port
            )
            self._writers.add(up_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, up_writer, upwards=True))
                group.create_task(self._pump(up_reader, writer, upwards=False))
        except* (OSError, _Cut):
            pass
        finally:
            for end in (writer, up_writer):
                if end is not None:
                    end.transport.abort()
                    self._writers.discard(end)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, upwards: bool
    ) -> None:
        sent = 0
        while data := await reader.read(4096):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if not upwards and self.mute.is_set():
                continue
            sent += len(data)
            if upwards and self.cut_after_bytes is not None and sent > self.cut_after_bytes:
                raise _Cut
            writer.write(data)
            await writer.drain()
        raise _Cut


class _Cut(Exception):
    pass


def shell() -> Path:
    """A program that exists and is no broker."""
    found = shutil.which("false")
    assert found is not None
    return Path(found)


class ScriptedBroker:
    """A broker that says what a test wants it to say, right or wrong; MQTT 5, few packets."""

    def __init__(self) -> None:
        self.address = BrokerAddress("127.0.0.1", 0, tls=False)
        self.connack = bytes([0, 0, 0])  # no session, success, no properties
        self.suback_code = 1
        self.puback_code: int | None = 0  # None: never answer
        self.after_subscription = b""  # sent as it is
        self.publishes: list[list[bytes]] = []  # payload-bearing packets, by connection
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "ScriptedBroker":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.address = BrokerAddress("127.0.0.1", port, tls=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.publishes.append([])
        try:
            while True:
                kind, body = await _packet(reader)
                match kind >> 4:
                    case 1:
                        writer.write(bytes([0x20, len(self.connack)]) + self.connack)
                    case 3:
                        self.publishes[-1].append(body)
                        length = int.from_bytes(body[:2], "big")
                        packet = body[2 + length : 4 + length]
                        if kind & 6 and self.puback_code is not None:
                            writer.write(b"\x40\x03" + packet + bytes([self.puback_code]))
                    case 8:
                        answer = body[:2] + bytes([0]) + bytes([self.suback_code]) * _filters(body)
                        writer.write(bytes([0x90, len(answer)]) + answer)
                        writer.write(self.after_subscription)
                    case 12:
                        writer.write(b"\xd0\x00")
                    case 14:
                        return
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.transport.abort()


def _filters(subscribe: bytes) -> int:
    """How many topic filters a SUBSCRIBE without properties holds."""
    at, count = 3, 0
    while at < len(subscribe):
        at += 3 + int.from_bytes(subscribe[at : at + 2], "big")
        count += 1
    return count


async def _packet(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    kind = (await reader.readexactly(1))[0]
    length = shift = 0
    while True:
        byte = (await reader.readexactly(1))[0]
        length |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return kind, await reader.readexactly(length)
