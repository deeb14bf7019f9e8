"""Gathers requests into batches for the engines of one model and hands every caller its rows back.

``queue.Queue`` decides, ``Batcher`` waits. Each request owns its future, so a caller may
leave at any moment without costing the others their answer. Several engines may serve one
queue: whichever is free takes what is there.
"""

import asyncio
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from cloud_hub.engines.engine import Arrays, EngineLost
from cloud_hub.inference.queue import HIGHEST, Policy, Queue, Rules, Ticket
from cloud_hub.inference.tracing import CURRENT, Trace
from fogline_protocol.errors import (
    BadRequest,
    DeadlineExceeded,
    InferenceError,
    Overloaded,
    ServerFault,
    Unavailable,
)
from fogline_protocol.model_config import DynamicBatching, QueuePolicy

SMOOTHING = 0.1  # weight of the newest batch in the estimate of what a row costs
NOTHING_KNOWN_S = 1.0  # hint to come back, before any batch has run

GREEDY = DynamicBatching()


class Engine(Protocol):
    """Runs one loaded model on a batch."""

    @property
    def trouble(self) -> str:
        """Why it cannot run until further notice; empty if it runs or is only just replaced."""

    async def ready(self) -> None:
        """Return when a run could start at once: not while it is being replaced.

        Raises:
            EngineLost: it could not be replaced this time. Called again, it waits for the next one.
        """
        ...

    def join(self, requests: Sequence[Arrays]) -> Arrays:
        """Return the rows of several requests one after the other, where a run takes them best.

        They are valid until something else is joined or run.
        """
        ...

    async def run(self, inputs: Arrays, deadline: float | None = None) -> Arrays:
        """Return every output, one row per input row: ``[n, ...] -> [n, ...]``.

        After ``deadline`` nobody waits for them any more.

        Raises:
            EngineLost: it is gone, and this batch may be why.
        """
        ...


class Compute(NamedTuple):
    """Where the seconds of one batch went."""

    join_s: float
    run_s: float
    part_s: float  # handing every caller its rows


class Observer(Protocol):
    """Learns what became of requests and batches; must not raise."""

    def batch_ran(self, rows: int, queued_s: Sequence[float], compute: Compute) -> None:
        """A batch of ``rows`` rows ran; one waiting time per request that is new to an engine."""
        ...

    def batch_failed(self, queued_s: Sequence[float], busy_s: float) -> None:
        """A batch failed after ``busy_s``; waiting times as above."""
        ...

    def requests_expired(self, queued_s: Sequence[float]) -> None:
        """Requests ran out of time before an engine was free; how long each had waited."""
        ...

    def request_rejected(self, reason: str) -> None:
        """A request was refused a place in the queue, or lost it: a word for why."""
        ...


class Depth(NamedTuple):
    """What waits for an engine now."""

    requests: int
    rows: int


@dataclass(slots=True, eq=False)
class Waiting:
    """One request, from arrival to answer."""

    inputs: Arrays
    rows: int
    key: Hashable
    caller: Hashable
    level: int
    arrived: float  # seconds, monotonic
    deadline: float | None
    answer: asyncio.Future[Arrays]  # the caller may cancel it at any moment
    trace: Trace | None = field(default_factory=CURRENT.get)

    @property
    def gone(self) -> bool:
        """Whether its caller has left."""
        return self.answer.done()


