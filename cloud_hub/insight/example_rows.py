"""The rows of examples: contents, and the ways in which they came. Transactions as functions.

``example`` is one content of one tenant's device model, ``sighting`` one way in which it came: from
whom, why, and what both tiers said. Deleting takes sightings; an example goes with its last one.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    select,
    update,
)

from cloud_hub.insight.example_codec import Facts
from cloud_hub.insight.example_files import Group
from cloud_hub.store import schema

PAGE = 64  # examples read at once
EVICTED_AT_ONCE = 1024
ROW_BYTES = 512  # what the database takes of a sighting beside its answers, about


@dataclass(frozen=True, slots=True)
class Selection:
    """Which sightings are meant; what is left empty means all."""

    model: str = ""
    device: str = ""
    source: str | None = None
    since: float | None = None  # seconds since the epoch, from here on
    until: float | None = None  # up to here, and not from here on


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of one device model."""

    tenant: str
    model: str
    examples: int
    bytes: int
    oldest: float  # seconds since the epoch
    newest: float


@dataclass(frozen=True, slots=True)
class Deleted:
    """What a deletion took away."""

    sightings: int
    examples: int  # that nobody else had sent


@dataclass(frozen=True, slots=True)
class Row:
    """One row of an offer, packed."""

    group: Group
    facts: Facts
    layout: str
    disk_bytes: int  # of the file
    edge: bytes  # packed outputs
    hub: bytes

    @property
    def key(self) -> str:
        """What tells it apart from other sightings of the same content."""
        f = self.facts
        told_apart = (
            f.device, f.source, f.reason, f.propensity, f.release, f.edge_sha256, f.hub_model,
            f.hub_sha256,
        )  # fmt: skip
        return hashlib.sha256(repr(told_apart).encode()).hexdigest()


def note(connection: Connection, rows: Sequence[Row]) -> tuple[int, dict[Group, int]]:
    """Write rows; return how many contents are new, and the bytes that each group grew by.

    A handful of statements for all of them: one by one they would take the hub's processor longer
    than the answers did.
    """
    contents: dict[tuple[Group, str], Row] = {}  # the last row of each
    for row in rows:
        contents[row.group, row.facts.sha256] = row
    numbers = _numbers(connection, contents)
    grown = dict.fromkeys((row.group for row in rows), 0)
    new = [row for name, row in contents.items() if name not in numbers]
    for row in new:
        grown[row.group] += row.disk_bytes
    known = [{"number": number, "at": contents[name].facts.at} for name, number in numbers.items()]
    e, s = schema.example, schema.sighting
    if known:
        again = update(e).where(e.c.id == bindparam("number")).values(last_at=bindparam("at"))
        connection.execute(again, known)
    if new:
        values = [
            {
                **row.group._asdict(),
                "sha256": row.facts.sha256,
                "layout": row.layout,
                "bytes": row.disk_bytes,
                "last_at": row.facts.at,
            }
            for row in new
        ]
        connection.execute(insert(e), values)
        numbers = _numbers(connection, contents)

    ways: dict[tuple[int, str], Row] = {}
    times: Counter[tuple[int, str]] = Counter()
    for row in rows:
        way = numbers[row.group, row.facts.sha256], row.key
        ways[way] = row
        times[way] += 1
    of = s.c.example.in_(sorted(set(numbers.values())))
    seen = {
        (one.example, one.key) for one in connection.execute(select(s.c.example, s.c.key).where(of))
    }
    more = [
        {"number": way[0], "way": way[1], "more": times[way], "at": row.facts.at}
        for way, row in ways.items()
        if way in seen
    ]
    if more:
        connection.execute(
            update(s)
            .where(s.c.example == bindparam("number"), s.c.key == bindparam("way"))
            .values(times=s.c.times + bindparam("more"), last_at=bindparam("at")),
            more,
        )
    fresh = [_sighting(way, row, times[way]) for way, row in ways.items() if way not in seen]
    if fresh:
        connection.execute(insert(s), fresh)
    for way, row in ways.items():
        if way not in seen:
            grown[row.group] += _answer_bytes(row)
    return len(new), grown


