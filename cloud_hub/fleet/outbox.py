"""Publishes what is wanted of each device, and clears what was, until the broker has it.

The database is the truth and the broker a cache. ``published_generation < generation`` is the
outbox: such rows are sent until the broker has acknowledged them. A hub killed in between sends
them again, and a device ignores what it has. Likewise ``departed`` names the devices that were
forgotten and still have something on the broker: it is cleared before anything is published,
so that a device that comes back finds what is wanted of it then.
"""

import asyncio
import functools
import json
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sqlalchemy import Connection, delete, select, update

from cloud_hub.errors import StoreFailed
from cloud_hub.store import schema
from cloud_hub.store.store import Store
from fogline_protocol.mqtt import MqttError, PacketTooLarge, PublishRefused
from fogline_protocol.v1 import fleet_pb2 as pb

log = logging.getLogger("fogline.outbox")

SCHEMA = 1
RETRY_S = 2.0  # between attempts to publish while the broker is away
BATCH = 200  # desired states read, published and recorded together; a crash repeats so many

twin = schema.twin
departed = schema.departed

# A device, and what it is to be told; None: what it was told goes from the broker.
Due = tuple[str, pb.Desired | None]
Read = Callable[..., list[Due]]  # of a connection and the last name that was seen


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
            ValueError, PublishRefused, PacketTooLarge: it never will.
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


Describe = Callable[[str, int], WantedRelease | None]


class Outbox:
    """What is to be sent, and what became of that."""

    def __init__(
        self,
        store: Store,
        *,
        wanted: Callable[[Connection, str, int], WantedRelease | None],
        published: Callable[[], None],
        wait: Callable[[float], Awaitable[None]],
    ) -> None:
        """Begin with whatever a killed hub left unsent.

        Args:
            store: the hub's database.
            wanted: describes an accepted release, inside a transaction; None: there is none.
            published: is called whenever more of the outbox was recorded as sent.
            wait: passes seconds.
        """
        self._store = store
        self._wanted = wanted
        self._published = published
        self._wait = wait
        self._woken = asyncio.Event()
        self._woken.set()
        # Devices of which it became doubtful, since the outbox was last read, that the broker
        # has what is being published. Filled and asked on the store's writer thread only.
        self._doubted: set[str] = set()
        self._refused: dict[str, str] = {}  # by device: why, as it was logged
        self.epoch = ""

    def wake(self) -> None:
        """Go through the outbox: something in it has changed."""
        self._woken.set()

    def doubt(self, connection: Connection, devices: Collection[str] | None = None) -> None:
        """Send again what the broker may not have, None: to all devices. In a transaction."""
        if devices is None:
            devices = connection.execute(select(twin.c.device)).scalars().all()
            connection.execute(update(twin).values(published_generation=0))
        else:
            named = twin.c.device.in_(devices)
            connection.execute(update(twin).where(named).values(published_generation=0))
        self._doubted.update(devices)

    def document(
        self, generation: int, desired: Mapping[str, int], describe: Describe
    ) -> pb.Desired:
        """Return what a device is told that shall run ``desired``: release numbers by model."""
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

    async def publish(self, publisher: Publisher, tenant: str) -> None:
        """Send whatever is due, for ever. A broker that is away is waited for."""
        while True:
            await self._woken.wait()
            self._woken.clear()
            try:
                await self._go_through(_to_clear, publisher, tenant)
                await self._go_through(self._to_publish, publisher, tenant)
            except (MqttError, StoreFailed) as error:
                log.info("desired states wait: %s", error)
                self._woken.set()
                await self._wait(RETRY_S)

    async def _go_through(self, read: Read, publisher: Publisher, tenant: str) -> None:
        """Send once what ``read`` finds, by name, a batch at a time."""
        last = ""
        while True:
            self._doubted = set()
            batch = await self._store.read(functools.partial(read, after=last))
            if not batch:
                return
            results = await asyncio.gather(
                *(_send(publisher, tenant, *one) for one in batch), return_exceptions=True
            )
            sent: list[Due] = []
            failure: BaseException | None = None
            for one, result in zip(batch, results, strict=True):
                match result:
                    case None:
                        sent.append(one)
                        self._refused.pop(one[0], None)
                    case ValueError() | PublishRefused() | PacketTooLarge():
                        self._note_refusal(*one, str(result))
                    case _:
                        failure = result
            if sent:
                await self._store.write(functools.partial(self._record, sent=sent))
                self._published()
            if failure is not None:
                raise failure
            last = batch[-1][0]

    def _note_refusal(self, device: str, document: pb.Desired | None, why: str) -> None:
        # It stays in the outbox and is tried again whenever that is gone through.
        if self._refused.get(device) != why:
            verb = "cleared" if document is None else "published"
            log.error("the desired state of %s cannot be %s: %s", device, verb, why)
        self._refused[device] = why

    def _to_publish(self, connection: Connection, after: str) -> list[Due]:
        rows = connection.execute(
            select(twin.c.device, twin.c.generation, twin.c.desired)
            .where(twin.c.generation > twin.c.published_generation, twin.c.device > after)
            .order_by(twin.c.device)
            .limit(BATCH)
        )
        describe = functools.cache(functools.partial(self._wanted, connection))
        return [
            (row.device, self.document(row.generation, json.loads(row.desired), describe))
            for row in rows
        ]

    def _record(self, connection: Connection, sent: Sequence[Due]) -> None:
        # Nobody but this publisher sends, so nothing newer was sent to who departed meanwhile.
        if gone := [device for device, document in sent if document is None]:
            connection.execute(delete(departed).where(departed.c.device.in_(gone)))
        for device, document in sent:
            if document is None or device in self._doubted:
                continue  # the broker may have forgotten it since: it is published again
            # Only if nothing newer was wanted meanwhile.
            connection.execute(
                update(twin)
                .where(twin.c.device == device, twin.c.generation == document.generation)
                .values(published_generation=document.generation)
            )


def _to_clear(connection: Connection, after: str) -> list[Due]:
    query = select(departed.c.device).where(departed.c.device > after)
    names = connection.execute(query.order_by(departed.c.device).limit(BATCH)).scalars()
    return [(name, None) for name in names]


async def _send(
    publisher: Publisher, tenant: str, device: str, document: pb.Desired | None
) -> None:
    if document is None:
        await publisher.remove_desired(tenant, device)
    else:
        await publisher.publish_desired(tenant, device, document)
