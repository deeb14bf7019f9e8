"""Who may use the console, decided before a handler sees the request.

Two kinds of hub. One that listens on the loopback only asks nobody for a token; instead it
answers only to loopback names, so that a web page cannot reach it by pointing a name of its
own at 127.0.0.1 (DNS rebinding). One that other machines reach asks for a token: programs
send it as a bearer token, people sign in with it once and get a session.

    a request -> host named right? -> change from our page? -> signed in, or bearer? -> handler
                     421                       403                303 to /login, 401

All answers carry the security headers.

A session holds its token and asks about it anew at each request, so a revoked token ends its
sessions too. Sessions live in memory: after a restart of the hub people sign in again.
"""

import enum
import ipaddress
import math
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from aiohttp import web

from cloud_hub.fleet.callers import Caller
from fogline_protocol.errors import InferenceError

Authenticate = Callable[[str], Awaitable[Caller | None]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

COOKIE = "fogline_session"
SESSION_S = 12 * 3600
SESSIONS_KEPT = 10_000
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'self'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Not no-referrer: with that, browsers send forms with "Origin: null", and the origin is
    # what tells our own forms from those of other sites.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
UNAUTHENTICATED = (
    "this hub wants to know its callers: send 'authorization: Bearer TOKEN' or sign in at /login; "
    "`fogline token create` makes a token"
)


class Audience(enum.StrEnum):
    """Whom a route is for, and so what a stranger is told."""

    ANYONE = "anyone"  # sign-in and its styles
    PEOPLE = "people"  # strangers are sent to the sign-in page
    PROGRAMS = "programs"  # strangers get 401


@dataclass(frozen=True, slots=True)
class _Session:
    token: str
    ends_at: float  # seconds on the clock of whoever asks


class Sessions:
    """Who is signed in. Owner of the table; time comes in as a number."""

    def __init__(self) -> None:
        self._sessions: dict[str, _Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def start(self, token: str, now: float) -> str:
        """Return the id of a new session of this token."""
        self._sessions = {
            key: session for key, session in self._sessions.items() if session.ends_at > now
        }
        while len(self._sessions) >= SESSIONS_KEPT:  # oldest first: dicts keep their order
            del self._sessions[next(iter(self._sessions))]
        key = secrets.token_urlsafe(32)
        self._sessions[key] = _Session(token, now + SESSION_S)
        return key

    def token(self, key: str, now: float) -> str | None:
        """Return the token of a session that has not ended."""
        session = self._sessions.get(key)
        return session.token if session is not None and session.ends_at > now else None

    def end(self, key: str) -> None:
        """Forget a session; unknown ones are forgotten already."""
        self._sessions.pop(key, None)


class Door:
    """Lets requests through to handlers."""

    def __init__(self, authenticate: Authenticate | None, clock: Callable[[], float]) -> None:
        self.authenticate = authenticate
        self.sessions = Sessions()
        self._clock = clock

    def guarded(self, handler: Handler, audience: Audience) -> Handler:
        """Return ``handler`` for this audience only, with security headers on its answers."""

        async def call(request: web.Request) -> web.StreamResponse:
            try:
                refusal = await self._refused(request, audience)
                response = refusal if refusal is not None else await handler(request)
            except InferenceError as error:  # of a body: too large, or it does not come
                response = problem(error.http_status, str(error), _come_back(error))
            except web.HTTPException as error:
                error.headers.update(HEADERS)
                raise
            if not response.prepared:
                # A handler may be stricter than this, as ``report_page.py`` is.
                for name, value in HEADERS.items():
                    response.headers.setdefault(name, value)
                response.headers.setdefault("Cache-Control", "no-store")
            return response

        return call

    async def admits(self, request: web.Request) -> bool:
        """Return whether the sender may read the console, as of now."""
        return self.authenticate is None or await self.caller(request) is not None

    async def caller(self, request: web.Request) -> Caller | None:
        """Return who asks, as of now; None where nobody is asked for a token, or for strangers."""
        if self.authenticate is None:
            return None
        token = self.sessions.token(request.cookies.get(COOKIE, ""), self._clock())
        if token is None:
            scheme, _, token = request.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer":
                return None
        return await self.authenticate(token.strip())

    async def _refused(self, request: web.Request, audience: Audience) -> web.Response | None:
        if self.authenticate is None and not is_loopback_name(request.host):
            return web.Response(
                status=421,
                text=f"this hub answers only to localhost, 127.0.0.1 and [::1], and was asked as "
                f"{request.host!r}: to open the console to other machines, start it with --http "
                "on an address they reach, TLS and a token\n",
            )
        # A loopback hub asks for no token, so this alone keeps other sites from operating it.
        if request.method not in ("GET", "HEAD") and not is_same_origin(request):
            origin = request.headers["Origin"]
            return problem(403, f"a page of {origin} may not change anything at {request.host}")
        if audience is Audience.ANYONE or await self.admits(request):
            return None
        if audience is Audience.PEOPLE:
            raise web.HTTPSeeOther(f"/login?next={quote(request.path_qs, safe='')}")
        return problem(401, UNAUTHENTICATED, headers={"WWW-Authenticate": "Bearer"})


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> web.Response:
    """Return an error of the API as RFC 9457 has it."""
    return web.json_response(
        {"type": "about:blank", "status": status, "detail": detail},
        status=status,
        headers=headers,
        content_type="application/problem+json",
    )


def _come_back(error: InferenceError) -> dict[str, str]:
    after_s = error.retry_after_s
    if after_s is None or not math.isfinite(after_s):
        return {}
    return {"Retry-After": str(math.ceil(after_s))}


def is_loopback_name(host: str) -> bool:
    """Return whether a ``Host`` header names this machine to itself."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def is_of_this_site(request: web.Request) -> bool:
    """Return whether a browser says that a form is from this console, or says nothing."""
    return request.headers.get("Sec-Fetch-Site", "same-origin") in ("same-origin", "none")


def is_same_origin(request: web.Request) -> bool:
    """Return whether a request came from a page of this console, or from no page at all.

    Browsers name the origin of every form they send and every WebSocket they open, and
    pages cannot change it. A program that names none acts for itself.
    """
    origin = request.headers.get("Origin")
    if origin is None:
        return True
    try:
        return urlsplit(origin).netloc.lower() == request.host.lower()
    except ValueError:
        return False


def is_confidential(request: web.Request) -> bool:
    """Return whether what is sent here cannot be read on the way.

    A proxy that ends TLS says so in ``X-Forwarded-Proto``; who lies in it harms himself only.
    """
    return (
        request.secure
        or request.headers.get("X-Forwarded-Proto", "").lower() == "https"
        or is_loopback_name(request.host)
    )