def _numbers(
    connection: Connection, contents: Collection[tuple[Group, str]]
) -> dict[tuple[Group, str], int]:
    """Return the numbers of the contents that are known."""
    e = schema.example.c
    names: dict[Group, list[str]] = {}
    for group, sha256 in contents:
        names.setdefault(group, []).append(sha256)
    return {
        (group, one.sha256): one.id
        for group, shas in names.items()
        for one in connection.execute(
            select(e.id, e.sha256).filter_by(**group._asdict()).where(e.sha256.in_(shas))
        )
    }


def _answer_bytes(row: Row) -> int:
    return len(row.edge) + len(row.hub) + ROW_BYTES


def _sighting(way: tuple[int, str], row: Row, times: int) -> dict[str, Any]:
    facts = row.facts
    return {
        "example": way[0],
        "key": way[1],
        "device": facts.device,
        "source": facts.source,
        "reason": facts.reason,
        "propensity": facts.propensity,
        "score": facts.score,
        "release": facts.release,
        "edge_sha256": facts.edge_sha256,
        "hub_model": facts.hub_model,
        "hub_sha256": facts.hub_sha256,
        "edge": row.edge,
        "hub": row.hub,
        "bytes": _answer_bytes(row),
        "times": times,
        "last_at": facts.at,
    }


def held(connection: Connection) -> dict[Group, int]:
    """Return the bytes that every group holds, answers included."""
    e, s = schema.example.c, schema.sighting.c
    held: dict[Group, int] = {}
    files = select(e.tenant, e.model, func.sum(e.bytes)).group_by(e.tenant, e.model)
    answers = (
        select(e.tenant, e.model, func.sum(s.bytes))
        .where(s.example == e.id)
        .group_by(e.tenant, e.model)
    )
    for query in (files, answers):
        for tenant, model, size in connection.execute(query):
            held[Group(tenant, model)] = held.get(Group(tenant, model), 0) + int(size)
    return held


def summary(connection: Connection, tenant: str | None) -> list[Kept]:
    """Return what is kept of every device model; the bytes are those of the files."""
    e = schema.example.c
    query = (
        select(
            e.tenant, e.model, func.count(), func.sum(e.bytes), func.min(e.last_at),
            func.max(e.last_at),
        )
        .group_by(e.tenant, e.model)
        .order_by(e.tenant, e.model)
    )  # fmt: skip
    if tenant is not None:
        query = query.where(e.tenant == tenant)
    return [
        Kept(of, model, int(n), int(size), oldest, newest)
        for of, model, n, size, oldest, newest in connection.execute(query)
    ]


def layouts(connection: Connection, tenant: str, selection: Selection) -> dict[str, int]:
    """Return how many examples are selected, by the layout of their inputs."""
    e = schema.example.c
    found = connection.execute(
        select(e.layout, func.count())
        .where(_of_example(tenant, selection), _seen(selection))
        .group_by(e.layout)
    )
    return {layout: int(n) for layout, n in found}


def names(connection: Connection, group: Group) -> set[str]:
    """Return the names of all files that a group should have."""
    e = schema.example.c
    return set(connection.execute(select(e.sha256).filter_by(**group._asdict())).scalars())


def _of_example(tenant: str | None, selection: Selection) -> ColumnElement[bool]:
    e = schema.example.c
    terms = []
    if tenant is not None:
        terms.append(e.tenant == tenant)
    if selection.model:
        terms.append(e.model == selection.model)
    return and_(True, *terms)


def _of_sighting(selection: Selection) -> ColumnElement[bool]:
    s = schema.sighting.c
    terms = []
    if selection.device:
        terms.append(s.device == selection.device)
    if selection.source is not None:
        terms.append(s.source == selection.source)
    if selection.since is not None:
        terms.append(s.last_at >= selection.since)
    if selection.until is not None:
        terms.append(s.last_at < selection.until)
    return and_(True, *terms)


def _seen(selection: Selection) -> ColumnElement[bool]:
    s, e = schema.sighting.c, schema.example.c
    return exists().where(s.example == e.id, _of_sighting(selection))


