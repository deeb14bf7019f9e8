"""Room for so many bytes, given out in turn. Pure.

What a peer can make a door hold at a time has a limit. Whoever needs more than is left waits until
others have gone, in the order of asking, so that neither the large nor the late are passed over.
"""

from collections import deque
from collections.abc import Callable


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

    def __init__(self, limit: int) -> None:
        """Begin empty; ``limit`` is in bytes."""
        self.used = 0  # bytes
        self._limit = limit
        self._waiting: deque[Lease] = deque()

    def lease(self, size: int, then: Callable[[], None]) -> Lease:
        """Return a part of ``size`` bytes; ``then`` is called when it is had, perhaps at once."""
        lease = Lease(self, size, then)
        self._waiting.append(lease)
        self.give()
        return lease

    def take(self, size: int) -> bool:
        """Have ``size`` bytes without a lease, if nobody waits and there is room; ``put`` ends it."""
        if self._waiting or (self.used and self.used + size > self._limit):
            return False
        self.used += size
        return True

    def put(self, size: int) -> None:
        """Give ``size`` bytes back."""
        self.used -= size
        if self._waiting:
            self.give()

    def give(self) -> None:
        """Let in whoever is next, as long as there is room."""
        while self._waiting:
            size = self._waiting[0].size
            if self.used and self.used + size > self._limit:
                return
            self._waiting.popleft().begin()

    def forget(self, lease: Lease) -> None:
        """Take somebody out of the queue."""
        self._waiting.remove(lease)
        self.give()
