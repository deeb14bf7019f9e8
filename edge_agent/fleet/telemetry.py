"""Counts what the agent answered, and tells the hub.

All counts are cumulative since the agent's start, which has a random boot id: a report that
is lost, late or doubled costs nothing, because the next one carries everything again. So
the reporter keeps nothing, and stays silent while the link is down.
"""

import asyncio
import logging
import os
import secrets
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

from fogline_protocol.errors import InferenceError
from fogline_protocol.v1 import fleet_pb2 as pb

log = logging.getLogger("fogline.agent.telemetry")

REPORT = "/fogline.v1.Fleet/Report"
REPORT_TIMEOUT_S = 2.0
FAREWELL_TIMEOUT_S = 0.5  # the last report must not hold up a shutdown

# Seconds; 1-2-5 per decade covers a 20 us model in process and a slow link alike.
DECISIONS_KEPT = 20  # of the latest requests, for whoever asks why
LATENCY_BOUNDS_S = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
)  # fmt: skip


class Outcome(Protocol):
    """How one row ended, as the router decides it."""

    @property
    def escalate(self) -> bool:
        """Whether the hub answered it."""
        ...

    @property
    def quality(self) -> str:
        """The quality's name."""
        ...

    @property
    def reason(self) -> str:
        """The reason's name."""
        ...


class Hub(Protocol):
    """The connection that reports travel on."""

    @property
    def link_up(self) -> bool:
        """Whether it is worth trying."""
        ...

    async def call(self, path: str, request: bytes, timeout_s: float) -> bytes:
        """Make one unary call; raises ``InferenceError``."""
        ...


@dataclass(frozen=True, slots=True)
class Link:
    """The uplink's part of a report."""

    state: str  # of the breaker, or "no hub"
    bytes_sent: int
    bytes_received: int


class Telemetry:
    """The counts of one agent since its start. Changed by the router's event loop only."""

    def __init__(self, *, device: str, hardware_class: str, link: Callable[[], Link]) -> None:
        self._device = device
        self._hardware_class = hardware_class
        self._link = link
        self._boot_id = secrets.token_hex(8)
        self._version = metadata.version("fogline")
        self._sequence = 0
        # (model, release) -> (tier, quality, reason) -> rows
        self._rows: dict[tuple[str, str], dict[tuple[str, str, str], int]] = {}
        # (model, release) -> tier -> requests by duration
        self._latencies: dict[tuple[str, str], dict[str, list[int]]] = {}
        # time, model, release, tier, seconds, outcomes of the latest requests
        self._recent: deque[tuple[float, str, str, str, float, Sequence[Outcome]]] = deque(
            maxlen=DECISIONS_KEPT
        )

    def answered(
        self, model: str, release: str, tier: str, seconds: float, outcomes: Sequence[Outcome]
    ) -> None:
        """Count one answered request, row by row."""
        key = (model, release)
        rows = self._rows.get(key)
        if rows is None:
            rows = self._rows[key] = {}
            self._latencies[key] = {}
        for outcome in outcomes:
            end = ("hub" if outcome.escalate else "edge", outcome.quality, outcome.reason)
            rows[end] = rows.get(end, 0) + 1
        counts = self._latencies[key].get(tier)
        if counts is None:
            counts = self._latencies[key][tier] = [0] * (len(LATENCY_BOUNDS_S) + 1)
        counts[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        self._recent.append((time.time(), model, release, tier, seconds, outcomes))

    def snapshot(self) -> pb.Telemetry:
        """Return everything counted so far, as the next report."""
        self._sequence += 1
        link = self._link()
        report = pb.Telemetry(
            device=self._device,
            boot_id=self._boot_id,
            sequence=self._sequence,
            agent_version=self._version,
            hardware_class=self._hardware_class,
            link=link.state,
            rss_bytes=rss_bytes(),
            escalation_bytes_sent=link.bytes_sent,
            escalation_bytes_received=link.bytes_received,
        )
        report.reported_at.FromNanoseconds(time.time_ns())
        for (model, release), rows in self._rows.items():
            report.models.append(
                pb.ModelTraffic(
                    model=model,
                    release=release,
                    outcomes=[
                        pb.Outcome(tier=tier, quality=quality, reason=reason, rows=count)
                        for (tier, quality, reason), count in rows.items()
                    ],
                    latencies=[
                        pb.Latency(tier=tier, bounds_s=LATENCY_BOUNDS_S, counts=counts)
                        for tier, counts in self._latencies[model, release].items()
                    ],
                )
            )
        report.recent.extend(_decision(*one) for one in self._recent)
        return report

    async def keep_reporting(self, hub: Hub, interval_s: float) -> None:
        """Send a report every ``interval_s`` while the link is up, until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            if hub.link_up:
                await self.report(hub, REPORT_TIMEOUT_S)

    async def report(self, hub: Hub, timeout_s: float = FAREWELL_TIMEOUT_S) -> bool:
        """Send one report and return whether it arrived; that it did not is no trouble."""
        try:
            await hub.call(REPORT, self.snapshot().SerializeToString(), timeout_s)
        except InferenceError as error:
            log.debug("report not delivered: %s", error)
            return False
        return True


def _decision(
    at: float, model: str, release: str, tier: str, seconds: float, outcomes: Sequence[Outcome]
) -> pb.Decision:
    """Return one request as people read it: of several rows, one that was degraded speaks."""
    speaks = next(
        (o for o in outcomes if o.quality == "degraded"), outcomes[0] if outcomes else None
    )
    return pb.Decision(
        at=at,
        model=model,
        release=release,
        tier=tier,
        quality="" if speaks is None else speaks.quality,
        reason="" if speaks is None else speaks.reason,
        seconds=seconds,
        rows=len(outcomes),
    )


def rss_bytes() -> int:
    """Return the memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
