"""The rule for which requests leave together and in whose turn, with time as a number."""

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cloud_hub.inference.queue import SLACK, Policy, Queue, Rules


@dataclass(eq=False)
class Item:
    rows: int = 1
    key: str = "a"
    caller: str = "x"
    level: int = 1
    arrived: float = 0.0
    deadline: float | None = None
    gone: bool = False


def queue_of(*items, max_batch=8, **rules):
    queue = Queue(Rules(max_batch, **rules))
    for item in items:
        queue.add(item)
    return queue


def batches(queue, now=0.0):
    while len(queue):
        yield list(queue.take(now).batch)


def test_what_is_queued_leaves_up_to_the_largest_batch():
    items = [Item() for _ in range(10)]
    queue = queue_of(*items)
    assert list(queue.take(0).batch) == items[:8]
    assert list(queue.take(0).batch) == items[8:]
    assert queue.rows == 0


def test_only_requests_of_one_kind_share_a_batch_and_the_oldest_decides_which():
    first, other, second = Item(key="a"), Item(key="b"), Item(key="a")
    queue = queue_of(first, other, second)
    assert list(queue.take(0).batch) == [first, second]
    assert list(queue.take(0).batch) == [other]


def test_a_large_request_is_not_overtaken_by_small_ones_of_its_kind():
    small, large, later = Item(rows=5), Item(rows=6), Item(rows=1)
    queue = queue_of(small, large, later)
    assert list(queue.take(0).batch) == [small]
    assert list(queue.take(0).batch) == [large, later]


def test_expired_requests_go_back_and_those_whose_caller_has_gone_vanish():
    late, gone, good = Item(deadline=1.0), Item(gone=True), Item(deadline=3.0)
    taken = queue_of(late, gone, good).take(2.0)
    assert list(taken.expired) == [late]
    assert list(taken.batch) == [good]


def test_time_runs_out_deep_in_the_queue_too():
    late = Item(deadline=1.0)
    queue = queue_of(*(Item() for _ in range(20)), late)
    assert list(queue.take(1.0).expired) == [late]


def test_a_caller_with_thousands_of_rows_waiting_delays_another_by_its_turn_only():
    crowd = [Item(caller="heavy") for _ in range(5000)]
    queue = queue_of(*crowd)
    queue.take(0)
    guest = Item(caller="light")
    queue.add(guest)
    assert guest in queue.take(0).batch
    assert len(queue) == 5000 - 8 - 7


def test_callers_who_are_always_there_get_the_same_number_of_rows():
    queue = queue_of(
        *(Item(rows=4, caller="large requests") for _ in range(400)),
        *(Item(rows=1, caller="small requests") for _ in range(1600)),
    )
    served = {"large requests": 0, "small requests": 0}
    for _ in range(100):
        for item in queue.take(0).batch:
            served[item.caller] += item.rows
    assert abs(served["large requests"] - served["small requests"]) <= 8


def test_a_caller_saves_no_turns_while_it_waits():
    first, newcomer, second = (Item(key="b", caller=c) for c in ("x", "z", "x"))
    queue = queue_of(*(Item(caller="y") for _ in range(8)), first)
    queue.take(0)
    queue.add(newcomer)
    queue.add(second)
    assert list(queue.take(0).batch) == [first, newcomer, second]


def test_a_caller_who_withdrew_its_requests_is_not_charged_for_them():
    queue = queue_of(*(Item(caller="patient") for _ in range(100)))
    tickets = [queue.add(Item(caller="fickle")) for _ in range(1000)]
    for ticket in tickets:
        queue.withdraw(ticket)
        queue.withdraw(ticket)  # once is enough
    assert (len(queue), queue.rows) == (100, 100)
    again = Item(caller="fickle")
    queue.add(again)
    assert again in queue.take(0).batch


def test_requests_that_come_and_leave_while_the_engine_hangs_fill_no_memory():
    queue = queue_of(Item())
    for _ in range(10_000):
        queue.withdraw(queue.add(Item(deadline=1e9)))
    assert queue._places <= 2 + SLACK
    assert len(queue._timeouts) <= 2 + SLACK


def test_a_higher_priority_leads_and_spare_room_goes_to_the_lower_ones():
    low = [Item(level=2) for _ in range(10)]
    high = [Item(level=1, rows=3) for _ in range(2)]
    queue = queue_of(*low, *high)
    assert list(queue.take(0).batch) == [*high, *low[:2]]
    assert list(queue.take(0).batch) == low[2:]


