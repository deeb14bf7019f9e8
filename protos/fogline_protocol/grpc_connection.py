"""One connection of the gRPC door: its transport, its calls, and what does not get on.

    data_received ─► http2 ─► _Call ─► a task per call ─► http2 ─► one write per turn of the loop

What a stranger can make us keep is bounded: unread requests by the windows that are granted, those
that are answered by their room (``rooms``), unread answers because nothing more is read from who
does not read; and what all strangers can, by what they share (``door_memory``). What does not get
on is ended by the times below, sooner where others need the memory. What a peer makes us do for
nothing is counted in ``http2``, and what it asks for amiss here.
"""

import asyncio
import functools
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Protocol

from fogline_protocol import grpc_calls, grpc_headers, grpc_messages, http2
from fogline_protocol.door_memory import (
    PROGRESS_BYTES,
    STALL_S,
    STALLED,
    UNREAD,
    Holder,
    Memory,
    Turn,
    address_of,
)
from fogline_protocol.errors import (
    BadRequest,
    DeadlineExceeded,
    InferenceError,
    Unavailable,
    Unsupported,
)
from fogline_protocol.grpc_calls import Admit, Metadata, Method, Methods
from fogline_protocol.grpc_headers import Head
from fogline_protocol.grpc_messages import Message, Messages
from fogline_protocol.http2 import Data, Request, Reset
from fogline_protocol.http2_frames import Code
from fogline_protocol.lingering import UNREAD_S, Lingering
from fogline_protocol.outcomes import (
    CANCELLED,
    INTERNAL,
    OK,
    UNAVAILABLE,
    UNKNOWN_CALL,
    Books,
    Entries,
    Entry,
    outcome_of,
)
from fogline_protocol.rooms import Lease, Room

ROOM_MESSAGES = 4  # of the largest size: on their way to one connection, and in its hands
TURN_BYTES = 1 << 18  # of answers in one write, so that none holds up the others
UNREAD_BYTES = 1 << 18  # of answers that a peer leaves unread; then we stop reading too
WRITE_AHEAD_BYTES = 1 << 18  # the same for one stream; then its answers wait

HANDSHAKE_S = 10.0  # for TLS, and for the first frame
ARRIVAL_S = 60.0  # for the next byte of a frame or of a request
IDLE_S = 3600.0  # without a call; clients connect again by themselves
QUIET_S = 300.0  # without a frame; then the peer is asked whether it is there
PONG_S = 30.0  # for it to say so
MALFORMED = 100  # requests of one connection that are no requests
# A method that keeps to the deadline has more to say about it than we, so it is heard first.
DEADLINE_SLACK_S = 0.1

STOPPING = "the server is shutting down: ask another one, or this one again later"


@dataclass(frozen=True, slots=True)
class Service:
    """What is served, and to whom."""

    methods: Methods
    streams: Set[str]  # paths of the methods that are streams of requests; the others are unary
    max_message_bytes: int
    admit: Admit | None  # is asked first, in the task of every call
    memory: Memory
    books: Books | None  # are told how each request ends of the methods that are
    counted: Set[str]  # named here by their paths


class Owner(Protocol):
    """Who has to know that a connection is there."""

    def joined(self, connection: "Connection") -> None:
        """Note a connection that was made."""
        ...

    def left(self, connection: "Connection") -> None:
        """Note a connection that was lost."""
        ...


