"""Room for so many bytes, given out in turn. Pure.

What a peer can make a door hold at a time has a limit: its ``Room``. Whoever needs more than is
left waits until others have gone, in the order of asking, so that neither the large nor the late
are passed over. What all peers together can make it hold has one too: the ``Pool`` that rooms take
from. It goes round the addresses that wait, so that a thousand connections of one careless client
have one turn among them, while many clients behind one address lose nothing but their order.
"""

from collections import deque
from collections.abc import Callable, Hashable

LENDABLE = 3 / 4  # of a pool: who comes with little finds the rest


class Lease:
    """A part of a room: asked for, then had, then given back."""

    __slots__ = ("_asking", "_room", "_then", "had", "size")

    def __init__(self, room: "Room", size: int, then: Callable[[], None]) -> None:
        """Ask ``room`` for ``size`` bytes; ``then`` is called once they are had."""
        self.size = size
        self.had = False
        self._asking = True
        self._room = room
        self._then = then

    def resize(self, size: int) -> None:
        """Keep ``size`` bytes, more or fewer than were asked for: that much it turned out to be."""
        if self.had:
            self._room.put(self.size - size)
            self.size = size

    def release(self) -> None:
        """Give it back, or ask no more for it; whoever waits may be next. The second time: nothing."""
        if self.had:
            self.had = False
            self._room.put(self.size)
        elif self._asking:
            self._asking = False
            self._room.forget(self)

    def begin(self) -> None:
        """Have it from here on."""
        self.had, self._asking = True, False
        self._room.used += self.size
        self._then()


class Room:
    """So many bytes; what is larger than all of them is let in when nothing else is there."""

    def __init__(self, limit: int, pool: "Pool", address: Hashable) -> None:
        """Begin empty.

        Args:
            limit: in bytes.
            pool: where they come from.
            address: of whom they are for.
        """
        self.used = 0  # bytes
        self.address = address
        self._limit = limit
        self._pool = pool
        self._waiting: deque[Lease] = deque()
        self._queued = False  # in the pool

    def lease(self, size: int, then: Callable[[], None]) -> Lease:
        """Return a part of ``size`` bytes; ``then`` is called when it is had, perhaps at once."""
        lease = Lease(self, size, then)
        self._waiting.append(lease)
        self.give()
        return lease

    def take(self, size: int) -> bool:
        """Have ``size`` bytes without a lease, if nobody waits and there is room; ``put`` ends it."""
        if self._waiting or not self._fits(size) or not self._pool.lend(size):
            return False
        self.used += size
        return True

    def put(self, size: int) -> None:
        """Give ``size`` bytes back."""
        self.used -= size
        self._pool.back(size)
        if self._waiting:
            self.give()

    def give(self) -> None:
        """Let in whoever is next, as long as there is room here and in the pool."""
        while self._waiting and not self._queued:
            size = self._waiting[0].size
            if not self._fits(size):
                return
            if not self._pool.lend(size):
                self._queued = True
                self._pool.queue(self)
                return
            self._waiting.popleft().begin()

    def forget(self, lease: Lease) -> None:
        """Take somebody out of the queue."""
        self._waiting.remove(lease)
        if self._queued and not (self._waiting and self._fits(self.wanted)):
            self._queued = False
            self._pool.forget(self)
        elif self._queued:
            self._pool.give()  # whoever is next may ask for less
        self.give()

    @property
    def wanted(self) -> int:
        """How many bytes whoever is next asks for."""
        return self._waiting[0].size

    def admit(self) -> None:
        """Let in whoever is next: the pool has lent what it asks for."""
        self._queued = False
        self._waiting.popleft().begin()
        self.give()

    def _fits(self, size: int) -> bool:
        return not self.used or self.used + size <= self._limit


class Pool:
    """So many bytes for all rooms and for what is too small to have one."""

    def __init__(self, limit: int, waits: Callable[[], None] = lambda: None) -> None:
        """Begin empty; ``limit`` is in bytes, and ``waits`` is called when a room has to wait."""
        self.limit = limit
        self.used = 0  # bytes
        self.waiting = 0  # rooms
        self._lent = 0  # bytes of rooms
        self.lendable = int(limit * LENDABLE)  # to rooms, and to what is large
        self._waits = waits
        self._turns: dict[Hashable, deque[Room]] = {}  # by address, whoever is next first

    @property
    def full(self) -> bool:
        """Whether nothing more can be held, however small."""
        return self.used > self.limit

    def hold(self, size: int) -> None:
        """Count ``size`` bytes that are here already; ``drop`` ends it."""
        self.used += size

    def drop(self, size: int) -> None:
        """Count ``size`` bytes no longer."""
        self.used -= size
        if self.waiting:
            self.give()

    def lend(self, size: int) -> bool:
        """Lend ``size`` bytes, if no room waits and they are there; ``back`` ends it."""
        if self.waiting or not self._fits(size):
            return False
        self._lent += size
        self.used += size
        return True

    def back(self, size: int) -> None:
        """Have ``size`` bytes back."""
        self._lent -= size
        self.drop(size)

    def queue(self, room: Room) -> None:
        """Let a room wait for what it wants."""
        self._turns.setdefault(room.address, deque()).append(room)
        self.waiting += 1
        self._waits()

    def forget(self, room: Room) -> None:
        """Let a room wait no longer."""
        self._turns[room.address].remove(room)
        self.waiting -= 1
        if not self._turns[room.address]:
            del self._turns[room.address]
        self.give()

    def _fits(self, size: int) -> bool:
        # What is larger than all of it must come in some time.
        return not self._lent or (
            self._lent + size <= self.lendable and self.used + size <= self.limit
        )

    def give(self) -> None:
        """Let rooms in whose turn it is, as long as there is something left."""
        while self._turns:
            address, rooms = next(iter(self._turns.items()))
            room = rooms[0]
            size = room.wanted
            if not self._fits(size):
                return
            rooms.popleft()
            self.waiting -= 1
            del self._turns[address]
            if rooms:
                self._turns[address] = rooms  # behind the others
            self._lent += size
            self.used += size
            room.admit()
