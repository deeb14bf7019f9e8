"""What programs get that operate the fleet, from a real hub without a broker."""

import asyncio
import contextlib
import gzip
import io
import json
import shutil
import socket
import tarfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from cloud_hub.config import HubConfig
from cloud_hub.fleet import upload
from cloud_hub.fleet.link import Arrival
from cloud_hub.hub import Hub
from fogline_protocol import release, rest_bodies
from fogline_protocol.certificate import Certificate
from fogline_protocol.release import Parent
from fogline_protocol.v1 import fleet_pb2 as pb
from tests.cloud_hub.console import workshop


@contextlib.asynccontextmanager
async def running(data: Path) -> AsyncIterator[Hub]:
    config = HubConfig(data=data, grpc="127.0.0.1:0", http="127.0.0.1:0", mqtt="off", threads=1)
    async with Hub(config) as hub:
        yield hub


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[Hub]:
    async with running(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
async def session(hub: Hub) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(hub.url) as session:
        yield session


class Answer:
    def __init__(self, status: int, kind: str, document: Any) -> None:
        self.status = status
        self.kind = kind
        self.document = document


async def ask(session: aiohttp.ClientSession, method: str, path: str, **more: Any) -> Answer:
    async with session.request(method, f"/api/v1{path}", **more) as answer:
        return Answer(answer.status, answer.content_type, await answer.json(content_type=None))


async def refused(
    session: aiohttp.ClientSession, method: str, path: str, **more: Any
) -> tuple[int, str, str]:
    """Return status, code and sentence of a refusal in the form that all have."""
    answer = await ask(session, method, path, **more)
    assert answer.kind == "application/problem+json", answer.document
    assert answer.document["status"] == answer.status
    return answer.status, answer.document.get("code", ""), answer.document["detail"]


def packed(bundle: Path) -> bytes:
    archive = io.BytesIO()
    upload.pack(bundle, archive)
    return archive.getvalue()


@pytest.fixture(scope="session")
def hub_bundle(digits: Path) -> Path:
    return digits / "bundles" / "digits-hub-1.0.0"


async def report_as(hub: Hub, *devices: str) -> None:
    births = [
        pb.DeviceState(schema=1, device=name, online=True, boot=1, connection=1) for name in devices
    ]
    await hub.fleet.controller.commit([Arrival("default", one.device, one) for one in births])


async def test_a_push_carries_lineage_and_report_and_says_what_it_left_out(
    session: aiohttp.ClientSession, hub: Hub, digits: Path, tmp_path: Path
) -> None:
    def push(name: str, **changes: Any) -> bytes:
        return packed(
            workshop.bundle(
                tmp_path / name, digits, of="digits-hub-1.0.0", escalates_to=None, **changes
            )
        )

    first = await ask(session, "POST", "/releases", data=push("1", version="2.0.0"))
    assert (first.status, first.document["parent"], first.document["notes"]) == (201, None, [])
    digest = first.document["bundle_sha256"]
    child = push("2", version="2.1.0", parent=Parent("2.0.0", digest), page="x" * (5 << 20))
    second = (await ask(session, "POST", "/releases", data=gzip.compress(child))).document
    named = {"version": "2.0.0", "bundle_sha256": digest, "release": "digits-hub@1"}
    assert second["parent"] == named
    assert second["notes"] == ["report.html was left out: it is larger than 4 MiB"]
    orphan = push("3", version="2.2.0", parent=Parent("1.9.0", "ab" * 32))
    third = (await ask(session, "POST", "/releases", data=orphan)).document
    assert third["parent"]["release"] is None
    listed = (await ask(session, "GET", "/releases")).document
    assert [one["children"] for one in listed] == [[], [], ["digits-hub@2"]]
    shown = (await ask(session, "GET", "/releases/digits-hub/2.0.0")).document
    assert shown["report"] == workshop.report()
    assert shown["report_html"] == "/api/v1/releases/digits-hub/1/report.html"
    async with session.get(shown["report_html"]) as response:
        assert await response.text() == workshop.PAGE
    shown = (await ask(session, "GET", "/releases/digits-hub/2")).document
    assert shown["report_html"] is None
    status, code, _ = await refused(session, "GET", "/releases/digits-hub/2/report.html")
    assert (status, code) == (404, "report/none")
    stolen = push("4", version="2.0.0", model="stolen", parent=Parent("2.0.0", digest))
    status, code, detail = await refused(session, "POST", "/releases", data=stolen)
    assert (status, code) == (422, "parent/model")
    assert "digits-hub@1, a release of another model" in detail


async def test_a_bundle_becomes_a_release_and_once_more_the_same(
    session: aiohttp.ClientSession, hub: Hub, hub_bundle: Path
) -> None:
    body = packed(hub_bundle)
    first = await ask(session, "POST", "/releases", data=body)
    again = await ask(session, "POST", "/releases?force=0", data=gzip.compress(body))
    assert (first.status, first.document["release"]) == (201, "digits-hub@1")
    assert again.document == first.document
    assert first.document["self_test"]
    assert first.document.pop("notes") == []
    assert (await ask(session, "GET", "/releases")).document == [first.document]
    for name in ("digits-hub/1", "digits-hub/0", "digits-hub/1.0.0"):
        shown = (await ask(session, "GET", f"/releases/{name}")).document
        assert shown["release"] == "digits-hub@1"
        assert shown["bundle"]["model"] == "digits-hub"
        assert shown["running_on"] == shown["fallback_on"] == 0
        assert shown["variants_on"] == {"fp32": 0, "int8-qdq": 0}
    uploads = hub.config.data / "uploads"
    assert [path for path in uploads.rglob("*") if path.is_file()] == []


UNKNOWN = (
    "digits/1", "digits/0", "digits-hub/2", "digits-hub/9.9.9", "digits-hub/-1",
    "digits-hub/99999999999999999999999", "digits-hub/%C2%B2", "digits-hub/%D9%A1", "x%00/1",
    "%F0%9F%92%A9/1", "digits-hub/01",
)  # fmt: skip


async def test_an_unknown_release_is_named_with_those_that_there_are(
    session: aiohttp.ClientSession, hub: Hub, hub_bundle: Path
) -> None:
    await hub.fleet.releases.accept(hub_bundle)
    for name in UNKNOWN:
        status, code, said = await refused(session, "GET", f"/releases/{name}")
        assert (status, code) == (404, "release/unknown"), name
        offered = "digits-hub@1" if name.startswith("digits-hub") else "none"
        assert f"there are: {offered}" in said, name


def archive_of(**entries: bytes | tarfile.TarInfo) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in entries.items():
            if isinstance(content, bytes):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
            else:
                archive.addfile(content)
    return stream.getvalue()


def link_to(target: str) -> tarfile.TarInfo:
    entry = tarfile.TarInfo("bundle.json")
    entry.type = tarfile.SYMTYPE
    entry.linkname = target
    return entry


ZIPPED = gzip.compress(archive_of(**{"bundle.json": bytes(range(256)) * 9}), mtime=0)


NO_BUNDLES: list[tuple[bytes, str]] = [
    (ZIPPED[: len(ZIPPED) // 2], "the compressed stream is damaged"),
    (b"", "ends inside a header"),
    (b"not a tar archive" * 100, "not a tar archive"),
    (archive_of(b=link_to("/etc/passwd")), "neither a regular file nor a folder"),
    (archive_of(**{"/etc/cron.d/x": b"x"}), "not a plain path"),
    (archive_of(**{"../x": b"x"}), "not a plain path"),
    (archive_of(**{"bundle.json": b"x" * 900})[:700], "ends inside bundle.json"),
    (archive_of(**{"bundle.json": b"{}"}), "bundle.json"),
    (archive_of(**{"other.json": b"{}"}), "bundle.json"),
]


async def test_what_is_no_bundle_is_refused_and_leaves_nothing(
    session: aiohttp.ClientSession, hub: Hub
) -> None:
    for body, said in NO_BUNDLES:
        status, code, sentence = await refused(session, "POST", "/releases", data=body)
        assert (status, code) == (422, "bundle/refused"), said
        assert said in sentence
        assert str(hub.config.data) not in sentence
    assert list((hub.config.data / "uploads").rglob("*.tar")) == []
    assert (await ask(session, "GET", "/releases")).document == []


async def test_an_upload_that_breaks_off_leaves_nothing(hub: Hub, hub_bundle: Path) -> None:
    body = packed(hub_bundle)
    host, _, port = hub.http_address.rpartition(":")
    uploads = hub.config.data / "uploads"
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /api/v1/releases HTTP/1.1\r\nHost: {hub.http_address}\r\n"
    writer.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body[:5000])
    await writer.drain()
    async with asyncio.timeout(10):
        while not list(uploads.rglob("*.tar")):
            await asyncio.sleep(0.005)
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
        )
        writer.close()
        while list(uploads.rglob("*.tar")):
            await asyncio.sleep(0.005)
    assert await hub.fleet.releases.list() == []


@pytest.mark.parametrize("path", ["/api/v1/releases", "/api/v1/deployments", "/deploy"])
async def test_who_stops_sending_is_given_up(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(rest_bodies, "ARRIVAL_S", 0.2)
    host, _, port = hub.http_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {path} HTTP/1.1\r\nHost: {hub.http_address}\r\nContent-Length: 2000\r\n\r\n{{"
    writer.write(head.encode())
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    assert answer.startswith(b"HTTP/1.1 504 ")
    assert hub.memory.arriving.used == 0
    assert list((hub.config.data / "uploads").rglob("*.tar")) == []
    writer.close()


async def test_what_a_killed_hub_was_receiving_is_gone_after_its_next_start(
    tmp_path: Path,
) -> None:
    left = tmp_path / "hub" / "uploads" / "uploading" / "x"
    left.mkdir(parents=True)
    (left / "upload.tar").write_bytes(b"x")
    async with running(tmp_path / "hub"):
        assert not left.exists()


async def test_force_is_a_number(session: aiohttp.ClientSession) -> None:
    for force in ("yes", "2", "", "true"):
        status, _, said = await refused(session, "POST", f"/releases?force={force}", data=b"x")
        assert (status, said) == (400, f"force is 0 or 1, got {force!r}")


async def test_a_bundle_whose_self_test_fails_must_be_forced(
    session: aiohttp.ClientSession, hub: Hub, hub_bundle: Path, digits: Path
) -> None:
    await hub.fleet.releases.accept(hub_bundle)
    body = packed(digits / "bundles" / "broken" / "digits-1.2.0")
    answer = await ask(session, "POST", "/releases", data=body)
    assert (answer.status, answer.document["code"]) == (422, "self-test/failed")
    assert answer.document["figures"]
    forced = await ask(session, "POST", "/releases?force=1", data=body)
    assert (forced.status, forced.document["forced"]) == (201, True)


async def test_a_bundle_without_its_pair_and_a_version_taken_are_told_apart(
    session: aiohttp.ClientSession, hub: Hub, hub_bundle: Path, digits: Path, tmp_path: Path
) -> None:
    edge = packed(digits / "bundles" / "digits-1.0.0")
    status, code, said = await refused(session, "POST", "/releases", data=edge)
    assert (status, code) == (422, "pair/unknown")
    assert "push that bundle first" in said
    await hub.fleet.releases.accept(hub_bundle)
    other = shutil.copytree(hub_bundle, tmp_path / "other")
    root = json.loads((other / "bundle.json").read_text())
    root["max_batch"] = 7
    (other / "bundle.json").write_text(json.dumps(root))
    status, code, _ = await refused(session, "POST", "/releases", data=packed(other))
    assert (status, code) == (409, "bundle/version-taken")


async def test_a_deployment_states_what_is_wanted(
    session: aiohttp.ClientSession, hub: Hub, hub_bundle: Path
) -> None:
    await hub.fleet.releases.accept(hub_bundle)
    await report_as(hub, "b", "a")
    body: dict[str, Any] = {"release": "digits-hub@1.0.0", "devices": ["b"]}
    answer = await ask(session, "POST", "/deployments", json=body)
    assert answer.status == 202
    assert answer.document == {"release": "digits-hub@1", "devices": ["b"]}
    everywhere = await ask(session, "POST", "/deployments", json={"release": "digits-hub@1"})
    assert everywhere.document["devices"] == ["a", "b"]
    for one in (await ask(session, "GET", "/devices")).document:
        assert (one["desired"], one["generation"]) == ({"digits-hub": 1}, 1)
        assert (one["standing"], one["online"], one["models"]) == ("queued", False, [])
    shown = (await ask(session, "GET", "/devices/b")).document
    assert (shown["name"], shown["events"]) == ("b", [])
    status, code, said = await refused(session, "GET", "/devices/c")
    assert (status, code, said) == (404, "device/unknown", "no device 'c' has reported to this hub")


async def test_a_deployment_to_a_thousand_devices_is_read_whole(
    session: aiohttp.ClientSession, hub: Hub, hub_bundle: Path
) -> None:
    """A body this long comes in several pieces."""
    await hub.fleet.releases.accept(hub_bundle)
    names = [f"device-{'x' * 50}-{n:03}" for n in range(1000)]
    await report_as(hub, *names)
    body = {"release": "digits-hub@1", "devices": names}
    answer = await ask(session, "POST", "/deployments", json=body)
    assert (answer.status, answer.document["devices"]) == (202, names)


NO_DEPLOYMENTS: list[tuple[bytes, int, str]] = [
    (b"", 400, 'expected {"release"'),
    (b"{", 400, 'expected {"release"'),
    (b"\xff\xfe", 400, 'expected {"release"'),
    (b"[" * 100_000, 400, 'expected {"release"'),
    (b" " * (2 << 20), 413, "at most 1048576 bytes are taken"),
    (b"[]", 400, 'expected {"release"'),
    (b'{"release": 1}', 400, 'expected {"release"'),
    (b'{"release": "m@1", "device": ["a"]}', 400, 'expected {"release"'),
    (b'{"release": "digits-hub@1", "devices": []}', 400, "list of names, or null"),
    (b'{"release": "digits-hub@1", "devices": "a"}', 400, "list of names, or null"),
    (b'{"release": "digits-hub@1", "devices": [1]}', 400, "list of names, or null"),
    (b'{"release": "digits-hub@1", "devices": ["a", "z"]}', 404, "no device 'z'"),
    (b'{"release": "digits-hub@1", "devices": ["\\ud800"]}', 404, "no device"),
    (b'{"release": "digits-hub@2"}', 404, "there are: digits-hub@1"),
    (b'{"release": "@"}', 404, "there are: none"),
    (b'{"release": ""}', 404, "there are: none"),
    (b'{"release": "\\u0000\\ud800@1"}', 404, "there are: none"),
]


async def test_a_deployment_that_cannot_be_changes_nothing(
    session: aiohttp.ClientSession, hub: Hub, hub_bundle: Path
) -> None:
    await hub.fleet.releases.accept(hub_bundle)
    await report_as(hub, "a")
    for body, status, said in NO_DEPLOYMENTS:
        answer = await refused(session, "POST", "/deployments", data=io.BytesIO(body))
        assert answer[0] == status, body[:100]
        assert said in answer[2], body[:100]
    (twin,) = await hub.fleet.controller.twins()
    assert (twin.generation, twin.desired) == (0, {})


async def test_a_deployment_is_withdrawn(
    session: aiohttp.ClientSession, hub: Hub, hub_bundle: Path
) -> None:
    await hub.fleet.releases.accept(hub_bundle)
    await report_as(hub, "a", "b")
    await hub.fleet.controller.want(None, "digits-hub", 1)
    path = "/deployments/withdrawal"
    for body, status, told in (
        (b"{", 400, 'expected {"model"'),
        (b'{"model": 1}', 400, 'expected {"model"'),
        (b'{"model": "m", "release": "m@1"}', 400, 'expected {"model"'),
        (b'{"model": "digits-hub", "devices": []}', 400, "list of names, or null"),
        (b'{"model": "digits-hub", "devices": ["a", "z"]}', 404, "no device 'z'"),
    ):
        answer = await refused(session, "POST", path, data=io.BytesIO(body))
        assert (answer[0], told in answer[2]) == (status, True), body
    assert [one.desired for one in await hub.fleet.controller.twins()] == [{"digits-hub": 1}] * 2
    one = await ask(session, "POST", path, json={"model": "digits-hub", "devices": ["b"]})
    assert (one.status, one.document) == (202, {"model": "digits-hub", "devices": ["b"]})
    rest = await ask(session, "POST", path, json={"model": "digits-hub"})
    assert rest.document["devices"] == ["a"]
    nothing = await ask(session, "POST", path, json={"model": "\0"})
    assert (nothing.status, nothing.document["devices"]) == (202, [])


async def test_a_device_is_forgotten(session: aiohttp.ClientSession, hub: Hub) -> None:
    await report_as(hub, "a", "b")
    found = await ask(session, "DELETE", "/devices/a")
    assert (found.status, found.document) == (200, {"device": "a"})
    assert [one["name"] for one in (await ask(session, "GET", "/devices")).document] == ["b"]
    for name in ("a", "z", "%00", "A b", "x" * 99):
        status, code, _ = await refused(session, "DELETE", f"/devices/{name}")
        assert (status, code) == (404, "device/unknown")
    origin = {"Origin": "https://evil.example"}
    assert (await ask(session, "DELETE", "/devices/b", headers=origin)).status == 403


async def test_a_page_of_another_site_changes_nothing(session: aiohttp.ClientSession) -> None:
    body = b'{"release": "digits-hub@1"}'
    for path in ("/deployments", "/releases"):
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
            answer = await ask(session, "POST", path, data=body, headers={"Origin": origin})
            assert answer.status == 403
            assert origin in json.dumps(answer.document)


async def test_a_disk_without_room_is_named(
    session: aiohttp.ClientSession, hub: Hub, hub_bundle: Path
) -> None:
    """A file where the folder of uploads should be stands for a disk that takes nothing."""
    (hub.config.data / "uploads").write_bytes(b"")
    status, code, said = await refused(session, "POST", "/releases", data=packed(hub_bundle))
    assert (status, code) == (507, "hub/disk")
    assert "the hub's disk" in said


@pytest.fixture
async def edge(hub: Hub, hub_bundle: Path, digits: Path) -> Certificate:
    """A hub with digits@1 in the field, and a certificate of it for another hardware class."""
    await hub.fleet.releases.accept(hub_bundle)
    bundle = digits / "bundles" / "digits-1.0.0"
    await hub.fleet.releases.accept(bundle)
    await report_as(hub, "a", "b")
    await hub.fleet.controller.want(["a"], "digits", 1)
    (known, *_) = release.read(bundle).certificates
    return replace(known, hardware_class="aarch64/CPUExecutionProvider/onnxruntime-1.32")


async def test_a_certificate_is_issued_listed_and_withdrawn(
    session: aiohttp.ClientSession, hub: Hub, edge: Certificate
) -> None:
    async def generations() -> list[int]:
        return [one["generation"] for one in (await ask(session, "GET", "/devices")).document]

    known = (await ask(session, "GET", "/certificates")).document
    path = "/releases/digits/1.0.0/certificates"
    made = await ask(session, "POST", path, data=edge.to_json())
    assert (made.status, made.document["id"]) == (201, edge.id)
    assert made.document["release"] == "digits@1"
    assert (made.document["devices"], await generations()) == (["a"], [2, 0])
    again = await ask(session, "POST", path, data=edge.to_json())
    assert (again.status, again.document) == (201, {**made.document, "devices": []})
    del made.document["devices"]
    for query in ("", "?model=digits", "?model=digits&release=1", "?model=digits&release=1.0.0"):
        listed = (await ask(session, "GET", f"/certificates{query}")).document
        assert listed == [made.document, *known], query
    assert (await ask(session, "GET", "/certificates?model=digits-hub")).document == []
    gone = await ask(
        session, "POST", f"{path}/{edge.id}/withdrawal", json={"reason": " found drift\n"}
    )
    assert (gone.status, gone.document["withdrawn"]) == (202, True)
    assert (gone.document["reason"], gone.document["devices"]) == ("found drift", ["a"])
    assert await generations() == [3, 0]
    shown = (await ask(session, "GET", "/releases/digits/1")).document["certificates"]
    assert [(one["id"], one["withdrawn"]) for one in shown[:1]] == [(edge.id, True)]


async def test_what_is_no_certificate_of_a_release_is_refused_and_changes_nothing(
    session: aiohttp.ClientSession, hub: Hub, edge: Certificate
) -> None:
    good = edge.to_json()
    other = replace(edge, version="9.0.0").to_json()
    for path, body, wanted, said in (
        ("digits/1", b"", (422, "certificate/malformed"), "certificate"),
        ("digits/1", b"[]", (422, "certificate/malformed"), "expected a JSON object"),
        ("digits/1", b"{}", (422, "certificate/malformed"), "schema 0"),
        ("digits/1", b"\xff", (422, "certificate/malformed"), "certificate"),
        ("digits/1", b"[" * 100_000, (422, "certificate/malformed"), "certificate"),
        ("digits/1", good[:-2], (422, "certificate/malformed"), "certificate"),
        ("digits/1", b" " * (2 << 20), (413, ""), "at most 1048576 bytes"),
        ("digits/1", other, (422, "certificate/other"), "it speaks of digits 9.0.0"),
        ("digits-hub/1", good, (422, "certificate/other"), "the release is digits-hub 1.0.0"),
        ("digits/2", good, (404, "release/unknown"), "there are: digits@1"),
        ("x%00/1", good, (404, "release/unknown"), "there are: none"),
    ):
        sent = io.BytesIO(body)
        answer = await refused(session, "POST", f"/releases/{path}/certificates", data=sent)
        assert (*answer[:2], said in answer[2]) == (*wanted, True), (path, body[:40], answer)
    base = "/releases/digits/1/certificates"
    for id, body, status, said in (
        ("f" * 16, b'{"reason": "x"}', 404, "digits has no certificate"),
        ("%00", b'{"reason": "x"}', 404, "digits has no certificate"),
        (edge.id, b"", 400, 'expected {"reason": "TEXT"}'),
        (edge.id, b'{"reason": " "}', 400, 'expected {"reason": "TEXT"}'),
        (edge.id, b'{"reason": "\\u0001\\n"}', 400, 'expected {"reason": "TEXT"}'),
        (edge.id, b'{"reason": 1}', 400, 'expected {"reason": "TEXT"}'),
        (edge.id, b'{"reason": "x", "more": 1}', 400, 'expected {"reason": "TEXT"}'),
        (edge.id, json.dumps({"reason": "x" * 501}).encode(), 400, "of 1 to 500 characters"),
    ):
        answer = await refused(session, "POST", f"{base}/{id}/withdrawal", data=body)
        assert (answer[0], said in answer[2]) == (status, True), answer
    for query in ("?release=1", "?models=digits", "?model=digits&model=digits-hub"):
        status, _, said = await refused(session, "GET", f"/certificates{query}")
        assert (status, said) == (400, "expected at most ?model=MODEL&release=NUMBER")
    status, code, _ = await refused(session, "GET", "/certificates?model=digits&release=7")
    assert (status, code) == (404, "release/unknown")
    for one in (await ask(session, "GET", "/devices")).document:
        assert one["generation"] == (1 if one["name"] == "a" else 0)


async def test_a_page_of_another_site_issues_and_withdraws_nothing(
    session: aiohttp.ClientSession, edge: Certificate
) -> None:
    headers = {"Origin": "https://evil.example"}
    base = "/releases/digits/1/certificates"
    for path in (base, f"{base}/{edge.id}/withdrawal"):
        answer = await ask(session, "POST", path, data=edge.to_json(), headers=headers)
        assert answer.status == 403
    assert edge.id not in [
        one["id"] for one in (await ask(session, "GET", "/certificates")).document
    ]
