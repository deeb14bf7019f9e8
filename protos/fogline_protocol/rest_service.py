"""Serves any ``InferenceServer`` over HTTP: the JSON side of the Open Inference Protocol.

    GET  /v2                                        who answers
    GET  /v2/health/live  /v2/health/ready          the status code is the answer
    GET  /v2/models/{m}[/versions/{v}][/ready]      a model's contract
    POST /v2/models/{m}[/versions/{v}]/infer        an answer

Errors are ``{"error": "text"}`` with the status of the error's class.

``local_only`` is for doors that ask nobody who they are, because only this machine reaches
them: a browser on this machine must not open them to every web page it shows.
"""

import ipaddress
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from aiohttp import web

from fogline_protocol import inference, tensors
from fogline_protocol.inference import (
    BadRequest,
    InferenceError,
    InferenceServer,
    InferRequest,
    InferResponse,
    ModelMetadata,
    Parameter,
    TooLarge,
    Unsupported,
)
from fogline_protocol.tensors import Array, TensorError

log = logging.getLogger("fogline.rest")

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def add_routes(app: web.Application, server: InferenceServer) -> None:
    """Add the protocol's routes to ``app``; its ``client_max_size`` limits the bodies."""

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

    async def infer(request: web.Request) -> web.Response:
        name, version = _model(request)
        question = decode_request(name, version, await _body(request))
        timeout_s = inference.timeout_s(question.parameters)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        return web.json_response(encode_response(await server.infer(question, deadline)))

    app.router.add_get("/v2", translating(metadata))
    app.router.add_get("/v2/health/live", translating(live))
    app.router.add_get("/v2/health/ready", translating(ready))
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        app.router.add_get(model, translating(model_metadata))
        app.router.add_get(f"{model}/ready", translating(model_ready))
        app.router.add_post(f"{model}/infer", translating(infer))


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
            return error_response(error)
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
    return _error(error.http_status, str(error))


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)


def decode_request(model: str, version: str, body: bytes) -> InferRequest:
    """Read an inference request from JSON.

    Raises:
        BadRequest: not JSON, or not a request; the text names the part that is wrong.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    request = _typed(document, dict, "the body")
    parameters = _parameters(request.get("parameters", {}), "parameters")
    inputs: dict[str, Array] = {}
    for index, entry in enumerate(_typed(request.get("inputs"), list, "inputs")):
        where = f"inputs[{index}]"
        tensor = _typed(entry, dict, where)
        name = _typed(tensor.get("name"), str, f"{where}.name")
        if name in inputs:
            raise BadRequest(f"input {name!r} comes twice")
        datatype = _typed(tensor.get("datatype"), str, f"{where}.datatype")
        shape = _typed(tensor.get("shape"), list, f"{where}.shape")
        if any(isinstance(dim, bool) or not isinstance(dim, int) for dim in shape):
            raise BadRequest(f"{where}.shape must be whole numbers, got {shape}")
        data = _typed(tensor.get("data"), list, f"{where}.data")
        try:
            inputs[name] = tensors.from_values(datatype, shape, _flat(data))
        except TensorError as error:
            raise BadRequest(f"input {name!r}: {error}") from None
    outputs = [
        _typed(_typed(entry, dict, f"outputs[{i}]").get("name"), str, f"outputs[{i}].name")
        for i, entry in enumerate(_typed(request.get("outputs", []), list, "outputs"))
    ]
    return InferRequest(
        model=model,
        version=version,
        id=_typed(request.get("id", ""), str, "id"),
        inputs=inputs,
        outputs=outputs,
        parameters=parameters,
    )


def encode_response(response: InferResponse) -> dict[str, Any]:
    """Return the response as a JSON-ready document.

    Raises:
        Unsupported: an output has a datatype or a value that JSON cannot carry.
    """
    document: dict[str, Any] = {
        "model_name": response.model,
        "model_version": response.version,
        "outputs": [_output_json(name, array) for name, array in response.outputs.items()],
    }
    if response.id:
        document["id"] = response.id
    if response.parameters:
        document["parameters"] = {key: _finite(value) for key, value in response.parameters.items()}
    return document


def _finite(value: Parameter) -> Parameter:
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def _output_json(name: str, array: Array) -> dict[str, Any]:
    datatype = tensors.datatype_of(array)
    if datatype in ("FP16", "BF16"):
        raise Unsupported(f"output {name!r} is {datatype}, which JSON cannot carry: use gRPC")
    if datatype == "BYTES":
        try:
            data: list[Any] = [
                element if isinstance(element, str) else element.decode() for element in array.flat
            ]
        except UnicodeDecodeError:
            raise Unsupported(
                f"output {name!r} is not text, which JSON cannot carry: use gRPC"
            ) from None
    else:
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Unsupported(
                f"output {name!r} has values that are not finite, which JSON cannot carry: use gRPC"
            )
        data = array.ravel().tolist()
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": data}


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
    return request.match_info["model"], request.match_info.get("version", "")


async def _body(request: web.Request) -> bytes:
    if "Inference-Header-Content-Length" in request.headers:
        raise Unsupported("the binary tensor extension is not offered here: send JSON or use gRPC")
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise TooLarge(f"the body is too large: {error.text}") from None


_JSON_NAMES: Mapping[type, str] = {dict: "an object", list: "a list", str: "a text"}


def _typed(value: Any, kind: type[T], where: str) -> T:
    if not isinstance(value, kind):
        raise BadRequest(f"{where} must be {_JSON_NAMES[kind]}, got {type(value).__name__}")
    return value


def _parameters(document: Any, where: str) -> Mapping[str, Parameter]:
    parameters = _typed(document, dict, where)
    for key, value in parameters.items():
        if not isinstance(value, bool | int | float | str):
            raise BadRequest(f"{where}.{key} must be a flag, a number or a text")
        # JSON can spell what the protocol's own messages, and so the next hop, cannot carry.
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise BadRequest(f"{where}.{key} has more than 64 bits")
        if any(isinstance(text, str) and not _is_text(text) for text in (key, value)):
            raise BadRequest(f"{where}.{key!a} is not text that UTF-8 can carry")
    return parameters


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _flat(data: list[Any]) -> list[Any]:
    """Return nested lists flattened, row by row: the protocol allows both forms."""
    flat: list[Any] = []
    stack: list[Any] = [data]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack.extend(reversed(item))
        else:
            flat.append(item)
    return flat
