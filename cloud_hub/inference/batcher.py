"""Gathers requests into batches for one engine and hands every caller its rows back.

``queue.Queue`` decides, ``Batcher`` waits. Each request owns its future, so a caller may
leave at any moment without costing the others their answer.
"""

import asyncio
import copy
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from cloud_hub.inference.queue import Queue
from fogline_protocol.inference import (
    BadRequest,
    DeadlineExceeded,
    InferenceError,
    Overloaded,
    ServerFault,
    Unavailable,
)
from fogline_protocol.tensors import Array

Arrays = Mapping[str, Array]


class Engine(Protocol):
    """Runs one loaded model on a batch."""

    async def run(self, inputs: Arrays, deadline: float | None = None) -> Arrays:
        """Return every output, one row per input row: ``[n, ...] -> [n, ...]``.

        After ``deadline`` nobody waits for them any more.
        """
        ...


class Compute(NamedTuple):
    """Where the seconds of one batch went."""

    join_s: float
    run_s: float
    part_s: float  # handing every caller its rows


class Observer(Protocol):
    """Learns what a batch was like; must not raise."""

    def batch_ran(self, rows: int, queued_s: Sequence[float], compute: Compute) -> None:
        """A batch of ``rows`` rows ran; one waiting time per request in it."""
        ...

    def batch_failed(self, queued_s: Sequence[float]) -> None:
        """A batch failed; one waiting time per request in it."""
        ...

    def requests_expired(self, queued_s: Sequence[float]) -> None:
        """Requests ran out of time before an engine was free; how long each had waited."""
        ...


@dataclass(slots=True, eq=False)
class Waiting:
    """One request, from arrival to answer."""

    inputs: Arrays
    rows: int
    key: Hashable
    arrived: float  # seconds, monotonic
    deadline: float | None
    answer: asyncio.Future[Arrays]  # the caller may cancel it at any moment

    @property
    def gone(self) -> bool:
        """Whether its caller has left."""
        return self.answer.done()


class Batcher:
    """Runs a queue's batches on one engine, one at a time.

    Owner of the queue; everything happens on one event loop.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        batches: bool,
        max_batch: int,
        max_queue_rows: int,
        observer: Observer,
    ) -> None:
        self._engine = engine
        self._batches = batches
        self._max_batch = max_batch if batches else 1
        self._max_queue_rows = max_queue_rows
        self._observer = observer
        self._queue: Queue[Waiting] = Queue(self._max_batch)
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    def __repr__(self) -> str:
        return f"<Batcher {len(self._queue)} requests of {self._queue.rows} rows waiting>"

    async def infer(self, inputs: Arrays, deadline: float | None) -> Arrays:
        """Return the engine's outputs for these inputs, whose shapes the door has checked.

        A request with more rows than a batch holds is split and joined again.

        Raises:
            BadRequest: more rows than may ever wait.
            Overloaded: too many rows are waiting already.
            DeadlineExceeded: ``deadline`` (seconds of ``time.monotonic()``) passed first.
            Unavailable: the batcher was closed.
            ServerFault: the engine failed.
        """
        if self._closed:
            raise Unavailable("the model is being unloaded")
        rows = len(next(iter(inputs.values()))) if self._batches else 1
        if rows > self._max_queue_rows:
            raise BadRequest(
                f"{rows} rows in one request, at most {self._max_queue_rows} are taken "
                "(max_queue_rows): send fewer at once"
            )
        if self._queue.rows + rows > self._max_queue_rows:
            raise Overloaded(
                f"{self._queue.rows} rows are waiting, {rows} more would exceed the limit of "
                f"{self._max_queue_rows}: come back later or raise max_queue_rows"
            )
        if rows <= self._max_batch:
            return await self._enqueue(inputs, rows, deadline)
        slices = [
            {name: array[at : at + self._max_batch] for name, array in inputs.items()}
            for at in range(0, rows, self._max_batch)
        ]
        parts = await _all_or_none(
            [self._enqueue(part, len(next(iter(part.values()))), deadline) for part in slices]
        )
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    async def drain(self) -> None:
        """Take no more requests and return when those taken have their answers."""
        self._closed = True
        await self._idle.wait()

    async def serve(self) -> None:
        """Run batches until cancelled; what still waits then is told so."""
        try:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                while len(self._queue):
                    await self._step()
                    # An inline engine never waits: let answers leave between two batches.
                    await asyncio.sleep(0)
                self._idle.set()
        finally:
            self._closed = True
            self._idle.set()
            for waiting in self._queue.drain():
                _fail(waiting, Unavailable("the model is being unloaded"))

    def _enqueue(self, inputs: Arrays, rows: int, deadline: float | None) -> asyncio.Future[Arrays]:
        answer: asyncio.Future[Arrays] = asyncio.get_running_loop().create_future()
        key = tuple((name, array.dtype, array.shape[1:]) for name, array in inputs.items())
        self._queue.add(Waiting(inputs, rows, key, time.monotonic(), deadline, answer))
        self._arrived.set()
        self._idle.clear()
        return answer

    async def _step(self) -> None:
        now = time.monotonic()
        taken = self._queue.take(now)
        for waiting in taken.expired:
            _fail(waiting, DeadlineExceeded("the deadline passed before an engine was free"))
        if taken.expired:
            self._observer.requests_expired([now - w.arrived for w in taken.expired])
        if not taken.batch:
            return
        try:
            await self._run(taken.batch)
        except asyncio.CancelledError:
            for waiting in taken.batch:
                _fail(waiting, Unavailable("the model is being unloaded"))
            raise

    async def _run(self, batch: Sequence[Waiting]) -> None:
        started = time.monotonic()
        rows = sum(waiting.rows for waiting in batch)
        queued_s = [started - waiting.arrived for waiting in batch]
        try:
            inputs = _join(batch)
            joined = time.monotonic()
            outputs = await self._engine.run(inputs, _last_deadline(batch))
            ran = time.monotonic()
            if self._batches:
                for name, array in outputs.items():
                    if len(array) != rows:
                        raise ServerFault(
                            f"output {name!r} has {len(array)} rows for {rows} rows of input"
                        )
        except Exception as error:
            if len(batch) > 1 and not isinstance(error, _NOT_THEIR_VALUES):
                # One caller's values may be at fault: joining must not cost the others theirs.
                for waiting in batch:
                    if not waiting.gone:
                        await self._run([waiting])
                return
            # The caller learns of it, and the loop lives on for the next one.
            known = isinstance(error, InferenceError)
            told = error if known else ServerFault(f"the engine failed: {error}")
            for waiting in batch:
                # One each: a shared one would gather every caller's traceback.
                _fail(waiting, copy.copy(told))
            self._observer.batch_failed(queued_s)
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
        # Callers run only after this, so whoever has an answer finds it counted.
        self._observer.batch_ran(
            rows, queued_s, Compute(joined - started, ran - joined, time.monotonic() - ran)
        )


# Errors that no caller's values are to blame for: to run each request of the batch alone would
# make one failure of an engine, or of a server behind it, as many as there are requests.
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


def _join(batch: Sequence[Waiting]) -> Arrays:
    if len(batch) == 1:
        return batch[0].inputs
    return {
        name: np.concatenate([waiting.inputs[name] for waiting in batch])
        for name in batch[0].inputs
    }


async def _all_or_none(answers: Sequence[asyncio.Future[Arrays]]) -> list[Arrays]:
    try:
        return await asyncio.gather(*answers)
    finally:
        for answer in answers:  # one part failed or the caller left: the others need not run
            answer.cancel()


def _fail(waiting: Waiting, error: Exception) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)
