import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestClient, TestServer
from yarl import URL

from cloud_hub.fleet.artifacts import BlobRefused, Blobs, Disk, replace_file, routes

Client = TestClient[web.Request, web.Application]
DATA = bytes(range(256)) * 8192  # two blocks
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


@pytest.fixture
async def client(tmp_path: Path, blobs: Blobs) -> AsyncIterator[Client]:
    tuf = tmp_path / "tuf"
    (tuf / "metadata").mkdir(parents=True)
    (tuf / "targets" / "digits" / "1").mkdir(parents=True)
    (tuf / "metadata" / "timestamp.json").write_bytes(b"now")
    (tuf / "metadata" / "1.root.json").write_bytes(b"root")
    (tuf / "metadata" / ".timestamp.json.tmp").write_bytes(b"half")
    (tuf / "targets" / "digits" / "1" / f"{SHA256}.index.json").write_bytes(b"index")
    (tmp_path / "secret.json").write_bytes(b"secret")
    application = web.Application()
    application.add_routes(routes(blobs, tuf, max_transfers=2))
    async with TestClient(TestServer(application)) as client:
        yield client


def test_a_blob_is_kept_under_its_digest_with_the_digests_of_its_blocks(
    blobs: Blobs, source: Path
) -> None:
    indexed = blobs.put(source, SHA256)
    assert blobs.path(SHA256).read_bytes() == DATA
    half = len(DATA) // 2
    assert (indexed.sha256, indexed.bytes) == (SHA256, len(DATA))
    assert indexed.blocks == (hashlib.sha256(DATA[:half]).hexdigest(),) * 2
    assert blobs.put(source, SHA256) == indexed


def test_content_with_another_digest_is_refused_and_leaves_nothing(
    blobs: Blobs, source: Path
) -> None:
    with pytest.raises(BlobRefused, match=f"SHA-256 is {SHA256}, expected {'0' * 64}"):
        blobs.put(source, "0" * 64)
    assert list(blobs.directory.iterdir()) == []


def test_a_blob_that_the_disk_has_garbled_is_replaced(blobs: Blobs, source: Path) -> None:
    blobs.put(source, SHA256)
    blobs.path(SHA256).write_bytes(b"garbage")
    blobs.put(source, SHA256)
    assert blobs.path(SHA256).read_bytes() == DATA


@pytest.mark.parametrize("name", ["", "../x", "A" * 64, "0" * 63, "0" * 64 + "/x"])
def test_only_digests_name_blobs(blobs: Blobs, name: str) -> None:
    with pytest.raises(ValueError, match="not a SHA-256"):
        blobs.path(name)


def test_a_start_removes_what_a_crash_left(blobs: Blobs, source: Path) -> None:
    blobs.put(source, SHA256)
    (blobs.directory / ".incoming-x").write_bytes(b"half")
    Blobs(blobs.directory.parent)
    assert [path.name for path in blobs.directory.iterdir()] == [SHA256]


class PowerCut(Exception):
    """The power went before this operation."""


class FailingDisk(Disk):
    """Fails before its operation number ``left``."""

    def __init__(self, left: int) -> None:
        self.left = left

    def rename(self, old: Path, new: Path) -> None:
        self._spend()
        super().rename(old, new)

    def sync(self, directory: Path) -> None:
        self._spend()
        super().sync(directory)

    def _spend(self) -> None:
        if self.left == 0:
            raise PowerCut
        self.left -= 1


def test_a_blob_is_complete_or_absent_wherever_the_power_goes(tmp_path: Path, source: Path) -> None:
    for operations in itertools.count():
        folder = tmp_path / f"case-{operations}"
        try:
            Blobs(folder, FailingDisk(operations)).put(source, SHA256)
        except PowerCut:
            found = Blobs(folder).path(SHA256)
            assert not found.exists() or found.read_bytes() == DATA
            continue
        assert operations == 2
        return


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with pytest.raises(PowerCut):
        replace_file(FailingDisk(0), path, b"new")
    assert path.read_bytes() == b"old"
    replace_file(Disk(), path, b"new", mode=0o600)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o600)


