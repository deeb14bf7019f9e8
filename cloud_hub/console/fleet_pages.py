"""Pages of devices, models and releases, and the one thing that they change: what is wanted.

    GET  /devices                       the table; its state is the address
    GET  /devices/{name}                one device
    GET  /models                        releases by model
    GET  /models/{model}/{number}       one release
    GET  /deploy?release=&to=...        says what a deployment would do, changes nothing
    POST /deploy                        wants it, and shows the devices that follow

What was asked for and cannot be is a page with a sentence.
"""

import asyncio
import functools
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import replace
from typing import Any

from aiohttp import web

from cloud_hub.console import access, example_views, fleet_views, release_views
from cloud_hub.console.access import Door, Handler
from cloud_hub.console.api import BadParameter, Insight
from cloud_hub.console.fleet_views import Detail
from cloud_hub.console.pages import Pages, read_form
from cloud_hub.console.roster import (
    SIZES,
    STATUSES,
    UPDATES,
    Line,
    Query,
    Roster,
    natural,
    select,
)
from cloud_hub.console.views import Page
from cloud_hub.errors import StoreFailed
from cloud_hub.fleet.controller import Controller, TooMuchWanted, UnknownDevice, UnknownRelease
from cloud_hub.fleet.fleet import Fleet
from cloud_hub.fleet.releases import CARD, Release, ReleaseRefused
from cloud_hub.insight.examples import Examples
from cloud_hub.insight.history import DeviceLine
from fogline_protocol.release import MODEL_NAME

EVENTS_SHOWN = 50
DETAILS_KEPT = 256  # devices looked at in one second
LONGEST_CARD = 64 << 10
LONGEST_PLAN = 4 << 20  # the names of all devices of a confirmed deployment
CHOICES_SHOWN = 40  # devices to tick; a larger fleet is named by patterns
HEADINGS = (
    ("name", "Device"),
    ("status", "Status"),
    ("", "For"),
    ("update", "Update"),
    ("", "Models"),
    ("hardware", "Hardware class"),
    ("link", "Link"),
    ("seen", "Last seen"),
)


class DevicesTopic:
    """The table of devices, for the page itself and for tabs that watch it."""

    def __init__(self, roster: Roster, clock: Callable[[], float]) -> None:
        self._roster = roster
        self._clock = clock

    def parameters(self, given: Mapping[str, Any]) -> Hashable:
        """Return the query asked for.

        Raises:
            BadParameter: it makes no sense.
        """
        return Query.parse(given)

    async def refresh(self, parameters: Collection[Any]) -> None:
        """Read the devices again if they changed."""
        await self._roster.refresh()

    def value(self, parameters: Any) -> Page:
        """Return the page of this moment: only the rows that are on it."""
        return fleet_views.devices(self._roster.lines(), parameters, now=self._clock())


class DeviceTopic:
    """One device, for its page and for tabs that watch it."""

    def __init__(
        self,
        roster: Roster,
        controller: Controller,
        insight: Insight,
        clock: Callable[[], float],
    ) -> None:
        self._roster = roster
        self._controller = controller
        self._insight = insight
        self._clock = clock
        self._details: dict[str, Detail] = {}  # of the devices that were refreshed last
        self._traffic: tuple[int, Mapping[str, DeviceLine]] = (0, {})  # of one second

    def parameters(self, given: Mapping[str, Any]) -> Hashable:
        """Return the device asked for.

        Raises:
            BadParameter: no device can be called that.
        """
        name = given.get("name")
        if set(given) != {"name"} or not isinstance(name, str) or not MODEL_NAME.fullmatch(name):
            raise BadParameter('device has one parameter, {"name": "a device"}')
        return name

    async def refresh(self, parameters: Collection[Any]) -> None:
        """Read these devices' rows again.

        Raises:
            BadParameter: the hub has never heard of one of them.
        """
        await self._roster.refresh()
        for name in sorted(parameters):
            self._details[name] = await self._detail(name)
        while len(self._details) > max(len(parameters), DETAILS_KEPT):
            del self._details[next(name for name in self._details if name not in parameters)]

    def value(self, parameters: Any) -> Page:
        """Return the page of this moment."""
        line = self._roster.line(parameters)
        assert line is not None  # refresh came before, and devices stay
        detail = self._details.get(parameters, Detail(line, (), ()))
        return fleet_views.device(
            replace(detail, line=line, decisions=self._insight.decisions(parameters)),
            self._of_this_second().get(parameters),
            now=self._clock(),
        )

    async def _detail(self, name: str) -> Detail:
        line = self._roster.line(name)
        if line is None:
            raise BadParameter(f"the hub has never heard of a device {name[:63]!r}")
        return Detail(
            line=line,
            events=await self._controller.events(name, EVENTS_SHOWN),
            answered=await self._controller.answered(name, self._clock() - fleet_views.ANSWERED_S),
        )

    def _of_this_second(self) -> Mapping[str, DeviceLine]:
        # Computed over all devices at once, so tabs of many devices share it.
        now = self._clock()
        if self._traffic[0] != int(now):
            lines = self._insight.overview(now, fleet_views.TRAFFIC_S).devices
            self._traffic = int(now), {line.name: line for line in lines}
        return self._traffic[1]


