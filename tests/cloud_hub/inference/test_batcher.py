"""The batcher with an engine that the test steps by hand."""

import asyncio
import contextlib
import time

import numpy as np
import pytest

from cloud_hub.engines.engine import EngineLost, join
from cloud_hub.engines.inline import InlineEngine
from cloud_hub.inference.batcher import Batcher
from cloud_hub.metrics import Metrics
from fogline_protocol.errors import (
    BadRequest,
    DeadlineExceeded,
    Overloaded,
    ServerFault,
    Unavailable,
)
from fogline_protocol.model_config import DynamicBatching, QueuePolicy


class Doubling:
    """Returns twice its input, when the test lets it."""

    def __init__(self):
        self.batches = []
        self.deadlines = []
        self.free = asyncio.Event()
        self.free.set()
        self.running = asyncio.Event()
        self.fault = None
        self.rows_short = 0

    trouble = ""
    digest = ""

    async def ready(self):
        return

    def join(self, requests):
        return join(requests)

    async def run(self, inputs, deadline=None):
        self.deadlines.append(deadline)
        self.batches.append(len(inputs["x"]))
        self.running.set()
        await self.free.wait()
        if self.fault is not None:
            raise self.fault
        if (inputs["x"] < 0).any():
            raise ValueError("below zero")
        doubled = inputs["x"] * 2
        return {"y": doubled[: len(doubled) - self.rows_short]}


class Notes:
    def __init__(self):
        self.ran = []
        self.expired = 0
        self.failed = 0
        self.rejected = []

    def batch_ran(self, rows, queued_s, compute):
        assert min(compute) >= 0
        self.ran.append((rows, len(queued_s)))

    def batch_failed(self, queued_s, busy_s):
        assert busy_s >= 0
        self.failed += len(queued_s)

    def requests_expired(self, queued_s):
        self.expired += len(queued_s)

    def request_rejected(self, reason):
        self.rejected.append(reason)


@pytest.fixture
def engine():
    return Doubling()


@pytest.fixture
def notes():
    return Notes()


@contextlib.asynccontextmanager
async def serving(*engines, observer, **options):
    options = {"batches": True, "max_batch": 8, "max_queue_rows": 20, **options}
    batcher = Batcher(engines, observer=observer, **options)
    task = asyncio.create_task(batcher.serve())
    try:
        yield batcher
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def batcher(engine, notes):
    async with serving(engine, observer=notes) as batcher:
        yield batcher


def rows(*values):
    return {"x": np.array(values, np.float32).reshape(-1, 1)}


async def hold(batcher, engine):
    """Keep the engine busy with one request, so that the next ones queue up."""
    engine.free.clear()
    first = asyncio.create_task(batcher.infer(rows(0), None))
    await engine.running.wait()
    return first


async def queued(batcher, *requests):
    tasks = [asyncio.create_task(batcher.infer(request, None)) for request in requests]
    await asyncio.sleep(0)
    return tasks


async def test_requests_that_wait_together_share_a_batch_and_get_their_own_rows(
    batcher, engine, notes
):
    first = await hold(batcher, engine)
    tasks = await queued(batcher, rows(1), rows(2, 3), rows(4))
    engine.free.set()
    answers = await asyncio.gather(first, *tasks)
    assert [a["y"].ravel().tolist() for a in answers] == [[0], [2], [4, 6], [8]]
    assert engine.batches == [1, 4]
    assert notes.ran == [(1, 1), (4, 3)]


async def test_an_engine_has_its_next_batch_before_callers_go_on_with_their_answers(
    batcher, engine
):
    async def ask():
        await batcher.infer(rows(0), None)
        return list(engine.batches)

    engine.free.clear()
    first = asyncio.create_task(ask())
    await engine.running.wait()
    (second,) = await queued(batcher, rows(1, 2))
    engine.free.set()
    assert await first == [1, 2]
    await second


async def test_answers_leave_between_two_runs_on_the_loop(notes):
    class Session:
        platform = provider = "fake"
        inputs = outputs = ()
        runs = 0

        def run(self, inputs):
            self.runs += 1
            return inputs

        def close(self):
            pass

    session = Session()
    engine = InlineEngine(session, 0.0)

    async def ask():
        await batcher.infer(rows(0), None)
        return session.runs

    async with serving(engine, observer=notes, max_batch=1) as batcher:
        assert await asyncio.gather(ask(), ask(), ask()) == [1, 2, 3]
    await engine.close()


