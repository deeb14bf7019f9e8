"""What operators do to the fleet, for programs: ``/api/v1``.

    GET  /releases                      all, by model, newest first
    GET  /releases/{model}/{number}     one, with its bundle's root document, certificates, report;
                                        the number may be a version, and 0 is the newest
    GET  /releases/{model}/{number}/report.html     the workshop's page, if one came with it
    POST /releases[?force=1]            a bundle as a tar stream becomes a release
    GET  /certificates[?model=&release=]            all, the latest attached first; also withdrawn ones
    POST /releases/{model}/{number}/certificates    a certificate as the workshop wrote it is issued
    POST /releases/{model}/{number}/certificates/{id}/withdrawal    {"reason": "..."}: it holds no more
    GET  /devices                       all, what is wanted of them and what they say
    GET  /devices/{name}                one, with its latest changes of phase
    DELETE /devices/{name}              one that is offline is forgotten, with its counts and history
    POST /deployments                   {"release": "digits@2", "devices": ["kiosk"] or null for all}
    POST /deployments/withdrawal        {"model": "digits", "devices": ...}: no release of it is wanted

Errors are ``application/problem+json`` with a sentence in ``detail`` and a stable ``code``.
"""

import asyncio
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web
from google.protobuf import json_format

from cloud_hub.console import access, bodies, report_page
from cloud_hub.errors import StoreFailed
from cloud_hub.fleet import lineage, upload, workshop_report
from cloud_hub.fleet.certificates import (
    LONGEST_REASON,
    CertificateRefused,
    Change,
    Issued,
    reason_in,
)
from cloud_hub.fleet.controller import (
    Event,
    TooMuchWanted,
    Twin,
    UnknownDevice,
    UnknownRelease,
)
from cloud_hub.fleet.devices import Devices
from cloud_hub.fleet.fleet import Fleet, StillOnline
from cloud_hub.fleet.releases import Release, ReleaseRefused
from cloud_hub.fleet.trust import KeyMissing
from cloud_hub.fleet.upload import UploadRefused
from fogline_protocol import certificate as documents
from fogline_protocol.documents import DocumentError
from fogline_protocol.release import MODEL_NAME

MAX_UPLOAD_BYTES = 8 << 30
MAX_BODY_BYTES = 1 << 20
_CHOICE = "devices must be a list of names, or null for all"
UPLOADING = "uploading"  # folder below the scratch folder, emptied at every start

_RELEASE = "/api/v1/releases/{model}/{number}"
_STATUS = {
    "release/unknown": 404,
    "bundle/version-taken": 409,
    "certificate/unknown": 404,
    "certificate/too-many": 409,
}


