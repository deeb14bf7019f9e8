"""Messages in the bodies of calls: their prefix, the pieces they come in, how they are packed.

A message is refused by its prefix, before it arrives. What is packed has its room (``rooms``)
before it is unpacked: for all that it could become, then for what it did become.

Source: gRPC over HTTP/2 (PROTOCOL-HTTP2.md, "Length-Prefixed-Message").
"""

import asyncio
import math
import zlib
from collections import deque
from collections.abc import Callable

from fogline_protocol import grpc_headers
from fogline_protocol.door_memory import Turn
from fogline_protocol.errors import BadRequest, Overloaded
from fogline_protocol.grpc_calls import Context, Method
from fogline_protocol.rooms import Room

GATHERED_BYTES = 1024
INFLATE_APART_BYTES = 1 << 12  # a compressed message above it is unpacked in a thread
# Deflate makes at most 258 bytes of 2 bits (zlib, "Technical Details": 1032 to 1).
MOST_OF_A_BYTE = 1032


class Message:
    """The one message of a unary call, in pieces."""

    __slots__ = ("compressed", "expected", "have", "pieces")

    def __init__(self) -> None:
        """Begin with nothing."""
        self.pieces: list[bytes | bytearray] = []  # without the prefix, once that is known
        self.have = 0  # bytes in them
        self.expected = -1  # bytes without the prefix; -1: not known yet
        self.compressed = False

    def add(self, data: bytes) -> bool:
        """Take bytes; return whether they said how long the message will be.

        Raises:
            BadRequest: this is not the beginning of a message.
        """
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

    def release(self) -> None:
        """Let go of the pieces at once, whatever still refers to their call."""
        self.pieces.clear()


class Messages:
    """The messages of a stream, cut when they are asked for: whoever is slow holds its peer up.

    A stream may have many in hand. Every one has its room until it was answered, in a room that all
    streams share. Answers that are not written yet hold up none but the next ones of their stream:
    whoever reads one stream after another must not wait for those that it does not read.
    """

    def __init__(
        self,
        limit: int,
        encoding: str,
        room: Room,
        need: Callable[[int, int], None],
        took: Callable[[int], None],
        answered: Callable[[int], None],
    ) -> None:
        """Begin with nothing.

        Args:
            limit: of a message, in bytes, packed and unpacked.
            encoding: how they are packed, where they are.
            room: of those that are in hand, of this stream and others.
            need: is told how many bytes the next message has with its prefix, and how many of
                them are here.
            took: is told how many bytes are left here when a message was cut.
            answered: is told the size of an answer that waits for its turn to be written, and that
                size below zero when it waits no longer; it may refuse to have it.
        """
        self._limit = limit
        self._encoding = encoding
        self._room = room
        self._need, self._took, self._answered = need, took, answered
        self._buffer = bytearray()
        self._ended = False
        self._more: asyncio.Future[None] | None = None
        self._waiting: Turn | None = None  # for the message that is next
        self._held = 0  # bytes of the room
        self._over = False  # none of it any more
        self._answers: deque[list[int]] = deque()  # the size of each, once there; not yet written
        self._unwritten = 0  # bytes of them
        self._in_turn = 0  # bytes of those that nobody began to write
        self._written: asyncio.Future[None] | None = None  # so many that the next message waits

    def add(self, data: bytes, ended: bool) -> None:
        """Take bytes of the stream."""
        self._buffer += data
        self._ended = ended
        if self._more is not None and not self._more.done():
            self._more.set_result(None)

    @property
    def waits_for_room(self) -> bool:
        """Whether the next message is here and waits until others are answered."""
        return self._waiting is not None or self._written is not None

    @property
    def rests(self) -> bool:
        """Whether nothing happens before more of the stream arrives."""
        return self._more is not None and not self._more.done() and not self._answers

    def __aiter__(self) -> "Messages":
        return self

    async def __anext__(self) -> bytes:
        """Return the next message.

        Raises:
            InferenceError: it is too long, cut short, or cannot be unpacked.
        """
        while True:
            if len(self._buffer) >= 5:
                compressed, length = _prefix(self._buffer)
                check_length(length, self._limit)
                if len(self._buffer) >= 5 + length:
                    break
                if not self._ended:
                    self._need(5 + length, len(self._buffer))
            if self._ended:
                if self._buffer:
                    raise BadRequest("the stream ended in the middle of a message")
                raise StopAsyncIteration
            self._more = asyncio.get_running_loop().create_future()
            await self._more
        while self._unwritten > self._limit:
            self._written = asyncio.get_running_loop().create_future()
            await self._written
            self._written = None
        size = at_most(length, self._limit) if compressed else length
        if not self._room.take(size):
            self._waiting = Turn(self._room, size)
            await self._waiting.come()
            self._waiting = None
        self._held += size
        message = bytes(memoryview(self._buffer)[5 : 5 + length])
        del self._buffer[: 5 + length]
        self._took(len(self._buffer))
        if compressed:
            message = await _inflated(message, self._encoding, self._limit)
            self._put(size - len(message))
        return message

    def answering(self, method: Method) -> Method:
        """Return ``method`` for these messages, called once for each in their order."""

        async def answer(message: bytes, context: Context) -> bytes:
            size = [0]
            self._answers.append(size)
            try:
                found = await method(message, context)
                if not self._over:
                    self._answered(len(found))
                    size[0] = len(found)
                    self._unwritten += len(found)
                    self._in_turn += len(found)
                return found
            finally:
                self._put(len(message))

        return answer

    def writing(self) -> None:
        """Note that the oldest answer is handed on."""
        size = self._answers[0][0]
        self._in_turn -= size
        self._answered(-size)

    def written(self) -> None:
        """Note that the oldest answer was written: it holds up nothing more."""
        self._unwritten -= self._answers.popleft()[0]
        waiting = self._written
        if waiting is not None and self._unwritten <= self._limit and not waiting.done():
            waiting.set_result(None)

    def release(self) -> None:
        """Give all room back: the stream is over."""
        if self._waiting is not None:
            self._waiting.lease.release()
        self._over = True
        self._buffer.clear()
        self._room.put(self._held)
        self._answered(-self._in_turn)
        self._in_turn = 0

    def _put(self, size: int) -> None:
        if not self._over:
            self._held -= size
            self._room.put(size)


