"""One server side of an HTTP/2 connection: bytes in, events and bytes out. No I/O, no clock.

    bytes ─► receive() ─► Request, Data, Reset, Closed
    respond(), open(), send(), end(), reset(), grant(), go_away() ─► take() ─► bytes

Whatever the peer does, one of three things follows: an event, the end of one stream
(``RST_STREAM``), or the end of the connection (``GOAWAY``, then ``Closed``). However its bytes are
cut into pieces, the same follows.

What a peer can make us keep is bounded: headers by ``MAX_BLOCK_BYTES``, what arrives by the windows
that we grant, answers by ``MAX_STREAMS``, which count until their last byte was taken. What it can
make us do without asking for anything is bounded by ``_Budget``; time comes in as a number. Frames
as such are in ``http2_frames``.

Source: RFC 9113 (HTTP/2). Priorities are ignored, as its section 5.3.2 allows.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from fogline_protocol.header_blocks import BadBlock, BlockReader, Headers, TooLong
from fogline_protocol.http2_frames import (
    ACK,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    HEADER,
    LARGEST,
    LONG,
    PADDED,
    PEER_FRAME_BYTES,
    PREFACE,
    PRIORITY,
    SETTING,
    Block,
    Code,
    Fault,
    Kind,
    Setting,
    bare,
    expect,
    frame,
    on_connection,
)

Head = TypeVar("Head")

MAX_STREAMS = 512  # at a time; callers of grpcio that want more wait on their side
STREAM_WINDOW = 1 << 18  # of a stream that was granted nothing: a picture fits
CONNECTION_WINDOW = 1 << 24  # refilled as bytes arrive: it bounds what is on its way, no more
MAX_FRAME_BYTES = 1 << 16  # that we take
MAX_HEADER_LIST_BYTES = 16 << 10  # that we promise to take
MAX_BLOCK_BYTES = 2 * MAX_HEADER_LIST_BYTES  # beyond it we do not even read on to refuse it
MAX_CONTINUATIONS = 64  # of one block (CVE-2024-27316)
MAX_SETTINGS = 32  # in one frame, as nghttp2 has it
FREE_UPDATES = 10  # of windows, for every request that came and every frame of an answer
DIRECT_BYTES = PEER_FRAME_BYTES  # an answer up to it leaves at once, if the windows have room

# Numbers of what arrives most often, without the detour over an enum.
_DATA, _HEADERS = int(Kind.DATA), int(Kind.HEADERS)


class Request(NamedTuple, Generic[Head]):
    """A stream was opened; ``ended``: nothing more will come on it."""

    stream: int
    head: Head
    ended: bool


class Data(NamedTuple):
    """Bytes of a stream."""

    stream: int
    data: bytes
    ended: bool


class Reset(NamedTuple):
    """A stream is gone: the peer broke it off, or broke a rule of the protocol on it."""

    stream: int
    code: int


class Closed(NamedTuple):
    """The connection is over; nothing more will happen on it."""

    code: int
    text: str


Event = Request[Head] | Data | Reset | Closed


class _StreamFault(Exception):
    """The peer broke a rule, and one stream ends by it."""

    def __init__(self, stream: int, code: Code) -> None:
        super().__init__(stream, code)
        self.stream, self.code = stream, code


class _Stream:
    __slots__ = ("credit", "ended", "in_turn", "opened", "queue", "queued", "trailers", "window")

    def __init__(self, window: int, ended: bool) -> None:
        self.window = window  # bytes that we may still send
        self.credit = STREAM_WINDOW  # bytes that the peer may still send
        self.ended = ended  # the peer sends no more
        self.opened = False  # our headers are on their way
        self.in_turn = False  # it is among the streams that could send
        self.queue: deque[memoryview] | None = None  # what waits for a window, or for its turn
        self.queued = 0  # bytes in it
        self.trailers: Block | None = None  # what follows it


@dataclass(slots=True)
class _Budget:
    """How often a peer may do what costs us work and is no request: a bucket of tokens."""

    burst: float
    per_s: float
    what: str
    left: float = -1.0
    at: float = 0.0

    def spend(self, now: float) -> None:
        if self.left < 0:
            self.left, self.at = self.burst, now
        self.left = min(self.burst, self.left + (now - self.at) * self.per_s)
        self.at = now
        if self.left < 1:
            raise Fault(Code.ENHANCE_YOUR_CALM, f"too many {self.what}")
        self.left -= 1


class Connection(Generic[Head]):
    """One connection; whoever owns it passes bytes in, and takes and writes what is to be sent."""

    def __init__(self, interpret: Callable[[Headers], Head]) -> None:
        """Begin; ``interpret`` makes of a request's headers what ``Request.head`` is to be."""
        self._blocks = BlockReader(interpret, MAX_BLOCK_BYTES)
        self.received = bytearray()  # of a frame that has begun and not ended
        self._needed = len(PREFACE)  # bytes before anything can be read
        self._begun = False  # the preface was there
        self._settled = False  # so was the first SETTINGS
        self.closed = False
        self.frames = 0  # that arrived
        self.queued_bytes = 0  # of answers that wait for a window, or for their turn
        self._streams: dict[int, _Stream] = {}
        self._last = 0  # the highest stream that the peer has opened
        self._refuse_after = LARGEST  # streams above it are not for us any more
        self._block: tuple[int, int, bytearray, int] | None = None  # stream, flags, so far, frames
        # Sending.
        self._out: list[bytes | memoryview] = []
        self._window = DEFAULT_WINDOW
        self._stream_window = DEFAULT_WINDOW  # of new streams
        self._frame_bytes = PEER_FRAME_BYTES
        self._ready: deque[int] = deque()  # streams that could send, in turn
        # Receiving.
        self._unsaid = 0  # bytes that arrived, of which the peer was not told
        # A call that is broken off costs us some 50 us, so this is 3 % of a core at most; callers
        # with short deadlines break off many. The other one is far above what pings take.
        self._resets = _Budget(2000, 500, "streams broken off")
        self._nuisances = _Budget(10_000, 1000, "frames that ask for nothing")
        # One may change the window of every open stream, which costs as much as a call.
        self._changes = _Budget(1000, 50, "changes of settings")
        self._updates = FREE_UPDATES  # of windows that the peer may still send for nothing
        settings = {
            Setting.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
            Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            Setting.MAX_FRAME_SIZE: MAX_FRAME_BYTES,
            Setting.MAX_HEADER_LIST_SIZE: MAX_HEADER_LIST_BYTES,
        }
        payload = b"".join(SETTING.pack(key, value) for key, value in settings.items())
        self._out.append(frame(Kind.SETTINGS, 0, 0, payload))
        more = LONG.pack(CONNECTION_WINDOW - DEFAULT_WINDOW)
        self._out.append(frame(Kind.WINDOW_UPDATE, 0, 0, more))

    # What arrives

    def receive(self, data: bytes, now: float) -> list[Event[Head]]:
        """Return what ``data`` means; ``now`` is in seconds of any clock that never goes back."""
        events: list[Event[Head]] = []
        if self.closed:
            return events
        begun, at = b"", 0
        if self.received or not self._begun:
            # Of a frame whose length is known only the rest is put to it: what follows is read
            # where it lies.
            known = self._begun and self._needed > 9
            at = self._needed - len(self.received) if known else len(data)
            self.received += data[:at]
            # Preface or not is clear before it is whole.
            good = self._begun or PREFACE.startswith(self.received)
            if len(self.received) < self._needed and good:
                return events
            begun = bytes(self.received)
            self.received.clear()
        try:
            if begun:
                self._read(begun, 0, now, events)
            self._read(data, at, now, events)
        except Fault as fault:
            self._fail(fault.code, str(fault), events)
        return events

    def _read(self, data: bytes, at: int, now: float, events: list[Event[Head]]) -> None:
        """Read the frames that lie in ``data`` from ``at`` on, and keep what is left."""
        end = len(data)
        if not self._begun:
            if not data.startswith(PREFACE):
                raise Fault(Code.PROTOCOL_ERROR, "this is not HTTP/2: its preface is missing")
            self._begun, at = True, len(PREFACE)
        while end - at >= 9:
            high, low, kind, flags, stream = HEADER.unpack_from(data, at)
            length = high << 8 | low
            if length > MAX_FRAME_BYTES:
                raise Fault(Code.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            after = at + 9 + length
            if after > end:
                break
            payload = data[at + 9 : after]
            at = after
            self.frames += 1
            try:
                self._frame(kind, flags, stream & LARGEST, payload, now, events)
            except _StreamFault as fault:
                self._resets.spend(now)
                self._break_off(fault.stream, fault.code, events)
        if at < end:
            self.received += data[at:]
            self._needed = 9 if end - at < 9 else 9 + (high << 8 | low)

    @property
    def partial(self) -> bool:
        """Whether a frame or a header block has begun and not ended, the preface included."""
        return bool(self.received) or self._block is not None or not self._settled

    @property
    def unsent(self) -> int:
        """How many bytes wait to be taken: for a window, for their turn, or for who takes them."""
        return self.queued_bytes + sum(map(len, self._out))

    @property
    def begun(self) -> bool:
        """Whether the peer speaks HTTP/2."""
        return self._begun

    @property
    def streams(self) -> int:
        """How many streams are open."""
        return len(self._streams)

    @property
    def opened(self) -> int:
        """The highest stream that the peer has opened: it grows with every request."""
        return self._last

    def _frame(
        self, kind: int, flags: int, stream: int, payload: bytes, now: float,
        events: list[Event[Head]],
    ) -> None:  # fmt: skip
        if self._block is not None and (kind != Kind.CONTINUATION or self._block[0] != stream):
            raise Fault(Code.PROTOCOL_ERROR, "a header block is broken off by another frame")
        if not self._settled:
            if kind != Kind.SETTINGS or flags & ACK:
                raise Fault(Code.PROTOCOL_ERROR, "the first frame must be SETTINGS")
            self._settled = True
        if kind == _DATA:
            self._data(flags, stream, payload, now, events)
        elif kind == _HEADERS:
            if not stream:
                raise Fault(Code.PROTOCOL_ERROR, "HEADERS without a stream")
            if flags & (PADDED | PRIORITY):
                payload = bare(flags, payload)
            if flags & END_HEADERS:
                self._headers(flags, stream, payload, now, events)
            else:
                self._block = (stream, flags, bytearray(payload), 0)
        else:
            self._seldom(kind, flags, stream, payload, now, events)

    def _data(
        self, flags: int, stream: int, payload: bytes, now: float, events: list[Event[Head]]
    ) -> None:
        size = len(payload)
        # The windows of streams bound what arrives; the connection's is refilled long before it ends.
        self._unsaid += size
        if self._unsaid >= CONNECTION_WINDOW // 4:
            self._out.append(frame(Kind.WINDOW_UPDATE, 0, 0, LONG.pack(self._unsaid)))
            self._unsaid = 0
        found = self._streams.get(stream)
        if found is None:
            if stream > self._last or not stream % 2:
                raise Fault(Code.PROTOCOL_ERROR, f"DATA on stream {stream}, which is idle")
            self._nuisances.spend(now)  # it may have crossed our end of the stream
            return
        if found.ended:
            raise _StreamFault(stream, Code.STREAM_CLOSED)
        found.credit -= size
        if found.credit < 0:
            raise _StreamFault(stream, Code.FLOW_CONTROL_ERROR)
        if flags & PADDED:
            payload = bare(PADDED, payload)
            self.grant(stream, size - len(payload))
        ended = bool(flags & END_STREAM)
        if ended:
            found.ended = True
        elif not payload:
            self._nuisances.spend(now)
            return
        events.append(Data(stream, payload, ended))

    def _headers(
        self, flags: int, stream: int, block: bytes, now: float, events: list[Event[Head]]
    ) -> None:
        if len(block) > MAX_BLOCK_BYTES:
            raise Fault(Code.ENHANCE_YOUR_CALM, f"a header block of {len(block)} bytes")
        try:
            head = self._blocks.read(block)
        except TooLong as error:
            raise Fault(Code.ENHANCE_YOUR_CALM, str(error)) from None
        except BadBlock as error:
            raise Fault(Code.COMPRESSION_ERROR, str(error)) from None
        ended = bool(flags & END_STREAM)
        if stream <= self._last or not stream % 2:
            if not stream % 2:
                raise Fault(Code.PROTOCOL_ERROR, f"stream {stream} is not a client's to open")
            found = self._streams.get(stream)
            if found is None:  # trailers may have crossed our end of the stream
                self._nuisances.spend(now)
            elif found.ended:
                raise _StreamFault(stream, Code.STREAM_CLOSED)
            elif not ended:
                raise _StreamFault(stream, Code.PROTOCOL_ERROR)
            else:
                found.ended = True
                events.append(Data(stream, b"", True))
            return
        self._last = stream
        if stream > self._refuse_after:
            self._nuisances.spend(now)
            return  # GOAWAY told the peer that it may ask elsewhere
        if len(self._streams) >= MAX_STREAMS:
            raise _StreamFault(stream, Code.REFUSED_STREAM)
        self._streams[stream] = _Stream(self._stream_window, ended)
        self._updates += FREE_UPDATES
        events.append(Request(stream, head, ended))

    def _seldom(
        self, kind: int, flags: int, stream: int, payload: bytes, now: float,
        events: list[Event[Head]],
    ) -> None:  # fmt: skip
        match kind:
            case Kind.CONTINUATION:
                self._continuation(flags, stream, payload, now, events)
            case Kind.WINDOW_UPDATE:
                # Who reads much sends many; who was sent nothing has no reason to.
                if self._updates:
                    self._updates -= 1
                else:
                    self._nuisances.spend(now)
                self._window_update(stream, payload)
            case Kind.RST_STREAM:
                expect(len(payload) == 4, "RST_STREAM")
                self._known_or_past(stream, "RST_STREAM")
                self._resets.spend(now)
                if self._removed(stream):
                    events.append(Reset(stream, LONG.unpack(payload)[0]))
            case Kind.SETTINGS:
                (self._nuisances if flags & ACK else self._changes).spend(now)
                self._settings(flags, stream, payload)
            case Kind.PING:
                expect(len(payload) == 8, "PING")
                on_connection(stream, "PING")
                self._nuisances.spend(now)
                if not flags & ACK:
                    self._out.append(frame(Kind.PING, ACK, 0, payload))
            case Kind.PRIORITY:
                if not stream:
                    raise Fault(Code.PROTOCOL_ERROR, "PRIORITY without a stream")
                self._nuisances.spend(now)
                if len(payload) != 5:
                    self._known_or_past(stream, "PRIORITY of a wrong length")
                    raise _StreamFault(stream, Code.FRAME_SIZE_ERROR)
            case Kind.GOAWAY:
                on_connection(stream, "GOAWAY")
                expect(len(payload) >= 8, "GOAWAY")
                self._nuisances.spend(now)
            case Kind.PUSH_PROMISE:
                raise Fault(Code.PROTOCOL_ERROR, "a client cannot push")
            case _:  # extensions are ignored (RFC 9113, 5.5)
                self._nuisances.spend(now)

    def _continuation(
        self, flags: int, stream: int, payload: bytes, now: float, events: list[Event[Head]]
    ) -> None:
        if self._block is None:
            raise Fault(Code.PROTOCOL_ERROR, "CONTINUATION of nothing")
        _, first_flags, block, count = self._block
        block += payload
        if len(block) > MAX_BLOCK_BYTES or count >= MAX_CONTINUATIONS:
            raise Fault(
                Code.ENHANCE_YOUR_CALM,
                f"a header block of {len(block)} bytes in {count + 2} frames, and no end",
            )
        if flags & END_HEADERS:
            self._block = None
            self._headers(first_flags, stream, bytes(block), now, events)
        else:
            self._block = (stream, first_flags, block, count + 1)

    def _window_update(self, stream: int, payload: bytes) -> None:
        expect(len(payload) == 4, "WINDOW_UPDATE")
        more = LONG.unpack(payload)[0] & LARGEST
        if not stream:
            if not more:
                raise Fault(Code.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
            self._window += more
            if self._window > LARGEST:
                raise Fault(Code.FLOW_CONTROL_ERROR, "the connection's window overflows")
            return
        self._known_or_past(stream, "WINDOW_UPDATE")
        found = self._streams.get(stream)
        if found is None:
            return
        if not more:
            raise _StreamFault(stream, Code.PROTOCOL_ERROR)
        self._widen(stream, found, more)
        if found.window > LARGEST:
            raise _StreamFault(stream, Code.FLOW_CONTROL_ERROR)

    def _widen(self, stream: int, found: _Stream, more: int) -> None:
        found.window += more
        if found.queue and found.window > 0:
            self._take_turn(stream, found)

    def _take_turn(self, stream: int, found: _Stream) -> None:
        if not found.in_turn:
            found.in_turn = True
            self._ready.append(stream)
            if len(self._ready) > 2 * MAX_STREAMS:  # streams that ended while no window was open
                self._ready = deque(number for number in self._ready if number in self._streams)

    def _settings(self, flags: int, stream: int, payload: bytes) -> None:
        on_connection(stream, "SETTINGS")
        if flags & ACK:
            expect(not payload, "SETTINGS with ACK")
            return
        expect(len(payload) % 6 == 0, "SETTINGS")
        if len(payload) > 6 * MAX_SETTINGS:
            raise Fault(Code.ENHANCE_YOUR_CALM, f"{len(payload) // 6} settings in one frame")
        for key, value in dict(SETTING.iter_unpack(payload)).items():  # the last of each holds
            if key == Setting.INITIAL_WINDOW_SIZE:
                if value > LARGEST:
                    raise Fault(Code.FLOW_CONTROL_ERROR, f"an initial window of {value} bytes")
                more, self._stream_window = value - self._stream_window, value
                for number, found in self._streams.items():
                    self._widen(number, found, more)
                    if found.window > LARGEST:
                        raise Fault(Code.FLOW_CONTROL_ERROR, f"the window of {number} overflows")
            elif key == Setting.MAX_FRAME_SIZE:
                if not PEER_FRAME_BYTES <= value < 1 << 24:
                    raise Fault(Code.PROTOCOL_ERROR, f"a maximum frame size of {value} bytes")
                self._frame_bytes = min(value, MAX_FRAME_BYTES)
            elif key == Setting.ENABLE_PUSH and value > 1:
                raise Fault(Code.PROTOCOL_ERROR, f"ENABLE_PUSH is 0 or 1, got {value}")
        self._out.append(frame(Kind.SETTINGS, ACK, 0))

    def _known_or_past(self, stream: int, what: str) -> None:
        if not stream:
            raise Fault(Code.PROTOCOL_ERROR, f"{what} without a stream")
        if stream > self._last or not stream % 2:
            raise Fault(Code.PROTOCOL_ERROR, f"{what} on stream {stream}, which is idle")

    def _break_off(self, stream: int, code: Code, events: list[Event[Head]]) -> None:
        if self._removed(stream):
            events.append(Reset(stream, code))
        self._out.append(frame(Kind.RST_STREAM, 0, stream, LONG.pack(code)))

    def _removed(self, stream: int) -> bool:
        """Forget a stream with whatever waits of its answer, and return whether it was there."""
        found = self._streams.pop(stream, None)
        if found is None:
            return False
        self.queued_bytes -= found.queued
        return True

    def _fail(self, code: Code, text: str, events: list[Event[Head]]) -> None:
        self.go_away(code, text)
        self.closed = True
        self._streams.clear()
        self.queued_bytes = 0
        self.received.clear()
        events.append(Closed(code, text))

    # What leaves

    def respond(self, stream: int, head: Block, trailers: Block, *parts: bytes) -> None:
        """Send a whole answer: headers, the bytes of ``parts``, trailers."""
        found = self._streams.get(stream)
        if found is None:
            return
        size = sum(map(len, parts))
        if not (size <= DIRECT_BYTES and size <= found.window and size <= self._window):
            self.open(stream, head)
            self.send(stream, *parts)
            self.end(stream, trailers)
            return
        found.window -= size
        self._window -= size
        number = stream.to_bytes(4, "big")
        self._out.append(
            b"".join(
                (
                    head.opening, number, head.payload,
                    size.to_bytes(3, "big"), b"\0\0", number, *parts,
                    trailers.closing, number, trailers.payload,
                )
            )
        )  # fmt: skip
        self._finish(stream, found)

    def open(self, stream: int, head: Block) -> None:
        """Send the headers of an answer."""
        found = self._streams.get(stream)
        if found is not None:
            found.opened = True
            self._out.append(head.opening + stream.to_bytes(4, "big") + head.payload)

    def send(self, stream: int, *parts: bytes) -> None:
        """Send bytes of an answer, as windows and other answers allow."""
        found = self._streams.get(stream)
        if found is None:
            return
        if found.queue is None:
            found.queue = deque()
        for part in parts:
            if part:
                found.queue.append(memoryview(part))
                found.queued += len(part)
                self.queued_bytes += len(part)
        if found.queue and found.window > 0:
            self._take_turn(stream, found)

    def end(self, stream: int, trailers: Block) -> None:
        """End an answer after what was sent: with trailers, or with headers that are all."""
        found = self._streams.get(stream)
        if found is None:
            return
        found.trailers = trailers
        if not found.queue:
            self._out.append(trailers.closing + stream.to_bytes(4, "big") + trailers.payload)
            self._finish(stream, found)

    def queued(self, stream: int) -> int:
        """Return how many bytes of an answer wait."""
        found = self._streams.get(stream)
        return 0 if found is None else found.queued

    def answering(self, stream: int) -> bool:
        """Return whether the headers of an answer are on their way already."""
        found = self._streams.get(stream)
        return found is not None and found.opened

    def drop(self, stream: int) -> None:
        """Forget what waits of an answer: something else is to be said."""
        found = self._streams.get(stream)
        if found is not None and found.queue:
            found.queue.clear()
            self.queued_bytes -= found.queued
            found.queued = 0

    def reset(self, stream: int, code: Code) -> None:
        """Break a stream off."""
        if self._removed(stream):
            self._out.append(frame(Kind.RST_STREAM, 0, stream, LONG.pack(code)))

    def credit(self, stream: int) -> int:
        """Return how many bytes the peer may still send on a stream."""
        found = self._streams.get(stream)
        return 0 if found is None else found.credit

    def grant(self, stream: int, more: int) -> None:
        """Let the peer send ``more`` bytes on a stream, beside what it may anyway."""
        found = self._streams.get(stream)
        if found is not None and not found.ended and more > 0:
            found.credit += more
            self._out.append(frame(Kind.WINDOW_UPDATE, 0, stream, LONG.pack(more)))

    def go_away(self, code: Code = Code.NO_ERROR, text: str = "", *, last: bool = True) -> None:
        """Announce the end; ``last``: no stream that comes from here on is answered."""
        if last:
            self._refuse_after = min(self._refuse_after, self._last)
        number = self._refuse_after if last else LARGEST
        payload = LONG.pack(number) + LONG.pack(code) + text.encode()[:1024]
        self._out.append(frame(Kind.GOAWAY, 0, 0, payload))

    def ping(self) -> None:
        """Ask whether the peer is there: any frame of it says so."""
        self._out.append(frame(Kind.PING, 0, 0, b"fogline?"))

    @property
    def sendable(self) -> bool:
        """Whether ``take`` would return something."""
        return bool(self._out) or (bool(self._ready) and self._window > 0)

    def waiting(self) -> dict[int, int]:
        """Return the bytes of answers that wait for a window or their turn, by stream."""
        return {number: s.queued for number, s in self._streams.items() if s.queue}

    def take(self, limit: int) -> bytes:
        """Return what is to be written now: all control, and about ``limit`` bytes of answers."""
        if self._ready and self._window > 0:
            self._serve(limit)
        out, self._out = self._out, []
        return b"".join(out)

    def _serve(self, limit: int) -> None:
        """Give every stream that can send a frame in turn, so that no answer holds another up."""
        while self._ready and self._window > 0 and limit > 0:
            stream = self._ready.popleft()
            found = self._streams.get(stream)
            if found is None:
                continue
            found.in_turn = False
            if not found.queue or found.window <= 0:
                continue
            first = found.queue[0]
            size = min(len(first), found.window, self._window, self._frame_bytes)
            self._out.append(HEADER.pack(size >> 8, size & 0xFF, Kind.DATA, 0, stream))
            self._out.append(first[:size])  # copied once, by the join
            self._updates += FREE_UPDATES
            found.window -= size
            self._window -= size
            found.queued -= size
            self.queued_bytes -= size
            limit -= size + 9
            if size == len(first):
                found.queue.popleft()
            else:
                found.queue[0] = first[size:]
            if found.queue:
                if found.window > 0:
                    self._take_turn(stream, found)
            elif found.trailers is not None:
                trailers = found.trailers
                self._out.append(trailers.closing + stream.to_bytes(4, "big") + trailers.payload)
                self._finish(stream, found)

    def _finish(self, stream: int, found: _Stream) -> None:
        """Our side of a stream has ended; so has the other, or it is told that nobody listens."""
        del self._streams[stream]
        if not found.ended:
            code = LONG.pack(Code.NO_ERROR)  # RFC 9113, 8.1: the answer holds nevertheless
            self._out.append(frame(Kind.RST_STREAM, 0, stream, code))