class FleetPages:
    """Answers people who look after devices and releases."""

    def __init__(
        self,
        pages: Pages,
        fleet: Fleet,
        roster: Roster,
        devices: DevicesTopic,
        device: DeviceTopic,
        examples: Examples,
        door: Door,
        clock: Callable[[], float],
    ) -> None:
        self._examples = examples
        self._door = door
        self._pages = pages
        self._fleet = fleet
        self._roster = roster
        self._devices = devices
        self._device = device
        self._clock = clock

    def routes(self) -> list[tuple[str, str, Handler]]:
        """Return method, path and handler of every route."""
        return [
            ("GET", "/devices", self._readable(self.devices)),
            ("GET", "/devices/{name}", self._readable(self.device)),
            ("GET", "/models", self._readable(self.models)),
            ("GET", "/models/{model}/{number}", self._readable(self.release)),
            ("GET", "/deploy", self._readable(self.review)),
            ("POST", "/deploy", self._readable(self.deploy)),
        ]

    async def devices(self, request: web.Request) -> web.StreamResponse:
        """Answer with the table of devices."""
        query = Query.parse(_once(request))
        await self._roster.refresh()
        lines = self._roster.lines()
        return self._pages.render(
            "devices.html",
            title="Devices",
            here="/devices",
            page=self._devices.value(query),
            query=query,
            at_page=select(lines, query, self._clock()).page,
            headings=HEADINGS,
            sizes=SIZES,
            statuses=STATUSES,
            updates=UPDATES,
            releases=await self._fleet.releases.list() if lines else [],
            command=self._pages.first_command(request),
        )

    async def device(self, request: web.Request) -> web.StreamResponse:
        """Answer with one device."""
        name = request.match_info["name"]
        await self._roster.refresh()
        if self._roster.line(name) is None:
            raise UnknownDevice(f"The hub has never heard of a device {name[:63]!r}.")
        await self._device.refresh([name])
        return self._pages.render(
            "device.html",
            title=name,
            here="/devices",
            page=self._device.value(name),
            name=name,
            releases=await self._fleet.releases.list(),
        )

    async def models(self, request: web.Request) -> web.StreamResponse:
        """Answer with every release, and with the examples of who asks."""
        await self._roster.refresh()
        caller = await self._door.caller(request)
        examples = self._examples
        kept = await examples.summary(caller.tenant if caller is not None else None)
        return self._pages.render(
            "models.html",
            title="Models",
            here="/models",
            models=release_views.models(
                await self._fleet.releases.list(), self._roster.lines(), now=self._clock()
            ),
            kept=example_views.kept_card(
                kept, examples.bounds, examples.trouble, now=self._clock()
            ),
        )

    async def release(self, request: web.Request) -> web.StreamResponse:
        """Answer with one release."""
        found = await self._find(f"{request.match_info['model']}@{request.match_info['number']}")
        issued = await self._fleet.certificates.list(found.model, found.number)
        await self._roster.refresh()
        lines = self._roster.lines()
        managed = [line for line in lines if line.managed]
        return self._pages.render(
            "release.html",
            title=f"{found.model}@{found.number}",
            here="/models",
            page=release_views.release_page(found, issued, lines, now=self._clock()),
            card=await asyncio.to_thread(self._card, found),
            shape=release_views.shape,
            devices=len(managed),
            devices_of_model=sum(line.model(found.model) is not None for line in managed),
            choices=sorted((line.name for line in managed), key=natural)
            if len(managed) <= CHOICES_SHOWN
            else [],
        )

    async def review(self, request: web.Request) -> web.StreamResponse:
        """Answer with what a deployment would do; nothing changes."""
        found = await self._find(request.query.get("release", ""))
        issued = await self._fleet.certificates.list(found.model, found.number)
        await self._roster.refresh()
        lines = self._roster.lines()
        targets = self._targets(request, found, lines)
        return self._pages.render(
            "deploy.html",
            title=f"Deploy {found.model}@{found.number}",
            here="/models",
            plan=release_views.plan(found, issued, targets, lines, now=self._clock()),
            targets=len(targets),
            many=fleet_views.many,
        )

    async def deploy(self, request: web.Request) -> web.StreamResponse:
        """Want a release on the devices that were named when it was confirmed."""
        if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            return access.problem(403, "this came from a page of another site")
        form = await read_form(request, LONGEST_PLAN)
        found = await self._find(form.get("release", ""))
        names = form.get("devices", "").split()
        if not names:
            raise BadParameter("No device is named, so there is nothing to deploy to.")
        await self._fleet.controller.want(names, found.model, found.number)
        wants = Query(wants=f"{found.model}@{found.number}")
        raise web.HTTPSeeOther(f"/devices?{wants.encoded()}")

    def _targets(self, request: web.Request, found: Release, lines: list[Line]) -> list[Line]:
        to = request.query.get("to", "")
        if to == "match":
            given = {k: v for k, v in _once(request).items() if k not in ("release", "to")}
            return list(select(lines, Query.parse(given), self._clock()).matching)
        return release_views.chosen(to, request.query.getall("names", []), lines, found.model)

    async def _find(self, text: str) -> Release:
        model, _, number = text.partition("@")
        if not MODEL_NAME.fullmatch(model) or not (number.isascii() and number.isdecimal()):
            raise BadParameter(
                f"A release is called MODEL@NUMBER, for example digits@2, not {text[:80]!r}."
            )
        if len(number) > 9:
            raise UnknownRelease(f"There is no release {number[:20]} of {model}.")
        return await self._fleet.releases.show(model, int(number))

    def _card(self, found: Release) -> str:
        try:
            with self._fleet.releases.file(found, CARD).open("rb") as file:
                return file.read(LONGEST_CARD).decode(errors="replace")
        except (KeyError, OSError):
            return ""  # the card is optional, and no reason to withhold the rest

    def _readable(self, handler: Handler) -> Handler:
        """Return ``handler`` with what it cannot do as a page."""

        @functools.wraps(handler)
        async def call(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(request)
            except BadParameter as error:
                status, title, detail = 400, "That cannot be shown", str(error)
            except UnknownDevice as error:
                status, title, detail = 404, "No such device", str(error)
            except (UnknownRelease, ReleaseRefused) as error:
                status, title, detail = 404, "No such release", str(error)
            except TooMuchWanted as error:
                status, title, detail = 409, "Too much is wanted", str(error)
            except StoreFailed as error:
                status, title, detail = 503, "The hub cannot reach its data", str(error)
            detail = detail[:1].upper() + detail[1:]
            return self._pages.render(
                "error.html",
                status=status,
                title=title,
                detail=detail if detail.endswith(".") else f"{detail}.",
            )

        return call


def _once(request: web.Request) -> dict[str, str]:
    """Return the parameters of an address that may name each only once.

    Raises:
        BadParameter: one comes twice.
    """
    for name in request.query:
        if len(request.query.getall(name)) > 1:
            raise BadParameter(f"{name[:40]} comes twice")
    return dict(request.query)
