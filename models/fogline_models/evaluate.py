"""Says what every variant of a release is worth: against labels, the fp32 original and the hub.

``evaluate`` is pure and its figures depend on the data alone; how quick a variant is depends
on the machine and is ``measure.py``'s business. The golden vectors are judged here too, as a
device judges them.

Classification takes logits ``[n, classes]``, one row per item; a token classifier passes its
tokens as rows and the text as their scene. Everything else is compared as vectors: cosine
similarity and relative error instead of answers.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fogline_models import metrics
from fogline_models.errors import BadInput
from fogline_models.metrics import Bin, Difference, Point, Rate
from fogline_models.session import CPU, Session
from fogline_protocol import hardware
from fogline_protocol.certificate import Certificate
from fogline_protocol.golden import (
    FAR_OFF,
    Deviates,
    GoldenVectors,
    VectorsUnusable,
    judge,
)
from fogline_protocol.release import BundleDirectory, Tolerance
from fogline_protocol.score import Score, max_softmax, scorer
from fogline_protocol.tensors import Array

# Rows of the golden vectors that must keep the reference's answer. int8 may flip rows that
# lie on the fence, and flips others on other processors; fp32 has no such excuse.
MIN_AGREEMENT: Mapping[str, float] = {"fp32": 0.99, "int8": 0.90}


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What the items of the held-out split are known to be; nothing was trained on them."""

    scenes: Array  # [n]; items of one scene are copies, not evidence
    labels: Array | None = None  # int [n]
    slices: Array | None = None  # str [n]: the group of each item, a writer or a noise level
    names: tuple[str, ...] = ()  # of the classes


@dataclass(frozen=True, slots=True)
class Slice:
    """The figures of one group of items."""

    name: str
    items: int
    scenes: int
    accuracy: Rate | None
    agreement: Rate | None  # this and the loss against the reference
    loss: Difference | None


