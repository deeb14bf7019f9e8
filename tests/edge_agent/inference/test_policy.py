import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.inference.policy import (
    Decision,
    Mode,
    Quality,
    Reason,
    Situation,
    Terms,
    decide,
    decide_rows,
    hub_leg_s,
    worst,
)

scores = st.one_of(
    st.floats(0, 1, width=32), st.sampled_from([0.0, 0.5, 1.0, math.nan, math.inf, -math.inf])
)
thresholds = st.one_of(st.floats(0, 1, width=32), st.sampled_from([math.nan, math.inf, -math.inf]))
all_terms = st.builds(Terms, paired=st.booleans(), certified=thresholds, operating=thresholds)
situations = st.builds(
    Situation,
    mode=st.sampled_from(Mode),
    private=st.booleans(),
    link_up=st.booleans(),
    time_left_s=st.floats(-1, 10),
    round_trip_s=st.floats(0, 5),
)

CERTIFIED = Terms(True, 0.9)
NO_CERTIFICATE = Terms(True)
UNPAIRED = Terms(False)
FINE = Situation(Mode.PREFER_EDGE, private=False, link_up=True, time_left_s=1.0, round_trip_s=0.1)


def situation(**changes: Any) -> Situation:
    return FINE._replace(**changes)


@pytest.mark.parametrize(
    ("score", "terms", "at", "expected"),
    [
        (0.95, CERTIFIED, FINE, "edge certified confident"),
        (0.90, CERTIFIED, FINE, "hub hub uncertain"),  # the threshold itself is not above it
        (0.10, CERTIFIED, FINE, "hub hub uncertain"),
        (math.nan, CERTIFIED, FINE, "hub hub uncertain"),
        (0.10, CERTIFIED, situation(link_up=False), "edge degraded link"),
        (0.95, CERTIFIED, situation(link_up=False), "edge certified confident"),
        (0.10, CERTIFIED, situation(time_left_s=0.14), "edge degraded deadline"),
        (0.10, CERTIFIED, situation(time_left_s=0.16), "hub hub uncertain"),
        (0.10, CERTIFIED, situation(link_up=False, time_left_s=0.01), "edge degraded link"),
        (0.95, CERTIFIED, situation(private=True), "edge uncertified privacy"),
        (0.10, CERTIFIED, situation(private=True), "edge degraded privacy"),
        (0.10, CERTIFIED, situation(private=True, link_up=False), "edge degraded privacy"),
        (0.95, NO_CERTIFICATE, FINE, "hub hub no-certificate"),
        (0.95, NO_CERTIFICATE, situation(link_up=False), "edge degraded no-certificate"),
        (0.95, NO_CERTIFICATE, situation(time_left_s=0.1), "edge degraded no-certificate"),
        (0.95, NO_CERTIFICATE, situation(mode=Mode.EDGE_ONLY), "edge degraded no-certificate"),
        (0.95, NO_CERTIFICATE, situation(private=True), "edge degraded privacy"),
        (0.95, UNPAIRED, FINE, "edge uncertified no-certificate"),
        (math.nan, UNPAIRED, situation(mode=Mode.PREFER_HUB), "edge uncertified no-certificate"),
        (0.95, CERTIFIED, situation(mode=Mode.EDGE_ONLY), "edge certified confident"),
        (0.10, CERTIFIED, situation(mode=Mode.EDGE_ONLY), "edge degraded mode"),
        (0.95, CERTIFIED, situation(mode=Mode.PREFER_HUB), "hub hub preferred"),
        (0.10, CERTIFIED, situation(mode=Mode.PREFER_HUB), "hub hub preferred"),
        (0.95, CERTIFIED, situation(mode=Mode.PREFER_HUB, link_up=False), "edge certified link"),
        (0.10, CERTIFIED, situation(mode=Mode.PREFER_HUB, link_up=False), "edge degraded link"),
        (0.95, CERTIFIED, situation(mode=Mode.HUB_ONLY), "hub hub mode"),
        (0.95, CERTIFIED, situation(mode=Mode.HUB_ONLY, link_up=False), "hub hub mode"),
        (0.95, UNPAIRED, situation(mode=Mode.HUB_ONLY), "hub hub mode"),
        # between the certified and a stricter operating threshold
        (0.92, Terms(True, 0.9, 0.95), FINE, "hub hub uncertain"),
        (0.92, Terms(True, 0.9, 0.95), situation(link_up=False), "edge certified link"),
        # an operating threshold below the certified one has no say
        (0.85, Terms(True, 0.9, 0.8), FINE, "hub hub uncertain"),
        # a certificate that certifies nothing: always escalate
        (1.0, Terms(True, math.inf), FINE, "hub hub uncertain"),
        (1.0, Terms(True, math.inf), situation(link_up=False), "edge degraded link"),
    ],
)
def test_the_table_of_decisions(score: float, terms: Terms, at: Situation, expected: str) -> None:
    found = decide(score, terms, at)
    assert f"{'hub' if found.escalate else 'edge'} {found.quality} {found.reason}" == expected


