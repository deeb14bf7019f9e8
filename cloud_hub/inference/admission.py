"""Who may call: bearer tokens at doors that other machines can reach, on gRPC and HTTP alike."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

import grpc
from aiohttp import web

from cloud_hub.fleet.identity import Caller
from cloud_hub.front.relay import Answer, Call
from fogline_protocol import grpc_calls, grpc_service, rest_service
from fogline_protocol.inference import Unauthenticated, Unsupported

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
Authenticate = Callable[[str], Awaitable[Caller | None]]

_HINT = "send 'authorization: Bearer TOKEN'; `fogline token create` makes one"


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Lets only callers with a valid token through to any method."""

    def __init__(self, authenticate: Authenticate) -> None:
        self._authenticate = authenticate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Refuse before a byte of the request is parsed."""
        if details.method.startswith(f"/{grpc_service.HEALTH}/"):  # probes have no tokens
            return await continuation(details)
        header = dict(details.invocation_metadata or ()).get("authorization", "")
        problem = await _problem(self._authenticate, str(header))
        if problem is None:
            return await continuation(details)

        # As a stream, so that nothing is waited for: it suits unary calls as well.
        async def refuse(_requests: Any, context: grpc_calls.Carrier) -> None:
            await grpc_calls.abort(context, problem)

        return grpc.stream_stream_rpc_method_handler(refuse)


def passed_on(
    methods: Mapping[str, grpc_calls.Method], authenticate: Authenticate | None
) -> Answer:
    """Return what answers the calls that fronts pass on, as the hub's own door would."""

    async def answer(call: Call) -> bytes:
        method = methods.get(call.path)
        if method is None:
            raise Unsupported(f"{call.path} is not offered by this server")
        if authenticate is not None and not call.path.startswith(f"/{grpc_service.HEALTH}/"):
            problem = await _problem(authenticate, call.metadata.get("authorization", ""))
            if problem is not None:
                raise problem
        if call.path == grpc_service.STREAM and not call.request:
            return b""  # a stream was opened: its caller may, that is all
        return await grpc_calls.translating(call.path, method, call.request, call)

    return answer


def rest_middleware(authenticate: Authenticate) -> Any:
    """Return aiohttp middleware that asks for a token on the inference routes and for metrics."""

    @web.middleware
    async def check(request: web.Request, handler: rest_service.Handler) -> web.StreamResponse:
        inference = request.path.startswith("/v2") and not request.path.startswith("/v2/health")
        if inference or request.path == "/metrics":
            problem = await _problem(authenticate, request.headers.get("Authorization", ""))
            if problem is not None:
                return rest_service.error_response(problem)
        return await handler(request)

    return check


async def _problem(authenticate: Authenticate, header: str) -> Unauthenticated | None:
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token:
        return Unauthenticated(f"this hub wants to know its callers: {_HINT}")
    if await authenticate(token.strip()) is None:
        return Unauthenticated(f"the token is unknown, revoked or expired: {_HINT}")
    return None
