"""What a release page says of parent and children, and of what changed. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloud_hub.console import figures, report_views
from cloud_hub.console.model_views import Adoption, ReleaseLine, release_line
from cloud_hub.console.report_views import Report, Said
from cloud_hub.fleet.lineage import Fetch, Lineage
from cloud_hub.fleet.releases import Release
from fogline_protocol.release import Bundle, Processing
from fogline_protocol.tensors import TensorSpec

CHILDREN_SHOWN = 12
ARROW = " \N{RIGHTWARDS ARROW} "


@dataclass(frozen=True, slots=True)
class ChangeLine:
    """One variant against the same of the parent."""

    variant: str
    accuracy: Said
    size: Said
    fetch: Said


@dataclass(frozen=True, slots=True)
class Before:
    """The parent of a release, as far as this hub has it."""

    bundle: Bundle
    report: Mapping[str, Any]
    fetches: Mapping[str, Fetch]  # by variant of the release


@dataclass(frozen=True, slots=True)
class LineageView:
    """Where a release comes from and what came from it."""

    sentence: str
    parent: ReleaseLine | None
    unknown: str  # the version of a parent that this hub does not have
    unknown_sha256: str
    children: Sequence[ReleaseLine]
    more_children: int
    changes: Sequence[ChangeLine]  # against the parent
    contract: Sequence[str]  # what an application notices of it


def lineage_view(
    release: Release,
    numbers: Mapping[str, int],
    lineage: Lineage,
    before: Before | None,
    report: Report | None,
    adoption: Adoption,
    *,
    now: float,
) -> LineageView:
    """Return the lineage of a release; ``numbers`` as in ``release_line``."""

    def related(one: Release) -> ReleaseLine:
        return release_line(one, adoption, numbers, now=now)

    return LineageView(
        sentence=_descent(release, lineage),
        parent=related(lineage.parent) if lineage.parent else None,
        unknown=lineage.named.version if lineage.unknown and lineage.named else "",
        unknown_sha256=lineage.named.bundle_sha256 if lineage.named else "",
        children=[related(one) for one in lineage.children[-CHILDREN_SHOWN:]],
        more_children=max(len(lineage.children) - CHILDREN_SHOWN, 0),
        changes=list(_changes(release.bundle, report, before)) if before else [],
        contract=_contract_changes(before.bundle, release.bundle) if before else [],
    )


def _contract_changes(before: Bundle, after: Bundle) -> list[str]:
    """Return what an application notices that goes from one bundle to the other."""
    said = []
    for what, old, new in (
        ("Inputs", _specs(before.inputs), _specs(after.inputs)),
        ("Outputs", _specs(before.outputs), _specs(after.outputs)),
        ("Rows in a run", str(before.max_batch), str(after.max_batch)),
        ("Pre-processing", _chain(before.pre_processing), _chain(after.pre_processing)),
        ("Post-processing", _chain(before.post_processing), _chain(after.post_processing)),
        ("Score", _said(before.score), _said(after.score)),
    ):
        if old != new:
            said.append(f"{what}: {old}{ARROW}{new}.")
    if before.labels != after.labels:
        gone = len(set(before.labels) - set(after.labels))
        new_ones = len(set(after.labels) - set(before.labels))
        said.append(f"Classes: {gone} gone, {new_ones} new, {len(after.labels)} in all.")
    if before.escalates_to != after.escalates_to:
        theirs, ours = before.escalates_to, after.escalates_to
        said.append(
            f"Escalates to {ours.model if ours else 'no model'}"
            + (", another file of it" if theirs and ours and theirs.model == ours.model else "")
            + "."
        )
    return said


def _descent(release: Release, lineage: Lineage) -> str:
    if lineage.named is None:
        return "Its bundle names no parent: it begins a line of its own."
    if lineage.parent is None:
        return (
            f"It was made to replace {release.model} {lineage.named.version}, which this hub does "
            "not have: what changed cannot be told. Push that bundle and it is found."
        )
    return ""


def _changes(bundle: Bundle, report: Report | None, before: Before) -> Iterator[ChangeLine]:
    old_report = report_views.read(before.report)
    old_sizes = {v.name: before.bundle.files[v.path].bytes for v in before.bundle.variants}
    for variant in bundle.variants:
        size = bundle.files[variant.path].bytes
        old_size = old_sizes.pop(variant.name, None)
        fetch = before.fetches[variant.name]
        yield ChangeLine(
            variant=variant.name,
            accuracy=_accuracies(old_report, report, variant.name),
            size=Said(str(figures.size(size)), "new variant")
            if old_size is None
            else Said(
                f"{figures.size(old_size)}{ARROW}{figures.size(size)}",
                f"{size / old_size:.2f} \N{MULTIPLICATION SIGN}" if old_size else "",
            ),
            fetch=Said(str(figures.size(fetch.bytes)), f"of {figures.size(fetch.whole)}"),
        )
    for name, old_size in old_sizes.items():
        yield ChangeLine(name, Said(), Said(str(figures.size(old_size)), "gone"), Said())


def _accuracies(before: Report | None, after: Report | None, variant: str) -> Said:
    """Return one accuracy beside the other, where both reports have one."""
    old, new = (
        report.variants[variant].accuracy.value
        if report is not None and variant in report.variants
        else figures.NOTHING
        for report in (before, after)
    )
    if figures.NOTHING in (old, new):
        whose = "the parent's report" if old == figures.NOTHING else "this report"
        return Said(old if new == figures.NOTHING else new, f"{whose} has none")
    return Said(f"{old}{ARROW}{new}")


def _chain(steps: Sequence[Processing]) -> str:
    return ", ".join(" ".join(processing(step)).strip() for step in steps) or "none"


def _specs(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.datatype} {shape(spec)}" for spec in specs)


def _said(score: Any) -> str:
    return str(score) if score is not None else "none"


def shape(spec: TensorSpec) -> str:
    """Return a tensor's shape with ``n`` for what is open: ``[n, 1, 8, 8]``."""
    return "[" + ", ".join("n" if size == -1 else str(size) for size in spec.shape) + "]"


def processing(step: Processing) -> tuple[str, str]:
    """Return what a step of pre- or post-processing is, and with what."""
    said = [f"{name} {value}" for name, value in sorted(step.parameters.items())]
    return step.kind, ", ".join([*step.files, *said])
