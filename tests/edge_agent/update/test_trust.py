"""Every attack of fleet-updates.md 5.2, and the three gaps of 5.3, against a real repository."""

import datetime
import http.server
import itertools
import json
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.metadata import (  # type: ignore[attr-defined]
    Metadata,
    MetaFile,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from cloud_hub.fleet.artifacts import Disk
from cloud_hub.fleet.trust import Repository, role_of
from edge_agent.update.download import HubFiles
from edge_agent.update.lifecycle import StepEnded
from edge_agent.update.marks import Mark, Marks, MetadataRefused
from edge_agent.update.trust import DocumentRefused, HubAway, Trust
from fogline_protocol import documents
from fogline_protocol.release_index import IndexedFile, ReleaseIndex
from tests.certificates import certificate

DAY_S = 86_400.0
YEAR_S = 365 * DAY_S
NOW = datetime.datetime.now(datetime.UTC).timestamp()  # ngclient reads the real clock
TARGET = "digits/1/index.json"


def index(version: str = "1.0.0", *, model: str = "digits", number: int = 1) -> bytes:
    sha256 = documents.sha256(version.encode())
    files = {"bundle.json": IndexedFile(sha256, len(version), (sha256,))}
    return ReleaseIndex(model, number, version, sha256, files).to_json()


CERTIFICATE = f"certificates/digits/1/{documents.sha256(certificate().to_json())[:16]}.json"


class QuickDisk(Disk):
    """A disk for hubs that nobody cuts the power of."""

    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        path.write_bytes(data)
        path.chmod(mode)

    def sync(self, directory: Path) -> None:
        pass


class Hub:
    """A hub with its keys, the server in front of it, and whoever sits in between."""

    def __init__(self, data: Path, now: float) -> None:
        self.data = data
        self.repository = Repository(data, now=now, disk=QuickDisk())
        self.served = data / "tuf"  # a thief of old copies points it elsewhere
        self.instead: dict[str, bytes] = {}  # by path below /tuf
        self.endless: set[str] = set()
        self.requests: list[str] = []
        hub = self

        class Door(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body are two small writes

            def do_GET(self) -> None:
                path = self.path.removeprefix("/tuf/")
                hub.requests.append(path)
                file = hub.served / path
                if path in hub.endless:
                    self.send_response(200)
                    self.send_header("Connection", "close")
                    self.end_headers()
                    try:
                        while True:
                            self.wfile.write(b" " * 65536)
                    except OSError:
                        self.close_connection = True
                        return
                if path in hub.instead:
                    data = hub.instead[path]
                elif file.is_file():
                    data = file.read_bytes()
                else:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        if not self.thread.is_alive():
            return
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def snapshot(self, name: str) -> Path:
        """Keep a copy of everything served now, for a replay."""
        copy = self.data.parent / name
        shutil.copytree(self.data / "tuf", copy)
        return copy

    def metadata(self, name: str) -> bytes:
        return (self.data / "tuf" / "metadata" / name).read_bytes()

    def key(self, owner: str) -> CryptoSigner:
        key: Any = load_pem_private_key((self.data / "keys" / f"{owner}.pem").read_bytes(), None)
        return CryptoSigner(key)

    def forge_timestamp(
        self, key: CryptoSigner, edit: Callable[[Timestamp], None], snapshot: bytes | None = None
    ) -> None:
        """Put a timestamp of our own making in front of the hub's."""
        forged = Metadata[Timestamp].from_bytes(self.metadata("timestamp.json"))
        if snapshot is not None:
            version = Metadata[Snapshot].from_bytes(snapshot).signed.version
            forged.signed.snapshot_meta = MetaFile.from_data(version, snapshot, ["sha256"])
            self.instead[f"metadata/{version}.snapshot.json"] = snapshot
        edit(forged.signed)
        forged.sign(key)
        self.instead["metadata/timestamp.json"] = forged.to_bytes()

    def current_snapshot(self) -> Metadata[Snapshot]:
        timestamp = Metadata[Timestamp].from_bytes(self.metadata("timestamp.json")).signed
        version = timestamp.snapshot_meta.version
        return Metadata[Snapshot].from_bytes(self.metadata(f"{version}.snapshot.json"))


@pytest.fixture
def make_hub(tmp_path: Path) -> Iterator[Callable[[float], Hub]]:
    hubs: list[Hub] = []

    def make(now: float) -> Hub:
        hub = Hub(tmp_path / f"hub-{len(hubs)}", now)
        hubs.append(hub)
        hub.repository.publish({TARGET: index(), CERTIFICATE: certificate().to_json()}, now=now)
        return hub

    yield make
    for hub in hubs:
        hub.close()


@pytest.fixture
def hub(make_hub: Callable[[float], Hub]) -> Hub:
    return make_hub(NOW)


class Device:
    """One device's folder; ``trust`` starts the agent again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[tuple[Trust, HubFiles]] = []

    def trust(self, hub: Hub, **options: Any) -> Trust:
        files = HubFiles(hub.url)
        trust = Trust(self.folder, files, **options)
        self.running.append((trust, files))
        return trust

    @property
    def marks(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "marks.json").read_bytes())
        return found

    def zero_metadata(self) -> None:
        """Do what a power cut may: the names are there, the content is not."""
        for path in (self.folder / "metadata").rglob("*.json"):
            if not path.is_symlink():
                path.write_bytes(b"")


@pytest.fixture
async def device(tmp_path: Path) -> AsyncIterator[Device]:
    device = Device(tmp_path / "device")
    yield device
    for trust, files in device.running:
        trust.close()
        files.close()


async def refused(trust: Trust, target: str = TARGET) -> StepEnded:
    with pytest.raises(StepEnded) as caught:
        await (trust.certificate(target) if target != TARGET else trust.index(target))
    assert caught.value.sentence
    return caught.value


async def test_an_index_comes_as_it_was_signed(hub: Hub, device: Device) -> None:
    found = await device.trust(hub).index(TARGET)
    assert found.to_json() == index()
    assert (await device.trust(hub).certificate(CERTIFICATE)).to_json() == certificate().to_json()


async def test_a_new_release_arrives_and_nothing_new_costs_two_requests(
    hub: Hub, device: Device
) -> None:
    trust = device.trust(hub)
    await trust.index(TARGET)
    hub.repository.publish({"digits/2/index.json": index("2.0.0", number=2)}, now=NOW)
    assert (await trust.index("digits/2/index.json")).version == "2.0.0"
    hub.requests.clear()
    await trust.refresh()
    assert hub.requests == ["metadata/2.root.json", "metadata/timestamp.json"]


async def test_a_target_that_nobody_signed_is_refused(hub: Hub, device: Device) -> None:
    trust = device.trust(hub)
    with pytest.raises(MetadataRefused) as caught:
        await trust.index("digits/7/index.json")
    assert caught.value.code == "metadata/unknown-target"
    hub.repository.publish({}, [CERTIFICATE], now=NOW)
    assert (await refused(trust, CERTIFICATE)).code == "metadata/unknown-target"


@pytest.mark.parametrize(
    "path",
    ["../../etc/passwd", "digits/1/other.json", "Digits/1/index.json", "digits/0/index.json"],
)
async def test_a_path_that_no_index_has_is_refused_before_anything_is_asked(
    hub: Hub, device: Device, path: str
) -> None:
    with pytest.raises(DocumentRefused, match="is not the target of an index"):
        await device.trust(hub).index(path)
    assert hub.requests == []


async def test_unsigned_metadata_is_refused(hub: Hub, device: Device) -> None:
    trust = device.trust(hub)
    await trust.index(TARGET)
    forged = json.loads(hub.metadata("timestamp.json"))
    forged["signatures"] = []
    forged["signed"]["version"] += 1
    hub.instead["metadata/timestamp.json"] = json.dumps(forged).encode()
    assert (await refused(trust)).code == "metadata/unsigned"
    hub.instead.clear()
    assert (await trust.index(TARGET)).release == 1


async def test_metadata_signed_by_an_unknown_key_is_refused(hub: Hub, device: Device) -> None:
    def raise_version(timestamp: Timestamp) -> None:
        timestamp.version += 1

    hub.forge_timestamp(CryptoSigner.generate_ed25519(), raise_version)
    assert (await refused(device.trust(hub))).code == "metadata/unsigned"


async def test_expired_metadata_is_refused_and_the_next_good_one_is_taken(
    make_hub: Callable[[float], Hub], device: Device
) -> None:
    hub = make_hub(NOW - 2 * DAY_S)  # its timestamp lives for one
    trust = device.trust(hub)
    error = await refused(trust)
    assert error.code == "metadata/expired"
    assert "what serves goes on serving" in error.sentence
    hub.repository.refresh(NOW)
    assert (await trust.index(TARGET)).release == 1


async def test_a_clock_that_is_ahead_blocks_new_releases_only_until_it_is_right(
    make_hub: Callable[[float], Hub], device: Device
) -> None:
    """The hub lives 30 days in this device's past: so the device's clock is 30 days ahead."""
    hub = make_hub(NOW - 30 * DAY_S)
    trust = device.trust(hub)
    assert (await refused(trust)).code == "metadata/expired"
    hub.repository.refresh(NOW)
    await trust.refresh()
    assert await trust.clock_problem() is None


async def test_an_old_timestamp_is_refused(hub: Hub, device: Device) -> None:
    old = hub.snapshot("old")
    hub.repository.publish({TARGET: index("1.0.1")}, now=NOW)
    trust = device.trust(hub)
    await trust.index(TARGET)
    hub.served = old
    assert (await refused(trust)).code == "metadata/rollback"
    hub.served = hub.data / "tuf"
    assert (await trust.index(TARGET)).version == "1.0.1"


async def test_an_old_timestamp_is_refused_after_the_local_files_were_zeroed(
    hub: Hub, device: Device
) -> None:
    old = hub.snapshot("old")
    hub.repository.publish({TARGET: index("1.0.1")}, now=NOW)
    await device.trust(hub).index(TARGET)
    device.zero_metadata()
    hub.served = old
    for _ in range(2):  # what the first refusal left behind must not help the second
        error = await refused(device.trust(hub))
        assert error.code == "metadata/rollback"
    hub.served = hub.data / "tuf"
    assert (await device.trust(hub).index(TARGET)).version == "1.0.1"


async def test_truncated_local_metadata_is_fetched_again(hub: Hub, device: Device) -> None:
    await device.trust(hub).index(TARGET)
    for path in (device.folder / "metadata").glob("*.json"):
        if not path.is_symlink():
            path.write_bytes(path.read_bytes()[:50])
    assert (await device.trust(hub).index(TARGET)).release == 1
    device.zero_metadata()
    assert (await device.trust(hub).index(TARGET)).release == 1


async def test_truncated_metadata_from_the_hub_is_refused(hub: Hub, device: Device) -> None:
    hub.instead["metadata/timestamp.json"] = hub.metadata("timestamp.json")[:60]
    assert (await refused(device.trust(hub))).code == "metadata/malformed"


@pytest.mark.parametrize("zeroed", [False, True])
async def test_thieves_of_the_online_keys_cannot_bring_an_old_release_back(
    hub: Hub, device: Device, zeroed: bool
) -> None:
    old = hub.current_snapshot().signed.meta[f"{role_of(TARGET)}.json"]
    hub.repository.publish({TARGET: index("1.0.1")}, now=NOW)
    await device.trust(hub).index(TARGET)
    if zeroed:
        device.zero_metadata()
    snapshot = hub.current_snapshot()
    snapshot.signed.version += 1
    snapshot.signed.meta[f"{role_of(TARGET)}.json"] = old
    snapshot.sign(hub.key("snapshot"))

    def raise_version(timestamp: Timestamp) -> None:
        timestamp.version += 1

    hub.forge_timestamp(hub.key("timestamp"), raise_version, snapshot.to_bytes())
    assert (await refused(device.trust(hub))).code == "metadata/rollback"


async def test_metadata_of_two_moments_do_not_mix(hub: Hub, device: Device) -> None:
    role = role_of(TARGET)
    before = hub.current_snapshot().signed.meta[f"{role}.json"].version
    old = hub.metadata(f"{before}.{role}.json")
    hub.repository.publish({TARGET: index("1.0.1")}, now=NOW)
    hub.instead[f"metadata/{before + 1}.{role}.json"] = old
    assert (await refused(device.trust(hub))).code == "metadata/mismatch"


async def test_endless_metadata_ends_at_its_limit(hub: Hub, device: Device) -> None:
    hub.endless.add("metadata/timestamp.json")
    assert (await refused(device.trust(hub))).code == "metadata/too-large"


async def test_an_endless_target_ends_at_its_signed_length(hub: Hub, device: Device) -> None:
    path = f"targets/digits/1/{documents.sha256(index())}.index.json"
    hub.endless.add(path)
    assert (await refused(device.trust(hub))).code == "metadata/too-large"


async def test_a_target_swapped_for_one_of_the_same_length_is_refused(
    hub: Hub, device: Device
) -> None:
    path = f"targets/digits/1/{documents.sha256(index())}.index.json"
    hub.instead[path] = index("1.0.7")
    assert len(index("1.0.7")) == len(index())
    assert (await refused(device.trust(hub))).code == "index/mismatch"


async def test_a_revoked_key_signs_nothing_any_more(hub: Hub, device: Device) -> None:
    trust = device.trust(hub)
    await trust.index(TARGET)
    stolen = {owner: hub.key(owner) for owner in ("timestamp", "releases")}
    hub.repository.rotate("timestamp", now=NOW)
    await trust.refresh()

    def raise_version(timestamp: Timestamp) -> None:
        timestamp.version += 5

    hub.forge_timestamp(stolen["timestamp"], raise_version)
    assert (await refused(trust)).code == "metadata/unsigned"
    hub.instead.clear()
    hub.repository.publish({TARGET: index("1.0.1")}, now=NOW)
    assert (await trust.index(TARGET)).version == "1.0.1"


async def test_thieves_of_the_release_key_cannot_issue_a_certificate(
    hub: Hub, device: Device
) -> None:
    """They sign a bin that lists one; nobody looks for certificates there."""
    path = "certificates/digits/1/00000000000000ff.json"
    name = next(
        role
        for role, role_prefix in ((f"releases-{d}", d) for d in "0123456789abcdef")
        if documents.sha256(path.encode())[0] == role_prefix
    )
    snapshot = hub.current_snapshot()
    version = snapshot.signed.meta[f"{name}.json"].version
    forged = Metadata[Targets].from_bytes(hub.metadata(f"{version}.{name}.json"))
    forged.signed.version += 1
    forged.signed.targets[path] = TargetFile.from_data(path, certificate().to_json())
    forged.sign(hub.key("releases"))
    data = forged.to_bytes()
    hub.instead[f"metadata/{version + 1}.{name}.json"] = data
    snapshot.signed.version += 1
    snapshot.signed.meta[f"{name}.json"] = MetaFile.from_data(version + 1, data, ["sha256"])
    snapshot.sign(hub.key("snapshot"))

    def raise_version(timestamp: Timestamp) -> None:
        timestamp.version += 1

    hub.forge_timestamp(hub.key("timestamp"), raise_version, snapshot.to_bytes())
    assert (await refused(device.trust(hub), path)).code == "metadata/unknown-target"


async def test_a_clock_20_years_behind_takes_what_is_fresh_and_no_frozen_timestamp(
    make_hub: Callable[[float], Hub], device: Device
) -> None:
    """The hub lives 20 years in this device's future: so the device's clock is 20 years behind."""
    future = NOW + 20 * YEAR_S
    hub = make_hub(future)
    trust = device.trust(hub)
    assert (await trust.index(TARGET)).release == 1
    assert "has passed" in (await trust.clock_problem() or "")
    frozen = hub.snapshot("frozen")
    hub.repository.refresh(future + 2 * DAY_S)
    await trust.refresh()
    hub.served = frozen
    device.zero_metadata()
    assert (await refused(device.trust(hub))).code == "metadata/expired"


async def test_a_frozen_timestamp_is_noticed_when_somebody_trusted_tells_the_time(
    make_hub: Callable[[float], Hub], device: Device
) -> None:
    future = NOW + 20 * YEAR_S
    hub = make_hub(future)
    trust = device.trust(hub)
    await trust.index(TARGET)
    await trust.observe_time(future + 2 * DAY_S)
    assert (await refused(trust)).code == "metadata/expired"
    hub.repository.refresh(future + 2 * DAY_S)
    assert (await trust.index(TARGET)).release == 1
    assert (await device.trust(hub).index(TARGET)).release == 1  # the floor is durable


async def test_no_clock_is_before_the_making_of_this_software(hub: Hub, device: Device) -> None:
    trust = device.trust(hub, build_time=NOW + 2 * DAY_S)
    assert (await refused(trust)).code == "metadata/expired"
    assert await trust.clock_problem() is not None


async def test_a_fleet_recovers_after_thieves_wound_the_versions_and_the_time_forward(
    hub: Hub, device: Device
) -> None:
    def wind_forward(timestamp: Timestamp) -> None:
        timestamp.version = 2**31 - 1
        timestamp.expires = datetime.datetime(9000, 1, 1, tzinfo=datetime.UTC)
        timestamp.unrecognized_fields["issued"] = "8999-01-01T00:00:00Z"

    trust = device.trust(hub)
    await trust.index(TARGET)
    snapshot = hub.current_snapshot()
    snapshot.signed.version = 2**31 - 2
    snapshot.signed.expires = datetime.datetime(9001, 1, 1, tzinfo=datetime.UTC)
    for meta in snapshot.signed.meta.values():
        meta.version += 1000
    snapshot.sign(hub.key("snapshot"))
    hub.forge_timestamp(hub.key("timestamp"), wind_forward, snapshot.to_bytes())
    with pytest.raises(StepEnded):
        await trust.refresh()
    hub.instead.clear()
    assert (await refused(trust)).code == "metadata/rollback"
    hub.repository.rotate("timestamp", now=NOW)
    hub.repository.rotate("snapshot", now=NOW)
    assert (await trust.index(TARGET)).release == 1
    hub.repository.publish({TARGET: index("1.0.1")}, now=NOW)
    assert (await trust.index(TARGET)).version == "1.0.1"


async def test_marks_wound_forward_are_forgotten_with_the_key_they_came_from(
    hub: Hub, device: Device
) -> None:
    trust = device.trust(hub)
    await trust.index(TARGET)

    def wind_forward(timestamp: Timestamp) -> None:
        timestamp.version = 2**31 - 1

    hub.forge_timestamp(hub.key("timestamp"), wind_forward)
    await trust.refresh()
    hub.instead.clear()
    assert device.marks["roles"]["timestamp"]["version"] == 2**31 - 1
    device.zero_metadata()
    assert (await refused(trust)).code == "metadata/rollback"
    hub.repository.rotate("timestamp", now=NOW)
    assert (await trust.index(TARGET)).release == 1
    assert device.marks["roles"]["timestamp"]["version"] < 10


async def test_an_old_root_is_refused_after_the_local_files_were_zeroed(
    hub: Hub, device: Device
) -> None:
    old = hub.snapshot("old")
    hub.repository.rotate("root", now=NOW)
    hub.repository.rotate("timestamp", now=NOW)
    await device.trust(hub).index(TARGET)
    assert device.marks["roles"]["root"]["version"] == 3
    device.zero_metadata()
    hub.served = old
    assert (await refused(device.trust(hub))).code == "metadata/rollback"


@pytest.mark.parametrize(
    "owner", ["root", "targets", "snapshot", "timestamp", "releases", "certificates"]
)
async def test_a_device_follows_every_rotation(hub: Hub, device: Device, owner: str) -> None:
    trust = device.trust(hub)
    await trust.index(TARGET)
    await trust.certificate(CERTIFICATE)
    hub.repository.rotate(owner, now=NOW)
    hub.repository.publish({TARGET: index("1.0.1")}, now=NOW)
    assert (await trust.index(TARGET)).version == "1.0.1"
    assert (await trust.certificate(CERTIFICATE)).model == "digits"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (index("2.0.0", number=2), "index/mismatch"),
        (index(model="letters"), "index/mismatch"),
        (b"{}", "index/malformed"),
        (index().replace(b"bundle.json", b"../../x.json"), "index/malformed"),
        (b"not json", "index/malformed"),
    ],
)
async def test_a_signed_index_that_lies_is_refused(
    hub: Hub, device: Device, content: bytes, code: str
) -> None:
    hub.repository.publish({TARGET: content}, now=NOW)
    with pytest.raises(DocumentRefused) as caught:
        await device.trust(hub).index(TARGET)
    assert caught.value.code == code


async def test_a_signed_certificate_under_another_name_is_refused(hub: Hub, device: Device) -> None:
    path = "certificates/digits/1/00000000000000ff.json"
    hub.repository.publish({path: certificate().to_json()}, now=NOW)
    with pytest.raises(DocumentRefused) as caught:
        await device.trust(hub).certificate(path)
    assert caught.value.code == "certificate/mismatch"


async def test_a_hub_elsewhere_is_not_believed_at_first_sight(tmp_path: Path) -> None:
    trust = Trust(tmp_path / "device", HubFiles("https://192.0.2.1:8000"))
    assert (await refused(trust)).code == "metadata/no-root"
    trust.close()


async def test_the_root_of_the_enrollment_decides_whom_a_device_believes(
    make_hub: Callable[[float], Hub], device: Device, tmp_path: Path
) -> None:
    mine, other = make_hub(NOW), make_hub(NOW)
    given = tmp_path / "root.json"
    given.write_bytes(mine.repository.anchor())
    assert (await refused(device.trust(other, root=given))).code == "metadata/unsigned"
    given.unlink()  # the copy counts from now on
    assert (await device.trust(mine, root=given).index(TARGET)).release == 1


async def test_a_hub_that_is_away_is_no_fault_of_a_release(hub: Hub, device: Device) -> None:
    trust = device.trust(hub)
    hub.close()
    with pytest.raises(HubAway) as caught:
        await trust.refresh()
    assert caught.value.code == "hub/unreachable"


async def test_a_hub_that_refuses_says_with_what(hub: Hub, device: Device) -> None:
    trust = device.trust(hub)
    await trust.refresh()
    hub.served = hub.data / "nowhere"
    with pytest.raises(HubAway, match="HTTP 404") as caught:
        await trust.refresh()
    assert caught.value.code == "hub/refused"


async def test_damaged_marks_do_not_end_updates(hub: Hub, device: Device) -> None:
    await device.trust(hub).index(TARGET)
    (device.folder / "marks.json").write_bytes(b"\0" * 100)
    assert (await device.trust(hub).index(TARGET)).release == 1
    assert device.marks["roles"]["timestamp"]["version"] > 0


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from(["a", "b"])), max_size=20))
def test_versions_never_fall_under_the_same_keys(steps: list[tuple[int, str]]) -> None:
    marks = Marks()
    accepted: list[tuple[int, str]] = []
    for version, key in steps:
        try:
            marks = marks.under("snapshot", [key]).raised("snapshot", version, [key])
            accepted.append((version, key))
        except MetadataRefused:
            assert accepted[-1][1] == key
    for (version, key), (later, later_key) in itertools.pairwise(accepted):
        assert key != later_key or later >= version


def test_marks_are_forgotten_per_role() -> None:
    marks = Marks(
        {role: Mark(7, ("k",)) for role in ("root", "timestamp", "snapshot", "targets")},
        {"targets.json": 7},
        floor=5.0,
    )
    assert marks.under("timestamp", ["k"]) == marks
    assert marks.under("root", ["new"]) == marks
    timestamp = marks.under("timestamp", ["new"])
    assert (timestamp.floor, set(timestamp.roles)) == (0.0, {"root", "snapshot", "targets"})
    snapshot = marks.under("snapshot", ["new"])
    assert (snapshot.listed, snapshot.floor) == ({}, 5.0)
    with pytest.raises(MetadataRefused, match=r"targets\.json"):
        marks.with_listed({})
