"""What the pages of models, releases and deployments say. Pure.

``plan`` decides what a deployment will do to each device, before anybody confirms it: the page
that asks shows it, and what is then wanted is exactly the devices it names.
"""

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloud_hub.console import figures
from cloud_hub.console.api import BadParameter
from cloud_hub.console.fleet_views import many, plain
from cloud_hub.console.roster import Line, natural
from cloud_hub.fleet.certificates import Issued
from cloud_hub.fleet.releases import Release
from fogline_protocol.certificate import NEVER
from fogline_protocol.tensors import TensorSpec

STEPS_SHOWN = 200
FACTS_SHOWN = 200
LONGEST_FACT = 200


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
    wanted: int
    escalates_to: str


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One model and its releases, the latest first."""

    name: str
    description: str
    releases: Sequence[ReleaseLine]
    share: Sequence[tuple[ReleaseLine, float]]  # of the devices that run it, by release


@dataclass(frozen=True, slots=True)
class VariantLine:
    """One artifact of a release."""

    name: str
    precision: str
    providers: str
    path: str
    size: str
    self_test: str  # what the hub measured
    tolerance: str


@dataclass(frozen=True, slots=True)
class CertificateLine:
    """One certificate of a release."""

    id: str
    variant: str
    hardware_class: str
    alpha: str
    delta: str
    threshold: str
    escalation: str
    expires: str
    expires_at: str
    state: str  # Holds, Withdrawn or Expired
    reason: str


@dataclass(frozen=True, slots=True)
class FactGroup:
    """One part of the workshop's report."""

    title: str
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class ReleasePage:
    """Everything on the page of one release, except its card."""

    line: ReleaseLine
    description: str
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    max_batch: str
    labels: str
    score: str
    escalates_to_sha256: str
    variants: Sequence[VariantLine]
    certificates: Sequence[CertificateLine]
    report: Sequence[FactGroup]
    files: Sequence[tuple[str, str, str]]  # name, size, SHA-256
    bundle_sha256: str


@dataclass(frozen=True, slots=True)
class Step:
    """What a deployment does to one device."""

    device: str
    before: str
    online: bool
    note: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a deployment will do."""

    release: ReleaseLine
    devices: Sequence[str]  # that change
    steps: Sequence[Step]
    more_steps: int  # not shown
    sentences: Sequence[str]
    warnings: Sequence[str]


def models(releases: Sequence[Release], lines: Sequence[Line], *, now: float) -> list[ModelCard]:
    """Return every model with its releases, the latest first."""
    by_model: dict[str, list[Release]] = {}
    for release in releases:
        by_model.setdefault(release.model, []).append(release)
    cards = []
    for name, own in sorted(by_model.items()):
        rows = [release_line(release, lines, now=now) for release in own]
        running = sum(row.running for row in rows)
        cards.append(
            ModelCard(
                name=name,
                description=own[0].bundle.description,
                releases=rows,
                share=[(row, row.running / running) for row in rows if row.running],
            )
        )
    return cards


def release_line(release: Release, lines: Sequence[Line], *, now: float) -> ReleaseLine:
    """Return one release with the devices that run it and want it."""
    held = [found for line in lines if (found := line.model(release.model)) is not None]
    return ReleaseLine(
        name=f"{release.model}@{release.number}",
        path=f"/models/{release.model}/{release.number}",
        number=release.number,
        version=release.version,
        accepted=figures.ago(now - release.accepted_at),
        accepted_at=figures.iso(release.accepted_at),
        size=str(figures.size(release.size_bytes)),
        forced=release.forced,
        running=sum(found.running == release.number for found in held),
        wanted=sum(found.wanted == release.number for found in held),
        escalates_to=release.escalates_to.model if release.escalates_to else "",
    )


def release_page(
    release: Release, issued: Sequence[Issued], lines: Sequence[Line], *, now: float
) -> ReleasePage:
    """Return the page of one release."""
    bundle = release.bundle
    return ReleasePage(
        line=release_line(release, lines, now=now),
        description=bundle.description,
        inputs=bundle.inputs,
        outputs=bundle.outputs,
        max_batch=figures.count(bundle.max_batch) if bundle.max_batch else "no batch dimension",
        labels=", ".join(bundle.labels) or figures.NOTHING,
        score=f"{bundle.score.function} of {bundle.score.output}"
        if bundle.score
        else figures.NOTHING,
        escalates_to_sha256=release.escalates_to.bundle_sha256 if release.escalates_to else "",
        variants=[
            VariantLine(
                name=variant.name,
                precision=variant.precision,
                providers=", ".join(variant.providers),
                path=variant.path,
                size=str(figures.size(bundle.files[variant.path].bytes)),
                self_test=_measured(release.self_test.get(variant.name, {})),
                tolerance=f"error at most "
                f"{bundle.self_test.tolerances[variant.name].max_abs_error:.4g}, agreement at least "
                f"{figures.percent(bundle.self_test.tolerances[variant.name].min_agreement)}",
            )
            for variant in bundle.variants
        ],
        certificates=[_certificate(one, now) for one in issued],
        report=report(release.report),
        files=[
            (name, str(figures.size(file.bytes)), file.sha256)
            for name, file in sorted(bundle.files.items())
        ],
        bundle_sha256=release.bundle_sha256,
    )


def report(document: Mapping[str, Any]) -> list[FactGroup]:
    """Return the workshop's report as groups of facts; it may hold anything."""
    groups: dict[str, list[tuple[str, str]]] = {}
    left = FACTS_SHOWN
    for name, value in document.items():
        if name in ("bundle_sha256", "model", "version"):
            continue  # on the page already
        title = plain(str(name)).capitalize() if isinstance(value, dict | list) else "General"
        for path, text in _facts(value, "" if isinstance(value, dict | list) else str(name), 0):
            if left:
                left -= 1
                groups.setdefault(title, []).append((path.replace("_", " "), text))
    return [FactGroup(title, facts) for title, facts in groups.items()]