class FleetApi:
    """Answers programs that operate the fleet."""

    def __init__(
        self, fleet: Fleet, devices: Devices, scratch: Path, clock: Callable[[], float]
    ) -> None:
        """Join what is needed; ``scratch`` is a folder for uploads on the data's own disk."""
        self._fleet = fleet
        self._devices = devices
        self._scratch = scratch
        self._clock = clock
        # What a killed hub was receiving; the data directory is ours alone.
        shutil.rmtree(scratch / UPLOADING, ignore_errors=True)

    def routes(self) -> list[tuple[str, str, access.Handler]]:
        """Return method, path and handler of every route."""
        return [
            ("GET", "/api/v1/releases", _telling(self.releases)),
            ("POST", "/api/v1/releases", _telling(self.push)),
            ("GET", _RELEASE, _telling(self.release)),
            ("GET", f"{_RELEASE}/report.html", _telling(self.report)),
            ("GET", "/api/v1/certificates", _telling(self.certificates)),
            ("POST", f"{_RELEASE}/certificates", _telling(self.issue)),
            ("POST", f"{_RELEASE}/certificates/{{id}}/withdrawal", _telling(self.withdraw)),
            ("GET", "/api/v1/devices", _telling(self.devices)),
            ("GET", "/api/v1/devices/{name}", _telling(self.device)),
            ("DELETE", "/api/v1/devices/{name}", _telling(self.forget)),
            ("POST", "/api/v1/deployments", _telling(self.deploy)),
            ("POST", "/api/v1/deployments/withdrawal", _telling(self.withdraw_deployment)),
        ]

    async def releases(self, _request: web.Request) -> web.Response:
        """Answer with every release."""
        found = await self._fleet.releases.list()
        return web.json_response([_line(one, found) for one in found])

    async def release(self, request: web.Request) -> web.Response:
        """Answer with one release in full."""
        found = await self._named(request)
        issued = await self._fleet.certificates.list(found.model, found.number)
        running = (await self._fleet.controller.running(found.model)).get(found.number)
        return web.json_response(
            {
                **_line(found, await self._fleet.releases.list(found.model)),
                "bundle": json.loads(found.bundle.to_json()),
                "certificates": [_certificate(one) for one in issued],
                "report": dict(await self._fleet.releases.report(found)),
                "report_html": f"{request.path.rpartition('/')[0]}/{found.number}/report.html"
                if self._fleet.releases.has_report_page(found)
                else None,
                "running_on": running.devices if running else 0,
                # By variant; devices with an older agent, and any that name another, tell none.
                "variants_on": {
                    variant.name: running.variants.get(variant.name, 0) if running else 0
                    for variant in found.bundle.variants
                },
                "fallback_on": running.fallbacks if running else 0,
            }
        )

    async def report(self, request: web.Request) -> web.StreamResponse:
        """Answer with the workshop's page of one release."""
        found = await self._named(request)
        page = await self._fleet.releases.report_page(found)
        if not page:
            return _problem(404, "report/none", f"no report.html came with {_name(found)}")
        return report_page.response(page)

    async def push(self, request: web.Request) -> web.Response:
        """Accept a bundle."""
        force = request.query.get("force", "0")
        if force not in ("0", "1"):
            return access.problem(400, f"force is 0 or 1, got {force!r}")
        uploading = self._scratch / UPLOADING
        await asyncio.to_thread(uploading.mkdir, parents=True, exist_ok=True)
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, dir=uploading))
        try:
            archive = folder / "upload.tar"
            await _receive(request, archive)
            bundle = await asyncio.to_thread(_unpack, archive, folder / "bundle")
            found = await self._fleet.releases.accept(bundle, force=force == "1")
            notes = (await asyncio.to_thread(workshop_report.read, bundle)).notes
        except ReleaseRefused as error:
            # Where the upload lay is of no use to whoever sent it.
            sentence = re.sub(rf"{re.escape(str(bundle))}(: |/)", "", error.sentence)
            raise ReleaseRefused(error.code, sentence, error.figures) from None
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        known = await self._fleet.releases.list(found.model)
        return web.json_response({**_line(found, known), "notes": list(notes)}, status=201)

    async def certificates(self, request: web.Request) -> web.Response:
        """Answer with every certificate, of one model or of one release."""
        given = dict(request.query)
        model, which = given.pop("model", None), given.pop("release", None)
        if given or len(request.query) != len(set(request.query)) or (which and not model):
            return access.problem(400, "expected at most ?model=MODEL&release=NUMBER")
        found = await self._release(f"{model}@{which or '0'}") if model is not None else None
        issued = await self._fleet.certificates.list(
            found.model if found else None, found.number if found and which else None
        )
        return web.json_response([_certificate(one) for one in issued])

    async def issue(self, request: web.Request) -> web.Response:
        """Attach a certificate to a release that is out, and tell its devices."""
        found = await self._named(request)
        document = await bodies.read(request, MAX_BODY_BYTES)
        try:
            certificate = documents.parse(document)
        except DocumentError as error:
            raise CertificateRefused("certificate/malformed", str(error)) from None
        change = await self._fleet.certificates.issue(found.model, found.number, certificate)
        return web.json_response(_change(change), status=201)

    async def withdraw(self, request: web.Request) -> web.Response:
        """Take a certificate back, and tell the devices of its release."""
        body = await _json(request)
        given = body.pop("reason", None)
        reason = reason_in(given) if isinstance(given, str) else ""
        if body or not 0 < len(reason) <= LONGEST_REASON:
            return access.problem(
                400, f'expected {{"reason": "TEXT"}} of 1 to {LONGEST_REASON} characters'
            )
        found = await self._named(request)
        change = await self._fleet.certificates.withdraw(
            found.model, found.number, request.match_info["id"], reason=reason
        )
        return web.json_response(_change(change), status=202)

    async def devices(self, _request: web.Request) -> web.Response:
        """Answer with every device."""
        return web.json_response([self._twin(one) for one in await self._fleet.controller.twins()])

    async def device(self, request: web.Request) -> web.Response:
        """Answer with one device and its history."""
        name = request.match_info["name"]
        for one in await self._fleet.controller.twins():
            if one.device == name:
                events = await self._fleet.controller.events(name)
                return web.json_response(
                    {**self._twin(one), "events": [_event(event) for event in events]}
                )
        raise UnknownDevice(f"no device {name!r} has reported to this hub")

    async def deploy(self, request: web.Request) -> web.Response:
        """Want a release on devices."""
        body = await _json(request)
        devices = body.get("devices")
        if not isinstance(body.get("release"), str) or set(body) - {"release", "devices"}:
            return access.problem(400, 'expected {"release": "MODEL@NUMBER", "devices": [...]}')
        if not _is_choice(devices):
            return access.problem(400, _CHOICE)
        found = await self._release(body["release"])
        names = await self._fleet.controller.want(devices, found.model, found.number)
        return web.json_response({"release": _name(found), "devices": list(names)}, status=202)

    async def _named(self, request: web.Request) -> Release:
        """Return the release that the path names."""
        return await self._release(f"{request.match_info['model']}@{request.match_info['number']}")

    async def withdraw_deployment(self, request: web.Request) -> web.Response:
        """Want no release of a model on devices any more."""
        body = await _json(request)
        model, devices = body.get("model"), body.get("devices")
        if not isinstance(model, str) or set(body) - {"model", "devices"}:
            return access.problem(400, 'expected {"model": "MODEL", "devices": [...]}')
        if not _is_choice(devices):
            return access.problem(400, _CHOICE)
        names = await self._fleet.controller.unwant(devices, model)
        return web.json_response({"model": model, "devices": list(names)}, status=202)

    async def forget(self, request: web.Request) -> web.Response:
        """Forget a device."""
        name = request.match_info["name"]
        await self._fleet.forget(name, self._clock())
        return web.json_response({"device": name})

    async def _release(self, text: str) -> Release:
        """Return the release ``MODEL@NUMBER`` or ``MODEL@VERSION``, of ``MODEL`` the newest."""
        model, _, which = text.partition("@")
        named = MODEL_NAME.fullmatch(model) is not None  # else not every database takes it
        known = await self._fleet.releases.list(model) if named else []
        for found in known:
            if which in ("", "0", str(found.number), found.version):
                return found
        offered = ", ".join(_name(found) for found in reversed(known)) or "none"
        raise UnknownRelease(
            f"there is no release {text!r:.200}; of {model!r:.100} there are: {offered}"
        )

    def _twin(self, one: Twin) -> dict[str, Any]:
        seen = self._devices.find(one.device)
        return {
            "name": one.device,
            "online": seen is not None and self._devices.online(seen, self._clock()),
            "last_seen": seen.last_seen if seen is not None else None,
            "standing": one.standing,
            "desired": dict(one.desired),
            "generation": one.generation,
            "reported_generation": one.reported.generation,
            "models": [
                json_format.MessageToDict(
                    model,
                    preserving_proto_field_name=True,
                    always_print_fields_with_no_presence=True,
                )
                for model in one.reported.models
            ],
        }


