"""The hub's end of MQTT: desired states out, reports in.

The database is the truth and the broker a cache. This file moves documents between the two
and decides nothing about devices: what a report means, and which desired state is due, is the
controller's business.

Inwards, documents are collected for up to 50 ms, handed over in one batch (one transaction is
eighteen times as fast as one per document) and acknowledged after the controller has committed
them. Documents that are not what their topic says are counted, logged, acknowledged and
dropped: a device that sends nonsense must not fill the window of all the others.

The **epoch** repairs what a broker loses. The hub's session ends with its connection, so a
report may be acknowledged by the broker and never reach us; therefore every connection begins
with a new epoch, at which every device reports again. And since the epoch is retained, finding
it again tells whether the broker still has the desired states:

    subscribe to hub/epoch ─ granted ─ publish a new epoch, retained
        first comes an epoch of ours, retained   → the broker remembers
        first comes a strange one, retained      → it remembers something else: forgot
        first comes the new one, live            → there was none: forgot

A broker that returns with an old copy of its memory can hold our epoch and lack later desired
states. Then the devices' own births, which name the generation they have, show it.
"""

import asyncio
import enum
import logging
import random
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from google.protobuf.message import DecodeError

from fogline_protocol import documents
from fogline_protocol.documents import DocumentError
from fogline_protocol.mqtt import (
    JSON,
    Backoff,
    BrokerAddress,
    Message,
    MqttClient,
    MqttError,
    MqttOptions,
    NotAcknowledged,
    Outgoing,
    PublishRefused,
    Tls,
)
from fogline_protocol.topics import (
    DeviceTopic,
    EpochTopic,
    Kind,
    TopicError,
    check_name,
    every_device,
    parse,
)
from fogline_protocol.v1 import fleet_pb2 as pb

log = logging.getLogger(__name__)

SCHEMA = 1
REVISION = 1  # of Reported, as ContactResponse says it: devices leave out what is later
MAX_DESIRED_BYTES = 4 << 10
# JSON numbers are exact up to here; no honest counter gets near it.
MAX_COUNTER = 1 << 53
_BATCH = 200
_BATCH_WITHIN_S = 0.05
_EPOCH_ECHO_WITHIN_S = 10.0
# A fleet's worth of desired states passes through at this width, so that it neither fills the
# client's spool nor floods a broker that has just come back.
_PUBLISHED_AT_ONCE = 100

Document = pb.Reported | pb.DeviceState | pb.Telemetry


class DocumentRefused(Exception):
    """A device published something that its topic does not allow. Drop it."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One document of one device; its name has been compared with its topic."""

    tenant: str
    device: str
    document: Document


class Controller(Protocol):
    """Whoever keeps the fleet's rows. All three may be called again for what is already done."""

    async def commit(self, arrivals: Sequence[Arrival]) -> None:
        """Apply documents in this order and return when they are durable.

        If it raises, each document is offered once more by itself; what fails then is dropped,
        and the devices are asked to report again.
        """
        ...

    async def broker_forgot(self) -> None:
        """Note that no desired state is on the broker any more, so that all are published."""
        ...

    async def epoch_published(self, epoch: str) -> None:
        """Remember the epoch for the next start of the hub."""
        ...


class Memory(enum.Enum):
    """Whether the broker still has what we once published."""

    KEPT = "kept"
    LOST = "lost"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Sighting:
    """One epoch that arrived."""

    connection: int
    tenant: str
    epoch: str
    retained: bool


def judge_memory(sighting: Sighting, *, known: Collection[str], own: str) -> Memory:
    """Return what the first telling epoch on a connection says about the broker's memory.

    ``known`` are epochs the broker may hold because we published them before this connection,
    ``own`` is the one published on it.
    """
    if sighting.retained:
        return Memory.KEPT if sighting.epoch in known else Memory.LOST
    # A live epoch that is not ours is another hub's, and says nothing about what lies there.
    return Memory.LOST if sighting.epoch == own else Memory.UNKNOWN


def read(message: Message) -> Arrival | Sighting:
    """Return what ``message`` says.

    Raises:
        DocumentRefused: it is malformed, or not what its topic allows.
    """
    try:
        topic = parse(message.topic)
        if isinstance(topic, EpochTopic):
            told = documents.parse(message.payload, pb.HubEpoch(), "hub epoch")
            return Sighting(message.connection, topic.tenant, told.epoch, message.retained)
        document = _document(topic, message)
    except (TopicError, DocumentError, DecodeError) as error:
        raise DocumentRefused(str(error)) from None
    if document.device != topic.device:
        raise DocumentRefused(
            f"it speaks of device {document.device[:64]!r}, its topic belongs to {topic.device!r}"
        )
    return Arrival(topic.tenant, topic.device, document)


