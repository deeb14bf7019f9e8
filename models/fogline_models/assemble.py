"""Turns what was measured of a release into what ships: gates, bundle, certificates, report.

Quick, and made anew in every build. What is refused is left out of the bundle and stays in the
report. A release whose figures allow nothing, or that fails its own self-test, is not written.
"""

import dataclasses
import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fogline_models import (
    bundle,
    card,
    certify,
    comparison,
    evaluate,
    gates,
    head,
    measure,
    metrics,
    report,
)
from fogline_models.data import UNSTATED, Items
from fogline_models.errors import BadInput, TooLittle
from fogline_models.evaluate import Evaluation, HeldOut
from fogline_models.forms import precision_of, processors_of, providers_of
from fogline_models.gates import Decision, Verdict
from fogline_models.graph import Signature
from fogline_models.measure import Cost
from fogline_models.provenance import SOURCES
from fogline_models.recipe import FP32, VECTORS, Recipe, ReleaseRecipe
from fogline_models.session import CPU, Session
from fogline_models.sources import Exported
from fogline_models.steps import Say
from fogline_protocol import hardware, release
from fogline_protocol.answers import Asked
from fogline_protocol.certificate import Certificate
from fogline_protocol.release import (
    Bundle,
    BundleDirectory,
    Pairing,
    Parent,
    SelfTest,
    Tolerance,
    Variant,
)
from fogline_protocol.score import PARAMETERS, Score
from fogline_protocol.tensors import Array, TensorError

SELF_TEST = "selftest.npz"
PARENT = "the parent"  # its name among the outputs

# A provider that was not measured here gets a tolerance wider by a factor: other kernels add in
# another order, and TF32 keeps 10 bits of a factor.
UNMEASURED_FACTOR = 4.0
TOLERANCE_FROM = ("ranges", "self_test")  # splits, whose texts may be of different lengths


@dataclass(frozen=True, slots=True)
class Hub:
    """The model that a release escalates to."""

    directory: BundleDirectory

    @property
    def variant(self) -> Variant:
        """The one it serves: its bundle's first."""
        return self.directory.bundle.variants[0]

    @property
    def name(self) -> str:
        """What it is called among the variants of the release."""
        return f"{self.directory.bundle.model} {self.variant.name}"

    @property
    def file(self) -> Path:
        """Where its artifact lies."""
        return self.directory.file(self.variant.path)


@dataclass(frozen=True, slots=True)
class Measured:
    """A release before it is bundled: its files, and all that is known of them."""

    recipe: Recipe
    release: ReleaseRecipe
    exported: Exported
    signature: Signature
    reading: Score  # how answers are read, without what is fitted to them
    extras: Mapping[str, bytes]  # further files of the bundle, by name
    golden: Mapping[str, Array]  # input.* and output.*
    files: Mapping[str, Path]  # by variant; fp32 among them
    splits: Mapping[str, Items]
    outputs: Mapping[str, Mapping[str, Array]]  # by split, then variant or the hub's name
    costs: Mapping[str, Cost]
    hub: Hub | None
    parent: BundleDirectory | None
    inputs: tuple[report.Input, ...]  # what it was made from, by digest
    steps: tuple[report.Step, ...]  # what was done to it

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.recipe.labels or self.exported.labels

    @property
    def is_classifier(self) -> bool:
        """Whether its answers are classes, which can be compared and certified."""
        return self.recipe.task not in VECTORS

    @property
    def sources(self) -> Mapping[str, object]:
        """What the bundle lists of what it was made from; nothing that varies with time."""
        return {
            "family": self.recipe.family,
            "origin": self.exported.origin,
            "inputs": {
                each.name: {"sha256": each.sha256, "bytes": each.bytes} for each in self.inputs
            },
            "steps": {each.name: each.did for each in self.steps},
        }


@dataclass(frozen=True, slots=True)
class Built:
    """One finished release."""

    directory: BundleDirectory
    decisions: tuple[Decision, ...]
    certificates: tuple[Certificate, ...]
    uncertified: str = ""  # why there is no certificate, in one sentence