async def test_a_blob_is_served_whole_and_in_parts(
    client: Client, blobs: Blobs, source: Path
) -> None:
    blobs.put(source, SHA256)
    async with client.get(f"/blobs/sha256/{SHA256}") as whole:
        assert (whole.status, await whole.read()) == (200, DATA)
        assert "immutable" in whole.headers["Cache-Control"]
    headers = {"Range": "bytes=10-19"}
    async with client.get(f"/blobs/sha256/{SHA256}", headers=headers) as part:
        assert (part.status, await part.read()) == (206, DATA[10:20])
        assert part.headers["Content-Range"] == f"bytes 10-19/{len(DATA)}"
    headers = {"Range": f"bytes={len(DATA)}-"}
    async with client.get(f"/blobs/sha256/{SHA256}", headers=headers) as beyond:
        assert beyond.status == 416
    async with client.head(f"/blobs/sha256/{SHA256}") as head:
        assert (head.status, head.headers["Content-Length"]) == (200, str(len(DATA)))


async def test_metadata_and_targets_are_served(client: Client) -> None:
    async with client.get("/tuf/metadata/timestamp.json") as found:
        assert (await found.read(), found.headers["Cache-Control"]) == (b"now", "no-cache")
    async with client.get("/tuf/metadata/1.root.json") as found:
        assert await found.read() == b"root"
        assert "immutable" in found.headers["Cache-Control"]
    async with client.get(f"/tuf/targets/digits/1/{SHA256}.index.json") as found:
        assert await found.read() == b"index"


async def test_the_absence_of_a_next_root_is_never_cached(client: Client) -> None:
    async with client.get("/tuf/metadata/2.root.json") as missing:
        assert (missing.status, missing.headers["Cache-Control"]) == (404, "no-store")


@pytest.mark.parametrize(
    "path",
    [
        "/blobs/sha256/" + "0" * 64,
        "/blobs/sha256/..%2f..%2fsecret.json",
        "/blobs/sha256/%2e%2e",
        "/tuf/metadata/..%2f..%2fsecret.json",
        "/tuf/metadata/.timestamp.json.tmp",
        "/tuf/metadata/%2e%2e",
        "/tuf/targets/..%2f..%2fsecret.json",
        "/tuf/targets/digits/..%2f..%2f..%2f..%2fsecret.json",
        "/tuf/targets/digits",
        "/tuf/targets/digits/%00",
        "/tuf/targets//etc/passwd",
        "/tuf/targets/" + "a/" * 20 + "a",
        "/tuf/targets/" + "a" * 5000,
    ],
)
async def test_paths_that_lead_elsewhere_find_nothing(client: Client, path: str) -> None:
    url = URL(str(client.make_url("/")).rstrip("/") + path, encoded=True)
    async with ClientSession() as session, session.get(url) as found:
        assert found.status == 404
        assert b"secret" not in await found.read()


async def test_too_many_transfers_are_told_when_to_come_back(
    tmp_path: Path, client: Client, blobs: Blobs
) -> None:
    """Two clients that do not read hold both places; a third one is refused and then served."""
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(64 << 20)  # more than any socket buffers
    sha256 = hashlib.sha256(b"\0" * (64 << 20)).hexdigest()
    await asyncio.to_thread(blobs.put, big, sha256)
    request = f"GET /blobs/sha256/{sha256} HTTP/1.1\r\nHost: hub\r\n\r\n".encode()
    slow = []
    for _ in range(2):
        reader, writer = await asyncio.open_connection(client.host, client.port, limit=1 << 16)
        writer.write(request)
        assert b"200 OK" in await reader.readline()
        slow.append(writer)
    async with client.get(f"/blobs/sha256/{sha256}", headers={"Range": "bytes=0-9"}) as refused:
        assert refused.status == 503
        assert int(refused.headers["Retry-After"]) > 0
    for writer in slow:
        writer.transport.abort()
    deadline = asyncio.get_running_loop().time() + 10
    while True:
        async with client.get(f"/blobs/sha256/{sha256}", headers={"Range": "bytes=0-9"}) as found:
            if found.status == 206:
                break
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)
