"""Fits the combined score: how likely the hub gives the edge's answer, from the edge's logits.

A logistic regression on the features of ``fogline_protocol.score``, on the file that ships. The
certificate's bound holds for a score that was fixed before calibration items were looked at, so
the head is fitted on the split ``tuning`` if the recipe has one, and else on ``ranges``: items
that no certificate may be calibrated on, which ``data.check_disjoint`` sees to. ``ranges`` are
mostly items that the edge model was trained on and is too certain about. That costs escalations,
not the bound.
"""

from collections.abc import Collection

import numpy as np

from fogline_models.errors import BadInput
from fogline_protocol.score import FEATURES, features
from fogline_protocol.tensors import Array

TUNING, RANGES = "tuning", "ranges"
RIDGE = 1.0  # on standardized features, as of one item; the bias goes free
STEPS = 50
DIGITS = 6  # of a coefficient; the rest is noise, and another machine's


def split_of(splits: Collection[str]) -> str:
    """Return the split that a head is fitted on."""
    return TUNING if TUNING in splits else RANGES


def fit(logits: Array, agrees: Array, split: str) -> dict[str, float]:
    """Return the parameters of ``score.logistic``: from ``[n, classes]`` and bool ``[n]``.

    Deterministic: Newton's method on the penalized likelihood, which has one maximum.

    Raises:
        BadInput: edge and hub agree, or differ, on all items, so there is nothing to learn.
    """
    if agrees.all() or not agrees.any():
        raise BadInput(
            f"score: edge and hub {'agree' if agrees.all() else 'differ'} on all {len(agrees)} "
            f"items of split {split}: give a split {TUNING} that neither was trained on, or take "
            "the score max_softmax"
        )
    found = np.array(features(logits))
    if not np.isfinite(found).all():
        raise BadInput(f"score: the outputs on split {split} are not finite: nothing can be fitted")
    mean, scale = found.mean(axis=0), found.std(axis=0)
    scale[scale <= 1e-9 * np.abs(mean)] = 1.0  # it never varies: its slope stays 0
    design = np.column_stack([np.ones(len(found)), (found - mean) / scale])
    weights = _newton(design, agrees.astype(np.float64))
    slopes = weights[1:] / scale
    bias = weights[0] - float((slopes * mean).sum())
    named = zip(("bias", *FEATURES), (bias, *slopes.tolist()), strict=True)
    return {name: float(f"{value:.{DIGITS}g}") for name, value in named}


def _newton(design: Array, hits: Array) -> Array:
    """Return the weights of the likeliest head: ``[n, 1 + features], [n] -> [1 + features]``.

    From zero, and with a ridge, full steps settle in a dozen. Should they ever not, the head
    ranks badly and the report says so; the bound holds for any head.
    """
    penalty = np.full(design.shape[1], RIDGE)
    penalty[0] = 1e-9  # next to nothing, but the equations stay solvable
    weights = np.zeros(design.shape[1])
    for _ in range(STEPS):
        shares = 1.0 / (1.0 + np.exp(-np.clip(design @ weights, -500, 500)))
        slope = design.T @ (hits - shares) - penalty * weights
        curvature = (design.T * (shares * (1.0 - shares))) @ design + np.diag(penalty)
        step = np.linalg.solve(curvature, slope)
        weights = weights + step
        if np.abs(step).max() < 1e-9:
            break
    return weights