async def test_a_caller_who_leaves_while_queued_costs_no_engine_time(batcher, engine):
    first = await hold(batcher, engine)
    leaver, stayer = await queued(batcher, rows(1), rows(2))
    leaver.cancel()
    await asyncio.sleep(0)
    engine.free.set()
    assert (await stayer)["y"].tolist() == [[4]]
    await first
    assert engine.batches == [1, 1]


async def test_a_caller_who_leaves_while_running_does_not_cost_the_others_their_answer(
    batcher, engine
):
    first = await hold(batcher, engine)
    first.cancel()
    (other,) = await queued(batcher, rows(5))
    engine.free.set()
    assert (await other)["y"].tolist() == [[10]]


async def test_an_engine_fault_reaches_every_caller_and_the_loop_lives_on(batcher, engine):
    engine.fault = RuntimeError("no memory")
    tasks = await queued(batcher, rows(1), rows(2))
    for task in tasks:
        with pytest.raises(ServerFault, match="no memory"):
            await task
    engine.fault = None
    assert (await batcher.infer(rows(3), None))["y"].tolist() == [[6]]


async def test_values_that_an_engine_cannot_take_cost_their_own_caller_the_answer_only(
    batcher, engine, notes
):
    tasks = await queued(batcher, rows(1), rows(-1), rows(2))
    assert (await tasks[0])["y"].tolist() == [[2]]
    with pytest.raises(ServerFault, match="below zero"):
        await tasks[1]
    assert (await tasks[2])["y"].tolist() == [[4]]
    assert engine.batches == [3, 1, 1, 1]
    assert notes.ran == [(1, 1), (1, 1)]


@pytest.mark.parametrize(
    "fault", [Unavailable("lost"), Overloaded("full"), DeadlineExceeded("late")]
)
async def test_a_failure_that_no_values_are_to_blame_for_is_not_made_one_per_request(
    batcher, engine, fault
):
    engine.fault = fault
    for task in await queued(batcher, rows(1), rows(2), rows(3)):
        with pytest.raises(type(fault), match=str(fault)):
            await task
    assert engine.batches == [3]


async def test_an_engine_learns_when_the_last_caller_of_a_batch_stops_waiting(batcher, engine):
    first = await hold(batcher, engine)
    soon, late = time.monotonic() + 60, time.monotonic() + 90
    tasks = [
        asyncio.create_task(batcher.infer(rows(1), soon)),
        asyncio.create_task(batcher.infer(rows(2), late)),
    ]
    await asyncio.sleep(0)
    engine.free.set()
    await asyncio.gather(first, *tasks)
    assert engine.deadlines == [None, late]


async def test_stopping_while_a_failed_batch_runs_one_by_one_tells_everybody(engine, notes):
    batcher = Batcher([engine], batches=True, max_batch=8, max_queue_rows=20, observer=notes)
    alone = asyncio.Event()
    run = engine.run

    async def stuck_when_alone(inputs, deadline):
        if len(inputs["x"]) == 1:
            alone.set()
            await asyncio.Event().wait()
        return await run(inputs)

    engine.run = stuck_when_alone
    task = asyncio.create_task(batcher.serve())
    tasks = await queued(batcher, rows(-1), rows(1), rows(2))
    await alone.wait()
    task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [Unavailable] * 3
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_more_rows_than_may_ever_wait_are_the_callers_fault(batcher, engine):
    # Overloaded would say: come back later. It would never help.
    with pytest.raises(BadRequest, match="21 rows in one request, at most 20"):
        await batcher.infer(rows(*range(21)), None)
    assert engine.batches == []


async def test_an_answer_with_a_row_missing_is_a_fault_not_somebody_elses_answer(batcher, engine):
    engine.rows_short = 1
    with pytest.raises(ServerFault, match="has 1 rows for 2"):
        await batcher.infer(rows(1, 2), None)


async def test_expired_work_never_reaches_the_engine(batcher, engine, notes):
    first = await hold(batcher, engine)
    late = asyncio.create_task(batcher.infer(rows(1), time.monotonic() - 1))
    await asyncio.sleep(0)
    engine.free.set()
    with pytest.raises(DeadlineExceeded):
        await late
    await first
    assert engine.batches == [1]
    assert notes.expired == 1


