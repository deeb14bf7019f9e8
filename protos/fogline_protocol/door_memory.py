"""What the callers of all doors of a process can make it hold, and who gives way when it is much.

    arriving   1/2   requests, from their first byte until they are answered, and what calls cost
    in hand    1/4   of streams: what is being answered; of packed messages: what they unpack to
    answers    1/4   that are not read yet

What is large waits for its turn before it arrives (``rooms``), on the sender's side. What is small
is counted, and refused when nothing is left. Whoever neither sends nor reads on gives way to those
who would: at once where nothing is left, after ``STALL_S`` where somebody waits.
"""

import asyncio
import ipaddress
import os
import time
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

from fogline_protocol.errors import Overloaded
from fogline_protocol.rooms import Pool, Room

STALL_S = 1.0  # without PROGRESS_BYTES, while others wait
PROGRESS_BYTES = 1 << 16
RELIEVED = 7 / 8  # of a pool that was full: so much is left to those who got on last
JUST_RELIEVED = 31 / 32  # the same if nobody stalls: no more than makes the search worth it
RELIEF_S = 0.25  # between two looks, while somebody waits
SEARCH_S = 0.02  # the same while nothing is left: it takes some milliseconds to ask everybody
COME_BACK_S = 1.0  # hint to those who are refused

SHARE = 4  # the doors may hold one part of so many of the machine's memory
LEAST_MESSAGES = 4  # of the largest size; fewer would not do for one

FULL = "the server's memory for requests and answers is full: come back later"
STALLED = "others need the server's memory, and this call got on least: come back later"
UNREAD = (
    "answers that nobody reads fill the server's memory: read them, or ask for less at once, and "
    "come back later"
)


class Holder(NamedTuple):
    """Who could give something back."""

    since: float  # of ``time.monotonic()``: when it last got on
    end: Callable[[], None]


class Source(Protocol):
    """A door, as seen by the memory."""

    def senders(self) -> Iterable[Holder]:
        """Return whose requests have begun and not ended."""
        ...

    def readers(self) -> Iterable[Holder]:
        """Return whose answers wait to be read."""
        ...


class Memory:
    """The budget of a process's doors, in bytes. Used on one event loop."""

    def __init__(self, limit: int, refused: Callable[[], None] = lambda: None) -> None:
        """Begin empty; ``refused`` is called for every call that is refused or ended for it."""
        self.limit = limit
        self.arriving = Pool(limit // 2, self._look_soon)
        self.in_hand = Pool(limit // 4)
        self.answers = Pool(limit // 4)
        self.refusals = 0  # calls, in all
        self._refused = refused
        self._sources: set[Source] = set()
        self._looking: asyncio.TimerHandle | None = None
        self._searched: dict[Pool, float] = {}  # when nobody was found

    def add(self, source: Source) -> None:
        """Ask ``source`` too when somebody has to give way."""
        self._sources.add(source)

    def remove(self, source: Source) -> None:
        """Ask ``source`` no longer."""
        self._sources.discard(source)
        if not self._sources and self._looking is not None:
            self._looking.cancel()
            self._looking = None

    def overfull(self) -> bool:
        """Return whether what just arrived is too much, though others have given way."""
        pool = self.arriving
        if pool.full and not self._nobody_lately(pool):
            self._relieve_senders()
            if pool.full:
                self._searched[pool] = time.monotonic()
        return pool.full

    def takes_answer(self, size: int) -> bool:
        """Return whether an answer may wait to be read; others may have to go for it."""
        answers = self.answers
        limit = answers.limit if size < PROGRESS_BYTES else answers.lendable
        if answers.used + size > limit and not self._nobody_lately(answers):
            self._relieve_readers(limit - size)
            if answers.used + size > limit:
                self._searched[answers] = time.monotonic()
        # What is larger than all of it must leave some time.
        return answers.used + size <= limit or not answers.used

    def refusal(self, text: str = FULL) -> Overloaded:
        """Return the error for a call that cannot be held, and count it."""
        self.refusals += 1
        self._refused()
        return Overloaded(text, retry_after_s=COME_BACK_S)

    def _nobody_lately(self, pool: Pool) -> bool:
        """Return whether nobody could give way a moment ago: to ask every call again costs much."""
        return time.monotonic() - self._searched.get(pool, -SEARCH_S) < SEARCH_S

    def _look_soon(self) -> None:
        if self._looking is None:
            loop = asyncio.get_running_loop()
            self._looking = loop.call_later(RELIEF_S, self._look)

    def _look(self) -> None:
        self._looking = None
        pool, now = self.arriving, time.monotonic()
        if pool.waiting:
            for since, end in self._senders():
                if not pool.waiting or now - since < STALL_S:
                    break
                end()
        if pool.waiting:
            self._look_soon()

    def _relieve_senders(self) -> None:
        pool, now = self.arriving, time.monotonic()
        for since, end in self._senders():
            stalls = now - since >= STALL_S
            if pool.used <= pool.limit * (RELIEVED if stalls else JUST_RELIEVED):
                break
            end()

    def _relieve_readers(self, limit: float) -> None:
        pool, now = self.answers, time.monotonic()
        for since, end in self._readers():
            # Whoever reads keeps what it was promised.
            if pool.used <= limit * RELIEVED or now - since < STALL_S:
                break
            end()

    def _senders(self) -> list[Holder]:
        return _in_turn(holder for source in self._sources for holder in source.senders())

    def _readers(self) -> list[Holder]:
        return _in_turn(holder for source in self._sources for holder in source.readers())


def _in_turn(holders: Iterable[Holder]) -> list[Holder]:
    """Return who could give way, who got on least first."""
    return sorted(holders, key=lambda holder: holder.since)


class Turn:
    """A lease that is waited for."""

    __slots__ = ("_had", "lease")

    def __init__(self, room: Room, size: int) -> None:
        """Ask ``room`` for ``size`` bytes."""
        self._had: asyncio.Future[None] | None = None
        self.lease = room.lease(size, self._begin)

    async def come(self) -> None:
        """Return when it is had; whoever is cancelled meanwhile has to release the lease."""
        if not self.lease.had:
            self._had = asyncio.get_running_loop().create_future()
            await self._had

    def _begin(self) -> None:
        if self._had is not None and not self._had.done():
            self._had.set_result(None)


def address_of(transport: asyncio.BaseTransport | None) -> Hashable:
    """Return where a peer is, as far as peers can be told apart by it."""
    name = None if transport is None else transport.get_extra_info("peername")
    if not isinstance(name, tuple):
        return None  # a Unix socket: whoever is on this machine
    address = ipaddress.ip_address(name[0].partition("%")[0])
    # Whoever has an IPv6 address has 2 ** 64 of them.
    return address.packed[:8] if address.version == 6 and not address.ipv4_mapped else name[0]


def default_limit(max_message_bytes: int) -> int:
    """Return how many bytes the doors may hold where nobody says so."""
    return max(memory_bytes() // SHARE, LEAST_MESSAGES * max_message_bytes)


def share(limit: int, processes: int, max_message_bytes: int) -> int:
    """Return how many bytes each of several processes with doors may hold, ``limit`` in all."""
    return max(limit // processes, LEAST_MESSAGES * max_message_bytes)


def memory_bytes() -> int:
    """Return the bytes of memory of the machine, or of the control group of this process."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in (_CGROUP_2, _CGROUP_1):
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():  # not "max"
            found = min(found, int(text))
    return found


# Inside a container its own group is the root of what is mounted.
_CGROUP_2 = Path("/sys/fs/cgroup/memory.max")
_CGROUP_1 = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
