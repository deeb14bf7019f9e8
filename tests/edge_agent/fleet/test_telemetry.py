import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.fleet.telemetry import LATENCY_BOUNDS_S, REPORT, Link, Telemetry
from edge_agent.inference.policy import Decision, Quality, Reason
from fogline_protocol.errors import InferenceError, Unavailable
from fogline_protocol.v1 import fleet_pb2 as pb

CONFIDENT = Decision(False, Quality.CERTIFIED, Reason.CONFIDENT)
ASKED = Decision(True, Quality.HUB, Reason.UNCERTAIN)


class Hub:
    """Takes reports, unless it is down or broken."""

    def __init__(self) -> None:
        self.link_up = True
        self.error: InferenceError | None = None
        self.reports: list[pb.Telemetry] = []
        self.arrived = asyncio.Event()

    async def call(self, path: str, request: bytes, timeout_s: float) -> bytes:
        assert path == REPORT
        self.arrived.set()
        if self.error is not None:
            raise self.error
        self.reports.append(pb.Telemetry.FromString(request))
        return b""


def telemetry() -> Telemetry:
    return Telemetry(device="kitchen", hardware_class="x86_64", link=lambda: Link("closed", 7, 8))


def test_a_report_says_who_and_how_it_is() -> None:
    report = telemetry().snapshot()
    assert (report.device, report.hardware_class, report.link) == ("kitchen", "x86_64", "closed")
    assert (report.escalation_bytes_sent, report.escalation_bytes_received) == (7, 8)
    assert report.rss_bytes > 1 << 20
    assert report.agent_version
    assert report.reported_at.seconds > 1_700_000_000


def test_boots_are_told_apart_and_reports_of_one_are_in_order() -> None:
    one, other = telemetry(), telemetry()
    assert one.snapshot().boot_id != other.snapshot().boot_id
    assert [one.snapshot().sequence, one.snapshot().sequence] == [2, 3]


@given(st.lists(st.tuples(st.lists(st.sampled_from([CONFIDENT, ASKED])), st.floats(0, 100))))
def test_every_row_and_every_request_is_counted_once(
    requests: list[tuple[Sequence[Decision], float]],
) -> None:
    counted = telemetry()
    for outcomes, seconds in requests:
        counted.answered("m", "m@1.0.0", "mixed", seconds, outcomes)
    report = counted.snapshot()
    rows = {(o.tier, o.quality, o.reason): o.rows for m in report.models for o in m.outcomes}
    every = [outcome for outcomes, _ in requests for outcome in outcomes]
    assert rows.get(("edge", "certified", "confident"), 0) == every.count(CONFIDENT)
    assert rows.get(("hub", "hub", "uncertain"), 0) == every.count(ASKED)
    counts = [count for m in report.models for latency in m.latencies for count in latency.counts]
    assert sum(counts) == len(requests)


def test_the_latest_requests_are_told_with_the_row_that_was_degraded() -> None:
    counted = telemetry()
    degraded = Decision(False, Quality.DEGRADED, Reason.LINK)
    for _ in range(30):
        counted.answered("m", "m@1.0.0", "edge", 0.5, [CONFIDENT])
    counted.answered("m", "m@1.0.0", "edge", 0.25, [CONFIDENT, degraded])
    recent = counted.snapshot().recent
    assert len(recent) == 20
    newest = recent[-1]
    assert (newest.rows, newest.seconds) == (2, 0.25)
    assert (newest.quality, newest.reason) == ("degraded", "link")
    assert recent[0].reason == "confident"


@pytest.mark.parametrize(
    ("seconds", "index"), [(0.0, 0), (0.0001, 0), (0.00011, 1), (5.0, 14), (5.1, 15)]
)
def test_a_latency_counts_where_its_bound_says(seconds: float, index: int) -> None:
    counted = telemetry()
    counted.answered("m", "m@1.0.0", "edge", seconds, [CONFIDENT])
    (latency,) = counted.snapshot().models[0].latencies
    assert list(latency.bounds_s) == list(LATENCY_BOUNDS_S)
    assert len(latency.counts) == len(LATENCY_BOUNDS_S) + 1
    assert latency.counts[index] == 1


def test_releases_are_counted_apart() -> None:
    counted = telemetry()
    for release in ("m@1.0.0", "m@1.1.0"):
        counted.answered("m", release, "edge", 0.1, [CONFIDENT])
    assert [m.release for m in counted.snapshot().models] == ["m@1.0.0", "m@1.1.0"]


async def reporting(hub: Hub, counted: Telemetry) -> asyncio.Task[None]:
    task = asyncio.create_task(counted.keep_reporting(hub, 0.001))
    await asyncio.wait_for(hub.arrived.wait(), 5)
    return task


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_report_that_fails_is_repaired_by_the_next() -> None:
    hub, counted = Hub(), telemetry()
    counted.answered("m", "m@1.0.0", "edge", 0.1, [CONFIDENT])
    hub.error = Unavailable("gone")
    task = await reporting(hub, counted)
    hub.error = None
    hub.arrived.clear()
    await asyncio.wait_for(hub.arrived.wait(), 5)
    await ended(task)
    assert hub.reports[-1].models[0].outcomes[0].rows == 1


async def test_nothing_is_sent_while_the_link_is_down() -> None:
    hub = Hub()
    hub.link_up = False
    task = asyncio.create_task(telemetry().keep_reporting(hub, 0.001))
    done, _ = await asyncio.wait([task], timeout=0.05)
    assert not done
    await ended(task)
    assert not hub.arrived.is_set()
