"""Figures against hand counts and scikit-learn's definitions, and what always holds of them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fogline_models import bound, metrics
from fogline_protocol.tensors import Array
from tests.models import counting

LOGITS = np.array([[3, 0, 0], [0, 2, 0], [0, 0, 1], [0, 5, 0]], dtype=np.float32)
OTHERS = np.array([[3, 0, 0], [9, 2, 0], [0, 0, 1], [0, 0, 5]], dtype=np.float32)
LABELS = np.array([0, 1, 2, 2])

SEEDS = st.integers(0, 2**32 - 1)
slow = settings(deadline=None, max_examples=60)  # the machine may be busy


def random_items(seed: int, classes: int = 4) -> tuple[Array, Array, Array, Array]:
    """Return two models' logits, labels and scenes of unequal sizes."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 60))
    logits = rng.normal(0, 3, (count, classes))
    others = logits + rng.normal(0, rng.choice([0.0, 1.0, 9.0]), (count, classes))
    return logits, others, rng.integers(0, classes, count), rng.integers(0, 12, count)


def test_figures_count_what_they_say() -> None:
    assert counting.accuracy(LOGITS, LABELS) == 0.75
    assert counting.agreement(LOGITS, OTHERS) == 0.5
    scores = np.array([0.9, 0.6, 0.5, 0.2], dtype=np.float32)
    found = counting.hybrid(LOGITS, OTHERS, scores, LABELS, 0.5)
    assert found.share_edge == 0.5  # a score equal to the threshold escalates
    assert found.disagreement == 0.25
    assert (found.accuracy_edge, found.accuracy_hub) == (0.75, 0.75)
    assert found.accuracy_hybrid == 1.0


def test_f1_is_the_mean_over_the_classes_that_occur() -> None:
    counts = metrics.confusion(LABELS, metrics.top(LOGITS), 4)
    assert counts.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert metrics.macro_f1(counts) == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert metrics.macro_f1(np.zeros((3, 3), int)) == 0.0


# Intervals


def test_a_rate_of_single_items_has_the_textbook_interval() -> None:
    hits = np.array([True] * 9 + [False])
    found = metrics.rate(hits, np.arange(10))
    assert found.value == 0.9
    assert (found.lower, found.upper) == pytest.approx((0.55498, 0.99747), abs=1e-5)
    assert (found.items, found.scenes) == (10, 10)


def test_copies_of_a_scene_add_no_evidence() -> None:
    hits = np.array([True] * 9 + [False])
    once = metrics.rate(hits, np.arange(10))
    copied = metrics.rate(np.repeat(hits, 50), np.repeat(np.arange(10), 50))
    assert (copied.lower, copied.upper) == pytest.approx((once.lower, once.upper))
    assert copied.items == 500


def test_one_large_scene_among_small_ones_counts_for_less_than_it_holds() -> None:
    scenes = np.array([0] * 91 + list(range(1, 10)))
    assert metrics.effective_scenes(np.array([91.0] + [1.0] * 9)) == 1
    found = metrics.rate(np.arange(100) < 95, scenes)
    assert found.lower < 0.05


@slow
@given(seed=SEEDS)
def test_a_rate_lies_within_its_interval_and_that_within_zero_and_one(seed: int) -> None:
    logits, others, _, scenes = random_items(seed)
    found = metrics.rate(metrics.top(logits) == metrics.top(others), scenes)
    assert 0 <= found.lower <= found.value <= found.upper <= 1
    assert found.lower < found.upper


@slow
@given(seed=SEEDS)
def test_a_difference_lies_within_its_interval_and_turns_around(seed: int) -> None:
    logits, others, labels, scenes = random_items(seed)
    mine, theirs = metrics.top(logits) == labels, metrics.top(others) == labels
    there = metrics.difference(mine, theirs, scenes)
    back = metrics.difference(theirs, mine, scenes)
    assert -1 <= there.lower <= there.value <= there.upper <= 1
    assert there.value == -back.value
    assert (there.lower, there.upper) == pytest.approx((-back.upper, -back.lower))
    assert there.value == pytest.approx(mine.mean() - theirs.mean())


def test_models_that_never_differ_are_not_called_equal_beyond_doubt() -> None:
    hits = np.ones(10, dtype=bool)
    found = metrics.difference(hits, hits, np.arange(10))
    assert found.within_noise
    assert found.upper > 0.2
    assert (
        metrics.difference(np.ones(2000, bool), np.ones(2000, bool), np.arange(2000)).upper < 0.002
    )


def test_a_difference_of_pairs_has_the_published_interval() -> None:
    """Bonett and Price (2012): (c - b) / (n + 2) +- z sqrt((b + c - (c - b)² / n) / n²), n + 2."""
    b, c, n = 3, 14, 60
    hits = np.array([True] * c + [False] * b + [True] * (n - b - c))
    others = np.array([False] * c + [True] * b + [True] * (n - b - c))
    found = metrics.difference(hits, others, np.arange(n))
    low, high = (b + 1) / (n + 2), (c + 1) / (n + 2)
    half = 1.959964 * math.sqrt((low + high - (high - low) ** 2) / (n + 2))
    assert found.value == pytest.approx((c - b) / n)
    assert (found.lower, found.upper) == pytest.approx((high - low - half, high - low + half))
    assert not found.within_noise


