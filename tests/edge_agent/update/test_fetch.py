"""A release from a real hub's repository and blobs to a device's folder, over HTTP."""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from cloud_hub.fleet.artifacts import Blobs, Disk, routes
from cloud_hub.fleet.trust import Repository
from edge_agent.errors import ReleaseRefused
from edge_agent.runtime.variants import Choice
from edge_agent.update.download import Downloader, HubFiles, Limits
from edge_agent.update.fetch import HubReleases
from edge_agent.update.lifecycle import StepEnded, StepInterrupted
from edge_agent.update.slots import Target, certificate_id
from edge_agent.update.trust import Trust
from fogline_protocol import documents, release, release_index
from fogline_protocol.release import ROOT, BundleDirectory
from fogline_protocol.release_index import ReleaseIndex


class QuickDisk(Disk):
    """A disk that nobody cuts the power of."""

    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        path.write_bytes(data)
        path.chmod(mode)

    def sync(self, directory: Path) -> None:
        pass


class Hub:
    """Publishes bundles as they are, without asking whether they are any good."""

    def __init__(self, data: Path, now: float) -> None:
        self.now = now
        self.repository = Repository(data, now=now, disk=QuickDisk())
        self.blobs = Blobs(data / "blobs", QuickDisk())
        self.url = ""

    def publish(
        self,
        bundle: Path,
        number: int,
        edit: Callable[[ReleaseIndex], ReleaseIndex] = lambda index: index,
    ) -> Target:
        read = release.read(bundle)
        wanted = {name: file.sha256 for name, file in read.bundle.files.items()}
        wanted[ROOT] = read.sha256
        files = {name: self.blobs.put(bundle / name, sha256) for name, sha256 in wanted.items()}
        model, version = read.bundle.model, read.bundle.version
        index = edit(ReleaseIndex(model, number, version, read.sha256, files))
        path = release_index.index_target(model, number)
        certificates = {
            release_index.certificate_target(model, number, c.id): c.to_json()
            for c in read.certificates
        }
        self.repository.publish({path: index.to_json(), **certificates}, now=self.now)
        return Target(model, number, version, path, tuple(certificates))


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[Hub]:

    hub = Hub(tmp_path / "hub", time.time())
    application = web.Application()
    application.add_routes(routes(hub.blobs, hub.repository.directory))
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    hub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield hub
    await runner.cleanup()


def choose_int8(directory: BundleDirectory) -> Choice:
    return Choice(directory.bundle.variant("int8-qdq"), "CPUExecutionProvider", None, "small")


@pytest.fixture
async def releases(hub: Hub, tmp_path: Path) -> AsyncIterator[HubReleases]:
    files = HubFiles(hub.url)
    trust = Trust(tmp_path / "trust", files)
    downloader = Downloader(files, limits=Limits(spare_bytes=0))
    near = tmp_path / "files"
    near.mkdir()
    yield HubReleases(trust, downloader, choose_int8, [near])
    await asyncio.to_thread(trust.close)
    downloader.close()
    files.close()


@pytest.fixture
def into(tmp_path: Path) -> Path:
    folder = tmp_path / "slot.part"
    folder.mkdir()
    return folder


