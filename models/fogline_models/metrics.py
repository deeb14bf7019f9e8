"""What answers are worth, as figures with intervals. Pure: arrays in, numbers out.

Items of one *scene* (copies of a digit, frames of a clip, lines of a file) are no independent
evidence, so every interval counts scenes:

    rates         Clopper-Pearson, as if each scene were one item. A scene's share of hits lies
                  between 0 and 1 and varies at most like a coin of the same bias; what is not
                  a whole number of scenes is rounded outwards.
    differences   paired by scene, after Bonett and Price (2012): one imaginary scene gained and
                  one lost, then the normal interval. Without them, two models that never differ
                  on ten scenes would be called equal beyond doubt.

Where scenes have different numbers of items, estimates weigh items, as everybody computes
them, and the scenes that count are Kish's effective number: (sum of sizes)² / sum of squares.
"""

import math
from dataclasses import dataclass

import numpy as np

from fogline_models import bound
from fogline_protocol.tensors import Array

CONFIDENCE = 0.95
NORMAL_95 = 1.959963984540054  # two-sided, for CONFIDENCE
BINS = 15  # of equal mass; the customary number
RESAMPLES = 400  # of a bootstrap, from a fixed seed
SHARE_ERROR = 1e-3  # of a sum of float16 shares
MAX_POINTS = 101  # of a risk curve: one for each per cent


@dataclass(frozen=True, slots=True)
class Rate:
    """A share of items, and its 95 % interval over scenes."""

    value: float
    lower: float
    upper: float
    items: int
    scenes: int


@dataclass(frozen=True, slots=True)
class Difference:
    """How much one model has over another on the same items, and its 95 % interval."""

    value: float
    lower: float
    upper: float

    @property
    def within_noise(self) -> bool:
        """Whether the data does not tell the difference from none."""
        return self.lower <= 0.0 <= self.upper


@dataclass(frozen=True, slots=True)
class Bin:
    """Items of similar confidence: what they claim and what they keep."""

    confidence: float
    accuracy: float
    items: int


@dataclass(frozen=True, slots=True)
class Point:
    """Edge and hub together at one threshold; a score that is not above it escalates."""

    threshold: float | None  # None: everything is answered at the edge
    escalated: float
    disagreement: float  # answered at the edge and different from the hub, over all items
    accuracy: float | None  # of the pair


@dataclass(frozen=True, slots=True, eq=False)
class Right:
    """How many of each item's labelled answers edge and hub get right: one, or some of its tokens."""

    edge: Array  # int [n]
    hub: Array  # int [n]
    answers: int  # labelled ones of all items

    def together(self, local: Array) -> float:
        """Return the accuracy of the pair where the edge answers items ``local``, bool ``[n]``."""
        return float(np.where(local, self.edge, self.hub).sum() / self.answers)


def top(outputs: Array) -> Array:
    """Return the top answer of every row: ``[n, ...] -> [n]``."""
    answers: Array = outputs.reshape(len(outputs), -1).argmax(axis=1)
    return answers


def rate(hits: Array, scenes: Array) -> Rate:
    """Return the share of ``hits`` (bool ``[n]``, n > 0), with its interval over ``scenes``."""
    value = float(hits.mean())
    sizes = _sizes(scenes)
    count = effective_scenes(sizes)
    lower, upper = bound.interval(value * count, count, CONFIDENCE)
    return Rate(value, min(lower, value), max(upper, value), len(hits), len(sizes))


def difference(hits: Array, others: Array, scenes: Array) -> Difference:
    """Return ``mean(hits) - mean(others)`` on the same items: bool ``[n]`` twice, scenes ``[n]``."""
    delta = hits.astype(np.float64) - others.astype(np.float64)
    _, scene = np.unique(scenes, return_inverse=True)
    weights = np.bincount(scene).astype(np.float64)
    means = np.bincount(scene, weights=delta) / weights
    usual = weights.mean()
    weights = np.concatenate([weights, [usual, usual]])
    means = np.concatenate([means, [1.0, -1.0]])
    center = float(np.average(means, weights=weights))
    spread = float(np.sqrt((weights**2 * (means - center) ** 2).sum()) / weights.sum())
    value = float(delta.mean())
    return Difference(
        value,
        max(-1.0, min(value, center - NORMAL_95 * spread)),
        min(1.0, max(value, center + NORMAL_95 * spread)),
    )


def effective_scenes(sizes: Array) -> int:
    """Return Kish's effective number of scenes of these sizes; all of them if they are equal."""
    return max(1, math.floor(float(sizes.sum()) ** 2 / float((sizes**2).sum()) + 1e-9))


def confusion(rows: Array, columns: Array, classes: int) -> Array:
    """Count the pairs of answers: int ``[n], [n] -> [classes, classes]``."""
    counts: Array = np.bincount(rows * classes + columns, minlength=classes * classes)
    return counts.reshape(classes, classes)


def macro_f1(counts: Array) -> float:
    """Return the mean F1 of the classes that occur at all; labels in rows, answers in columns.

    A class that is never right has an F1 of 0.
    """
    both = counts.sum(axis=0) + counts.sum(axis=1)
    occurs = both > 0
    return float((2 * counts.diagonal()[occurs] / both[occurs]).mean()) if occurs.any() else 0.0


def are_probabilities(outputs: Array) -> bool:
    """Return whether every row of ``[..., classes]`` holds shares of 1 already, as of a softmax.

    Logits only do so by design: none is negative, none above 1, and they sum to 1.
    """
    if outputs.dtype.kind != "f" or outputs.ndim < 2 or outputs.shape[-1] < 2 or not outputs.size:
        return False
    rows = outputs.reshape(-1, outputs.shape[-1]).astype(np.float64)
    within = rows.min() >= -SHARE_ERROR and rows.max() <= 1 + SHARE_ERROR
    return bool(within and np.abs(rows.sum(axis=1) - 1).max() <= SHARE_ERROR)


