"""The exact binomial bound behind every certificate. Pure: numbers in, numbers out.

A *loss* is a calibration item on which edge and hub differ. Of ``n`` independent items, the
largest number of losses above the threshold at which the true risk is still known to be at
most ``alpha`` is

    k* = largest k with P(Bin(n, alpha) <= k) <= delta            -1 if there is none

and the threshold is the score of the (k*+1)-th highest-scoring loss; the edge answers iff
``score > threshold``. At most k* losses then lie above it, ties included, hence

    P(risk at the threshold <= alpha) >= 1 - delta

with no grid and no union bound (escalation.md 3.2). No scipy: machines that recalibrate do
not carry it.
"""

import math

import numpy as np

from fogline_protocol.certificate import NEVER
from fogline_protocol.tensors import Array

ALWAYS = -math.inf  # a threshold that every score exceeds: nothing needs to escalate


def binomial_cdf(k: int, n: int, p: float) -> float:
    """Return ``P(Bin(n, p) <= k)``."""
    if k < 0:
        return 0.0
    if k >= n or p <= 0.0:
        return 1.0
    if p >= 1.0:
        return 0.0
    return min(1.0, math.fsum(_probability(i, n, p) for i in range(k + 1)))


def allowed_losses(n: int, alpha: float, delta: float) -> int:
    """Return k*, the losses that may lie above the threshold; -1 if ``n`` is too small."""
    allowed = -1
    below = 0.0
    while allowed + 1 < n:
        below += _probability(allowed + 1, n, alpha)
        if below > delta:
            break
        allowed += 1
    return allowed


def items_needed(alpha: float, delta: float) -> int:
    """Return the smallest number of independent items with which anything can be certified."""
    needed = max(1, math.ceil(math.log(delta) / math.log1p(-alpha)))
    while allowed_losses(needed, alpha, delta) < 0:  # the quotient was rounded down
        needed += 1
    return needed


def threshold(scores: Array, losses: Array, allowed: int) -> float:
    """Return the lowest threshold above which at most ``allowed`` losses lie.

    ``scores`` is float ``[n]``, ``losses`` bool ``[n]``. ``NEVER`` if ``allowed`` is negative,
    ``ALWAYS`` if there are no more losses than allowed.
    """
    if allowed < 0:
        return NEVER
    lost = np.sort(scores[losses])[::-1]
    return float(lost[allowed]) if len(lost) > allowed else ALWAYS


def upper_bound(k: int, n: int, delta: float) -> float:
    """Return the Clopper-Pearson upper bound of a rate of which ``k`` in ``n`` were seen.

    It is the largest rate at which ``k`` or fewer would still be seen with probability ``delta``.
    """
    if k >= n:
        return 1.0
    low, high = k / n, 1.0
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return high  # the side on which the bound holds
        if binomial_cdf(k, n, middle) > delta:
            low = middle
        else:
            high = middle


def lower_bound(k: int, n: int, delta: float) -> float:
    """Return the Clopper-Pearson lower bound of a rate of which ``k`` in ``n`` were seen.

    It is the smallest rate at which ``k`` or more would still be seen with probability ``delta``.
    """
    if k <= 0:
        return 0.0
    low, high = 0.0, k / n
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return low  # the side on which the bound holds
        if 1.0 - binomial_cdf(k - 1, n, middle) > delta:
            high = middle
        else:
            low = middle


def interval(k: int, n: int, confidence: float) -> tuple[float, float]:
    """Return the two-sided Clopper-Pearson interval of a rate of which ``k`` in ``n`` were seen.

    Counted from the rarer side, where the sums are short.
    """
    tail = (1.0 - confidence) / 2
    if 2 * k <= n:
        return lower_bound(k, n, tail), upper_bound(k, n, tail)
    low, high = interval(n - k, n, confidence)
    return 1.0 - high, 1.0 - low


def _probability(k: int, n: int, p: float) -> float:
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))