def _document(topic: DeviceTopic, message: Message) -> Document:
    match topic.kind:
        case Kind.REPORTED:
            reported = documents.parse(message.payload, pb.Reported(), "reported document")
            _check_schema(reported.schema)
            _check_counters(reported, "sequence", "generation")
            return reported
        case Kind.STATE:
            state = documents.parse(message.payload, pb.DeviceState(), "state document")
            _check_schema(state.schema)
            _check_counters(state, "boot", "connection", "generation")
            return state
        case Kind.TELEMETRY:
            # Binary, so that its schema cannot be read before it is known.
            _check_schema(message.user_properties.get("schema", str(SCHEMA)))
            return pb.Telemetry.FromString(message.payload)
        case Kind.DESIRED:
            raise DocumentRefused("desired documents are the hub's to publish")


def _check_schema(found: int | str) -> None:
    if str(found) != str(SCHEMA):
        raise DocumentRefused(
            f"it is written in schema {str(found)[:16]!r}, this hub reads {SCHEMA}: "
            "update the older of the two"
        )


def _check_counters(document: Document, *names: str) -> None:
    for name in names:
        if (value := getattr(document, name)) > MAX_COUNTER:
            raise DocumentRefused(f"{name} {value} is absurd: at most 2^53 is possible")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubLinkOptions:
    """How the hub reaches its broker, and how gently it asks devices to report."""

    address: BrokerAddress
    tenants: tuple[str, ...] = ("default",)
    spread_s: float = 2.0  # devices report again at random within it; seconds per 1,000 devices
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: Tls = field(default_factory=Tls)
    keepalive_s: int = 30
    max_wait_s: float = 30.0  # between attempts: there is one hub, it need not spare the broker
    # Between epochs that were asked for because a report could not be committed.
    repair_base_s: float = 60.0