@pytest.mark.parametrize(
    ("terms", "at", "expected"),
    [
        (CERTIFIED, FINE, "hub hub input"),
        (CERTIFIED, situation(link_up=False), "edge degraded input"),
        (CERTIFIED, situation(time_left_s=0.1), "edge degraded input"),
        (CERTIFIED, situation(mode=Mode.EDGE_ONLY), "edge degraded input"),
        (CERTIFIED, situation(private=True), "edge degraded input"),
        (CERTIFIED, situation(mode=Mode.PREFER_HUB), "hub hub preferred"),
        (CERTIFIED, situation(mode=Mode.HUB_ONLY), "hub hub mode"),
        # where nothing is certified anyway, it makes no difference
        (NO_CERTIFICATE, FINE, "hub hub no-certificate"),
        (NO_CERTIFICATE, situation(link_up=False), "edge degraded no-certificate"),
        (NO_CERTIFICATE, situation(private=True), "edge degraded privacy"),
        (UNPAIRED, FINE, "edge uncertified no-certificate"),
    ],
)
def test_the_table_of_decisions_about_input_that_is_not_finite(
    terms: Terms, at: Situation, expected: str
) -> None:
    found = decide(1.0, terms, at, finite=False)
    assert f"{'hub' if found.escalate else 'edge'} {found.quality} {found.reason}" == expected


@given(scores, all_terms, situations)
def test_no_score_makes_up_for_input_that_is_not_finite(
    score: float, terms: Terms, at: Situation
) -> None:
    found = decide(score, terms, at, finite=False)
    assert found.quality is not Quality.CERTIFIED
    if decide(score, terms, at).escalate:
        assert found.escalate


@given(scores, all_terms, situations)
def test_a_private_row_never_escalates(score: float, terms: Terms, at: Situation) -> None:
    assert not decide(score, terms, at._replace(private=True)).escalate


@given(scores, all_terms, situations)
def test_every_row_has_one_outcome_that_makes_sense(
    score: float, terms: Terms, at: Situation
) -> None:
    found = decide(score, terms, at)
    assert found.escalate == (found.quality is Quality.HUB)
    if found.quality is Quality.CERTIFIED:
        assert score > terms.certified
        assert terms.paired
        assert not at.private
    if found.quality is Quality.DEGRADED:
        assert terms.paired
        assert found.reason in (
            Reason.PRIVACY, Reason.LINK, Reason.DEADLINE, Reason.MODE, Reason.NO_CERTIFICATE,
        )  # fmt: skip


@given(scores, all_terms, situations)
def test_a_row_above_the_certified_threshold_is_never_degraded(
    score: float, terms: Terms, at: Situation
) -> None:
    if score > terms.certified:
        assert decide(score, terms, at).quality is not Quality.DEGRADED


@given(scores, all_terms, situations, thresholds)
def test_stricter_is_always_safe(
    score: float, terms: Terms, at: Situation, operating: float
) -> None:
    """Whatever the operating threshold, what is called certified is above the certified one."""
    stricter = Terms(terms.paired, terms.certified, operating)
    plain = Terms(terms.paired, terms.certified)
    found = decide(score, stricter, at)
    if found.quality is Quality.CERTIFIED:
        # It would have been answered here, or by the hub, and in no case degraded, without.
        assert decide(score, plain, at).quality in (Quality.CERTIFIED, Quality.HUB)
    if decide(score, plain, at).escalate:
        assert found.escalate


@given(scores, all_terms, situations)
def test_losing_the_link_never_escalates_and_never_invents_a_certificate(
    score: float, terms: Terms, at: Situation
) -> None:
    if at.mode is Mode.HUB_ONLY:
        return
    without = decide(score, terms, at._replace(link_up=False))
    assert not without.escalate
    if not decide(score, terms, at).escalate and at.link_up:
        assert without.quality is decide(score, terms, at).quality


@given(st.lists(st.tuples(scores, st.booleans()), max_size=20), all_terms, situations)
def test_many_rows_are_decided_like_each_alone(
    some: Sequence[tuple[float, bool]], terms: Terms, at: Situation
) -> None:
    broken = {row for row, (_, finite) in enumerate(some) if not finite}
    assert decide_rows([score for score, _ in some], terms, at, broken) == [
        decide(score, terms, at, finite=finite) for score, finite in some
    ]


@given(st.floats(0, 1e6))
def test_half_of_the_time_stays_for_the_local_answer(time_left_s: float) -> None:
    assert hub_leg_s(time_left_s) <= time_left_s / 2


def test_the_worst_quality_speaks_for_all_rows() -> None:
    made = {q: Decision(q is Quality.HUB, q, Reason.LINK) for q in Quality}
    order = [Quality.HUB, Quality.CERTIFIED, Quality.UNCERTIFIED, Quality.DEGRADED]
    for index, quality in enumerate(order):
        assert worst([made[q] for q in order[: index + 1]]).quality is quality
