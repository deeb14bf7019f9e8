import bisect
import heapq
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.inference.breaker import CLOSED, DEFAULT, Breaker, Event, State, Tuning, step

events = st.lists(
    st.tuples(st.sampled_from(Event), st.floats(0, 10), st.floats(0.5, 1)), max_size=60
)


def after(*happened: Event, start: Breaker = CLOSED, tuning: Tuning = DEFAULT) -> Breaker:
    breaker = start
    for second, event in enumerate(happened):
        breaker = step(breaker, event, float(second), draw=1.0, tuning=tuning)
    return breaker


FAILED, SUCCEEDED = Event.FAILED, Event.SUCCEEDED
GOOD, BAD = Event.PROBE_GOOD, Event.PROBE_BAD
PUSHED_BACK = Event.PUSHED_BACK
OPEN = after(FAILED, FAILED)


@pytest.mark.parametrize(
    ("happened", "state", "failures", "good"),
    [
        ([], State.CLOSED, 0, 0),
        ([SUCCEEDED], State.CLOSED, 0, 0),
        ([FAILED], State.CLOSED, 1, 0),
        ([FAILED, SUCCEEDED, FAILED], State.CLOSED, 1, 0),
        ([FAILED, FAILED], State.OPEN, 0, 0),
        ([FAILED, BAD], State.OPEN, 0, 0),
        ([FAILED, GOOD, FAILED], State.CLOSED, 1, 0),
        ([FAILED, FAILED, SUCCEEDED], State.OPEN, 0, 0),
        ([FAILED, FAILED, FAILED], State.OPEN, 0, 0),
        ([FAILED, FAILED, GOOD], State.HALF_OPEN, 0, 1),
        ([FAILED, FAILED, GOOD, SUCCEEDED], State.HALF_OPEN, 0, 1),
        ([FAILED, FAILED, GOOD, FAILED], State.HALF_OPEN, 0, 1),
        ([FAILED, FAILED, GOOD, GOOD, GOOD], State.HALF_OPEN, 0, 3),
        ([FAILED, FAILED, GOOD, GOOD, GOOD, BAD], State.OPEN, 0, 0),
        ([FAILED, FAILED, GOOD, GOOD, GOOD, GOOD], State.CLOSED, 0, 0),
    ],
)
def test_the_table_of_transitions(
    happened: Sequence[Event], state: State, failures: int, good: int
) -> None:
    found = after(*happened)
    assert (found.state, found.failures, found.good) == (state, failures, good)


def test_one_failure_opens_a_breaker_that_has_never_seen_the_hub() -> None:
    assert after(FAILED, start=Breaker()).state is State.OPEN
    assert after(SUCCEEDED, FAILED, start=Breaker()).closed


def test_the_wait_between_bad_probes_doubles_to_its_limit() -> None:
    breaker, waits = OPEN, [OPEN.wait_s]
    for _ in range(6):
        breaker = step(breaker, BAD, 100.0, draw=1.0)
        waits.append(breaker.wait_s)
    assert waits == [0.25, 0.5, 1.0, 2.0, 4.0, 4.0, 4.0]


def test_a_fleet_does_not_knock_in_step() -> None:
    assert step(OPEN, BAD, 100.0, draw=0.5).probe_at == 100.25
    assert step(OPEN, BAD, 100.0, draw=1.0).probe_at == 100.5


def test_good_probes_keep_a_fixed_gap() -> None:
    assert step(OPEN, GOOD, 100.0, draw=0.5).probe_at == 100.0 + DEFAULT.gap_s


def test_closing_forgets_the_back_off() -> None:
    closed = after(BAD, BAD, BAD, *[GOOD] * DEFAULT.good_probes, start=OPEN)
    assert closed == CLOSED
    assert after(FAILED, FAILED, start=closed).wait_s == DEFAULT.first_wait_s


@given(events)
def test_a_probe_is_due_exactly_while_it_is_not_closed(
    happened: list[tuple[Event, float, float]],
) -> None:
    breaker, now = Breaker(), 0.0
    for event, seconds, draw in happened:
        now += seconds
        breaker = step(breaker, event, now, draw=draw)
        assert (breaker.probe_at is None) == breaker.closed
        if event is BAD and breaker.probe_at is not None:
            assert now < breaker.probe_at <= now + DEFAULT.max_wait_s


@given(events)
def test_it_can_always_close_again(happened: list[tuple[Event, float, float]]) -> None:
    breaker = Breaker()
    for event, _, draw in happened:
        breaker = step(breaker, event, 0.0, draw=draw)
    assert after(*[GOOD] * DEFAULT.good_probes, start=breaker).closed


@given(events)
def test_results_of_escalations_change_nothing_unless_it_is_closed(
    happened: list[tuple[Event, float, float]],
) -> None:
    breaker = Breaker()
    for event, seconds, draw in happened:
        following = step(breaker, event, seconds, draw=draw)
        if not breaker.closed and event in (SUCCEEDED, FAILED):
            assert following == breaker
        breaker = following


