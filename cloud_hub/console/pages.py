"""Pages for people, complete as they leave the hub: scripts only keep their figures fresh."""

import functools
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import jinja2
from aiohttp import web

from cloud_hub.console import access, api, bodies, charts, views
from cloud_hub.console.access import Door, Handler
from cloud_hub.console.api import BadParameter, Insight
from cloud_hub.console.assets import Assets
from cloud_hub.console.views import Model
from cloud_hub.errors import StoreFailed
from cloud_hub.fleet.certificates import CertificateRefused
from cloud_hub.fleet.controller import TooMuchWanted, UnknownDevice, UnknownRelease
from cloud_hub.fleet.fleet import StillOnline
from cloud_hub.fleet.keys import KeyMissing
from cloud_hub.fleet.releases import ReleaseRefused

WINDOWS_S = (60, 300, 900)  # the links above the figures
LONGEST_FORM = 4096
_WILDCARDS = ("0.0.0.0", "[::]")


@dataclass(frozen=True, slots=True)
class Place:
    """An entry of the navigation."""

    title: str
    path: str


NAVIGATION: Sequence[Place] = (
    Place("Overview", "/"),
    Place("Devices", "/devices"),
    Place("Models", "/models"),
)


class OverviewTopic:
    """The overview page's figures, for the page itself and for tabs that watch it."""

    def __init__(
        self,
        insight: Insight,
        models: Callable[[], Iterable[Model]],
        clock: Callable[[], float],
    ) -> None:
        self._insight = insight
        self._models = models
        self._clock = clock

    def parameters(self, given: Mapping[str, Any]) -> Hashable:
        """Return the window asked for.

        Raises:
            BadParameter: it cannot be used, or something else was asked for.
        """
        unknown = set(given) - {"window_s"}
        if unknown:
            raise BadParameter(f"overview has no parameter {min(unknown)[:40]!r}, only window_s")
        return api.window_s(given.get("window_s", api.DEFAULT_WINDOW_S))

    async def refresh(self, parameters: Collection[Any]) -> None:
        """Do nothing: the figures are in memory."""

    def value(self, parameters: Any) -> views.Page:
        """Return the page of this moment."""
        now = self._clock()
        return views.overview(
            self._insight.overview(now, parameters),
            self._models(),
            now=now,
        )


