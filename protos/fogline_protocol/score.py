"""The score of a row: one number, higher meaning more certain.

A certificate's threshold lives on this scale, so the device that compares and the workshop
that calibrated must compute it identically, to the last bit.

    max_softmax   the largest softmax probability
    logistic      how likely the hub agrees: a logistic head on a few features of the logits,
                  whose coefficients the workshop fitted and the bundle and certificate name
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fogline_protocol.tensors import Array

MAX_SOFTMAX = "max_softmax"
LOGISTIC = "logistic"

FEATURES = ("log_odds", "spread")
FINEST = 2.0**-52  # how far a sum of shares is above 1, at the least
SUREST = 36.0  # beyond, no number is left between the score and 1


@dataclass(frozen=True, slots=True)
class Score:
    """How a row's certainty is computed: ``function`` of the tensor ``output``."""

    function: str
    output: str
    parameters: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """Say it to people."""
        named = ", ".join(f"{name} {value:g}" for name, value in sorted(self.parameters.items()))
        return f"{self.function} of {self.output}" + (f" ({named})" if named else "")

    @property
    def problem(self) -> str | None:
        """What is wrong with its parameters; of a function unknown here, nothing can be said."""
        wanted = PARAMETERS.get(self.function)
        if wanted is None:
            return None
        if self.parameters.keys() != set(wanted):
            return (
                f"the score {self.function} takes the parameters {', '.join(wanted) or 'none'}, "
                f"got {', '.join(sorted(self.parameters)) or 'none'}"
            )
        for name, value in self.parameters.items():
            if not math.isfinite(value):
                return f"the score's parameter {name} is not a finite number"
        return None


def max_softmax(logits: Array) -> Array:
    """Return the largest softmax probability of each row: ``[n, classes] -> [n]`` float32.

    A row with a value that is not finite scores 0: nothing is certain about it.
    """
    rows = logits.reshape(len(logits), -1).astype(np.float32, copy=False)
    with np.errstate(all="ignore"):
        scores: Array = 1.0 / np.exp(rows - rows.max(axis=1, keepdims=True)).sum(axis=1)
    scores[~np.isfinite(rows).all(axis=1)] = 0.0
    return scores


def features(logits: Array) -> list[tuple[float, float]]:
    """Return what ``logistic`` weighs, for each row of ``[n, classes]``, in the order of FEATURES.

    log_odds: of the top class, log(p / (1 - p)); a head on it alone ranks as ``max_softmax``.
    spread: the standard deviation of the logits, the scale that softmax forgets.

    Both stay as they are when a constant is added to a row. Spread is not a number in a row that
    holds a value that is not finite.
    """
    rows = logits.reshape(len(logits), -1).astype(np.float64)
    classes = rows.shape[1]
    with np.errstate(all="ignore"):
        below = rows - np.maximum.reduce(rows, axis=1, keepdims=True)
        shares = np.add.reduce(np.exp(below), axis=1)
        sums = np.add.reduce(below, axis=1)
        squares = np.add.reduce(below * below, axis=1)
    # Row by row: devices ask for few at once, and numpy takes a microsecond for each of these.
    return [
        (
            -math.log(max(share - 1.0, FINEST)),
            math.sqrt(max(square / classes - (total / classes) * (total / classes), 0.0)),
        )
        for share, total, square in zip(
            shares.tolist(), sums.tolist(), squares.tolist(), strict=True
        )
    ]


def logistic(logits: Array, *, bias: float, log_odds: float, spread: float) -> Array:
    """Return the logistic head's value for each row: ``[n, classes] -> [n]`` float64.

    Between 0 and 1, both excluded; but a row with a value that is not finite scores 0: nothing
    is certain about it.
    """
    certain = [log_odds * odds + spread * width + bias for odds, width in features(logits)]
    return np.array(
        [
            0.0 if math.isnan(row) else 1.0 / (1.0 + math.exp(-max(-SUREST, min(row, SUREST))))
            for row in certain
        ],
        np.float64,
    )


FUNCTIONS: Mapping[str, Callable[..., Array]] = {MAX_SOFTMAX: max_softmax, LOGISTIC: logistic}
PARAMETERS: Mapping[str, tuple[str, ...]] = {MAX_SOFTMAX: (), LOGISTIC: ("bias", *FEATURES)}


def scorer(score: Score) -> Callable[[Array], Array]:
    """Return the function that ``score`` names, with its parameters: ``[n, ...] -> [n]``.

    Raises:
        KeyError: there is none of this name.
    """
    function = FUNCTIONS[score.function]
    return functools.partial(function, **score.parameters) if score.parameters else function