@dataclass(frozen=True, slots=True)
class Figures:
    """What one variant is worth. What cannot be said of its kind is None or empty."""

    accuracy: Rate | None
    # Against the reference, which has None of both:
    loss: Difference | None  # of accuracy; positive: worse
    agreement: Rate | None  # of top answers
    agreement_hub: Rate | None
    macro_f1: float | None
    calibration_error: float | None
    reliability: tuple[Bin, ...]
    recall: Mapping[str, Rate]  # by class
    confusion: tuple[tuple[int, ...], ...]  # labels in rows, answers in columns
    cosine: float | None  # mean over items, with the reference's vectors
    cosine_worst: float | None
    relative_error: float | None  # mean over items
    relative_error_worst: float | None
    slices: tuple[Slice, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures of every variant on the same items."""

    items: int
    scenes: int
    classes: tuple[str, ...]  # empty: vectors, not classes
    reference: str
    variants: Mapping[str, Figures]
    hub_model: str
    hub: Figures | None


def evaluate(
    outputs: Mapping[str, Array],
    items: HeldOut,
    *,
    reference: str = "fp32",
    hub: Array | None = None,
    hub_model: str = "hub",
    vectors: bool = False,
) -> Evaluation:
    """Return the figures of every variant.

    Args:
        outputs: by variant, ``[n, ...]``: logits, or vectors if ``vectors``.
        items: what is known about the ``n`` items.
        reference: the variant that the others are compared with.
        hub: what the hub's model gives for the same items.
        hub_model: what it is called.
        vectors: the outputs are features or other numbers, not one logit per class.

    Raises:
        BadInput: lengths differ, a label is no class, or a value is not finite.
    """
    others = {} if hub is None else {hub_model: hub}
    _check({**outputs, **others}, items, reference, vectors)
    classes = () if vectors else _names(outputs[reference], items.names)
    asked = {name: _Answers(array, vectors) for name, array in outputs.items()}
    base = asked[reference]
    peer = None if hub is None else _Answers(hub, vectors)
    return Evaluation(
        items=len(items.scenes),
        scenes=len(np.unique(items.scenes)),
        classes=classes,
        reference=reference,
        variants={name: _figures(mine, base, peer, items, classes) for name, mine in asked.items()},
        hub_model=hub_model if peer is not None else "",
        hub=None if peer is None else _figures(peer, base, peer, items, classes),
    )


def against(mine: Array, before: Array, items: HeldOut) -> tuple[Slice, ...]:
    """Return how a release does beside the one before it: all items, then by slice.

    Of a slice, ``loss`` is against the release before; negative, the new one is better.

    Raises:
        BadInput: lengths or widths differ, a label is no class, or a value is not finite.
    """
    _check({"this release": mine, "its parent": before}, items, "its parent", False)
    new, old = _Answers(mine, False), _Answers(before, False)
    everything = np.ones(len(items.scenes), dtype=bool)
    names = () if items.slices is None else sorted(set(items.slices.tolist()), key=_natural)
    return (
        _slice("all items", everything, new, old, items),
        *(_slice(str(name), items.slices == name, new, old, items) for name in names),
    )


@dataclass(frozen=True, slots=True)
class Escalation:
    """What one certificate gives on the held-out items, and what other thresholds would."""

    variant: str
    hardware_class: str
    hub_model: str
    alpha: float
    delta: float
    calibration_scenes: int
    allowed_losses: int
    at: Point  # the certified threshold
    disagreement: Rate  # at it
    accuracy_edge: float | None  # without the hub
    accuracy_hub: float | None
    curve: tuple[Point, ...]


def escalation(
    certificate: Certificate, edge: Array, hub: Array, items: HeldOut, *, vectors: bool = False
) -> Escalation:
    """Return how a certificate fares on held-out items: logits ``[n, classes]`` twice.

    Raises:
        BadInput: lengths differ, a value is not finite, or the outputs are no classes.
    """
    if vectors:
        raise BadInput("evaluate: a certificate speaks of answers, these outputs are vectors")
    both = {certificate.variant: edge, certificate.hub_model: hub}
    _check(both, items, certificate.variant, vectors)
    scores = scorer(certificate.score)(edge)
    mine, theirs = metrics.top(edge), metrics.top(hub)
    local = scores > certificate.threshold
    labels = items.labels
    wrong = local & (mine != theirs)
    pair = np.where(local, mine, theirs)
    return Escalation(
        variant=certificate.variant,
        hardware_class=certificate.hardware_class,
        hub_model=certificate.hub_model,
        alpha=certificate.alpha,
        delta=certificate.delta,
        calibration_scenes=certificate.scenes,
        allowed_losses=certificate.allowed_losses,
        at=Point(
            threshold=certificate.threshold if math.isfinite(certificate.threshold) else None,
            escalated=float((~local).mean()),
            disagreement=float(wrong.mean()),
            accuracy=None if labels is None else float((pair == labels).mean()),
        ),
        disagreement=metrics.rate(wrong, items.scenes),
        accuracy_edge=None if labels is None else float((mine == labels).mean()),
        accuracy_hub=None if labels is None else float((theirs == labels).mean()),
        curve=metrics.risk_curve(mine, theirs, scores, labels),
    )


@dataclass(frozen=True, slots=True)
class Combined:
    """What a combined score gives beside max_softmax, at the same risk on the held-out items."""

    function: str
    parameters: Mapping[str, float]
    fitted_on: str  # the split
    variant: str
    alpha: float
    escalated: float
    escalated_by_max_softmax: float
    saved: Difference

    @property
    def sentence(self) -> str:
        """What it buys, for people."""
        saved = self.saved
        verdict = "so it buys nothing that this data could tell from chance"
        if saved.lower > 0:
            verdict = "so it buys that much"
        elif saved.upper < 0:
            verdict = "so it does harm: take max_softmax"
        return (
            f"score {self.function}, fitted on split {self.fitted_on}: where disagreement is at "
            f"most {self.alpha:g}, {self.variant} escalates {self.escalated:.1%} of the evaluation "
            f"items instead of {self.escalated_by_max_softmax:.1%} by max_softmax, "
            f"{100 * saved.value:+.1f} points saved ({100 * saved.lower:+.1f} to "
            f"{100 * saved.upper:+.1f}), {verdict}"
        )


def combined(
    score: Score,
    edge: Array,
    hub: Array,
    items: HeldOut,
    *,
    alpha: float,
    fitted_on: str,
    variant: str,
) -> Combined:
    """Return what a combined score is worth on held-out items: logits ``[n, classes]`` twice."""
    differs = metrics.top(edge) != metrics.top(hub)
    scores, plain = scorer(score)(edge), max_softmax(edge)
    once = np.ones(len(differs))
    return Combined(
        function=score.function,
        parameters=score.parameters,
        fitted_on=fitted_on,
        variant=variant,
        alpha=alpha,
        escalated=metrics.least_escalation(differs, scores, alpha, once),
        escalated_by_max_softmax=metrics.least_escalation(differs, plain, alpha, once),
        saved=metrics.escalation_saved(differs, scores, plain, alpha, items.scenes),
    )


class _Answers:
    """One model's outputs, with what is asked of them more than once."""

    def __init__(self, outputs: Array, vectors: bool) -> None:
        self.outputs = outputs
        self.top = None if vectors else metrics.top(outputs)


def _figures(
    mine: _Answers,
    base: _Answers,
    peer: _Answers | None,
    items: HeldOut,
    classes: Sequence[str],
) -> Figures:
    cosines = errors = None
    if mine.top is None:
        cosines = metrics.cosines(mine.outputs, base.outputs)
        errors = metrics.relative_errors(mine.outputs, base.outputs)
    labels, answers = items.labels, mine.top
    bins: tuple[Bin, ...] = ()
    counts: Array | None = None
    recall: dict[str, Rate] = {}
    if labels is not None and answers is not None:
        bins = metrics.reliability(mine.outputs, labels)
        counts = metrics.confusion(labels, answers, len(classes))
        for index, name in enumerate(classes):
            here = labels == index
            if here.any():
                recall[name] = metrics.rate(answers[here] == index, items.scenes[here])
    everything = np.ones(len(items.scenes), dtype=bool)
    whole = _slice("", everything, mine, base, items)
    agreement_hub = None
    if answers is not None and peer is not None and peer.top is not None:
        agreement_hub = metrics.rate(answers == peer.top, items.scenes)
    return Figures(
        accuracy=whole.accuracy,
        loss=whole.loss,
        agreement=whole.agreement,
        agreement_hub=agreement_hub,
        macro_f1=None if counts is None else metrics.macro_f1(counts),
        calibration_error=metrics.calibration_error(bins) if bins else None,
        reliability=bins,
        recall=recall,
        confusion=() if counts is None else tuple(tuple(row) for row in counts.tolist()),
        cosine=None if cosines is None else float(cosines.mean()),
        cosine_worst=None if cosines is None else float(cosines.min()),
        relative_error=None if errors is None else float(errors.mean()),
        relative_error_worst=None if errors is None else float(errors.max()),
        slices=()
        if items.slices is None
        else tuple(
            _slice(str(name), items.slices == name, mine, base, items)
            for name in sorted(set(items.slices.tolist()), key=_natural)
        ),
    )


def _slice(name: str, here: Array, mine: _Answers, base: _Answers, items: HeldOut) -> Slice:
    scenes = items.scenes[here]
    accuracy = agreement = loss = None
    if mine.top is not None and base.top is not None:
        right: Array | None = None
        if items.labels is not None:
            right = mine.top[here] == items.labels[here]
            accuracy = metrics.rate(right, scenes)
        if mine is not base:
            agreement = metrics.rate((mine.top == base.top)[here], scenes)
            if items.labels is not None and right is not None:
                loss = metrics.difference(base.top[here] == items.labels[here], right, scenes)
    return Slice(name, int(here.sum()), len(np.unique(scenes)), accuracy, agreement, loss)


def _natural(name: object) -> list[tuple[int, str]]:
    """Return a key by which "group 9" comes before "group 10"."""
    parts = re.split(r"(\d+)", str(name))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _names(logits: Array, names: tuple[str, ...]) -> tuple[str, ...]:
    width = logits.reshape(len(logits), -1).shape[1]
    return names or tuple(str(index) for index in range(width))


def _check(outputs: Mapping[str, Array], items: HeldOut, reference: str, vectors: bool) -> None:
    count = len(items.scenes)
    if count == 0:
        raise BadInput("evaluate: the held-out split has no items")
    if reference not in outputs:
        raise BadInput(f"evaluate: no variant {reference!r} to compare with, only {list(outputs)}")
    width = outputs[reference].reshape(len(outputs[reference]), -1).shape[1]
    for name, array in outputs.items():
        if len(array) != count:
            raise BadInput(f"evaluate: {name} gave {len(array)} rows for {count} items")
        if array.reshape(count, -1).shape[1] != width:
            raise BadInput(
                f"evaluate: {name} gives {array.reshape(count, -1).shape[1]} values per item, "
                f"{reference} gives {width}"
            )
        finite = np.isfinite(array.reshape(count, -1)).all(axis=1)
        if not finite.all():
            raise BadInput(
                f"evaluate: {name} gives values that are not finite on {int((~finite).sum())} of "
                f"{count} items"
            )
    if vectors:
        return
    if items.names and len(items.names) != width:
        raise BadInput(
            f"evaluate: {len(items.names)} labels are named, but {reference} has {width} outputs"
        )
    for what, known in (("labels", items.labels), ("slices", items.slices)):
        if known is not None and len(known) != count:
            raise BadInput(f"evaluate: {len(known)} {what} for {count} items")
    if items.labels is not None and not bool(((items.labels >= 0) & (items.labels < width)).all()):
        stray = items.labels[(items.labels < 0) | (items.labels >= width)]
        raise BadInput(f"evaluate: label {stray[0]} is none of the {width} classes")


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

    On a machine that the variant is not meant for it runs as it is written, unfused.

    Raises:
        BadInput: the vectors lack a tensor or have none, or the variant does not run here.
    """
    bundle = directory.bundle
    try:
        vectors = GoldenVectors.read(bundle, directory.file(bundle.self_test.path))
    except VectorsUnusable as error:
        raise BadInput(str(error)) from None
    variant = bundle.variant(variant_name)
    here = variant.providers_on((provider,), hardware.this_machine())
    session = Session(directory.file(variant.path), provider, as_written=not here)
    answers = [session.run(inputs, rows_at_once=1) for inputs in vectors.batches()]
    problem: str | None = None
    try:
        figures = judge(bundle, vectors, answers, bundle.self_test.tolerances[variant_name])
    except Deviates as error:
        figures, problem = error.figures, str(error)
    return Golden(figures.get("max_abs_error", FAR_OFF), figures.get("agreement", 0.0), problem)