async def test_a_full_queue_refuses_with_the_limit_in_the_text(batcher, engine):
    await hold(batcher, engine)
    await queued(batcher, rows(*range(8)), rows(*range(8)))
    with pytest.raises(
        Overloaded, match="16 rows are waiting, 5 more would exceed the limit of 20"
    ):
        await batcher.infer(rows(*range(5)), None)
    engine.free.set()


async def test_a_request_larger_than_a_batch_is_split_and_joined_again(batcher, engine):
    answer = await batcher.infer(rows(*range(19)), None)
    assert answer["y"].ravel().tolist() == [2 * i for i in range(19)]
    assert engine.batches == [8, 8, 3]


async def test_when_one_part_of_a_split_request_expires_no_part_lingers(batcher, engine):
    await hold(batcher, engine)
    big = asyncio.create_task(batcher.infer(rows(*range(19)), time.monotonic() - 1))
    await asyncio.sleep(0)
    engine.free.set()
    with pytest.raises(DeadlineExceeded):
        await big
    assert engine.batches == [1]


async def test_requests_of_different_shapes_do_not_share_a_batch(batcher, engine):
    first = await hold(batcher, engine)
    wide = {"x": np.ones((1, 2), np.float32)}
    tasks = await queued(batcher, rows(1), wide, rows(2))
    engine.free.set()
    await asyncio.gather(first, *tasks)
    assert engine.batches == [1, 2, 1]


async def test_a_model_without_a_batch_dimension_runs_one_request_at_a_time(engine, notes):
    batcher = Batcher([engine], batches=False, max_batch=8, max_queue_rows=20, observer=notes)
    task = asyncio.create_task(batcher.serve())
    whole = {"x": np.ones((3, 1), np.float32)}
    answers = await asyncio.gather(batcher.infer(whole, None), batcher.infer(whole, None))
    assert [a["y"].shape for a in answers] == [(3, 1), (3, 1)]
    assert engine.batches == [3, 3]
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_stopping_tells_everybody_who_waits(engine, notes):
    batcher = Batcher([engine], batches=True, max_batch=2, max_queue_rows=20, observer=notes)
    task = asyncio.create_task(batcher.serve())
    first = await hold(batcher, engine)
    others = await queued(batcher, rows(1, 2), rows(3, 4), rows(5))
    task.cancel()
    for waiting in (first, *others):
        with pytest.raises(Unavailable):
            await waiting
    with pytest.raises(Unavailable):
        await batcher.infer(rows(1), None)


async def test_several_engines_serve_one_queue_side_by_side(notes):
    engines = [Doubling(), Doubling()]
    async with serving(*engines, observer=notes) as batcher:
        for engine in engines:
            engine.free.clear()
        first = asyncio.create_task(batcher.infer(rows(1), None))
        await asyncio.wait(
            [asyncio.create_task(engine.running.wait()) for engine in engines],
            return_when=asyncio.FIRST_COMPLETED,
        )
        second = asyncio.create_task(batcher.infer(rows(2), None))
        await asyncio.gather(*(engine.running.wait() for engine in engines))
        (third,) = await queued(batcher, rows(3))
        assert repr(batcher) == "<Batcher 1 requests of 1 rows waiting, 2 of 2 engines busy>"
        busy = engines[0] if engines[0].batches else engines[1]
        busy.free.set()  # whichever is free first takes what waits
        assert (await third)["y"].tolist() == [[6]]
        for engine in engines:
            engine.free.set()
        answers = await asyncio.gather(first, second)
    assert [a["y"].tolist() for a in answers] == [[[2]], [[4]]]
    assert sorted(len(engine.batches) for engine in engines) == [1, 2]


async def test_draining_waits_for_every_engine(notes):
    engines = [Doubling(), Doubling()]
    async with serving(*engines, observer=notes) as batcher:
        for engine in engines:
            engine.free.clear()
        tasks = []
        for _ in engines:
            tasks += await queued(batcher, rows(1))
            await asyncio.sleep(0)
        await asyncio.gather(*(engine.running.wait() for engine in engines))
        draining = asyncio.create_task(batcher.drain())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await batcher.infer(rows(1), None)
        engines[0].free.set()
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(0)
        assert not draining.done()
        engines[1].free.set()
        await draining
        await asyncio.gather(*tasks)


