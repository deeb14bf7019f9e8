"""Decides which waiting requests run together, and which no longer run at all.

Pure: time comes in as a number, nothing here waits. The rule is greedy: whenever the engine
is free, what is queued leaves, up to the largest batch. Holding requests back in the hope of
company was slower than this in every measurement (performance.md).

Requests share a batch only if their keys are equal: same shapes, same types. The oldest
request decides the key, so no kind of request can starve another.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Item(Protocol):
    """What the queue must know of a request."""

    @property
    def rows(self) -> int:
        """How much of a batch it takes."""

    @property
    def key(self) -> Hashable:
        """Equal for requests that may run together."""

    @property
    def deadline(self) -> float | None:
        """When its caller stops waiting, in seconds; None: never."""

    @property
    def gone(self) -> bool:
        """Whether its caller has left."""


T = TypeVar("T", bound=Item)


@dataclass(frozen=True, slots=True)
class Taken(Generic[T]):
    """What leaves the queue: to the engine, or back to callers whose time is up."""

    batch: Sequence[T]
    expired: Sequence[T]


class Queue(Generic[T]):
    """Requests in order of arrival."""

    def __init__(self, max_batch: int) -> None:
        self._max_batch = max_batch
        self._waiting: deque[T] = deque()
        self.rows = 0  # waiting now

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, item: T) -> None:
        """Put a request of at most ``max_batch`` rows at the end."""
        self._waiting.append(item)
        self.rows += item.rows

    def drain(self) -> Sequence[T]:
        """Empty the queue and return what was in it."""
        left = tuple(self._waiting)
        self._waiting.clear()
        self.rows = 0
        return left

    def take(self, now: float) -> Taken[T]:
        """Return the next batch and everything whose deadline has passed.

        Requests whose caller has gone are dropped, so no engine time is spent on them.
        """
        batch: list[T] = []
        expired: list[T] = []
        left: deque[T] = deque()
        room = self._max_batch
        while self._waiting:
            item = self._waiting.popleft()
            if item.gone:
                self.rows -= item.rows
            elif item.deadline is not None and item.deadline <= now:
                self.rows -= item.rows
                expired.append(item)
            elif item.rows <= room and (not batch or item.key == batch[0].key):
                self.rows -= item.rows
                room -= item.rows
                batch.append(item)
                if room == 0:
                    break
            else:
                left.append(item)
                if batch and item.key == batch[0].key:
                    # It did not fit. Letting later ones of its kind overtake it would let a
                    # stream of small requests starve a large one.
                    room = 0
                    break
        left.extend(self._waiting)
        self._waiting = left
        return Taken(batch, expired)
