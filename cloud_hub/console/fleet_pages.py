"""Pages of devices.

    GET  /devices                       the table; its state is the address
    GET  /devices/{name}                one device
    GET  /devices/{name}/forget         says what forgetting it would do, changes nothing
    POST /devices/{name}/forget         forgets it

What was asked for and cannot be is a page with a sentence.
"""

import contextlib
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import replace
from typing import Any

from aiohttp import web

from cloud_hub.console import access, fleet_views
from cloud_hub.console.access import Handler
from cloud_hub.console.api import BadParameter, Insight
from cloud_hub.console.fleet_views import Detail
from cloud_hub.console.pages import Pages, once, readable
from cloud_hub.console.roster import SERVES, SIZES, STATUSES, UPDATES, Line, Query, Roster, select
from cloud_hub.console.views import Page
from cloud_hub.fleet.certificates import CertificateRefused, Certificates, Issued
from cloud_hub.fleet.controller import Controller, UnknownDevice
from cloud_hub.fleet.fleet import Fleet
from cloud_hub.insight.history import DeviceLine
from fogline_protocol.release import MODEL_NAME

EVENTS_SHOWN = 50
DETAILS_KEPT = 256  # devices looked at in one second
CERTIFIED_SHOWN = 32  # models of one device of which the certificate is looked up
_NUMBERS = range(1, 1 << 31)  # of releases, as a database keeps them
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
        certificates: Certificates,
        insight: Insight,
        clock: Callable[[], float],
    ) -> None:
        self._roster = roster
        self._controller = controller
        self._certificates = certificates
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
        """Read these devices' rows again."""
        await self._roster.refresh()
        for name in sorted(parameters):
            line = self._roster.line(name)
            if line is not None:
                self._details[name] = await self._detail(line)
        while len(self._details) > max(len(parameters), DETAILS_KEPT):
            del self._details[next(name for name in self._details if name not in parameters)]

    def value(self, parameters: Any) -> Page:
        """Return the page of this moment.

        Raises:
            BadParameter: the hub has never heard of the device, or has forgotten it.
        """
        line = self._roster.line(parameters)
        if line is None:
            self._details.pop(parameters, None)
            raise BadParameter(
                f"the hub has never heard of a device {parameters[:63]!r}, or has forgotten it"
            )
        detail = self._details.get(parameters, Detail(line, (), ()))
        return fleet_views.device(
            replace(detail, line=line, decisions=self._insight.decisions(parameters)),
            self._of_this_second().get(parameters),
            now=self._clock(),
        )

    async def _detail(self, line: Line) -> Detail:
        since = self._clock() - fleet_views.ANSWERED_S
        return Detail(
            line=line,
            events=await self._controller.events(line.name, EVENTS_SHOWN),
            answered=await self._controller.answered(line.name, since),
            issued=await self._issued(line),
        )

    async def _issued(self, line: Line) -> Mapping[tuple[str, str], Issued]:
        """Return the certificates that a device says it answers under, as the hub knows them."""
        found = {}
        for model in line.models[:CERTIFIED_SHOWN]:
            served = model.served
            # A device may say anything, and not every database takes it.
            known = MODEL_NAME.fullmatch(model.model) and model.running in _NUMBERS
            if served and served.certificate and known:
                with contextlib.suppress(CertificateRefused):
                    found[model.model, served.certificate] = await self._certificates.show(
                        model.model, model.running, served.certificate
                    )
        return found

    def _of_this_second(self) -> Mapping[str, DeviceLine]:
        # Computed over all devices at once, so tabs of many devices share it.
        now = self._clock()
        if self._traffic[0] != int(now):
            lines = self._insight.overview(now, fleet_views.TRAFFIC_S).devices
            self._traffic = int(now), {line.name: line for line in lines}
        return self._traffic[1]


class FleetPages:
    """Answers people who look after devices."""

    def __init__(
        self,
        pages: Pages,
        fleet: Fleet,
        roster: Roster,
        devices: DevicesTopic,
        device: DeviceTopic,
        clock: Callable[[], float],
    ) -> None:
        self._pages = pages
        self._fleet = fleet
        self._roster = roster
        self._devices = devices
        self._device = device
        self._clock = clock

    def routes(self) -> list[tuple[str, str, Handler]]:
        """Return method, path and handler of every route."""
        return [
            ("GET", "/devices", readable(self._pages, self.devices)),
            ("GET", "/devices/{name}", readable(self._pages, self.device)),
            ("GET", "/devices/{name}/forget", readable(self._pages, self.leaving)),
            ("POST", "/devices/{name}/forget", readable(self._pages, self.forget)),
        ]

    async def devices(self, request: web.Request) -> web.StreamResponse:
        """Answer with the table of devices."""
        query = Query.parse(once(request))
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
            serves=SERVES,
            releases=await self._fleet.releases.list() if lines else [],
            command=self._pages.first_command(request),
        )

    async def device(self, request: web.Request) -> web.StreamResponse:
        """Answer with one device."""
        name = (await self._named(request)).name
        await self._device.refresh([name])
        return self._pages.render(
            "device.html",
            title=name,
            here="/devices",
            page=self._device.value(name),
            name=name,
            releases=await self._fleet.releases.list(),
        )

    async def leaving(self, request: web.Request) -> web.StreamResponse:
        """Answer with what forgetting a device would do; nothing changes."""
        line = await self._named(request)
        return self._pages.render(
            "forget.html",
            title=f"Forget {line.name}",
            here="/devices",
            name=line.name,
            online=line.online,
            runs=[model.words() for model in line.models if model.running],
        )

    async def forget(self, request: web.Request) -> web.StreamResponse:
        """Forget a device, and show those that are left."""
        if not access.is_of_this_site(request):
            return access.problem(403, "this came from a page of another site")
        await self._fleet.forget(request.match_info["name"], self._clock())
        raise web.HTTPSeeOther("/devices")

    async def _named(self, request: web.Request) -> Line:
        name = request.match_info["name"]
        await self._roster.refresh()
        line = self._roster.line(name)
        if line is None:
            raise UnknownDevice(f"The hub has never heard of a device {name[:63]!r}.")
        return line
