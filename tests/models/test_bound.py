"""The bound against exact integer arithmetic, its properties, and what it promises."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fogline_models import bound
from fogline_protocol.certificate import NEVER
from fogline_protocol.tensors import Array

ALPHAS = st.sampled_from([Fraction(1, 200), Fraction(1, 100), Fraction(1, 20), Fraction(1, 5)])
DELTAS = st.sampled_from([Fraction(1, 20), Fraction(1, 10)])


def exact_cdf(k: int, n: int, p: Fraction) -> Fraction:
    """P(Bin(n, p) <= k) in whole numbers: shares nothing with the code under test."""
    yes, no = p.numerator, p.denominator - p.numerator
    return Fraction(
        sum(math.comb(n, i) * yes**i * no ** (n - i) for i in range(k + 1)), p.denominator**n
    )


@pytest.mark.parametrize(
    ("n", "allowed"), [(298, -1), (299, 0), (1_000, 4), (3_000, 20), (10_000, 83)]
)
def test_the_allowed_losses_are_those_of_the_published_table(n: int, allowed: int) -> None:
    assert bound.allowed_losses(n, 0.01, 0.05) == allowed
    alpha, delta = Fraction(1, 100), Fraction(1, 20)
    if allowed >= 0:
        assert exact_cdf(allowed, n, alpha) <= delta
    assert exact_cdf(allowed + 1, n, alpha) > delta


@settings(deadline=None)  # the machine may be busy
@given(n=st.integers(1, 400), alpha=ALPHAS, delta=DELTAS)
def test_one_more_allowed_loss_would_break_the_bound(
    n: int, alpha: Fraction, delta: Fraction
) -> None:
    allowed = bound.allowed_losses(n, float(alpha), float(delta))
    assert allowed == -1 or exact_cdf(allowed, n, alpha) <= delta
    assert exact_cdf(allowed + 1, n, alpha) > delta


@settings(deadline=None)  # the machine may be busy
@given(alpha=ALPHAS, delta=DELTAS)
def test_the_number_of_items_needed_is_the_smallest_that_certifies(
    alpha: Fraction, delta: Fraction
) -> None:
    needed = bound.items_needed(float(alpha), float(delta))
    assert (1 - alpha) ** needed <= delta < (1 - alpha) ** (needed - 1)


@settings(deadline=None)  # the machine may be busy
@given(n=st.integers(1, 200), data=st.data())
def test_the_distribution_function_is_exact_to_twelve_digits(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    percent = data.draw(st.integers(1, 99))
    exact = exact_cdf(k, n, Fraction(percent, 100))
    assert bound.binomial_cdf(k, n, percent / 100) == pytest.approx(float(exact), rel=1e-11)


@settings(deadline=None)  # the machine may be busy
@given(n=st.integers(1, 2_000), share=st.floats(0, 1), delta=st.sampled_from([0.01, 0.05]))
def test_the_upper_bound_is_the_rate_at_which_so_few_are_still_seen(
    n: int, share: float, delta: float
) -> None:
    k = min(n, int(share * n))
    upper = bound.upper_bound(k, n, delta)
    assert k / n <= upper <= 1
    if k < n:
        assert bound.binomial_cdf(k, n, upper) <= delta
        assert bound.binomial_cdf(k, n, upper * (1 - 1e-9)) > delta


@settings(deadline=None)  # the machine may be busy
@given(n=st.integers(59, 1_500))
def test_both_forms_of_the_bound_allow_the_same_losses(n: int) -> None:
    allowed = bound.allowed_losses(n, 0.05, 0.05)
    assert bound.upper_bound(allowed, n, 0.05) <= 0.05 < bound.upper_bound(allowed + 1, n, 0.05)


# Coarse scores, so that ties are the rule.
ITEMS = st.lists(st.tuples(st.integers(0, 6).map(lambda i: i / 8), st.booleans()), min_size=1)


@settings(deadline=None)  # the machine may be busy
@given(items=ITEMS, allowed=st.integers(0, 5))
def test_no_more_losses_than_allowed_lie_above_the_threshold_and_none_lower_would_do(
    items: list[tuple[float, bool]], allowed: int
) -> None:
    scores = np.array([score for score, _ in items], dtype=np.float32)
    losses = np.array([loss for _, loss in items])
    found = bound.threshold(scores, losses, allowed)
    assert (losses & (scores > found)).sum() <= allowed
    if found == bound.ALWAYS:
        assert losses.sum() <= allowed
    else:
        assert found in scores[losses]
        assert (losses & (scores >= found)).sum() > allowed


@settings(deadline=None)  # the machine may be busy
@given(items=ITEMS)
def test_too_few_items_mean_that_everything_escalates(items: list[tuple[float, bool]]) -> None:
    scores = np.array([score for score, _ in items], dtype=np.float32)
    assert bound.threshold(scores, np.array([loss for _, loss in items]), -1) == NEVER


def test_a_threshold_survives_the_way_through_double_precision_and_json() -> None:
    scores = np.array([0.1, 0.7, 0.9], dtype=np.float32)
    found = bound.threshold(scores, np.array([False, True, False]), 0)
    assert np.float32(float(repr(found))) == scores[1]
    assert (scores > float(repr(found))).tolist() == [False, False, True]


@pytest.mark.parametrize("levels", [None, 12], ids=["continuous scores", "scores with ties"])
@pytest.mark.parametrize(("n", "alpha", "delta"), [(350, 0.05, 0.05), (400, 0.01, 0.05)])
def test_the_risk_exceeds_alpha_in_no_more_than_delta_of_all_calibrations(
    n: int, alpha: float, delta: float, levels: int | None
) -> None:
    draws = 4_000
    rng = np.random.default_rng(0)
    grid = np.arange(2_000) / 2_000 if levels is None else np.arange(levels) / levels
    loss_rate = 0.5 * (1 - grid) ** 3  # uncertain items are lost more often
    risk_at_least = np.cumsum((loss_rate / len(grid))[::-1])[::-1]  # of answering s >= grid[i]
    risk_above = np.append(risk_at_least[1:], 0.0)

    def true_risk(threshold: float) -> float:
        if threshold == NEVER:
            return 0.0
        if threshold == bound.ALWAYS:
            return float(risk_at_least[0])
        return float(risk_above[np.searchsorted(grid, threshold)])

    allowed = bound.allowed_losses(n, alpha, delta)
    assert allowed >= 0
    violations = 0
    for _ in range(draws):
        items = rng.integers(0, len(grid), n)
        losses: Array = rng.random(n) < loss_rate[items]
        violations += true_risk(bound.threshold(grid[items], losses, allowed)) > alpha
    noise = 3 * math.sqrt(delta * (1 - delta) / draws)
    assert violations / draws <= delta + noise
    if levels is None:
        assert violations > 0  # otherwise the bound would be far from tight, or the test blind