async def test_draining_ends_when_the_last_one_who_waits_leaves(batcher, engine):
    first = await hold(batcher, engine)
    (leaver,) = await queued(batcher, rows(1))
    engine.free.set()
    leaver.cancel()
    await batcher.drain()
    await first
    assert batcher.depth == (0, 0)


async def test_a_batch_that_an_engine_died_of_is_not_tried_again(batcher, engine, notes):
    engine.fault = EngineLost("the engine of 'm' died (signal 11) and is being replaced")
    tasks = await queued(batcher, rows(1), rows(2), rows(3))
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for error in errors] == [EngineLost] * 3
    assert len(set(map(id, errors))) == 3
    assert engine.batches == [3]
    assert notes.failed == 3
    engine.fault = None
    assert (await batcher.infer(rows(3), None))["y"].tolist() == [[6]]


async def test_a_caller_with_a_full_queue_delays_another_by_its_turn_only(engine, notes):
    async with serving(engine, observer=notes, max_queue_rows=1000) as batcher:
        first = await hold(batcher, engine)
        order = []

        async def ask(caller):
            await batcher.infer(rows(1), None, caller=caller)
            order.append(caller)

        crowd = [asyncio.create_task(ask("heavy")) for _ in range(500)]
        await asyncio.sleep(0)
        guest = asyncio.create_task(ask("light"))
        await asyncio.sleep(0)
        engine.free.set()
        await asyncio.gather(first, guest, *crowd)
    assert order.index("light") < 8


async def test_who_leaves_gives_its_room_in_the_queue_back_at_once(batcher, engine):
    first = await hold(batcher, engine)
    leavers = await queued(batcher, *(rows(*range(5)) for _ in range(4)))
    assert batcher.depth == (4, 20)
    for leaver in leavers:
        leaver.cancel()
    await asyncio.wait(leavers)
    assert batcher.depth == (0, 0)
    (stayer,) = await queued(batcher, rows(7))
    engine.free.set()
    assert (await stayer)["y"].tolist() == [[14]]
    await first


async def test_a_caller_of_a_split_request_who_leaves_leaves_nothing_behind(batcher, engine):
    first = await hold(batcher, engine)
    (leaver,) = await queued(batcher, rows(*range(19)))
    leaver.cancel()
    await asyncio.wait([leaver])
    assert batcher.depth == (0, 0)
    engine.free.set()
    await first
    assert engine.batches == [1]


async def test_priorities_are_those_of_the_model(engine, notes):
    scheduling = DynamicBatching(priority_levels=3, default_priority_level=2)
    async with serving(engine, observer=notes, scheduling=scheduling, max_batch=1) as batcher:
        first = await hold(batcher, engine)
        order = []

        async def ask(priority):
            await batcher.infer(rows(1), None, priority=priority)
            order.append(priority)

        tasks = [asyncio.create_task(ask(priority)) for priority in (3, 0, 1)]
        await asyncio.sleep(0)
        with pytest.raises(BadRequest, match="'priority' is 4, the model has 3 levels"):
            await batcher.infer(rows(1), None, priority=4)
        engine.free.set()
        await asyncio.gather(first, *tasks)
        assert order == [1, 0, 3]


async def test_a_model_without_levels_takes_any_priority(batcher):
    assert (await batcher.infer(rows(1), None, priority=7))["y"].tolist() == [[2]]


async def test_the_queue_policy_of_a_model_bounds_requests_and_their_wait(engine, notes):
    policy = QueuePolicy(timeout_us=50_000, max_requests=2)
    scheduling = DynamicBatching(default_policy=policy)
    async with serving(engine, observer=notes, scheduling=scheduling) as batcher:
        first = await hold(batcher, engine)
        tasks = await queued(batcher, rows(1), rows(2))
        with pytest.raises(Overloaded, match="2 requests of priority level 1 are waiting") as found:
            await batcher.infer(rows(3), None)
        assert found.value.retry_after_s > 0
        await asyncio.sleep(0.06)  # longer than the policy allows
        engine.free.set()
        await first
        for task in tasks:
            with pytest.raises(Unavailable, match=r"within 50 ms.*default_timeout") as late:
                await task
            assert late.value.retry_after_s is not None
    assert notes.rejected == ["queue_full", "overdue", "overdue"]
    assert engine.batches == [1]


