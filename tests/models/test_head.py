"""Fitting the combined score: what is found, what it buys, what is refused."""

import numpy as np
import pytest

from fogline_models import evaluate, head, metrics
from fogline_models.errors import BadInput
from fogline_models.evaluate import HeldOut
from fogline_protocol.score import LOGISTIC, Score, features, logistic, max_softmax

TRUE = {"bias": -0.5, "log_odds": 0.75, "spread": 0.4}


def rows(count: int, seed: int = 0):
    """Logits of every scale, so that the two features say different things."""
    rng = np.random.default_rng(seed)
    return (rng.normal(0, 1, (count, 10)) * rng.uniform(0.2, 5, (count, 1))).astype(np.float32)


def agreements(logits, seed: int = 1):
    chance = np.random.default_rng(seed).random(len(logits))
    return chance < logistic(logits, **TRUE)


def test_a_known_head_is_found_again():
    logits = rows(40_000)
    found = head.fit(logits, agreements(logits), "tuning")
    assert found == pytest.approx(TRUE, abs=0.06)


def test_the_same_items_give_the_same_coefficients_in_six_digits():
    logits = rows(500)
    found = head.fit(logits, agreements(logits), "tuning")
    assert found == head.fit(logits, agreements(logits), "tuning")
    assert all(float(f"{value:.6g}") == value for value in found.values())


def test_the_order_of_the_items_does_not_matter():
    logits = rows(2_000)
    agrees = agreements(logits)
    found = head.fit(logits, agrees, "tuning")
    assert head.fit(logits[::-1], agrees[::-1], "tuning") == pytest.approx(found, rel=1e-5)


def test_the_fit_is_where_the_likelihood_does_not_rise():
    logits = rows(300)
    agrees = agreements(logits)
    found = head.fit(logits, agrees, "tuning")
    scale = np.std(features(logits), axis=0)

    def loss(bias, log_odds, spread):
        shares = logistic(logits, bias=bias, log_odds=log_odds, spread=spread)
        penalty = ((np.array([log_odds, spread]) * scale) ** 2).sum() / 2
        return penalty - np.log(np.where(agrees, shares, 1 - shares)).sum()

    best = loss(**found)
    for name in found:
        for step in (-0.02, 0.02):
            assert loss(**{**found, name: found[name] + step}) > best


@pytest.mark.parametrize("few", [1, 2])
def test_items_that_a_line_tells_apart_give_finite_coefficients(few):
    logits = np.zeros((50, 3), np.float32)
    logits[few:, 0] = 40
    found = head.fit(logits, np.arange(50) >= few, "tuning")
    assert np.isfinite(list(found.values())).all()
    scores = logistic(logits, **found)
    assert scores[:few].max() < 0.5 < scores[few:].min()


def test_a_feature_that_never_varies_has_no_say():
    logits = np.tile(np.array([[2.0, 0.0]], np.float32), (40, 1))
    found = head.fit(logits, np.arange(40) % 4 > 0, "tuning")
    assert found == pytest.approx({"bias": np.log(3), "log_odds": 0, "spread": 0}, abs=1e-5)
    assert logistic(logits[:1], **found) == pytest.approx(0.75, abs=1e-5)


@pytest.mark.parametrize(("agrees", "says"), [(True, "agree on all 30"), (False, "differ on all")])
def test_nothing_can_be_learnt_where_edge_and_hub_never_or_always_agree(agrees, says):
    with pytest.raises(BadInput, match=says) as refused:
        head.fit(rows(30), np.full(30, agrees), "ranges")
    assert "split ranges: give a split tuning" in str(refused.value)


def test_a_head_is_fitted_on_tuning_and_else_on_ranges_never_on_calibration():
    assert head.split_of({"training", "ranges", "calibration", "tuning"}) == "tuning"
    assert head.split_of({"training", "ranges", "calibration"}) == "ranges"


def test_the_least_escalation_is_what_the_best_threshold_gives():
    scores = np.array([0.9, 0.8, 0.8, 0.7, 0.6])
    differs = np.array([False, False, True, False, True])
    once = np.ones(5)
    # One wrong answer of five is allowed: the threshold lies below 0.7, above 0.6.
    assert metrics.least_escalation(differs, scores, 0.2, once) == pytest.approx(0.2)
    # None is: the two at 0.8 stay or go together, so one of five stays.
    assert metrics.least_escalation(differs, scores, 0.1, once) == pytest.approx(0.8)
    assert metrics.least_escalation(np.ones(5, bool), scores, 0.1, once) == 1.0
    assert metrics.least_escalation(np.zeros(5, bool), scores, 0.1, once) == 0.0
    weighed = np.array([1, 2, 1, 1, 0])
    assert metrics.least_escalation(differs, scores, 0.1, weighed) == pytest.approx(0.8)


def held_out(logits):
    """A hub that differs from the edge where a head says so, and the same answers elsewhere."""
    hub = logits.copy()
    differs = ~agreements(logits)
    hub[differs, logits[differs].argmin(axis=1)] = 1e3
    return hub, HeldOut(np.arange(len(logits)))


def bought(parameters, count=4_000):
    logits = rows(count, seed=7)
    hub, items = held_out(logits)
    return evaluate.combined(
        Score(LOGISTIC, "y", parameters), logits, hub, items,
        alpha=0.05, fitted_on="tuning", variant="int8",
    )  # fmt: skip


def test_a_score_that_knows_more_is_said_to_buy_what_it_buys():
    found = bought(TRUE)
    assert found.saved.lower > 0
    assert found.saved.value == pytest.approx(found.escalated_by_max_softmax - found.escalated)
    assert "so it buys that much" in found.sentence
    assert "fitted on split tuning" in found.sentence


def test_a_score_that_ranks_as_max_softmax_is_said_to_buy_nothing():
    found = bought({"bias": 1.0, "log_odds": 0.5, "spread": 0.0})
    assert found.saved.value == pytest.approx(0, abs=1e-3)  # but for float32's equal scores
    assert "so it buys nothing" in found.sentence


def test_a_score_that_ranks_worse_is_said_to_do_harm():
    found = bought({"bias": 0.0, "log_odds": -1.0, "spread": 0.0})
    assert found.saved.upper < 0
    assert "so it does harm: take max_softmax" in found.sentence


def test_copies_of_a_scene_do_not_make_a_saving_surer():
    logits = rows(200, seed=3)
    differs = ~agreements(logits)
    scores, plain = logistic(logits, **TRUE), max_softmax(logits)
    once = metrics.escalation_saved(differs, scores, plain, 0.05, np.arange(200))
    again = metrics.escalation_saved(
        *(np.repeat(each, 5) for each in (differs, scores, plain)), 0.05, np.repeat(range(200), 5)
    )
    assert again == once
