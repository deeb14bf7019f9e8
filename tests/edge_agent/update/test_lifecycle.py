"""The table of an update's life keeps its promises, whatever happens in whatever order."""

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.update.lifecycle import (
    COUNTED,
    MAX_ATTEMPTS,
    PHASES,
    RESTING,
    SERVING_CANDIDATE,
    TRANSITIONS,
    Event,
    IllegalTransition,
    Life,
    State,
    step,
)

FLEET_PROTO_PHASES = {
    "accepted",
    "downloading",
    "verifying",
    "self-test",
    "shadow",
    "trial",
    "committed",
    "rolled-back",
    "rejected",
}


def reachable(start: State) -> set[State]:
    """Return every state that some events lead to; attempts run out at any time."""
    seen, queue = {start}, deque([start])
    while queue:
        state = queue.popleft()
        follows = set(TRANSITIONS[state].values())
        if State.WAITING in follows:
            follows.add(State.ROLLED_BACK if state is State.ROLLING_BACK else State.REJECTED)
        queue.extend(follows - seen)
        seen |= follows
    return seen


def test_every_state_can_be_reached_and_can_come_to_rest() -> None:
    assert reachable(State.IDLE) == set(State)
    for state in State:
        assert State.IDLE in reachable(state)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", [Event.BOOTED, Event.SUPERSEDED])
def test_every_state_survives_a_power_cut_and_a_newer_generation(state, event) -> None:
    assert event in TRANSITIONS[state]


@pytest.mark.parametrize("state", State)
def test_every_state_has_a_phase_that_the_hub_knows(state) -> None:
    assert PHASES[state] in FLEET_PROTO_PHASES
    assert Life(state).phase == PHASES[state]


def test_a_candidate_serves_only_after_it_was_fetched_verified_tested_and_shadowed() -> None:
    path = [State.IDLE, State.FETCHING, State.VERIFYING, State.TESTING, State.SHADOW]
    path += [State.TRIAL, State.PROBATION]
    for state, events in TRANSITIONS.items():
        for event, follows in events.items():
            if follows in path[1:] and event not in (Event.BOOTED,):
                forward = (state, event) == (path[path.index(follows) - 1], Event.DONE)
                first = follows is State.FETCHING and event is Event.WANTED
                assert forward or first, f"{event} leads from {state} to {follows}"


def test_only_probation_ends_in_a_commit() -> None:
    done = [state for state, events in TRANSITIONS.items() if events.get(Event.DONE) is State.IDLE]
    assert done == [State.PROBATION]


def test_only_what_was_fetched_can_turn_out_to_serve_already() -> None:
    renewed = {state for state, events in TRANSITIONS.items() if Event.RENEWED in events}
    assert renewed == {State.FETCHING}
    assert Life(State.FETCHING, 2).after(Event.RENEWED) == Life()


def test_a_candidate_that_serves_is_always_taken_back_before_anything_else() -> None:
    for state in SERVING_CANDIDATE:
        for event in set(TRANSITIONS[state]) - {Event.DONE}:
            assert TRANSITIONS[state][event] is State.ROLLING_BACK


@pytest.mark.parametrize(
    ("state", "counts"),
    [
        (State.FETCHING, False),
        (State.VERIFYING, True),
        (State.TESTING, True),
        (State.SHADOW, True),
        (State.TRIAL, True),
        (State.PROBATION, True),
        (State.ROLLING_BACK, False),
        (State.WAITING, False),
    ],
)
def test_a_restart_counts_from_the_moment_the_candidate_was_looked_at(state, counts) -> None:
    assert Life(state, 1).after(Event.BOOTED).failures == 1 + counts


def test_a_device_that_restarts_for_ever_gives_up_after_three_attempts() -> None:
    life = Life().after(Event.WANTED)
    served = 0
    while life.state not in RESTING:
        for _ in range(5):  # fetched, verified, tested, shadowed, tried
            life = life.after(Event.DONE)
        assert life.state is State.PROBATION
        served += 1
        life = life.after(Event.BOOTED).after(Event.DONE)
        if life.state is State.WAITING:
            life = life.after(Event.WANTED)
    assert (served, life) == (MAX_ATTEMPTS, Life(State.ROLLED_BACK, MAX_ATTEMPTS))


def test_an_outage_of_any_length_costs_no_attempt() -> None:
    life = Life(State.FETCHING)
    for _ in range(100):
        life = life.after(Event.INTERRUPTED).after(Event.WANTED)
    assert life == Life(State.FETCHING)


def test_a_power_cut_in_every_night_of_a_download_costs_no_attempt() -> None:
    life = Life(State.FETCHING)
    for _ in range(100):
        life = life.after(Event.BOOTED)
    assert life == Life(State.FETCHING)


def test_a_candidate_that_is_wrong_is_rejected_at_once() -> None:
    assert Life(State.TESTING).after(Event.REFUSED) == Life(State.REJECTED, 1)


def test_a_quarantine_ends_with_a_newer_generation_and_every_attempt_is_there_again() -> None:
    for state in (State.REJECTED, State.ROLLED_BACK):
        assert Event.WANTED not in TRANSITIONS[state]
        assert Life(state, MAX_ATTEMPTS).after(Event.SUPERSEDED) == Life(State.IDLE, 0)


@pytest.mark.parametrize(
    ("life", "attempt"),
    [
        (Life(), 0),
        (Life(State.FETCHING), 1),
        (Life(State.WAITING, 1), 2),
        (Life(State.PROBATION, 2), 3),
        (Life(State.ROLLING_BACK, 3), 3),
        (Life(State.ROLLING_BACK, 0), 1),  # superseded
        (Life(State.REJECTED, 1), 1),
    ],
)
def test_attempts_are_numbered_from_one(life, attempt) -> None:
    assert life.attempt == attempt


def test_only_listed_rows_are_counted() -> None:
    for event, states in COUNTED.items():
        for state in states:
            assert event in TRANSITIONS[state]


@given(st.lists(st.sampled_from(Event), max_size=60))
def test_an_illegal_event_changes_nothing_and_three_failures_end_a_generation(events) -> None:
    life = Life()
    for event in events:
        try:
            following = life.after(event)
        except IllegalTransition:
            with pytest.raises(
                IllegalTransition, match=f"{event} cannot happen while {life.state}"
            ):
                step(life.state, event)
            continue
        assert 0 <= following.failures <= MAX_ATTEMPTS
        if following.failures == MAX_ATTEMPTS:
            assert following.state in {State.ROLLING_BACK, State.REJECTED, State.ROLLED_BACK}
        if following.state in (State.IDLE,):
            assert following.failures == 0
        life = following
