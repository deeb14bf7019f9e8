"""Keeps what the hub wants of each device and what each device says, and publishes the former.

The database is the truth and the broker a cache. Wanting is one row: a change raises the
device's generation, and ``published_generation < generation`` is the outbox. The publisher
sends such rows until the broker has acknowledged them; a hub killed in between sends them
again, and a device ignores what it has. A report is taken if its sequence number is above the
last one, so repetition and order mean nothing.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import Connection, Row, delete, insert, select, update

from cloud_hub.errors import StoreFailed
from cloud_hub.fleet.link import Arrival
from cloud_hub.store import schema
from cloud_hub.store.store import Store
from fogline_protocol.mqtt import MqttError
from fogline_protocol.v1 import fleet_pb2 as pb

log = logging.getLogger("fogline.controller")

SCHEMA = 1
RETRY_S = 2.0  # between attempts to publish while the broker is away
EVENTS_KEPT = 200  # of one device

twin = schema.twin
event = schema.device_event


class UnknownDevice(Exception):
    """No device of this name has ever reported."""


class UnknownRelease(Exception):
    """The hub has not accepted such a release."""


class Publisher(Protocol):
    """Where desired states go."""

    async def publish_desired(self, tenant: str, device: str, desired: pb.Desired) -> None:
        """Return when the broker has it; raise ``MqttError`` otherwise."""
        ...


@dataclass(frozen=True, slots=True)
class WantedRelease:
    """One release as it stands in a desired state."""

    model: str
    number: int
    version: str
    index_target: str
    certificate_targets: Sequence[str]


@dataclass(frozen=True, slots=True)
class Twin:
    """One device: what is wanted of it, and what it last said."""

    device: str
    desired: Mapping[str, int]  # model -> release number
    generation: int
    published_generation: int
    reported: pb.Reported
    reported_at: float | None  # seconds since the epoch
    connected: bool  # as birth and will said last

    @property
    def standing(self) -> str:
        """One word for the console: idle, queued, updating, failed or current."""
        if not self.desired:
            return "idle"
        models = {model.model: model for model in self.reported.models}
        if self.reported.generation < self.generation:
            return "queued"
        phases = {models[name].phase for name in self.desired if name in models}
        if phases & {"rejected", "rolled-back"}:
            return "failed"
        current = all(
            name in models and models[name].active_release == number
            for name, number in self.desired.items()
        )
        return "current" if current and phases <= {"committed"} else "updating"


@dataclass(frozen=True, slots=True)
class Event:
    """One change of phase, as a device reported it."""

    device: str
    at: float
    generation: int
    model: str
    release: int
    phase: str
    code: str
    sentence: str


class Controller:
    """The fleet's rows. Owner of the tables ``twin`` and ``device_event``."""

    def __init__(
        self,
        store: Store,
        *,
        wanted: Callable[[Connection, str, int], WantedRelease | None],
        telemetry: Callable[[pb.Telemetry], None],
        seen: Callable[[pb.DeviceState], None],
    ) -> None:
        """Join the store with the parts that know releases and presence.

        Args:
            store: the hub's database.
            wanted: describes an accepted release, inside a transaction; None: there is none.
            telemetry: takes counts.
            seen: takes births and wills.
        """
        self._store = store
        self._wanted = wanted
        self._telemetry = telemetry
        self._seen = seen
        self._due = asyncio.Event()
        self._due.set()  # whatever a killed hub left unpublished
        self.epoch = ""

    # What operators want -----------------------------------------------------------------

    async def want(self, devices: Sequence[str] | None, model: str, number: int) -> Sequence[str]:
        """Want a release on these devices, None: on all that have reported; return their names.

        Raises:
            UnknownDevice: one of them has never reported.
            UnknownRelease: the hub has not accepted it.
            StoreFailed: nothing was changed.
        """

        def write(connection: Connection) -> list[str]:
            if self._wanted(connection, model, number) is None:
                raise UnknownRelease(f"{model}@{number} is not a release of this hub")
            known = {row.device: row for row in connection.execute(select(twin))}
            names = sorted(known) if devices is None else list(dict.fromkeys(devices))
            for name in names:
                if name not in known:
                    raise UnknownDevice(f"no device {name!r} has reported to this hub")
                desired = json.loads(known[name].desired)
                if desired.get(model) == number:
                    continue
                desired[model] = number
                connection.execute(
                    update(twin)
                    .where(twin.c.device == name)
                    .values(desired=json.dumps(desired), generation=twin.c.generation + 1)
                )
            return names

        names = await self._store.write(write)
        self._due.set()
        return names

    # What devices say --------------------------------------------------------------------

    async def commit(self, arrivals: Sequence[Arrival]) -> None:
        """Take documents in this order; return when they are durable."""
        now = time.time()
        await self._store.write(lambda connection: self._apply(connection, arrivals, now))
        for arrival in arrivals:
            match arrival.document:
                case pb.Telemetry():
                    self._telemetry(arrival.document)
                case pb.DeviceState():
                    self._seen(arrival.document)
        self._due.set()

    async def broker_forgot(self) -> None:
        """Note that the broker holds no desired state, so that all are published again."""
        await self._store.write(
            lambda connection: connection.execute(update(twin).values(published_generation=0))
        )
        self._due.set()

    async def epoch_published(self, epoch: str) -> None:
        """Remember the epoch for the next start of the hub."""
        self.epoch = epoch

        def write(connection: Connection) -> None:
            connection.execute(delete(schema.hub_epoch))
            connection.execute(insert(schema.hub_epoch).values(epoch=epoch))

        await self._store.write(write)

    async def last_epoch(self) -> str | None:
        """Return the epoch that was published last, by this start of the hub or an earlier one."""
        return await self._store.read(
            lambda connection: connection.execute(select(schema.hub_epoch.c.epoch)).scalar()
        )

    def _apply(self, connection: Connection, arrivals: Sequence[Arrival], now: float) -> None:
        for arrival in arrivals:
            document = arrival.document
            if isinstance(document, pb.Telemetry):
                continue
            row = _row(connection, arrival.device)
            if isinstance(document, pb.DeviceState):
                self._apply_state(connection, row, document)
            else:
                self._apply_report(connection, row, document, now)

    def _apply_state(self, connection: Connection, row: Row[Any], state: pb.DeviceState) -> None:
        if (state.boot, state.connection) < (row.boot, row.connection):
            return  # a will that arrives after the next birth
        changes: dict[str, Any] = {
            "boot": state.boot,
            "connection": state.connection,
            "connected": state.online,
        }
        if state.online and state.generation < row.generation:
            # It has not got what was published: perhaps the broker has not either.
            changes["published_generation"] = 0
        changes |= _ahead(row, state.generation)
        connection.execute(update(twin).where(twin.c.device == row.device).values(**changes))

    def _apply_report(
        self, connection: Connection, row: Row[Any], report: pb.Reported, now: float
    ) -> None:
        if report.sequence <= row.report_sequence:
            return
        before = {m.model: m for m in pb.Reported.FromString(row.reported).models}
        for model in report.models:
            last = before.get(model.model)
            if last is None or _notable(last) != _notable(model):
                connection.execute(
                    insert(event).values(
                        device=row.device,
                        at=now,
                        generation=report.generation,
                        model=model.model,
                        release=model.desired_release or model.active_release,
                        phase=model.phase,
                        code=model.code,
                        sentence=model.sentence,
                    )
                )
        connection.execute(
            update(twin)
            .where(twin.c.device == row.device)
            .values(
                report_sequence=report.sequence,
                reported=report.SerializeToString(deterministic=True),
                reported_at=now,
                **_ahead(row, report.generation),
            )
        )
        oldest = (
            select(event.c.id)
            .where(event.c.device == row.device)
            .order_by(event.c.id.desc())
            .offset(EVENTS_KEPT)
        )
        connection.execute(delete(event).where(event.c.id.in_(oldest)))

    # What goes out -----------------------------------------------------------------------

    async def publish(self, publisher: Publisher, tenant: str) -> None:
        """Publish whatever is due, for ever. A broker that is away is waited for."""
        while True:
            await self._due.wait()
            self._due.clear()
            try:
                await self._publish_due(publisher, tenant)
            except (MqttError, StoreFailed) as error:
                log.info("desired states wait: %s", error)
                self._due.set()
                await asyncio.sleep(RETRY_S)

    async def _publish_due(self, publisher: Publisher, tenant: str) -> None:
        due = await self._store.read(self._outbox)
        async with contextlib.AsyncExitStack():
            results = await asyncio.gather(
                *(publisher.publish_desired(tenant, name, document) for name, document in due),
                return_exceptions=True,
            )
        sent = [
            (name, document.generation)
            for (name, document), result in zip(due, results, strict=True)
            if not isinstance(result, BaseException)
        ]

        def write(connection: Connection) -> None:
            for name, generation in sent:
                # Only if nothing newer was wanted meanwhile.
                connection.execute(
                    update(twin)
                    .where(twin.c.device == name, twin.c.generation == generation)
                    .values(published_generation=generation)
                )

        if sent:
            await self._store.write(write)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _outbox(self, connection: Connection) -> list[tuple[str, pb.Desired]]:
        rows = connection.execute(
            select(twin).where(twin.c.generation > twin.c.published_generation)
        )
        return [(row.device, self._document(connection, row)) for row in rows]

    def _document(self, connection: Connection, row: Row[Any]) -> pb.Desired:
        document = pb.Desired(schema=SCHEMA, generation=row.generation, hub_epoch=self.epoch)
        for model, number in sorted(json.loads(row.desired).items()):
            wanted = self._wanted(connection, model, number)
            if wanted is not None:
                document.releases.add(
                    model=model,
                    release=number,
                    version=wanted.version,
                    index_target=wanted.index_target,
                    certificate_targets=wanted.certificate_targets,
                )
        return document

    # What the console reads --------------------------------------------------------------

    async def twins(self) -> list[Twin]:
        """Return every device by name."""

        def read(connection: Connection) -> list[Twin]:
            return [_twin(row) for row in connection.execute(select(twin).order_by(twin.c.device))]

        return await self._store.read(read)

    async def events(self, device: str, limit: int = 50) -> list[Event]:
        """Return a device's latest changes of phase, newest first."""

        def read(connection: Connection) -> list[Event]:
            query = select(event).where(event.c.device == device)
            rows = connection.execute(query.order_by(event.c.id.desc()).limit(limit))
            return [Event(**{name: row._mapping[name] for name in Event.__slots__}) for row in rows]

        return await self._store.read(read)

    async def running(self, model: str) -> Mapping[int, int]:
        """Return how many devices run each release of a model."""
        counts: dict[int, int] = {}
        for one in await self.twins():
            for reported in one.reported.models:
                if reported.model == model and reported.active_release:
                    counts[reported.active_release] = counts.get(reported.active_release, 0) + 1
        return counts


def _row(connection: Connection, device: str) -> Row[Any]:
    query = select(twin).where(twin.c.device == device)
    row = connection.execute(query).one_or_none()
    if row is None:
        connection.execute(insert(twin).values(device=device))
        row = connection.execute(query).one()
    return row


def _ahead(row: Row[Any], generation: int) -> dict[str, Any]:
    """A device ahead of us has been told by a database that we lost: go above it.

    Otherwise it would ignore everything we want for ever.
    """
    if generation <= row.generation:
        return {}
    log.warning("device %s is at generation %d, above ours", row.device, generation)
    return {"generation": generation + 1, "published_generation": 0}


def _notable(model: pb.ReportedModel) -> tuple[object, ...]:
    return model.phase, model.desired_release, model.active_release, model.code, model.attempt


def _twin(row: Row[Any]) -> Twin:
    return Twin(
        device=row.device,
        desired=json.loads(row.desired),
        generation=row.generation,
        published_generation=row.published_generation,
        reported=pb.Reported.FromString(row.reported),
        reported_at=row.reported_at,
        connected=row.connected,
    )
