"""Rates and concurrency of one caller, with time as a number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.inference.limits import Account, Bucket

rates = st.floats(0.01, 1e5)
bursts = st.integers(1, 100)
gaps = st.lists(st.floats(0, 10), min_size=1, max_size=200)


@given(rates, bursts, gaps)
def test_no_window_sees_more_than_the_burst_and_the_rate(rate, burst, gaps):
    bucket = Bucket(rate, burst)
    now, admitted = 1000.0, []
    for gap in gaps:
        now += gap / rate
        if bucket.take(now) == 0:
            admitted.append(now)
    for at, first in enumerate(admitted):
        for count, last in enumerate(admitted[at:], 1):
            assert count <= burst + (last - first) * rate + 1e-3 + 2e-6 * rate


@given(rates, bursts, gaps)
def test_who_comes_back_when_told_is_let_in_and_not_much_earlier(rate, burst, gaps):
    bucket, now = Bucket(rate, burst), 1000.0
    for gap in gaps:
        now += gap / rate / 10
        wait_s = bucket.take(now)
        if wait_s:
            assert bucket.take(now + wait_s * 0.9 - 2e-6) > 0
            now += wait_s
            assert bucket.take(now) == 0


@given(bursts, st.floats(0.1, 1000))
def test_a_rested_bucket_is_full_and_not_fuller(burst, rate):
    bucket = Bucket(rate, burst)
    for start in (1000.0, 1e6):
        taken = [bucket.take(start) for _ in range(burst + 1)]
        assert taken[:-1] == [0] * burst
        assert taken[-1] == pytest.approx(1 / rate, rel=1e-3, abs=1e-5)


def test_without_a_burst_a_seconds_worth_may_come_at_once():
    account = Account(rate=3.0)
    assert [account.enter(1.0) is None for _ in range(4)] == [True, True, True, False]
    assert Account(rate=0.1).enter(1.0) is None


def test_only_as_many_requests_at_once_as_allowed_and_an_end_makes_room():
    account = Account(concurrency=2)
    assert account.enter(0.0) is None
    assert account.enter(0.0) is None
    refusal = account.enter(0.0)
    assert refusal.reason == "concurrency"
    assert refusal.retry_after_s > 0
    account.leave(0.4)
    assert account.enter(0.4) is None
    # With two places, one becomes free every 0.2 s.
    assert account.enter(0.4).retry_after_s == pytest.approx(0.2)


def test_a_request_refused_for_what_is_in_flight_costs_nothing_of_the_rate():
    account = Account(rate=1.0, burst=2, concurrency=1)
    assert account.enter(0.0) is None
    assert account.enter(0.0).reason == "concurrency"
    account.leave(0.0)
    assert account.enter(0.0) is None
    account.leave(0.0)
    assert account.enter(0.0).reason == "rate"


@given(st.lists(st.booleans(), max_size=100), st.integers(1, 5))
def test_in_flight_is_counted_exactly(steps, limit):
    account, flying = Account(concurrency=limit), 0
    for comes in steps:
        if comes:
            let_in = account.enter(0.0) is None
            assert let_in is (flying < limit)
            flying += let_in
        elif flying:
            account.leave(0.1)
            flying -= 1
        assert account.in_flight == flying
