"""Keeps what the hub wants of each device and what each device says, and publishes the former.

The database is the truth and the broker a cache. Wanting is one row: a change raises the
device's generation, and ``published_generation < generation`` is the outbox. The publisher
sends such rows until the broker has acknowledged them; a hub killed in between sends them
again, and a device ignores what it has. Likewise ``departed`` names the devices that were
forgotten and still have something on the broker: it is cleared before anything is published,
so that a device that comes back finds what is wanted of it then. A report is taken if its
sequence number is above the last one, so repetition and order mean nothing; births and wills
likewise by start and connection of the device.
"""

import asyncio
import functools
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import Column, Connection, Row, delete, func, insert, select, update

from cloud_hub.errors import StoreFailed
from cloud_hub.fleet.link import MAX_COUNTER, MAX_DESIRED_BYTES, Arrival
from cloud_hub.store import schema
from cloud_hub.store.store import Store
from fogline_protocol import documents
from fogline_protocol.mqtt import MqttError, PacketTooLarge, PublishRefused
from fogline_protocol.v1 import fleet_pb2 as pb

log = logging.getLogger("fogline.controller")

SCHEMA = 1
RETRY_S = 2.0  # between attempts to publish while the broker is away
BATCH = 200  # desired states read, published and recorded together; a crash repeats so many
MAX_GENERATION = MAX_COUNTER - 1  # a device refuses any beyond it
EVENTS_KEPT = 200  # of one device
MAX_SENTENCE = 500  # characters; an agent's are no longer

twin = schema.twin
event = schema.device_event
departed = schema.departed


class UnknownDevice(Exception):
    """No device of this name has ever reported, or it was forgotten since."""


class UnknownRelease(Exception):
    """The hub has not accepted such a release."""


class TooMuchWanted(Exception):
    """A device's desired state would not fit into one document: want fewer models of it."""


class Publisher(Protocol):
    """Where desired states go."""

    async def publish_desired(self, tenant: str, device: str, desired: pb.Desired) -> None:
        """Return when the broker has it.

        Raises:
            ValueError, PublishRefused, PacketTooLarge: it never will.
            MqttError: not this time.
        """
        ...

    async def remove_desired(self, tenant: str, device: str) -> None:
        """Return when the broker has nothing for this device any more.

        Raises:
            PublishRefused: it never will.
            MqttError: not this time.
        """
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
        # A device without any model refuses in the name of none.
        phases = {models[name].phase for name in (*self.desired, "") if name in models}
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


@dataclass(frozen=True, slots=True)
class Answered:
    """How many rows of a device ended in one way."""

    model: str
    tier: str
    quality: str
    reason: str
    rows: int


@dataclass(frozen=True, slots=True)
class Running:
    """How many devices run one release, and what of it."""

    devices: int
    variants: Mapping[str, int]  # of those that tell it
    fallbacks: int  # devices that answer with something else than is meant for them


def falls_back(serving: pb.Serving) -> bool:
    """Return whether something else answers than the bundle means for such hardware."""
    meant = serving.meant_variant, serving.meant_provider
    return any(meant) and meant != (serving.variant, serving.provider)


