"""Decides what a deployment will do to each device, before anybody confirms it. Pure.

The page that asks shows it, and what is then wanted is exactly the devices it names.
"""

import fnmatch
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cloud_hub.console import figures
from cloud_hub.console.api import BadParameter
from cloud_hub.console.figures import many
from cloud_hub.console.model_views import Adoption, ReleaseLine, release_line
from cloud_hub.console.roster import Line, natural
from cloud_hub.fleet.certificates import Issued
from cloud_hub.fleet.releases import Release

STEPS_SHOWN = 200


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
    line = release_line(release, Adoption(release.model, lines), {}, now=now)
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
