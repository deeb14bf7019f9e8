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


def interval(k: float, n: int, confidence: float) -> tuple[float, float]:
    """Return the two-sided Clopper-Pearson interval of a rate of which ``k`` in ``n`` were seen.

    For figures in reports, not for certificates: it is found to 1e-12, quickly. A ``k`` between
    two whole numbers is rounded outwards. Counted from the rarer side, where sums are short.
    """
    if 2 * k > n:
        low, high = interval(n - k, n, confidence)
        return 1.0 - high, 1.0 - low
    below, above = math.floor(k + 1e-9), math.ceil(k - 1e-9)
    tail = (1.0 - confidence) / 2
    i = np.arange(above + 1)
    log_ways = np.concatenate([[0.0], np.cumsum(np.log((n - i[1:] + 1) / i[1:]))])

    def rate_at(seen: int, probability: float) -> float:
        """Return the rate at which ``seen`` or fewer are seen with this probability."""
        low, high = 0.0, 1.0
        part, ways = i[: seen + 1], log_ways[: seen + 1]
        while high - low > 1e-12:
            middle = (low + high) / 2
            logs = ways + part * math.log(middle) + (n - part) * math.log1p(-middle)
            if float(np.exp(logs).sum()) > probability:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    return (
        rate_at(below - 1, 1.0 - tail) if below > 0 else 0.0,
        rate_at(above, tail) if above < n else 1.0,
    )


def _probability(k: int, n: int, p: float) -> float:
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))