class Controller:
    """The fleet's rows. Owner of ``twin``, ``device_event``, ``departed``, ``hub_epoch``."""

    def __init__(
        self,
        store: Store,
        *,
        wanted: Callable[[Connection, str, int], WantedRelease | None],
        telemetry: Callable[[pb.Telemetry], None],
        seen: Callable[[pb.DeviceState], None],
        wait: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Join the store with the parts that know releases and presence.

        Args:
            store: the hub's database.
            wanted: describes an accepted release, inside a transaction; None: there is none.
            telemetry: takes counts.
            seen: takes births and wills, in the order in which they were sent.
            wait: passes seconds.
        """
        self._store = store
        self._wanted = wanted
        self._telemetry = telemetry
        self._seen = seen
        self._wait = wait
        self._due = asyncio.Event()
        self._due.set()  # whatever a killed hub left unpublished
        # Devices of which it became doubtful, since the outbox was last read, that the broker
        # has what is being published. Filled and asked on the store's writer thread only.
        self._doubted: set[str] = set()
        self._unpublishable: dict[str, str] = {}  # by device: why, as it was logged
        self.epoch = ""
        self.revision = 0  # raised after every change, so that readers know when to read again

    # What operators want -----------------------------------------------------------------

    async def want(self, devices: Sequence[str] | None, model: str, number: int) -> Sequence[str]:
        """Want a release on these devices, None: on all that have reported; return their names.

        Raises:
            UnknownDevice: one of them has never reported.
            UnknownRelease: the hub has not accepted it.
            TooMuchWanted: with it, one of them could not be told any more what is wanted.
            StoreFailed: nothing was changed.
        """

        def write(connection: Connection) -> list[str]:
            if self._wanted(connection, model, number) is None:
                raise UnknownRelease(f"{model}@{number} is not a release of this hub")
            rows = _named(connection, devices)
            describe = functools.cache(functools.partial(self._wanted, connection))
            for name, row in rows.items():
                desired = json.loads(row.desired)
                if desired.get(model) == number:
                    continue
                desired[model] = number
                generation = row.generation + 1
                size = len(documents.canonical(self._document(generation, desired, describe)))
                if size > MAX_DESIRED_BYTES:
                    raise TooMuchWanted(
                        f"with {model}@{number} the desired state of {name} would take {size} "
                        f"bytes, at most {MAX_DESIRED_BYTES} are possible: it already names "
                        f"{len(desired) - 1} models"
                    )
                connection.execute(
                    update(twin)
                    .where(twin.c.device == name)
                    .values(desired=json.dumps(desired), generation=generation)
                )
            return list(rows)

        names = await self._store.write(write)
        self.restated()
        return names

    def restate(
        self, connection: Connection, model: str, number: int, *, at_any_size: bool = False
    ) -> Sequence[str]:
        """Have every device told anew that wants a release or says that it runs it.

        For whoever changes what goes with a release, inside the transaction that changes it; see
        ``Wishes`` in ``certificates.py``. A device that runs what is not wanted of it any more
        hears of the change as well: it may never arrive at what is.

        Raises:
            TooMuchWanted: one of them could not be told any more what is wanted; not with
                ``at_any_size``.
        """
        names = []
        describe = functools.cache(functools.partial(self._wanted, connection))

        @functools.cache  # a fleet wants much the same of all its devices
        def size(desired: str, magnitude: int) -> int:
            wanted = json.loads(desired)
            return len(documents.canonical(self._document(magnitude, wanted, describe)))

        query = select(twin.c.device, twin.c.desired, twin.c.generation, twin.c.reported)
        for row in connection.execute(query.order_by(twin.c.device)).all():
            wanted = json.loads(row.desired)
            if wanted.get(model) != number and not _runs(row.reported, model, number):
                continue
            magnitude = 10 ** len(str(row.generation + 1)) - 1
            if not at_any_size and (found := size(row.desired, magnitude)) > MAX_DESIRED_BYTES:
                raise TooMuchWanted(
                    f"the desired state of {row.device} would take {found} bytes, at most "
                    f"{MAX_DESIRED_BYTES} are possible: it already names {len(wanted)} models"
                )
            names.append(row.device)
        for at in range(0, len(names), BATCH):
            connection.execute(
                update(twin)
                .where(twin.c.device.in_(names[at : at + BATCH]))
                .values(generation=twin.c.generation + 1)
            )
        return names

    def restated(self) -> None:
        """Publish what is due: the transaction that made it so was committed."""
        self.revision += 1
        self._due.set()

    async def unwant(self, devices: Sequence[str] | None, model: str) -> Sequence[str]:
        """Want no release of a model on these devices, None: on all; return those that change.

        A device drops what it was doing about the model and goes on with what it has committed.

        Raises:
            UnknownDevice: one of them has never reported.
            StoreFailed: nothing was changed.
        """

        def write(connection: Connection) -> list[str]:
            changed = []
            for name, row in _named(connection, devices).items():
                desired = json.loads(row.desired)
                if desired.pop(model, None) is not None:
                    connection.execute(
                        update(twin)
                        .where(twin.c.device == name)
                        .values(desired=json.dumps(desired), generation=row.generation + 1)
                    )
                    changed.append(name)
            return changed

        names = await self._store.write(write)
        self.restated()
        return names

    async def forget(self, device: str) -> bool:
        """Forget what is wanted of a device and what it said; return whether there was anything.

        What lies on the broker for it is cleared as soon as that can be reached. A device that
        reports again is a new one, of which nothing is wanted.

        Raises:
            StoreFailed: nothing was changed.
        """

        def write(connection: Connection) -> bool:
            if not connection.execute(delete(twin).where(twin.c.device == device)).rowcount:
                return False
            connection.execute(delete(event).where(event.c.device == device))
            connection.execute(delete(departed).where(departed.c.device == device))
            connection.execute(insert(departed).values(device=device))
            return True

        found = await self._store.write(write)
        self.restated()
        return found

    # What devices say --------------------------------------------------------------------

    async def commit(self, arrivals: Sequence[Arrival]) -> None:
        """Take documents in this order; return when they are durable."""
        now = time.time()
        states, due = await self._store.write(
            lambda connection: self._apply(connection, arrivals, now)
        )
        self.revision += 1
        for arrival in arrivals:
            if isinstance(arrival.document, pb.Telemetry):
                self._telemetry(arrival.document)
        for state in states:
            self._seen(state)
        if due:
            self._due.set()

    async def broker_forgot(self) -> None:
        """Note that the broker holds no desired state, so that all are published again."""

        def write(connection: Connection) -> None:
            connection.execute(update(twin).values(published_generation=0))
            self._doubted.update(connection.execute(select(twin.c.device)).scalars())

        await self._store.write(write)
        self.restated()

    async def epoch_published(self, epoch: str) -> None:
        """Remember the epoch for the next start of the hub."""
        self.epoch = epoch

        def write(connection: Connection) -> None:
            connection.execute(delete(schema.hub_epoch))
            connection.execute(insert(schema.hub_epoch).values(epoch=epoch))

        await self._store.write(write)
        # A broker that has been connected anew may take what it did not take before.
        self._due.set()

    async def last_epoch(self) -> str | None:
        """Return the epoch that was published last, by this start of the hub or an earlier one."""
        return await self._store.read(
            lambda connection: connection.execute(select(schema.hub_epoch.c.epoch)).scalar()
        )

    def _apply(
        self, connection: Connection, arrivals: Sequence[Arrival], now: float
    ) -> tuple[list[pb.DeviceState], bool]:
        """Return the births and wills that count, and whether something is to be published."""
        states: list[pb.DeviceState] = []
        due = False
        for arrival in arrivals:
            document = arrival.document
            if isinstance(document, pb.Telemetry):
                continue
            will = isinstance(document, pb.DeviceState) and not document.online
            row = _row(connection, arrival.device, new=not will)
            if row is None:
                continue  # it was forgotten, and only now its broker notices that it is gone
            if isinstance(document, pb.Reported):
                due |= self._apply_report(connection, row, document, now)
            elif _moment(document) > (row.boot, row.connection, not row.connected):
                due |= self._apply_state(connection, row, document)
                states.append(document)
        return states, due

    def _apply_state(self, connection: Connection, row: Row[Any], state: pb.DeviceState) -> bool:
        changes: dict[str, Any] = {
            "boot": state.boot,
            "connection": state.connection,
            "connected": state.online,
        }
        due = _ahead(row, state.generation)
        if state.online and state.generation < row.generation:
            # It has not got what was published: perhaps the broker has not either.
            due = {"published_generation": 0}
            self._doubted.add(row.device)
        changes |= due
        connection.execute(update(twin).where(twin.c.device == row.device).values(**changes))
        return bool(due)

    def _apply_report(
        self, connection: Connection, row: Row[Any], report: pb.Reported, now: float
    ) -> bool:
        if report.sequence <= row.report_sequence:
            return False
        before = {m.model: m for m in pb.Reported.FromString(row.reported).models}
        for model in report.models:
            last = before.get(model.model)
            swapped = last is not None and _swapped(last, model)
            if last is None or swapped or _notable(last) != _notable(model):
                connection.execute(
                    insert(event).values(
                        device=row.device,
                        at=now,
                        generation=report.generation,
                        model=_text(event.c.model, model.model),
                        release=min(model.desired_release or model.active_release, MAX_COUNTER),
                        phase=_text(event.c.phase, model.phase),
                        code=_text(event.c.code, model.code),
                        sentence=_text(
                            event.c.sentence,
                            model.sentence or (_answers(model.serving) if swapped else ""),
                        ),
                    )
                )
        due = _ahead(row, report.generation)
        connection.execute(
            update(twin)
            .where(twin.c.device == row.device)
            .values(
                report_sequence=report.sequence,
                reported=report.SerializeToString(deterministic=True),
                reported_at=now,
                **due,
            )
        )
        oldest = (
            select(event.c.id)
            .where(event.c.device == row.device)
            .order_by(event.c.id.desc())
            .offset(EVENTS_KEPT)
        )
        connection.execute(delete(event).where(event.c.id.in_(oldest)))
        return bool(due)

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
                await self._wait(RETRY_S)

    async def _publish_due(self, publisher: Publisher, tenant: str) -> None:
        """Go once through the outbox, by name, a batch at a time."""
        await self._clear_departed(publisher, tenant)
        last = ""
        while True:
            self._doubted = set()
            due = await self._store.read(functools.partial(self._outbox, after=last))
            if not due:
                return
            results = await asyncio.gather(
                *(publisher.publish_desired(tenant, name, document) for name, document in due),
                return_exceptions=True,
            )
            sent: list[tuple[str, int]] = []
            failure: BaseException | None = None
            for (name, document), result in zip(due, results, strict=True):
                match result:
                    case None:
                        sent.append((name, document.generation))
                        self._unpublishable.pop(name, None)
                    case ValueError() | PublishRefused() | PacketTooLarge():
                        self._note_unpublishable(name, str(result))
                    case _:
                        failure = result
            if sent:
                await self._store.write(functools.partial(self._record, sent=sent))
                self.revision += 1
            if failure is not None:
                raise failure
            last = due[-1][0]

    async def _clear_departed(self, publisher: Publisher, tenant: str) -> None:
        """Clear what the broker has for devices that were forgotten, a batch at a time."""
        last = ""
        while True:
            names = await self._store.read(functools.partial(_departed, after=last))
            if not names:
                return
            results = await asyncio.gather(
                *(publisher.remove_desired(tenant, name) for name in names), return_exceptions=True
            )
            cleared: list[str] = []
            failure: BaseException | None = None
            for name, result in zip(names, results, strict=True):
                match result:
                    case None:
                        cleared.append(name)
                        self._unpublishable.pop(name, None)
                    case PublishRefused():
                        self._note_unpublishable(name, str(result), "cleared")
                    case _:
                        failure = result
            if cleared:
                # Nobody but this publisher sends, so nothing newer was sent meanwhile.
                await self._store.write(functools.partial(_is_cleared, devices=cleared))
            if failure is not None:
                raise failure
            last = names[-1]

    def _note_unpublishable(self, device: str, why: str, verb: str = "published") -> None:
        # It stays in the outbox and is tried again whenever that is gone through.
        if self._unpublishable.get(device) != why:
            log.error("the desired state of %s cannot be %s: %s", device, verb, why)
        self._unpublishable[device] = why

    def _record(self, connection: Connection, sent: Sequence[tuple[str, int]]) -> None:
        for name, generation in sent:
            if name in self._doubted:
                continue  # the broker may have forgotten it since: it is published again
            # Only if nothing newer was wanted meanwhile.
            connection.execute(
                update(twin)
                .where(twin.c.device == name, twin.c.generation == generation)
                .values(published_generation=generation)
            )

    def _outbox(self, connection: Connection, after: str) -> list[tuple[str, pb.Desired]]:
        rows = connection.execute(
            select(twin.c.device, twin.c.generation, twin.c.desired)
            .where(twin.c.generation > twin.c.published_generation, twin.c.device > after)
            .order_by(twin.c.device)
            .limit(BATCH)
        )
        describe = functools.cache(functools.partial(self._wanted, connection))
        return [
            (row.device, self._document(row.generation, json.loads(row.desired), describe))
            for row in rows
        ]

    def _document(
        self,
        generation: int,
        desired: Mapping[str, int],
        describe: Callable[[str, int], WantedRelease | None],
    ) -> pb.Desired:
        document = pb.Desired(schema=SCHEMA, generation=generation, hub_epoch=self.epoch)
        for model, number in sorted(desired.items()):
            wanted = describe(model, number)
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

    async def answered(self, device: str, since: float) -> Sequence[Answered]:
        """Return how a device's rows ended since then, by whole minutes, the most frequent first.

        Args:
            device: its name.
            since: seconds since the epoch.
        """
        o = schema.outcome.c
        rows = func.sum(o.rows).label("rows")
        query = (
            select(o.model, o.tier, o.quality, o.reason, rows)
            .where(o.device == device, o.minute >= int(since // 60))
            .group_by(o.model, o.tier, o.quality, o.reason)
            .order_by(rows.desc(), o.model, o.tier, o.quality, o.reason)
        )

        def read(connection: Connection) -> list[Answered]:
            return [
                Answered(row.model, row.tier, row.quality, row.reason, int(row.rows))
                for row in connection.execute(query)
            ]

        return await self._store.read(read)

    async def running(self, model: str) -> Mapping[int, Running]:
        """Return which devices run each release of a model, in numbers."""
        found: dict[int, list[pb.Serving]] = {}
        for one in await self.twins():
            for reported in one.reported.models:
                if reported.model == model and reported.active_release:
                    found.setdefault(reported.active_release, []).append(reported.serving)
        return {
            number: Running(
                devices=len(servings),
                variants=Counter(serving.variant for serving in servings if serving.variant),
                fallbacks=sum(map(falls_back, servings)),
            )
            for number, servings in found.items()
        }


def _named(connection: Connection, devices: Sequence[str] | None) -> Mapping[str, Any]:
    """Return the rows of these devices in this order, or of all by name.

    Raises:
        UnknownDevice: one of them has never reported.
    """
    query = select(twin.c.device, twin.c.desired, twin.c.generation)
    known = {row.device: row for row in connection.execute(query)}
    for name in devices or ():
        if name not in known:
            raise UnknownDevice(f"no device {name!r} has reported to this hub")
    return {name: known[name] for name in (sorted(known) if devices is None else devices)}


def _departed(connection: Connection, after: str) -> list[str]:
    query = select(departed.c.device).where(departed.c.device > after)
    return list(connection.execute(query.order_by(departed.c.device).limit(BATCH)).scalars())


def _is_cleared(connection: Connection, devices: Sequence[str]) -> None:
    connection.execute(delete(departed).where(departed.c.device.in_(devices)))


def _row(connection: Connection, device: str, *, new: bool) -> Row[Any] | None:
    """Return a device's row, which is made if it is ``new``."""
    query = select(twin).where(twin.c.device == device)
    row = connection.execute(query).one_or_none()
    if row is None and new:
        connection.execute(insert(twin).values(device=device))
        row = connection.execute(query).one()
    return row


def _runs(reported: bytes, model: str, number: int) -> bool:
    return any(
        one.model == model and one.active_release == number
        for one in pb.Reported.FromString(reported).models
    )


def _moment(state: pb.DeviceState) -> tuple[int, int, bool]:
    """Return what orders the births and wills of one device; a will follows its own birth."""
    return state.boot, state.connection, not state.online


def _text(column: Column[str], value: str) -> str:
    """Return what a device said in a form that every database takes."""
    length: int = getattr(column.type, "length", None) or MAX_SENTENCE
    return value.replace("\0", "?")[:length]


def _ahead(row: Row[Any], generation: int) -> dict[str, Any]:
    """Return the changes for a device that has been told by a database that we lost.

    Below its generation it would ignore everything we want for ever, so ours goes above it.
    """
    if generation <= row.generation:
        return {}
    if generation >= MAX_GENERATION:
        log.error(
            "device %s claims generation %d, above which there is none: it cannot be told "
            "anything until its data directory is replaced",
            row.device,
            generation,
        )
        return {}
    log.warning("device %s is at generation %d, above ours", row.device, generation)
    return {"generation": generation + 1, "published_generation": 0}


def _notable(model: pb.ReportedModel) -> tuple[object, ...]:
    return model.phase, model.desired_release, model.active_release, model.code, model.attempt


def _swapped(before: pb.ReportedModel, now: pb.ReportedModel) -> bool:
    """Return whether something else of the same release answers, without an update."""
    return (
        before.active_release == now.active_release
        and before.HasField("serving")
        and now.HasField("serving")
        and _place(before.serving) != _place(now.serving)
    )


def _place(serving: pb.Serving) -> str:
    return f"{serving.variant} on {serving.provider}"


def _answers(serving: pb.Serving) -> str:
    said = f"answers with {_place(serving)} now"
    return f"{said}: {serving.aside}" if serving.aside else said


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
