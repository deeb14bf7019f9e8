"""Decides which waiting requests run together, in whose turn, and which run no longer.

Pure: time comes in as a number, nothing here waits. The rule is greedy: whenever an engine is
free, what is queued leaves, up to the largest batch. Holding requests back in the hope of
company was slower than this in every measurement (performance.md), so a maximum delay and
preferred sizes exist, as in Triton, and are off.

Who comes first:

1. The higher priority level (1 is the highest). Within a level, requests that outlived a
   ``delays`` policy come after all that did not.
2. Within a level, callers share the rows fairly, however much each has queued: self-clocked
   fair queueing (S. J. Golestani, INFOCOM 1994). A request's tag is where its caller would be
   if everybody got rows in turn: ``max(clock, the caller's last tag) + rows``, the clock being
   the tag served last. The smallest tag leads. A caller who comes with one request finds at
   most as many rows of every other caller before it as its own request has, and one request
   more, be the others' queues as long as they like.
3. Of one caller, the earlier one.

Requests share a batch only if their keys are equal: same shapes, same types, same parameters
that reach the engine. The leader decides the key, and of its kind nobody overtakes a request
that did not fit, so no kind and no size can starve another. Spare room goes to lower levels.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Generic, Protocol, TypeVar

HIGHEST = 1  # priority level


class Item(Protocol):
    """What the queue must know of a request."""

    @property
    def rows(self) -> int:
        """How much of a batch it takes, at least 1."""

    @property
    def key(self) -> Hashable:
        """Equal for requests that may run together."""

    @property
    def caller(self) -> Hashable:
        """Among whom rows are shared fairly."""

    @property
    def level(self) -> int:
        """Its priority level, from ``HIGHEST`` on."""

    @property
    def arrived(self) -> float:
        """When it was added, in seconds."""

    @property
    def deadline(self) -> float | None:
        """When its caller stops waiting, in seconds; None: never."""

    @property
    def gone(self) -> bool:
        """Whether its caller has left."""


T = TypeVar("T", bound=Item)


@dataclass(frozen=True, slots=True)
class Policy:
    """How the requests of one level may wait; Triton's ``ModelQueuePolicy``."""

    timeout_s: float = 0.0  # 0: as long as their callers do
    delays: bool = False  # past it they come last in their level; otherwise they are refused
    max_requests: int = 0  # 0: no limit but the queue's


@dataclass(frozen=True, slots=True)
class Rules:
    """What a queue is told. The defaults are greedy, with one level."""

    max_batch: int  # rows
    max_delay_s: float = 0.0  # a batch may be held this long for company
    preferred: Sequence[int] = ()  # rows; a batch of such a size is not held, and not exceeded
    default_policy: Policy = Policy()
    policies: Mapping[int, Policy] = field(default_factory=dict)  # by level
    ordered: bool = False  # strictly in order of arrival: no fairness, no look past another key

    def policy(self, level: int) -> Policy:
        """Return how requests of ``level`` may wait."""
        return self.policies.get(level, self.default_policy)


@dataclass(frozen=True, slots=True)
class Taken(Generic[T]):
    """What leaves the queue: to the engine, or back to callers whose time is up."""

    batch: Sequence[T]
    expired: Sequence[T]  # their callers' deadline has passed
    overdue: Sequence[T]  # they waited longer than the policy allows
    look_again: float | None  # when something becomes due, if nothing is added; None: never


@dataclass(slots=True, eq=False)
class Ticket(Generic[T]):
    """A request's place in the queue; ``item`` is None once it has left."""

    item: T | None
    level: "_Level[T]"
    tag: float
    number: int  # in order of arrival
    delayed: bool = False  # it outlived a policy that delays, and stands in the second lane


_Heap = list[tuple[float, int, Ticket[T]]]
_Lane = dict[Hashable, _Heap[T]]  # by key, smallest tag first
_Lanes = Sequence[tuple[_Lane[T], bool]]  # each with whether it is that of the delayed

SLACK = 64  # places whose requests have left, beyond which they are swept


@dataclass(slots=True, eq=False)
class _Flow:
    """What one caller has waiting in one level."""

    tag: float  # of its last request
    waiting: int = 0


@dataclass(slots=True, eq=False)
class _Level(Generic[T]):
    """The requests of one priority level: those in time, then those that outlived a policy.

    Places that requests have left (who withdrew, expired or changed lanes) stay until they come
    to the head: a heap has no cheap way to its middle.
    """

    policy: Policy
    clock: float = 0.0  # the tag served last
    waiting: int = 0
    flows: dict[Hashable, _Flow] = field(default_factory=dict)  # by caller
    lanes: tuple[_Lane[T], _Lane[T]] = field(default_factory=lambda: ({}, {}))