class Batcher:
    """Runs a queue's batches on its engines, one at a time on each.

    Owner of the queue; everything happens on one event loop.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        batches: bool,
        max_batch: int,
        max_queue_rows: int,
        observer: Observer,
        scheduling: DynamicBatching = GREEDY,
    ) -> None:
        """Serve ``engines``, all of the same model, once ``serve`` runs.

        Args:
            engines: at least one.
            batches: whether requests may share a run; otherwise each runs alone.
            max_batch: rows in one run; means nothing without ``batches``.
            max_queue_rows: waiting at most, over all callers and levels.
            observer: what is told of every batch.
            scheduling: what the model's configuration says on delays, order and priorities.
        """
        self._engines = tuple(engines)
        self._serving: dict[Engine, asyncio.Task[None]] = {}  # while ``serve`` runs
        self._group: asyncio.TaskGroup | None = None
        self._busy: set[Engine] = set()  # with a batch
        self._batches = batches
        self._max_batch = max_batch if batches else 1
        self._max_queue_rows = max_queue_rows
        self._observer = observer
        self._levels = scheduling.priority_levels  # 0: one, whatever requests ask for
        self._default_level = scheduling.default_priority_level or HIGHEST
        self._queue: Queue[Waiting] = Queue(_rules(scheduling, self._max_batch))
        self._arrived = asyncio.Event()
        self._running = 0  # batches
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        self._row_s = 0.0  # seconds of one engine per row, lately; 0: nothing is known

    def __repr__(self) -> str:
        return (
            f"<Batcher {len(self._queue)} requests of {self._queue.rows} rows waiting, "
            f"{self._running} of {len(self._engines)} engines busy>"
        )

    @property
    def depth(self) -> Depth:
        """What waits for an engine now."""
        return Depth(len(self._queue), self._queue.rows)

    @property
    def engines(self) -> int:
        """How many engines serve."""
        return len(self._engines)

    @property
    def drains_in_s(self) -> float:
        """How long what waits will take at the recent rate: when to come back."""
        if not self._row_s:
            return NOTHING_KNOWN_S
        return self._queue.rows * self._row_s / len(self._engines)

    def level(self, priority: int) -> int:
        """Return the priority level that a request asks for: 1 is the highest, 0 the default.

        Raises:
            BadRequest: the model has levels, but not so many.
        """
        if priority > self._levels > 0:
            raise BadRequest(
                f"parameter 'priority' is {priority}, the model has {self._levels} levels: 1 is the "
                f"highest, {self._levels} the lowest, 0 the default ({self._default_level})"
            )
        return (priority if self._levels else 0) or self._default_level

    async def infer(
        self,
        inputs: Arrays,
        deadline: float | None,
        *,
        caller: Hashable = None,
        priority: int = 0,
        kind: Hashable = (),
    ) -> Arrays:
        """Return the engine's outputs for these inputs, whose shapes the door has checked.

        A request with more rows than a batch holds is split and joined again.

        Args:
            inputs: by name, one row per row of the request.
            deadline: seconds of ``time.monotonic()``; None: no hurry.
            caller: among whom the engines are shared fairly.
            priority: see ``level``.
            kind: only requests of equal kinds, shapes and types share a batch.

        Raises:
            BadRequest: more rows than may ever wait, or a priority that there is not.
            Overloaded: too much is waiting already.
            DeadlineExceeded: ``deadline`` passed first.
            Unavailable: the batcher was closed, the engine was lost, or the request waited longer
                than the queue policy of the model allows.
            ServerFault: the engine failed.
        """
        if self._closed:
            raise Unavailable("the model is being unloaded")
        if all(engine.trouble for engine in self._engines):
            raise Unavailable(self._engines[0].trouble)
        rows = len(next(iter(inputs.values()))) if self._batches else 1
        level = self.level(priority)
        self._admit(rows, level)
        waiting = [
            self._enqueue(part, deadline, caller, level, kind) for part in self._parts(inputs, rows)
        ]
        try:
            if len(waiting) == 1:
                return await waiting[0][0].answer
            parts = await asyncio.gather(*(one.answer for one, _ in waiting))
        finally:
            # The caller left, or one part failed: what still waits need not run.
            for one, ticket in waiting:
                if ticket.item is not None:
                    one.answer.cancel()
                    self._queue.withdraw(ticket)
                    self._settle()
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    async def drain(self) -> None:
        """Take no more requests and return when those taken have their answers."""
        self._closed = True
        await self._idle.wait()

    async def switch(self, engines: Sequence[Engine]) -> None:
        """Serve with these engines from now on, and return when those of before are idle.

        No request waits for it: what is queued is taken by the new ones.
        """
        before, self._engines = self._engines, tuple(engines)
        if self._group is not None:
            for engine in engines:
                self._serving[engine] = self._group.create_task(self._serve(engine))
        leaving = [self._serving.pop(engine) for engine in before if engine in self._serving]
        for engine, task in zip(before, leaving, strict=False):
            if engine not in self._busy:  # the others leave after their batch
                task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)

    async def serve(self) -> None:
        """Run batches until cancelled; what still waits then is told so."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for engine in self._engines:
                    self._serving[engine] = group.create_task(self._serve(engine))
        finally:
            self._group = None
            self._closed = True
            self._idle.set()
            for waiting in self._queue.drain():
                _fail(waiting, Unavailable("the model is being unloaded"))

    def _admit(self, rows: int, level: int) -> None:
        if rows > self._max_queue_rows:
            raise BadRequest(
                f"{rows} rows in one request, at most {self._max_queue_rows} are taken "
                "(max_queue_rows): send fewer at once"
            )
        if self._queue.rows + rows > self._max_queue_rows:
            self._observer.request_rejected("queue_full")
            raise Overloaded(
                f"{self._queue.rows} rows are waiting, {rows} more would exceed the limit of "
                f"{self._max_queue_rows}: come back later or raise max_queue_rows",
                retry_after_s=self.drains_in_s,
            )
        if self._queue.is_full(level):
            self._observer.request_rejected("queue_full")
            raise Overloaded(
                f"{self._queue.rules.policy(level).max_requests} requests of priority level {level} "
                "are waiting, which is the max_queue_size of the model's queue policy: come back "
                "later",
                retry_after_s=self.drains_in_s,
            )

    def _parts(self, inputs: Arrays, rows: int) -> Sequence[Arrays]:
        if rows <= self._max_batch:
            return (inputs,)
        return [
            {name: array[at : at + self._max_batch] for name, array in inputs.items()}
            for at in range(0, rows, self._max_batch)
        ]

    def _enqueue(
        self,
        inputs: Arrays,
        deadline: float | None,
        caller: Hashable,
        level: int,
        kind: Hashable,
    ) -> tuple[Waiting, Ticket[Waiting]]:
        waiting = Waiting(
            inputs,
            len(next(iter(inputs.values()))) if self._batches else 1,
            (kind, *[(name, array.dtype, array.shape[1:]) for name, array in inputs.items()]),
            caller,
            level,
            time.monotonic(),
            deadline,
            asyncio.get_running_loop().create_future(),
        )
        ticket = self._queue.add(waiting)
        self._arrived.set()
        self._idle.clear()
        return waiting, ticket

    async def _serve(self, engine: Engine) -> None:
        while engine in self._engines:
            try:
                await engine.ready()
            except EngineLost as error:
                # What waits is another engine's, if there is one.
                if all(other.trouble for other in self._engines):
                    for waiting in self._queue.drain():
                        _fail(waiting, _of_its_own(error))
                    self._settle()
                continue
            if not len(self._queue):
                self._settle()
                await self._something(None)
                continue
            now = time.monotonic()
            taken = self._queue.take(now)
            if taken.expired or taken.overdue:
                self._refuse(taken.expired, taken.overdue, now)
                self._settle()
            if taken.batch:
                self._running += 1
                self._busy.add(engine)
                try:
                    await self._run(engine, taken.batch, now)
                except asyncio.CancelledError:
                    for waiting in taken.batch:
                        _fail(waiting, Unavailable("the model is being unloaded"))
                    raise
                finally:
                    self._running -= 1
                    self._busy.discard(engine)
                    self._settle()
                continue
            self._settle()
            await self._something(taken.look_again)

    async def _something(self, look_again: float | None) -> None:
        """Wait for a request, or until what waits is due."""
        if look_again is None:
            await self._arrived.wait()
        else:
            try:
                # Linux: the loop's clock is time.monotonic().
                async with asyncio.timeout_at(look_again):
                    await self._arrived.wait()
            except TimeoutError:
                return
        # Whoever wakes first takes it all; the other engines look, and wait again.
        self._arrived.clear()

    def _settle(self) -> None:
        if not self._running and not len(self._queue):
            self._idle.set()

    def _refuse(self, expired: Sequence[Waiting], overdue: Sequence[Waiting], now: float) -> None:
        for waiting in expired:
            _fail(waiting, DeadlineExceeded("the deadline passed before an engine was free"))
        for waiting in overdue:
            timeout_s = self._queue.rules.policy(waiting.level).timeout_s
            _fail(
                waiting,
                Unavailable(
                    f"no engine was free within {timeout_s * 1e3:g} ms, which is as long as the "
                    "queue policy of the model lets a request wait (default_timeout_microseconds)",
                    retry_after_s=self.drains_in_s,
                ),
            )
            self._observer.request_rejected("overdue")
        for _ in expired:
            self._observer.request_rejected("expired")
        self._observer.requests_expired([now - w.arrived for w in (*expired, *overdue)])

    async def _run(self, engine: Engine, batch: Sequence[Waiting], taken: float) -> None:
        """Run a batch that left the queue at ``taken``, and answer its callers."""
        started = time.monotonic()
        rows = sum(waiting.rows for waiting in batch)
        queued_s = [taken - waiting.arrived for waiting in batch]
        try:
            inputs = (
                batch[0].inputs
                if len(batch) == 1
                else engine.join([waiting.inputs for waiting in batch])
            )
            joined = time.monotonic()
            outputs = await engine.run(inputs, _last_deadline(batch))
            ran = time.monotonic()
            if self._batches:
                for name, array in outputs.items():
                    if len(array) != rows:
                        raise ServerFault(
                            f"output {name!r} has {len(array)} rows for {rows} rows of input"
                        )
        except Exception as error:
            busy_s = time.monotonic() - started
            if len(batch) > 1 and not isinstance(error, _NOT_THEIR_VALUES):
                self._observer.batch_failed((), busy_s)  # its requests are counted below
                # One caller's values may be at fault: joining must not cost the others theirs.
                for waiting in batch:
                    if not waiting.gone:
                        await self._run(engine, [waiting], taken)
                return
            # The callers learn of it, and the loop lives on.
            for waiting in batch:
                _fail(waiting, _of_its_own(error))
            self._observer.batch_failed(queued_s, busy_s)
            return
        at = 0
        for waiting in batch:
            if not waiting.answer.done():
                waiting.answer.set_result(
                    outputs
                    if len(batch) == 1
                    else {name: array[at : at + waiting.rows] for name, array in outputs.items()}
                )
            at += waiting.rows
        row_s = (ran - started) / rows
        self._row_s += (row_s - self._row_s) * (SMOOTHING if self._row_s else 1.0)
        parted = time.monotonic()
        for waiting in batch:
            if waiting.trace is not None:
                waiting.trace.ran(waiting.arrived, started, joined, ran, parted)
        # Callers run only after this, so whoever has an answer finds it counted.
        self._observer.batch_ran(
            rows, queued_s, Compute(joined - started, ran - joined, parted - ran)
        )