def test_a_request_that_waited_longer_than_the_policy_allows_is_refused_or_comes_last():
    first = Item(arrived=0.0)
    assert list(queue_of(first, default_policy=Policy(1.0)).take(1.0).overdue) == [first]
    late, intime, low = Item(arrived=0.0), Item(arrived=0.5), Item(level=2, arrived=0.5)
    queue = queue_of(late, intime, low, max_batch=1, default_policy=Policy(1.0, delays=True))
    assert list(batches(queue, 1.0)) == [[intime], [late], [low]]


def test_a_delayed_request_still_has_its_deadline():
    late = Item(deadline=2.0)
    queue = queue_of(late, default_policy=Policy(1.0, delays=True), max_delay_s=9.0)
    assert not queue.take(0.5).batch
    queue.add(Item(key="b", arrived=1.5))  # and is not forgotten in its lane
    assert list(queue.take(2.0).expired) == [late]
    assert queue.rows == 1


def test_each_level_has_a_policy_of_its_own():
    policies = {1: Policy(max_requests=2), 2: Policy(max_requests=1)}
    queue = queue_of(Item(), policies=policies)
    assert not queue.is_full(1)
    queue.add(Item())
    assert queue.is_full(1)
    assert not queue.is_full(2)
    assert not queue.is_full(3)  # the default policy has no limit


def test_a_batch_is_held_for_company_until_it_is_full_or_the_delay_is_over():
    queue = queue_of(Item(arrived=1.0), max_delay_s=0.5)
    taken = queue.take(1.0)
    assert (taken.batch, taken.look_again) == ((), 1.5)
    queue.add(Item(arrived=1.2))
    assert queue.take(1.4).look_again == 1.5
    assert len(queue.take(1.5).batch) == 2
    assert queue.take(1.5).look_again is None
    for _ in range(8):
        queue.add(Item(arrived=2.0))
    assert len(queue.take(2.0).batch) == 8


def test_a_caller_in_a_hurry_is_held_for_half_of_its_time_at_most():
    queue = queue_of(Item(arrived=1.0, deadline=1.2), max_delay_s=5.0)
    assert queue.take(1.0).look_again == pytest.approx(1.1)
    assert queue.take(1.11).batch


def test_while_one_kind_is_held_a_full_batch_of_another_leaves():
    full = [Item(key="b", arrived=1.0) for _ in range(8)]
    queue = queue_of(Item(key="a", arrived=0.9), *full, max_delay_s=1.0)
    assert list(queue.take(1.0).batch) == full
    assert queue.take(1.0).look_again == 1.9


def test_a_preferred_size_leaves_at_once_and_alone():
    queue = queue_of(*(Item() for _ in range(7)), preferred=(2, 4), max_delay_s=1.0)
    assert len(queue.take(0.0).batch) == 4
    assert len(queue.take(0.0).batch) == 2
    assert not queue.take(0.0).batch
    assert len(queue.take(1.0).batch) == 1
    greedy = queue_of(*(Item() for _ in range(7)), preferred=(4,))
    assert [len(batch) for batch in batches(greedy)] == [4, 3]


def test_an_ordered_queue_knows_neither_callers_nor_gaps():
    items = [Item(caller="x"), Item(caller="x"), Item(caller="y"), Item(key="b"), Item()]
    queue = queue_of(*items, ordered=True)
    assert list(batches(queue)) == [items[:3], items[3:4], items[4:]]


items = st.builds(
    Item,
    rows=st.integers(1, 8),
    key=st.sampled_from("ab"),
    caller=st.sampled_from("xyz"),
    level=st.integers(1, 3),
    deadline=st.none() | st.floats(0, 10),
    gone=st.booleans(),
)


@given(st.lists(items, max_size=30), st.floats(0, 10))
def test_every_request_leaves_exactly_once_in_a_batch_that_fits(waiting, now):
    queue = queue_of(*waiting)
    out = []
    while len(queue):
        taken = queue.take(now)
        assert sum(item.rows for item in taken.batch) <= 8
        assert len({item.key for item in taken.batch}) <= 1
        assert all(item.deadline is None or item.deadline > now for item in taken.batch)
        assert all(item.deadline <= now for item in taken.expired)
        assert not any(item.gone for item in taken.batch)
        out += [*taken.batch, *taken.expired]
    assert len(out) == len(set(map(id, out)))
    assert set(map(id, out)) == {id(item) for item in waiting if not item.gone}
    assert queue.rows == 0


