"""An evaluated release for the tests of report, card and page: made up, small, and awkward."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from fogline_models import evaluate, gates, report
from fogline_models.evaluate import Escalation, Evaluation, HeldOut
from fogline_models.gates import Decision, Gates
from fogline_models.measure import Cost, Spread
from fogline_models.metrics import Point, Rate, Right, risk_curve, top
from fogline_models.report import Document, Input, Parent, Step, Subject
from fogline_protocol.answers import Asked

HOSTILE = "<script>alert('&')</script>"
DIGEST = "ab" * 32
LABELS = np.arange(120) % 3
SIZES = {"fp32": 15998, "int8": 8834}


def logits(wrong: int, seed: int = 0) -> Any:
    given = LABELS.copy()
    given[:wrong] = (given[:wrong] + 1) % 3
    noise = np.random.default_rng(seed).random((len(given), 3))
    return np.eye(3)[given] * 2.5 + noise


@functools.cache
def evaluation(names: tuple[str, ...] = ("cat", "dog", HOSTILE)) -> Evaluation:
    slices = np.array([f"{HOSTILE} {i % 4}" for i in range(len(LABELS))])
    return evaluate.evaluate(
        {"int8": logits(9), "fp32": logits(6)},
        HeldOut(np.arange(len(LABELS)) // 2, LABELS, slices, names),
        hub=logits(1),
        hub_model="animals-hub",
    )


@functools.cache
def vectors() -> Evaluation:
    outputs = np.random.default_rng(0).random((30, 8))
    return evaluate.evaluate(
        {"fp32": outputs, "int8": outputs * 1.004}, HeldOut(np.arange(30)), vectors=True
    )


@functools.cache
def tokens() -> Evaluation:
    """The items of ``evaluation`` as texts of four tokens, the first of each without a label."""
    names = ("cat", "dog", HOSTILE)
    labels = LABELS.reshape(30, 4).copy()
    labels[:, 0] = -100
    return evaluate.evaluate(
        {"int8": logits(9).reshape(30, 4, 3), "fp32": logits(6).reshape(30, 4, 3)},
        HeldOut(
            np.arange(30),
            labels,
            np.array([f"{HOSTILE} {i % 4}" for i in range(30)]),
            names,
            Asked(np.ones((30, 4), bool)),
        ),
        hub=logits(1).reshape(30, 4, 3),
        hub_model="animals-hub",
    )


def costs(ratio: float = 1.31) -> dict[str, Cost]:
    def cost(ratio: float, spread: float) -> Cost:
        around = Spread(ratio, ratio - spread, ratio + spread)
        latency = {b: Spread(24.7 * ratio * b, 24 * b, 40 * b) for b in (1, 8, 32)}
        return Cost(latency, {1: around, 8: around, 32: around}, Spread(8.5, 7, 9), None)

    return {"int8": cost(ratio, 0.02), "fp32": cost(1.0, 0.0)}


def decisions(found: Evaluation, allow: Mapping[str, str], ratio: float = 1.31) -> Any:
    return gates.decide(Gates(allow=allow), found, costs(ratio), SIZES)


def escalation(threshold: float | None = 0.6) -> Escalation:
    edge, hub = top(logits(9)), top(logits(1))
    scores = np.linspace(0.3, 0.99, len(edge))
    return Escalation(
        variant="int8",
        hardware_class="x86_64+avx2/CPUExecutionProvider/onnxruntime-1.32",
        hub_model="animals-hub",
        alpha=0.05,
        delta=0.05,
        calibration_scenes=350,
        allowed_losses=10,
        at=Point(threshold, 1.0 if threshold is None else 0.434, 0.017, 0.95),
        disagreement=Rate(0.017, 0.002, 0.04, 120, 60),
        accuracy_edge=0.925,
        accuracy_hub=0.992,
        curve=risk_curve(edge != hub, scores, Right(edge == LABELS, hub == LABELS, len(LABELS))),
    )


def subject(**changed: Any) -> Subject:
    fields: dict[str, Any] = {
        "model": "animals",
        "version": "1.2.0",
        "description": f"Tells animals apart {HOSTILE}",
        "held_out": "photographs of one zoo",
        "precisions": {"fp32": "fp32", "int8": "int8"},
        "sizes": SIZES,
        "parent": Parent("1.1.0", DIGEST, (f"int8: 9,000 -> 8,834 bytes {HOSTILE}",)),
        "inputs": (Input("calibration.npz", DIGEST, 33_300, HOSTILE),),
        "steps": (Step("export", f"opset 20 {HOSTILE}"),),
    }
    return Subject(**fields | changed)


def document(
    found: Evaluation | None = None,
    given: tuple[Decision, ...] | None = None,
    escalations: tuple[Escalation, ...] | None = None,
    **changed: Any,
) -> Document:
    found = evaluation() if found is None else found
    given = decisions(found, {"int8": f"half of the bytes {HOSTILE}"}) if given is None else given
    return report.document(
        subject(**changed),
        found,
        given,
        costs(),
        {"processor": HOSTILE, "cores": "2"},
        bundle_sha256=DIGEST,
        escalations=(escalation(),) if escalations is None else escalations,
    )
