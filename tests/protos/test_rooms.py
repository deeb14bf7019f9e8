"""Room is given out in turn and never beyond its limit, and messages in pieces take little of it."""

import gzip
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fogline_protocol.door_memory import Turn
from fogline_protocol.errors import BadRequest, Overloaded
from fogline_protocol.grpc_messages import Message, unpacked
from fogline_protocol.rooms import Pool, Room

LIMIT = 100
steps = st.lists(
    st.tuples(st.just("ask"), st.integers(0, 150))
    | st.tuples(st.just("release"), st.integers(0, 20))
    | st.tuples(st.just("resize"), st.integers(0, 20), st.integers(0, 50))
    | st.tuples(st.just("take"), st.integers(0, 150))
    | st.tuples(st.just("put"), st.just(0)),
    min_size=20,
    max_size=60,
)


def endless():
    return Pool(1 << 60, lambda: None)


@given(steps)
def test_room_is_never_given_out_twice_and_always_in_the_order_of_asking(steps):
    room, leases, came, left, taken = Room(LIMIT, endless(), None), [], [], set(), []
    for step in steps:
        match step:
            case ("ask", size):
                number = len(leases)
                leases.append(room.lease(size, lambda number=number: came.append(number)))
            case ("release", number) if number < len(leases):
                leases[number].release()
                left.add(number)
            case ("resize", number, size) if number < len(leases):
                leases[number].resize(min(size, leases[number].size))
            case ("take", size):
                waits = any(not lease.had for n, lease in enumerate(leases) if n not in left)
                if room.take(size):
                    assert not waits
                    taken.append(size)
            case ("put", _) if taken:
                room.put(taken.pop())
        had = [lease for lease in leases if lease.had]
        assert room.used == sum(lease.size for lease in had) + sum(taken)
        # Whoever is larger than all of it is there without anybody else who takes any.
        sizes = [*(lease.size for lease in had), *taken]
        assert room.used <= LIMIT or sum(size > 0 for size in sizes) == 1
        assert came == sorted(came)
        assert len(set(came)) == len(came)
        waiting = [n for n, lease in enumerate(leases) if not lease.had and n not in left]
        if waiting:  # for a reason
            assert room.used + leases[waiting[0]].size > LIMIT
            assert room.used
    for lease in leases:
        lease.release()
        lease.release()
    for size in taken:
        room.put(size)
    assert room.used == 0


PEERS = 4  # of two addresses
pool_steps = st.lists(
    st.tuples(st.just("ask"), st.integers(0, PEERS - 1), st.integers(0, 150))
    | st.tuples(st.just("release"), st.integers(0, 20), st.just(0))
    | st.tuples(st.just("take"), st.integers(0, PEERS - 1), st.integers(0, 60))
    | st.tuples(st.just("hold"), st.integers(0, 20), st.just(0))
    | st.tuples(st.just("drop"), st.just(0), st.just(0)),
    min_size=20,
    max_size=80,
)


@given(pool_steps)
def test_what_all_rooms_have_together_stays_within_the_pool_and_nobody_waits_without_reason(steps):
    waits = []
    pool = Pool(200, lambda: waits.append(True))
    rooms = [Room(LIMIT, pool, peer % 2) for peer in range(PEERS)]
    leases, left, taken, held = [], set(), [], []
    for kind, at, size in steps:
        if kind == "ask":
            leases.append((rooms[at], rooms[at].lease(size, lambda: None)))
        elif kind == "release" and at < len(leases):
            leases[at][1].release()
            left.add(at)
        elif kind == "take" and rooms[at].take(size):
            taken.append((rooms[at], size))
        elif kind == "hold":
            pool.hold(at)
            held.append(at)
        elif kind == "drop" and held:
            pool.drop(held.pop())
        lent = [lease.size for _, lease in leases if lease.had] + [size for _, size in taken]
        assert pool.used == sum(lent) + sum(held)
        assert sum(lent) <= pool.lendable or sum(size > 0 for size in lent) == 1
        wanted = []  # from the pool
        for room in rooms:
            mine = [lease for owner, lease in leases if owner is room]
            sizes = [lease.size for lease in mine if lease.had]
            sizes += [size for owner, size in taken if owner is room]
            assert room.used == sum(sizes)
            assert room.used <= LIMIT or sum(size > 0 for size in sizes) == 1
            asking = [
                lease.size
                for n, (owner, lease) in enumerate(leases)
                if owner is room and n not in left and not lease.had
            ]
            if asking and (not room.used or room.used + asking[0] <= LIMIT):
                wanted.append(asking[0])  # it waits for the pool, not for itself
        assert pool.waiting == len(wanted)
        if wanted:
            assert waits
            # Whoever is next among them does not fit, so the largest does not.
            assert sum(lent) > 0
            most = max(wanted)
            assert sum(lent) + most > pool.lendable or pool.used + most > pool.limit
    for _, lease in leases:
        lease.release()
    for room, size in taken:
        room.put(size)
    for size in held:
        pool.drop(size)
    assert pool.used == pool.waiting == 0