# Errors that no caller's values are to blame for: to run each request of the batch alone would
# make one failure of an engine, or of a server behind it, as many as there are requests. And what
# an engine died of would kill the next one, once per request.
_NOT_THEIR_VALUES = (Unavailable, Overloaded, DeadlineExceeded)


def _last_deadline(batch: Sequence[Waiting]) -> float | None:
    """Return when the last caller of a batch stops waiting.

    Not the first one: whose time is shorter must not cost the others their answer.
    """
    last = 0.0
    for waiting in batch:
        if waiting.deadline is None:
            return None
        last = max(last, waiting.deadline)
    return last


def _rules(scheduling: DynamicBatching, max_batch: int) -> Rules:
    return Rules(
        max_batch=max_batch,
        max_delay_s=scheduling.max_queue_delay_us / 1e6,
        preferred=scheduling.preferred_batch_sizes,
        default_policy=_policy(scheduling.default_policy),
        policies={level: _policy(policy) for level, policy in scheduling.policies.items()},
        ordered=scheduling.preserve_ordering,
    )


def _policy(policy: QueuePolicy) -> Policy:
    return Policy(policy.timeout_us / 1e6, policy.delays, policy.max_requests)


def _of_its_own(error: Exception) -> InferenceError:
    """Return the error for one caller: a shared one would gather everybody's traceback."""
    if isinstance(error, InferenceError):
        return type(error)(str(error), retry_after_s=error.retry_after_s)
    return ServerFault(f"the engine failed: {error}")


def _fail(waiting: Waiting, error: Exception) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)
