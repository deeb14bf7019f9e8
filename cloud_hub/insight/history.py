"""Accepts what devices report, keeps the recent window in memory and minutes on the disk.

Reports are totals since a device's agent started. The last one of each recent start is kept,
and written in the same transaction as the increments it led to. So reports may be lost,
repeated or late, and the hub may be killed at any moment: nothing counts twice, and what was
not yet written comes again with the device's next report.
"""

import asyncio
import contextlib
import json
import logging
import math
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection, delete, func, insert, select, update

from cloud_hub.errors import StoreFailed
from cloud_hub.fleet import devices as devices_module
from cloud_hub.fleet.devices import Device, Devices
from cloud_hub.insight.counts import Counts, Outcome, Timing, total
from cloud_hub.store import schema
from cloud_hub.store.store import Store
from fogline_protocol.v1.fleet_pb2 import Telemetry

log = logging.getLogger("fogline.history")

WINDOW_S = 900  # of live figures; longer ranges read the minutes
RATE_S = 10.0  # a rate "now" is over this long
FLUSH_S = 2.0
BOOTS_KEPT = 8  # starts of one device whose late reports are still recognized
SERIES_POINTS = 60

# A request answered by both tiers took as long as the hub did.
TIERS = {"edge": ("edge",), "hub": ("hub", "mixed")}


@dataclass(frozen=True, slots=True)
class DeviceLine:
    """One device in the overview; figures are over its window."""

    name: str
    online: bool
    last_seen: float
    hardware_class: str
    agent_version: str
    link: str
    rss_bytes: int
    requests_per_s: float
    rows: int
    share_edge: float | None
    share_degraded: float | None


@dataclass(frozen=True, slots=True)
class Decided:
    """What became of one of a device's latest requests."""

    at: float  # seconds since the epoch, the device's clock
    model: str
    release: str
    tier: str
    quality: str
    reason: str
    seconds: float
    rows: int


@dataclass(frozen=True, slots=True)
class Series:
    """Points of equal width, oldest first; None where nothing was answered."""

    step_s: float
    at: Sequence[float]  # seconds since the epoch, the start of each step
    requests_per_s_edge: Sequence[float]
    requests_per_s_hub: Sequence[float]
    share_edge: Sequence[float | None]
    p95_ms_edge: Sequence[float | None]
    p95_ms_hub: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Overview:
    """What the fleet did in the last ``window_s`` seconds."""

    window_s: float
    requests_per_s: float  # over the last 10 s
    rows: int
    rows_total: int  # ever
    share_edge: float | None
    share_degraded: float | None
    degraded_reasons: Mapping[str, int]
    latency_ms: Mapping[str, Mapping[str, float]]  # by tier: p50, p95, p99
    bytes_sent: int
    bytes_received: int
    escalation_bytes_sent_total: int  # ever
    agents_seen: int
    agents_online: int
    devices: Sequence[DeviceLine]
    series: Series


@dataclass(slots=True)
class _Boot:
    """The last report of one start of one device."""

    sequence: int
    reported_at: float
    telemetry: bytes
    counts: Counts


@dataclass(slots=True)
class _Pending:
    """What the disk does not know yet."""

    minutes: dict[tuple[int, str], list[Counts]] = field(default_factory=dict)
    boots: set[tuple[str, str]] = field(default_factory=set)