def below(folder: Path) -> list[str]:
    """Return everything in ``folder`` that is not a folder."""
    paths = (path for path in folder.rglob("*") if not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def nothing(done: int, total: int) -> None:
    pass


async def test_a_device_gets_its_variant_with_certificates_and_nothing_else(
    hub: Hub, releases: HubReleases, into: Path, digits: Path
) -> None:
    target = hub.publish(digits / "bundles" / "digits-1.0.0", 1)
    (into / "stray").write_bytes(b"x")
    (into / "old").mkdir()
    (into / "old" / "stray").write_bytes(b"x")
    (into / "link").symlink_to(digits)
    seen: list[tuple[int, int]] = []
    await releases.fetch(target, into, lambda done, total: seen.append((done, total)))
    found = below(into)
    ids = [path.rpartition("/")[2] for path in target.certificate_targets]
    assert found == sorted(
        ["README.md", "bundle.json", "selftest.npz", "sources.json", "variants/int8-qdq.onnx"]
        + [f"certificates/{name}" for name in ids]
    )
    read = release.read(into, variants={"int8-qdq"})
    assert [c.id for c in read.certificates] == sorted(name.removesuffix(".json") for name in ids)
    await asyncio.sleep(0)
    assert seen[-1][0] == seen[-1][1] > 0
    assert (digits / "bundles").is_dir()


async def test_files_of_another_release_are_copied(
    hub: Hub, releases: HubReleases, into: Path, digits: Path, tmp_path: Path
) -> None:
    source = digits / "bundles" / "digits-1.0.0"
    target = hub.publish(source, 1)
    for name in ("selftest.npz", "variants/int8-qdq.onnx"):
        shutil.copy(source / name, tmp_path / "files" / documents.sha256_of_file(source / name))
    await releases.fetch(target, into, nothing)
    told = ("README.md", "sources.json")
    assert releases.last.received == sum((into / name).stat().st_size for name in told)
    release.read(into, variants={"int8-qdq"})


async def refused(releases: HubReleases, target: Target, into: Path) -> StepEnded:
    with pytest.raises(StepEnded) as caught:
        await releases.fetch(target, into, nothing)
    return caught.value


async def test_a_release_that_is_not_the_one_wanted_is_refused(
    hub: Hub, releases: HubReleases, into: Path, digits: Path
) -> None:
    target = hub.publish(digits / "bundles" / "digits-1.0.0", 1)
    error = await refused(releases, replace(target, version="9.9.9"), into)
    assert error.code == "index/mismatch"
    assert "the hub wants digits 9.9.9" in error.sentence


async def test_an_index_that_names_other_files_than_the_bundle_is_refused(
    hub: Hub, releases: HubReleases, into: Path, digits: Path
) -> None:
    def swap(index: ReleaseIndex) -> ReleaseIndex:
        files = {**index.files, "selftest.npz": index.files["README.md"]}
        return replace(index, files=files)

    target = hub.publish(digits / "bundles" / "digits-1.0.0", 1, swap)
    error = await refused(releases, target, into)
    assert error.code == "index/bundle"
    assert "selftest.npz" in error.sentence


async def test_a_device_that_runs_no_variant_says_so_before_it_fetches_any(
    hub: Hub, releases: HubReleases, into: Path, digits: Path, tmp_path: Path
) -> None:
    def none(directory: BundleDirectory) -> Choice:
        raise ReleaseRefused("no variant for this device")

    target = hub.publish(digits / "bundles" / "digits-1.0.0", 1)
    files = HubFiles(hub.url)
    trust, downloader = Trust(tmp_path / "t", files), Downloader(files)
    error = await refused(HubReleases(trust, downloader, none), target, into)
    assert error.code == "download/no-variant"
    assert below(into) == [ROOT]
    trust.close()
    downloader.close()
    files.close()


async def test_a_withdrawn_certificate_stops_the_fetch(
    hub: Hub, releases: HubReleases, into: Path, digits: Path
) -> None:
    target = hub.publish(digits / "bundles" / "digits-1.0.0", 1)
    hub.repository.publish({}, target.certificate_targets[:1], now=hub.now)
    assert (await refused(releases, target, into)).code == "metadata/unknown-target"


async def test_certificates_are_fetched_by_themselves_by_their_ids(
    hub: Hub, releases: HubReleases, digits: Path
) -> None:
    bundle = digits / "bundles" / "digits-1.0.0"
    target = hub.publish(bundle, 1)
    known = {c.id: c.to_json() for c in release.read(bundle).certificates}
    assert await releases.certificates(target.certificate_targets) == known
    assert await releases.certificates([]) == {}
    assert await releases.withdrawn(target.certificate_targets) == frozenset()
    gone = target.certificate_targets[:1]
    hub.repository.publish({}, gone, now=hub.now)
    with pytest.raises(StepInterrupted, match="metadata/unknown-target"):
        await releases.certificates(target.certificate_targets)
    assert await releases.withdrawn(target.certificate_targets) == {certificate_id(gone[0])}


async def test_a_hub_that_is_not_believed_has_withdrawn_nothing(
    hub: Hub, releases: HubReleases, digits: Path, tmp_path: Path
) -> None:
    target = hub.publish(digits / "bundles" / "digits-1.0.0", 1)
    await releases.withdrawn(target.certificate_targets)
    timestamp = tmp_path / "hub" / "tuf" / "metadata" / "timestamp.json"
    good = timestamp.read_bytes()
    hub.repository.publish({}, target.certificate_targets, now=hub.now)
    for bad in (b"{}", good.replace(b"timestamp", b"Timestamp"), b""):
        timestamp.write_bytes(bad)
        with pytest.raises(StepInterrupted):
            await releases.withdrawn(target.certificate_targets)