def _telling(handler: access.Handler) -> access.Handler:
    """Return ``handler`` with refusals as problem documents."""

    async def call(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except ReleaseRefused as error:
            return _problem(_STATUS.get(error.code, 422), error.code, error.sentence, error.figures)
        except CertificateRefused as error:
            return _problem(_STATUS.get(error.code, 422), error.code, error.sentence)
        except UploadRefused as error:
            return _problem(422, "bundle/refused", str(error))
        except UnknownDevice as error:
            return _problem(404, "device/unknown", str(error))
        except StillOnline as error:
            return _problem(409, "device/online", str(error))
        except UnknownRelease as error:
            return _problem(404, "release/unknown", str(error))
        except TooMuchWanted as error:
            return _problem(409, "device/too-much", str(error))
        except (StoreFailed, KeyMissing) as error:
            return _problem(503, "hub/cannot-write", str(error))
        except OSError as error:
            return _problem(507, "hub/disk", f"the hub's disk: {error.strerror or error}")

    return call


def _problem(status: int, code: str, detail: str, figures: Any = None) -> web.Response:
    document = {"type": "about:blank", "status": status, "code": code, "detail": detail}
    if figures:
        document["figures"] = {variant: dict(values) for variant, values in figures.items()}
    return web.json_response(document, status=status, content_type="application/problem+json")


async def _receive(request: web.Request, archive: Path) -> None:
    taken = 0
    with archive.open("wb") as file:
        async for chunk in bodies.pieces(request):
            taken += len(chunk)
            if taken > MAX_UPLOAD_BYTES:
                raise UploadRefused(f"more than {MAX_UPLOAD_BYTES} bytes")
            await asyncio.to_thread(file.write, chunk)


def _unpack(archive: Path, into: Path) -> Path:
    with archive.open("rb") as file:
        return upload.unpack(file, into)


async def _json(request: web.Request) -> dict[str, Any]:
    body = await bodies.read(request, MAX_BODY_BYTES)
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    return document if isinstance(document, dict) else {}


def _is_choice(devices: object) -> bool:
    return devices is None or (
        isinstance(devices, list) and bool(devices) and all(isinstance(d, str) for d in devices)
    )


def _name(found: Release) -> str:
    return f"{found.model}@{found.number}"


def _line(found: Release, known: Sequence[Release]) -> dict[str, Any]:
    pairing = found.escalates_to
    line = lineage.trace(found, [one for one in known if one.model == found.model])
    return {
        "release": _name(found),
        "model": found.model,
        "number": found.number,
        "version": found.version,
        "bundle_sha256": found.bundle_sha256,
        "accepted_at": found.accepted_at,
        "forced": found.forced,
        "size_bytes": found.size_bytes,
        "escalates_to": pairing.model if pairing is not None else None,
        "parent": {
            "version": line.named.version,
            "bundle_sha256": line.named.bundle_sha256,
            "release": _name(line.parent) if line.parent is not None else None,
        }
        if line.named is not None
        else None,
        "children": [_name(child) for child in line.children],
        "self_test": {variant: dict(figures) for variant, figures in found.self_test.items()},
    }


def _certificate(one: Issued) -> dict[str, Any]:
    return {
        **json.loads(one.certificate.to_json()),
        "id": one.id,
        "release": f"{one.certificate.model}@{one.release}",
        "attached_at": one.attached_at,
        "withdrawn": one.withdrawn_at is not None,
        "withdrawn_at": one.withdrawn_at,
        "reason": one.reason,
    }


def _change(change: Change) -> dict[str, Any]:
    return {**_certificate(change.issued), "devices": list(change.devices)}


def _event(event: Event) -> dict[str, Any]:
    return {name: getattr(event, name) for name in Event.__slots__ if name != "device"}
