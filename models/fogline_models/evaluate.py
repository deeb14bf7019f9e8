"""Says what every variant of a release is worth: against labels, the fp32 original and the hub.

``evaluate`` is pure and its figures depend on the data alone; how quick a variant is depends
on the machine and is ``measure.py``'s business. The golden vectors are judged here too, as a
device judges them.

Classification takes logits ``[n, ...]`` and is told of answers (``fogline_protocol.answers``): one
of each item, or those of a text's tokens that count. Tokens of one text are one scene. How two
models agree is told of all of them, since devices cannot know which have a label; how right a
model is, of those that have one. Everything else is compared as vectors: cosine similarity and
relative error instead of answers.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fogline_models import metrics
from fogline_models.data import check_tokens
from fogline_models.errors import BadInput
from fogline_models.metrics import Bin, Difference, Point, Rate
from fogline_models.session import CPU, Session
from fogline_models.wording import outward
from fogline_protocol import hardware
from fogline_protocol.answers import ATTENTION_MASK, NO_LABEL, Asked, scores_of
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
from fogline_protocol.tensors import Array, TensorError

# Rows of the golden vectors that must keep the reference's answer. int8 may flip rows that
# lie on the fence, and flips others on other processors; fp32 has no such excuse.
MIN_AGREEMENT: Mapping[str, float] = {"fp32": 0.99, "int8": 0.90}
MANY_UNLABELLED = 0.25  # of the texts that differ: worth a word about tokens without a label


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What the items of the held-out split are known to be; nothing was trained on them."""

    scenes: Array  # [n]; items of one scene are copies, not evidence
    labels: Array | None = None  # int [n], or [n, tokens] with NO_LABEL where there is none
    slices: Array | None = None  # str [n]: the group of each item, a writer or a noise level
    names: tuple[str, ...] = ()  # of the classes
    asked: Asked | None = None  # which answers count; None: each item has one

    def each(self) -> "HeldOut":
        """Return the same with one entry for each answer that counts, in order.

        Raises:
            BadInput: labels are not of the tokens that count.
        """
        if self.asked is None or self.asked.counts.ndim == 1:
            if self.labels is not None and self.labels.ndim > 1:
                raise BadInput(
                    f"evaluate: label is {list(self.labels.shape)}, one for each token, but a row "
                    "has one answer"
                )
            return self
        counts, rows = self.asked.counts, self.asked.rows
        labels = self.labels
        if labels is not None:
            check_tokens(labels, counts, "evaluate")
            labels = labels[counts]
            if (labels == NO_LABEL).all():
                labels = None
        slices = None if self.slices is None else self.slices[rows]
        return HeldOut(self.scenes[rows], labels, slices, self.names)