class History:
    """The fleet's counts. Owner of all of them; used on one event loop."""

    def __init__(
        self, store: Store, devices: Devices, boots: Mapping[str, dict[str, _Boot]]
    ) -> None:
        self._store = store
        self._devices = devices
        self._boots: defaultdict[str, dict[str, _Boot]] = defaultdict(dict, boots)
        self._seconds: deque[tuple[int, dict[str, Counts]]] = deque()
        self._pending = _Pending()
        self._rows_before = 0
        self._sent_before = 0
        self._writing = asyncio.Lock()  # what the disk does not know yet is nobody's meanwhile
        self._flusher: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, store: Store, devices: Devices) -> "History":
        """Return the history that the database knows, and keep writing to it until closed."""
        boots, rows, sent = await store.read(_load)
        history = cls(store, devices, boots)
        history._rows_before = rows
        history._sent_before = sent
        history._flusher = asyncio.create_task(history._flush_forever(), name="history")
        return history

    async def close(self) -> None:
        """Write what is not on the disk yet."""
        if self._flusher is not None:
            self._flusher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._flusher
        await self.flush()

    def accept(self, report: Telemetry, now: float) -> None:
        """Take a checked report; ``now`` is the hub's clock in seconds since the epoch."""
        self._devices.seen(
            Device(
                name=report.device,
                first_seen=now,
                last_seen=now,
                agent_version=report.agent_version,
                hardware_class=report.hardware_class,
                link=report.link,
                rss_bytes=report.rss_bytes,
            )
        )
        boots = self._boots[report.device]
        last = boots.get(report.boot_id)
        if last is not None and report.sequence <= last.sequence:
            return
        counts = _counts(report)
        increment = counts if last is None else counts.since(last.counts)
        boots[report.boot_id] = _Boot(
            report.sequence, now, report.SerializeToString(deterministic=True), counts
        )
        while len(boots) > BOOTS_KEPT:
            del boots[min(boots, key=lambda boot_id: boots[boot_id].reported_at)]
        self._pending.boots.add((report.device, report.boot_id))
        if increment.empty:
            return
        self._rows_before += increment.total_rows
        self._sent_before += increment.bytes_sent
        self._pending.minutes.setdefault((int(now // 60), report.device), []).append(increment)
        self._remember(report.device, increment, int(now))

    def overview(self, now: float, window_s: float) -> Overview:
        """Return the figures of the last ``window_s`` seconds, at most 15 minutes."""
        window_s = min(window_s, WINDOW_S)
        seconds = [(at, by) for at, by in self._seconds if now - window_s < at <= now]
        whole = total(counts for _, by in seconds for counts in by.values())
        recent = [(at, by) for at, by in seconds if now - RATE_S < at]
        by_device = defaultdict(list)
        for _, by in seconds:
            for name, counts in by.items():
                by_device[name].append(counts)
        recent_requests: Counter[str] = Counter()
        for _, by in recent:
            for name, counts in by.items():
                recent_requests[name] += counts.total_requests
        rate_s = min(RATE_S, window_s)
        lines = []
        for device in self._devices.all():
            own = total(by_device[device.name])
            lines.append(
                DeviceLine(
                    name=device.name,
                    online=self._devices.online(device, now),
                    last_seen=device.last_seen,
                    hardware_class=device.hardware_class,
                    agent_version=device.agent_version,
                    link=device.link,
                    rss_bytes=device.rss_bytes,
                    requests_per_s=recent_requests[device.name] / rate_s,
                    rows=own.total_rows,
                    share_edge=_share(own, tier="edge"),
                    share_degraded=_share(own, quality="degraded"),
                )
            )
        reasons: Counter[str] = Counter()
        for outcome, n in whole.rows.items():
            if outcome.quality == "degraded":
                reasons[outcome.reason] += n
        return Overview(
            window_s=window_s,
            requests_per_s=recent_requests.total() / rate_s,
            rows=whole.total_rows,
            rows_total=self._rows_before,
            share_edge=_share(whole, tier="edge"),
            share_degraded=_share(whole, quality="degraded"),
            degraded_reasons=dict(reasons.most_common()),
            latency_ms=_latency_ms(whole),
            bytes_sent=whole.bytes_sent,
            bytes_received=whole.bytes_received,
            escalation_bytes_sent_total=self._sent_before,
            agents_seen=len(lines),
            agents_online=sum(line.online for line in lines),
            devices=lines,
            series=_series(seconds, now, window_s),
        )

    def decisions(self, device: str) -> Sequence[Decided]:
        """Return what became of the latest requests a device has told of, the newest first."""
        boots = self._boots.get(device)
        if not boots:
            return ()
        latest = max(boots.values(), key=lambda boot: boot.reported_at)
        recent = Telemetry.FromString(latest.telemetry).recent
        return [
            Decided(**{name: getattr(one, name) for name in Decided.__slots__})
            for one in reversed(recent)
        ]

    async def forget(self, device: str) -> None:
        """Forget a device and all that it has counted; every total is less by that.

        Raises:
            StoreFailed: nothing is forgotten.
        """

        def write(connection: Connection) -> tuple[int, int]:
            counted = _totals(connection, device)
            for table in (schema.outcome, schema.latency, schema.traffic, schema.boot):
                connection.execute(delete(table).where(table.c.device == device))
            devices_module.remove(connection, device)
            return counted

        async with self._writing:
            rows, sent = await self._store.write(write)
            # Also what it said while that was written: it is new from its next report on.
            for key in [key for key in self._pending.minutes if key[1] == device]:
                unwritten = total(self._pending.minutes.pop(key))
                rows, sent = rows + unwritten.total_rows, sent + unwritten.bytes_sent
            self._rows_before -= rows
            self._sent_before -= sent
            self._pending.boots = {key for key in self._pending.boots if key[0] != device}
            self._boots.pop(device, None)
            for _, by in self._seconds:
                by.pop(device, None)
            self._devices.forget(device)

    async def flush(self) -> None:
        """Write what the disk does not know yet, in one transaction.

        Raises:
            StoreFailed: it cannot be written; it is kept for the next attempt.
        """
        async with self._writing:
            await self._flush()

    async def _flush(self) -> None:
        pending, self._pending = self._pending, _Pending()
        devices = self._devices.take_unsaved()
        boots = [
            {
                "device": device,
                "boot_id": boot_id,
                "sequence": boot.sequence,
                "reported_at": boot.reported_at,
                "telemetry": boot.telemetry,
            }
            for device, boot_id in sorted(pending.boots)
            if (boot := self._boots[device].get(boot_id)) is not None
        ]
        kept = {device: list(self._boots[device]) for device, _ in pending.boots}

        def write(connection: Connection) -> None:
            devices_module.save(connection, devices)
            for row in boots:
                _replace_boot(connection, row)
            for device, boot_ids in kept.items():
                b = schema.boot.c
                connection.execute(
                    delete(schema.boot).where(b.device == device, b.boot_id.not_in(boot_ids))
                )
            for (minute, device), increments in pending.minutes.items():
                _add_minute(connection, minute, device, total(increments))

        if not (devices or boots or pending.minutes):
            return
        # Whoever cancels us must not be told before we know whether it was written: giving
        # back what is on the disk already would count it twice.
        writing = asyncio.ensure_future(self._store.write(write))
        try:
            await asyncio.shield(writing)
        finally:
            await asyncio.wait([writing])
            if writing.exception() is not None:
                for key, increments in pending.minutes.items():
                    self._pending.minutes[key] = increments + self._pending.minutes.get(key, [])
                self._pending.boots |= pending.boots
                self._devices.not_saved(devices)

    def _remember(self, device: str, increment: Counts, second: int) -> None:
        if not self._seconds or self._seconds[-1][0] < second:
            self._seconds.append((second, {}))
        by = self._seconds[-1][1]  # a clock set back adds to the newest second
        by[device] = total((by[device], increment)) if device in by else increment
        while self._seconds[0][0] < second - WINDOW_S:
            self._seconds.popleft()

    async def _flush_forever(self) -> None:
        failing = False
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                await self.flush()
                failing = False
            except StoreFailed as error:
                # Serving goes on; everything is kept and written once the disk takes it.
                if not failing:
                    log.error("counts are not being written: %s", error)
                failing = True


def _counts(report: Telemetry) -> Counts:
    rows: dict[Outcome, int] = {}
    requests: dict[Timing, Sequence[int]] = {}
    for model in report.models:
        for o in model.outcomes:
            rows[Outcome(model.model, model.release, o.tier, o.quality, o.reason)] = o.rows
        for latency in model.latencies:
            bounds = tuple(latency.bounds_s)
            timing = Timing(model.model, model.release, latency.tier, bounds)
            requests[timing] = list(latency.counts)
    return Counts(rows, requests, report.escalation_bytes_sent, report.escalation_bytes_received)


def _share(counts: Counts, **fields: str) -> float | None:
    rows = counts.total_rows
    return counts.rows_where(**fields) / rows if rows else None


def _latency_ms(counts: Counts) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, tiers in TIERS.items():
        for figure, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
            seconds = counts.quantile_s(tiers, q)
            if seconds is not None:
                found.setdefault(name, {})[figure] = seconds * 1000
    return found


def _series(
    seconds: Sequence[tuple[int, Mapping[str, Counts]]], now: float, window_s: float
) -> Series:
    step = max(1, math.ceil(window_s / SERIES_POINTS))
    last = int(now) // step  # the step in progress is left out: it would look like a drop
    parts: dict[int, list[Counts]] = {
        at: [] for at in range(last - math.ceil(window_s / step), last)
    }
    for second, by in seconds:
        if second // step in parts:
            parts[second // step] += by.values()
    points = {at: total(found) for at, found in sorted(parts.items())}

    def per_second(name: str) -> list[float]:
        return [
            sum(sum(c) for timing, c in point.requests.items() if timing.tier in TIERS[name]) / step
            for point in points.values()
        ]

    def p95_ms(name: str) -> list[float | None]:
        quantiles = [point.quantile_s(TIERS[name], 0.95) for point in points.values()]
        return [None if q is None else q * 1000 for q in quantiles]

    return Series(
        step_s=step,
        at=[float(at * step) for at in points],
        requests_per_s_edge=per_second("edge"),
        requests_per_s_hub=per_second("hub"),
        share_edge=[_share(point, tier="edge") for point in points.values()],
        p95_ms_edge=p95_ms("edge"),
        p95_ms_hub=p95_ms("hub"),
    )


def _load(connection: Connection) -> tuple[dict[str, dict[str, _Boot]], int, int]:
    boots: dict[str, dict[str, _Boot]] = {}
    for row in connection.execute(select(schema.boot)):
        counts = _counts(Telemetry.FromString(row.telemetry))
        boot = _Boot(row.sequence, row.reported_at, row.telemetry, counts)
        boots.setdefault(row.device, {})[row.boot_id] = boot
    return boots, *_totals(connection)


def _totals(connection: Connection, device: str | None = None) -> tuple[int, int]:
    """Return the rows answered and the bytes sent that were ever counted, by all or by one."""
    found = []
    for column in (schema.outcome.c.rows, schema.traffic.c.sent):
        query = select(func.coalesce(func.sum(column), 0))
        if device is not None:
            query = query.where(column.table.c.device == device)
        found.append(int(connection.execute(query).scalar_one()))
    rows, sent = found
    return rows, sent


def _replace_boot(connection: Connection, row: Mapping[str, object]) -> None:
    b = schema.boot.c
    key = (b.device == row["device"], b.boot_id == row["boot_id"])
    if not connection.execute(update(schema.boot).where(*key).values(**row)).rowcount:
        connection.execute(insert(schema.boot).values(**row))


def _add_minute(connection: Connection, minute: int, device: str, counts: Counts) -> None:
    """Add an increment to a minute; the one writer makes read-then-write safe."""
    o = schema.outcome
    for outcome, n in counts.rows.items():
        where = {"minute": minute, "device": device, **outcome._asdict()}
        change = update(o).filter_by(**where).values(rows=o.c.rows + n)
        if not connection.execute(change).rowcount:
            connection.execute(insert(o).values(**where, rows=n))
    lat = schema.latency
    for timing, bucket_counts in counts.requests.items():
        where = {
            "minute": minute,
            "device": device,
            "model": timing.model,
            "release": timing.release,
            "tier": timing.tier,
            "bounds_s": json.dumps(timing.bounds_s),
        }
        before = connection.execute(select(lat.c.counts).filter_by(**where)).scalar_one_or_none()
        if before is None:
            connection.execute(insert(lat).values(**where, counts=json.dumps(list(bucket_counts))))
        else:
            summed = [a + b for a, b in zip(json.loads(before), bucket_counts, strict=True)]
            connection.execute(update(lat).filter_by(**where).values(counts=json.dumps(summed)))
    t = schema.traffic
    if counts.bytes_sent or counts.bytes_received:
        change = (
            update(t)
            .filter_by(minute=minute, device=device)
            .values(
                sent=t.c.sent + counts.bytes_sent, received=t.c.received + counts.bytes_received
            )
        )
        if not connection.execute(change).rowcount:
            connection.execute(
                insert(t).values(
                    minute=minute,
                    device=device,
                    sent=counts.bytes_sent,
                    received=counts.bytes_received,
                )
            )