@pytest.mark.parametrize(("rate", "copies"), [(0.9, 1), (0.9, 7), (0.6, 3)])
def test_the_interval_holds_the_truth_as_often_as_it_says(rate: float, copies: int) -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        # Items of a scene are alike: each scene has a rate of its own around the truth.
        own = rng.beta(20 * rate, 20 * (1 - rate), 60)
        hits = rng.random((60, copies)) < own[:, None]
        found = metrics.rate(hits.ravel(), np.repeat(np.arange(60), copies))
        held += found.lower <= rate <= found.upper
    assert held >= 0.95 * 300 - 11  # three standard deviations of chance


@slow
@given(k=st.integers(0, 60), n=st.integers(1, 60))
def test_the_two_sided_interval_is_its_own_mirror_image(k: int, n: int) -> None:
    k = min(k, n)
    low, high = bound.interval(k, n, 0.95)
    other_low, other_high = bound.interval(n - k, n, 0.95)
    assert (low, high) == pytest.approx((1 - other_high, 1 - other_low), abs=1e-12)
    assert 0 <= low <= k / n <= high <= 1
    if k > 0:
        assert 1 - bound.binomial_cdf(k - 1, n, low) == pytest.approx(0.025, abs=1e-9)
    if k < n:
        assert bound.binomial_cdf(k, n, high) == pytest.approx(0.025, abs=1e-9)


# Agreement, calibration


@slow
@given(seed=SEEDS)
def test_agreement_is_symmetric_and_complete_with_oneself(seed: int) -> None:
    logits, others, _, _ = random_items(seed)
    assert counting.agreement(logits, others) == counting.agreement(others, logits)
    assert counting.agreement(logits, logits) == 1.0
    counts = metrics.confusion(metrics.top(logits), metrics.top(others), 4)
    assert counts.sum() == len(logits)
    assert counts.trace() / len(logits) == counting.agreement(logits, others)


@slow
@given(seed=SEEDS)
def test_the_calibration_error_lies_between_0_and_1_whatever_the_order(seed: int) -> None:
    logits, _, labels, _ = random_items(seed)
    bins = metrics.reliability(logits, labels)
    error = metrics.calibration_error(bins)
    assert 0 <= error <= 1
    assert sum(part.items for part in bins) == len(labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    again = metrics.calibration_error(metrics.reliability(logits[order], labels[order]))
    assert again == pytest.approx(error)


def test_a_model_that_keeps_what_it_claims_has_no_calibration_error() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (100_000, 3))
    shares = metrics.softmax(logits)
    labels = (rng.random((len(shares), 1)) > shares.cumsum(axis=1)).sum(axis=1)
    assert metrics.calibration_error(metrics.reliability(logits, labels)) < 0.01
    sure = metrics.calibration_error(metrics.reliability(logits * 4, labels))
    assert sure > 0.1


def test_probabilities_are_known_and_believed_as_they_are() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (500, 5)).astype(np.float32)
    shares = metrics.softmax(logits).astype(np.float16)
    labels = np.random.default_rng(1).integers(0, 5, 500)
    assert metrics.are_probabilities(shares)
    assert metrics.are_probabilities(shares.reshape(100, 5, 5))  # of tokens
    found = metrics.reliability(shares, labels, probabilities=True)
    want = metrics.reliability(logits, labels)
    assert metrics.calibration_error(found) == pytest.approx(
        metrics.calibration_error(want), abs=0.01
    )
    off = shares.copy()
    off[3, 2] += 0.01
    for outputs in (logits, np.abs(logits), off, shares[:, :1], shares > 0, shares[:0], shares[0]):
        assert not metrics.are_probabilities(outputs)


def test_items_of_equal_confidence_share_a_bin() -> None:
    logits = np.tile([[2.0, 0.0]], (30, 1))
    (only,) = metrics.reliability(logits, np.arange(30) % 2)
    assert only.items == 30
    assert only.accuracy == 0.5
    assert only.confidence == pytest.approx(1 / (1 + math.exp(-2)))


# Vectors


def test_vectors_are_compared_by_angle_and_length() -> None:
    mine = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [1.0, 0.0]])
    theirs = np.array([[2.0, 0.0], [0.0, -2.0], [0.0, 0.0], [0.0, 0.0]])
    assert metrics.cosines(mine, theirs).tolist() == [1.0, -1.0, 1.0, 0.0]
    assert metrics.relative_errors(mine, theirs).tolist() == [0.5, 2.0, 0.0, 1.0]


# Risk


@slow
@given(seed=SEEDS)
def test_the_risk_curve_agrees_with_counting_at_every_threshold(seed: int) -> None:
    logits, others, labels, _ = random_items(seed)
    scores = np.round(metrics.softmax(logits).max(axis=1), 1)  # ties
    edge, hub = metrics.top(logits), metrics.top(others)
    right = metrics.Right(edge == labels, hub == labels, len(labels))
    curve = metrics.risk_curve(edge != hub, scores, right)
    for point in curve:
        threshold = -np.inf if point.threshold is None else point.threshold
        want = counting.hybrid(logits, others, scores, labels, threshold)
        assert point.escalated == pytest.approx(1 - want.share_edge)
        assert point.disagreement == pytest.approx(want.disagreement)
        assert point.accuracy == pytest.approx(want.accuracy_hybrid)
    escalated = [point.escalated for point in curve]
    disagreement = [point.disagreement for point in curve]
    assert escalated == sorted(escalated)
    assert disagreement == sorted(disagreement, reverse=True)
    assert (escalated[0], escalated[-1]) == (0.0, 1.0)
    assert disagreement[-1] == 0.0


def test_a_risk_curve_stays_short() -> None:
    curve = metrics.risk_curve(np.zeros(5000, bool), np.random.default_rng(0).random(5000))
    assert len(curve) <= metrics.MAX_POINTS
    assert curve[0].accuracy is None