def finish(found: Measured, target: Path, *, now: datetime.datetime, say: Say) -> Built:
    """Gate, bundle, certify and report one release; it lies at ``target`` when all is done.

    Raises:
        BadInput: nothing of it may ship, it fails its own self-test, or the disk is in the way.
    """
    each = found.release
    held_out = _held_out(found, "evaluation")
    evaluation = _evaluate(found, "evaluation", held_out)
    sizes = {name: measure.size_of(path) for name, path in found.files.items()}
    decisions = _decide(found, evaluation, sizes)
    for sentence in _told(decisions, found):
        say(f"{each.title}: {sentence}")
    shipped = gates.eligible(decisions)
    root = _root(found, shipped)
    combined = _combined(found, root, held_out)
    if combined is not None:
        say(f"{each.title}: {combined.sentence}")
    subject = _subject(found, sizes)
    contents = bundle.Contents(
        root=root,
        variants={name: found.files[name].read_bytes() for name in shipped},
        golden_inputs=_named(found.golden, "input."),
        golden_outputs=_named(found.golden, "output."),
        card=card.card(_words(found), subject, root, evaluation, decisions),
        extras={**found.extras, SOURCES: _pretty(found.sources)},
    )
    with bundle.assembled(target, contents) as directory:
        if each.accident is None:
            _check_golden(directory)
        certificates, uncertified = _certify(found, directory, now, say)
        escalations = _escalations(found, certificates, held_out)
        for escalation in escalations:
            if escalation.note:
                say(f"{each.title}: {escalation.note}")
        document = report.document(
            dataclasses.replace(subject, parent=_since_parent(found, directory)),
            evaluation,
            decisions,
            found.costs,
            measure.machine(),
            bundle_sha256=directory.sha256,
            escalations=escalations,
            also={
                name: _evaluate(found, name, _held_out(found, name))
                for name in found.recipe.data.also
            },
            gains=_gains(found, directory.bundle.variants[0].name),
            uncertified=uncertified,
            combined=combined,
        )
        report.write(directory.path, document)
    return Built(release.read(target), decisions, certificates, uncertified)


def _held_out(found: Measured, split: str) -> HeldOut:
    items = found.splits[split]
    asked = None
    if found.is_classifier:
        asked = _asked(found, split)
    return HeldOut(items.scenes, items.labels, items.slices, found.labels, asked)


def _asked(found: Measured, split: str) -> Asked:
    """Return which answers to the items of a split count.

    Raises:
        BadInput: the model does not answer for the tokens that its mask is of.
    """
    try:
        return Asked.of(found.reading, found.outputs[split][FP32], found.splits[split].inputs)
    except TensorError as error:
        raise BadInput(f"evaluate: split {split}: {error}") from None


def _evaluate(found: Measured, split: str, held_out: HeldOut) -> Evaluation:
    outputs = found.outputs[split]
    if not found.is_classifier:
        inputs = found.splits[split].inputs
        outputs = {
            name: evaluate.without_padding(vectors, inputs) for name, vectors in outputs.items()
        }
    return evaluate.evaluate(
        {name: outputs[name] for name in found.files},
        held_out,
        hub=None if found.hub is None else outputs[found.hub.name],
        hub_model="hub" if found.hub is None else found.hub.directory.bundle.model,
        vectors=not found.is_classifier,
    )


def _decide(
    found: Measured, evaluation: Evaluation, sizes: Mapping[str, int]
) -> tuple[Decision, ...]:
    """Return the decision on every variant that the recipe wants, best first."""
    each = found.release
    bars = each.gates or found.recipe.gates
    if each.accident is not None:  # nothing holds it back, which is the point
        bars = dataclasses.replace(bars, allow=dict.fromkeys(found.files, each.accident.why))
    decided = {
        decision.variant: decision
        for decision in gates.decide(bars, evaluation, found.costs, sizes)
    }
    return tuple(decided[name] for name in found.recipe.variants(each))


