"""Certificates as objects of their own: attached to a release, replaced, withdrawn.

A certificate is signed by its own role, so it can be issued for a release that is in the field
for months and taken back without touching a file of it. What it says was decided by the
workshop; here it is only asked whether it speaks of this release at all.

The table is what the hub believes and the signed metadata follows it. An issue is signed first
and then believed, a withdrawal is believed first and then no longer signed: wherever the power
goes, no device is sent to a certificate that is not signed, and ``reconcile`` finishes the rest.

What is believed and what devices are told change in one transaction, so a hub that is killed
right after it has changed its mind tells them when it returns.

Replacing is issuing: of several certificates for one variant on one hardware class a device takes
the one that was issued last, by the document's own date, as long as that one holds.
"""

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from cloud_hub.fleet.controller import TooMuchWanted
from cloud_hub.fleet.trust import Repository
from cloud_hub.store import schema
from cloud_hub.store.store import Store
from fogline_protocol import certificate as documents
from fogline_protocol import release, release_index
from fogline_protocol.certificate import Certificate
from fogline_protocol.release import Bundle
from fogline_protocol.release_index import MAX_CERTIFICATES

LONGEST_REASON = 500  # characters
_ID = re.compile("[0-9a-f]{16}")


def reason_in(text: str) -> str:
    """Return the reason that a text gives, as one printable line; empty: none."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


class CertificateRefused(Exception):
    """It does not speak of this release, or there is no such thing: the sentence says what differs."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that is, or was, attached to a release."""

    id: str
    release: int
    certificate: Certificate
    attached_at: float
    withdrawn_at: float | None
    reason: str  # why it was withdrawn

    @property
    def target(self) -> str:
        """Return the TUF target path that devices are told."""
        return release_index.certificate_target(self.certificate.model, self.release, self.id)


@dataclass(frozen=True, slots=True)
class Change:
    """A certificate as it stands now, and the devices that are told so; none if nothing changed."""

    issued: Issued
    devices: Sequence[str]


class Wishes(Protocol):
    """What is wanted of devices, as far as certificates are part of it."""

    def restate(
        self, connection: Connection, model: str, number: int, *, at_any_size: bool = False
    ) -> Sequence[str]:
        """Have every device of a release told anew, inside a transaction; return their names.

        Raises:
            TooMuchWanted: one of them could not be told; not with ``at_any_size``.
        """
        ...

    def restated(self) -> None:
        """Note that the transaction was committed."""
        ...