def without_padding(vectors: Array, inputs: Mapping[str, Array]) -> Array:
    """Return vectors of tokens, ``[n, tokens, ...]``, with zeros where the attention mask has one.

    What a net says of padding is read by nobody, and int8 strays there more than anywhere: in a
    MiniLM by 37 % where words stray by 18 %. Other vectors are returned as they are.
    """
    mask = inputs.get(ATTENTION_MASK)
    if mask is None or vectors.ndim < 3 or mask.shape != vectors.shape[:2]:
        return vectors
    counted: Array = vectors * (mask != 0).reshape(*mask.shape, *[1] * (vectors.ndim - 2))
    return counted


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

    items: int  # answers that count: of a token classifier, tokens
    scenes: int
    classes: tuple[str, ...]  # empty: vectors, not classes
    reference: str
    variants: Mapping[str, Figures]
    hub_model: str
    hub: Figures | None
    counted: str = "items"  # or "tokens"


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
        outputs: by variant, ``[n, ...]``: logits, or vectors if ``vectors``; of a token classifier
            ``[n, tokens, classes]``.
        items: what is known about the ``n`` items.
        reference: the variant that the others are compared with.
        hub: what the hub's model gives for the same items.
        hub_model: what it is called.
        vectors: the outputs are features or other numbers, not one logit per class.

    Raises:
        BadInput: lengths differ, a label is no class, or a value is not finite.
    """
    theirs = hub_model if hub_model not in outputs else f"the hub's {hub_model}"
    others = {} if hub is None else {theirs: hub}
    told, chosen = _each({**outputs, **others}, items, reference, vectors=vectors)
    classes = () if vectors else _names(chosen[reference], items.names)
    asked = {name: _Answers(array, vectors) for name, array in chosen.items()}
    base, peer = asked[reference], asked.get(theirs)
    return Evaluation(
        items=len(told.scenes),
        scenes=len(np.unique(told.scenes)),
        classes=classes,
        reference=reference,
        variants={name: _figures(asked[name], base, peer, told, classes) for name in outputs},
        hub_model=hub_model if peer is not None else "",
        hub=None if peer is None else _figures(peer, base, peer, told, classes),
        counted=_counted(items),
    )


def against(mine: Array, before: Array, items: HeldOut) -> tuple[Slice, ...]:
    """Return how a release does beside the one before it: all items, then by slice.

    Of a slice, ``loss`` is against the release before; negative, the new one is better.

    Raises:
        BadInput: lengths or widths differ, a label is no class, or a value is not finite.
    """
    told, both = _each({"this release": mine, "its parent": before}, items, "its parent")
    new, old = (_Answers(array, False) for array in both.values())
    everything = np.ones(len(told.scenes), dtype=bool)
    names = () if told.slices is None else sorted(set(told.slices.tolist()), key=_natural)
    return (
        _slice(f"all {_counted(items)}", everything, new, old, told),
        *(_slice(str(name), told.slices == name, new, old, told) for name in names),
    )


@dataclass(frozen=True, slots=True)
class Escalation:
    """What one certificate gives on the held-out items, and what other thresholds would.

    A token classifier escalates whole texts, and a text disagrees where any of its tokens does;
    accuracies are those of its tokens.
    """

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
    differs: float = 0.0  # share of items that edge and hub answer differently, at any score
    only_unlabelled: float = 0.0  # of those, the share that does only in tokens without a label

    @property
    def note(self) -> str:
        """What to do about texts that escalate for the sake of tokens that nobody asks for."""
        if self.only_unlabelled < MANY_UNLABELLED:
            return ""
        return (
            f"{self.variant}: {self.differs:.1%} of the texts differ from {self.hub_model}, "
            f"{self.only_unlabelled:.0%} of these only in tokens without a label, which devices "
            "count all the same: give such tokens (special ones, inner pieces of words) a class in "
            "training, for edge and hub alike, or name a mask that leaves them out"
        )


def escalation(
    certificate: Certificate, edge: Array, hub: Array, items: HeldOut, *, vectors: bool = False
) -> Escalation:
    """Return how a certificate fares on held-out items: logits ``[n, ...]`` twice.

    Raises:
        BadInput: shapes differ, a value is not finite, or the outputs are no classes.
    """
    if vectors:
        raise BadInput("evaluate: a certificate speaks of answers, these outputs are vectors")
    both = {certificate.variant: edge, certificate.hub_model: hub}
    told, _ = _each(both, items, certificate.variant)
    asked = items.asked or Asked(np.ones(len(items.scenes), bool))
    scores = scores_of(certificate.score, edge, asked)
    differs = asked.differ(edge, hub)
    local = scores > certificate.threshold
    wrong = local & differs
    right: metrics.Right | None = None
    only_unlabelled = 0.0
    if told.labels is not None:
        known = told.labels != NO_LABEL
        labelled = asked.in_rows((asked.top(edge) != asked.top(hub)) & known) > 0
        only_unlabelled = float((~labelled[differs]).mean()) if differs.any() else 0.0
        hits = [asked.in_rows(asked.top(outputs) == told.labels) for outputs in (edge, hub)]
        right = metrics.Right(hits[0], hits[1], int(known.sum()))
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
            accuracy=None if right is None else right.together(local),
        ),
        disagreement=metrics.rate(wrong, items.scenes),
        accuracy_edge=None if right is None else right.together(np.ones_like(local)),
        accuracy_hub=None if right is None else right.together(np.zeros_like(local)),
        curve=metrics.risk_curve(differs, scores, right),
        differs=float(differs.mean()),
        only_unlabelled=only_unlabelled,
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
        low, high = outward(saved.lower, saved.upper)
        verdict = "so it buys nothing that this data could tell from chance"
        if saved.lower > 0:
            verdict = "so it buys that much"
        elif saved.upper < 0:
            verdict = "so it does harm: take max_softmax"
        return (
            f"score {self.function}, fitted on split {self.fitted_on}: where disagreement is at "
            f"most {self.alpha:g}, {self.variant} escalates {self.escalated:.1%} of the evaluation "
            f"items instead of {self.escalated_by_max_softmax:.1%} by max_softmax, "
            f"{100 * saved.value:+.1f} points saved ({low:+.1f} to {high:+.1f}), {verdict}"
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
        known = labels != NO_LABEL
        bins = metrics.reliability(
            mine.outputs[known],
            labels[known],
            # Asked of the reference: quantized shares need not sum to 1 any more.
            probabilities=metrics.are_probabilities(base.outputs),
        )
        counts = metrics.confusion(labels[known], answers[known], len(classes))
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
        if mine is not base:
            agreement = metrics.rate((mine.top == base.top)[here], scenes)
        known = here if items.labels is None else here & (items.labels != NO_LABEL)
        if items.labels is not None and known.any():
            right = (mine.top == items.labels)[known]
            accuracy = metrics.rate(right, items.scenes[known])
            if mine is not base:
                before = (base.top == items.labels)[known]
                loss = metrics.difference(before, right, items.scenes[known])
    return Slice(name, int(here.sum()), len(np.unique(scenes)), accuracy, agreement, loss)


def _natural(name: object) -> list[tuple[int, str]]:
    """Return a key by which "group 9" comes before "group 10"."""
    parts = re.split(r"(\d+)", str(name))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _names(logits: Array, names: tuple[str, ...]) -> tuple[str, ...]:
    width = logits.reshape(len(logits), -1).shape[1]
    return names or tuple(str(index) for index in range(width))


def _counted(items: HeldOut) -> str:
    return "tokens" if items.asked is not None and items.asked.counts.ndim > 1 else "items"


def _each(
    outputs: Mapping[str, Array], items: HeldOut, reference: str, *, vectors: bool = False
) -> tuple[HeldOut, dict[str, Array]]:
    """Return items and outputs with one entry for each answer that counts, in order.

    Raises:
        BadInput: they do not fit together, a label is no class, or a value is not finite.
    """
    asked = None if vectors else items.asked
    if asked is None or asked.counts.ndim == 1:
        told = items if vectors else items.each()
        _check(outputs, told, reference, vectors)
        return told, dict(outputs)
    for name, array in outputs.items():
        if len(array) != len(items.scenes):
            raise BadInput(f"evaluate: {name} gave {len(array)} rows for {len(items.scenes)} items")
    if items.slices is not None and len(items.slices) != len(items.scenes):
        raise BadInput(f"evaluate: {len(items.slices)} slices for {len(items.scenes)} items")
    if not len(asked):
        raise BadInput("evaluate: the mask of the held-out split counts no token")
    try:
        chosen = {name: asked.logits(array) for name, array in outputs.items()}
    except TensorError as error:
        raise BadInput(f"evaluate: {error}") from None
    told = items.each()
    _check(chosen, told, reference, vectors, "tokens")
    return told, chosen


def _check(
    outputs: Mapping[str, Array],
    items: HeldOut,
    reference: str,
    vectors: bool,
    counted: str = "items",
) -> None:
    count = len(items.scenes)
    if count == 0:
        raise BadInput("evaluate: the held-out split has no items")
    if reference not in outputs:
        raise BadInput(f"evaluate: no variant {reference!r} to compare with, only {list(outputs)}")
    width = outputs[reference].reshape(len(outputs[reference]), -1).shape[1]
    for name, array in outputs.items():
        if len(array) != count:
            raise BadInput(f"evaluate: {name} gave {len(array)} rows for {count} {counted}")
        if array.reshape(count, -1).shape[1] != width:
            raise BadInput(
                f"evaluate: {name} gives {array.reshape(count, -1).shape[1]} values per {counted[:-1]}, "
                f"{reference} gives {width}"
            )
        finite = np.isfinite(array.reshape(count, -1)).all(axis=1)
        if not finite.all():
            raise BadInput(
                f"evaluate: {name} gives values that are not finite on {int((~finite).sum())} of "
                f"{count} {counted}"
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
    if items.labels is None:
        return
    strays = (items.labels < 0) | (items.labels >= width)
    if counted == "tokens":
        strays &= items.labels != NO_LABEL
    if strays.any():
        raise BadInput(f"evaluate: label {items.labels[strays][0]} is none of the {width} classes")


def tolerance(
    reference: Array, outputs: Array, precision: str, *, vectors: bool = False
) -> Tolerance:
    """Return how far a device running this variant may stray from the fp32 reference.

    Twice the largest error seen here, rounded up to two digits, so that another processor's
    rounding passes and a wrong file does not. Which number of a vector is the largest is no
    answer, so of ``vectors`` none has to be kept.
    """
    largest = 2 * float(np.abs(reference - outputs).max())
    digits = 10.0 ** (math.floor(math.log10(largest)) - 1) if largest > 0 else 1.0
    rounded = float(f"{math.ceil(largest / digits) * digits:.3g}")
    return Tolerance(max(rounded, 1e-3), 0.0 if vectors else MIN_AGREEMENT.get(precision, 0.99))


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
    answers = [session.run(inputs, rows_at_once=1) for inputs in vectors.batches(variant)]
    problem: str | None = None
    try:
        figures = judge(bundle, vectors, answers, bundle.self_test.tolerances[variant_name])
    except Deviates as error:
        figures, problem = error.figures, str(error)
    return Golden(figures.get("max_abs_error", FAR_OFF), figures.get("agreement", 0.0), problem)