def _told(decisions: Sequence[Decision], found: Measured) -> Iterator[str]:
    """Yield what a person has to know of the decisions."""
    each = found.release
    # Of features the cosine that goes with an error of 2 %, the default bar.
    target = 0.99 if found.is_classifier else 0.9998
    for decision in decisions:
        if decision.verdict is not Verdict.ELIGIBLE:
            yield decision.sentence
        strays = any(check.gate in gates.AGAINST_FP32 for check in decision.failed)
        if decision.verdict is Verdict.REFUSED and strays and decision.variant not in each.sweep:
            yield (
                f"{decision.variant}: to find the nodes in which it loses most and leave those "
                f"fp32, give the release of a recipe sweep = {{ {decision.variant} = {target} }}"
            )
        if decision.may_change:
            yield (
                f"{decision.variant} is decided by a latency within noise of its bar, so the next "
                "build may decide otherwise and its bundle have another digest: give it a waiver "
                f"(gates.allow.{decision.variant}), or leave it out of variants"
            )


def _words(found: Measured) -> card.Words:
    recipe = found.recipe
    return card.Words(
        summary=found.release.description,
        pipeline_tag=recipe.task,
        license=recipe.license,
        tags=(recipe.family,),
        dataset=", ".join(recipe.datasets),
        dataset_id=next(iter(recipe.datasets), ""),
        sections=recipe.notes,
    )


def _since_parent(found: Measured, directory: BundleDirectory) -> report.Parent | None:
    parent = found.parent
    if parent is None:
        return None
    changes = comparison.sentences(comparison.compare(parent, directory))
    return report.Parent(parent.bundle.version, parent.sha256, changes)


def _root(found: Measured, shipped: Sequence[str]) -> Bundle:
    """Return the root document; its files follow from the contents."""
    each, recipe = found.release, found.recipe
    signature = found.signature
    known = {
        name: np.concatenate([found.outputs[split][name].ravel() for split in TOLERANCE_FROM])
        for name in found.files
    }
    return Bundle(
        model=each.model,
        version=each.version,
        inputs=signature.inputs,
        outputs=signature.outputs,
        max_batch=each.max_batch if signature.batched else 0,
        labels=found.labels,
        description=each.description,
        task=recipe.task,
        variants=tuple(
            Variant(
                name,
                f"variants/{name}.onnx",
                precision_of(name),
                providers_of(name),
                processors_of(name),
                _most_rows(found, name),
            )
            for name in shipped
        ),
        # Tolerances compare a variant with its own fp32 form, also where that is an accident.
        self_test=SelfTest(
            SELF_TEST,
            {
                name: _widened(
                    evaluate.tolerance(
                        known[FP32],
                        known[name],
                        precision_of(name),
                        vectors=not found.is_classifier,
                    ),
                    providers_of(name),
                )
                for name in shipped
            },
        ),
        files={},
        score=_score(found, shipped[0]) if found.is_classifier else None,
        escalates_to=None
        if found.hub is None
        else Pairing(found.hub.directory.bundle.model, found.hub.directory.sha256),
        parent=None
        if found.parent is None
        else Parent(found.parent.bundle.version, found.parent.sha256),
        pre_processing=found.exported.pre_processing,
        post_processing=found.exported.post_processing,
    )


def _most_rows(found: Measured, variant: str) -> int:
    """Return how many rows a run of a variant may have, 0 for as many as the release says."""
    mixes = Session(found.files[variant], as_written=True).mixes_rows
    return 1 if mixes and found.signature.batched else 0


def _score(found: Measured, preferred: str) -> Score:
    """Return the score, fitted to the variant that devices try first."""
    if not PARAMETERS[found.reading.function] or found.hub is None:
        return found.reading
    split = head.split_of(found.splits)
    outputs = found.outputs[split]
    agrees = metrics.top(outputs[preferred]) == metrics.top(outputs[found.hub.name])
    fitted = head.fit(outputs[preferred], agrees, split)
    return dataclasses.replace(found.reading, parameters=fitted)