def test_who_stops_waiting_for_the_pool_leaves_its_turn_only_to_who_fits_the_room_too():
    pool = Pool(400, lambda: None)
    assert Room(LIMIT * 4, pool, "others").take(240)
    room = Room(LIMIT, pool, "a")
    assert room.take(50)
    queued, behind = room.lease(40, lambda: None), room.lease(80, lambda: None)
    assert pool.waiting == 1
    queued.release()
    assert not pool.waiting  # 80 wait for the room itself
    pool.back(240)
    assert (room.used, behind.had) == (50, False)
    room.put(50)
    assert behind.had


def test_who_stops_waiting_for_the_pool_lets_those_in_who_ask_for_less():
    pool = Pool(LIMIT, lambda: None)
    assert Room(LIMIT, pool, "others").take(50)
    room = Room(LIMIT, pool, "a")
    much, little = room.lease(40, lambda: None), room.lease(20, lambda: None)
    other = Room(LIMIT, pool, "b").lease(5, lambda: None)
    assert (little.had, other.had, pool.waiting) == (False, False, 2)
    much.release()
    assert (little.had, other.had, pool.waiting) == (True, True, 0)


def test_addresses_take_turns_however_many_rooms_one_of_them_has():
    pool, came = Pool(LIMIT, lambda: None), []
    first = Room(LIMIT, pool, "crowd").lease(60, lambda: None)
    for number in range(5):
        Room(LIMIT, pool, "crowd").lease(60, lambda number=number: came.append(number))
    Room(LIMIT, pool, "alone").lease(60, lambda: came.append("alone"))
    first.release()
    assert came == [0]  # it asked first
    # Then it is the other address's turn.
    pool.back(60)
    assert came == [0, "alone"]


def test_who_comes_with_little_finds_the_last_quarter_of_a_pool():
    pool = Pool(LIMIT, lambda: None)
    much = Room(LIMIT, pool, "a")
    assert much.take(75)
    assert not much.take(5)
    pool.hold(25)
    assert not pool.full
    pool.hold(1)
    assert pool.full


def test_who_asks_for_little_does_not_pass_who_asked_for_much_before():
    room = Room(LIMIT, endless(), None)
    first, much, little = (room.lease(size, lambda: None) for size in (60, 60, 1))
    assert (first.had, much.had, little.had) == (True, False, False)
    assert not room.take(1)
    much.release()  # it does not wait any longer
    assert little.had


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_message_in_tiny_pieces_takes_little_more_than_its_bytes(size):
    data = bytes(range(256)) * 800
    whole = b"\0" + len(data).to_bytes(4, "big") + data
    message = Message()
    told = [message.add(whole[at : at + size]) for at in range(0, len(whole), size)]
    assert sum(told) == 1
    assert message.expected == message.have == len(data)
    assert sum(map(sys.getsizeof, message.pieces)) < 1.3 * len(data)
    assert b"".join(message.pieces) == data


def test_what_does_not_begin_like_a_message_is_refused_at_its_first_five_bytes():
    message = Message()
    assert not message.add(b"\2\0\0\0")
    with pytest.raises(BadRequest, match="begins with 0 or 1"):
        message.add(b"\0")


async def test_a_message_that_unpacks_to_a_thousand_times_its_size_is_not_unpacked_to_the_end():
    bomb = gzip.compress(bytes(16 << 20))
    assert len(bomb) < 1 << 15
    tracemalloc.start()
    try:
        with pytest.raises(Overloaded, match="once it was unpacked"):
            await unpacked(Turn(Room(1 << 20, endless(), None), 1 << 20), bomb, "gzip", 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()
