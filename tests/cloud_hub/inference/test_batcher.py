"""The batcher with an engine that the test steps by hand."""

import asyncio
import contextlib
import time

import numpy as np
import pytest

from cloud_hub.inference.batcher import Batcher
from fogline_protocol.inference import (
    BadRequest,
    DeadlineExceeded,
    Overloaded,
    ServerFault,
    Unavailable,
)


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

    def batch_ran(self, rows, queued_s, compute):
        assert min(compute) >= 0
        self.ran.append((rows, len(queued_s)))

    def batch_failed(self, queued_s):
        self.failed += len(queued_s)

    def requests_expired(self, queued_s):
        self.expired += len(queued_s)


@pytest.fixture
def engine():
    return Doubling()


@pytest.fixture
def notes():
    return Notes()


@pytest.fixture
async def batcher(engine, notes):
    batcher = Batcher(engine, batches=True, max_batch=8, max_queue_rows=20, observer=notes)
    task = asyncio.create_task(batcher.serve())
    yield batcher
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


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
    batcher = Batcher(engine, batches=True, max_batch=8, max_queue_rows=20, observer=notes)
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
    batcher = Batcher(engine, batches=False, max_batch=8, max_queue_rows=20, observer=notes)
    task = asyncio.create_task(batcher.serve())
    whole = {"x": np.ones((3, 1), np.float32)}
    answers = await asyncio.gather(batcher.infer(whole, None), batcher.infer(whole, None))
    assert [a["y"].shape for a in answers] == [(3, 1), (3, 1)]
    assert engine.batches == [3, 3]
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_stopping_tells_everybody_who_waits(engine, notes):
    batcher = Batcher(engine, batches=True, max_batch=2, max_queue_rows=20, observer=notes)
    task = asyncio.create_task(batcher.serve())
    first = await hold(batcher, engine)
    others = await queued(batcher, rows(1, 2), rows(3, 4), rows(5))
    task.cancel()
    for waiting in (first, *others):
        with pytest.raises(Unavailable):
            await waiting
    with pytest.raises(Unavailable):
        await batcher.infer(rows(1), None)