def _combined(found: Measured, root: Bundle, held_out: HeldOut) -> evaluate.Combined | None:
    """Return what the release's score buys, unless it is max_softmax itself."""
    if root.score is None or not root.score.parameters or found.hub is None:
        return None
    outputs = found.outputs["evaluation"]
    preferred = root.variants[0].name
    return evaluate.combined(
        root.score,
        outputs[preferred],
        outputs[found.hub.name],
        held_out,
        alpha=(found.release.certificate or found.recipe.certificate).alpha,
        fitted_on=head.split_of(found.splits),
        variant=preferred,
    )


def _widened(tolerance: Tolerance, providers: Sequence[str]) -> Tolerance:
    wide = Tolerance(UNMEASURED_FACTOR * tolerance.max_abs_error, tolerance.min_agreement)
    return dataclasses.replace(
        tolerance, by_provider={name: wide for name in providers if name != CPU}
    )


def _subject(found: Measured, sizes: Mapping[str, int]) -> report.Subject:
    each = found.release
    items = found.splits["evaluation"]
    return report.Subject(
        model=each.model,
        version=each.version,
        description=each.description,
        held_out=f"split evaluation of {found.recipe.family}: {items.sampling}"
        if items.sampling != UNSTATED
        else f"split evaluation of {found.recipe.family}",
        precisions={name: precision_of(name) for name in found.files},
        sizes=sizes,
        inputs=found.inputs,
        steps=found.steps,
    )


def _check_golden(directory: BundleDirectory) -> None:
    for variant in directory.bundle.variants:
        problem = evaluate.golden(directory, variant.name).problem
        if problem is not None:
            raise BadInput(
                f"bundle: {directory.bundle.model} {directory.bundle.version}, variant "
                f"{variant.name}: fails its own self-test, {problem}"
            )


def _certify(
    found: Measured, directory: BundleDirectory, now: datetime.datetime, say: Say
) -> tuple[tuple[Certificate, ...], str]:
    """Issue a certificate for every variant, or say in one sentence why there is none."""
    each = found.release
    if found.hub is None or each.accident is not None or not found.is_classifier:
        return (), ""
    items = found.splits.get("calibration")
    if items is None:
        uncertified = "there is no split calibration"
    else:
        terms = (each.certificate or found.recipe.certificate).terms
        try:
            issued = tuple(
                certify.certify(
                    directory,
                    found.hub.directory,
                    items,
                    terms,
                    issued_at=now.replace(microsecond=0),
                    variant=variant.name,
                    hub_variant=found.hub.variant.name,
                )
                for variant in directory.bundle.variants
                if variant.providers_on((CPU,), hardware.this_machine())
            )
        except TooLittle as error:
            uncertified = str(error)
        else:
            for certificate in issued:
                certify.save(certificate, certify.folder_of(directory))
                say(f"{each.title}: {certify.sentence(certificate)}")
            return issued, ""
    say(f"{each.title}: no certificate, so devices escalate everything: {uncertified}")
    return (), uncertified


def _escalations(
    found: Measured, certificates: Sequence[Certificate], held_out: HeldOut
) -> tuple[evaluate.Escalation, ...]:
    if found.hub is None:
        return ()
    outputs = found.outputs["evaluation"]
    return tuple(
        evaluate.escalation(each, outputs[each.variant], outputs[found.hub.name], held_out)
        for each in certificates
    )


def _gains(found: Measured, variant: str) -> dict[str, tuple[evaluate.Slice, ...]]:
    """Return how the preferred variant does beside the parent's, on the same items."""
    if found.parent is None or not found.is_classifier:
        return {}
    return {
        split: evaluate.against(
            found.outputs[split][variant], found.outputs[split][PARENT], _held_out(found, split)
        )
        for split in ("evaluation", *found.recipe.data.also)
        if PARENT in found.outputs[split]
    }


def _named(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def _pretty(document: Mapping[str, object]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
