"""What the lists of models and releases say. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cloud_hub.console import figures
from cloud_hub.console.fleet_views import plain
from cloud_hub.console.roster import Line
from cloud_hub.fleet.releases import Release

MODELS_AT_ONCE = 20
RELEASES_AT_ONCE = 50
LATEST_SHOWN = 5  # releases of each model, where all models are listed


@dataclass(frozen=True, slots=True)
class ReleaseLine:
    """One release in the list of its model."""

    name: str  # MODEL@NUMBER
    path: str
    number: int
    version: str
    accepted: str
    accepted_at: str
    size: str
    forced: bool
    running: int  # devices
    variants: Sequence[tuple[str, int]]  # of the bundle, with the devices that run it, if any
    untold: int  # devices whose agent does not tell the variant, or that name another
    fallback: int  # devices that serve something else than is meant for them
    wanted: int
    escalates_to: str
    parent: str  # MODEL@NUMBER, a version that this hub does not have, or empty


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One model and its releases, the latest first."""

    name: str
    task: str
    description: str
    releases: Sequence[ReleaseLine]  # of this page
    total: int
    share: Sequence[tuple[str, int, float]]  # release, devices that run it, share of a hundred


class Adoption:
    """How many devices run and want each release of one model; the devices are read once."""

    def __init__(self, model: str, lines: Sequence[Line]) -> None:
        held = [found for line in lines if (found := line.model(model)) is not None]
        self.running = Counter(found.running for found in held)
        self.wanted = Counter(found.wanted for found in held)
        self.variants = Counter((one.running, one.served.variant) for one in held if one.served)
        self.fallback = Counter(
            found.running for found in held if found.served and found.served.instead_of
        )


def models(
    releases: Sequence[Release], lines: Sequence[Line], *, page: int, now: float
) -> tuple[list[ModelCard], int]:
    """Return the models of one page with their latest releases, and how many models there are."""
    by_model: dict[str, list[Release]] = {}
    for release in releases:
        by_model.setdefault(release.model, []).append(release)
    names = sorted(by_model)[(page - 1) * MODELS_AT_ONCE :][:MODELS_AT_ONCE]
    cards = [model(by_model[name], lines, first=0, most=LATEST_SHOWN, now=now) for name in names]
    return cards, len(by_model)


def model(
    own: Sequence[Release], lines: Sequence[Line], *, first: int, most: int, now: float
) -> ModelCard:
    """Return one model with ``most`` of its releases, at least one, from ``first`` on."""
    latest = own[0]
    adoption = Adoption(latest.model, lines)
    numbers = {release.bundle_sha256: release.number for release in own}
    run = [(r, adoption.running[r.number]) for r in own if adoption.running[r.number]]
    devices = sum(count for _, count in run)
    return ModelCard(
        name=latest.model,
        task=plain(latest.bundle.task).capitalize(),
        description=latest.bundle.description,
        releases=[
            release_line(release, adoption, numbers, now=now)
            for release in own[first : first + most]
        ],
        total=len(own),
        share=[
            (f"{r.model}@{r.number}", count, round(100 * count / devices, 2)) for r, count in run
        ],
    )


def release_line(
    release: Release, adoption: Adoption, numbers: Mapping[str, int], *, now: float
) -> ReleaseLine:
    """Return one release; ``numbers`` are those of its model's releases, by bundle digest."""
    parent = release.bundle.parent
    variants = [
        (variant.name, count)
        for variant in release.bundle.variants
        if (count := adoption.variants[release.number, variant.name])
    ]
    running = adoption.running[release.number]
    known = numbers.get(parent.bundle_sha256) if parent is not None else None
    return ReleaseLine(
        name=f"{release.model}@{release.number}",
        path=f"/models/{release.model}/{release.number}",
        number=release.number,
        version=release.version,
        accepted=figures.ago(now - release.accepted_at),
        accepted_at=figures.iso(release.accepted_at),
        size=str(figures.size(release.size_bytes)),
        forced=release.forced,
        running=running,
        variants=variants,
        untold=running - sum(count for _, count in variants),
        fallback=adoption.fallback[release.number],
        wanted=adoption.wanted[release.number],
        escalates_to=release.escalates_to.model if release.escalates_to else "",
        parent=f"{release.model}@{known}" if known else parent.version if parent else "",
    )
