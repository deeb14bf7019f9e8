"""Which devices a page of the table shows: joined, filtered, counted, sorted, cut.

A device is what it says of itself (``fleet/devices.py``), what is wanted of it and how far it
is (``fleet/controller.py``). The latter is in the database; ``Roster`` keeps a copy of it and
reads it again only after something changed, so that a thousand open tabs cost what one costs.

``Query`` is the state of the page: it is the address, and what a tab watches.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import urlencode

from cloud_hub.console.api import BadParameter
from cloud_hub.console.views import link_text
from cloud_hub.fleet.controller import Controller, Twin, falls_back
from cloud_hub.fleet.devices import Devices

STATUSES = ("online", "offline")
UPDATES = ("failed", "updating", "queued", "current", "idle")  # what needs a look comes first
SORTS = ("name", "status", "update", "seen", "hardware", "link")
SIZES = (50, 100, 200)
SERVES = ("fallback",)
FAILED = ("rejected", "rolled-back")
LONGEST = 200  # of a parameter
LONGEST_NAME = 64  # of a variant or provider, as a device says it
LONGEST_SAID = 500


@dataclass(frozen=True, slots=True)
class Served:
    """What answers for one model, as the device says: texts are cut to one line."""

    variant: str
    provider: str
    hardware_class: str
    certificate: str  # its id; empty: uncertified
    instead_of: str  # what the bundle means for such hardware, if it is something else
    aside: str  # what was left aside and why, a sentence

    @property
    def words(self) -> str:
        """The variant, and the one that it stands in for."""
        return f"{self.variant} (not {self.instead_of})" if self.instead_of else self.variant


@dataclass(frozen=True, slots=True)
class ModelLine:
    """One model on one device: what is wanted and what the device says."""

    model: str
    wanted: int  # 0: nothing
    running: int  # 0: no release of this hub
    previous: int
    version: str  # of what runs
    phase: str
    code: str
    sentence: str
    attempt: int
    figures: Mapping[str, float]
    bytes_done: int
    bytes_total: int
    served: Served | None = None  # None: nothing, or the agent does not tell

    @property
    def failed(self) -> bool:
        """Whether the device has given the wanted release up."""
        return self.phase in FAILED

    @property
    def now(self) -> str:
        """What runs: ``@2``, the version of a bundle installed by hand, or nothing."""
        return f"@{self.running}" if self.running else self.version

    def words(self) -> str:
        """Return what runs and, if it differs, what is wanted."""
        runs = (
            f"{self.model}@{self.running}"
            if self.running
            else f"{self.model} {self.version}".rstrip()
        )
        if self.served is not None:
            runs = f"{runs} {self.served.words}"
        return f"{runs} \N{RIGHTWARDS ARROW} @{self.wanted}" if self.pending else runs

    @property
    def pending(self) -> bool:
        """Whether something else is wanted than what runs."""
        return self.wanted not in (0, self.running)


@dataclass(frozen=True, slots=True)
class Line:
    """One device."""

    name: str
    online: bool
    since: float | None  # online or silent since; None: it was never heard
    last_seen: float | None
    first_seen: float | None
    agent_version: str
    hardware_class: str
    link: str  # as people read it; empty: unknown
    rss_bytes: int
    managed: bool  # it has reported through the broker, so releases can be wanted of it
    standing: str
    models: Sequence[ModelLine]
    generation: int
    published_generation: int
    reported_generation: int

    @property
    def status(self) -> str:
        """One word of presence."""
        return "online" if self.online else "offline"

    def model(self, name: str) -> ModelLine | None:
        """Return how one model stands here, or None if the device does not know it."""
        return next((model for model in self.models if model.model == name), None)


@dataclass(frozen=True, slots=True)
class Query:
    """Which devices, in which order, and how many of them at a time."""

    status: str = ""
    update: str = ""
    q: str = ""
    wants: str = ""  # MODEL@NUMBER
    runs: str = ""  # MODEL@NUMBER
    variant: str = ""  # of what it runs
    serves: str = ""  # fallback: something else than is meant for it
    sort: str = "name"  # with a minus in front: the other way around
    size: int = SIZES[0]
    page: int = 1

    @classmethod
    def parse(cls, given: Mapping[str, object]) -> "Query":
        """Read parameters of an address or of a subscription.

        Raises:
            BadParameter: the text says which and why.
        """
        known = {field.name for field in fields(cls)}
        query = cls()
        for name, value in given.items():
            if name not in known:
                raise BadParameter(
                    f"there is no parameter {name[:40]!r}, there is {', '.join(sorted(known))}"
                )
            if not isinstance(value, str) or len(value) > LONGEST:
                raise BadParameter(f"{name} must be a text of at most {LONGEST} characters")
            if value == "":
                continue
            match name:
                case "status":
                    query = replace(query, status=_one_of(name, value, STATUSES))
                case "update":
                    query = replace(query, update=_one_of(name, value, UPDATES))
                case "sort":
                    _one_of(name, value.removeprefix("-"), SORTS)
                    query = replace(query, sort=value)
                case "size":
                    query = replace(query, size=int(_one_of(name, value, tuple(map(str, SIZES)))))
                case "page":
                    query = replace(query, page=_page(value))
                case "wants":
                    query = replace(query, wants=_release(name, value))
                case "runs":
                    query = replace(query, runs=_release(name, value))
                case "variant":
                    query = replace(query, variant=value)
                case "serves":
                    query = replace(query, serves=_one_of(name, value, SERVES))
                case _:
                    query = replace(query, q=value.strip())
        return query

    def encoded(self, **changes: str | int) -> str:
        """Return the query string with changes; what is as usual is left out."""
        usual = Query()
        values = {
            field.name: changes.get(field.name, getattr(self, field.name)) for field in fields(self)
        }
        return urlencode(
            {name: value for name, value in values.items() if value != getattr(usual, name)}
        )

    @property
    def filtered(self) -> bool:
        """Whether devices are left out."""
        usual = Query(sort=self.sort, size=self.size, page=self.page)
        return self != usual


@dataclass(frozen=True, slots=True)
class Selection:
    """What a query finds."""

    rows: Sequence[Line]  # of this page
    matching: Sequence[Line]  # of all pages
    total: int  # devices there are
    page: int  # the one shown: the last one, if the query asks for one beyond
    pages: int
    statuses: Mapping[str, int]  # devices by status, were it not for the filter by status
    updates: Mapping[str, int]
    fallbacks: int  # devices that serve a fallback, were it not for the filter by that


def select(lines: Sequence[Line], query: Query, now: float) -> Selection:
    """Return the page of devices that a query asks for."""
    word = query.q.casefold()
    anyhow, instead = replace(query, serves=""), replace(query, serves=SERVES[0])
    found = [
        line
        for line in lines
        if (not word or word in _haystack(line))
        and (not query.wants or _has(line, query.wants, "wanted"))
        and _runs(line, anyhow)
    ]
    fallbacks = sum(
        _runs(line, instead)
        for line in found
        if query.status in ("", line.status) and query.update in ("", line.standing)
    )
    if query.serves:
        found = [line for line in found if _runs(line, instead)]
    statuses = Counter(line.status for line in found if query.update in ("", line.standing))
    updates = Counter(line.standing for line in found if query.status in ("", line.status))
    matching = [
        line
        for line in found
        if query.status in ("", line.status) and query.update in ("", line.standing)
    ]
    # Two stable sorts: among equals the names ascend, whichever way the others go.
    matching.sort(key=lambda line: natural(line.name))
    order = _ORDERS[query.sort.removeprefix("-")]
    matching.sort(key=lambda line: order(line, now), reverse=query.sort.startswith("-"))
    pages = max(1, -(-len(matching) // query.size))
    page = min(query.page, pages)
    return Selection(
        rows=matching[(page - 1) * query.size : page * query.size],
        matching=matching,
        total=len(lines),
        page=page,
        pages=pages,
        statuses=statuses,
        updates=updates,
        fallbacks=fallbacks,
    )


class Roster:
    """Every device, as of now. Owner of the copy of the twins; used on one event loop."""

    def __init__(
        self, controller: Controller, devices: Devices, clock: Callable[[], float]
    ) -> None:
        self._controller = controller
        self._devices = devices
        self._clock = clock
        self._twins: Mapping[str, tuple[Twin, Sequence[ModelLine]]] = {}
        self._revision = -1

    async def refresh(self) -> None:
        """Read the twins again if they changed.

        Raises:
            StoreFailed: the database cannot be read.
        """
        revision = self._controller.revision  # a change while we read is read next time
        if revision > self._revision:
            twins = await self._controller.twins()
            if revision > self._revision:
                self._twins = {twin.device: (twin, model_lines(twin)) for twin in twins}
                self._revision = revision

    def lines(self) -> list[Line]:
        """Return every device, as far as the last refresh knows."""
        now = self._clock()
        seen = {device.name: device for device in self._devices.all()}
        lines = []
        for name in seen.keys() | self._twins.keys():
            device = seen.get(name)
            online = device is not None and self._devices.online(device, now)
            twin, models = self._twins.get(name, (None, ()))
            lines.append(
                Line(
                    name=name,
                    online=online,
                    since=self._devices.since(device, now) if device else None,
                    last_seen=device.last_seen if device else twin.reported_at if twin else None,
                    first_seen=device.first_seen if device else None,
                    agent_version=device.agent_version if device else "",
                    hardware_class=device.hardware_class if device else "",
                    link=link_text(device.link, online=online) if device else "",
                    rss_bytes=device.rss_bytes if device else 0,
                    managed=twin is not None,
                    standing=twin.standing if twin else "idle",
                    models=models,
                    generation=twin.generation if twin else 0,
                    published_generation=twin.published_generation if twin else 0,
                    reported_generation=twin.reported.generation if twin else 0,
                )
            )
        return lines

    def line(self, name: str) -> Line | None:
        """Return one device, or None if it was never heard of."""
        return next((line for line in self.lines() if line.name == name), None)


@functools.lru_cache(maxsize=16384)
def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Return a sort key that puts ``kiosk-10`` after ``kiosk-9``."""
    return tuple(
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in re.split(r"([0-9]+)", name)
        if part
    )