class _Call:
    """One call: what its method may ask of it (``grpc_calls.Context``), and where it stands."""

    __slots__ = (
        "arrival", "coming", "deadline", "entries", "entry", "have", "head", "held", "mark",
        "method", "number", "since", "task", "timer", "touched", "unpacked",
    )  # fmt: skip

    def __init__(self, number: int, head: Head, method: Method, now: float) -> None:
        self.touched = now  # when something of its body arrived
        self.since = now  # when it last got on
        self.number = number  # of its stream
        self.head = head
        self.method = method
        self.deadline: float | None = None  # on ``time.monotonic()``
        self.timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None
        self.arrival: Message | Messages | None = None  # what has arrived, if not all at once
        self.have = 0  # bytes of the body so far
        self.coming: Lease | None = None  # for a message beyond the window of every stream
        self.unpacked: Lease | None = None  # for its message, if that arrived compressed
        self.mark = 0  # bytes of the body that were here then
        self.held = head.held  # bytes of the door's memory that it has without a lease
        self.entry: Entry | None = None  # in the books, of a unary call
        self.entries: Entries | None = None  # of a stream

    def waits_for_peer(self) -> bool:
        """Return whether the next thing that has to happen is that some of its body arrives."""
        if self.coming is not None and not self.coming.had:
            return False  # the peer has to wait for us
        if type(self.arrival) is Messages:
            # A stream may rest between its messages, not in the middle of a large one.
            return self.coming is not None and not self.arrival.waits_for_room
        return self.task is None

    def gives_way(self) -> bool:
        """Return whether it only waits for its peer, as a stream between its messages does."""
        arrival = self.arrival
        return self.waits_for_peer() or (type(arrival) is Messages and arrival.rests)

    def time_remaining(self) -> float | None:
        """Return how long the caller still waits, in seconds."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def invocation_metadata(self) -> Metadata:
        """Return what the caller sent along."""
        return self.head.metadata


class Connection(asyncio.Protocol):
    """One connection. Owner of its calls and of everything that is written."""

    def __init__(self, service: Service, owner: Owner) -> None:
        """Serve ``service``; ``owner`` is told when the connection is made and when it is lost."""
        self._service = service
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._http: http2.Connection[Head] = http2.Connection(Head)
        self._calls: dict[int, _Call] = {}
        self._flushing = False
        self._full = False  # the transport holds as much as it should
        self._leaving = False  # no new calls; it closes after the last one
        self._end: Lingering | None = None  # nothing more is said; what arrives is dropped
        self._writers: dict[int, asyncio.Future[None]] = {}  # streams whose reader is slow
        self._limit = service.max_message_bytes
        self._memory = memory = service.memory
        self._arriving, self._answers = memory.arriving, memory.answers
        self._coming = Room(ROOM_MESSAGES * self._limit, memory.arriving, None)
        # Of messages that were unpacked, and of all that streams have in hand.
        self._in_hand = Room(ROOM_MESSAGES * self._limit, memory.in_hand, None)
        # What the memory was told: of half a frame, since when; of answers that nobody has read.
        self._half_frame = self._http.received
        self._half, self._half_at = 0, 0.0
        self._unread_bytes = 0
        self._in_turn = 0  # bytes of them that streams have and write later
        self._handed = 0  # bytes that the transport was given, in all
        self._got_on, self._got_on_at = 0, 0.0  # how many of them had left, when many more had
        self._malformed = 0
        # What the sweep compares, and when it last was different.
        self._stuck: dict[int, tuple[int, float]] = {}  # bytes that wait for a window, since when
        self._made_at = self._whole_at = self._asked_at = self._read_at = self._heard_at = 0.0
        self._frames = self._opened = self._unread = 0
        self._pinged = False

    # The transport's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._made_at = self._whole_at = self._asked_at = self._read_at = time.monotonic()
        self._heard_at = self._made_at
        transport.set_write_buffer_limits(high=UNREAD_BYTES)
        self._coming.address = self._in_hand.address = address_of(transport)
        self._owner.joined(self)
        encryption = transport.get_extra_info("ssl_object")
        if encryption is not None and encryption.selected_alpn_protocol() != "h2":
            self.send_away(Code.INADEQUATE_SECURITY, "ALPN must agree on h2")

    def data_received(self, data: bytes) -> None:
        """Read frames, start what they complete."""
        if self._end is not None:
            self._end.heard()  # and dropped: it is read so that the peer reads what it was sent
            return
        now = time.monotonic()
        for event in self._http.receive(data, now):
            kind = type(event)
            if kind is Data:
                self._data(event, now)  # type: ignore[arg-type]  # by its type, the quick way
            elif kind is Request:
                self._request(event, now)  # type: ignore[arg-type]
            elif kind is Reset:
                self._dropped(event.stream)  # type: ignore[union-attr]
            else:
                self._fail(data)
            if self._end is not None:
                return  # what else came along is for nobody
        half = len(self._half_frame)
        if half != self._half:
            self._arriving.drop(self._half - half)
            self._half, self._half_at = half, now
        # Nothing is said before the peer has: it may expect something else than HTTP/2.
        if self._http.begun and self._http.sendable:
            self._flush_soon()

    def connection_lost(self, error: Exception | None) -> None:
        """Give up whatever was asked for here."""
        self._transport = None
        for number in tuple(self._calls):
            self._dropped(number)
        self._arriving.drop(self._half)
        self._answers.drop(self._unread_bytes)
        self._half = self._unread_bytes = 0
        self._owner.left(self)

    def pause_writing(self) -> None:
        """Stop reading too: what is read would be answered."""
        self._full = True
        self._read_at = time.monotonic()
        if self._transport is not None and self._end is None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Go on."""
        self._full = False
        if self._transport is not None:
            if not self._transport.is_closing():
                self._transport.resume_reading()
            self._flush_soon()

    # What arrives

    def _request(self, event: "Request[Head]", now: float) -> None:
        number, head, ended = event
        if head.broken:
            self._amiss(number)
            return
        books = self._service.books
        counting = books if head.path in self._service.counted else None
        if head.refusal is not None:
            if counting is not None and head.problem is not None:
                counting.open_entry().end(outcome_of(head.problem))
            self._http.end(number, head.refusal)
            return
        method = self._service.methods.get(head.path)
        if method is None:
            if books is not None:
                books.rejected(UNKNOWN_CALL)
            text = f"{head.path} is not offered by this server"
            self._http.end(number, grpc_headers.headers_only(Unsupported(text)))
            return
        call = self._calls[number] = _Call(number, head, method, now)
        stream = head.path in self._service.streams
        if counting is not None:
            if stream:
                call.entries = Entries(counting)
            else:
                call.entry = counting.open_entry()
        self._arriving.hold(head.held)
        if self._arriving.full and self._crowded(call):
            return
        if head.timeout_s is not None:
            call.deadline = now + head.timeout_s
            after_s = head.timeout_s + DEADLINE_SLACK_S
            call.timer = self._loop.call_later(after_s, self._out_of_time, call)
        if stream:
            call.arrival = messages = Messages(
                self._limit,
                head.encoding,
                self._in_hand,
                lambda needed, have: self._make_room(call, needed, have),
                lambda have: self._taken(call, have),
                self._answer_waits,
            )
            if ended:
                messages.add(b"", True)
            call.task = self._loop.create_task(self._stream(call, messages))
        elif ended:
            self._refuse(call, BadRequest("the call ended before its message"))

    def _data(self, event: Data, now: float) -> None:
        number, data, ended = event
        call = self._calls.get(number)
        if call is None:
            return  # it has its answer already
        size = len(data)
        call.have += size
        if ended and call.head.length is not None and call.head.length != call.have:
            self._amiss(number)  # RFC 9113, 8.1.1
            self._dropped(number, INTERNAL)  # as its caller has to read the reset
            return
        arrival = call.arrival
        if arrival is None:
            length = size - 5
            if (
                ended
                and 0 <= length <= self._limit
                and data[0] == 0
                and length == int.from_bytes(data[1:5], "big")
            ):  # the usual case: a whole message at once
                call.held += size
                self._arriving.hold(size)
                if self._arriving.full and self._crowded(call):
                    return
                call.task = self._loop.create_task(self._unary(call, data[5:], False))
                return
            arrival = call.arrival = Message()
        call.touched = now
        if call.have - call.mark >= PROGRESS_BYTES:
            call.since, call.mark = now, call.have
        if call.coming is None or not call.coming.had:
            call.held += size
            self._arriving.hold(size)
            if self._arriving.full and self._crowded(call):
                return
        if type(arrival) is Messages:
            arrival.add(data, ended)
        else:
            try:
                self._piece(call, arrival, data, ended)  # type: ignore[arg-type]
            except InferenceError as error:
                self._refuse(call, error)

    def _crowded(self, call: _Call) -> bool:
        """Make room where there is too little; return whether this very call has ended for it."""
        if self._memory.overfull() and call.number in self._calls:
            self._refuse(call, self._memory.refusal())
        return call.number not in self._calls  # it may have had to give way itself

    def _piece(self, call: _Call, message: Message, data: bytes, ended: bool) -> None:
        """Take a piece of a unary call's message, and start the call with the last one.

        Raises:
            InferenceError: it is no message, or too long a one.
        """
        if message.add(data):
            grpc_messages.check_length(message.expected, self._limit)
            if not ended:
                self._make_room(call, 5 + message.expected, call.have)
        if 0 <= message.expected < message.have:
            raise BadRequest("a unary call has one message, and more than that arrived")
        if ended:
            if message.have != message.expected:
                raise BadRequest("the call ended in the middle of its message")
            data = b"".join(message.pieces)
            message.pieces.clear()
            call.task = self._loop.create_task(self._unary(call, data, message.compressed))

    def _amiss(self, number: int) -> None:
        """Break off what is no request; it costs us something, so there is an end to it."""
        self._http.reset(number, Code.PROTOCOL_ERROR)
        self._malformed += 1
        if self._malformed > MALFORMED:
            self.send_away(Code.ENHANCE_YOUR_CALM, "too many malformed requests")

    def _make_room(self, call: _Call, needed: int, have: int) -> None:
        """See that ``needed`` bytes can arrive of which ``have`` have, in turn with other calls."""
        more = needed - have - self._http.credit(call.number)
        if more > 0 and call.coming is None:  # else it asked before, for the same message

            def grant() -> None:
                call.touched = call.since = time.monotonic()
                self._http.grant(call.number, more)
                self._flush_soon()

            call.coming = self._coming.lease(needed - have, grant)

    def _taken(self, call: _Call, have: int) -> None:
        """Let the peer send as much as was taken of a stream, ``have`` being what is left of it."""
        if call.coming is not None:
            call.coming.release()
            call.coming = None
        self._arriving.drop(call.held - call.head.held - have)
        call.held = call.head.held + have
        more = http2.STREAM_WINDOW - have - self._http.credit(call.number)
        if more >= http2.STREAM_WINDOW // 4:
            self._http.grant(call.number, more)
            self._flush_soon()

    # Calls

    async def _unary(self, call: _Call, message: bytes, compressed: bool) -> None:
        try:
            if self._service.admit is None and not compressed:
                method = call.method
            else:
                method = self._prepared(call, compressed)
            answer = await grpc_calls.translating(call.head.path, method, message, call)
            grpc_messages.check_answer(answer, self._limit)
            answers = self._answers
            if answers.used + len(answer) > answers.lendable:
                self._check_room(answer)
        except InferenceError as error:
            self._refuse(call, error)
        except asyncio.CancelledError:
            # Somebody else's, if the call is still there: its caller must not wait for ever.
            self._refuse(call, Unavailable("the call was given up by the server"))
            raise
        else:
            if self._over(call, OK):
                self._http.respond(
                    call.number, grpc_headers.ANSWER, grpc_headers.DONE,
                    b"\0" + len(answer).to_bytes(4, "big"), answer,
                )  # fmt: skip
                if len(answer) > http2.DIRECT_BYTES:
                    self._count_unread()
                self._flush_soon()

    def _check_room(self, answer: bytes) -> None:
        if not self._memory.takes_answer(len(answer)):
            raise self._memory.refusal(UNREAD)

    def _prepared(self, call: _Call, compressed: bool) -> Method:
        """Return the method of a call with what comes before it."""

        async def prepared(message: bytes, context: grpc_calls.Context) -> bytes:
            if self._service.admit is not None:
                await self._service.admit(call.head.path, call.head.metadata)
            if compressed:
                turn = Turn(self._in_hand, grpc_messages.at_most(len(message), self._limit))
                call.unpacked = turn.lease
                message = await grpc_messages.unpacked(
                    turn, message, call.head.encoding, self._limit
                )
            return await call.method(message, context)

        return prepared

    async def _stream(self, call: _Call, messages: Messages) -> None:
        async def write(answer: bytes) -> None:
            grpc_messages.check_answer(answer, self._limit)
            if not self._http.answering(call.number):
                self._http.open(call.number, grpc_headers.ANSWER)
            messages.writing()
            self._http.send(call.number, b"\0" + len(answer).to_bytes(4, "big"), answer)
            self._flush_soon()
            if self._http.queued(call.number) > WRITE_AHEAD_BYTES:
                slow = self._writers[call.number] = self._loop.create_future()
                await slow
            messages.written()

        async def admitted(_message: bytes, _context: grpc_calls.Context) -> bytes:
            if self._service.admit is not None:
                await self._service.admit(call.head.path, call.head.metadata)
            return b""

        try:
            try:
                await grpc_calls.translating(call.head.path, admitted, b"", call)
            except InferenceError:
                if call.entries is not None:
                    call.entries.open()  # it counts as one, however many it would have been
                raise
            method = messages.answering(call.method)
            await grpc_calls.answer_stream(
                call.head.path, method, messages, call, write, call.entries
            )
        except InferenceError as error:
            self._refuse(call, error)
        except asyncio.CancelledError:
            self._refuse(call, Unavailable("the call was given up by the server"))
            raise
        else:
            if self._over(call, OK):
                if not self._http.answering(call.number):
                    self._http.open(call.number, grpc_headers.ANSWER)
                self._http.end(call.number, grpc_headers.DONE)
                self._flush_soon()

    def _over(self, call: _Call, outcome: str) -> bool:
        """Forget a call and return True, unless it was forgotten before.

        The books are told here and nowhere else, so they say what the peer is told.
        """
        if self._calls.pop(call.number, None) is None:
            return False
        if call.entry is not None:
            call.entry.end(outcome)
        elif call.entries is not None:
            call.entries.end(outcome)
        self._arriving.drop(call.held)
        if call.timer is not None:
            call.timer.cancel()
        if call.coming is not None:
            call.coming.release()
        if call.unpacked is not None:
            call.unpacked.release()
        if call.arrival is not None:
            call.arrival.release()
        return True

    def _refuse(self, call: _Call, error: InferenceError) -> None:
        """End a call with a status, unless it has ended."""
        if not self._over(call, outcome_of(error)):
            return
        if self._http.answering(call.number):
            self._http.drop(call.number)
            self._http.end(call.number, grpc_headers.trailers(error))
        else:
            self._http.end(call.number, grpc_headers.headers_only(error))
        self._flush_soon()

    def _dropped(self, number: int, outcome: str = CANCELLED) -> None:
        """Give a call up that nobody waits for any more."""
        if (slow := self._writers.pop(number, None)) is not None:
            slow.cancel()
        call = self._calls.get(number)
        if call is not None and self._over(call, outcome) and call.task is not None:
            call.task.cancel()

    def _out_of_time(self, call: _Call) -> None:
        self._break_off(call, DeadlineExceeded("the deadline of the call has passed"))

    def _break_off(self, call: _Call, error: InferenceError) -> None:
        self._refuse(call, error)
        if call.task is not None:
            call.task.cancel()

    # What leaves

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        transport = self._transport
        if transport is None or transport.is_closing() or self._end is not None:
            return
        while not self._full and self._http.sendable:
            data = self._http.take(TURN_BYTES)
            self._handed += len(data)
            transport.write(data)
        if self._unread_bytes or self._http.queued_bytes or transport.get_write_buffer_size():
            self._count_unread()
        if self._writers:
            for number, slow in tuple(self._writers.items()):
                if self._http.queued(number) <= WRITE_AHEAD_BYTES:
                    del self._writers[number]
                    if not slow.done():
                        slow.set_result(None)
        if self._leaving and not self._http.streams and not self._http.sendable:
            self._close()

    def _answer_waits(self, size: int) -> None:
        """Count an answer of a stream that waits for its turn; below zero: no longer.

        Raises:
            Overloaded: there is no room for it.
        """
        if size > 0 and not self._memory.takes_answer(size):
            raise self._memory.refusal(UNREAD)
        self._in_turn += size
        self._unread_bytes += size
        self._answers.used += size

    def _count_unread(self) -> None:
        """Tell the memory what of our answers the peer has not read."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        buffered = transport.get_write_buffer_size()
        unread = buffered + self._http.unsent + self._in_turn
        left = self._handed - buffered
        if not self._unread_bytes or not unread or left - self._got_on >= PROGRESS_BYTES:
            self._got_on, self._got_on_at = left, time.monotonic()
        self._answers.used += unread - self._unread_bytes
        self._unread_bytes = unread

    def senders(self) -> Iterator[Holder]:
        """Return the calls whose requests have begun and not ended, and a frame that has."""
        for call in self._calls.values():
            if call.gives_way():
                yield Holder(call.since, functools.partial(self._crowd_out, call))
        if self._half and self._end is None and time.monotonic() - self._half_at >= STALL_S:
            yield Holder(self._half_at, self._crowd_out_half)

    def readers(self) -> Iterator[Holder]:
        """Return the answers that nobody reads, and the connection if it reads none."""
        for number, (_, since) in self._stuck.items():
            yield Holder(since, functools.partial(self._crowd_out_answer, number))
        if self._unread_bytes:
            yield Holder(self._got_on_at, self._crowd_out_reader)

    def _crowd_out(self, call: _Call) -> None:
        self._break_off(call, self._memory.refusal(STALLED))

    def _crowd_out_half(self) -> None:
        self.send_away(Code.ENHANCE_YOUR_CALM, "a frame began, and others need the memory")

    def _crowd_out_answer(self, number: int) -> None:
        if self._http.queued(number):
            self._memory.refusal(UNREAD)  # its peer does not read that either
            self._http.reset(number, Code.CANCEL)
            self._dropped(number)
            self._count_unread()
            self._flush_soon()

    def _crowd_out_reader(self) -> None:
        self._memory.refusal(UNREAD)
        self.abort()
        for number in tuple(self._calls):
            self._dropped(number, UNAVAILABLE)
        self._answers.drop(self._unread_bytes)  # it is gone with the transport's buffer
        self._unread_bytes = 0

    def _fail(self, data: bytes) -> None:
        """The peer broke the rules: it is told so."""
        if not self._http.begun and b"HTTP/1." in data:
            self._close(_NOT_HTTP_1)
        else:
            self._close(self._http.take(0))

    def _close(self, last: bytes = b"") -> None:
        """Say ``last`` and no more, end every call; close when the peer has everything."""
        transport = self._transport
        if transport is None or transport.is_closing() or self._end is not None:
            return
        for number in tuple(self._calls):
            self._dropped(number, UNAVAILABLE)
        transport.write(last)
        self._arriving.drop(self._half)
        self._half = 0
        self._end = Lingering(transport)
        if self._full:
            transport.resume_reading()

    def go_away(self, *, last: bool) -> None:
        """Say that this connection ends; ``last``: take no calls from here on."""
        self._http.go_away(last=last)
        self._leaving = self._leaving or last
        self._flush_soon()

    def break_off(self) -> None:
        """End every call, then the connection."""
        for call in tuple(self._calls.values()):
            self._break_off(call, Unavailable(STOPPING))
        self._flush()
        self._close(self._http.take(0))

    def send_away(self, code: Code, text: str) -> None:
        """Say why this connection ends, and end it, whatever was asked for on it."""
        self._http.go_away(code, text)
        self._close(self._http.take(0))

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def sweep(self, now: float, idle_s: float = IDLE_S) -> None:
        """End what does not get on; ``now`` as of ``time.monotonic()``."""
        transport = self._transport
        if transport is None:
            return
        unread = transport.get_write_buffer_size()
        if unread != self._unread or not unread:
            self._unread, self._read_at = unread, now
        elif now - self._read_at > UNREAD_S:
            transport.abort()
            return
        self._count_unread()
        if self._end is None:
            self._sweep_connection(transport, now, idle_s)
        if self._end is None:
            self._sweep_calls(now)

    def _sweep_connection(self, transport: asyncio.Transport, now: float, idle_s: float) -> None:
        heard = self._full or self._http.frames != self._frames
        if heard:
            self._frames, self._heard_at, self._pinged = self._http.frames, now, False
        if heard or not self._http.partial:
            self._whole_at = now
        elif now - self._whole_at > ARRIVAL_S or (
            not self._http.frames and now - self._made_at > HANDSHAKE_S
        ):
            self.send_away(Code.ENHANCE_YOUR_CALM, "a frame began and does not arrive")
            return
        if self._pinged and now - self._heard_at > QUIET_S + PONG_S:
            transport.abort()  # there is nobody who could read a reason
            return
        if not self._pinged and now - self._heard_at > QUIET_S:
            self._pinged = True
            self._http.ping()
            self._flush_soon()
        if self._calls or self._http.opened != self._opened:
            self._opened, self._asked_at = self._http.opened, now
        elif now - self._asked_at > idle_s:
            self.go_away(last=True)

    def _sweep_calls(self, now: float) -> None:
        queued = self._http.waiting()
        self._stuck = {
            number: before
            if (before := self._stuck.get(number)) and before[0] == size
            else (size, now)
            for number, size in queued.items()
        }
        for number, (_, since) in self._stuck.items():
            if now - since > UNREAD_S:  # the peer opens no window for it
                self._http.reset(number, Code.CANCEL)
                self._dropped(number)
                self._flush_soon()
        overdue = [
            call
            for call in self._calls.values()
            if not self._full and call.waits_for_peer() and now - call.touched > ARRIVAL_S
        ]
        for call in overdue:
            text = f"nothing of the call's message arrived for {ARRIVAL_S:g} s"
            self._break_off(call, DeadlineExceeded(text))


_TEXT = b"This door speaks gRPC: HTTP/2 from the first byte. REST is behind the HTTP door.\n"
_NOT_HTTP_1 = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_TEXT), _TEXT)
)