class Certificates:
    """The certificates of all releases."""

    def __init__(
        self,
        store: Store,
        repository: Repository,
        wishes: Wishes,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._repository = repository
        self._wishes = wishes
        self._clock = clock
        self._changing = asyncio.Lock()  # a withdrawal must not overtake the issue it undoes

    async def issue(self, model: str, number: int, certificate: Certificate) -> Change:
        """Attach a certificate to a release, sign it and tell the devices of that release.

        One that was withdrawn holds again. One that holds already changes nothing.

        Raises:
            CertificateRefused: there is no such release, the certificate is not about it, or too
                many hold for it already.
            TooMuchWanted: with it, a device could not be told any more what is wanted of it.
            KeyMissing: the hub cannot sign.
            StoreFailed: the database cannot take it; nothing refers to it.
        """
        bundle, hub = await self._store.read(lambda c: _bundles(c, model, number))
        now = self._clock()
        problem = objection(certificate, bundle, hub, now)
        if problem is not None:
            raise CertificateRefused(
                "certificate/other", f"certificate {certificate.id}: {problem}"
            )
        target = release_index.certificate_target(model, number, certificate.id)

        def believe(connection: Connection) -> Sequence[str]:
            if not attach(connection, model, number, certificate, now):
                return ()
            if (holding := len(named(connection, model, number, now))) > MAX_CERTIFICATES:
                raise CertificateRefused(
                    "certificate/too-many",
                    f"{holding} certificates would hold for {model}@{number}, a device takes at most "
                    f"{MAX_CERTIFICATES}: withdraw those of variants or hardware that nobody runs",
                )
            return self._wishes.restate(connection, model, number)

        async with self._changing:
            await asyncio.to_thread(
                self._repository.publish, {target: certificate.to_json()}, now=now
            )
            try:
                devices = await self._store.write(believe)
            except (CertificateRefused, TooMuchWanted):
                await asyncio.to_thread(self._repository.publish, {}, [target], now=now)
                raise
            self._wishes.restated()
            return Change(await self.show(model, number, certificate.id), devices)

    async def withdraw(self, model: str, number: int, id: str, *, reason: str) -> Change:
        """Take a certificate back and tell the devices of its release.

        Those that ask find it gone. Doing it again changes nothing.

        Raises:
            CertificateRefused: it was never attached to this release.
            KeyMissing: the hub cannot sign; devices are told all the same.
            StoreFailed: the database cannot take it; it still holds.
        """
        now = self._clock()
        told = reason_in(reason)[:LONGEST_REASON]

        def disbelieve(connection: Connection) -> Sequence[str]:
            connection.execute(
                schema.certificate.update()
                .where(*_is(model, number, id))
                .values(withdrawn_at=now, reason=told)
            )
            # Nothing stands in the way of a withdrawal: what is wanted gets smaller by it.
            return self._wishes.restate(connection, model, number, at_any_size=True)

        async with self._changing:
            found = await self.show(model, number, id)
            devices: Sequence[str] = ()
            if found.withdrawn_at is None:
                devices = await self._store.write(disbelieve)
            try:
                await asyncio.to_thread(self._repository.publish, {}, [found.target], now=now)
            finally:
                # Last, because those that run what they are not to run any more ask when they hear.
                self._wishes.restated()
            return Change(await self.show(model, number, id), devices)

    async def list(self, model: str | None = None, number: int | None = None) -> Sequence[Issued]:
        """Return certificates, withdrawn ones included, the latest first."""

        def read(connection: Connection) -> Sequence[Issued]:
            query = schema.certificate.select().order_by(
                schema.certificate.c.attached_at.desc(), schema.certificate.c.id
            )
            if model is not None:
                query = query.where(schema.certificate.c.model == model)
            if number is not None:
                query = query.where(schema.certificate.c.release == number)
            return [_issued(row) for row in connection.execute(query)]

        return await self._store.read(read)

    async def show(self, model: str, number: int, id: str) -> Issued:
        """Return one certificate.

        Raises:
            CertificateRefused: it was never attached to this release.
        """
        query = schema.certificate.select().where(*_is(model, number, id))
        # Not every database takes any text for an id.
        named = _ID.fullmatch(id) is not None
        row = await self._store.read(lambda c: c.execute(query).first()) if named else None
        if row is None:
            raise CertificateRefused(
                "certificate/unknown", f"release {number} of {model} has no certificate {id!r}"
            )
        return _issued(row)

    async def reconcile(self) -> None:
        """Sign what the table holds and nothing that was withdrawn. Call it once at every start."""
        async with self._changing:
            everything = await self.list()
            add = {i.target: i.certificate.to_json() for i in everything if i.withdrawn_at is None}
            gone = [i.target for i in everything if i.withdrawn_at is not None]
            await asyncio.to_thread(self._repository.publish, add, gone, now=self._clock())


def objection(
    certificate: Certificate, bundle: Bundle, hub: Bundle | None, now: float
) -> str | None:
    """Say why a certificate is not about ``bundle`` paired with ``hub``, or None if it is."""
    if (certificate.model, certificate.version) != (bundle.model, bundle.version):
        return (
            f"it speaks of {certificate.model} {certificate.version}, the release is "
            f"{bundle.model} {bundle.version}"
        )
    try:
        variant = bundle.variant(certificate.variant)
    except KeyError:
        return f"the release has no variant {certificate.variant!r}"
    if bundle.files[variant.path].sha256 != certificate.variant_sha256:
        return f"it was measured on another file than the release's {variant.path}"
    if bundle.escalates_to is None or hub is None:
        return "the release escalates to no model, so there is nothing to certify"
    if certificate.hub_model != hub.model:
        return f"it compares with {certificate.hub_model}, the release escalates to {hub.model}"
    if certificate.hub_sha256 not in {hub.files[v.path].sha256 for v in hub.variants}:
        return f"it compares with another file than those of {hub.model} {hub.version}"
    if certificate.score != bundle.score:
        return "its score is not the one that the release computes"
    if certificate.expires_at.timestamp() <= now:
        return f"it expired at {certificate.expires_at.isoformat()}"
    return None


def attach(
    connection: Connection, model: str, number: int, certificate: Certificate, now: float
) -> bool:
    """Insert the row of a signed certificate, or make a withdrawn one hold again.

    Returns:
        Whether it did not hold before.
    """
    known = connection.execute(
        sa.select(schema.certificate.c.withdrawn_at).where(*_is(model, number, certificate.id))
    ).first()
    if known is None:
        connection.execute(
            schema.certificate.insert().values(
                model=model,
                release=number,
                id=certificate.id,
                variant=certificate.variant,
                hardware_class=certificate.hardware_class,
                issued_at=certificate.issued_at.timestamp(),
                expires_at=certificate.expires_at.timestamp(),
                document=certificate.to_json().decode(),
                attached_at=now,
                withdrawn_at=None,
                reason="",
            )
        )
    elif known.withdrawn_at is not None:
        connection.execute(
            schema.certificate.update()
            .where(*_is(model, number, certificate.id))
            .values(withdrawn_at=None, reason="")
        )
    return known is None or known.withdrawn_at is not None


def named(connection: Connection, model: str, number: int, now: float) -> tuple[str, ...]:
    """Return the targets that a desired state names next to a release.

    Those that hold now, the latest issued first, without the ones that no device would ever take:
    another was issued later for the same variant and hardware class, and holds as long.
    """
    c = schema.certificate.c
    latest_first = connection.execute(
        sa.select(c.id, c.variant, c.hardware_class, c.expires_at)
        .where(c.model == model, c.release == number)
        .where(c.withdrawn_at.is_(None), c.expires_at > now)
        .order_by(c.issued_at.desc(), c.id)
    )
    covered_until: dict[tuple[str, str], float] = {}
    found = []
    for row in latest_first:
        place = row.variant, row.hardware_class
        if row.expires_at > covered_until.get(place, 0.0):
            covered_until[place] = row.expires_at
            found.append(release_index.certificate_target(model, number, row.id))
    return tuple(found)


def _bundles(connection: Connection, model: str, number: int) -> tuple[Bundle, Bundle | None]:
    table = schema.release
    row = connection.execute(
        table.select().where(table.c.model == model, table.c.number == number)
    ).first()
    if row is None:
        raise CertificateRefused("release/unknown", f"there is no release {number} of {model}")
    hub = connection.execute(
        sa.select(table.c.document).where(table.c.bundle_sha256 == row.escalates_to_sha256)
    ).scalar()
    return (
        release.parse(row.document.encode()),
        None if hub is None else release.parse(hub.encode()),
    )


def _is(model: str, number: int, id: str) -> tuple[sa.ColumnElement[bool], ...]:
    table = schema.certificate
    return (table.c.model == model, table.c.release == number, table.c.id == id)


def _issued(row: Row[Any]) -> Issued:
    return Issued(
        id=row.id,
        release=row.release,
        certificate=documents.parse(row.document.encode()),
        attached_at=row.attached_at,
        withdrawn_at=row.withdrawn_at,
        reason=row.reason,
    )