def model_lines(twin: Twin) -> Sequence[ModelLine]:
    """Return how every model stands on a device that is wanted or reported there, by name."""
    reported = {model.model: model for model in twin.reported.models}
    lines = []
    for name in sorted(reported.keys() | twin.desired.keys()):
        said = reported.get(name)
        lines.append(
            ModelLine(
                model=name,
                wanted=twin.desired.get(name, 0),
                running=said.active_release if said else 0,
                previous=said.previous_release if said else 0,
                version=said.active_version if said else "",
                phase=said.phase if said else "",
                code=said.code if said else "",
                sentence=said.sentence if said else "",
                attempt=said.attempt if said else 0,
                figures=dict(said.figures) if said else {},
                bytes_done=said.bytes_done if said else 0,
                bytes_total=said.bytes_total if said else 0,
                served=_served(said) if said else None,
            )
        )
    return tuple(lines)


def _served(said: Any) -> Served | None:
    """Return what a ``ReportedModel`` says of what answers; it may hold any text."""
    serving = said.serving
    variant = _one_line(serving.variant, LONGEST_NAME)
    if not variant:
        return None
    provider = _one_line(serving.provider, LONGEST_NAME)
    instead_of = ""
    if falls_back(serving):
        instead_of = _one_line(serving.meant_variant, LONGEST_NAME)
        if serving.meant_provider != serving.provider:
            meant_provider = _one_line(serving.meant_provider, LONGEST_NAME)
            instead_of = f"{instead_of} on {meant_provider}"
    return Served(
        variant=variant,
        provider=provider,
        hardware_class=_one_line(serving.hardware_class, LONGEST),
        certificate=_one_line(serving.certificate, LONGEST_NAME),
        instead_of=instead_of,
        aside=_one_line(serving.aside, LONGEST_SAID),
    )


