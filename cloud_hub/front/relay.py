"""What a front and the hub say to each other: frames on a stream socket.

    front ─ CALL, ADMIT, CANCEL ─► hub        hub ─ SETUP, ANSWER, FAILURE, STOP ─► front
    front ─ READY, REFUSED ─► hub             front ─ ENDED, REJECTED ─► hub

Every frame is ``length, kind, call id`` and a body. A call's request lies in the body, or, if it
is large, in memory that both map; it stays there until the call has its answer. What a caller saw
in the end only the front knows, so it says how every request for inference ended. Frames of one
turn of the event loop leave together: under load, a system call is shared by many calls.
"""

import abc
import asyncio
import enum
import json
import logging
import math
import mmap
import struct
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from cloud_hub.front.arena import Arena
from fogline_protocol.errors import ERRORS, InferenceError, Overloaded, ServerFault, Unavailable
from fogline_protocol.grpc_service import COUNTED
from fogline_protocol.outcomes import UNAVAILABLE, Books, Entry

INLINE_BELOW = 1 << 15  # bytes of a request; below it copying is cheaper than placing
MAX_CALLS = 4096  # of one front at a time

_HEAD = struct.Struct("<IBQ")  # length of the body, kind, call id
_CALL = struct.Struct("<dqIII")  # seconds left, offset or -1, lengths of request, path, metadata

log = logging.getLogger("fogline.front")


class Kind(enum.IntEnum):
    """What a frame says."""

    SETUP = 1  # JSON: what the front is to do
    READY = 2  # it listens
    REFUSED = 3  # JSON: why it cannot listen
    CALL = 4
    ADMIT = 9  # as a call without a request: may this caller open this stream?
    CANCEL = 5  # its caller has left
    ANSWER = 6
    FAILURE = 7  # JSON: status, text, when to come back
    STOP = 8  # JSON: how long calls in flight have
    ENDED = 10  # the outcome of a request, of call 0: of one that was not passed on
    REJECTED = 11  # why something was refused there


@dataclass(frozen=True, slots=True)
class Call:
    """A call as the hub gets it."""

    path: str  # of the gRPC method, e.g. "/inference.GRPCInferenceService/ModelInfer"
    request: bytes
    seconds_left: float | None
    metadata: Mapping[str, str]
    admit: bool = False  # only whether its caller may is asked, not for an answer
    entry: Entry | None = None  # in the hub's books

    def time_remaining(self) -> float | None:
        """Return how long its caller still waits, in seconds."""
        return self.seconds_left

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what its caller sent along."""
        return tuple(self.metadata.items())


Answer = Callable[[Call], Coroutine[Any, Any, bytes]]  # raises InferenceError, nothing else


class _End(asyncio.Protocol, abc.ABC):
    """One end of the socket: cuts frames out of what arrives, sends those of a turn together."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._leaving: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        at, end = 0, len(self._received)
        with memoryview(self._received) as view:
            while end - at >= _HEAD.size:
                length, kind, call_id = _HEAD.unpack_from(view, at)
                if end - at - _HEAD.size < length:
                    break
                at += _HEAD.size
                self._frame(Kind(kind), call_id, bytes(view[at : at + length]))
                at += length
        del self._received[:at]

    def send(self, kind: Kind, call_id: int = 0, *parts: bytes) -> None:
        """Send a frame at the end of this turn of the loop."""
        if not self._leaving:
            self._loop.call_soon(self._flush)
        self._leaving.append(_HEAD.pack(sum(map(len, parts)), kind, call_id))
        self._leaving.extend(parts)

    def send_document(self, kind: Kind, document: Any, call_id: int = 0) -> None:
        """Send a frame with a JSON body."""
        self.send(kind, call_id, json.dumps(document).encode())

    def close(self) -> None:
        """Close the socket after what is on its way."""
        if self._transport is not None:
            self._flush()
            self._transport.close()

    def _flush(self) -> None:
        leaving, self._leaving = self._leaving, []
        if leaving and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(leaving))

    @abc.abstractmethod
    def _frame(self, kind: Kind, call_id: int, body: bytes) -> None:
        """Act on a frame that has arrived."""