class Queue(Generic[T]):
    """The requests that wait for one model."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.rows = 0  # waiting now
        self._waiting = 0  # requests
        self._places = 0  # in all lanes, also those that requests have left
        self._levels: dict[int, _Level[T]] = {}  # those where somebody waits, and one
        self._timeouts: _Heap[T] = []  # when the time of a request is up
        self._number = 0

    def __len__(self) -> int:
        return self._waiting

    def is_full(self, level: int) -> bool:
        """Return whether the policy of a level takes no more requests now."""
        limit = self.rules.policy(level).max_requests
        found = self._levels.get(level)
        return bool(limit) and found is not None and found.waiting >= limit

    def add(self, item: T) -> Ticket[T]:
        """Let a request of at most ``max_batch`` rows wait, and return its place."""
        level = self._levels.get(item.level)
        if level is None:
            level = self._levels[item.level] = _Level(self.rules.policy(item.level))
        caller = self._caller(item)
        flow = level.flows.get(caller)
        if flow is None:
            flow = level.flows[caller] = _Flow(level.clock)
        flow.tag = max(level.clock, flow.tag) + item.rows
        flow.waiting += 1
        level.waiting += 1
        self._waiting += 1
        self.rows += item.rows
        self._number += 1
        ticket = Ticket(item, level, flow.tag, self._number)
        self._line_up(ticket, item)
        timeout_s = level.policy.timeout_s
        until = item.deadline
        if timeout_s and (until is None or item.arrived + timeout_s < until):
            until = item.arrived + timeout_s
        if until is not None:
            heappush(self._timeouts, (until, ticket.number, ticket))
        self._sweep()
        return ticket

    def withdraw(self, ticket: Ticket[T]) -> None:
        """Forget a request whose caller has left; nothing happens if it is no longer here."""
        if ticket.item is not None:
            self._leave(ticket, ticket.item)
            self._sweep()

    def drain(self) -> Sequence[T]:
        """Empty the queue and return what was in it, in order of arrival."""
        tickets = {
            ticket.number: ticket
            for level in self._levels.values()
            for lane in level.lanes
            for heap in lane.values()
            for _, _, ticket in heap
        }
        left: list[T] = []
        for _, ticket in sorted(tickets.items()):
            if ticket.item is not None:
                left.append(ticket.item)
                self._leave(ticket, ticket.item)
        return left

    def take(self, now: float) -> Taken[T]:
        """Return the next batch and everything whose time is up.

        Requests whose caller has gone are dropped, so no engine time is spent on them.
        """
        expired, overdue = self._late(now)
        lanes = self._lanes()
        look_again: float | None = None
        for key in self._keys_in_turn(lanes):
            tickets, items, full = self._pick(lanes, key)
            count, due = self._leaving(items, full, now)
            for ticket, item in zip(tickets[count:], items[count:], strict=True):
                self._line_up(ticket, item)
            if count:
                del tickets[count:], items[count:]
                for ticket, item in zip(tickets, items, strict=True):
                    level = ticket.level
                    if ticket.tag > level.clock:
                        level.clock = ticket.tag
                    self._leave(ticket, item)
                return Taken(items, expired, overdue, None)
            if items:
                look_again = due if look_again is None else min(look_again, due)
        if look_again is not None and self._timeouts:
            look_again = min(look_again, self._timeouts[0][0])
        return Taken((), expired, overdue, look_again)

    def _leaving(self, items: Sequence[T], full: bool, now: float) -> tuple[int, float]:
        """Return how many of the requests that could share a batch leave now, else 0 and when.

        As Triton's dynamic batcher: a preferred size leaves at once, and without those beyond
        it, unless somebody has waited for the whole delay. Then, or when the batch cannot grow,
        everything leaves.
        """
        rules = self.rules
        if not items or not (rules.max_delay_s or rules.preferred):
            return len(items), now
        rows = preferred = 0
        for count, item in enumerate(items, 1):
            rows += item.rows
            if rows in rules.preferred:
                preferred = count
        due = min(_held_until(item, rules.max_delay_s) for item in items)
        late = bool(rules.max_delay_s) and due <= now
        if preferred and not late:
            return preferred, now
        enough = max(rules.preferred, default=rules.max_batch)
        if late or full or rows >= enough or not rules.max_delay_s:
            return len(items), now
        return 0, due

    def _keys_in_turn(self, lanes: _Lanes[T]) -> Iterable[Hashable]:
        """Return the keys that wait, each once, that of the first request first."""
        if len(lanes) == 1 and len(lanes[0][0]) == 1:  # as almost always
            return tuple(lanes[0][0])
        return self._sorted_keys(lanes)

    def _sorted_keys(self, lanes: _Lanes[T]) -> Iterator[Hashable]:
        # Lazily: a batch of the first key that leaves empties lanes, and is mostly the last.
        seen: set[Hashable] = set()
        for lane, delayed in lanes:
            keys = list(lane)
            if len(keys) > 1:
                for key in keys:
                    if self._head(lane, key, delayed) is None:
                        lane.pop(key, None)  # the last one may have taken the lane along
                keys = sorted(lane, key=lambda key: lane[key][0][:2])
            for key in keys:
                if key not in seen:
                    seen.add(key)
                    yield key

    def _pick(self, lanes: _Lanes[T], key: Hashable) -> tuple[list[Ticket[T]], list[T], bool]:
        """Take from the lanes what could share a batch, and return whether nothing more can."""
        tickets: list[Ticket[T]] = []
        items: list[T] = []
        room = self.rules.max_batch
        for lane, delayed in lanes:
            while (head := self._head(lane, key, delayed)) is not None:
                ticket, item = head
                if item.rows > room or (items and item.key != items[0].key):
                    return tickets, items, True
                heappop(lane[key])
                self._places -= 1
                room -= item.rows
                tickets.append(ticket)
                items.append(item)
            lane.pop(key, None)
            if room == 0:
                return tickets, items, True
        return tickets, items, False

    def _lanes(self) -> _Lanes[T]:
        """Return the lanes that somebody may stand in, in the order in which they are served."""
        if len(self._levels) == 1:
            (level,) = self._levels.values()
            first, second = level.lanes
            if not second:
                return ((first, False),) if first else ()
        return [
            (lane, delayed)
            for _, level in sorted(self._levels.items())
            for lane, delayed in zip(level.lanes, (False, True), strict=True)
            if lane
        ]

    def _head(self, lane: _Lane[T], key: Hashable, delayed: bool) -> tuple[Ticket[T], T] | None:
        """Return the first request of a lane's key; places without one are cleared on the way."""
        heap = lane.get(key)
        while heap:
            ticket = heap[0][2]
            item = ticket.item
            if item is not None and ticket.delayed is delayed:
                if not item.gone:
                    return ticket, item
                self._leave(ticket, item)
                if not ticket.level.waiting:
                    return None  # its lanes went with it
            heappop(heap)
            self._places -= 1
        return None

    def _late(self, now: float) -> tuple[list[T], list[T]]:
        """Take out whose time is up, and send to the end of its level who may be late."""
        expired: list[T] = []
        overdue: list[T] = []
        while self._timeouts and self._timeouts[0][0] <= now:
            ticket = heappop(self._timeouts)[2]
            item = ticket.item
            if item is None:
                continue
            has_expired = item.deadline is not None and item.deadline <= now
            if not has_expired and ticket.level.policy.delays:
                ticket.delayed = True
                self._line_up(ticket, item)
                if item.deadline is not None:
                    heappush(self._timeouts, (item.deadline, ticket.number, ticket))
                continue
            self._leave(ticket, item)
            if not item.gone:
                (expired if has_expired else overdue).append(item)
        self._sweep()
        return expired, overdue

    def _line_up(self, ticket: Ticket[T], item: T) -> None:
        lane = ticket.level.lanes[ticket.delayed]
        key = None if self.rules.ordered else item.key
        heappush(lane.setdefault(key, []), (ticket.tag, ticket.number, ticket))
        self._places += 1

    def _leave(self, ticket: Ticket[T], item: T) -> None:
        """Count a request no longer, and forget its caller and level if it was their last."""
        level = ticket.level
        ticket.item = None
        self._waiting -= 1
        self.rows -= item.rows
        caller = self._caller(item)
        flow = level.flows[caller]
        flow.waiting -= 1
        if not flow.waiting:
            # Its tag is behind the clock, or it had no service for it.
            del level.flows[caller]
        level.waiting -= 1
        if not level.waiting:
            for lane in level.lanes:
                if lane:
                    self._places -= sum(map(len, lane.values()))
                    lane.clear()
            level.clock = 0.0
            if len(self._levels) > 1:  # most queues have one level, and use it again
                del self._levels[item.level]

    def _caller(self, item: T) -> Hashable:
        return None if self.rules.ordered else item.caller

    def _sweep(self) -> None:
        """Clear the places that requests have left, once they are most of all places."""
        if len(self._timeouts) > 2 * self._waiting + SLACK:
            self._timeouts = [entry for entry in self._timeouts if entry[2].item is not None]
            heapify(self._timeouts)
        if self._places > 2 * self._waiting + SLACK:
            for lane, delayed in self._lanes():
                for key, heap in list(lane.items()):
                    kept = [e for e in heap if e[2].item is not None and e[2].delayed is delayed]
                    self._places -= len(heap) - len(kept)
                    heapify(kept)
                    if kept:
                        lane[key] = kept
                    else:
                        del lane[key]


def _held_until(item: Item, max_delay_s: float) -> float:
    """Return when a batch with this request leaves at the latest.

    A caller in a hurry is held for half of its time at most, or its deadline would pass here.
    """
    if item.deadline is not None:
        max_delay_s = min(max_delay_s, (item.deadline - item.arrived) / 2)
    return item.arrived + max_delay_s
