"""What the page of a release says. Pure.

It joins three sources, and tells them apart: what the hub checked and signed (the
bundle, its certificates), what it counts (devices), and what the workshop claims (the report).
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from cloud_hub.console import certificate_views, figures, report_views, serving_views
from cloud_hub.console.fleet_views import plain
from cloud_hub.console.lineage_views import Before, LineageView, lineage_view, processing
from cloud_hub.console.model_views import Adoption, ReleaseLine, release_line
from cloud_hub.console.report_views import FactGroup, Figures, Report, Said
from cloud_hub.console.roster import Line
from cloud_hub.console.serving_views import AsideLine
from cloud_hub.fleet.certificates import Issued
from cloud_hub.fleet.lineage import Lineage
from cloud_hub.fleet.releases import Release
from fogline_protocol.certificate import NEVER, Certificate
from fogline_protocol.release import Tolerance
from fogline_protocol.tensors import TensorSpec

CLASSES_SHOWN = 20
ASIDES_SHOWN = 8
LABELS_SHOWN = 60
ARROW = " \N{RIGHTWARDS ARROW} "


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure at the head of a page."""

    label: str
    value: str
    unit: str
    note: str


@dataclass(frozen=True, slots=True)
class VariantLine:
    """One artifact of a release, or one that the workshop refused."""

    name: str
    precision: str
    providers: str
    size: Said
    verdict: str  # Ships, Waived or Refused
    sentence: str
    figures: Figures | None  # as the report has them
    self_test: str  # what the hub measured; empty for what is not in the bundle
    tolerances: Sequence[tuple[str, str]]  # execution provider and words
    running: int = 0  # devices that say that they answer with it


@dataclass(frozen=True, slots=True)
class CertificateLine:
    """One certificate of a release."""

    id: str
    sentence: str
    held_out: str  # what the report says of it; may be empty
    variant: str
    hardware_class: str
    threshold: str
    escalation: str
    expires: str
    expires_at: str
    state: str  # Holds, Withdrawn or Expired
    reason: str


@dataclass(frozen=True, slots=True)
class ClassLine:
    """The devices of one hardware class."""

    hardware_class: str
    running: int
    variants: Sequence[tuple[str, int]]  # of the bundle, as far as devices tell
    wanted: int
    refused: int  # wanted there, and given up
    certificate: str  # Holds, Partly or None: for what runs there


@dataclass(frozen=True, slots=True)
class ReleasePage:
    """Everything on the page of one release, except its card."""

    line: ReleaseLine
    task: str
    description: str
    tiles: Sequence[Tile]
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    before: Sequence[tuple[str, str]]  # pre-processing: kind and words
    after: Sequence[tuple[str, str]]
    max_batch: str
    labels: str
    score: str
    escalates_to_sha256: str
    variants: Sequence[VariantLine]
    certificates: Sequence[CertificateLine]
    classes: Sequence[ClassLine]
    more_classes: int
    asides: Sequence[AsideLine]
    more_asides: int
    lineage: LineageView
    report: Report | None
    facts: Sequence[FactGroup]  # of a report of another form
    files: Sequence[tuple[str, str, str]]  # name, size, SHA-256
    bundle_sha256: str


