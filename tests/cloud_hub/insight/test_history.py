"""Counting: whatever happens to reports, the totals are those of the last one of each start."""

import asyncio
import contextlib
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

from cloud_hub.errors import StoreFailed
from cloud_hub.fleet.devices import Devices
from cloud_hub.insight.counts import Counts, Outcome, Timing, total
from cloud_hub.insight.history import History
from cloud_hub.store import schema
from cloud_hub.store.store import Store
from fogline_protocol.v1 import fleet_pb2 as pb

NOW = 1_800_000_000.0
BOUNDS = (0.001, 0.01, 0.1)


def report(rows, *, device="kiosk", boot="b1", sequence=1, hub=0, degraded=0, sent=0):
    model = pb.ModelTraffic(model="digits", release="digits@1.0.0")
    for tier, quality, reason, n in (
        ("edge", "certified", "confident", rows),
        ("hub", "hub", "uncertain", hub),
        ("edge", "degraded", "link", degraded),
    ):
        if n:
            model.outcomes.add(tier=tier, quality=quality, reason=reason, rows=n)
    model.latencies.add(tier="edge", bounds_s=BOUNDS, counts=[rows, 0, 0, 0])
    model.latencies.add(tier="hub", bounds_s=BOUNDS, counts=[0, 0, hub, 0])
    return pb.Telemetry(
        device=device,
        boot_id=boot,
        sequence=sequence,
        link="closed",
        models=[model],
        escalation_bytes_sent=sent,
    )


@pytest.fixture
async def store(tmp_path):
    store = await Store.open(f"sqlite:///{tmp_path / 'hub.sqlite'}")
    yield store
    await store.close()


@pytest.fixture
async def history(store):
    history = await History.open(store, await Devices.open(store, 30.0))
    yield history
    await history.close()


async def reopened(store):
    return await History.open(store, await Devices.open(store, 30.0))


def persisted_rows(connection):
    return connection.execute(select(func.coalesce(func.sum(schema.outcome.c.rows), 0))).scalar()


async def test_the_overview_is_counted_from_reports(history):
    history.accept(report(60, hub=30, degraded=10, sent=1000), NOW - 5)
    history.accept(report(5, device="camera"), NOW - 2)
    found = history.overview(NOW, 60)
    assert found.rows == found.rows_total == 105
    assert found.share_edge == pytest.approx(75 / 105)
    assert found.share_degraded == pytest.approx(10 / 105)
    assert found.degraded_reasons == {"link": 10}
    assert found.requests_per_s == pytest.approx(95 / 10)
    assert found.escalation_bytes_sent_total == 1000
    assert found.latency_ms["edge"]["p95"] <= 1.0
    assert 10 < found.latency_ms["hub"]["p50"] <= 100
    assert (found.agents_seen, found.agents_online) == (2, 2)
    assert [line.name for line in found.devices] == ["camera", "kiosk"]
    assert sum(found.series.requests_per_s_edge) * found.series.step_s == pytest.approx(65)


async def test_the_latest_decisions_of_a_device_survive_a_restart_newest_first(store):
    first = await reopened(store)
    told = report(3)
    for at, reason in ((1.0, "confident"), (2.0, "link")):
        told.recent.add(at=at, model="digits", tier="edge", quality="x", reason=reason, rows=1)
    first.accept(told, NOW)
    await first.close()
    second = await reopened(store)
    assert [one.reason for one in second.decisions("kiosk")] == ["link", "confident"]
    assert second.decisions("stranger") == ()
    await second.close()


async def test_an_empty_history_has_no_figures_rather_than_wrong_ones(history):
    found = history.overview(NOW, 300)
    assert found.share_edge is None
    assert found.latency_ms == {}
    assert found.requests_per_s == 0
    assert set(found.series.share_edge) == {None}


async def test_a_device_is_offline_after_silence_and_online_at_its_next_report(history):
    history.accept(report(1), NOW)
    assert history.overview(NOW + 29, 60).agents_online == 1
    assert history.overview(NOW + 31, 60).agents_online == 0
    history.accept(report(1, sequence=2), NOW + 40)
    assert history.overview(NOW + 41, 60).agents_online == 1


async def test_a_restart_of_the_hub_neither_loses_nor_doubles_what_was_counted(store):
    first = await reopened(store)
    first.accept(report(10), NOW)
    await first.flush()
    first.accept(report(25, sequence=2), NOW + 1)  # not flushed: as if killed here
    first._flusher.cancel()

    second = await reopened(store)
    assert second.overview(NOW + 2, 60).rows_total == 10
    second.accept(report(25, sequence=2), NOW + 2)
    second.accept(report(25, sequence=2), NOW + 2)
    await second.close()
    assert second.overview(NOW + 2, 60).rows_total == 25
    assert await store.read(persisted_rows) == 25


async def test_counts_wait_for_a_disk_that_is_full(store, monkeypatch):
    history = await reopened(store)
    history.accept(report(10), NOW)
    real = store.write

    async def full(_work):
        raise StoreFailed("database or disk is full")

    monkeypatch.setattr(store, "write", full)
    with pytest.raises(StoreFailed):
        await history.flush()
    history.accept(report(30, sequence=2), NOW + 1)
    monkeypatch.setattr(store, "write", real)
    await history.close()
    assert await store.read(persisted_rows) == 30