def page(
    connection: Connection,
    tenant: str,
    selection: Selection,
    layouts: Sequence[str],
    after: int,
) -> tuple[list[Row], int | None]:
    """Return the next examples after one, and the last one of them; None: there are no more."""
    s, e = schema.sighting.c, schema.example.c
    numbers = list(
        connection.execute(
            select(e.id)
            .where(_of_example(tenant, selection), e.id > after, e.layout.in_(layouts))
            .where(_seen(selection))
            .order_by(e.id)
            .limit(PAGE)
        ).scalars()
    )
    if not numbers:
        return [], None
    rows = connection.execute(
        select(schema.sighting, e.sha256, e.tenant, e.model, e.layout, e.bytes.label("disk_bytes"))
        .where(s.example == e.id, e.id.in_(numbers), _of_sighting(selection))
        .order_by(e.id, s.last_at.desc(), s.key)
    )
    page: list[Row] = []
    for _, ways in groupby(rows, key=lambda row: row.example):
        newest, *others = ways
        alike = [newest] + [
            way
            for way in others
            if (way.reason, way.propensity, way.edge_sha256, way.hub_sha256)
            == (newest.reason, newest.propensity, newest.edge_sha256, newest.hub_sha256)
        ]
        facts = Facts(
            sha256=newest.sha256,
            at=newest.last_at,
            device=newest.device,
            source=newest.source,
            reason=newest.reason,
            propensity=newest.propensity,
            score=newest.score,
            release=newest.release,
            edge_sha256=newest.edge_sha256,
            hub_model=newest.hub_model,
            hub_sha256=newest.hub_sha256,
            count=sum(int(way.times) for way in alike),
        )
        group = Group(newest.tenant, newest.model)
        page.append(Row(group, facts, newest.layout, newest.disk_bytes, newest.edge, newest.hub))
    return page, int(numbers[-1])


def delete_selected(
    connection: Connection, tenant: str | None, selection: Selection
) -> tuple[Deleted, list[tuple[Group, str]]]:
    """Delete sightings, and the examples that nobody else has sent; return their files."""
    s, e = schema.sighting, schema.example
    chosen = _of_sighting(selection)
    if tenant is not None or selection.model:
        chosen = and_(chosen, s.c.example.in_(select(e.c.id).where(_of_example(tenant, selection))))
    sightings = connection.execute(delete(s).where(chosen)).rowcount
    if not sightings:
        return Deleted(0, 0), []
    orphans = connection.execute(
        select(e.c.id, e.c.tenant, e.c.model, e.c.sha256).where(
            ~exists().where(s.c.example == e.c.id)
        )
    ).all()
    _forget(connection, [row.id for row in orphans])
    return Deleted(sightings, len(orphans)), [
        (Group(row.tenant, row.model), row.sha256) for row in orphans
    ]


def evict(
    connection: Connection, too_much: Mapping[Group, int]
) -> tuple[list[tuple[Group, str]], dict[Group, int]]:
    """Delete the oldest examples of groups, as many bytes as said; return files and bytes."""
    s, e = schema.sighting, schema.example
    answers = select(func.coalesce(func.sum(s.c.bytes), 0)).where(s.c.example == e.c.id)
    gone: list[tuple[Group, str]] = []
    freed: dict[Group, int] = {}
    for group, much in too_much.items():
        numbers = []
        oldest = connection.execute(
            select(e.c.id, e.c.sha256, (e.c.bytes + answers.scalar_subquery()).label("size"))
            .filter_by(**group._asdict())
            .order_by(e.c.last_at, e.c.id)
            .limit(EVICTED_AT_ONCE)
        ).all()
        for number, sha256, size in oldest:
            if freed.get(group, 0) >= much:
                break
            numbers.append(number)
            gone.append((group, sha256))
            freed[group] = freed.get(group, 0) + int(size)
        connection.execute(delete(s).where(s.c.example.in_(numbers)))
        _forget(connection, numbers)
    return gone, freed


def _forget(connection: Connection, numbers: Sequence[int]) -> None:
    e = schema.example
    for at in range(0, len(numbers), 500):  # as many as any database takes in one statement
        connection.execute(delete(e).where(e.c.id.in_(numbers[at : at + 500])))