def _one_line(text: str, longest: int) -> str:
    text = text[:longest]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    return text.strip()


def _haystack(line: Line) -> str:
    models = (model.words() for model in line.models)
    words = (line.name, line.hardware_class, line.link, line.agent_version, *models)
    return "\n".join(words).casefold()


def _has(line: Line, release: str, which: str) -> bool:
    model, _, number = release.partition("@")
    found = line.model(model)
    return found is not None and getattr(found, which) == int(number)


def _runs(line: Line, query: Query) -> bool:
    """Return whether one model of the device is all that is asked of what runs."""
    if not (query.runs or query.variant or query.serves):
        return True
    name, _, number = query.runs.partition("@")
    return any(
        (not query.runs or (model.model == name and model.running == int(number)))
        and (not query.variant or (model.served and model.served.variant == query.variant))
        and (not query.serves or (model.served and model.served.instead_of))
        for model in line.models
    )


def _silence_min(line: Line, now: float) -> float:
    # Whole minutes, so that devices that report every few seconds do not change places all
    # the time under the reader's eyes.
    return float("inf") if line.last_seen is None else (now - line.last_seen) // 60


_ORDERS: Mapping[str, Callable[[Line, float], Any]] = {
    "name": lambda line, now: natural(line.name),
    "status": lambda line, now: line.online,
    "update": lambda line, now: UPDATES.index(line.standing),
    "seen": _silence_min,
    "hardware": lambda line, now: line.hardware_class,
    "link": lambda line, now: line.link,
}


def _one_of(name: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise BadParameter(f"{name} must be one of {', '.join(known)}, got {value[:40]!r}")
    return value


def _page(value: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,6}", value):
        raise BadParameter(f"page must be a whole number from 1, got {value[:40]!r}")
    return int(value)


def _release(name: str, value: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}@[0-9]{1,9}", value):
        raise BadParameter(f"{name} must be MODEL@NUMBER, for example digits@2, got {value[:80]!r}")
    return value
