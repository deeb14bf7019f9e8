"""What devices left aside of a release, grouped by reason: the fallbacks that nobody ordered. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from cloud_hub.console.figures import many
from cloud_hub.console.roster import Line, natural

DEVICES_NAMED = 5


@dataclass(frozen=True, slots=True)
class AsideLine:
    """Devices that answer with one variant and left the same aside for the same reason."""

    fallback: bool  # what is meant for them; otherwise what is meant for other hardware
    sentence: str
    devices: Sequence[str]  # the first ones
    more: int


def asides(model: str, number: int, lines: Sequence[Line]) -> list[AsideLine]:
    """Return what the devices that run a release left aside, fallbacks and the most devices first."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for line in lines:
        found = line.model(model)
        if found is None or found.running != number or found.served is None:
            continue
        served = found.served
        if served.instead_of or served.aside:
            key = served.variant, served.instead_of, served.aside
            groups.setdefault(key, []).append(line.name)
    ordered = sorted(groups.items(), key=lambda item: (not item[0][1], -len(item[1]), item[0]))
    return [_aside(*key, names) for key, names in ordered]


def _aside(variant: str, instead_of: str, aside: str, names: list[str]) -> AsideLine:
    count = many(len(names), "device")
    verb = "answers" if len(names) == 1 else "answer"
    said = f"{count} {verb} with {variant}"
    said += f" instead of {instead_of}" if instead_of else ", as meant for such hardware"
    names.sort(key=natural)
    return AsideLine(
        fallback=bool(instead_of),
        sentence=f"{said}: {aside}." if aside else f"{said}.",
        devices=names[:DEVICES_NAMED],
        more=max(len(names) - DEVICES_NAMED, 0),
    )
