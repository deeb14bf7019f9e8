"""Pages of models and releases, and what they change: what is wanted, and what is certified.

    GET  /models?page=                  every model with its latest releases
    GET  /models/{model}?page=          every release of one model
    GET  /models/{model}/{number}       one release
    GET  /models/{model}/{number}/report.html       the workshop's page on it, as it came
    GET  /models/{model}/{number}/certificates/{id}/withdraw    says what that would do
    POST /models/{model}/{number}/certificates/{id}/withdraw    does it, with a reason
    GET  /deploy?release=&to=...        says what a deployment would do, changes nothing
    POST /deploy                        wants it, and shows the devices that follow

What was asked for and cannot be is a page with a sentence.
"""

import asyncio
import math
from collections.abc import Callable

from aiohttp import web

from cloud_hub.console import (
    access,
    cards,
    certificate_views,
    deploy_views,
    example_views,
    figures,
    lineage_views,
    model_views,
    release_views,
    report_page,
)
from cloud_hub.console.access import Door, Handler
from cloud_hub.console.api import BadParameter
from cloud_hub.console.cards import Card
from cloud_hub.console.lineage_views import Before
from cloud_hub.console.model_views import MODELS_AT_ONCE, RELEASES_AT_ONCE
from cloud_hub.console.pages import Pages, once, read_form, readable
from cloud_hub.console.roster import Line, Query, Roster, natural, select
from cloud_hub.fleet import lineage
from cloud_hub.fleet.certificates import LONGEST_REASON, reason_in
from cloud_hub.fleet.controller import UnknownRelease
from cloud_hub.fleet.fleet import Fleet
from cloud_hub.fleet.lineage import Lineage
from cloud_hub.fleet.releases import CARD, Release
from cloud_hub.insight.examples import Examples
from fogline_protocol.release import MODEL_NAME

LONGEST_PLAN = 4 << 20  # the names of all devices of a confirmed deployment
CHOICES_SHOWN = 40  # devices to tick; a larger fleet is named by patterns
LAST_PAGE = 10**6
_CERTIFICATE = "/models/{model}/{number}/certificates/{id}"


