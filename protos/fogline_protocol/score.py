"""The score of a row: one number, higher meaning more certain.

A certificate's threshold lives on this scale, so the device that compares and the workshop
that calibrated must compute it identically, to the last bit.
"""

import numpy as np

from fogline_protocol.tensors import Array

MAX_SOFTMAX = "max_softmax"


def max_softmax(logits: Array) -> Array:
    """Return the largest softmax probability of each row: ``[n, classes] -> [n]`` float32.

    A row with a value that is not finite scores 0: nothing is certain about it.
    """
    rows = logits.reshape(len(logits), -1).astype(np.float32, copy=False)
    with np.errstate(all="ignore"):
        scores: Array = 1.0 / np.exp(rows - rows.max(axis=1, keepdims=True)).sum(axis=1)
    scores[~np.isfinite(rows).all(axis=1)] = 0.0
    return scores


FUNCTIONS = {MAX_SOFTMAX: max_softmax}
