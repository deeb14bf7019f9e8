"""Ranges of shared memory: never given out twice, never lost."""

from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.front.arena import ALIGNMENT, Arena

SIZE = 64 * ALIGNMENT
steps = st.lists(
    st.one_of(
        st.integers(1, 20 * ALIGNMENT),  # take so much
        st.integers(0, 30).map(lambda index: -index - 1),  # give back the one at this index
    ),
    max_size=60,
)


@given(steps)
def test_no_byte_belongs_to_two_and_none_is_lost(steps):
    arena = Arena(SIZE)
    held = []
    for step in steps:
        if step < 0 and held:
            arena.give_back(*held.pop(-step % len(held)))
        elif step > 0 and (offset := arena.take(step)) is not None:
            for other, size in held:
                assert offset + step <= other or other + size <= offset
            assert 0 <= offset <= SIZE - step
            held.append((offset, step))
        pages = sum(-(-size // ALIGNMENT) for _, size in held)
        assert arena.free == SIZE - pages * ALIGNMENT
    for one in held:
        arena.give_back(*one)
    # Every neighbour was joined again: the whole is one gap.
    assert arena.take(SIZE) == 0


def test_there_is_no_room_for_more_than_there_is():
    arena = Arena(SIZE)
    assert arena.take(SIZE + 1) is None
    assert arena.take(SIZE) == 0
    assert arena.take(1) is None
