"""Issues certificates: the escalation threshold of one artifact on this machine, with its bound.

The very file that ships is run, on the provider that ships, row by row as a device runs it,
against one named file of the hub's bundle. What the resulting number means and does not mean
(escalation.md 7): it holds for requests drawn like the calibration set, one item per scene,
over all requests and not per class, for as long as the hub serves that very file.

A token classifier's request is a text: it is lost where edge and hub differ in any token that the
bundle's mask counts, special tokens and inner pieces of words among them. Labels are not asked,
because a device has none.

``certify`` decides, ``save`` writes. The bound itself is ``bound.py``.
"""

import datetime
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fogline_models import bound, data, pairing
from fogline_models.data import Items
from fogline_models.errors import BadInput, TooLittle
from fogline_models.pairing import Contract
from fogline_models.session import CPU, Session, hardware_class
from fogline_protocol import hardware
from fogline_protocol.answers import Asked, scores_of
from fogline_protocol.certificate import Certificate
from fogline_protocol.release import CERTIFICATES, Bundle, BundleDirectory, Variant
from fogline_protocol.score import FUNCTIONS, Score
from fogline_protocol.tensors import Array, TensorError, TensorSpec

REFERENCE_QUANTILES = 64
NEXT_TO_ALL = 0.95  # of the requests: an edge model that escalates so many is worth a word
ESCALATION_DELTA = 0.01  # the drift alarm needs a rate that is hardly ever exceeded by chance


@dataclass(frozen=True, slots=True)
class Terms:
    """What a certificate promises, and for how long."""

    alpha: float = 0.01
    delta: float = 0.05
    valid_for: datetime.timedelta = datetime.timedelta(days=365)

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("delta", self.delta)):
            if not 0 < value < 1:
                raise BadInput(f"{name} must lie between 0 and 1, got {value:g}")
        if self.valid_for <= datetime.timedelta(0):
            raise BadInput("a certificate must be valid for at least a day")


def certify(
    edge: BundleDirectory,
    hub: BundleDirectory,
    items: Items,
    terms: Terms,
    *,
    issued_at: datetime.datetime,
    variant: str,
    hub_variant: str | None = None,
    provider: str = CPU,
) -> Certificate:
    """Return the certificate of one variant of ``edge`` on this machine.

    ``hub_variant`` is the file of ``hub`` that will answer escalations, by default its first.

    Raises:
        TooLittle: the data is too little for the terms; says how much it takes.
        BadInput: the bundles are not a pair, the data does not fit them, or a model does not run here or gives values that are not finite.
        MissingExtra: onnxruntime is not installed.
    """
    score = edge.bundle.score
    _check_pair(edge, hub)
    if score is None:
        raise BadInput(f"{_title(edge.bundle)} names no score, so it has no threshold to certify")
    if score.function not in FUNCTIONS:
        raise BadInput(
            f"{_title(edge.bundle)} asks for the score {score.function!r}, "
            f"known are {', '.join(FUNCTIONS)}"
        )
    edge_variant = _variant(edge.bundle, variant)
    peer = _variant(hub.bundle, hub_variant or hub.bundle.variants[0].name)
    rows = items.independent
    inputs = {name: array[rows] for name, array in items.inputs.items()}
    for side in (edge, hub):
        _check_inputs(side.bundle, items, inputs)
    allowed = bound.allowed_losses(len(rows), terms.alpha, terms.delta)
    if allowed < 0:
        raise TooLittle(
            f"{len(rows)} independent scenes are too few to certify alpha {terms.alpha:g} at "
            f"delta {terms.delta:g}: at least {bound.items_needed(terms.alpha, terms.delta)} "
            f"are needed"
        )
    # One row at a time, as a device answers: kernels may round otherwise in a batch.
    local = _outputs(edge, edge_variant, provider, inputs, score.output, rows_at_once=1)
    # The hub's processor is another: what kernels here would cut off is run as it is written.
    remote = _outputs(
        hub,
        peer,
        CPU,
        inputs,
        score.output,
        peer.max_rows or hub.bundle.max_batch or 1,
        as_written=not hardware.suits(hardware.this_machine(), peer.processors),
    )
    try:
        asked = Asked.of(score, local, inputs)
        _check_finite(edge.bundle, edge_variant, score, asked, local)
        _check_finite(hub.bundle, peer, score, asked, remote)
        answers = np.unique(asked.top(remote))
        differs = asked.differ(local, remote)
    except TensorError as error:
        raise BadInput(f"{_title(edge.bundle)} and {_title(hub.bundle)}: {error}") from None
    if len(answers) < 2:
        raise BadInput(_one_answer(hub.bundle, score, answers, len(rows)))
    scores = scores_of(score, local, asked)
    found = bound.threshold(scores, differs, allowed)
    escalated = int((scores <= found).sum())
    quantiles = np.quantile(
        scores.astype(np.float64), (np.arange(REFERENCE_QUANTILES) + 0.5) / REFERENCE_QUANTILES
    )
    return Certificate(
        model=edge.bundle.model,
        version=edge.bundle.version,
        variant=edge_variant.name,
        variant_sha256=edge.variant_sha256(edge_variant),
        hub_model=hub.bundle.model,
        hub_sha256=hub.variant_sha256(peer),
        hardware_class=hardware_class(provider),
        score=score,
        alpha=terms.alpha,
        delta=terms.delta,
        items=len(items),
        scenes=len(rows),
        allowed_losses=allowed,
        threshold=found,
        escalation_rate=escalated / len(rows),
        escalation_rate_upper=bound.upper_bound(escalated, len(rows), ESCALATION_DELTA),
        reference_score_quantiles=tuple(float(q) for q in quantiles),
        calibration_sha256=items.sha256,
        sampling=items.sampling,
        issued_at=issued_at,
        expires_at=issued_at + terms.valid_for,
    )