class HubLink:
    """Publishes desired states and hands over reports, for as long as ``run`` runs."""

    def __init__(
        self,
        options: HubLinkOptions,
        controller: Controller,
        *,
        last_epoch: str | None,
        rng: Callable[[], float] = random.random,
        new_epoch: Callable[[], str] = lambda: secrets.token_hex(8),
    ) -> None:
        self._options = options
        self._controller = controller
        self._new_epoch = new_epoch
        self._known = {last_epoch} if last_epoch else set()  # what the broker may hold of ours
        self._sightings: asyncio.Queue[Sighting] = asyncio.Queue(1000)
        self._forgot = asyncio.Event()
        self._report_again = asyncio.Event()
        self._at_once = asyncio.Semaphore(_PUBLISHED_AT_ONCE)
        self._repair = Backoff(rng, base_s=options.repair_base_s, max_s=3600.0)
        self.epoch = last_epoch or ""  # the last one that the broker has taken
        self.refused: Counter[str] = Counter()  # documents dropped, by kind of topic
        self.failed = 0  # documents the controller could not commit
        self._mqtt = MqttClient(
            MqttOptions(
                address=options.address,
                # One per process: a session that outlives its hub would swallow a share of the
                # reports (eclipse-mosquitto/mosquitto#1747, #2662).
                client_id=f"hub-{secrets.token_hex(6)}",
                clean_start=True,
                session_expiry_s=0,
                subscriptions=(
                    *(str(EpochTopic(tenant)) for tenant in options.tenants),
                    every_device(Kind.REPORTED),
                    every_device(Kind.STATE),
                    every_device(Kind.TELEMETRY),
                ),
                username=options.username,
                password=options.password,
                tls=options.tls,
                keepalive_s=options.keepalive_s,
                max_wait_s=options.max_wait_s,
                watchdog_s=0.2,
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
        """Serve until cancelled. What broker and devices do wrong never ends it."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._mqtt.connect())
            group.create_task(self._take_reports())
            group.create_task(self._begin_epochs())
            group.create_task(self._repair_epochs())
            group.create_task(self._pass_on_forgetting())

    async def publish_desired(
        self, tenant: str, device: str, desired: pb.Desired, *, timeout_s: float = 30.0
    ) -> None:
        """Publish, retained, what is wanted of a device; return when the broker has it.

        Any number may be called at once: they pass in order of arrival, a hundred at a time.

        Raises:
            ValueError: a name no topic may hold, or a document larger than 4 KB.
            NotAcknowledged: no broker within ``timeout_s``. Publish again later.
            PublishRefused: the broker forbids it to us.
        """
        check_name(device, "device")
        payload = documents.canonical(desired)
        if len(payload) > MAX_DESIRED_BYTES:
            raise ValueError(
                f"the desired state of {device} takes {len(payload)} bytes, at most "
                f"{MAX_DESIRED_BYTES} are allowed: name fewer releases or certificates"
            )
        async with self._at_once:
            await self._mqtt.publish(
                _json(str(DeviceTopic(tenant, device, Kind.DESIRED)), payload),
                timeout_s=timeout_s,
            )

    async def remove_desired(self, tenant: str, device: str, *, timeout_s: float = 30.0) -> None:
        """Clear what lies on the broker for a device that is no longer in the fleet.

        Raises:
            NotAcknowledged: no broker within ``timeout_s``.
            PublishRefused: the broker forbids it to us.
        """
        topic = str(DeviceTopic(tenant, device, Kind.DESIRED))
        await self._mqtt.publish(Outgoing(topic, b"", retain=True), timeout_s=timeout_s)

    async def _take_reports(self) -> None:
        while True:
            messages = await self._mqtt.batch(limit=_BATCH, within_s=_BATCH_WITHIN_S)
            arrivals = [arrival for message in messages if (arrival := self._sort(message))]
            if arrivals:
                await self._commit(arrivals)
            for message in messages:
                self._mqtt.ack(message)

    def _sort(self, message: Message) -> Arrival | None:
        try:
            said = read(message)
        except DocumentRefused as refusal:
            kind = message.topic.rpartition("/")[2]
            self.refused[kind if kind in set(Kind) else "other"] += 1
            log.warning("dropped a message on %.200s: %.500s", message.topic, refusal)
            return None
        if isinstance(said, Arrival):
            return said
        if not self._sightings.full():  # only the first of a connection are looked at
            self._sightings.put_nowait(said)
        return None

    async def _commit(self, arrivals: Sequence[Arrival]) -> None:
        if await self._survives("commit", self._controller.commit(arrivals)):
            return
        # One document may have spoiled the transaction of the others.
        for arrival in arrivals:
            what = f"commit of {type(arrival.document).__name__} from {arrival.device}"
            if not await self._survives(what, self._controller.commit([arrival])):
                self.failed += 1
                self._report_again.set()

    async def _survives(self, what: str, call: Awaitable[None]) -> bool:
        """Await the controller; return whether it succeeded.

        The one place where any exception is survived: a full disk or one poisonous document
        must not cost the fleet its link. The traceback is logged, the failure counted, and
        new epochs, further and further apart, ask for what was lost.
        """
        try:
            await call
        except Exception:
            log.exception("the controller failed: %s", what)
            return False
        return True

    async def _begin_epochs(self) -> None:
        async for connected in self._mqtt.connections():
            if connected.session_resumed:
                continue
            while self._mqtt.connection == connected.number and self._mqtt.is_connected:
                try:
                    await self._begin_epoch(connected.number)
                    break
                except NotAcknowledged:
                    continue  # the loop's condition says whether there is anybody to ask
                except MqttError as error:
                    log.error("no new epoch: %s", error)
                    break

    async def _begin_epoch(self, connection: int) -> None:
        known = frozenset(self._known)
        own = await self._publish_epoch()
        remembered = await self._memory(connection, known, own)
        if remembered is not Memory.KEPT:
            log.info("the broker does not have our desired states: all are published again")
            self._forgot.set()

    async def _publish_epoch(self) -> str:
        epoch = self._new_epoch()
        # Before it is acknowledged: a lost acknowledgement must not look like a lost memory.
        self._known.add(epoch)
        told = documents.canonical(pb.HubEpoch(epoch=epoch, spread_s=self._options.spread_s))
        for tenant in self._options.tenants:
            await self._mqtt.publish(_json(str(EpochTopic(tenant)), told))
        self._known = {epoch}
        self.epoch = epoch
        await self._survives("epoch_published", self._controller.epoch_published(epoch))
        return epoch

    async def _memory(self, connection: int, known: Collection[str], own: str) -> Memory:
        """Wait for the first telling epoch of every tenant on this connection."""
        undecided = set(self._options.tenants)
        try:
            async with asyncio.timeout(_EPOCH_ECHO_WITHIN_S):
                while undecided:
                    sighting = await self._sightings.get()
                    if sighting.connection != connection or sighting.tenant not in undecided:
                        continue
                    match judge_memory(sighting, known=known, own=own):
                        case Memory.LOST:
                            return Memory.LOST
                        case Memory.KEPT:
                            undecided.discard(sighting.tenant)
                        case Memory.UNKNOWN:
                            pass
        except TimeoutError:
            log.warning("the broker did not repeat our epoch: may this hub read hub/epoch?")
            return Memory.UNKNOWN
        return Memory.KEPT

    async def _repair_epochs(self) -> None:
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            await self._report_again.wait()
            self._repair.held(loop.time() - last)
            await asyncio.sleep(self._repair.next_wait_s())
            last = loop.time()
            await self._mqtt.connected()
            self._report_again.clear()
            try:
                await self._publish_epoch()
            except (NotAcknowledged, PublishRefused) as error:
                log.warning("devices could not be asked to report again: %s", error)
                self._report_again.set()

    async def _pass_on_forgetting(self) -> None:
        backoff = Backoff(lambda: 1.0, base_s=1.0, max_s=60.0)
        while True:
            await self._forgot.wait()
            self._forgot.clear()
            if await self._survives("broker_forgot", self._controller.broker_forgot()):
                backoff.held(float("inf"))
            else:
                await asyncio.sleep(backoff.next_wait_s())
                self._forgot.set()


def _json(topic: str, payload: bytes) -> Outgoing:
    return Outgoing(
        topic,
        payload,
        retain=True,
        content_type=JSON,
        user_properties=(("schema", str(SCHEMA)),),
    )