class ReleasePages:
    """Answers people who look after models and releases."""

    def __init__(
        self,
        pages: Pages,
        fleet: Fleet,
        roster: Roster,
        examples: Examples,
        door: Door,
        clock: Callable[[], float],
    ) -> None:
        self._pages = pages
        self._fleet = fleet
        self._roster = roster
        self._examples = examples
        self._door = door
        self._clock = clock

    def routes(self) -> list[tuple[str, str, Handler]]:
        """Return method, path and handler of every route."""
        return [
            (method, path, readable(self._pages, handler))
            for method, path, handler in (
                ("GET", "/models", self.models),
                ("GET", "/models/{model}", self.model),
                ("GET", "/models/{model}/{number}", self.release),
                ("GET", "/models/{model}/{number}/report.html", self.report),
                ("GET", f"{_CERTIFICATE}/withdraw", self.withdrawal),
                ("POST", f"{_CERTIFICATE}/withdraw", self.withdraw),
                ("GET", "/deploy", self.review),
                ("POST", "/deploy", self.deploy),
            )
        ]

    async def models(self, request: web.Request) -> web.StreamResponse:
        """Answer with every model and its latest releases, and the examples of who asks."""
        at = _page(request)
        await self._roster.refresh()
        caller = await self._door.caller(request)
        examples = self._examples
        kept = await examples.summary(caller.tenant if caller is not None else None)
        shown, total = model_views.models(
            await self._fleet.releases.list(), self._roster.lines(), page=at, now=self._clock()
        )
        return self._pages.render(
            "models.html",
            title="Models",
            here="/models",
            models=shown,
            total=total,
            at_page=at,
            pages=math.ceil(total / MODELS_AT_ONCE),
            kept=example_views.kept_card(
                kept, examples.bounds, examples.trouble, now=self._clock()
            ),
        )

    async def model(self, request: web.Request) -> web.StreamResponse:
        """Answer with every release of one model."""
        at = _page(request)
        name = request.match_info["model"]
        known = await self._fleet.releases.list(name) if MODEL_NAME.fullmatch(name) else []
        if not known:
            raise UnknownRelease(f"There is no release of a model {name[:63]!r}.")
        await self._roster.refresh()
        return self._pages.render(
            "model.html",
            title=name,
            here="/models",
            model=model_views.model(
                known,
                self._roster.lines(),
                first=(at - 1) * RELEASES_AT_ONCE,
                most=RELEASES_AT_ONCE,
                now=self._clock(),
            ),
            at_page=at,
            pages=math.ceil(len(known) / RELEASES_AT_ONCE),
        )

    async def release(self, request: web.Request) -> web.StreamResponse:
        """Answer with one release."""
        found = await self._named(request)
        releases = self._fleet.releases
        family = await releases.list(found.model)
        line = lineage.trace(found, family)
        issued = await self._fleet.certificates.list(found.model, found.number)
        before = await self._before(found, line)
        await self._roster.refresh()
        lines = self._roster.lines()
        managed = [line for line in lines if line.managed]
        return self._pages.render(
            "release.html",
            title=f"{found.model}@{found.number}",
            here="/models",
            page=release_views.release_page(
                found,
                family,
                line,
                before,
                await releases.report(found),
                issued,
                lines,
                now=self._clock(),
            ),
            card=await asyncio.to_thread(self._card, found),
            has_report_page=releases.has_report_page(found),
            shape=lineage_views.shape,
            devices=len(managed),
            devices_of_model=sum(line.model(found.model) is not None for line in managed),
            choices=sorted((line.name for line in managed), key=natural)
            if len(managed) <= CHOICES_SHOWN
            else [],
        )

    async def report(self, request: web.Request) -> web.StreamResponse:
        """Answer with the workshop's page on a release."""
        found = await self._named(request)
        page = await self._fleet.releases.report_page(found)
        if not page:
            return self._pages.render(
                "error.html",
                status=404,
                title="No report",
                detail=f"No report.html came with {found.model}@{found.number}. The workshop writes "
                "one beside bundle.json, and pushing that bundle again brings it.",
            )
        return report_page.response(page)

    async def withdrawal(self, request: web.Request) -> web.StreamResponse:
        """Answer with what withdrawing a certificate would do; nothing changes."""
        found = await self._named(request)
        certificates = self._fleet.certificates
        one = await certificates.show(found.model, found.number, request.match_info["id"])
        issued = await certificates.list(found.model, found.number)
        await self._roster.refresh()
        return self._pages.render(
            "withdraw.html",
            title=f"Withdraw {one.id}",
            here="/models",
            release=f"{found.model}@{found.number}",
            path=f"/models/{found.model}/{found.number}",
            plan=certificate_views.withdrawal(one, issued, self._roster.lines(), self._clock()),
            longest=LONGEST_REASON,
        )

    async def withdraw(self, request: web.Request) -> web.StreamResponse:
        """Withdraw a certificate, for the reason that was given when it was confirmed."""
        if not access.is_of_this_site(request):
            return access.problem(403, "this came from a page of another site")
        reason = reason_in((await read_form(request)).get("reason", ""))
        if not 0 < len(reason) <= LONGEST_REASON:
            raise BadParameter(
                f"A certificate is withdrawn for a reason, of 1 to {LONGEST_REASON} characters."
            )
        found = await self._named(request)
        await self._fleet.certificates.withdraw(
            found.model, found.number, request.match_info["id"], reason=reason
        )
        raise web.HTTPSeeOther(f"/models/{found.model}/{found.number}#certificates")

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
            plan=deploy_views.plan(found, issued, targets, lines, now=self._clock()),
            targets=len(targets),
            many=figures.many,
        )

    async def deploy(self, request: web.Request) -> web.StreamResponse:
        """Want a release on the devices that were named when it was confirmed."""
        if not access.is_of_this_site(request):
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
            given = {k: v for k, v in once(request).items() if k not in ("release", "to")}
            return list(select(lines, Query.parse(given), self._clock()).matching)
        return deploy_views.chosen(to, request.query.getall("names", []), lines, found.model)

    async def _find(self, text: str) -> Release:
        model, _, number = text.partition("@")
        if not MODEL_NAME.fullmatch(model) or not (number.isascii() and number.isdecimal()):
            raise BadParameter(
                f"A release is called MODEL@NUMBER, for example digits@2, not {text[:80]!r}."
            )
        if len(number) > 9:
            raise UnknownRelease(f"There is no release {number[:20]} of {model}.")
        return await self._fleet.releases.show(model, int(number))

    async def _named(self, request: web.Request) -> Release:
        return await self._find(f"{request.match_info['model']}@{request.match_info['number']}")

    async def _before(self, found: Release, line: Lineage) -> Before | None:
        parent = line.parent
        if parent is None:
            return None
        releases = self._fleet.releases
        return Before(
            bundle=parent.bundle,
            report=await releases.report(parent),
            fetches=lineage.fetches(
                parent.bundle,
                await releases.index(parent),
                found.bundle,
                await releases.index(found),
            ),
        )

    def _card(self, found: Release) -> Card | None:
        try:
            with self._fleet.releases.file(found, CARD).open("rb") as file:
                return cards.read(file.read(cards.LONGEST_CARD + 1))
        except (KeyError, OSError):
            return None  # the card is optional, and no reason to withhold the rest


def _page(request: web.Request) -> int:
    """Return the page of a list that is asked for, from 1.

    Raises:
        BadParameter: it is no such number, or something else was asked for.
    """
    given = once(request)
    text = given.pop("page", "1")
    if given:
        raise BadParameter(f"there is no parameter {min(given)[:40]!r}, only page")
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= LAST_PAGE):
        raise BadParameter(f"page must be a number from 1 on, not {text[:40]!r}")
    return int(text[:9])
