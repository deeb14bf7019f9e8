"""The connection to the hub: coalesces escalations, retries once, probes, counts bytes.

``breaker.py`` decides when the hub is asked; this file carries it out and reports what
happened. Escalations that wait at the same moment for the same model, with tensors of the
same kind, leave as one request: a request of 32 rows costs the hub about as much as two of
one row (performance.md). Each caller owns its future and may leave at any moment.

    ask ─► waiting, by kind ─► request in flight (a few at once) ─► answers, row by row
                                  └─ UNAVAILABLE and time left: once more, unless the hub
                                     said when to come back: until then nothing leaves

The round trip is estimated from answered escalations, and from probes where there are none:
a probe runs at the start, while the breaker is not closed, and when a request found the
estimate too long for its deadline, so that one slow answer does not shut the hub out.
"""

import asyncio
import logging
import math
import random
import time
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from edge_agent.errors import HubLate, HubRefused, HubUnavailable
from edge_agent.inference import breaker as breaker_module
from edge_agent.inference.breaker import Breaker, Event
from fogline_protocol import inference
from fogline_protocol.client import Client
from fogline_protocol.errors import (
    BadRequest,
    DeadlineExceeded,
    InferenceError,
    Overloaded,
    ServerFault,
    Unavailable,
)
from fogline_protocol.grpc_service import INFER
from fogline_protocol.inference import InferRequest, Parameter
from fogline_protocol.tensors import Array

log = logging.getLogger("fogline.agent.uplink")

SMOOTHING = 0.2  # weight of the newest round trip in the estimate
PROBE_TIMEOUT_S = 1.0  # a probe has no inference in it; LTE round trips stay below half of this
REFRESH_GAP_S = 1.0  # between probes that only refresh the estimate
RETRY_ROUND_TRIPS = 1.5  # time that must be left for a second attempt, as for a first one
# Of the breaker's states, for people: to them an open link is one that works.
_SAID = {
    breaker_module.State.CLOSED: "the link to the hub works: what is due for the hub leaves",
    breaker_module.State.OPEN: "the link to the hub is down: what is due for the hub stays here",
    breaker_module.State.HALF_OPEN: "the hub answers again: it is watched before requests leave",
}


