"""Bodies of REST requests and large answers, held in the memory that all doors share.

A body that is larger than aiohttp reads ahead waits for its turn before it is read on, so that its
sender waits; from then on it is held until its request has its answer. Who stops sending or reading
is given up: after ``ARRIVAL_S`` or ``UNREAD_S``, sooner where others need the memory.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

from aiohttp import web

from fogline_protocol.door_memory import (
    PROGRESS_BYTES,
    STALLED,
    UNREAD,
    Holder,
    Memory,
    Turn,
    address_of,
)
from fogline_protocol.errors import BadRequest, DeadlineExceeded, TooLarge
from fogline_protocol.lingering import UNREAD_S
from fogline_protocol.rooms import Room

AHEAD_BYTES = 1 << 20  # of a body that aiohttp reads, and we, before it has its turn
ARRIVAL_S = 60.0  # for the next bytes of a body, and for its turn
LOOK_S = 1.0  # between two looks at who reads an answer
HELD_FROM_BYTES = 1 << 16  # of an answer; shorter ones are the transport's at once


class Bodies:
    """The bodies of one application that arrive or leave. Used on one event loop."""

    def __init__(self, memory: Memory) -> None:
        """Hold them in ``memory``."""
        self._memory = memory
        self._arriving: set[_Arriving] = set()
        self._leaving: set[_Leaving] = set()

    def senders(self) -> Iterator[Holder]:
        """Return whose requests have begun and not ended."""
        return (
            Holder(body.since, body.crowd_out) for body in tuple(self._arriving) if body.gives_way
        )

    def readers(self) -> Iterator[Holder]:
        """Return whose answers wait to be read."""
        return (Holder(body.look(), body.crowd_out) for body in tuple(self._leaving))

    @contextlib.asynccontextmanager
    async def arrived(
        self, request: web.Request, longest: int | None = None
    ) -> AsyncIterator[bytes]:
        """Return the body of a request, which counts as long as the context lasts.

        Raises:
            TooLarge: it has more than ``longest`` bytes, None: than the application takes.
            Overloaded: there is no memory for it.
            DeadlineExceeded: it does not arrive.
            BadRequest: it breaks off, or is not packed as it says.
        """
        limit = request.client_max_size if longest is None else longest
        body = _Arriving(self._memory, request, limit)
        self._arriving.add(body)
        try:
            try:
                found = await body.arrive()
            except web.RequestPayloadError as error:
                raise BadRequest(f"the body cannot be read: {error}") from None
            finally:
                self._arriving.discard(body)
            yield found
        finally:
            body.release()

    def check_answer(self, size: int) -> None:
        """Raise ``Overloaded`` if an answer of ``size`` bytes cannot wait to be read."""
        if size >= HELD_FROM_BYTES and not self._memory.takes_answer(size):
            raise self._memory.refusal(UNREAD)

    async def write(
        self, transport: asyncio.WriteTransport, size: int, writing: Coroutine[Any, Any, None]
    ) -> None:
        """Let an answer of ``size`` bytes leave, unless nobody reads it."""
        body = _Leaving(self._memory, transport, size)
        self._leaving.add(body)
        task = asyncio.ensure_future(writing)
        try:
            while not (await asyncio.wait({task}, timeout=LOOK_S))[0]:
                if time.monotonic() - body.look() > UNREAD_S:
                    transport.abort()
            await task
        finally:
            task.cancel()
            self._leaving.discard(body)
            body.release()


class _Arriving:
    """One body, from its first byte until its request has its answer."""

    def __init__(self, memory: Memory, request: web.Request, limit: int) -> None:
        self._limit = limit  # in bytes
        self.since = time.monotonic()
        self._mark = 0  # bytes that were here then
        self._body = bytearray()  # so far; emptied at once, whatever errors refer to it
        self._memory = memory
        self._request = request
        self._held = 0
        self._turn: Turn | None = None
        self._timer: asyncio.Timeout | None = None
        self._crowded_out = False

    @property
    def gives_way(self) -> bool:
        """Whether its sender is to blame if nothing happens."""
        return self._turn is None or self._turn.lease.had

    async def arrive(self) -> bytes:
        """Return all of it."""
        limit = self._limit
        size = self._request.content_length
        if size is None or "Content-Encoding" in self._request.headers:
            size = limit  # nobody knows
        size = min(size, limit)
        self._held = min(size, AHEAD_BYTES)
        self._memory.arriving.hold(self._held)
        if self._memory.overfull():
            raise self._memory.refusal()
        try:
            async with asyncio.timeout(ARRIVAL_S) as self._timer:
                await self._read(size, limit)
        except TimeoutError:
            if self._crowded_out:
                raise self._memory.refusal(STALLED) from None
            raise DeadlineExceeded(
                f"nothing of the body arrived for {ARRIVAL_S:g} s, or there was no memory for it"
            ) from None
        if self._turn is not None:
            self._turn.lease.resize(max(0, len(self._body) - AHEAD_BYTES))
        body = bytes(self._body)
        self._body.clear()
        return body

    async def _read(self, size: int, limit: int) -> None:
        assert self._timer is not None
        loop, body = asyncio.get_running_loop(), self._body
        while True:
            chunk = await self._request.content.readany()
            self._check_time()
            if not chunk:
                return
            body += chunk
            if len(body) > limit:
                raise TooLarge(f"the body is too large: at most {limit} bytes are taken")
            if size > AHEAD_BYTES and self._turn is None:
                pool, address = self._memory.arriving, address_of(self._request.transport)
                self._turn = Turn(Room(sys.maxsize, pool, address), size - AHEAD_BYTES)
                await self._turn.come()
                self._check_time()
                self.since = loop.time()  # Linux: time.monotonic()
            self._timer.reschedule(loop.time() + ARRIVAL_S)
            if len(body) - self._mark >= PROGRESS_BYTES:
                self.since, self._mark = loop.time(), len(body)

    def _check_time(self) -> None:
        """Raise ``TimeoutError`` if that is only on its way: what was waited for came before it."""
        if self._crowded_out:
            raise TimeoutError

    def crowd_out(self) -> None:
        """Give up what has arrived: others need the memory."""
        if self._timer is not None and not self._timer.expired():
            self._crowded_out = True
            self._timer.reschedule(asyncio.get_running_loop().time())
            self.release()

    def release(self) -> None:
        """Hold nothing any more."""
        self._body.clear()
        self._memory.arriving.drop(self._held)
        self._held = 0
        if self._turn is not None:
            self._turn.lease.release()


class _Leaving:
    """One answer that its reader has not read yet."""

    def __init__(self, memory: Memory, transport: asyncio.WriteTransport, size: int) -> None:
        self._memory = memory
        self._transport = transport
        self._held = size
        memory.answers.hold(size)
        self._since = time.monotonic()
        self._left = sys.maxsize  # bytes that the transport had then

    def look(self) -> float:
        """Return since when its reader has not got on."""
        left = self._transport.get_write_buffer_size()
        if self._left - left >= PROGRESS_BYTES:
            self._left, self._since = left, time.monotonic()
        return self._since

    def crowd_out(self) -> None:
        """Give it up: others need the memory."""
        if self._held:
            self._memory.refusal(UNREAD)  # its peer does not read that either
            self._transport.abort()
            self.release()  # at once, so that no more have to go than others need

    def release(self) -> None:
        """Hold nothing any more."""
        self._memory.answers.drop(self._held)
        self._held = 0
