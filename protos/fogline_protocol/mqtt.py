"""MQTT 5 for asyncio: the one adapter around paho-mqtt, used by edge and hub alike.

It does input and output and still lives with the protocol, because a second adapter would be
a second answer to the question when a message counts as delivered. Nothing of paho shows in
this interface (``mqtt_wire.py`` holds it), so the library can be replaced.

``MqttClient`` owns what must outlive a connection: the spool, the limit of outstanding
messages, the waiting between attempts, and the watchdog. All of it belongs to the event loop
that called ``connect``; the network thread only posts there.

QoS 1 means at least once: a message whose acknowledgement was lost is sent again. Every
document of ours carries a generation or a sequence number, so a repetition is harmless.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from fogline_protocol.mqtt_wire import (
    JSON,
    MAX_PACKET_BYTES,
    PROTOBUF,
    Answer,
    BadAddress,
    BrokerAddress,
    Connected,
    ConnectionFailed,
    Message,
    MqttError,
    MqttOptions,
    Outgoing,
    Tls,
    Will,
    Wire,
    packet_bytes,
    settle,
)

__all__ = [
    "JSON",
    "MAX_PACKET_BYTES",
    "PROTOBUF",
    "Backoff",
    "BadAddress",
    "BrokerAddress",
    "Connected",
    "Message",
    "MqttClient",
    "MqttError",
    "MqttOptions",
    "NotAcknowledged",
    "Outgoing",
    "PacketTooLarge",
    "PublishRefused",
    "SpoolFull",
    "Tls",
    "Will",
]

log = logging.getLogger(__name__)

# What has been handed to the network but not yet written, for messages without an
# acknowledgement: beyond it the socket is stuck, and telemetry is worth less than memory.
_MAX_UNWRITTEN = 100
# Telemetry that waits for a slow consumer. Later reports contain what a dropped one said.
_MAX_WAITING_UNACKNOWLEDGED = 10_000


class PacketTooLarge(MqttError):
    """The message is larger than any document may be: our bug, or a document to shorten."""


class SpoolFull(MqttError):
    """Too many messages wait for the broker. Come back later."""


class NotAcknowledged(MqttError):
    """The broker said nothing in time. The message may have arrived: send it again."""


class PublishRefused(MqttError):
    """The broker said no. Sending the same again will not help."""

    def __init__(self, topic: str, code: int, reason: str) -> None:
        super().__init__(f"the broker refused a message to {topic}: {reason} (reason code {code})")
        self.code = code


class Backoff:
    """How long to wait before the next attempt: full jitter, ``min(max_s, base_s 2^n) random``.

    Without the jitter a broker that restarts is met by all its devices in the same second.
    """

    def __init__(
        self,
        rng: Callable[[], float] = random.random,
        *,
        base_s: float = 1.0,
        max_s: float = 300.0,
    ) -> None:
        self._rng = rng
        self._base_s = base_s
        self._max_s = max_s
        self._failures = 0

    @property
    def ceiling_s(self) -> float:
        """The longest that the next wait can be."""
        # 2^64 seconds are beyond any limit, and an endless exponent would overflow.
        return min(self._max_s, self._base_s * 2.0 ** min(self._failures, 64))

    def next_wait_s(self) -> float:
        """Count one more failure and return how long to wait."""
        wait_s = self.ceiling_s * self._rng()
        self._failures += 1
        return wait_s

    def held(self, seconds: float) -> None:
        """Forget the failures if what was attempted lasted longer than it could be waited for.

        A success alone proves nothing: a broker that accepts and hangs up at once, or a second
        client with our id, would otherwise be dialed several times a second for ever.
        """
        if seconds >= self.ceiling_s:
            self._failures = 0


def liveness_fault(
    *, now: float, heard_at: float, keepalive_s: float, thread_alive: bool
) -> str | None:
    """Return why a connection that claims to stand is dead, or None while it may live.

    paho asks for a PINGRESP after ``keepalive_s`` of silence and gives it as long again. Who
    has heard nothing for longer has a thread that hangs.
    """
    if not thread_alive:
        return "the network thread has died"
    if now - heard_at > 2 * keepalive_s + 2:
        return f"nothing was heard from the broker for {now - heard_at:.0f} s"
    return None


@dataclass(slots=True, eq=False)
class _Spooled:
    """A message on its way, from ``publish`` to the broker's acknowledgement."""

    message: Outgoing
    acknowledged: asyncio.Future[None]  # its caller may leave at any moment
    sent_at: float = 0.0  # seconds, monotonic; 0 while it waits in the spool