class Connect(Protocol):
    """Makes a connection to the hub; called again when one has gone silent."""

    def __call__(self) -> Client:
        """Return a new connection."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What one caller wants of the hub."""

    model: str
    inputs: Mapping[str, Array]
    rows: int  # 0: the tensors have no batch dimension, so they cannot share a request
    outputs: Sequence[str] = ()
    version: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def kind(self) -> Hashable:
        """What questions must have in common to share a request."""
        if self.rows == 0:
            return id(self)
        return (
            self.model,
            self.version,
            tuple(self.outputs),
            tuple((name, array.dtype.str, array.shape[1:]) for name, array in self.inputs.items()),
            # True == 1 == 1.0 in Python, not on the wire
            tuple((key, type(value), value) for key, value in sorted(self.parameters.items())),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What the hub said: as many rows as the question has."""

    outputs: Mapping[str, Array]
    parameters: Mapping[str, Parameter]
    model: str
    version: str


@dataclass(slots=True, eq=False)
class _Waiting:
    """One question, until its caller has an answer or has left."""

    question: Question
    deadline: float  # seconds, monotonic
    answer: asyncio.Future[Answer]


@dataclass(slots=True)
class Counts:
    """What the uplink has done since it was opened. Only grows."""

    questions: int = 0
    requests: int = 0
    retries: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


class Uplink:
    """One hub, as the router sees it: ``async with Uplink(...) as uplink``.

    Owner of the connection, the breaker, the estimate and the waiting questions; everything
    happens on one event loop.
    """

    def __init__(
        self,
        connect: Connect,
        *,
        max_rows: int = 32,
        max_requests: int = 4,
        tuning: breaker_module.Tuning = breaker_module.DEFAULT,
        probe_timeout_s: float = PROBE_TIMEOUT_S,
    ) -> None:
        self.max_rows = max_rows
        self.counts = Counts()
        self.round_trip_s = 0.0  # 0: nothing is known
        self._connect = connect
        self._max_requests = max_requests
        self._tuning = tuning
        self._probe_timeout_s = probe_timeout_s
        self._breaker = Breaker()
        self._probing_wanted = asyncio.Event()
        self._refresh_wanted = False
        self._measured_at = -REFRESH_GAP_S
        self._waiting: dict[Hashable, deque[_Waiting]] = {}
        self._dispatch_due = False
        self._in_flight: set[asyncio.Task[None]] = set()
        self._prober: asyncio.Task[None] | None = None
        self._closed = False

    def __repr__(self) -> str:
        waiting = sum(len(queue) for queue in self._waiting.values())
        return (
            f"<Uplink {self.state}, {self.round_trip_s * 1e3:.1f} ms, "
            f"{len(self._in_flight)} requests in flight, {waiting} questions waiting>"
        )

    async def __aenter__(self) -> "Uplink":
        """Connect in the background: a hub that is absent is an ordinary state."""
        self._client = self._connect()
        self._prober = asyncio.create_task(self._keep_probing(), name="uplink-probes")
        return self

    async def __aexit__(self, *_error: object) -> None:
        """Answer what still waits with a refusal, and disconnect."""
        self._closed = True
        tasks = [*self._in_flight, *([self._prober] if self._prober is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for queue in self._waiting.values():
            _fail(queue, HubUnavailable("the agent is stopping"))
        self._waiting.clear()
        await self._client.close()

    @property
    def state(self) -> str:
        """The breaker's state, as telemetry and people see it."""
        return self._breaker.state

    @property
    def link_up(self) -> bool:
        """Whether escalations may leave: the hub is there, and has not asked for a pause."""
        return self._breaker.lets_through(time.monotonic())

    @property
    def pause_s(self) -> float:
        """For how long the hub still asked not to be asked."""
        return max(0.0, self._breaker.quiet_until - time.monotonic())

    def refresh(self) -> None:
        """Have the round trip measured again soon: a request found it too long."""
        self._refresh_wanted = True
        self._probing_wanted.set()

    async def ask(self, question: Question, timeout_s: float) -> Answer:
        """Return the hub's answer, one row per row of the question.

        Raises:
            HubUnavailable: not reached, no room, a pause that the hub asked for, or (``HubLate``)
                no answer within ``timeout_s``.
            HubRefused: the hub answered with a refusal, or with something else than asked for.
        """
        if self._closed:
            raise HubUnavailable("the agent is stopping")
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + timeout_s
        waiting = _Waiting(question, deadline, loop.create_future())
        self._waiting.setdefault(question.kind, deque()).append(waiting)
        self.counts.questions += 1
        self._dispatch_soon()
        try:
            # Linux: the loop's clock is time.monotonic().
            async with asyncio.timeout_at(deadline):
                return await waiting.answer
        except TimeoutError:
            raise HubLate(f"no answer from the hub within {timeout_s:.3f} s") from None

    async def call(self, path: str, request: bytes, timeout_s: float) -> bytes:
        """Make one call of another service over the same connection; the breaker stays out of it.

        Raises:
            InferenceError: it was refused or did not get through.
        """
        return await self._client.call(path, request, timeout_s)

    def _dispatch_soon(self) -> None:
        # Not at once: questions that come in the same turn of the loop travel together.
        if not self._dispatch_due:
            self._dispatch_due = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatch_due = False
        now = time.monotonic()
        if pause_s := self.pause_s:
            # Who waits would only learn the same later: the answer from here is in their hands.
            waiting = [one for queue in self._waiting.values() for one in queue]
            self._waiting.clear()
            _fail(waiting, HubUnavailable(f"the hub wants no questions for {pause_s:.3f} s"))
        while self._waiting and len(self._in_flight) < self._max_requests and not self._closed:
            batch = self._take(now)
            if batch:
                task = asyncio.create_task(self._send(batch), name="uplink-request")
                self._in_flight.add(task)
                task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._in_flight.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("an escalation failed here", exc_info=task.exception())
        self._dispatch_soon()

    def _take(self, now: float) -> list[_Waiting]:
        """Return what leaves next: the kind that waits longest, without those who have left."""
        kind, queue = next(iter(self._waiting.items()))
        del self._waiting[kind]
        batch: list[_Waiting] = []
        rows = 0
        while queue:
            first = queue[0]
            if not first.answer.done() and first.deadline > now:
                if batch and rows + first.question.rows > self.max_rows:
                    self._waiting[kind] = queue  # at the end: other kinds come first now
                    break
                batch.append(first)
                rows += first.question.rows
            queue.popleft()
        return batch

    async def _send(self, batch: Sequence[_Waiting]) -> None:
        first = batch[0].question
        inputs = first.inputs
        if len(batch) > 1:
            inputs = {
                name: np.concatenate([waiting.question.inputs[name] for waiting in batch])
                for name in first.inputs
            }
        request = InferRequest(
            model=first.model,
            version=first.version,
            inputs=inputs,
            outputs=first.outputs,
            parameters=first.parameters,
        )
        rows = sum(waiting.question.rows for waiting in batch)
        try:
            answer = _checked(
                await self._infer(request, max(waiting.deadline for waiting in batch)),
                first.outputs,
                rows,
            )
        except HubRefused as error:
            if len(batch) > 1 and isinstance(error.refusal, BadRequest):
                # The hub may take fewer rows than we joined, or one caller's may be at fault:
                # joining must not cost anybody an answer.
                await asyncio.gather(*(self._send([waiting]) for waiting in batch))
                return
            _fail(batch, error)
        except HubUnavailable as error:
            _fail(batch, error)
        except BaseException:
            # The agent stops, or a fault of ours: nobody waits for what will not come.
            _fail(batch, HubUnavailable("the escalation was given up"))
            raise
        else:
            _hand_out(batch, answer)

    async def _infer(self, request: InferRequest, deadline: float) -> Answer:
        """Make one request, once more if that may help, and tell the breaker."""
        data = inference.encode_request(request)
        started = time.monotonic()
        timeout_s = deadline - started
        try:
            received = await self._attempt(data, timeout_s)
        except Unavailable as error:
            if error.retry_after_s is not None:  # not before then, and nobody here waits for it
                raise self._failure(error, timeout_s) from None
            started = time.monotonic()
            timeout_s = deadline - started
            if timeout_s <= RETRY_ROUND_TRIPS * self.round_trip_s:
                self._report(Event.FAILED)
                raise HubUnavailable("the hub cannot be reached") from None
            self.counts.retries += 1
            try:
                received = await self._attempt(data, timeout_s)
            except InferenceError as error:
                raise self._failure(error, timeout_s) from None
        except InferenceError as error:
            raise self._failure(error, timeout_s) from None
        self._measured(time.monotonic() - started)
        self._report(Event.SUCCEEDED)
        try:
            response = inference.decode_response(received)
        except ServerFault as error:
            raise HubRefused(error) from None
        return Answer(response.outputs, response.parameters, response.model, response.version)

    async def _attempt(self, data: bytes, timeout_s: float) -> bytes:
        self.counts.requests += 1
        self.counts.bytes_sent += len(data)
        received = await self._client.call(INFER, data, timeout_s)
        self.counts.bytes_received += len(received)
        return received

    def _failure(self, error: InferenceError, timeout_s: float) -> HubUnavailable | HubRefused:
        """Tell the breaker of a failed attempt and return what the callers are told."""
        match error:
            case Unavailable() | Overloaded():
                # "Do not ask again" is about this request, and says nothing of the next one.
                if error.retry_after_s is None or math.isinf(error.retry_after_s):
                    self._report(Event.FAILED)
                else:
                    self._report(Event.PUSHED_BACK, error.retry_after_s)
                return HubUnavailable(str(error))
            case DeadlineExceeded():
                # An attempt with less than a round trip's time says nothing about the link.
                if timeout_s >= self.round_trip_s:
                    self._report(Event.FAILED)
                return HubLate(f"no answer from the hub within {timeout_s:.3f} s")
            case _:
                self._report(Event.SUCCEEDED)  # the link works: the hub answered
                return HubRefused(error)

    def _measured(self, seconds: float) -> None:
        self._measured_at = time.monotonic()
        if self.round_trip_s == 0.0:
            self.round_trip_s = seconds
        else:
            self.round_trip_s += SMOOTHING * (seconds - self.round_trip_s)

    def _report(self, event: Event, pause_s: float = 0.0) -> None:
        before = self._breaker
        self._breaker = breaker_module.step(
            before,
            event,
            time.monotonic(),
            draw=random.uniform(0.5, 1.0),
            pause_s=pause_s,
            tuning=self._tuning,
        )
        if before.state != self._breaker.state:
            log.log(
                logging.WARNING if before.closed else logging.INFO,
                _SAID[self._breaker.state],
                extra={"was": str(before.state), "because": str(event)},
            )
            if before.closed:
                self._probing_wanted.set()

    async def _keep_probing(self) -> None:
        """Probe when the breaker or the estimate asks for it, until cancelled."""
        await self._probe()
        while True:
            due = self._breaker.probe_at
            if due is None:
                await self._probing_wanted.wait()
                self._probing_wanted.clear()
                if not self._refresh_wanted or not self._breaker.closed:
                    continue
                due = self._measured_at + REFRESH_GAP_S
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                self._refresh_wanted = False
            else:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            await self._probe()

    async def _probe(self) -> None:
        """Ask whether the hub is there. Any answer is good: it proves the way and back.

        Not ready may mean one broken model among many; that model's escalations will be
        refused, the others need the link.
        """
        started = time.monotonic()
        try:
            await self._client.server_ready(self._probe_timeout_s)
        except DeadlineExceeded:
            # Packets vanish: TCP would go on resending into the dark, longer and longer, after
            # the way is free again. A new connection finds out at once.
            silent, self._client = self._client, self._connect()
            self._report(Event.PROBE_BAD)
            await silent.close()
        except InferenceError:
            self._report(Event.PROBE_BAD)
        else:
            self._measured(time.monotonic() - started)
            self._report(Event.PROBE_GOOD)


def _checked(answer: Answer, outputs: Sequence[str], rows: int) -> Answer:
    missing = [name for name in outputs if name not in answer.outputs]
    if missing:
        raise HubRefused(ServerFault(f"the hub's answer lacks the outputs {missing}"))
    if rows and any(array.shape[:1] != (rows,) for array in answer.outputs.values()):
        shapes = {name: list(array.shape) for name, array in answer.outputs.items()}
        raise HubRefused(ServerFault(f"the hub was asked for {rows} rows, and sent {shapes}"))
    return answer


def _hand_out(batch: Sequence[_Waiting], answer: Answer) -> None:
    """Give every caller its rows; who has left is passed over."""
    at = 0
    for waiting in batch:
        rows = waiting.question.rows
        if not waiting.answer.done():
            outputs = answer.outputs
            if len(batch) > 1:
                outputs = {name: array[at : at + rows] for name, array in outputs.items()}
            waiting.answer.set_result(
                Answer(outputs, answer.parameters, answer.model, answer.version)
            )
        at += rows


def _fail(batch: Sequence[_Waiting] | deque[_Waiting], error: HubUnavailable | HubRefused) -> None:
    for waiting in batch:
        if not waiting.answer.done():
            # One exception each: a shared one would gather every caller's traceback.
            waiting.answer.set_exception(
                HubRefused(error.refusal)
                if isinstance(error, HubRefused)
                else type(error)(str(error))
            )
