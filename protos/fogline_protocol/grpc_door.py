"""Serves gRPC methods over HTTP/2 by itself, at a fraction of what grpcio takes for a call.

It carries the same ``Methods`` as a server of grpcio does and means the same by them (see
``grpc_calls``). ``http2`` and ``grpc_headers`` know the protocols; here are sockets, tasks, time.

    data_received ─► http2 ─► _Call ─► a task per call ─► http2 ─► one write per turn of the loop

What a stranger can make us keep is bounded per connection: unread requests by the windows that are
granted, unread answers because nothing more is read from who does not read. What does not get on
is ended by the times below.
"""

import asyncio
import contextlib
import fcntl
import math
import os
import socket
import ssl
import sys
import termios
import time
import zlib
from collections import deque
from collections.abc import Collection

from fogline_protocol import grpc_calls, grpc_headers, http2
from fogline_protocol.errors import (
    BadRequest,
    DeadlineExceeded,
    InferenceError,
    Overloaded,
    Unavailable,
    Unsupported,
)
from fogline_protocol.grpc_calls import Admit, Metadata, Method, Methods
from fogline_protocol.grpc_headers import Head
from fogline_protocol.http2 import Data, Request, Reset
from fogline_protocol.http2_frames import Code

GRANTED_MESSAGES = 4  # of the largest size that may arrive side by side on one connection
TURN_BYTES = 1 << 18  # of answers in one write, so that none holds up the others
UNREAD_BYTES = 1 << 18  # of answers that a peer leaves unread; then we stop reading too
WRITE_AHEAD_BYTES = 1 << 18  # the same for one stream; then its answers wait
INFLATE_APART_BYTES = 1 << 12  # a compressed message above it is unpacked in a thread

SWEEP_S = 5.0  # between two looks at what does not get on
HANDSHAKE_S = 10.0  # for TLS, and for the first frame
ARRIVAL_S = 60.0  # for the next byte of a frame or of a request
UNREAD_S = 60.0  # for the peer to take any byte of what waits for it
IDLE_S = 3600.0  # without a call; clients connect again by themselves
SETTLE_S = 0.1  # between the first word of the end and the last, for calls on their way in
GATHERED_BYTES = 1024
MALFORMED = 100  # requests of one connection that are no requests
LINGER_S = 1.0  # for the peer to read why a connection ends
# A method that keeps to the deadline has more to say about it than we, so it is heard first.
DEADLINE_SLACK_S = 0.1

_STOPPING = "the server is shutting down: ask another one, or this one again later"


class GrpcDoor:
    """A server: ``await listen(...)``, ``await stop(grace_s)``. Lives on one event loop."""

    def __init__(
        self,
        methods: Methods,
        *,
        streams: Collection[str],
        max_message_bytes: int,
        admit: Admit | None = None,
    ) -> None:
        """Serve ``methods``; those of ``streams`` are streams of requests, the others unary.

        ``admit`` is asked in the task of every call, before anything else of it is done there;
        what it notes in context variables, its method finds.
        """
        self.methods = methods
        self.streams = frozenset(streams)
        self.max_message_bytes = max_message_bytes
        self.admit = admit
        self.stopping = False
        self.connections: set[_Connection] = set()
        self.all_gone = asyncio.Event()  # no connection is open
        self._servers: list[asyncio.Server] = []
        self._sweeper: asyncio.Task[None] | None = None

    async def listen(
        self, host: str, port: int, *, tls: ssl.SSLContext | None = None, share_port: bool = False
    ) -> int:
        """Open a TCP port on every address of ``host`` and return it; 0: any free one.

        It is shared with nobody, unless it is one of several doors that were started to share it.

        Raises:
            OSError: the port is in use, or the address is not this machine's.
        """
        loop = asyncio.get_running_loop()
        if tls is not None:
            tls.set_alpn_protocols(["h2"])
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for address in dict.fromkeys(str(address[0]) for *_, address in found):
            server = await loop.create_server(
                lambda: _Connection(self),
                address,
                port,
                ssl=tls,
                reuse_port=share_port,
                backlog=1024,
                ssl_handshake_timeout=None if tls is None else HANDSHAKE_S,
                ssl_shutdown_timeout=None if tls is None else LINGER_S,
            )
            self._servers.append(server)
            port = server.sockets[0].getsockname()[1]
        self._keep_sweeping()
        return port

    async def listen_unix(self, path: str | os.PathLike[str]) -> None:
        """Open a Unix socket; the caller has seen to it that the path is free.

        Raises:
            OSError: the path is taken, or this process may not make it.
        """
        loop = asyncio.get_running_loop()
        self._servers.append(
            await loop.create_unix_server(lambda: _Connection(self), path, backlog=1024)
        )
        self._keep_sweeping()

    async def stop(self, grace_s: float | None) -> None:
        """Stop: calls in flight have ``grace_s`` to finish, new ones are refused; None: at once."""
        for server in self._servers:
            server.close()
        self.stopping = True
        self._told()
        if grace_s is not None and self.connections:
            for connection in tuple(self.connections):
                connection.go_away(last=False)
            await asyncio.sleep(SETTLE_S)
            for connection in tuple(self.connections):
                connection.go_away(last=True)
            await self._gone_within(grace_s)
        for connection in tuple(self.connections):
            connection.break_off()
        await self._gone_within(LINGER_S)
        for connection in tuple(self.connections):
            connection.abort()
        await self.all_gone.wait()
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)

    def sweep(self, now: float) -> None:
        """End connections and calls that do not get on; ``now`` as of ``time.monotonic()``."""
        for connection in tuple(self.connections):
            connection.sweep(now)

    def joined(self, connection: "_Connection") -> None:
        """Note a connection that was made."""
        self.connections.add(connection)
        self._told()

    def left(self, connection: "_Connection") -> None:
        """Note a connection that was lost."""
        self.connections.discard(connection)
        self._told()

    def _told(self) -> None:
        if self.connections:
            self.all_gone.clear()
        else:
            self.all_gone.set()

    async def _gone_within(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.all_gone.wait()

    def _keep_sweeping(self) -> None:
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep(), name="grpc-door-sweep")

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep(time.monotonic())