async def test_a_maximum_delay_gathers_what_comes_within_it(engine, notes):
    scheduling = DynamicBatching(max_queue_delay_us=50_000)
    async with serving(engine, observer=notes, scheduling=scheduling) as batcher:
        started = time.monotonic()
        tasks = await queued(batcher, rows(1))
        await asyncio.sleep(0.01)  # the delay is what is tested
        tasks += await queued(batcher, rows(2))
        await asyncio.gather(*tasks)
        assert time.monotonic() - started >= 0.05
        assert engine.batches == [2]
        await asyncio.gather(*(await queued(batcher, *[rows(i) for i in range(8)])))
        assert engine.batches == [2, 8]


async def test_only_requests_of_one_kind_share_a_batch(batcher, engine):
    first = await hold(batcher, engine)
    tasks = [
        asyncio.create_task(batcher.infer(rows(1), None, kind=kind)) for kind in ("a", "b", "a")
    ]
    await asyncio.sleep(0)
    engine.free.set()
    await asyncio.gather(first, *tasks)
    assert engine.batches == [1, 2, 1]


async def test_a_full_queue_says_when_to_come_back_by_the_rate_at_which_it_drains(batcher, engine):
    await batcher.infer(rows(*range(8)), None)
    engine.free.clear()
    engine.running.clear()
    slow = asyncio.create_task(batcher.infer(rows(0), None))
    await engine.running.wait()
    await asyncio.sleep(0.1)  # so long that the rate is known from it
    engine.free.set()
    await slow
    engine.running.clear()
    await hold(batcher, engine)
    await queued(batcher, rows(*range(20)))
    with pytest.raises(Overloaded) as found:
        await batcher.infer(rows(1), None)
    assert 20 * 0.1 * 0.1 <= found.value.retry_after_s <= 20 * 1.0
    engine.free.set()


async def test_every_model_counts_the_time_that_its_own_requests_waited():
    """However many models there are and however busy the others (server#8979)."""
    metrics = Metrics()
    observers = [metrics.of_model(name, "1") for name in ("busy", "free")]
    engines = [Doubling(), Doubling()]
    async with (
        serving(engines[0], observer=observers[0]) as busy,
        serving(engines[1], observer=observers[1]) as free,
    ):
        first = await hold(busy, engines[0])
        (waiting,) = await queued(busy, rows(1))
        await asyncio.sleep(0.05)  # the time that is counted
        await free.infer(rows(1), None)
        engines[0].free.set()
        await asyncio.gather(first, waiting)
    counts = [observer.statistics.queue for observer in observers]
    assert [count.count for count in counts] == [2, 1]
    assert counts[0].ns >= 50e6
    assert counts[1].ns < 25e6
    text = metrics.render().decode()
    assert 'fogline_hub_queue_seconds_bucket{le="0.02",model="busy",version="1"} 1.0' in text


async def test_requests_that_run_again_one_by_one_waited_once(engine):
    metrics = Metrics()
    observer = metrics.of_model("m", "1")
    async with serving(engine, observer=observer) as batcher:
        tasks = await queued(batcher, rows(1), rows(-1), rows(2))
        await asyncio.gather(*tasks, return_exceptions=True)
    assert observer.statistics.queue.count == 3
    assert 'fogline_hub_queue_seconds_count{model="m",version="1"} 3.0' in metrics.render().decode()


async def test_engines_are_switched_between_two_batches_and_nobody_notices(notes):
    first, second = Doubling(), Doubling()
    async with serving(first, observer=notes) as batcher:
        first.free.clear()
        held = asyncio.create_task(batcher.infer(rows(1), None))
        await first.running.wait()
        waiting = [asyncio.create_task(batcher.infer(rows(*range(n)), None)) for n in (2, 3)]
        await asyncio.sleep(0)
        switching = asyncio.create_task(batcher.switch([second]))
        for n, task in zip((2, 3), waiting, strict=True):
            assert len((await task)["y"]) == n  # they did not wait for the old engine
        assert not switching.done()
        first.free.set()
        await switching
        assert len((await held)["y"]) == 1
        await batcher.infer(rows(*range(4)), None)
    assert first.batches == [1]
    assert sum(second.batches) == 9