def shape(spec: TensorSpec) -> str:
    """Return a tensor's shape with ``n`` for what is open: ``[n, 1, 8, 8]``."""
    return "[" + ", ".join("n" if size == -1 else str(size) for size in spec.shape) + "]"


def chosen(to: str, names: Sequence[str], lines: Sequence[Line], model: str) -> list[Line]:
    """Return the devices that somebody who deploys has chosen.

    Args:
        to: ``all``, ``model`` (those that have the release's model) or ``names``.
        names: of devices, or patterns such as ``kiosk-*``; for ``names``.
        lines: every device.
        model: the release's.

    Raises:
        BadParameter: a name is nobody's, or ``to`` is unknown.
    """
    match to:
        case "all":
            found = list(lines)
        case "model":
            found = [line for line in lines if line.model(model) is not None]
        case "names":
            wanted = [word for text in names for word in text.replace(",", " ").split()]
            if not wanted:
                raise BadParameter("no device is named: choose at least one, or all of them")
            by_name = {line.name: line for line in lines}
            picked: dict[str, Line] = {}
            for word in wanted:
                hits = [word] if word in by_name else fnmatch.filter(by_name, word)
                if not hits:
                    raise BadParameter(f"no device is called {word[:80]!r}")
                picked |= {name: by_name[name] for name in hits}
            found = list(picked.values())
        case _:
            raise BadParameter(f"to must be all, model, names or match, got {to[:40]!r}")
    return sorted(found, key=lambda line: natural(line.name))


def plan(
    release: Release,
    issued: Sequence[Issued],
    targets: Sequence[Line],
    lines: Sequence[Line],
    *,
    now: float,
) -> Plan:
    """Return what deploying ``release`` on ``targets`` will do."""
    line = release_line(release, lines, now=now)
    unmanaged = [target for target in targets if not target.managed]
    managed = [target for target in targets if target.managed]
    same = [target for target in managed if _wanted(target, release.model) == release.number]
    change = [target for target in managed if _wanted(target, release.model) != release.number]
    offline = [target for target in change if not target.online]
    busy = [target for target in change if target.standing in ("queued", "updating")]
    back = [target for target in change if _running(target, release.model) > release.number]
    certified = {
        one.certificate.hardware_class
        for one in issued
        if one.withdrawn_at is None and one.certificate.expires_at.timestamp() > now
    }
    bare = [target for target in change if target.hardware_class not in certified]

    sentences = [
        f"{_go(n, 'device goes', 'devices go')} from {before} to {line.name} ({line.version})."
        for before, n in Counter(_before(target, release.model) for target in change).most_common()
    ]
    if same:
        sentences.append(
            f"{_go(len(same), 'device is', 'devices are')} to run {line.name} already: nothing "
            "changes there."
        )
    if unmanaged:
        sentences.append(
            f"{_go(len(unmanaged), 'device is', 'devices are')} left out, because the hub has "
            f"never heard them through its broker: {_some(unmanaged)}."
        )
    if offline:
        sentences.append(
            f"{_go(len(offline), 'device is', 'devices are')} offline now and will follow when "
            f"back: {_some(offline)}."
        )
    if busy:
        sentences.append(
            f"{_go(len(busy), 'device is', 'devices are')} in the middle of another update, which "
            f"this one replaces: {_some(busy)}."
        )
    if change:
        sentences.append(
            "Each device fetches, verifies and tests the release, and answers with its present one "
            "meanwhile. One that finds it wanting keeps what it has and says why."
        )
    warnings = []
    if release.forced and change:
        warnings.append(
            f"{line.name} was forced past the hub: it did not pass its self-test here. Expect "
            "devices to refuse it."
        )
    if back:
        warnings.append(
            f"{_go(len(back), 'device runs', 'devices run')} a later release and will go back: "
            f"{_some(back)}."
        )
    if change and release.escalates_to is None:
        warnings.append(
            f"{line.name} escalates to no model: devices answer everything themselves, uncertified."
        )
    elif bare:
        warnings.append(
            f"No certificate holds for the hardware class of {many(len(bare), 'device')}: "
            f"{_some(bare)}. Answers there are not certified."
        )
    return Plan(
        release=line,
        devices=[target.name for target in change],
        steps=[
            Step(
                device=target.name,
                before=_before(target, release.model),
                online=target.online,
                note="" if target.online else "follows when it is back",
            )
            for target in change[:STEPS_SHOWN]
        ],
        more_steps=max(len(change) - STEPS_SHOWN, 0),
        sentences=sentences,
        warnings=warnings,
    )