def release_page(
    release: Release,
    family: Sequence[Release],
    lineage: Lineage,
    before: Before | None,
    document: Mapping[str, Any],
    issued: Sequence[Issued],
    lines: Sequence[Line],
    *,
    now: float,
) -> ReleasePage:
    """Return the page of one release.

    Args:
        release: the one.
        family: every release of its model.
        lineage: its own, among them.
        before: its parent, if this hub has it.
        document: the workshop's report; it may hold anything.
        issued: its certificates.
        lines: every device.
        now: seconds since 1970.
    """
    bundle = release.bundle
    adoption = Adoption(release.model, lines)
    numbers = {one.bundle_sha256: one.number for one in family}
    line = release_line(release, adoption, numbers, now=now)
    report = report_views.read(document)
    variants = list(_variants(release, report, adoption))
    certificates = [_certificate(one, report, now) for one in issued]
    holding = [one.certificate for one in issued if certificate_views.state(one, now) == "Holds"]
    classes = _classes(release, lines, holding)
    asides = serving_views.asides(release.model, release.number, lines)

    return ReleasePage(
        line=line,
        task=plain(bundle.task).capitalize(),
        description=bundle.description,
        tiles=list(_tiles(variants, report, holding)),
        inputs=bundle.inputs,
        outputs=bundle.outputs,
        before=[processing(step) for step in bundle.pre_processing],
        after=[processing(step) for step in bundle.post_processing],
        max_batch=figures.count(bundle.max_batch) if bundle.max_batch else "no batch dimension",
        labels=_labels(bundle.labels),
        score=str(bundle.score) if bundle.score else figures.NOTHING,
        escalates_to_sha256=release.escalates_to.bundle_sha256 if release.escalates_to else "",
        variants=variants,
        certificates=certificates,
        classes=classes[:CLASSES_SHOWN],
        more_classes=max(len(classes) - CLASSES_SHOWN, 0),
        asides=asides[:ASIDES_SHOWN],
        more_asides=max(len(asides) - ASIDES_SHOWN, 0),
        lineage=lineage_view(release, numbers, lineage, before, report, adoption, now=now),
        report=report,
        facts=[] if report else report_views.facts(document),
        files=[
            (name, str(figures.size(file.bytes)), file.sha256)
            for name, file in sorted(bundle.files.items())
        ],
        bundle_sha256=release.bundle_sha256,
    )


def _tiles(
    variants: Sequence[VariantLine],
    report: Report | None,
    holding: Sequence[Certificate],
) -> Iterator[Tile]:
    best = variants[0]
    found = best.figures
    if found is not None and found.share is not None:
        note = f"{best.name}, 95% interval {found.accuracy.note}"
        yield _tile("Accuracy", found.accuracy.value, note)
    elif found is not None and found.cosine.value != figures.NOTHING and report is not None:
        note = f"{best.name}, {found.cosine.note}"
        yield _tile(f"Cosine with {report.reference}", found.cosine.value, note)
    certified = next((one for one in holding if one.variant == best.name), None)
    if certified is not None:
        local = 0.0 if certified.threshold == NEVER else 1 - certified.escalation_rate
        note = f"{best.name}, on its calibration scenes; the rest goes to {certified.hub_model}"
        yield _tile("Answered on the device", figures.percent(local), note)
    if found is not None and found.latency.value != figures.NOTHING and report is not None:
        note = f"{best.name}, {found.latency.note} {report.reference}, in the workshop"
        yield _tile(f"Latency, batch {report.batch}", found.latency.value, note)
    yield _tile("Size", best.size.value, f"{best.name}; {best.size.note or 'the only variant'}")


def _tile(label: str, figure: str, note: str) -> Tile:
    value, _, unit = figure.partition("\N{NO-BREAK SPACE}")
    if value.endswith("%"):
        value, unit = value[:-1], "%"
    return Tile(label, value, unit, note)


def _variants(release: Release, report: Report | None, adoption: Adoption) -> Iterator[VariantLine]:
    bundle = release.bundle
    told = report.variants if report is not None else {}
    sizes = {v.name: bundle.files[v.path].bytes for v in bundle.variants}
    reference = report.reference if report is not None else "fp32"
    whole = sizes.get(reference) or (told[reference].size_bytes if reference in told else None)
    for variant in bundle.variants:
        found = told.get(variant.name)
        verdict = found.verdict if found is not None else ""
        sentence = found.sentence if found is not None else ""
        if verdict == "Refused":  # then the bundle and the report beside it do not belong together
            verdict, sentence = "Waived", f"{sentence}. The bundle ships it all the same."
        yield VariantLine(
            name=variant.name,
            precision=variant.precision,
            providers=", ".join(variant.providers),
            size=_size(sizes[variant.name], whole, is_reference=variant.name == reference),
            verdict=verdict or "Ships",
            sentence=sentence,
            figures=found,
            self_test=_measured(release.self_test.get(variant.name, {})),
            tolerances=list(_tolerances(bundle.self_test.tolerances[variant.name])),
            running=adoption.variants[release.number, variant.name],
        )
    for name, found in told.items():
        if name not in sizes and found.verdict == "Refused":
            yield VariantLine(
                name=name,
                precision=found.precision,
                providers="",
                size=_size(found.size_bytes, whole, is_reference=name == reference),
                verdict="Refused",
                sentence=found.sentence,
                figures=found,
                self_test="",
                tolerances=(),
            )


