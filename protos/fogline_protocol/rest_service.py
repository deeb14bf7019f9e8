"""Serves any ``InferenceServer`` over HTTP: the REST side of the Open Inference Protocol.

    GET  /v2                                        who answers
    GET  /v2/health/live  /v2/health/ready          the status code is the answer
    GET  /v2/models/{m}[/versions/{v}][/ready]      a model's contract
    GET  /v2/models/{m}[/versions/{v}]/config       how it is served
    GET  /v2/models/stats, .../{m}[...]/stats       what it has done
    POST /v2/models/{m}[/versions/{v}]/infer        an answer
    POST /v2/repository/index                       what could be served
    POST /v2/repository/models/{m}/load|unload      serve it, or no longer

Bodies may be compressed with gzip or deflate, both ways. Errors are ``{"error": "text"}`` with
the status of the error's class.

``local_only`` is for doors that ask nobody who they are, because only this machine reaches
them: a browser on this machine must not open them to every web page it shows.
"""

import ipaddress
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from fogline_protocol import (
    doors,
    inference,
    model_config,
    repository,
    rest_codec,
    statistics,
    tensors,
)
from fogline_protocol.inference import (
    BadRequest,
    InferenceError,
    InferenceServer,
    ModelMetadata,
    NotFound,
    TooLarge,
    Unsupported,
)
from fogline_protocol.repository import ModelControl
from fogline_protocol.rest_codec import HEADER_LENGTH

log = logging.getLogger("fogline.rest")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

COMPRESS_FROM = 1024  # bytes; below it the headers cost more than compression saves


def add_routes(
    app: web.Application, server: InferenceServer, control: ModelControl | None = None
) -> None:
    """Add the protocol's routes to ``app``; its ``client_max_size`` limits the bodies.

    Without ``control`` the repository is neither shown nor changed. Whatever else the protocol
    knows and this server does not, answers 501 with a text.
    """

    async def live(_request: web.Request) -> web.Response:
        return web.json_response({"live": True})

    async def ready(_request: web.Request) -> web.Response:
        return _readiness(server.server_ready())

    async def metadata(_request: web.Request) -> web.Response:
        found = server.server_metadata()
        return web.json_response(
            {"name": found.name, "version": found.version, "extensions": list(found.extensions)}
        )

    async def model_metadata(request: web.Request) -> web.Response:
        return web.json_response(_metadata_json(server.model_metadata(*_model(request))))

    async def model_ready(request: web.Request) -> web.Response:
        return _readiness(server.model_ready(*_model(request)))

    async def config(request: web.Request) -> web.Response:
        return web.json_response(model_config.document(server.model_config(*_model(request))))

    async def stats(request: web.Request) -> web.Response:
        return web.json_response(statistics.document(server.model_statistics(*_model(request))))

    async def infer(request: web.Request) -> web.Response:
        name, version = _model(request)
        body = await _body(request)
        header = request.headers.get(HEADER_LENGTH)
        if header == "0":
            found = server.model_config(name, version)
            question, wish = rest_codec.decode_raw(
                name, version, body, found.inputs, batches=found.batches
            )
        else:
            text, binary = rest_codec.split_body(body, header)
            question, wish = rest_codec.decode_request(name, version, text, binary)
        timeout_s = inference.timeout_s(question.parameters)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        response = await doors.answer(server, question, deadline)
        return _answer(request, *rest_codec.encode_response(response, wish))

    app.router.add_get("/v2", translating(metadata))
    app.router.add_get("/v2/health/live", translating(live))
    app.router.add_get("/v2/health/ready", translating(ready))
    app.router.add_get("/v2/models/stats", translating(stats))
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        app.router.add_get(model, translating(model_metadata))
        app.router.add_get(f"{model}/ready", translating(model_ready))
        app.router.add_get(f"{model}/config", translating(config))
        app.router.add_get(f"{model}/stats", translating(stats))
        app.router.add_post(f"{model}/infer", translating(infer))
    if control is not None:
        _add_repository(app, control)
    app.router.add_route("*", "/v2/{path:.*}", translating(_not_offered))


