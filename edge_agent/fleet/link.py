"""The device's end of MQTT: desired states in; births, reports and counts out.

This file moves documents and decides only *when* to say something again: at every connection,
and whenever the hub's epoch changes, after a random part of the hub's spread, so that a hub
that has restarted is not met by its whole fleet in one second. What a document means is the
business of ``twin.py`` and of whoever runs the updater.

Offline is an ordinary state. Nothing here fails or grows because of it: the newest reports
wait, counts are dropped (the next ones contain them), and attempts to connect grow rarer.

Every connection has a number. Birth and will carry it, together with the number of this start
of the agent, so that a will that arrives late cannot bury a newer birth.
"""

import asyncio
import contextlib
import logging
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from fogline_protocol import documents
from fogline_protocol.documents import DocumentError
from fogline_protocol.mqtt import (
    JSON,
    PROTOBUF,
    BrokerAddress,
    Message,
    MqttClient,
    MqttOptions,
    NotAcknowledged,
    Outgoing,
    PacketTooLarge,
    PublishRefused,
    SpoolFull,
    Tls,
    Will,
)
from fogline_protocol.topics import DeviceTopic, EpochTopic, Kind
from fogline_protocol.v1 import fleet_pb2 as pb

log = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMA = 1
_SCHEMA_PROPERTY = (("schema", str(SCHEMA)),)
REPORT_EXPIRY_S = 3600
TELEMETRY_EXPIRY_S = 60
# An update has about a dozen phases; a device that was offline through more of them owes the
# hub its standing, not its history.
_MAX_REPORTS = 64
# No fleet needs longer, and a larger number would silence the device.
_MAX_SPREAD_S = 24 * 3600.0
# Farewell is a courtesy: the broker would send the will, only later.
_FAREWELL_WITHIN_S = 1.0