async def test_what_a_device_says_during_a_failing_write_is_not_taken_back(store, monkeypatch):
    devices = await Devices.open(store, 30.0)
    history = await History.open(store, devices)
    history.accept(report(10), NOW)
    real = store.write

    async def fails_while_the_device_reports_and_leaves(_work):
        history.accept(report(20, sequence=2), NOW + 20)
        devices.left("kiosk")
        raise StoreFailed("database or disk is full")

    monkeypatch.setattr(store, "write", fails_while_the_device_reports_and_leaves)
    with pytest.raises(StoreFailed):
        await history.flush()
    (line,) = history.overview(NOW + 21, 60).devices
    assert (line.last_seen, line.online) == (NOW + 20, False)
    monkeypatch.setattr(store, "write", real)
    await history.close()
    (saved,) = (await Devices.open(store, 30.0)).all()
    assert saved.last_seen == NOW + 20


async def test_a_flush_that_is_cancelled_is_neither_lost_nor_written_twice(store):
    for waits in range(4):
        history = await reopened(store)
        history.accept(report(10, boot=f"b{waits}"), NOW)
        flushing = asyncio.create_task(history.flush())
        for _ in range(waits):
            await asyncio.sleep(0)
        flushing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await flushing
        await history.close()
        assert await store.read(persisted_rows) == 10 * (waits + 1)


# Two starts of one device, their totals growing; then any order, any repetition, any loss.
starts = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=5), min_size=1, max_size=3)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(starts, st.data())
def test_totals_equal_the_newest_report_of_each_start(starts, data):
    reports = []
    for number, steps in enumerate(starts):
        for sequence, rows in enumerate(itertools.accumulate(steps), start=1):
            reports.append(report(rows, boot=f"b{number}", sequence=sequence, sent=rows * 7))
    arrived = data.draw(
        st.lists(st.sampled_from(reports), max_size=2 * len(reports)), label="arrived"
    )
    history = History(None, Devices((), 30.0), {})
    newest = {}
    for at, found in enumerate(arrived):
        history.accept(found, NOW + at)
        before = newest.get(found.boot_id)
        if before is None or found.sequence > before.sequence:
            newest[found.boot_id] = found
    expected = sum(found.escalation_bytes_sent for found in newest.values())
    assert history.overview(NOW + len(arrived), 900).escalation_bytes_sent_total == expected
    assert history.overview(NOW + len(arrived), 900).rows_total == expected // 7


A = Outcome("m", "m@1", "edge", "certified", "confident")
T = Timing("m", "m@1", "edge", BOUNDS)
counts = st.builds(
    lambda n, buckets, sent: Counts({A: n} if n else {}, {T: buckets}, sent, 0),
    st.integers(0, 99),
    st.lists(st.integers(0, 9), min_size=4, max_size=4),
    st.integers(0, 99),
)


@given(counts, counts)
def test_a_difference_added_back_gives_the_whole(earlier, increment):
    later = total((earlier, increment))
    assert total((earlier, later.since(earlier))).rows == later.rows
    assert total((earlier, later.since(earlier))).bytes_sent == later.bytes_sent


@given(counts)
def test_counts_that_shrank_are_a_new_start(earlier):
    fresh = Counts({A: 1}, {T: [1, 0, 0, 0]}, 0, 0)
    bigger = total((earlier, Counts({A: 5}, {T: [5, 0, 0, 0]}, 1, 0)))
    assert fresh.since(bigger) == fresh


@given(st.lists(st.integers(0, 20), min_size=4, max_size=4), st.floats(0, 1))
def test_a_quantile_lies_where_its_requests_do(buckets, q):
    found = Counts({}, {T: buckets}, 0, 0).quantile_s(("edge",), q)
    if not sum(buckets):
        assert found is None
        return
    last = max(at for at, n in enumerate(buckets) if n)
    assert 0 <= found <= (*BOUNDS, BOUNDS[-1])[last]


async def test_a_forgotten_device_takes_its_counts_along(store, history):
    history.accept(report(3, hub=2, sent=10), NOW)
    history.accept(report(4, device="shop", hub=1, sent=7), NOW)
    await history.flush()
    history.accept(report(5, hub=2, sequence=2, sent=11), NOW)  # not on the disk yet
    await history.forget("kiosk")
    overview = history.overview(NOW, 300)
    assert [line.name for line in overview.devices] == ["shop"]
    assert (overview.rows, overview.rows_total) == (5, 5)
    assert overview.escalation_bytes_sent_total == 7
    assert history.decisions("kiosk") == ()
    await history.forget("kiosk")  # of which there is nothing
    await history.close()
    history = await reopened(store)
    overview = history.overview(NOW, 300)
    await history.close()
    assert [line.name for line in overview.devices] == ["shop"]
    assert (overview.rows_total, overview.escalation_bytes_sent_total) == (5, 7)


async def test_a_device_that_comes_back_counts_as_a_new_one(store, history):
    history.accept(report(3), NOW)
    await history.flush()
    await history.forget("kiosk")
    for sequence, rows in ((2, 5), (3, 6)):
        history.accept(report(rows, sequence=sequence), NOW + 60)
        await history.flush()
    (line,) = history.overview(NOW + 60, 300).devices
    assert line.rows == 6
    assert history.overview(NOW + 60, 300).rows_total == 6
    again = await reopened(store)
    assert again.overview(NOW, 300).rows_total == 6
    await again.close()


async def test_what_the_disk_does_not_take_is_not_forgotten(store, history, monkeypatch):
    history.accept(report(3), NOW)
    await history.flush()
    history.accept(report(4, sequence=2), NOW)

    async def full(_work):
        raise StoreFailed("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", full)
        with pytest.raises(StoreFailed):
            await history.forget("kiosk")
    assert history.overview(NOW, 300).rows_total == 4
    history.accept(report(6, sequence=3), NOW)
    await history.flush()
    again = await reopened(store)
    assert again.overview(NOW, 300).rows_total == 6
    await again.close()
