"""The score of a row: one number, higher meaning more certain.

A certificate's threshold lives on this scale, so the device that compares and the workshop
that calibrated must compute it identically, to the last bit.

    max_softmax   the largest softmax probability
    logistic      how likely the hub agrees: a logistic head on a few features of the logits,
                  whose coefficients the workshop fitted and the bundle and certificate name
    least_softmax of a row with an answer for each of its tokens: the largest softmax probability
                  of the token that is least certain, among those that count

Models that end in a softmax give probabilities, and a softmax of those again would call every
answer uncertain; of such outputs,

    max_probability    is the largest of a row
    least_probability  is the largest of the row's least certain token, as ``least_softmax``

A row is answered as certainly as its least certain token, because it is one request: a device
keeps all of its answers or none. Which tokens count it learns from an input, the score's ``mask``,
as applications send it, and from nothing else (``answers.py``).
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fogline_protocol.tensors import Array

MAX_SOFTMAX = "max_softmax"
LOGISTIC = "logistic"
LEAST_SOFTMAX = "least_softmax"
MAX_PROBABILITY = "max_probability"
LEAST_PROBABILITY = "least_probability"
PER_TOKEN = frozenset({LEAST_SOFTMAX, LEAST_PROBABILITY})  # of rows with many answers

FEATURES = ("log_odds", "spread")
FINEST = 2.0**-52  # how far a sum of shares is above 1, at the least
SUREST = 36.0  # beyond, no number is left between the score and 1


@dataclass(frozen=True, slots=True)
class Score:
    """How a row's certainty is computed: ``function`` of the tensor ``output``."""

    function: str
    output: str
    parameters: Mapping[str, float] = field(default_factory=dict)
    mask: str = ""  # the input that says which tokens of a row count; none: all do

    def __str__(self) -> str:
        """Say it to people."""
        named = ", ".join(f"{name} {value:g}" for name, value in sorted(self.parameters.items()))
        where = f" where {self.mask} counts" if self.mask else ""
        return f"{self.function} of {self.output}{where}" + (f" ({named})" if named else "")

    @property
    def per_token(self) -> bool:
        """Whether a row has an answer for each of its tokens, and not one for all of it."""
        return self.function in PER_TOKEN

    @property
    def problem(self) -> str | None:
        """What is wrong with it in itself; of a function unknown here, nothing can be said."""
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
        if self.mask and not self.per_token:
            return (
                f"the score {self.function} is of whole rows and takes no mask, got {self.mask!r}"
            )
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


def max_probability(probabilities: Array) -> Array:
    """Return the largest probability of each row: ``[n, classes] -> [n]`` float32.

    A row with a value that is not finite scores 0: nothing is certain about it.
    """
    rows = probabilities.reshape(len(probabilities), -1).astype(np.float32, copy=False)
    scores: Array = rows.max(axis=1)
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


def least_softmax(logits: Array, mask: Array | None = None) -> Array:
    """Return ``max_softmax`` of each row's least certain token: ``[n, tokens, classes] -> [n]``.

    ``mask``, ``[n, tokens]``, is not 0 where a token counts; without one all do. What is not
    counted is not looked at, so padding never changes a score, whatever a model says of it. A row
    with a counted value that is not finite scores 0. A row in which nothing counts scores 1:
    nothing was asked, so nothing can be answered differently.
    """
    return _least(max_softmax, logits, mask)


def least_probability(probabilities: Array, mask: Array | None = None) -> Array:
    """Return ``max_probability`` of each row's least certain token, as ``least_softmax`` does."""
    return _least(max_probability, probabilities, mask)


def _least(of_tokens: Callable[[Array], Array], outputs: Array, mask: Array | None) -> Array:
    counts = np.ones(outputs.shape[:-1], bool) if mask is None else mask != 0
    scores = np.ones(counts.shape, np.float32)
    if counts.any():
        scores[counts] = of_tokens(outputs[counts])
    least: Array = scores.min(axis=tuple(range(1, scores.ndim)), initial=1.0)
    return least


FUNCTIONS: Mapping[str, Callable[..., Array]] = {
    MAX_SOFTMAX: max_softmax,
    LOGISTIC: logistic,
    LEAST_SOFTMAX: least_softmax,
    MAX_PROBABILITY: max_probability,
    LEAST_PROBABILITY: least_probability,
}
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    MAX_SOFTMAX: (),
    LOGISTIC: ("bias", *FEATURES),
    LEAST_SOFTMAX: (),
    MAX_PROBABILITY: (),
    LEAST_PROBABILITY: (),
}


def scorer(score: Score) -> Callable[..., Array]:
    """Return the function that ``score`` names, with its parameters.

    Of logits, ``[n, classes]`` or ``[n, tokens, classes]``, it makes a score for each row, ``[n]``:
    a probability, from 0 to 1. Where the score has a mask, ``[n, tokens]``, that input is the
    second argument.

    Raises:
        KeyError: there is none of this name.
    """
    function = FUNCTIONS[score.function]
    return functools.partial(function, **score.parameters) if score.parameters else function
