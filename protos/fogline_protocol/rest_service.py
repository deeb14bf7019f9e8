"""Serves any ``InferenceServer`` over HTTP: the REST side of the Open Inference Protocol.

    GET  /v2                                        who answers
    GET  /v2/health/live  /v2/health/ready          the status code is the answer
    GET  /v2/models/{m}[/versions/{v}][/ready]      a model's contract
    GET  /v2/models/{m}[/versions/{v}]/config       how it is served
    GET  /v2/models/stats, .../{m}[...]/stats       what it has done
    POST /v2/models/{m}[/versions/{v}]/infer        an answer
    POST /v2/repository/index                       what could be served
    POST /v2/repository/models/{m}/load|unload      serve it, or no longer
    GET  /v2/systemsharedmemory[/region/{r}]/status where callers' tensors may be
    POST .../region/{r}/register, .../unregister    lend memory, take it back
    GET|POST /v2/trace/setting, /v2/models/{m}/trace/setting, /v2/logging

Bodies may be compressed with gzip or deflate, both ways. Errors are ``{"error": "text"}`` with
the status of the error's class.

``local_only`` is for doors that ask nobody who they are, because only this machine reaches
them: a browser on this machine must not open them to every web page it shows.
"""

import asyncio
import functools
import ipaddress
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Container
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from fogline_protocol import (
    door_memory,
    doors,
    inference,
    model_config,
    repository,
    rest_bodies,
    rest_codec,
    settings,
    shared_memory,
    statistics,
    tensors,
)
from fogline_protocol.door_memory import Memory
from fogline_protocol.doors import NOTHING_EXTRA, Extras
from fogline_protocol.errors import (
    ERRORS,
    BadRequest,
    Forbidden,
    InferenceError,
    NotFound,
    Overloaded,
    ServerFault,
    TooLarge,
    Unsupported,
)
from fogline_protocol.inference import InferenceServer, ModelMetadata
from fogline_protocol.outcomes import (
    CANCELLED,
    INTERNAL,
    LARGE_JSON,
    OK,
    UNKNOWN_CALL,
    Books,
    Entry,
)
from fogline_protocol.repository import ModelControl
from fogline_protocol.rest_bodies import Bodies
from fogline_protocol.rest_codec import HEADER_LENGTH
from fogline_protocol.shared_memory import RegionStatus, SharedMemory

log = logging.getLogger("fogline.rest")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

BODIES = web.AppKey("bodies", Bodies)
ENTRY = web.RequestKey("entry", Entry)
LARGEST_BYTES = 64 << 20  # of a body, as far as the size of a memory goes that nobody has set
MAX_DOCUMENT_BYTES = 1 << 16  # of a body that is no inference request
COMPRESS_FROM = 1024  # bytes; below it the headers cost more than compression saves
COMPRESS_BESIDE_FROM = 1 << 16  # bytes; compressed in a thread, with the interpreter free
LARGE_AT_ONCE = 8  # bodies of large JSON that are read, written, or wait for it

T = TypeVar("T")