@given(st.lists(items, max_size=30))
def test_requests_of_one_kind_and_caller_keep_their_order(waiting):
    order = {id(item): at for at, item in enumerate(waiting)}
    queue = queue_of(*waiting)
    seen = {}
    while len(queue):
        for item in queue.take(-1.0).batch:
            seen.setdefault((item.key, item.caller, item.level), []).append(order[id(item)])
    assert all(found == sorted(found) for found in seen.values())


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 8)), max_size=80),
    st.integers(0, 5),
    st.integers(1, 8),
)
def test_a_newcomer_waits_for_its_share_of_the_others_only(crowd, before, rows):
    queue = queue_of(*(Item(caller=caller, rows=size) for caller, size in crowd))
    for _ in range(before):
        queue.take(0)
    newcomer = Item(caller="newcomer", rows=rows)
    queue.add(newcomer)
    ahead = {}
    while True:
        batch = list(queue.take(0).batch)
        for item in batch[: batch.index(newcomer)] if newcomer in batch else batch:
            ahead[item.caller] = ahead.get(item.caller, 0) + item.rows
        if newcomer in batch:
            break
    # Of every other caller: as many rows as its own, and one request of at most 8.
    assert all(found <= rows + 8 for found in ahead.values())


@given(st.lists(items, min_size=1, max_size=30))
def test_no_engine_goes_idle_and_no_batch_leaves_room_that_the_next_request_would_fill(waiting):
    for item in waiting:
        item.gone, item.deadline, item.key, item.level = False, None, "a", 1
    queue = queue_of(*waiting)
    taken = list(batches(queue))
    assert all(taken)
    for batch, following in itertools.pairwise(taken):
        assert sum(item.rows for item in batch) + following[0].rows > 8


class QueueMachine(RuleBasedStateMachine):
    """Adding, withdrawing, expiring and taking in any order, against plain lists."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.queue = Queue(
            Rules(
                8,
                max_delay_s=0.5,
                preferred=(4,),
                policies={1: Policy(2.0), 2: Policy(1.0, delays=True)},
            )
        )
        self.waiting = []  # (item, ticket)

    @rule(item=items, patience=st.none() | st.floats(0.1, 5))
    def add(self, item, patience):
        item.arrived = self.now
        item.deadline = None if patience is None else self.now + patience
        item.gone = False
        self.waiting.append((item, self.queue.add(item)))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data):
        item, ticket = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        item.gone = True
        self.queue.withdraw(ticket)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave_silently(self, data):
        data.draw(st.sampled_from(self.waiting))[0].gone = True

    @rule(seconds=st.floats(0, 1))
    def take(self, seconds):
        self.now += seconds
        taken = self.queue.take(self.now)
        gone = {id(item) for item in (*taken.batch, *taken.expired, *taken.overdue)}
        assert gone <= {id(item) for item, _ in self.waiting if not item.gone}
        assert len(gone) == len(taken.batch) + len(taken.expired) + len(taken.overdue)
        assert sum(item.rows for item in taken.batch) <= 8
        if not taken.batch and any(not item.gone for item, _ in self.waiting):
            held = [item for item, _ in self.waiting if id(item) not in gone and not item.gone]
            assert not held or self.now < taken.look_again <= self.now + 0.5
        self.waiting = [
            (item, ticket)
            for item, ticket in self.waiting
            if id(item) not in gone and (not item.gone or ticket.item is not None)
        ]

    @rule()
    def drain(self):
        left = self.queue.drain()
        assert list(map(id, left)) == [id(item) for item, _ in self.waiting]
        self.waiting.clear()

    @invariant()
    def counts_are_exact(self):
        assert len(self.queue) == len(self.waiting)
        assert self.queue.rows == sum(item.rows for item, _ in self.waiting)
        places = sum(
            len(heap)
            for level in self.queue._levels.values()
            for lane in level.lanes
            for heap in lane.values()
        )
        assert self.queue._places == places
        assert len(self.queue._levels) <= max(1, len({item.level for item, _ in self.waiting}) + 1)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=60, stateful_step_count=40)