def test_nothing_leaves_until_the_hub_wants_to_be_asked_again() -> None:
    breaker = step(CLOSED, PUSHED_BACK, 10.0, draw=1.0, pause_s=2.0)
    assert (breaker.closed, breaker.failures) == (True, 1)
    assert [breaker.lets_through(at) for at in (10.0, 11.9, 12.0)] == [False, False, True]
    # What had left before is refused too: that is no second failure, but may prolong the pause.
    again = step(breaker, PUSHED_BACK, 10.1, draw=1.0, pause_s=3.0)
    assert (again.closed, again.failures, again.quiet_until) == (True, 1, 13.1)
    # An answer to what left before ends no pause.
    assert not step(again, SUCCEEDED, 10.2, draw=1.0).lets_through(13.0)
    assert step(again, SUCCEEDED, 10.2, draw=1.0).failures == 0


def test_a_hub_that_pushes_back_again_after_the_pause_opens_the_breaker() -> None:
    breaker = step(CLOSED, PUSHED_BACK, 10.0, draw=1.0, pause_s=2.0)
    breaker = step(breaker, PUSHED_BACK, 12.5, draw=1.0, pause_s=2.0)
    assert breaker.state is State.OPEN
    closed = after(*[GOOD] * DEFAULT.good_probes, start=breaker)
    assert closed.closed
    assert [closed.lets_through(at) for at in (14.0, 14.5)] == [False, True]


def test_no_hint_silences_a_device_for_good() -> None:
    breaker = step(CLOSED, PUSHED_BACK, 10.0, draw=1.0, pause_s=1e12)
    assert breaker.lets_through(10.0 + DEFAULT.max_pause_s)


@given(st.lists(st.tuples(st.sampled_from(Event), st.floats(0, 2), st.floats(0, 5)), max_size=60))
def test_no_event_shortens_a_pause(happened: list[tuple[Event, float, float]]) -> None:
    breaker, now, until = Breaker(), 0.0, 0.0
    for event, seconds, pause_s in happened:
        now += seconds
        breaker = step(breaker, event, now, draw=1.0, pause_s=pause_s)
        if event is PUSHED_BACK:
            until = max(until, now + pause_s)
        assert not breaker.lets_through(now) or now >= until


@dataclass(slots=True)
class Figures:
    flips_per_minute: float
    failed_per_thousand: float
    mean_wait_ms: float
    share_of_possible: float


def simulated(seed: int, tuning: Tuning) -> Figures:
    """One hour: link up 20 s, down 3 s (exponential), 2.2 escalations a second, RTT 60 ms.

    An escalation fails after 150 ms, half of a deadline of 300 ms, unless the link was up for
    its whole round trip; a bad probe takes 300 ms.
    """
    draw = random.Random(seed)
    hour, round_trip = 3600.0, 0.060
    edges = list(
        itertools.takewhile(
            lambda at: at < hour,
            itertools.accumulate(
                draw.expovariate(1 / mean) for mean in itertools.cycle((20.0, 3.0))
            ),
        )
    )

    def passes(at: float) -> bool:
        index = bisect.bisect(edges, at)
        return index % 2 == 0 and index == bisect.bisect(edges, at + round_trip)

    breaker, results, probing = CLOSED, [(0.0, 0, SUCCEEDED)], False
    wanted = failed = made = possible = flips = 0
    numbers = itertools.count(1)
    arrival = draw.expovariate(2.2)
    while arrival < hour:
        probe_at = breaker.probe_at if breaker.probe_at is not None and not probing else hour
        result_at = results[0][0] if results else hour
        now = min(arrival, probe_at, result_at)
        if now == result_at and results:
            _, _, event = heapq.heappop(results)
            probing = probing and event in (SUCCEEDED, FAILED)
            following = step(breaker, event, now, draw=draw.uniform(0.5, 1), tuning=tuning)
            flips += breaker.closed != following.closed
            breaker = following
        elif now == arrival:
            arrival += draw.expovariate(2.2)
            wanted += 1
            possible += passes(now)
            if breaker.closed and passes(now):
                made += 1
                heapq.heappush(results, (now + round_trip, next(numbers), SUCCEEDED))
            elif breaker.closed:
                failed += 1
                heapq.heappush(results, (now + 0.150, next(numbers), FAILED))
        else:
            probing = True
            took, event = (round_trip, GOOD) if passes(now) else (0.300, BAD)
            heapq.heappush(results, (now + took, next(numbers), event))
    return Figures(flips / 60, 1000 * failed / wanted, 150 * failed / wanted, made / possible)


def test_a_flapping_link_costs_few_failures_and_few_lost_escalations() -> None:
    """Goal G4 of escalation.md, 13, on our scenario: flips and escalations are met, failures
    (30 per 1,000) and wait (5 ms) are missed by a sixth: two per outage are the price of not
    opening at the first, and there are 2.6 outages a minute."""
    runs = [simulated(seed, DEFAULT) for seed in range(5)]
    assert sum(run.flips_per_minute for run in runs) / 5 <= 4.0
    assert sum(run.failed_per_thousand for run in runs) / 5 <= 37
    assert sum(run.mean_wait_ms for run in runs) / 5 <= 5.6
    assert sum(run.share_of_possible for run in runs) / 5 >= 0.93
