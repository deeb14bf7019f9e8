"""Who calls, and how much of it is let in: on gRPC, its streams and HTTP alike.

The doors ask who calls (``admitting``, ``passed_on``, ``rest_middleware``) and note it in
``CALLER``, which every task that serves the call inherits: that of a unary call, one per request
of a stream or passed on by a front, and aiohttp's. ``HubServer.infer`` reads it, and ``Admission``
applies the limits there, once for every request, whatever door it came by.

A bearer token names its caller at every door. At doors that only this machine can reach it may
be left out; then the caller is ``LOCAL``.
"""

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from cloud_hub.fleet.callers import NO_LIMITS, Caller, CallerLimits
from cloud_hub.front.relay import Answer, Call
from cloud_hub.inference.limits import Account
from cloud_hub.metrics import Metrics
from fogline_protocol import grpc_calls, grpc_service
from fogline_protocol.errors import Overloaded, Unauthenticated, Unsupported
from fogline_protocol.grpc_calls import Admit, Metadata
from fogline_protocol.outcomes import UNKNOWN_CALL, Books

if TYPE_CHECKING:  # the gRPC door opens before aiohttp is imported
    from aiohttp import web

    from fogline_protocol import rest_service

Authenticate = Callable[[str], Awaitable[Caller | None]]

LOCAL = Caller(tenant="default", label="local", token_id="local")
CALLER: ContextVar[Caller] = ContextVar("CALLER", default=LOCAL)

_HINT = "send 'authorization: Bearer TOKEN'; `fogline token create` makes one"
_WHAT = {"rate": "{0.rate:g} requests a second", "concurrency": "{0.concurrency} requests at once"}


class Admission:
    """Holds every caller to its limits. Used on one event loop."""

    def __init__(self, default: CallerLimits, metrics: Metrics) -> None:
        """Hold callers whose token says nothing to ``default``."""
        self._default = default
        self._metrics = metrics
        # By token: strangers are not let in, so they cannot fill it.
        self._accounts: dict[str, tuple[CallerLimits, Account]] = {}

    @contextlib.contextmanager
    def admitted(self, caller: Caller) -> Iterator[None]:
        """Let one request of ``caller`` in for as long as the context lasts.

        Raises:
            Overloaded: it asks too often, or too much at once; with the time to come back.
        """
        limits = CallerLimits(
            caller.limits.rate or self._default.rate,
            caller.limits.burst if caller.limits.rate else self._default.burst,
            caller.limits.concurrency or self._default.concurrency,
        )
        if limits == NO_LIMITS:
            yield
            return
        known = self._accounts.get(caller.token_id)
        if known is None or known[0] != limits:
            account = Account(limits.rate, limits.burst, limits.concurrency)
            known = self._accounts[caller.token_id] = (limits, account)
        account = known[1]
        started = time.monotonic()
        refusal = account.enter(started)
        if refusal is not None:
            self._metrics.rejected(refusal.reason)
            raise Overloaded(
                f"caller {caller.label or caller.token_id!r} of tenant {caller.tenant!r} may make "
                f"{_WHAT[refusal.reason].format(limits)}: come back in "
                f"{refusal.retry_after_s:.3f} s",
                retry_after_s=refusal.retry_after_s,
            )
        try:
            yield
        finally:
            account.leave(time.monotonic() - started)


class Callers:
    """Tells who calls by the ``authorization`` header, for both doors."""

    def __init__(self, authenticate: Authenticate, *, required: bool, metrics: Metrics) -> None:
        """Let callers without a token in as ``LOCAL`` unless one is ``required``."""
        self._authenticate = authenticate
        self._required = required
        self._metrics = metrics

    async def who(self, header: str) -> Caller:
        """Return the caller.

        Raises:
            Unauthenticated: nobody known, or a token is missing where one is required.
        """
        if not header and not self._required:
            return LOCAL
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token:
            self._metrics.rejected("unauthenticated")
            raise Unauthenticated(f"this hub wants to know its callers: {_HINT}")
        caller = await self._authenticate(token.strip())
        if caller is None:
            self._metrics.rejected("unauthenticated")
            raise Unauthenticated(f"the token is unknown, revoked or expired: {_HINT}")
        return caller


def admitting(callers: Callers) -> Admit:
    """Return what notes who makes a call at a gRPC door, and lets nobody else through."""

    async def admit(path: str, metadata: Metadata) -> None:
        if not path.startswith(f"/{grpc_service.HEALTH}/"):  # probes have no tokens
            header = next((value for key, value in metadata if key == "authorization"), "")
            CALLER.set(await callers.who(str(header)))

    return admit


def passed_on(methods: Mapping[str, grpc_calls.Method], callers: Callers, books: Books) -> Answer:
    """Return what answers the calls that fronts pass on, as the hub's own door would."""

    async def answer(call: Call) -> bytes:
        method = methods.get(call.path)
        if method is None:
            books.rejected(UNKNOWN_CALL)
            raise Unsupported(f"{call.path} is not offered by this server")
        if not call.path.startswith(f"/{grpc_service.HEALTH}/"):
            # In the task of this call alone.
            CALLER.set(await callers.who(call.metadata.get("authorization", "")))
        if call.admit:
            return b""
        return await grpc_calls.translating(call.path, method, call.request, call)

    return answer


def rest_middleware(callers: Callers) -> Any:
    """Return aiohttp middleware that notes who calls the inference routes or reads the metrics."""
    from aiohttp import web

    from fogline_protocol import rest_service

    @web.middleware
    async def check(
        request: "web.Request", handler: "rest_service.Handler"
    ) -> "web.StreamResponse":
        inference = request.path.startswith("/v2") and not request.path.startswith("/v2/health")
        if not inference and request.path != "/metrics":
            return await handler(request)
        try:
            caller = await callers.who(request.headers.get("Authorization", ""))
        except Unauthenticated as error:
            return rest_service.error_response(error)
        # One task serves all requests of a connection, so what is noted must end with this one.
        noted = CALLER.set(caller)
        try:
            return await handler(request)
        finally:
            CALLER.reset(noted)

    return check