class Device(Protocol):
    """What the link carries documents for: the agent."""

    def generation(self) -> int:
        """Return the generation that was last brought to its end."""
        ...

    async def desired(self, payload: bytes) -> None:
        """Consider a desired document; return when the decision is safe.

        It may be any bytes at all, and any number of times the same.
        """
        ...

    async def report(self) -> bytes:
        """Return a reported document of how things stand, with a new sequence number."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLinkOptions:
    """Who this device is, and how it reaches its broker."""

    address: BrokerAddress
    device: str
    tenant: str = "default"
    boot: int  # grows with every start of the agent
    agent_version: str = ""
    hardware_class: str = ""
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: Tls = field(default_factory=Tls)
    keepalive_s: int = 60
    session_expiry_s: int = 3600
    will_delay_s: int = 60  # a shorter gap in the connection is nobody's business
    max_wait_s: float = 300.0  # between attempts to connect
    watchdog_s: float = 1.0


class DeviceLink:
    """Keeps a device in touch with its hub, for as long as ``run`` runs."""

    def __init__(
        self,
        options: DeviceLinkOptions,
        device: Device,
        *,
        rng: Callable[[], float] = random.random,
        wait: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._options = options
        self._device = device
        self._rng = rng
        self._wait = wait
        self._desired_topic = self._topic(Kind.DESIRED)
        self._epoch_topic = str(EpochTopic(options.tenant))
        self._epoch = ""
        self._spread_s = 0.0  # as the hub said last
        self._reports: deque[bytes] = deque(maxlen=_MAX_REPORTS)
        self._unsent = asyncio.Event()
        self._repetition: asyncio.Task[None] | None = None  # at most one is due
        self.failed = 0  # documents that the agent could not consider
        self._mqtt = MqttClient(
            MqttOptions(
                address=options.address,
                client_id=options.device,
                # A session costs the broker little and saves a delivery after short gaps.
                clean_start=False,
                session_expiry_s=options.session_expiry_s,
                subscriptions=(self._desired_topic, self._epoch_topic),
                will=self._will,
                username=options.username,
                password=options.password,
                tls=options.tls,
                keepalive_s=options.keepalive_s,
                max_wait_s=options.max_wait_s,
                watchdog_s=options.watchdog_s,
            ),
            rng=rng,
        )

    @property
    def is_connected(self) -> bool:
        """Whether the broker can be reached at this moment."""
        return self._mqtt.is_connected

    @property
    def fault(self) -> str:
        """Why the broker was last lost, or could not be reached."""
        return self._mqtt.last_fault

    async def run(self) -> None:
        """Serve until cancelled, then say farewell. No broker, hub or network ever ends it."""
        connection = asyncio.create_task(self._mqtt.connect(), name="mqtt")
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_ended(connection))
                group.create_task(self._take_messages(group))
                group.create_task(self._announce(group))
                group.create_task(self._send_reports())
        finally:
            # Last of all goes the connection, because the farewell needs it.
            await self._say_farewell()
            connection.cancel()
            await asyncio.wait({connection})

    def publish_reported(self, document: bytes) -> None:
        """Send a reported document when there is a connection, and again until it is taken.

        Of those that wait, the newest are kept.
        """
        self._reports.append(document)
        self._unsent.set()

    def send_telemetry(self, telemetry: pb.Telemetry) -> bool:
        """Send counts now or never; return whether they were sent."""
        return self._mqtt.send(
            Outgoing(
                self._topic(Kind.TELEMETRY),
                telemetry.SerializeToString(),
                expiry_s=TELEMETRY_EXPIRY_S,
                content_type=PROTOBUF,
                user_properties=_SCHEMA_PROPERTY,
            )
        )

    def _topic(self, kind: Kind) -> str:
        return str(DeviceTopic(self._options.tenant, self._options.device, kind))

    def _state(self, connection: int, *, online: bool) -> Outgoing:
        state = pb.DeviceState(
            schema=SCHEMA,
            device=self._options.device,
            online=online,
            boot=self._options.boot,
            connection=connection,
            agent_version=self._options.agent_version,
            hardware_class=self._options.hardware_class,
            generation=self._device.generation(),
        )
        return Outgoing(
            self._topic(Kind.STATE),
            documents.canonical(state),
            expiry_s=REPORT_EXPIRY_S,
            content_type=JSON,
            user_properties=_SCHEMA_PROPERTY,
        )

    def _will(self, connection: int) -> Will:
        return Will(self._state(connection, online=False), delay_s=self._options.will_delay_s)

    async def _announce(self, group: asyncio.TaskGroup) -> None:
        async for connected in self._mqtt.connections():
            # If it is lost on the way, so is this connection, and the next has its own birth.
            with contextlib.suppress(NotAcknowledged, SpoolFull):
                try:
                    await self._mqtt.publish(self._state(connected.number, online=True))
                except PublishRefused as refusal:
                    log.error("the broker does not let this device say that it lives: %s", refusal)
            self._repeat_within(self._spread_s, group)

    async def _take_messages(self, group: asyncio.TaskGroup) -> None:
        async for message in self._mqtt.messages():
            if message.topic == self._desired_topic:
                await self._survives("desired", self._device.desired(message.payload))
            elif message.topic == self._epoch_topic:
                self._take_epoch(message, group)
            self._mqtt.ack(message)

    def _take_epoch(self, message: Message, group: asyncio.TaskGroup) -> None:
        try:
            told = documents.parse(message.payload, pb.HubEpoch(), "hub epoch")
        except DocumentError as error:
            log.warning("ignored the hub's epoch: %.500s", error)
            return
        if not (math.isfinite(told.spread_s) and 0 <= told.spread_s <= _MAX_SPREAD_S):
            log.warning("ignored the hub's epoch: a spread of %s s is absurd", told.spread_s)
            return
        self._spread_s = told.spread_s
        if told.epoch != self._epoch:
            self._epoch = told.epoch
            self._repeat_within(told.spread_s, group)

    def _repeat_within(self, spread_s: float, group: asyncio.TaskGroup) -> None:
        """Report again at a random moment; what was due before is contained in that."""
        if self._repetition is not None:
            self._repetition.cancel()
        self._repetition = group.create_task(self._repeat_after(self._rng() * spread_s))

    async def _repeat_after(self, wait_s: float) -> None:
        await self._wait(wait_s)
        document = await self._survives("report", self._device.report())
        if document is not None:
            self.publish_reported(document)

    async def _send_reports(self) -> None:
        while True:
            await self._unsent.wait()
            await self._mqtt.connected()
            self._unsent.clear()
            while self._reports:
                document = self._reports[0]
                try:
                    await self._mqtt.publish(
                        Outgoing(
                            self._topic(Kind.REPORTED),
                            document,
                            expiry_s=REPORT_EXPIRY_S,
                            content_type=JSON,
                            user_properties=_SCHEMA_PROPERTY,
                        )
                    )
                except (NotAcknowledged, SpoolFull):
                    self._unsent.set()
                    break
                except (PublishRefused, PacketTooLarge) as refusal:
                    log.error("a report will never reach the hub: %s", refusal)
                # While it was on its way, newer ones may have pushed it out.
                if self._reports and self._reports[0] is document:
                    self._reports.popleft()

    async def _survives(self, what: str, call: Awaitable[T]) -> T | None:
        """Await the agent; return what it returns, or None if it failed.

        The one place where any exception is survived: a desired document that the agent stumbles
        over lies retained on the broker and would come back at every start, and a device that
        cannot report must still hear the next desired state.
        """
        try:
            return await call
        except Exception:
            self.failed += 1
            log.exception("the agent failed: %s", what)
            return None

    async def _say_farewell(self) -> None:
        if self._mqtt.is_connected:
            # An orderly end keeps the will back, so the hub learns from us that we have gone.
            with contextlib.suppress(NotAcknowledged, SpoolFull, PublishRefused):
                await self._mqtt.publish(
                    self._state(self._mqtt.connection, online=False),
                    timeout_s=_FAREWELL_WITHIN_S,
                )


async def _ended(task: asyncio.Task[None]) -> None:
    """Wait for a task that is not to be cancelled with us, and share its failure."""
    await asyncio.shield(task)