def _size(own: float | None, whole: float | None, *, is_reference: bool) -> Said:
    if own is None:
        return Said()
    ratio = f"{own / whole:.2f} \N{MULTIPLICATION SIGN}" if whole and not is_reference else ""
    return Said(str(figures.size(own)), ratio)


def _tolerances(tolerance: Tolerance) -> Iterator[tuple[str, str]]:
    yield "", allowed(tolerance)
    for provider, own in sorted(tolerance.by_provider.items()):
        yield provider, allowed(own)


def allowed(tolerance: Tolerance) -> str:
    """Return what a self-test lets pass, in words."""
    said, least = f"error at most {tolerance.max_abs_error:.4g}", tolerance.min_agreement
    if not least:
        return said  # of vectors: they have no answer to agree on
    share = figures.percent(least) if 0 < least <= 1 else f"{least:g}"
    return f"{said}, agreement at least {share}"


def _measured(values: Mapping[str, float]) -> str:
    if not values:
        return "not run on this hub"
    said = []
    if "max_abs_error" in values:
        said.append(f"error {values['max_abs_error']:.4g}")
    if "agreement" in values and math.isfinite(values["agreement"]):
        said.append(f"agreement {figures.percent(values['agreement'])}")
    said += [
        f"{plain(name)} {value:.4g}"
        for name, value in sorted(values.items())
        if name not in ("max_abs_error", "agreement")
    ]
    return ", ".join(said)


def _certificate(one: Issued, report: Report | None, now: float) -> CertificateLine:
    document = one.certificate
    never = document.threshold == NEVER
    return CertificateLine(
        id=one.id,
        sentence=certificate_views.promise(document),
        held_out=report.together.get((document.variant, document.hardware_class), "")
        if report is not None
        else "",
        variant=document.variant,
        hardware_class=document.hardware_class,
        threshold="always escalates" if never else f"{document.threshold:.4f}",
        escalation=f"{figures.percent(document.escalation_rate)}, at most "
        f"{figures.percent(document.escalation_rate_upper)}",
        expires=f"{document.expires_at:%Y-%m-%d}",
        expires_at=figures.iso(document.expires_at.timestamp()),
        state=certificate_views.state(one, now),
        reason=one.reason,
    )


def _classes(
    release: Release, lines: Sequence[Line], holding: Sequence[Certificate]
) -> list[ClassLine]:
    """Return the hardware classes that run or are to run a release, the most devices first."""
    classes: dict[str, Counter[str]] = {}
    running: dict[str, Counter[str]] = {}  # by variant; empty: not told
    for line in lines:
        found = line.model(release.model)
        if found is None or release.number not in (found.running, found.wanted):
            continue
        runs = found.running == release.number
        # A certificate is issued for what a session runs on, which may be less than the best.
        name = found.served.hardware_class if runs and found.served else ""
        count = classes.setdefault(name or line.hardware_class, Counter())
        count["wanted"] += found.wanted == release.number
        count["refused"] += found.wanted == release.number and found.failed
        if runs:
            variants = running.setdefault(name or line.hardware_class, Counter())
            variants[found.served.variant if found.served else ""] += 1
    shown = []
    for name, count in classes.items():
        variants = running.get(name, Counter())
        shown.append(
            ClassLine(
                hardware_class=name or "not reported",
                running=variants.total(),
                variants=[
                    (v.name, variants[v.name]) for v in release.bundle.variants if variants[v.name]
                ],
                wanted=count["wanted"],
                refused=count["refused"],
                certificate=_covered(
                    variants.keys() - {""},
                    {one.variant for one in holding if one.hardware_class == name},
                ),
            )
        )
    shown.sort(key=lambda one: (-one.running, -one.wanted, one.hardware_class))
    return shown


def _covered(running: Set[str], certified: Set[str]) -> str:
    """Return whether certificates hold for what runs, or may run where nobody tells."""
    if not certified or (running and not running & certified):
        return "None"
    return "Holds" if running <= certified else "Partly"


def _labels(labels: Sequence[str]) -> str:
    shown = ", ".join(labels[:LABELS_SHOWN]) or figures.NOTHING
    left = len(labels) - LABELS_SHOWN
    return f"{shown} and {figures.count(left)} more" if left > 0 else shown
