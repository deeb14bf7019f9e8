"""Edge and hub together, counted item by item: what quicker ways must agree with."""

from dataclasses import dataclass

import numpy as np

from fogline_protocol.tensors import Array


def accuracy(logits: Array, labels: Array) -> float:
    """Return the share of rows whose top answer is the label: ``[n, classes], [n]``."""
    return float((logits.argmax(axis=1) == labels).mean())


def agreement(logits: Array, others: Array) -> float:
    """Return the share of rows on which two models give the same top answer."""
    return float((logits.argmax(axis=1) == others.argmax(axis=1)).mean())


@dataclass(frozen=True, slots=True)
class Hybrid:
    """What edge and hub give together at one threshold."""

    share_edge: float
    disagreement: float  # answered at the edge and different from the hub, over all rows
    accuracy_edge: float
    accuracy_hub: float
    accuracy_hybrid: float


def hybrid(edge: Array, hub: Array, scores: Array, labels: Array, threshold: float) -> Hybrid:
    """Return the figures of the pair: logits ``[n, classes]`` twice, ``[n]`` scores and labels."""
    local = scores > threshold
    mine, theirs = edge.argmax(axis=1), hub.argmax(axis=1)
    return Hybrid(
        share_edge=float(local.mean()),
        disagreement=float((local & (mine != theirs)).mean()),
        accuracy_edge=float((mine == labels).mean()),
        accuracy_hub=float((theirs == labels).mean()),
        accuracy_hybrid=float((np.where(local, mine, theirs) == labels).mean()),
    )