def check_length(length: int, limit: int) -> None:
    """Refuse a message by its length, before it arrives.

    Raises:
        Overloaded: it is too long, and will be the next time.
    """
    if length > limit:
        raise Overloaded(
            f"Received message larger than max ({length} vs. {limit} bytes): send less at once, or "
            "ask the operator for a higher limit",
            retry_after_s=math.inf,
        )


def check_answer(answer: bytes, limit: int) -> None:
    """Refuse to send an answer.

    Raises:
        Overloaded: it is too long, and will be the next time.
    """
    if len(answer) > limit:
        raise Overloaded(
            f"the answer has {len(answer)} bytes, at most {limit} are sent at once: ask for fewer "
            "outputs or rows",
            retry_after_s=math.inf,
        )


async def unpacked(turn: Turn, message: bytes, encoding: str, limit: int) -> bytes:
    """Return a message unpacked, as soon as ``turn`` has come, which then is as large as that.

    Raises:
        InferenceError: it cannot be, or is longer than ``limit`` bytes then.
    """
    await turn.come()
    message = await _inflated(message, encoding, limit)
    turn.lease.resize(len(message))
    return message


def _prefix(data: bytes | bytearray) -> tuple[bool, int]:
    if data[0] > 1:
        raise BadRequest(
            f"a message begins with 0 or 1 and its length in 4 bytes, got {bytes(data[:5])!r}"
        )
    return bool(data[0]), int.from_bytes(data[1:5], "big")


def at_most(length: int, limit: int) -> int:
    """Return how many bytes a packed message of ``length`` bytes could become."""
    return min(limit, length * MOST_OF_A_BYTE)


async def _inflated(message: bytes, encoding: str, limit: int) -> bytes:
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