class FrontEnd(_End):
    """The front's end: asks."""

    def __init__(self, memory: mmap.mmap) -> None:
        super().__init__()
        self._memory = memory
        self._arena = Arena(len(memory))
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._placed: dict[int, tuple[int, int]] = {}  # by call: where its request lies
        self._last_id = 0
        self.setup: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self.stop: asyncio.Future[float] = self._loop.create_future()  # seconds of grace

    async def ask(
        self,
        path: str,
        request: bytes,
        seconds_left: float | None,
        metadata: Mapping[str, str],
        *,
        admit: bool = False,
        entry: Entry | None = None,
    ) -> bytes:
        """Return the hub's answer to a call; with ``admit`` whether its caller may call.

        ``entry`` is that of a request for inference, which is to tell the hub how it ends.

        Raises:
            InferenceError: the hub's refusal; Overloaded and Unavailable are this end's too.
        """
        if self._transport is None or self._transport.is_closing():
            raise Unavailable("the hub is gone")
        if len(self._waiting) >= MAX_CALLS:
            self.rejected("front_calls")
            raise Overloaded(f"{MAX_CALLS} calls are waiting at this front: come back later")
        name, extra = path.encode(), json.dumps(metadata).encode() if metadata else b""
        self._last_id += 1
        call_id = self._last_id
        offset = -1
        if len(request) >= INLINE_BELOW and (place := self._arena.take(len(request))) is not None:
            offset = place
            self._memory[offset : offset + len(request)] = request
            self._placed[call_id] = offset, len(request)
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._waiting[call_id] = answer
        head = _CALL.pack(
            math.nan if seconds_left is None else seconds_left,
            offset, len(request), len(name), len(extra),
        )  # fmt: skip
        kind = Kind.ADMIT if admit else Kind.CALL
        self.send(kind, call_id, head, name, extra, b"" if offset >= 0 else request)
        if entry is not None:
            entry.tell = lambda outcome, _: self.send(Kind.ENDED, call_id, outcome.encode())
        try:
            return await answer
        finally:
            if not answer.done() or answer.cancelled():
                # Its memory is free when the hub has let go of it, and says so with a failure.
                self.send(Kind.CANCEL, call_id)

    # The front's books: what happens here, the hub counts.

    def open_entry(self) -> Entry:
        """Begin a request that is not passed on yet."""
        return Entry(lambda outcome, _: self.send(Kind.ENDED, 0, outcome.encode()))

    def rejected(self, reason: str) -> None:
        """Tell the hub why something was refused here."""
        self.send(Kind.REJECTED, 0, reason.encode())

    def connection_lost(self, error: Exception | None) -> None:
        """Tell whoever waits that there is nobody to answer."""
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(Unavailable("the hub is gone"))
        self._waiting.clear()
        for told in (self.setup, self.stop):
            if not told.done():
                told.cancel()

    def _frame(self, kind: Kind, call_id: int, body: bytes) -> None:
        match kind:
            case Kind.ANSWER:
                self._settle(call_id, body, None)
            case Kind.FAILURE:
                self._settle(call_id, b"", _error(json.loads(body)))
            case Kind.SETUP:
                self.setup.set_result(json.loads(body))
            case Kind.STOP if not self.stop.done():
                self.stop.set_result(json.loads(body))
            case _:
                raise ValueError(f"the hub never says {kind.name}")

    def _settle(self, call_id: int, body: bytes, error: InferenceError | None) -> None:
        if (place := self._placed.pop(call_id, None)) is not None:
            self._arena.give_back(*place)
        answer = self._waiting.pop(call_id)
        if answer.done():  # its caller has left
            return
        if error is None:
            answer.set_result(body)
        else:
            answer.set_exception(error)


class HubEnd(_End):
    """The hub's end: answers. Owner of one task per call, and of what is to be counted."""

    def __init__(self, memory: mmap.mmap, answer: Answer, books: Books) -> None:
        super().__init__()
        self._books = books
        self._entries: dict[int, Entry] = {}  # of the calls whose end the front will tell
        self._memory = memory
        self._answer = answer
        self._calls: dict[int, asyncio.Task[bytes]] = {}
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.lost = asyncio.Event()

    @property
    def calls(self) -> int:
        """How many calls are being answered."""
        return len(self._calls)

    def connection_lost(self, error: Exception | None) -> None:
        """Stop answering: the callers are gone with their front."""
        for task in self._calls.values():
            task.cancel()
        for entry in self._entries.values():
            entry.end(UNAVAILABLE)  # their connections were the front's
        self._entries.clear()
        if not self.ready.done():
            self.ready.set_exception(Unavailable("it ended before it listened"))
            self.ready.exception()  # who did not wait for it need not hear of it
        self.lost.set()

    def _frame(self, kind: Kind, call_id: int, body: bytes) -> None:
        match kind:
            case Kind.CALL | Kind.ADMIT:
                call = self._read(body, admit=kind is Kind.ADMIT)
                if call.entry is not None:
                    self._entries[call_id] = call.entry
                task = self._loop.create_task(self._answer(call))
                self._calls[call_id] = task
                task.add_done_callback(lambda done: self._done(call_id, done))
            case Kind.CANCEL:
                if (running := self._calls.get(call_id)) is not None:
                    running.cancel()
            case Kind.ENDED:
                entry = self._entries.pop(call_id) if call_id else self._books.open_entry()
                entry.end(body.decode())
            case Kind.REJECTED:
                self._books.rejected(body.decode())
            case Kind.READY:
                self.ready.set_result(None)
            case Kind.REFUSED:
                self.ready.set_exception(Unavailable(json.loads(body)))
            case _:
                raise ValueError(f"a front never says {kind.name}")

    def _read(self, body: bytes, *, admit: bool) -> Call:
        left, offset, size, path_size, metadata_size = _CALL.unpack_from(body)
        at = _CALL.size
        path = body[at : at + path_size].decode()
        at += path_size
        metadata = json.loads(body[at : at + metadata_size]) if metadata_size else {}
        at += metadata_size
        request = body[at:] if offset < 0 else self._memory[offset : offset + size]
        entry = self._books.open_entry() if path in COUNTED and not admit else None
        return Call(path, request, None if math.isnan(left) else left, metadata, admit, entry)

    def _done(self, call_id: int, task: asyncio.Task[bytes]) -> None:
        # Not in the task: one that is cancelled before its first step runs none of its lines.
        del self._calls[call_id]
        if task.cancelled():
            error: BaseException | None = Unavailable("the caller has left")
        else:
            error = task.exception()
        if error is None:
            self.send(Kind.ANSWER, call_id, task.result())
            return
        if not isinstance(error, InferenceError):  # a fault of ours ends this call only
            log.error("a passed-on call failed", exc_info=error)
            error = ServerFault("the call failed, see the hub's log")
        self.send_document(Kind.FAILURE, _document(error), call_id)


def _document(error: InferenceError) -> Mapping[str, Any]:
    # JSON of this library, at both ends, knows infinity.
    return {"code": error.grpc_code, "text": str(error), "retry_after_s": error.retry_after_s}


def _error(document: Mapping[str, Any]) -> InferenceError:
    kind = ERRORS.get(document["code"], ServerFault)
    return kind(document["text"], retry_after_s=document["retry_after_s"])
