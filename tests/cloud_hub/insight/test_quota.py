"""Who gives up examples: those that hold most, and no more than must be."""

from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.insight.quota import surplus

HELD = st.dictionaries(st.text(max_size=2), st.integers(0, 10_000), max_size=6)


@given(HELD, st.integers(0, 30_000))
def test_afterwards_all_keep_within_the_quota_and_hardly_less(held, quota):
    given_up = surplus(held, quota)
    left = {holder: size - given_up.get(holder, 0) for holder, size in held.items()}
    assert all(size >= 0 for size in left.values())
    assert sum(left.values()) <= max(quota, 0)
    if given_up:
        # Whole bytes of a level: at most one per holder is given up in vain.
        assert sum(left.values()) > quota - max(len(held), 1)


@given(HELD, st.integers(0, 30_000))
def test_nobody_gives_before_others_hold_as_little(held, quota):
    given_up = surplus(held, quota)
    for holder, size in given_up.items():
        left = held[holder] - size
        assert size > 0
        assert all(held[other] <= left for other in held if other not in given_up)
        assert all(held[other] - given_up[other] == left for other in given_up)


@given(HELD, st.integers(0, 30_000))
def test_within_its_equal_share_nobody_loses_anything(held, quota):
    given_up = surplus(held, quota)
    for holder, size in held.items():
        if size * len(held) <= quota:
            assert holder not in given_up


def test_one_alone_gives_what_is_over():
    assert surplus({"a": 120}, 100) == {"a": 20}
    assert surplus({"a": 100}, 100) == {}
    assert surplus({"a": 90, "b": 10}, 60) == {"a": 40}
