"""The examples that devices let the hub keep, for programs: ``/api/v1/examples``.

    GET    /examples                    what is kept, by model; bounds; what went wrong last
    GET    /examples/{model}            the examples as a stream of frames (insight/example_codec)
    DELETE /examples                    forget what is selected, e.g. ?device=kiosk-1

Selections: ``model`` (DELETE), ``device``, ``source``, ``since``, ``until`` in seconds since the epoch;
GET also ``shape=NAME=3x224x224``, for inputs that come in several shapes. DELETE wants at least one
of them, or ``all=1``.

Whoever shows a token sees and deletes what its tenant's devices sent. A hub that only this machine
reaches asks for none; there ``tenant`` chooses, by default ``default``, and ``*`` where many are
meant.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from aiohttp import web

from cloud_hub.console import access
from cloud_hub.console.access import Door
from cloud_hub.errors import StoreFailed
from cloud_hub.insight import example_codec
from cloud_hub.insight.example_rows import Selection
from cloud_hub.insight.examples import Examples
from fogline_protocol import examples as protocol
from fogline_protocol.release import MODEL_NAME

log = logging.getLogger("fogline.examples")

EVERYBODY = "*"
_SELECT = ("device", "source", "since", "until")


class _BadQuery(Exception):
    """The address asks for something that cannot be; the message says what can."""


class ExamplesApi:
    """Answers programs that train on examples."""

    def __init__(self, examples: Examples, door: Door) -> None:
        self._examples = examples
        self._door = door

    def routes(self) -> list[tuple[str, str, access.Handler]]:
        """Return method, path and handler of every route."""
        return [
            ("GET", "/api/v1/examples", _telling(self.summary)),
            ("GET", "/api/v1/examples/{model}", _telling(self.export)),
            ("DELETE", "/api/v1/examples", _telling(self.delete)),
        ]

    async def summary(self, request: web.Request) -> web.StreamResponse:
        """Answer with what is kept."""
        _only(request, ("tenant",))
        found = await self._examples.summary(await self._tenant(request, EVERYBODY))
        bounds = self._examples.bounds
        return web.json_response(
            {
                "quota_bytes": bounds.quota_bytes,
                "retention_s": bounds.retention_s,
                "trouble": self._examples.trouble,
                "models": [asdict(kept) for kept in found],
            }
        )

    async def export(self, request: web.Request) -> web.StreamResponse:
        """Answer with the selected examples of one device model."""
        _only(request, ("tenant", "shape", *_SELECT))
        tenant = await self._tenant(request, "default")
        if tenant is None:
            raise _BadQuery("an export is one tenant's: name it")
        model = request.match_info["model"]
        if not MODEL_NAME.fullmatch(model):
            raise _BadQuery(f"no model can be called {model!r:.100}")
        selection = _selection(request, model)
        shapes = dict(map(_shape, request.query.getall("shape", [])))
        await self._examples.settled()
        layouts = {
            layout: n
            for layout, n in (await self._examples.layouts(tenant, selection)).items()
            if example_codec.has_shapes(layout, shapes)
        }
        response = web.StreamResponse(
            headers={"Content-Type": "application/octet-stream", **access.HEADERS}
        )
        await response.prepare(request)
        try:
            # One shape at a time: the others are named, and who asked decides.
            await response.write(example_codec.frame({"layouts": layouts}))
            if len(layouts) <= 1:
                async for one in self._examples.frames(tenant, selection, list(layouts)):
                    await response.write(one)
            await response.write_eof()
        except ConnectionError:
            pass  # whoever asked has left, or knows enough: that there is nothing, say
        except (StoreFailed, OSError) as error:
            # Too late for a status; without its last frame nobody takes the rest for all.
            log.warning("an export of %s breaks off: %s", model, error)
            if request.transport is not None:
                request.transport.abort()
        return response

    async def delete(self, request: web.Request) -> web.StreamResponse:
        """Forget what is selected."""
        _only(request, ("tenant", "model", "all", *_SELECT))
        tenant = await self._tenant(request, "default")
        everything = request.query.get("all", "0") == "1"
        selection = _selection(request, request.query.get("model", ""))
        if not everything and selection == Selection():
            raise _BadQuery(
                "say what to delete: model, device, source, since or until; all=1 means everything"
            )
        return web.json_response(asdict(await self._examples.delete(tenant, selection)))

    async def _tenant(self, request: web.Request, default: str) -> str | None:
        """Return whose examples are meant; None: everybody's."""
        asked = request.query.get("tenant")
        caller = await self._door.caller(request)
        if caller is not None:
            if asked not in (None, caller.tenant):
                raise _BadQuery(f"this token is of tenant {caller.tenant!r}, and sees no other")
            return caller.tenant
        tenant = default if asked is None else asked
        return None if tenant == EVERYBODY else tenant


def _selection(request: web.Request, model: str) -> Selection:
    query = request.query
    device, source = query.get("device", ""), query.get("source")
    for name, value in (("model", model), ("device", device)):
        if value and not MODEL_NAME.fullmatch(value):
            raise _BadQuery(f"no {name} can be called {value!r:.100}")
    if source is not None and not protocol.is_source(source):
        raise _BadQuery(f"no source can be called {source!r:.250}")
    since, until = _time(query, "since"), _time(query, "until")
    if since is not None and until is not None and since >= until:
        raise _BadQuery(f"since = {since:.0f} is not before until = {until:.0f}")
    return Selection(model, device, source, since, until)


def _time(query: Mapping[str, str], name: str) -> float | None:
    text = query.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _BadQuery(f"{name} must be seconds since the epoch, got {text!r:.100}")
    return value


def _shape(text: str) -> tuple[str, Sequence[int]]:
    name, equals, sizes = text.rpartition("=")
    try:
        shape = [int(size) for size in sizes.split("x")] if sizes else []
    except ValueError:
        equals = ""
    if not name or not equals:
        raise _BadQuery(f"shape must be NAME=3x224x224, got {text!r:.100}")
    return name, shape


def _only(request: web.Request, known: Sequence[str]) -> None:
    for name in request.query:
        if name not in known:
            raise _BadQuery(f"unknown parameter {name!r:.60}, known are {', '.join(known)}")
        if name != "shape" and len(request.query.getall(name)) > 1:
            raise _BadQuery(f"{name} comes twice")


def _telling(handler: access.Handler) -> access.Handler:
    """Return ``handler`` with refusals as problem documents."""

    async def call(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except _BadQuery as error:
            return _problem(400, "examples/query", str(error))
        except StoreFailed as error:
            return _problem(503, "hub/cannot-write", str(error))
        except OSError as error:
            return _problem(507, "hub/disk", f"the hub's disk: {error.strerror or error}")

    return call


def _problem(status: int, code: str, detail: str) -> web.Response:
    document: dict[str, Any] = {
        "type": "about:blank", "status": status, "code": code, "detail": detail,
    }  # fmt: skip
    return web.json_response(document, status=status, content_type="application/problem+json")