class MqttClient:
    """A client of one broker that stays connected for as long as it can.

    Being without a broker is an ordinary state: nothing fails, ``publish`` waits its time,
    ``send`` says False, and attempts go on with full jitter for ever.
    """

    def __init__(
        self,
        options: MqttOptions,
        *,
        rng: Callable[[], float] = random.random,
        wait: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._options = options
        self._backoff = Backoff(rng, max_s=options.max_wait_s)
        self._wait = wait
        self._number = 0
        self._wire: Wire | None = None  # a connection that stands
        self._spool: deque[_Spooled] = deque()
        self._outstanding: dict[int, _Spooled] = {}  # by packet id on the present wire
        self._unwritten: set[int] = set()  # packet ids of messages that nobody acknowledges
        self._arrived: asyncio.Queue[Message] = asyncio.Queue()
        self._connections: asyncio.Queue[Connected] = asyncio.Queue(1)  # the newest one
        self._standing = asyncio.Event()
        self.dropped_messages = 0  # unacknowledged ones that came faster than they were taken
        self.last_fault = ""  # why the last connection, or attempt at one, ended
        self._told = ""  # the fault that the log has, since the last connection

    def __repr__(self) -> str:
        state = "connected" if self._wire is not None else f"not connected ({self.last_fault})"
        return (
            f"<MqttClient {self._options.client_id} at {self._options.address}: {state}, "
            f"{len(self._spool)} spooled, {len(self._outstanding)} outstanding>"
        )

    @property
    def is_connected(self) -> bool:
        """Whether a connection stands and its subscriptions are granted."""
        return self._wire is not None

    @property
    def connection(self) -> int:
        """The number of the last attempt to connect."""
        return self._number

    async def connect(self) -> None:
        """Connect, and stay connected until cancelled; then leave politely.

        It never returns, so that whoever runs it in a task group learns of our own bugs: all
        that a network or a broker can do wrong only leads to the next attempt.
        """
        try:
            while True:
                await self._attempt()
                wait_s = self._backoff.next_wait_s()
                # A device that is away for a week does not fill its disk with the same words.
                log.log(
                    logging.DEBUG if self.last_fault == self._told else logging.INFO,
                    "mqtt: %s at %s: %s; next attempt in %.1f s",
                    self._options.client_id,
                    self._options.address,
                    self.last_fault,
                    wait_s,
                )
                self._told = self.last_fault
                await self._wait(wait_s)
        finally:
            for spooled in self._spool:
                if not spooled.acknowledged.done():
                    spooled.acknowledged.set_exception(
                        NotAcknowledged(f"{spooled.message.topic}: the client was closed")
                    )
            self._spool.clear()

    async def connected(self) -> None:
        """Wait until a connection stands."""
        await self._standing.wait()

    async def publish(self, message: Outgoing, *, timeout_s: float = 30.0) -> None:
        """Publish at QoS 1 and wait until the broker has taken the message.

        Without a connection the message waits for one; an unacknowledged message is sent again
        on the next connection.

        Raises:
            PacketTooLarge: it is larger than a document may be; nothing was sent.
            SpoolFull: too many wait already; nothing was sent.
            NotAcknowledged: the broker did not answer within ``timeout_s``.
            PublishRefused: the broker answered no.
        """
        _check_size(message)
        if len(self._spool) >= self._options.spool_limit:
            raise SpoolFull(
                f"{message.topic}: {len(self._spool)} messages already wait for the broker"
            )
        acknowledged: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        spooled = _Spooled(message, acknowledged)
        self._spool.append(spooled)
        self._pump()
        try:
            async with asyncio.timeout(timeout_s):
                await acknowledged
        except TimeoutError:
            raise NotAcknowledged(
                f"{message.topic}: the broker at {self._options.address} did not acknowledge "
                f"within {timeout_s:g} s"
                + ("" if self.is_connected else f" ({self.last_fault or 'not connected'})")
            ) from None
        finally:
            # Whoever left early leaves nothing behind that would count against the limit.
            if not spooled.sent_at:
                with contextlib.suppress(ValueError):
                    self._spool.remove(spooled)

    def send(self, message: Outgoing) -> bool:
        """Publish at QoS 0: now or never. Return whether it was handed to the network.

        Raises:
            PacketTooLarge: it is larger than a document may be.
        """
        _check_size(message)
        if self._wire is None or len(self._unwritten) >= _MAX_UNWRITTEN:
            return False
        packet = self._wire.publish(message, 0)
        if packet is None:
            return False
        self._unwritten.add(packet)
        return True

    async def messages(self) -> AsyncIterator[Message]:
        """Yield what arrives, for as long as the client lives. One consumer."""
        while True:
            yield await self._arrived.get()

    async def batch(self, *, limit: int, within_s: float) -> list[Message]:
        """Wait for a message; return it with what follows ``within_s``, at most ``limit``."""
        taken = [await self._arrived.get()]
        # Whatever is cancelled in here loses messages that were never acknowledged: the broker
        # still has them.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while len(taken) < limit:
                    taken.append(await self._arrived.get())
        return taken

    async def connections(self) -> AsyncIterator[Connected]:
        """Yield every connection once it stands, for as long as the client lives."""
        while True:
            yield await self._connections.get()

    def ack(self, message: Message) -> None:
        """Tell the broker that it may forget ``message``.

        If its connection has ended there is nobody to tell: the broker will repeat it.
        """
        if message.qos > 0 and self._wire is not None and self._wire.number == message.connection:
            self._wire.ack(message)

    async def _attempt(self) -> None:
        """Connect once, and serve that connection to its end."""
        self._number += 1
        began = time.monotonic()
        wire = Wire(self._options, self._number, self._take, self._published)
        try:
            self._begin(wire, await wire.open())
            self.last_fault = await self._until_dead(wire)
            self._backoff.held(time.monotonic() - began)
        except TimeoutError:
            self.last_fault = "nobody answered in time"
        except (ConnectionFailed, OSError, ValueError) as error:
            # ValueError: what ssl and paho make of a certificate that does not fit the name.
            self.last_fault = str(error) or repr(error)
        except asyncio.CancelledError:
            if self._wire is wire:
                wire.hang_up()
                await asyncio.wait({wire.closed}, timeout=1.0)
            raise
        finally:
            self._end(wire)

    def _begin(self, wire: Wire, connected: Connected) -> None:
        self._wire = wire
        self._standing.set()
        if self._told:
            log.info("mqtt: %s at %s: connected", self._options.client_id, self._options.address)
            self._told = ""
        if self._connections.full():
            self._connections.get_nowait()  # it has ended before anybody looked
        self._connections.put_nowait(connected)
        self._pump()

    async def _until_dead(self, wire: Wire) -> str:
        while True:
            await asyncio.wait({wire.closed}, timeout=self._options.watchdog_s)
            if wire.closed.done():
                return wire.closed.result()
            now = time.monotonic()
            fault = liveness_fault(
                now=now,
                heard_at=wire.heard_at,
                keepalive_s=wire.keepalive_s,
                thread_alive=wire.thread_alive,
            )
            if fault is not None:
                return fault
            oldest = next(iter(self._outstanding.values()), None)
            if oldest is not None and now - oldest.sent_at > self._options.acknowledge_within_s:
                return f"a message was not acknowledged for {now - oldest.sent_at:.0f} s"

    def _end(self, wire: Wire) -> None:
        self._wire = None
        self._standing.clear()
        wire.cut()
        self._unwritten.clear()
        # In their old order, and before whatever was waiting behind them.
        again = [
            spooled for spooled in self._outstanding.values() if not spooled.acknowledged.done()
        ]
        self._outstanding.clear()
        for spooled in again:
            spooled.sent_at = 0.0
        self._spool.extendleft(reversed(again))

    def _pump(self) -> None:
        wire = self._wire
        while wire is not None and self._spool and len(self._outstanding) < wire.max_outstanding:
            spooled = self._spool.popleft()
            if spooled.acknowledged.done():
                continue
            packet = wire.publish(spooled.message, 1)
            if packet is None:
                self._spool.appendleft(spooled)
                settle(wire.closed, "the connection takes no more messages")
                return
            spooled.sent_at = time.monotonic()
            self._outstanding[packet] = spooled

    def _published(self, wire: Wire, packet: int, answer: Answer) -> None:
        if wire is not self._wire:
            return
        self._unwritten.discard(packet)
        spooled = self._outstanding.pop(packet, None)
        if spooled is not None and not spooled.acknowledged.done():
            if answer.refused:
                refusal = PublishRefused(spooled.message.topic, answer.code, answer.reason)
                spooled.acknowledged.set_exception(refusal)
            else:
                spooled.acknowledged.set_result(None)
        self._pump()

    def _take(self, message: Message) -> None:
        if message.qos == 0 and self._arrived.qsize() >= _MAX_WAITING_UNACKNOWLEDGED:
            self.dropped_messages += 1
            return
        self._arrived.put_nowait(message)


def _check_size(message: Outgoing) -> None:
    size = packet_bytes(message)
    if size > MAX_PACKET_BYTES:
        raise PacketTooLarge(
            f"{message.topic}: a packet of {size} bytes; MQTT carries documents of at most "
            f"{MAX_PACKET_BYTES} bytes, larger things travel over HTTP"
        )