class _Call:
    """One call: what its method may ask of it (``grpc_calls.Context``), and where it stands."""

    __slots__ = (
        "arrival", "deadline", "granted", "have", "head", "method", "number", "task", "timer",
        "touched", "unpacked",
    )  # fmt: skip

    def __init__(self, number: int, head: Head, method: Method) -> None:
        self.number = number  # of its stream
        self.head = head
        self.method = method
        self.deadline: float | None = None  # on ``time.monotonic()``
        self.timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None
        self.arrival: _Message | _Messages | None = None  # what has arrived, if not all at once
        self.have = 0  # bytes of the body so far
        self.granted = 0  # bytes that it may send beyond the window of every stream
        self.unpacked = 0  # bytes of its message, if that arrived compressed
        self.touched = 0.0  # when something of its body arrived

    def time_remaining(self) -> float | None:
        """Return how long the caller still waits, in seconds."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def invocation_metadata(self) -> Metadata:
        """Return what the caller sent along."""
        return self.head.metadata


class _Message:
    """The one message of a unary call, in pieces."""

    __slots__ = ("compressed", "expected", "have", "pieces")

    def __init__(self) -> None:
        self.pieces: list[bytes | bytearray] = []  # without the prefix, once that is known
        self.have = 0  # bytes in them
        self.expected = -1  # bytes without the prefix; -1: not known yet
        self.compressed = False

    def add(self, data: bytes) -> bool:
        """Take bytes; return whether they said how long the message will be."""
        last = self.pieces[-1] if self.pieces else None
        if type(last) is bytearray and len(last) < GATHERED_BYTES:
            last += data
        else:  # small pieces are gathered: an object each would be many times their size
            self.pieces.append(bytearray(data) if len(data) < GATHERED_BYTES else data)
        self.have += len(data)
        if self.expected >= 0 or self.have < 5:
            return False
        start = b"".join(self.pieces)
        self.compressed, self.expected = _prefix(start)
        self.pieces = [start[5:]]
        self.have -= 5
        return True


class _Messages:
    """The messages of a stream, cut when they are asked for: whoever is slow holds its peer up."""

    def __init__(self, connection: "_Connection", call: _Call) -> None:
        self._connection = connection
        self._call = call
        self._buffer = bytearray()
        self._ended = False
        self._more: asyncio.Future[None] | None = None

    def add(self, data: bytes, ended: bool) -> None:
        self._buffer += data
        self._ended = ended
        if self._more is not None and not self._more.done():
            self._more.set_result(None)

    def __aiter__(self) -> "_Messages":
        return self

    async def __anext__(self) -> bytes:
        """Return the next message.

        Raises:
            InferenceError: it is too long, cut short, or cannot be unpacked.
        """
        while True:
            if len(self._buffer) >= 5:
                compressed, length = _prefix(self._buffer)
                self._connection.check_length(length)
                if len(self._buffer) >= 5 + length:
                    break
                if not self._ended:
                    self._connection.make_room(self._call, 5 + length, len(self._buffer))
            if self._ended:
                if self._buffer:
                    raise BadRequest("the stream ended in the middle of a message")
                raise StopAsyncIteration
            self._more = asyncio.get_running_loop().create_future()
            await self._more
        message = bytes(memoryview(self._buffer)[5 : 5 + length])
        del self._buffer[: 5 + length]
        if not self._ended:
            self._connection.taken(self._call, len(self._buffer))
        if not compressed:
            return message
        return await _inflated(message, self._call.head.encoding, self._connection.limit)


class _Connection(asyncio.Protocol):
    """One connection. Owner of its calls and of everything that is written."""

    def __init__(self, door: GrpcDoor) -> None:
        self._door = door
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._http: http2.Connection[Head] = http2.Connection(Head)
        self._calls: dict[int, _Call] = {}
        self._flushing = False
        self._full = False  # the transport holds as much as it should
        self._leaving = False  # no new calls; it closes after the last one
        self._ended = False  # nothing more is said; what arrives is dropped
        self._writers: dict[int, asyncio.Future[None]] = {}  # streams whose reader is slow
        self._granted = 0
        self._unpacked = 0  # bytes of messages that arrived compressed, of calls that go on
        self._malformed = 0
        self._stuck: dict[int, tuple[int, float]] = {}  # bytes that wait for a window, since when
        self._asking: deque[tuple[_Call, int]] = deque()
        # What the sweep compares, and when it last was different.
        self._made_at = self._heard_at = self._asked_at = self._read_at = 0.0
        self._frames = self._opened = self._unread = 0
        self.limit = door.max_message_bytes

    # The transport's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._made_at = self._heard_at = self._asked_at = self._read_at = time.monotonic()
        self._door.joined(self)
        encryption = transport.get_extra_info("ssl_object")
        if encryption is not None and encryption.selected_alpn_protocol() != "h2":
            self._http.go_away(Code.INADEQUATE_SECURITY, "ALPN must agree on h2")
            self._close()
            return
        transport.set_write_buffer_limits(high=UNREAD_BYTES)
        if self._door.stopping:
            self.go_away(last=True)

    def data_received(self, data: bytes) -> None:
        """Read frames, start what they complete."""
        if self._http.closed or self._ended:
            return  # read and dropped, so that the peer gets to read what it was sent
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
                return
        # Nothing is said before the peer has: it may expect something else than HTTP/2.
        if self._http.begun and self._http.sendable:
            self._flush_soon()

    def connection_lost(self, error: Exception | None) -> None:
        """Give up whatever was asked for here."""
        self._transport = None
        for number in tuple(self._calls):
            self._dropped(number)
        self._door.left(self)

    def pause_writing(self) -> None:
        """Stop reading too: what is read would be answered."""
        self._full = True
        self._read_at = time.monotonic()
        if self._transport is not None and not self._ended:
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
            self._http.reset(number, Code.PROTOCOL_ERROR)
            self._malformed += 1
            if self._malformed > MALFORMED:
                self._http.go_away(Code.ENHANCE_YOUR_CALM, "too many malformed requests")
                self._close()
            return
        if head.refusal is not None:
            self._http.end(number, head.refusal)
            return
        method = self._door.methods.get(head.path)
        if method is None:
            text = f"{head.path} is not offered by this server"
            self._http.end(number, grpc_headers.headers_only(Unsupported(text)))
            return
        call = self._calls[number] = _Call(number, head, method)
        call.touched = now
        if head.timeout_s is not None:
            call.deadline = now + head.timeout_s
            after_s = head.timeout_s + DEADLINE_SLACK_S
            call.timer = self._loop.call_later(after_s, self._out_of_time, call)
        if head.path in self._door.streams:
            call.arrival = messages = _Messages(self, call)
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
            self._http.reset(number, Code.PROTOCOL_ERROR)  # RFC 9113, 8.1.1
            self._dropped(number)
            return
        arrival = call.arrival
        if arrival is None:
            length = size - 5
            if (
                ended
                and 0 <= length <= self.limit
                and data[0] == 0
                and length == int.from_bytes(data[1:5], "big")
            ):  # the usual case: a whole message at once
                call.task = self._loop.create_task(self._unary(call, data[5:], False))
                return
            arrival = call.arrival = _Message()
        call.touched = now
        if type(arrival) is _Messages:
            arrival.add(data, ended)
        else:
            try:
                self._piece(call, arrival, data, ended)  # type: ignore[arg-type]
            except InferenceError as error:
                self._refuse(call, error)

    def _piece(self, call: _Call, message: _Message, data: bytes, ended: bool) -> None:
        """Take a piece of a unary call's message, and start the call with the last one.

        Raises:
            InferenceError: it is no message, or too long a one.
        """
        if message.add(data):
            self.check_length(message.expected)
            if not ended:
                self.make_room(call, 5 + message.expected, call.have)
        if 0 <= message.expected < message.have:
            raise BadRequest("a unary call has one message, and more than that arrived")
        if ended:
            if message.have != message.expected:
                raise BadRequest("the call ended in the middle of its message")
            data = b"".join(message.pieces)
            message.pieces.clear()
            call.task = self._loop.create_task(self._unary(call, data, message.compressed))

    def check_length(self, length: int) -> None:
        """Refuse a message by its length, before it arrives.

        Raises:
            Overloaded: it is too long, and will be the next time.
        """
        if length > self.limit:
            raise Overloaded(
                f"Received message larger than max ({length} vs. {self.limit} bytes): send less at "
                "once, or ask the operator for a higher limit",
                retry_after_s=math.inf,
            )

    def make_room(self, call: _Call, needed: int, have: int) -> None:
        """See that ``needed`` bytes can arrive of which ``have`` have, in turn with other calls."""
        more = needed - have - self._http.credit(call.number)
        if more <= 0:
            return
        if call.granted:  # it asked before, for the same message
            return
        call.granted = more
        if not self._granted or self._granted + more <= GRANTED_MESSAGES * self.limit:
            self._grant(call, more)
        else:
            self._asking.append((call, more))

    def taken(self, call: _Call, have: int) -> None:
        """Let the peer send as much as was taken of a stream, ``have`` being what is left of it."""
        if call.granted:
            self._give_back(call)
        more = http2.STREAM_WINDOW - have - self._http.credit(call.number)
        if more >= http2.STREAM_WINDOW // 4:
            self._http.grant(call.number, more)
            self._flush_soon()

    def _grant(self, call: _Call, more: int) -> None:
        self._granted += more
        call.touched = time.monotonic()
        self._http.grant(call.number, more)
        self._flush_soon()

    def _give_back(self, call: _Call) -> None:
        """What was granted to a call has arrived and left, or will not: others may have it."""
        asked = (call, call.granted)
        if asked in self._asking:
            self._asking.remove(asked)
        else:
            self._granted -= call.granted
        call.granted = 0
        while self._asking:
            waiting, more = self._asking[0]
            if self._granted and self._granted + more > GRANTED_MESSAGES * self.limit:
                break
            self._asking.popleft()
            self._grant(waiting, more)

    # Calls

    async def _unary(self, call: _Call, message: bytes, compressed: bool) -> None:
        try:
            if self._door.admit is None and not compressed:
                method = call.method
            else:
                method = self._prepared(call, compressed)
            answer = await grpc_calls.translating(call.head.path, method, message, call)
            self._check_answer(answer)
        except InferenceError as error:
            self._refuse(call, error)
        except asyncio.CancelledError:
            # Somebody else's, if the call is still there: its caller must not wait for ever.
            self._refuse(call, Unavailable("the call was given up by the server"))
            raise
        else:
            if self._over(call):
                self._http.respond(
                    call.number, grpc_headers.ANSWER, grpc_headers.DONE,
                    b"\0" + len(answer).to_bytes(4, "big"), answer,
                )  # fmt: skip
                self._flush_soon()

    def _prepared(self, call: _Call, compressed: bool) -> Method:
        """Return the method of a call with what comes before it."""

        async def prepared(message: bytes, context: grpc_calls.Context) -> bytes:
            if self._door.admit is not None:
                await self._door.admit(call.head.path, call.head.metadata)
            if compressed:
                message = await _inflated(message, call.head.encoding, self.limit)
                call.unpacked = len(message)
                self._unpacked += call.unpacked
                if self._unpacked > GRANTED_MESSAGES * self.limit:
                    raise Overloaded(
                        f"{self._unpacked} bytes of compressed messages are being answered on this "
                        "connection: come back later",
                        retry_after_s=1.0,
                    )
            return await call.method(message, context)

        return prepared

    async def _stream(self, call: _Call, messages: _Messages) -> None:
        async def write(answer: bytes) -> None:
            self._check_answer(answer)
            if not self._http.answering(call.number):
                self._http.open(call.number, grpc_headers.ANSWER)
            self._http.send(call.number, b"\0" + len(answer).to_bytes(4, "big"), answer)
            self._flush_soon()
            if self._http.queued(call.number) > WRITE_AHEAD_BYTES:
                slow = self._writers[call.number] = self._loop.create_future()
                await slow

        async def admitted(_message: bytes, _context: grpc_calls.Context) -> bytes:
            if self._door.admit is not None:
                await self._door.admit(call.head.path, call.head.metadata)
            return b""

        try:
            await grpc_calls.translating(call.head.path, admitted, b"", call)
            await grpc_calls.answer_stream(call.head.path, call.method, messages, call, write)
        except InferenceError as error:
            self._refuse(call, error)
        except asyncio.CancelledError:
            self._refuse(call, Unavailable("the call was given up by the server"))
            raise
        else:
            if self._over(call):
                if not self._http.answering(call.number):
                    self._http.open(call.number, grpc_headers.ANSWER)
                self._http.end(call.number, grpc_headers.DONE)
                self._flush_soon()

    def _check_answer(self, answer: bytes) -> None:
        if len(answer) > self.limit:
            raise Overloaded(
                f"the answer has {len(answer)} bytes, at most {self.limit} are sent at once: ask "
                "for fewer outputs or rows",
                retry_after_s=math.inf,
            )

    def _over(self, call: _Call) -> bool:
        """Forget a call and return True, unless it was forgotten before."""
        if self._calls.pop(call.number, None) is None:
            return False
        if call.timer is not None:
            call.timer.cancel()
        if call.granted:
            self._give_back(call)
        self._unpacked -= call.unpacked
        call.unpacked = 0
        return True

    def _refuse(self, call: _Call, error: InferenceError) -> None:
        """End a call with a status, unless it has ended."""
        if not self._over(call):
            return
        if self._http.answering(call.number):
            self._http.drop(call.number)
            self._http.end(call.number, grpc_headers.trailers(error))
        else:
            self._http.end(call.number, grpc_headers.headers_only(error))
        self._flush_soon()

    def _dropped(self, number: int) -> None:
        """Give a call up that nobody waits for any more."""
        if (slow := self._writers.pop(number, None)) is not None:
            slow.cancel()
        call = self._calls.get(number)
        if call is not None and self._over(call) and call.task is not None:
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
        if transport is None or transport.is_closing() or self._http.closed or self._ended:
            return
        while not self._full and self._http.sendable:
            transport.write(self._http.take(TURN_BYTES))
        if self._writers:
            for number, slow in tuple(self._writers.items()):
                if self._http.queued(number) <= WRITE_AHEAD_BYTES:
                    del self._writers[number]
                    if not slow.done():
                        slow.set_result(None)
        if self._leaving and not self._http.streams and not self._http.sendable:
            self._close()

    def _fail(self, data: bytes) -> None:
        """The peer broke the rules: it is told so, and every call of its ends."""
        for number in tuple(self._calls):
            self._dropped(number)
        if not self._http.begun and self._transport is not None and b"HTTP/1." in data:
            self._transport.write(_NOT_HTTP_1)
        elif self._transport is not None:
            self._transport.write(self._http.take(0))
        self._close()

    def _close(self) -> None:
        """Say no more, and close when what was said has arrived.

        A socket that is closed while its peer still sends answers with a reset, which takes along
        what the peer has not read yet. So it goes on reading until the peer has everything.
        """
        transport = self._transport
        if transport is None or transport.is_closing() or self._ended:
            return
        if self._http.sendable and not self._full and not self._http.closed:
            transport.write(self._http.take(TURN_BYTES))
        if not transport.can_write_eof():  # TLS, which says goodbye by itself
            transport.close()
            return
        self._ended = True
        if self._full:
            transport.resume_reading()
        with contextlib.suppress(OSError):  # the peer is gone already
            transport.write_eof()
        self._let_go(self._loop.time() + UNREAD_S)

    def _let_go(self, until: float) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._loop.time() < until and (
            transport.get_write_buffer_size() or _unacknowledged(transport)
        ):
            self._loop.call_later(LINGER_S / 20, self._let_go, until)
        else:
            # The peer has all of it; a moment for what it is sending meanwhile.
            self._loop.call_later(LINGER_S, transport.close)

    def go_away(self, *, last: bool) -> None:
        """Say that this connection ends; ``last``: take no calls from here on."""
        self._http.go_away(last=last)
        self._leaving = self._leaving or last
        self._flush_soon()

    def break_off(self) -> None:
        """End every call, then the connection."""
        for call in tuple(self._calls.values()):
            self._break_off(call, Unavailable(_STOPPING))
        self._flush()
        self._close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def sweep(self, now: float) -> None:
        """End what does not get on."""
        transport = self._transport
        if transport is None:
            return
        if self._http.frames != self._frames or not self._http.partial or self._full:
            self._frames, self._heard_at = self._http.frames, now
        elif now - self._heard_at > ARRIVAL_S or (
            not self._http.frames and now - self._made_at > HANDSHAKE_S
        ):
            self._http.go_away(Code.ENHANCE_YOUR_CALM, "a frame began and does not arrive")
            self._close()
            return
        unread = transport.get_write_buffer_size()
        if unread != self._unread or not unread:
            self._unread, self._read_at = unread, now
        elif now - self._read_at > UNREAD_S:
            transport.abort()
            return
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
        waiting = {id(call) for call, _ in self._asking}  # for us, not for their peer
        for call in tuple(self._calls.values()):
            # A stream may rest between its messages, not in the middle of a large one.
            resting = call.task is not None and not call.granted
            arriving = not resting and id(call) not in waiting and not self._full
            if arriving and now - call.touched > ARRIVAL_S:
                text = f"nothing of the call's message arrived for {ARRIVAL_S:g} s"
                self._break_off(call, DeadlineExceeded(text))
        if self._calls or self._http.opened != self._opened:
            self._opened, self._asked_at = self._http.opened, now
        elif now - self._asked_at > IDLE_S:
            self.go_away(last=True)


_TEXT = b"This door speaks gRPC: HTTP/2 from the first byte. REST is behind the HTTP door.\n"
_NOT_HTTP_1 = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_TEXT), _TEXT)
)


def _unacknowledged(transport: asyncio.Transport) -> int:
    """Return how many bytes the kernel holds for the peer (Linux: TIOCOUTQ)."""
    found = transport.get_extra_info("socket")
    if found is None or found.fileno() < 0:
        return 0
    try:
        return int.from_bytes(
            fcntl.ioctl(found.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder
        )
    except OSError:
        return 0


def _prefix(data: bytes | bytearray) -> tuple[bool, int]:
    """Return whether a message is compressed, and its length.

    Raises:
        BadRequest: this is not the beginning of a message.
    """
    if data[0] > 1:
        raise BadRequest(
            f"a message begins with 0 or 1 and its length in 4 bytes, got {bytes(data[:5])!r}"
        )
    return bool(data[0]), int.from_bytes(data[1:5], "big")


async def _inflated(message: bytes, encoding: str, limit: int) -> bytes:
    """Return a message unpacked.

    Raises:
        InferenceError: it cannot be, or is longer than ``limit`` bytes then.
    """
    if encoding not in grpc_headers.ENCODINGS:
        raise BadRequest("a message is marked as compressed, and grpc-encoding does not say how")
    if len(message) <= INFLATE_APART_BYTES:
        return _inflate(message, encoding, limit)
    return await asyncio.to_thread(_inflate, message, encoding, limit)


def _inflate(message: bytes, encoding: str, limit: int) -> bytes:
    unpacker = zlib.decompressobj(grpc_headers.ENCODINGS[encoding])
    try:
        found = unpacker.decompress(message, limit + 1)
    except zlib.error as error:
        raise BadRequest(f"a message is not what {encoding} makes: {error}") from None
    if len(found) > limit:
        raise Overloaded(
            f"Received message larger than max ({limit} bytes) once it was unpacked: send less at "
            "once",
            retry_after_s=math.inf,
        )
    if not unpacker.eof or unpacker.unused_data:
        raise BadRequest(f"a message is not what {encoding} makes: it ends early or goes on")
    return found