def save(certificate: Certificate, folder: Path) -> Path:
    """Write a certificate into ``folder`` in one step, over an older one of its kind.

    The name follows from hardware class and variant, so a folder holds one of each kind.

    Raises:
        BadInput: the folder cannot be written.
    """
    slug = re.sub(r"[^a-z0-9_.]+", "-", certificate.hardware_class.lower())
    target = folder / f"{slug}.{certificate.variant}.json"
    unfinished = target.with_suffix(".unfinished")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(certificate.to_json())
        os.replace(unfinished, target)
    except OSError as error:
        raise BadInput(f"cannot write {target}: {error.strerror}") from None
    return target


def sentence(issued: Certificate) -> str:
    """Return what a certificate says, for people."""
    said = (
        f"{issued.variant} on {issued.hardware_class} answers locally above "
        f"{issued.threshold:.4f}, escalates {issued.escalation_rate:.1%}; disagreement at most "
        f"{issued.alpha:g} with confidence {1 - issued.delta:g}, from {issued.scenes:,} "
        f"independent scenes ({data.drawn(issued.sampling)})"
    )
    if issued.escalation_rate >= NEXT_TO_ALL:
        said += "; next to nothing is answered locally: train it further, or accept a larger alpha"
    return said


def folder_of(bundle: BundleDirectory) -> Path:
    """Return where a bundle keeps its certificates."""
    return bundle.path / CERTIFICATES


def _check_pair(edge: BundleDirectory, hub: BundleDirectory) -> None:
    meant = edge.bundle.escalates_to
    if meant is None:
        raise BadInput(f"{_title(edge.bundle)} escalates to no model: nothing to certify against")
    if (meant.model, meant.bundle_sha256) != (hub.bundle.model, hub.sha256):
        raise BadInput(
            f"{_title(edge.bundle)} escalates to {meant.model} with bundle "
            f"{meant.bundle_sha256[:16]}, got {_title(hub.bundle)} with bundle {hub.sha256[:16]}"
        )
    problem = pairing.problem(Contract.of(edge.bundle), Contract.of(hub.bundle))
    if problem is not None:
        raise BadInput(problem)


def _variant(bundle: Bundle, name: str) -> Variant:
    try:
        return bundle.variant(name)
    except KeyError:
        known = ", ".join(variant.name for variant in bundle.variants)
        raise BadInput(f"{_title(bundle)} has no variant {name!r}, it has {known}") from None


def _check_inputs(bundle: Bundle, items: Items, inputs: Mapping[str, Array]) -> None:
    wanted = {spec.name: spec for spec in bundle.inputs}
    for name in wanted:
        if name not in inputs:
            lacking = data.lacking("the calibration set", items, data.INPUT + name)
            raise BadInput(f"{_title(bundle)} takes {name!r}, and {lacking}")
    strange = [f"{data.INPUT}{name}" for name in inputs if name not in wanted]
    if strange:
        raise BadInput(
            f"the calibration set has {', '.join(strange)}, which {_title(bundle)} does not take: "
            "leave out what it does not ask for"
        )
    for name, array in inputs.items():
        try:
            problem = _of_items(wanted[name], bundle).mismatch(array)
        except TensorError as error:
            problem = str(error)
        if problem is not None:
            raise BadInput(f"calibration input {name!r}: {problem}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise BadInput(f"calibration input {name!r} holds values that are not finite")


def _of_items(spec: TensorSpec, bundle: Bundle) -> TensorSpec:
    """Return what any number of items look like; without a batch axis, a run takes one of them."""
    if bundle.max_batch:
        return spec
    return TensorSpec(spec.name, spec.datatype, (-1, *spec.shape[1:]))


def _outputs(
    directory: BundleDirectory,
    variant: Variant,
    provider: str,
    inputs: Mapping[str, Array],
    output: str,
    rows_at_once: int,
    *,
    as_written: bool = False,
) -> Array:
    session = Session(directory.file(variant.path), provider, as_written=as_written)
    outputs = session.run(inputs, rows_at_once)
    if output not in outputs:
        raise BadInput(f"{_title(directory.bundle)} has no output {output!r} to compare")
    return outputs[output]


def _check_finite(
    bundle: Bundle, variant: Variant, score: Score, asked: Asked, outputs: Array
) -> None:
    finite: Array = np.isfinite(asked.logits(outputs))
    broken = asked.in_rows(np.logical_not(finite.all(axis=1))) > 0
    if broken.any():
        raise BadInput(
            f"{_title(bundle)}, variant {variant.name}: the output {score.output!r} is not "
            f"finite on {np.count_nonzero(broken)} calibration items"
        )


def _one_answer(hub: Bundle, score: Score, answers: Array, items: int) -> str:
    if not len(answers):
        return f"the mask {score.mask!r} counts no token of {items} calibration items"
    each = "every token of" if score.per_token else "all"
    return (
        f"the hub's model gives {each} {items} calibration items the same answer "
        f"({_label(hub, int(answers[0]))}): calibrate on items of every class"
    )


def _title(bundle: Bundle) -> str:
    return f"{bundle.model} {bundle.version}"


def _label(bundle: Bundle, answer: int) -> str:
    return repr(bundle.labels[answer]) if answer < len(bundle.labels) else f"class {answer}"
