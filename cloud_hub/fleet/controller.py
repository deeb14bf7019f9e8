"""Keeps what the hub wants of each device and what each device says: one row each.

A change of what is wanted raises the device's generation, which puts it into the outbox
(``outbox.py``). What devices say is written down by ``arrivals.py``.
"""

import asyncio
import functools
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from cloud_hub.fleet.arrivals import take
from cloud_hub.fleet.link import MAX_DESIRED_BYTES, Arrival
from cloud_hub.fleet.outbox import BATCH, Outbox, WantedRelease
from cloud_hub.store import schema
from cloud_hub.store.store import Store
from fogline_protocol import documents
from fogline_protocol.v1 import fleet_pb2 as pb

twin = schema.twin
event = schema.device_event
departed = schema.departed


class UnknownDevice(Exception):
    """No device of this name has ever reported, or it was forgotten since."""


class UnknownRelease(Exception):
    """The hub has not accepted such a release."""


class TooMuchWanted(Exception):
    """A device's desired state would not fit into one document: want fewer models of it."""


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
    """The fleet's rows: its tables are written here, by its outbox and by ``arrivals`` alone."""

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
        self.outbox = Outbox(store, wanted=wanted, published=self._changed, wait=wait)
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
                size = len(documents.canonical(self.outbox.document(generation, desired, describe)))
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
            return len(documents.canonical(self.outbox.document(magnitude, wanted, describe)))

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
        self._changed()
        self.outbox.wake()

    def _changed(self) -> None:
        self.revision += 1

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
        taken = await self._store.write(
            lambda connection: take(connection, arrivals, now, self.outbox.doubt)
        )
        self._changed()
        for arrival in arrivals:
            if isinstance(arrival.document, pb.Telemetry):
                self._telemetry(arrival.document)
        for state in taken.states:
            self._seen(state)
        if taken.due:
            self.outbox.wake()

    async def broker_forgot(self) -> None:
        """Note that the broker holds no desired state, so that all are published again."""
        await self._store.write(self.outbox.doubt)
        self.restated()

    async def epoch_published(self, epoch: str) -> None:
        """Remember the epoch for the next start of the hub."""
        self.outbox.epoch = epoch

        def write(connection: Connection) -> None:
            connection.execute(delete(schema.hub_epoch))
            connection.execute(insert(schema.hub_epoch).values(epoch=epoch))

        await self._store.write(write)
        # A broker that has been connected anew may take what it did not take before.
        self.outbox.wake()

    async def last_epoch(self) -> str | None:
        """Return the epoch that was published last, by this start of the hub or an earlier one."""
        return await self._store.read(
            lambda connection: connection.execute(select(schema.hub_epoch.c.epoch)).scalar()
        )

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


def _runs(reported: bytes, model: str, number: int) -> bool:
    return any(
        one.model == model and one.active_release == number
        for one in pb.Reported.FromString(reported).models
    )


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