def _wanted(line: Line, model: str) -> int:
    found = line.model(model)
    return found.wanted if found else 0


def _running(line: Line, model: str) -> int:
    found = line.model(model)
    return found.running if found else 0


def _before(line: Line, model: str) -> str:
    found = line.model(model)
    if found is None or not found.now:
        return f"no {model}"
    if found.running:
        return f"{model}@{found.running}" + (f" ({found.version})" if found.version else "")
    return f"{model} {found.version}, installed by hand"


def _go(n: int, one: str, several: str) -> str:
    return f"{figures.count(n)} {one if n == 1 else several}"


def _some(lines: Sequence[Line], shown: int = 5) -> str:
    names = ", ".join(line.name for line in lines[:shown])
    return names + (f" and {figures.count(len(lines) - shown)} more" if len(lines) > shown else "")


def _measured(values: Mapping[str, float]) -> str:
    if not values:
        return "not run on this hub"
    words = []
    if "max_abs_error" in values:
        words.append(f"error {values['max_abs_error']:.4g}")
    if "agreement" in values:
        words.append(f"agreement {figures.percent(values['agreement'])}")
    words += [
        f"{plain(name)} {value:.4g}"
        for name, value in sorted(values.items())
        if name not in ("max_abs_error", "agreement")
    ]
    return ", ".join(words)


def _certificate(one: Issued, now: float) -> CertificateLine:
    document = one.certificate
    expires = document.expires_at.timestamp()
    state = "Holds"
    if one.withdrawn_at is not None:
        state = "Withdrawn"
    elif expires <= now:
        state = "Expired"
    return CertificateLine(
        id=one.id,
        variant=document.variant,
        hardware_class=document.hardware_class,
        alpha=figures.percent(document.alpha),
        delta=figures.percent(document.delta),
        threshold="always escalates"
        if document.threshold == NEVER
        else f"{document.threshold:.4f}",
        escalation=f"{figures.percent(document.escalation_rate)}, at most "
        f"{figures.percent(document.escalation_rate_upper)}",
        expires=f"{document.expires_at:%Y-%m-%d}",
        expires_at=figures.iso(expires),
        state=state,
        reason=one.reason,
    )


def _facts(value: Any, path: str, depth: int) -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and depth < 6:
        items = [(str(name), item) for name, item in value.items()]
    elif isinstance(value, list) and depth < 6:
        items = [(_label(item, index), item) for index, item in enumerate(value)]
    else:
        return [(path, _fact(value))]
    return [
        fact
        for name, item in items
        for fact in _facts(item, f"{path} \N{MIDDLE DOT} {name}" if path else name, depth + 1)
    ]


def _label(item: Any, index: int) -> str:
    if isinstance(item, Mapping) and isinstance(item.get("variant"), str):
        return str(item["variant"])
    return str(index + 1)


def _fact(value: Any) -> str:
    match value:
        case None:
            return figures.NOTHING
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}" if abs(value) < 10**15 else str(value)[:LONGEST_FACT]
        case float():
            return f"{value:.4g}"
        case _:
            return str(value)[:LONGEST_FACT]