def softmax(logits: Array) -> Array:
    """Return the probabilities of each row, float64: ``[n, ...] -> [n, classes]``."""
    rows = logits.reshape(len(logits), -1).astype(np.float64)
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    shares: Array = powers / powers.sum(axis=1, keepdims=True)
    return shares


def reliability(
    outputs: Array, labels: Array, bins: int = BINS, *, probabilities: bool = False
) -> tuple[Bin, ...]:
    """Return how confidence and accuracy go together: logits ``[n, classes]``, ``[n]``.

    Or the outputs are ``probabilities`` already. Bins hold equally many items, except that items
    of equal confidence share one.
    """
    shares = _flat(outputs) if probabilities else softmax(outputs)
    confidence = shares.max(axis=1)
    hits = top(outputs) == labels
    edges = np.quantile(confidence, np.arange(1, bins) / bins)
    place = np.searchsorted(edges, confidence, side="left")
    return tuple(
        Bin(float(confidence[here].mean()), float(hits[here].mean()), int(here.sum()))
        for here in (place == i for i in range(bins))
        if here.any()
    )


def calibration_error(bins: tuple[Bin, ...]) -> float:
    """Return the expected calibration error, top label, bins of equal mass.

    The mean over items of the distance between a bin's confidence and its accuracy. Bins of
    equal width, the other custom, leave most bins of a good model nearly empty.
    """
    total = sum(part.items for part in bins)
    return math.fsum(part.items * abs(part.confidence - part.accuracy) for part in bins) / total


def cosines(outputs: Array, others: Array) -> Array:
    """Return each row's cosine similarity with its counterpart; 1 for two rows of zeros."""
    mine, theirs = _flat(outputs), _flat(others)
    lengths = np.linalg.norm(mine, axis=1) * np.linalg.norm(theirs, axis=1)
    both_zero = (np.abs(mine).max(axis=1) == 0) & (np.abs(theirs).max(axis=1) == 0)
    products = (mine * theirs).sum(axis=1)
    found: Array = np.where(
        lengths > 0, products / np.where(lengths > 0, lengths, 1.0), both_zero.astype(np.float64)
    )
    return np.clip(found, -1.0, 1.0)


def relative_errors(outputs: Array, reference: Array) -> Array:
    """Return each row's distance from the reference, relative to the reference's length.

    Rows of a reference of length 0 are measured in absolute terms.
    """
    want = _flat(reference)
    length = np.linalg.norm(want, axis=1)
    errors: Array = np.linalg.norm(_flat(outputs) - want, axis=1) / np.where(length > 0, length, 1)
    return errors


def risk_curve(differs: Array, scores: Array, right: Right | None = None) -> tuple[Point, ...]:
    """Return what edge and hub give together, from no escalation to escalating everything.

    ``differs`` is bool ``[n]``, ``scores`` float ``[n]``. Every point is one that a threshold can
    reach: items of equal score go together.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    lost = np.concatenate([[0], np.cumsum(differs[order])])
    # How many items stay at the edge at each distinct threshold, all of them first.
    steps = np.flatnonzero(np.diff(ranked, append=-np.inf)) + 1
    kept = np.concatenate([steps[::-1], [0]])
    if len(kept) > MAX_POINTS:
        kept = kept[np.unique(np.linspace(0, len(kept) - 1, MAX_POINTS).round().astype(int))]
    both: Array | None = None
    if right is not None:
        mine = np.concatenate([[0], np.cumsum(right.edge[order])])
        theirs = np.concatenate([[0], np.cumsum(right.hub[order])])
        both = (mine + theirs[-1] - theirs) / right.answers
    total = len(scores)
    return tuple(
        Point(
            threshold=None if count == total else float(ranked[count]),
            escalated=float(1 - count / total),
            disagreement=float(lost[count] / total),
            accuracy=None if both is None else float(both[count]),
        )
        for count in kept.tolist()
    )


def least_escalation(differs: Array, scores: Array, alpha: float, weights: Array) -> float:
    """Return the smallest share that a threshold escalates to keep disagreement within ``alpha``.

    ``differs`` (bool), ``scores`` and ``weights``: ``[n]``. Items of equal score go together.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    kept = np.cumsum(weights[order])[ends]
    wrong = np.cumsum((weights * differs)[order])[ends]
    total = float(weights.sum())
    return 1.0 - float(kept[wrong <= alpha * total].max(initial=0.0)) / total


def escalation_saved(
    differs: Array, scores: Array, others: Array, alpha: float, scenes: Array
) -> Difference:
    """Return how many fewer items ``scores`` escalate than ``others`` within the same ``alpha``.

    Either threshold is the best one on these very items. The interval is a bootstrap over scenes
    that finds both thresholds anew each time, since a paired interval would take them as given.
    """
    _, scene = np.unique(scenes, return_inverse=True)
    count = int(scene.max()) + 1

    def saved(weights: Array) -> float:
        mine, theirs = (least_escalation(differs, s, alpha, weights) for s in (scores, others))
        return theirs - mine

    rng = np.random.default_rng(0)
    even = np.full(count, 1 / count)
    again = [saved(rng.multinomial(count, even)[scene]) for _ in range(RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    value = saved(np.ones(len(scene)))
    lower, upper = np.quantile(again, (tail, 1 - tail))
    return Difference(value, min(value, float(lower)), max(value, float(upper)))


def _sizes(scenes: Array) -> Array:
    return np.unique(scenes, return_counts=True)[1].astype(np.float64)


def _flat(outputs: Array) -> Array:
    rows: Array = outputs.reshape(len(outputs), -1).astype(np.float64)
    return rows
