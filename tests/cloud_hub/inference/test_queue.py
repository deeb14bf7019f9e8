"""The rule for which requests leave together, with time as a number."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.inference.queue import Queue


@dataclass(eq=False)
class Item:
    rows: int = 1
    key: str = "a"
    deadline: float | None = None
    gone: bool = False


def queue_of(*items, max_batch=8):
    queue = Queue(max_batch)
    for item in items:
        queue.add(item)
    return queue


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


items = st.builds(
    Item,
    rows=st.integers(1, 8),
    key=st.sampled_from("ab"),
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
def test_requests_of_one_kind_keep_their_order(waiting):
    queue = queue_of(*waiting)
    order = {id(item): at for at, item in enumerate(waiting)}
    seen = {"a": [], "b": []}
    while len(queue):
        for item in queue.take(0.0).batch:
            seen[item.key].append(order[id(item)])
    assert seen["a"] == sorted(seen["a"])
    assert seen["b"] == sorted(seen["b"])