def add_routes(
    app: web.Application,
    server: InferenceServer,
    control: ModelControl | None = None,
    extras: Extras = NOTHING_EXTRA,
    memory: Memory | None = None,
    books: Books | None = None,
) -> None:
    """Add the protocol's routes to ``app``; its ``client_max_size`` limits the bodies.

    ``memory`` holds them, and may be shared with other doors; None: one of its own.
    ``books`` are told how each request for inference ends, whatever middleware refuses it.

    Without ``control`` the repository is neither shown nor changed. Whatever else the protocol
    knows and ``extras`` leave out, answers 501 with a text.
    """

    async def live(_request: web.Request) -> web.Response:
        return web.json_response({"live": True})

    async def ready(_request: web.Request) -> web.Response:
        return _readiness(server.server_ready())

    async def metadata(_request: web.Request) -> web.Response:
        found = server.server_metadata()
        return web.json_response(
            {
                "name": found.name,
                "version": found.version,
                "extensions": extras.advertised(found.extensions),
            }
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
        async with bodies.arrived(request) as body:
            return await answered(request, body)

    async def answered(request: web.Request, body: bytes) -> web.Response:
        name, version = _model(request)
        header = request.headers.get(HEADER_LENGTH)
        if header == "0":
            found = server.model_config(name, version)
            question, wish = rest_codec.decode_raw(
                name, version, body, found.inputs, batches=found.batches
            )
        else:
            text, binary = rest_codec.split_body(body, header)
            question, wish = await beside.run(
                len(text) > rest_codec.LARGE_BYTES,
                functools.partial(
                    rest_codec.decode_request, name, version, text, binary, extras.shared_memory
                ),
            )
        question.entry = request.get(ENTRY)
        timeout_s = inference.timeout_s(question.parameters)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        response = await doors.answer(server, question, deadline)
        encoded, json_length = await beside.run(
            rest_codec.large_response(response, wish),
            functools.partial(rest_codec.encode_response, response, wish),
        )
        bodies.check_answer(len(encoded))
        return _answer(request, encoded, json_length)

    if memory is None:
        memory = Memory(door_memory.default_limit(LARGEST_BYTES))
    bodies = app[BODIES] = Bodies(memory)

    async def arrange(_app: web.Application) -> AsyncIterator[None]:
        memory.add(bodies)
        yield
        memory.remove(bodies)

    app.cleanup_ctx.append(arrange)
    beside = _Beside(books)
    app.on_cleanup.append(beside.close)
    counted: list[web.AbstractRoute] = []
    app.router.add_get("/v2", translating(metadata))
    app.router.add_get("/v2/health/live", translating(live))
    app.router.add_get("/v2/health/ready", translating(ready))
    app.router.add_get("/v2/models/stats", translating(stats))
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        app.router.add_get(model, translating(model_metadata))
        app.router.add_get(f"{model}/ready", translating(model_ready))
        app.router.add_get(f"{model}/config", translating(config))
        app.router.add_get(f"{model}/stats", translating(stats))
        counted.append(app.router.add_post(f"{model}/infer", translating(infer)))
    if control is not None:
        _add_repository(app, control)
    _add_shared_memory(app, extras.shared_memory)
    _add_settings(app, extras)
    unknown = app.router.add_route("*", "/v2/{path:.*}", translating(_not_offered))
    if books is not None:
        app.middlewares.insert(0, _counting(books, counted, unknown))  # the outermost


class _Beside:
    """One thread for large JSON, so that others are answered while it is read or written.

    One, because threads that compute take the interpreter from the event loop in turns.
    """

    def __init__(self, books: Books | None) -> None:
        self._books = books
        self._thread = ThreadPoolExecutor(1, "fogline-json")
        self._waiting = 0

    async def run(self, large: bool, work: Callable[[], T]) -> T:
        """Return what ``work`` does, done beside the event loop if it is ``large``.

        Raises:
            Overloaded: enough large ones are waiting, each with its body in memory.
        """
        if not large:
            return work()
        if self._waiting >= LARGE_AT_ONCE:
            if self._books is not None:
                self._books.rejected(LARGE_JSON)
            raise Overloaded(
                f"{self._waiting} large JSON bodies are being read or written: come back later, or "
                "send tensors as raw bytes behind the JSON (binary_data_size), which cost next to "
                "nothing"
            )
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._waiting -= 1

    async def close(self, _app: web.Application) -> None:
        """Begin no more work."""
        self._thread.shutdown(wait=False, cancel_futures=True)


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


def _add_shared_memory(app: web.Application, shared: SharedMemory | None) -> None:
    system, cuda = "/v2/systemsharedmemory", "/v2/cudasharedmemory"
    if shared is None:
        for kind in (system, cuda):
            app.router.add_route("*", kind + "{rest:/.*}", _refusing(shared_memory.OFF))
        return

    async def status(request: web.Request) -> web.Response:
        found = shared.status(request.match_info.get("region", ""))
        return web.json_response(shared_memory.status_document(found))

    async def register(request: web.Request) -> web.Response:
        document = await _document(request)
        key = document.get("key")
        if not isinstance(key, str):
            raise BadRequest(f"key must be the name of a shared memory object, got {key!r}")
        numbers = {"offset": document.get("offset", 0), "byte_size": document.get("byte_size")}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise BadRequest(f"{name} must be a number of bytes, got {value!r}")
        shared.register(RegionStatus(request.match_info["region"], key, **numbers))
        return web.Response()

    async def unregister(request: web.Request) -> web.Response:
        async with _small_body(request):
            pass  # whatever it says
        shared.unregister(request.match_info.get("region", ""))
        return web.Response()

    async def no_cuda_regions(request: web.Request) -> web.Response:
        async with _small_body(request):
            pass  # whatever it says
        return web.json_response([])

    for path in (f"{system}/status", f"{system}/region/{{region}}/status"):
        app.router.add_get(path, translating(status))
    app.router.add_post(f"{system}/region/{{region}}/register", translating(register))
    for path in (f"{system}/unregister", f"{system}/region/{{region}}/unregister"):
        app.router.add_post(path, translating(unregister))
    # Asked about all regions, the answer is: there are none.
    app.router.add_get(f"{cuda}/status", translating(no_cuda_regions))
    app.router.add_post(f"{cuda}/unregister", translating(no_cuda_regions))
    app.router.add_route("*", cuda + "{rest:/.*}", _refusing(shared_memory.NO_CUDA))


def _add_settings(app: web.Application, extras: Extras) -> None:
    trace, logs = extras.trace, extras.logs

    async def trace_setting(request: web.Request) -> web.Response:
        if trace is None:
            raise Unsupported(extras.trace_refusal)
        changes = settings.trace_changes(await _document(request))
        found = trace.change_trace(request.match_info.get("model", ""), changes)
        return web.json_response(settings.trace_document(found))

    async def logging_settings(request: web.Request) -> web.Response:
        if logs is None:
            raise Unsupported("log settings are not offered by this server")
        return web.json_response(logs.change(await _document(request)))

    for path, handler in (
        ("/v2/trace/setting", trace_setting),
        ("/v2/models/{model}/trace/setting", trace_setting),
        ("/v2/logging", logging_settings),
    ):
        app.router.add_get(path, translating(handler))
        app.router.add_post(path, translating(handler))


def _refusing(text: str) -> Handler:
    async def refuse(_request: web.Request) -> web.Response:
        raise Unsupported(text)

    return translating(refuse)


_KNOWN_ELSEWHERE = re.compile(r"repository/|models/[^/]+/generate")


async def _not_offered(request: web.Request) -> web.Response:
    if _KNOWN_ELSEWHERE.match(request.match_info["path"]):
        raise Unsupported(f"{request.path} is not offered by this server")
    raise NotFound(f"there is no {request.method} {request.path} here")


def _counting(
    books: Books, counted: Container[web.AbstractRoute], unknown: web.AbstractRoute
) -> Any:
    """Return middleware that tells ``books`` what the callers of the ``counted`` routes see."""

    @web.middleware
    async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
        route = request.match_info.route
        if route not in counted:
            if route is unknown:
                books.rejected(UNKNOWN_CALL)
            return await handler(request)
        entry = request[ENTRY] = books.open_entry()
        outcome = INTERNAL
        try:
            response = await handler(request)
            outcome = _outcome(response.status)
            return response
        except asyncio.CancelledError:
            outcome = CANCELLED
            raise
        finally:
            entry.end(outcome)

    return count


def _outcome(status: int) -> str:
    return OK if status == 200 else _OUTCOMES.get(status, INTERNAL)


# 421 is what ``local_only`` says to whoever must not come in.
_OUTCOMES = {error.http_status: error.grpc_code.lower() for error in ERRORS.values()} | {
    TooLarge.http_status: TooLarge.grpc_code.lower(),
    421: Forbidden.grpc_code.lower(),
}


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
            response = await handler(request)
            log.debug("%s %s: %d", request.method, request.path, response.status)
            return response
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
            return error_response(ServerFault(f"{request.path} failed, see the server's log"))

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
    response = _Answer(
        body=body, content_type="application/json", zlib_executor_size=COMPRESS_BESIDE_FROM
    )
    if json_length is not None:
        response.content_type = "application/octet-stream"
        response.headers[HEADER_LENGTH] = str(json_length)
    if len(body) >= COMPRESS_FROM:
        response.enable_compression()  # if the caller accepts gzip or deflate
    return response


class _Answer(web.Response):
    """An answer that counts until it has left, if it is large."""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        assert isinstance(request, web.Request)
        self._asked, self._bodies = request, request.app[BODIES]
        return await super().prepare(request)

    async def write_eof(self, data: bytes = b"") -> None:
        request, body = self._asked, self.body
        size = len(body) if isinstance(body, bytes) else 0
        if request.transport is None or size < rest_bodies.HELD_FROM_BYTES:
            await super().write_eof(data)
        else:
            await self._bodies.write(request.transport, size, super().write_eof(data))


def _small_body(request: web.Request) -> AbstractAsyncContextManager[bytes]:
    """Return the body of what is no inference request: it is parsed on the loop."""
    return request.app[BODIES].arrived(request, MAX_DOCUMENT_BYTES)


async def _document(request: web.Request) -> dict[str, Any]:
    """Return the JSON object that a body is; clients may leave it out."""
    async with _small_body(request) as body:
        document = rest_codec.parse(body) if body else {}
    if not isinstance(document, dict):
        raise BadRequest(f"the body must be an object, got {type(document).__name__}")
    return document