def _add_repository(app: web.Application, control: ModelControl) -> None:
    async def index(request: web.Request) -> web.Response:
        ready = (await _document(request)).get("ready", False)
        if not isinstance(ready, bool):
            raise BadRequest("ready must be true or false")
        found = repository.chosen(control.repository_index(), ready)
        return web.json_response(repository.index_document(found))

    async def load(request: web.Request) -> web.Response:
        parameters = (await _document(request)).get("parameters", {})
        if not isinstance(parameters, dict):
            raise BadRequest("parameters must be an object")
        await control.load_model(request.match_info["model"], sorted(parameters))
        return web.Response()

    async def unload(request: web.Request) -> web.Response:
        await _document(request)
        await control.unload_model(request.match_info["model"])
        return web.Response()

    for root in ("/v2/repository", "/v2/repository/{repository}"):
        app.router.add_post(f"{root}/index", translating(index))
        app.router.add_post(f"{root}/models/{{model}}/load", translating(load))
        app.router.add_post(f"{root}/models/{{model}}/unload", translating(unload))


_KNOWN_ELSEWHERE = re.compile(
    r"repository/|systemsharedmemory|cudasharedmemory|trace/|logging|models/[^/]+/(trace/|generate)"
)


async def _not_offered(request: web.Request) -> web.Response:
    if _KNOWN_ELSEWHERE.match(request.match_info["path"]):
        raise Unsupported(f"{request.path} is not offered by this server")
    raise NotFound(f"there is no {request.method} {request.path} here")


@web.middleware
async def local_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse what a browser sends on behalf of a page from elsewhere.

    A page may point a name of its own at 127.0.0.1 (DNS rebinding): then the ``Host`` is that
    name. Or send a form across sites: then the ``Origin`` is the page's. Programs send neither.
    """
    if not _is_loopback(request.host):
        log.info("%s %s refused: host %r", request.method, request.path, request.host)
        return _error(
            421, f"only localhost, 127.0.0.1 and [::1] are served here, not {request.host!r}"
        )
    origin = request.headers.get("Origin")
    if (
        origin is not None
        and request.method not in ("GET", "HEAD")
        and not _is_loopback(origin.partition("://")[2])
    ):
        log.info("%s %s refused: origin %r", request.method, request.path, origin)
        return _error(403, f"a page of {origin} may not ask anything here")
    return await handler(request)


def _is_loopback(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def translating(handler: Handler) -> Handler:
    """Return ``handler`` with errors turned into the protocol's error bodies."""

    async def call(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except InferenceError as error:
            log.info("%s %s refused: %s", request.method, request.path, error)
            response = error_response(error)
            if request.content.exception() is not None:
                # The body broke off. aiohttp would go on reading it for the next request on
                # this connection, and log that as a fault of ours.
                request.content.feed_eof()
                response.force_close()
            return response
        except web.HTTPException:
            raise
        except Exception:
            # The last door: a fault of ours ends this call, never the process.
            log.exception("%s %s failed", request.method, request.path)
            return error_response(
                inference.ServerFault(f"{request.path} failed, see the server's log")
            )

    return call


def error_response(error: InferenceError) -> web.Response:
    """Return the protocol's error body for ``error``."""
    response = _error(error.http_status, str(error))
    if error.retry_after_s is not None and math.isfinite(error.retry_after_s):
        # Whole seconds are all that the header knows (RFC 9110, 10.2.3): never too early.
        response.headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return response


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)


def _metadata_json(metadata: ModelMetadata) -> dict[str, Any]:
    def tensor(spec: tensors.TensorSpec) -> dict[str, Any]:
        return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}

    return {
        "name": metadata.name,
        "versions": list(metadata.versions),
        "platform": metadata.platform,
        "inputs": [tensor(spec) for spec in metadata.inputs],
        "outputs": [tensor(spec) for spec in metadata.outputs],
        "properties": dict(metadata.properties),
    }


def _readiness(ready: bool) -> web.Response:
    return web.json_response({"ready": ready}, status=200 if ready else 503)


def _model(request: web.Request) -> tuple[str, str]:
    return request.match_info.get("model", ""), request.match_info.get("version", "")


def _answer(request: web.Request, body: bytes, json_length: int | None) -> web.Response:
    response = web.Response(body=body, content_type="application/json")
    if json_length is not None:
        response.content_type = "application/octet-stream"
        response.headers[HEADER_LENGTH] = str(json_length)
    if len(body) >= COMPRESS_FROM:
        response.enable_compression()  # if the caller accepts gzip or deflate
    return response


async def _document(request: web.Request) -> dict[str, Any]:
    """Return the JSON object that a body is; clients may leave it out."""
    body = await _body(request)
    document = rest_codec.parse(body) if body else {}
    if not isinstance(document, dict):
        raise BadRequest(f"the body must be an object, got {type(document).__name__}")
    return document


async def _body(request: web.Request) -> bytes:
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise TooLarge(f"the body is too large: {error.text}") from None
    except web.RequestPayloadError as error:
        raise BadRequest(f"the body cannot be read: {error}") from None
