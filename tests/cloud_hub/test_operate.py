"""``fogline release``, ``certificate`` and ``device`` against a real hub in this process."""

import asyncio
import datetime
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from aiohttp import web
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cloud_hub import operate
from cloud_hub.cli import main
from cloud_hub.config import HubConfig
from cloud_hub.errors import ConfigRefused
from cloud_hub.fleet.link import Arrival
from cloud_hub.hub import Hub
from fogline_protocol import release
from fogline_protocol.release import Parent
from fogline_protocol.v1 import fleet_pb2 as pb
from tests.cloud_hub.console import workshop
from tests.protos.raw_peer import made_pair, server_side


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[Hub]:
    config = HubConfig(
        data=tmp_path / "hub", grpc="127.0.0.1:0", http="127.0.0.1:0", mqtt="off", threads=1
    )
    async with Hub(config) as hub:
        yield hub


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The hub logs where a command prints, because here they are one process."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


async def fogline(*words: object, **environment: str) -> Result:
    arguments = [str(word) for word in words]
    return await asyncio.to_thread(CliRunner().invoke, main, arguments, env=environment)


def said(result: Result, code: int) -> str:
    """Return what a command that ended with ``code`` said; it never shows a traceback."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


@pytest.fixture(scope="session")
def bundles(digits: Path) -> Path:
    return digits / "bundles"


async def tell(hub: Hub, *documents: Any) -> None:
    await hub.fleet.controller.commit([Arrival("default", one.device, one) for one in documents])


def birth(device: str) -> pb.DeviceState:
    return pb.DeviceState(schema=1, device=device, online=True, boot=1, connection=1)


async def test_releases_are_pushed_listed_and_shown(hub: Hub, bundles: Path) -> None:
    at = ("--data", hub.config.data)
    assert "make one with `fogline release push BUNDLE`" in said(
        await fogline("release", "list", *at), 0
    )
    line = said(await fogline("release", "push", bundles / "digits-hub-1.0.0", *at), 0)
    assert line.startswith("digits-hub@1 ")
    made = said(await fogline("release", "push", "--json", bundles / "digits-1.0.0", *at), 0)
    assert json.loads(made)["escalates_to"] == "digits-hub"
    listed = said(await fogline("release", "list", *at), 0).splitlines()
    assert [line.split()[:2] for line in listed] == [
        ["digits@1", "1.0.0"],
        ["digits-hub@1", "1.0.0"],
    ]
    assert "escalates to digits-hub" in listed[0]
    assert len(json.loads(said(await fogline("release", "list", "--json", *at), 0))) == 2
    for name in ("digits", "digits@1", "digits@1.0.0"):
        shown = json.loads(said(await fogline("release", "show", name, "--hub", hub.url), 0))
        assert shown["bundle"]["version"] == "1.0.0"
    unknown = said(await fogline("release", "show", "digits@7", *at), 6)
    assert "the hub refused [release/unknown]" in unknown
    assert "there are: digits@1" in unknown


async def test_parents_and_children_are_listed_and_what_was_left_out_is_said(
    hub: Hub, bundles: Path, tmp_path: Path
) -> None:
    at = ("--data", hub.config.data)
    first = await hub.fleet.releases.accept(bundles / "digits-hub-1.0.0")
    for version, parent in (("1.1.0", first.bundle_sha256), ("1.2.0", "ab" * 32)):
        path = workshop.bundle(
            tmp_path / version,
            bundles.parent,
            of="digits-hub-1.0.0",
            version=version,
            parent=Parent("1.0.0", parent),
            document="[]",
        )
        told = said(await fogline("release", "push", path, *at), 0).splitlines()
        assert told[1].strip() == (
            "note: report.json was left out: it is no JSON object (it is a list)"
        )
    listed = said(await fogline("release", "list", *at), 0).splitlines()
    assert listed[0].endswith("from 1.0.0 (unknown to this hub)")
    assert listed[1].endswith("from digits-hub@1")
    assert listed[2].endswith("parent of digits-hub@2")
    shown = json.loads(said(await fogline("release", "show", "digits-hub@1", *at), 0))
    assert (shown["parent"], shown["children"]) == (None, ["digits-hub@2"])


async def test_a_failing_self_test_is_forced_and_shown_as_such(hub: Hub, bundles: Path) -> None:
    at = ("--data", hub.config.data)
    broken = bundles / "broken" / "digits-1.2.0"
    await hub.fleet.releases.accept(bundles / "digits-hub-1.0.0")
    assert "[self-test/failed]" in said(await fogline("release", "push", broken, *at), 6)
    forced = said(await fogline("release", "push", "--force", broken, *at), 0)
    assert "FORCED past its self-test" in forced


async def test_devices_are_listed_shown_and_told_what_is_wanted(hub: Hub, bundles: Path) -> None:
    at = ("--data", hub.config.data)
    nobody = said(await fogline("device", "list", *at), 0)
    assert "start one with `fogline-agent run --hub HOST:PORT`" in nobody
    assert "no device has reported" not in said(await fogline("device", "list", "--json", *at), 0)
    await hub.fleet.releases.accept(bundles / "digits-hub-1.0.0")
    none = await fogline("device", "set", "--all", "--release", "digits-hub@1", *at)
    assert said(none, 0) == "digits-hub@1 is wanted on no device\n"
    await tell(hub, birth("a"), birth("b"))
    wanted = await fogline("device", "set", "b", "--release", "digits-hub@1", *at)
    assert said(wanted, 0) == "digits-hub@1 is wanted on b\n"
    everywhere = await fogline("device", "set", "--all", "--release", "digits-hub@1", "--json", *at)
    assert json.loads(said(everywhere, 0))["devices"] == ["a", "b"]
    model = pb.ReportedModel(
        model="digits-hub", desired_release=1, phase="rejected", code="self-test/deviation",
        sentence="Off by 3.",
    )  # fmt: skip
    await tell(hub, pb.Reported(schema=1, device="b", sequence=1, generation=1, models=[model]))
    listed = said(await fogline("device", "list", *at), 0).splitlines()
    assert [line.split() for line in listed[:2]] == [
        ["a", "offline", "queued", "generation", "1"],
        ["b", "offline", "failed", "generation", "1"],
    ]
    assert listed[2] == (
        "  digits-hub: runs its own (-), wanted 1, rejected [self-test/deviation] Off by 3."
    )
    serving = pb.Serving(
        variant="fp32", provider="CPU", meant_variant="int8", meant_provider="CPU",
        aside="int8 on CPU: no\x1b[2Jcertificate", certificate="0123456789abcdef",
    )  # fmt: skip
    model = pb.ReportedModel(
        model="digits-hub", active_release=1, active_version="1.0.0", phase="committed",
        serving=serving,
    )  # fmt: skip
    await tell(hub, pb.Reported(schema=1, device="a", sequence=1, models=[model]))
    listed = said(await fogline("device", "list", *at), 0).splitlines()
    assert listed[1] == (
        "  digits-hub: runs 1 (1.0.0), fp32 on CPU under 0123456789abcdef INSTEAD OF int8 on CPU "
        "(int8 on CPU: no [2Jcertificate), committed"
    )
    shown = json.loads(said(await fogline("device", "show", "a", *at), 0))
    assert shown["models"][0]["serving"]["meant_variant"] == "int8"
    shown = json.loads(said(await fogline("release", "show", "digits-hub@1", *at), 0))
    assert (shown["running_on"], shown["fallback_on"]) == (1, 1)
    assert shown["variants_on"] == {"fp32": 1, "int8-qdq": 0}
    shown = json.loads(said(await fogline("device", "show", "b", *at), 0))
    assert [event["phase"] for event in shown["events"]] == ["rejected"]
    unknown = said(await fogline("device", "show", "z", *at), 6)
    assert "the hub refused [device/unknown]: no device 'z'" in unknown
    unknown = await fogline("device", "set", "z", "--release", "digits-hub@1", *at)
    assert "no device 'z'" in said(unknown, 6)


async def test_certificates_are_issued_listed_and_withdrawn(
    hub: Hub, bundles: Path, tmp_path: Path
) -> None:
    at = ("--data", hub.config.data)
    none = said(await fogline("certificate", "list", *at), 0)
    assert "`fogline-models certify` makes one on a machine of the hardware class" in none
    await hub.fleet.releases.accept(bundles / "digits-hub-1.0.0")
    await hub.fleet.releases.accept(bundles / "digits-1.0.0")
    await tell(hub, birth("kiosk"))
    await hub.fleet.controller.want(["kiosk"], "digits", 1)
    (known, *_) = release.read(bundles / "digits-1.0.0").certificates
    made = [replace(known, hardware_class=name) for name in ("arm", "riscv")]
    files = [tmp_path / f"{one.hardware_class}.json" for one in made]
    for one, file in zip(made, files, strict=True):
        file.write_bytes(one.to_json())
    issued = said(await fogline("certificate", "issue", "digits@1", *files, *at), 0).splitlines()
    day = f"{known.expires_at:%Y-%m-%d}"
    assert [line.split() for line in issued] == [
        [made[0].id, "digits@1", known.variant, "until", day, "arm"], ["told:", "kiosk"],
        [made[1].id, "digits@1", known.variant, "until", day, "riscv"], ["told:", "kiosk"],
    ]  # fmt: skip
    withdraw = ("certificate", "withdraw", "digits@1", made[0].id, "--reason", "a drift")
    gone = said(await fogline(*withdraw, *at), 0).splitlines()
    assert gone[0].endswith("  arm  a drift")
    assert gone[1] == "  told: kiosk"
    again = json.loads(said(await fogline(*withdraw, "--json", *at), 0))
    assert (again["withdrawn"], again["devices"]) == (True, [])
    for name in ((), ("digits",), ("digits@1",)):
        listed = said(await fogline("certificate", "list", *name, *at), 0).splitlines()
        assert [line.split()[3] for line in listed[:2]] in (
            ["withdrawn", "until"], ["until", "withdrawn"],
        )  # fmt: skip
    shown = said(await fogline("certificate", "list", "digits@1", "--json", *at), 0)
    assert {one["reason"] for one in json.loads(shown)} == {"", "a drift"}


async def test_a_certificate_that_is_refused_is_named_with_its_file(
    hub: Hub, bundles: Path, tmp_path: Path
) -> None:
    at = ("--data", hub.config.data)
    await hub.fleet.releases.accept(bundles / "digits-hub-1.0.0")
    await hub.fleet.releases.accept(bundles / "digits-1.0.0")
    (known, *_) = release.read(bundles / "digits-1.0.0").certificates
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_bytes(replace(known, hardware_class="arm").to_json())
    bad.write_bytes(replace(known, version="3.0.0").to_json())
    told = said(await fogline("certificate", "issue", "digits@1", good, bad, *at), 6)
    assert f"{bad}: the hub refused [certificate/other]" in told
    assert "it speaks of digits 3.0.0, the release is digits 1.0.0 (1 before it are issued)" in told
    bad.write_bytes(b"no certificate")
    told = said(await fogline("certificate", "issue", "digits@1", bad, *at), 6)
    assert f"{bad}: the hub refused [certificate/malformed]" in told
    for name in ("digits", "@1", "digits@"):
        told = said(await fogline("certificate", "issue", name, good, *at), 6)
        assert f"{name!r} is no release: say MODEL@NUMBER" in told
    told = said(await fogline("certificate", "issue", "digits/x@1?y", good, *at), 6)
    assert "the hub refused [release/unknown]: there is no release 'digits/x@1?y'" in told
    gone = ("certificate", "withdraw", "digits@1", "f" * 16, "--reason", "x")
    assert "[certificate/unknown]" in said(await fogline(*gone, *at), 6)
    assert "Missing option '--reason'" in said(await fogline(*gone[:-2], *at), 2)


async def test_a_model_is_taken_off_devices(hub: Hub, bundles: Path) -> None:
    at = ("--data", hub.config.data)
    await hub.fleet.releases.accept(bundles / "digits-hub-1.0.0")
    await tell(hub, birth("a"), birth("b"), birth("c"))
    await hub.fleet.controller.want(None, "digits-hub", 1)
    taken = await fogline("device", "unset", "b", "--model", "digits-hub", *at)
    assert said(taken, 0) == "no release of digits-hub is wanted any more on b\n"
    shown = json.loads(said(await fogline("device", "show", "b", *at), 0))
    assert (shown["desired"], shown["generation"]) == ({}, 2)
    taken = await fogline("device", "unset", "--all", "--model", "digits-hub", "--json", *at)
    assert json.loads(said(taken, 0))["devices"] == ["a", "c"]
    taken = await fogline("device", "unset", "--all", "--model", "digits-hub", *at)
    assert "so nothing changes" in said(taken, 0)
    unknown = await fogline("device", "unset", "z", "--model", "digits-hub", *at)
    assert "no device 'z'" in said(unknown, 6)
    for devices in ((), ("a", "--all")):
        result = await fogline("device", "unset", *devices, "--model", "digits-hub", *at)
        assert "name devices, or say --all: one of the two" in said(result, 2)


async def test_devices_are_forgotten(hub: Hub) -> None:
    at = ("--data", hub.config.data)
    await tell(hub, birth("a"), birth("b"), birth("c"))
    count = pb.Telemetry(device="b", boot_id="1", sequence=1)
    await tell(hub, count)
    told = said(await fogline("device", "forget", "a", "b", *at), 6).splitlines()
    assert told[0] == "a is forgotten"
    assert "the hub refused [device/online]: b is online" in told[1]
    assert "stop its agent first" in told[1]
    await tell(hub, pb.DeviceState(schema=1, device="b", boot=1, connection=1))
    found = json.loads(said(await fogline("device", "forget", "b", "--json", *at), 0))
    assert found == [{"device": "b"}]
    listed = said(await fogline("device", "list", *at), 0)
    assert [line.split()[0] for line in listed.splitlines()] == ["c"]
    told = said(await fogline("device", "forget", "c", "z", *at), 6)
    assert told.splitlines()[0] == "c is forgotten"
    assert "no device 'z'" in told
    await tell(hub, birth("d"))
    told = said(await fogline("device", "forget", "d", "z", "--json", *at), 6)
    assert json.loads(told[: told.index("]") + 1]) == [{"device": "d"}]  # it is gone all the same
    for name in ("a?x", "a#x", "a/x"):
        told = said(await fogline("device", "show", name, *at), 6)
        assert f"no device {name!r}" in told
        assert "there is no release" in said(await fogline("release", "show", name, *at), 6)
    assert said(await fogline("device", "forget", "--json", *at), 2)
    await tell(hub, birth("a"))
    shown = json.loads(said(await fogline("device", "show", "a", *at), 0))
    assert (shown["generation"], shown["events"]) == (0, [])


def test_what_an_older_hub_tells_of_a_device_is_shown_all_the_same() -> None:
    model = {
        "model": "digits", "desired_release": "1", "active_release": "1", "active_version": "1.0.0",
        "phase": "committed", "code": "", "sentence": "", "bytes_done": "0", "bytes_total": "0",
    }  # fmt: skip
    assert operate.model_line(model) == "digits: runs 1 (1.0.0), committed"
    serving = {
        "variant": "int8", "provider": "CPU", "certificate": "", "aside": "",
        "meant_variant": "int8", "meant_provider": "CPU",
    }  # fmt: skip
    said = operate.model_line({**model, "serving": serving})
    assert said == "digits: runs 1 (1.0.0), int8 on CPU uncertified, committed"


@pytest.mark.parametrize("devices", [(), ("a", "--all")])
async def test_a_command_that_names_no_devices_or_too_many_says_so(devices: tuple[str]) -> None:
    result = await fogline("device", "set", *devices, "--release", "digits@1")
    assert "name devices, or say --all: one of the two" in said(result, 2)


async def test_what_is_no_bundle_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    result = await fogline("release", "push", tmp_path / "folder", "--hub", "http://127.0.0.1:1")
    assert "is no bundle: it has no bundle.json" in said(result, 6)
    (tmp_path / "folder" / "bundle.json").write_bytes(b"{}")
    (tmp_path / "folder" / ("x" * 200)).write_bytes(b"")
    result = await fogline("release", "push", tmp_path / "folder", "--hub", "http://127.0.0.1:1")
    assert "cannot be packed" in said(result, 6)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '"x"', "\xff"])
async def test_without_a_hub_the_ways_to_one_are_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "endpoints.json").write_text(content, encoding="latin-1")
    told = said(await fogline("device", "list", "--data", tmp_path), 7)
    assert f"start it with `fogline serve --data {tmp_path}`" in told
    assert "--hub URL" in told


async def test_a_certificate_that_is_none_is_said(tmp_path: Path) -> None:
    endpoints = {"url": "https://127.0.0.1:1", "certificate": "-----"}
    (tmp_path / "endpoints.json").write_text(json.dumps(endpoints))
    told = said(await fogline("device", "list", "--data", tmp_path), 7)
    assert "endpoints.json is damaged" in told
    assert "start the hub again" in told


async def test_a_hub_that_is_away_is_named(tmp_path: Path) -> None:
    told = said(await fogline("device", "list", "--hub", "http://127.0.0.1:1"), 7)
    assert "the hub at http://127.0.0.1:1 cannot be reached" in told


async def test_a_hub_with_tls_is_reached_where_the_command_is_told_how(tmp_path: Path) -> None:
    chain, key = made_pair(tmp_path)
    config = HubConfig(
        data=tmp_path / "hub", grpc="127.0.0.1:0", http="127.0.0.1:0", mqtt="off", threads=1,
        tls_cert=chain, tls_key=key,
    )  # fmt: skip
    async with Hub(config) as hub:
        asked = ("release", "list", "--hub")
        told = said(await fogline(*asked, f"http://{hub.http_address}"), 7)
        assert "a hub with --tls-cert is named with --hub https://NAME:PORT" in told
        told = said(await fogline(*asked, f"https://{hub.http_address}"), 7)
        assert "name its PEM file in SSL_CERT_FILE" in told


def signed_pair(folder: Path) -> tuple[Path, Path]:
    """A chain for another name than this machine's, by an authority that nobody knows, and its key."""
    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    hub, authority = (
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        for name in ("hub.example", "authority")
    )
    chain = b""
    for subject, key in ((hub, keys[0]), (authority, keys[1])):
        certificate = (
            x509.CertificateBuilder().subject_name(subject).issuer_name(authority)
            .public_key(key.public_key()).serial_number(x509.random_serial_number())
            .not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(subject is authority, None), critical=True)
            .sign(keys[1], hashes.SHA256())
        )  # fmt: skip
        chain += certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "chain.pem").write_bytes(b"# hub.example, then who signed it\n" + chain)
    (folder / "key.pem").write_bytes(
        keys[0].private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "chain.pem", folder / "key.pem"


@pytest.mark.parametrize(
    ("host", "pair"), [("0.0.0.0", made_pair), ("127.0.0.1", made_pair), ("0.0.0.0", signed_pair)]
)
async def test_a_hub_with_tls_is_operated_from_its_own_machine_by_its_data(
    tmp_path: Path, host: str, pair: Callable[[Path], tuple[Path, Path]]
) -> None:
    chain, key = pair(tmp_path)
    config = HubConfig(
        data=tmp_path / "hub", grpc="127.0.0.1:0", http=f"{host}:0", mqtt="off", threads=1,
        tls_cert=chain, tls_key=key,
    )  # fmt: skip
    at = ("--data", config.data)
    secret = said(await fogline("token", "create", *at), 0).strip()
    async with Hub(config) as hub:
        port = hub.http_address.rpartition(":")[2]
        assert str(operate.hub_url(None, config.data)) == f"https://127.0.0.1:{port}"
        listed = await fogline("device", "list", *at, FOGLINE_TOKEN=secret)
        assert "no device has reported" in said(listed, 0)
        if host == "0.0.0.0":  # whoever can be reached asks for tokens
            told = said(await fogline("device", "list", *at, FOGLINE_TOKEN=""), 6)
            assert told.rstrip().endswith("commands read theirs from FOGLINE_TOKEN")


async def test_a_token_is_not_shown_to_whoever_took_the_place_of_the_hub(tmp_path: Path) -> None:
    asked: list[web.Request] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request)
        return web.json_response([])

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(
            runner, "127.0.0.1", 0, ssl_context=server_side(made_pair(tmp_path))
        ).start()
        url = f"https://127.0.0.1:{runner.addresses[0][1]}"
        (tmp_path / "other").mkdir()
        endpoints = {"url": url, "certificate": made_pair(tmp_path / "other")[0].read_text()}
        (tmp_path / "endpoints.json").write_text(json.dumps(endpoints))
        told = await fogline("release", "list", "--data", tmp_path, FOGLINE_TOKEN="fgl_x")
    finally:
        await runner.cleanup()
    assert f"what answers at {url} does not show the certificate that its hub" in said(told, 7)
    assert not asked


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "hub", "ftp://x", "http://", "://"])
def test_a_hub_is_named_by_its_url(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigRefused, match="is not http://HOST:PORT"):
        operate.hub_url(url, tmp_path)


@pytest.mark.parametrize(
    ("status", "body", "code", "told"),
    [
        (200, b"<html>", 7, "is no fogline hub"),
        (200, b"\xff\xfe", 7, "is no fogline hub"),
        (404, b"404: Not Found", 7, "is no fogline hub"),
        (502, b"<html>bad gateway", 6, "the hub answered 502: <html>bad gateway"),
        (500, b"[1]", 6, "the hub answered 500: [1]"),
        (
            401,
            b'{"detail": "who?"}',
            6,
            "the hub refused: who?; commands read theirs from FOGLINE_TOKEN",
        ),
    ],
)
async def test_a_stranger_in_the_hubs_place_is_recognized(
    status: int, body: bytes, code: int, told: str
) -> None:
    asked: list[web.Request] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request)
        return web.Response(status=status, body=body)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        result = await fogline("release", "list", "--hub", url, FOGLINE_TOKEN="fgl_x\n")
    finally:
        await runner.cleanup()
    assert told in said(result, code)
    assert asked[0].headers["Authorization"] == "Bearer fgl_x"
    assert asked[0].path == "/api/v1/releases"