class Pages:
    """Answers people."""

    def __init__(
        self,
        overview: OverviewTopic,
        assets: Assets,
        door: Door,
        *,
        hub_name: str,
        grpc_address: str,
        clock: Callable[[], float],
    ) -> None:
        self._overview = overview
        self._door = door
        self._grpc_address = grpc_address
        self._clock = clock
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("cloud_hub.console"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals.update(
            asset=assets.url,
            hub_name=hub_name,
            navigation=NAVIGATION,
            guarded=door.authenticate is not None,
            chart_width=charts.WIDTH,
            chart_height=charts.HEIGHT,
        )

    async def overview(self, request: web.Request) -> web.Response:
        """Answer ``GET /?window=300``."""
        asked = request.query.get("window", str(WINDOWS_S[1]))
        if asked not in map(str, WINDOWS_S):
            known = ", ".join(map(str, WINDOWS_S))
            return self.render(
                "error.html",
                status=400,
                title="No such window",
                detail=f"window must be one of {known} seconds, got {asked[:40]!r}.",
            )
        window_s = int(asked)
        return self.render(
            "overview.html",
            title="Overview",
            here="/",
            page=self._overview.value(float(window_s)),
            window_s=window_s,
            windows_s=WINDOWS_S,
            command=self.first_command(request),
        )

    async def login(self, request: web.Request) -> web.Response:
        """Answer ``GET /login``."""
        return self._login_page(request, "")

    async def sign_in(self, request: web.Request) -> web.StreamResponse:
        """Answer ``POST /login``: a token becomes a session."""
        if self._door.authenticate is None:
            raise web.HTTPSeeOther("/")
        if not access.is_confidential(request):
            return self._login_page(request, "", status=403)
        form = await read_form(request)
        token = form.get("token", "").strip()
        if not token or await self._door.authenticate(token) is None:
            return self._login_page(
                request,
                "This token is unknown, revoked or expired.",
                status=403,
                then=form.get("next", "/"),
            )
        response = web.Response(status=303, headers={"Location": _local(form.get("next", "/"))})
        response.set_cookie(
            access.COOKIE,
            self._door.sessions.start(token, self._clock()),
            max_age=access.SESSION_S,
            path="/",
            secure=True,
            httponly=True,
            samesite="Strict",
        )
        return response

    async def sign_out(self, request: web.Request) -> web.StreamResponse:
        """Answer ``POST /logout``."""
        self._door.sessions.end(request.cookies.get(access.COOKIE, ""))
        response = web.Response(status=303, headers={"Location": "/login"})
        response.del_cookie(access.COOKIE, path="/", secure=True, httponly=True, samesite="Strict")
        return response

    def _login_page(
        self, request: web.Request, error: str, *, status: int = 200, then: str | None = None
    ) -> web.Response:
        if self._door.authenticate is None:
            raise web.HTTPSeeOther("/")
        return self.render(
            "login.html",
            status=status,
            title="Sign in",
            error=error,
            then=_local(then if then is not None else request.query.get("next", "/")),
            confidential=access.is_confidential(request),
        )

    def first_command(self, request: web.Request) -> str:
        """Return the command that makes the first device appear."""
        return (
            f"fogline-agent run --hub {self._address_for(request)} "
            "--bundle models/digits/bundles/digits-1.0.0"
        )

    def _address_for(self, request: web.Request) -> str:
        """Return the hub's gRPC address as the reader's machine can name it."""
        host, _, port = self._grpc_address.rpartition(":")
        if host not in _WILDCARDS:
            return self._grpc_address
        name = request.url.host or host
        return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"

    def render(self, template: str, *, status: int = 200, **values: Any) -> web.Response:
        """Return a page; every template wants ``title``, most want ``here``."""
        return web.Response(
            status=status,
            text=self._templates.get_template(template).render(**values),
            content_type="text/html",
        )


def readable(pages: Pages, handler: Handler) -> Handler:
    """Return ``handler`` with what it cannot do as a page."""

    @functools.wraps(handler)
    async def call(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except BadParameter as error:
            status, title, detail = 400, "That cannot be shown", str(error)
        except UnknownDevice as error:
            status, title, detail = 404, "No such device", str(error)
        except StillOnline as error:
            status, title, detail = 409, "It is online", str(error)
        except (UnknownRelease, ReleaseRefused) as error:
            status, title, detail = 404, "No such release", str(error)
        except CertificateRefused as error:
            status, title, detail = 404, "No such certificate", str(error)
        except TooMuchWanted as error:
            status, title, detail = 409, "Too much is wanted", str(error)
        except StoreFailed as error:
            status, title, detail = 503, "The hub cannot reach its data", str(error)
        except KeyMissing as error:
            status, title, detail = 503, "The hub cannot sign", str(error)
        detail = detail[:1].upper() + detail[1:]
        return pages.render(
            "error.html",
            status=status,
            title=title,
            detail=detail if detail.endswith(".") else f"{detail}.",
        )

    return call


def once(request: web.Request) -> dict[str, str]:
    """Return the parameters of an address that may name each only once.

    Raises:
        BadParameter: one comes twice.
    """
    for name in request.query:
        if len(request.query.getall(name)) > 1:
            raise BadParameter(f"{name[:40]} comes twice")
    return dict(request.query)


async def read_form(request: web.Request, longest: int = LONGEST_FORM) -> Mapping[str, str]:
    """Return a form.

    Raises:
        InferenceError: see ``bodies.read``.
    """
    body = await bodies.read(request, longest)
    return dict(parse_qsl(body.decode(errors="replace")))


def _local(path: str) -> str:
    """Return where to go after signing in, never another site."""
    elsewhere = path[:1] != "/" or path[1:2] in ("/", "\\") or not path.isprintable()
    return "/" if elsewhere else path
