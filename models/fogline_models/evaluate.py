"""Says what a variant is worth: against labels, against the fp32 original, and on this machine.

Figures that depend on the data alone are reproducible; timings are not and stay in the
report, outside every digest. Latencies are compared only within one call, where the
variants take turns, because a machine's speed changes from one minute to the next.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fogline_models.errors import BadInput
from fogline_models.session import CPU, Session
from fogline_protocol.golden import (
    FAR_OFF,
    Deviates,
    GoldenVectors,
    VectorsUnusable,
    judge,
)
from fogline_protocol.release import BundleDirectory, Tolerance
from fogline_protocol.tensors import Array

# Rows of the golden vectors that must keep the reference's answer. int8 may flip rows that
# lie on the fence, and flips others on other processors; fp32 has no such excuse.
MIN_AGREEMENT: Mapping[str, float] = {"fp32": 0.99, "int8": 0.90}
TURNS = 9  # of all variants, for each latency
RUNS_PER_TURN = 60


def accuracy(logits: Array, labels: Array) -> float:
    """Return the share of rows whose top answer is the label: ``[n, classes], [n]``."""
    return float((logits.argmax(axis=1) == labels).mean())


def agreement(logits: Array, others: Array) -> float:
    """Return the share of rows on which two models give the same top answer."""
    return float((logits.argmax(axis=1) == others.argmax(axis=1)).mean())


def tolerance(reference: Array, outputs: Array, precision: str) -> Tolerance:
    """Return how far a device running this variant may stray from the fp32 reference.

    Twice the largest error seen here, rounded up to two digits, so that another processor's
    rounding passes and a wrong file does not.
    """
    largest = 2 * float(np.abs(reference - outputs).max())
    digits = 10.0 ** (math.floor(math.log10(largest)) - 1) if largest > 0 else 1.0
    rounded = float(f"{math.ceil(largest / digits) * digits:.3g}")
    return Tolerance(max(rounded, 1e-3), MIN_AGREEMENT.get(precision, 0.99))


@dataclass(frozen=True, slots=True)
class Golden:
    """How one variant did on the bundle's golden vectors."""

    max_abs_error: float
    agreement: float
    problem: str | None  # why it failed, or None


def golden(directory: BundleDirectory, variant_name: str, provider: str = CPU) -> Golden:
    """Run a variant on its bundle's golden vectors, as a device does before it trusts it.

    Raises:
        BadInput: the vectors lack a tensor or have none, or the variant does not run here.
    """
    bundle = directory.bundle
    try:
        vectors = GoldenVectors.read(bundle, directory.file(bundle.self_test.path))
    except VectorsUnusable as error:
        raise BadInput(str(error)) from None
    session = Session(directory.file(bundle.variant(variant_name).path), provider)
    answers = [session.run(inputs, rows_at_once=1) for inputs in vectors.batches()]
    problem: str | None = None
    try:
        figures = judge(bundle, vectors, answers, bundle.self_test.tolerances[variant_name])
    except Deviates as error:
        figures, problem = error.figures, str(error)
    return Golden(figures.get("max_abs_error", FAR_OFF), figures.get("agreement", 0.0), problem)


def latencies_us(
    files: Mapping[str, Path], inputs: Mapping[str, Array], batches: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Return the median run time of every file at every batch size, in microseconds.

    One thread, this machine, the files taking turns: read ratios, not last digits.
    """
    sessions = {name: Session(path) for name, path in files.items()}
    medians: dict[str, dict[str, float]] = {name: {} for name in files}
    for batch in batches:
        rows = {key: array[:batch] for key, array in inputs.items()}
        samples: dict[str, list[float]] = {name: [] for name in files}
        for _ in range(TURNS):
            for name, session in sessions.items():
                session.run(rows, batch)  # warm caches again after the others' turn
                for _ in range(RUNS_PER_TURN):
                    start = time.perf_counter()
                    session.run(rows, batch)
                    samples[name].append(time.perf_counter() - start)
        for name in files:
            medians[name][f"batch_{batch}"] = round(float(np.median(samples[name])) * 1e6, 1)
    return medians


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
