"""Downloads through everything that a link and a server can do to them."""

import asyncio
import hashlib
import http.server
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloud_hub.fleet.artifacts import Blobs, routes
from edge_agent.update.blocks import LocalBlocks, Transferred
from edge_agent.update.download import PART, Downloader, HubFiles, Limits
from edge_agent.update.lifecycle import StepFailed, StepInterrupted, StepRefused
from fogline_protocol.release_index import FileDigester, IndexedFile, ReleaseIndex

BLOCK = 4096
Reply = Callable[["Request"], None]


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def indexed(files: dict[str, bytes], block_bytes: int = BLOCK) -> ReleaseIndex:
    entries = {}
    for name, data in files.items():
        digester = FileDigester(block_bytes)
        digester.update(data)
        entries[name] = digester.finish()
    return ReleaseIndex("digits", 1, "1.0.0", "0" * 64, entries, block_bytes)


@dataclass
class Request:
    """One request, and ways to answer it."""

    hub: "Hub"
    handler: http.server.BaseHTTPRequestHandler
    data: bytes  # of the blob that was asked for
    first: int
    last: int  # inclusive

    def send(self, status: int, body: bytes, *, announced: int | None = None, **head: str) -> None:
        self.handler.send_response(status)
        length = len(body) if announced is None else announced
        self.handler.send_header("Content-Length", str(length))
        for name, value in head.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.end_headers()
        for start in range(0, len(body), 1 << 16):
            try:
                self.handler.wfile.write(body[start : start + (1 << 16)])
            except OSError:  # they have heard enough
                self.handler.close_connection = True
                break
            self.hub.sent += 1 << 16
        if announced is not None:
            self.handler.close_connection = True

    def part(self, edit: Callable[[bytes], bytes] = bytes, **head: str) -> None:
        body = edit(self.data[self.first : self.last + 1])
        total = len(self.data)
        span = head.pop("Content_Range", f"bytes {self.first}-{self.last}/{total}")
        self.send(206, body, announced=None, Content_Range=span, **head)


def good(request: Request) -> None:
    request.part()


def whole(request: Request) -> None:
    request.send(200, request.data)


def status(code: int, **head: str) -> Reply:
    return lambda request: request.send(code, b"no", announced=None, **head)


def cut_after(amount: int) -> Reply:
    def reply(request: Request) -> None:
        body = request.data[request.first : request.last + 1]
        head = f"bytes {request.first}-{request.last}/{len(request.data)}"
        request.send(206, body[:amount], announced=len(body), Content_Range=head)

    return reply


def flipped(position: int) -> Reply:
    def edit(body: bytes) -> bytes:
        return body[:position] + bytes([body[position] ^ 1]) + body[position + 1 :]

    return lambda request: request.part(edit)


class Hub:
    """Serves blobs; ``replies`` are used up one by one, then every answer is good."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.replies: list[Reply] = []
        self.always: Reply = good
        self.ranges: list[tuple[int, int]] = []
        self.headers: list[dict[str, str]] = []
        self.sent = 0
        hub = self

        class Door(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                hub.headers.append(dict(self.headers))
                data = hub.blobs[self.path.rpartition("/")[2]]
                found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                assert found is not None, "a download always asks for a range"
                request = Request(hub, self, data, int(found[1]), int(found[2]))
                hub.ranges.append((request.first, request.last))
                (hub.replies.pop(0) if hub.replies else hub.always)(request)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door)
        self.server.daemon_threads = True
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def holds(self, *files: bytes) -> None:
        self.blobs |= {hashlib.sha256(data).hexdigest(): data for data in files}

    def close(self) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@dataclass
class Waits:
    """A stop that nobody sets, and the waits that it was asked for."""

    seconds: list[float] = field(default_factory=list)
    stopped: bool = False

    def is_set(self) -> bool:
        return self.stopped

    def wait(self, timeout: float) -> bool:
        self.seconds.append(timeout)
        return self.stopped


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture
def into(tmp_path: Path) -> Path:
    folder = tmp_path / "slot.part"
    folder.mkdir()
    return folder


class Device:
    """One device's downloader, with its figures."""

    def __init__(self, hub: Hub, into: Path) -> None:
        self.hub = hub
        self.into = into
        self.waits = Waits()
        self.progress: list[tuple[int, int]] = []
        self.limits = Limits(spare_bytes=0)
        self.free: Callable[[Path], int] = lambda folder: 1 << 40

    def fetch(
        self,
        index: ReleaseIndex,
        names: Sequence[str] | None = None,
        near: Sequence[Path] = (),
    ) -> Transferred:
        files = HubFiles(self.hub.url, read_timeout_s=5)
        downloader = Downloader(
            files, limits=self.limits, chance=lambda: 0.5, clock=lambda: 0.0, free=self.free
        )
        try:
            return downloader.fetch_now(
                index,
                list(index.files) if names is None else names,
                self.into,
                lambda done, total: self.progress.append((done, total)),
                LocalBlocks(near, index.block_bytes),
                self.waits,
            )
        finally:
            downloader.close()
            files.close()

    def file(self, name: str) -> bytes:
        return (self.into / name).read_bytes()


@pytest.fixture
def device(hub: Hub, into: Path) -> Device:
    return Device(hub, into)


def left_over(into: Path) -> list[str]:
    return sorted(p.name for p in into.rglob(f"*{PART}"))


def test_only_the_files_that_were_chosen_are_fetched(hub: Hub, device: Device) -> None:
    files = {"bundle.json": b"{}", "variants/a.onnx": content(10_000), "variants/b.onnx": b"b"}
    hub.holds(*files.values())
    cost = device.fetch(indexed(files), ["bundle.json", "variants/a.onnx"])
    assert device.file("variants/a.onnx") == files["variants/a.onnx"]
    assert not (device.into / "variants" / "b.onnx").exists()
    assert (cost.received, cost.present, cost.copied, cost.requests) == (10_002, 0, 0, 2)
    assert device.progress[-1] == (10_002, 10_002)
    assert left_over(device.into) == []


def test_an_empty_file_needs_no_request(hub: Hub, device: Device) -> None:
    assert device.fetch(indexed({"empty": b""})).requests == 0
    assert device.file("empty") == b""


def test_what_is_complete_is_not_asked_for_again(hub: Hub, device: Device) -> None:
    index = indexed({"a": content(10_000)})
    hub.holds(content(10_000))
    device.fetch(index)
    cost = device.fetch(index)
    assert (cost.requests, cost.present) == (0, 10_000)
    (device.into / "a").write_bytes(content(10_000, seed=1))  # the disk has garbled it
    assert device.fetch(index).received == 10_000
    assert device.file("a") == content(10_000)


def test_only_missing_blocks_are_asked_for_and_neighbors_in_one_request(
    hub: Hub, device: Device
) -> None:
    data = content(10 * BLOCK + 100)
    hub.holds(data)
    part = bytearray(data)
    for block in (2, 3, 7):
        part[block * BLOCK] ^= 255
    (device.into / f"a{PART}").write_bytes(part[: 9 * BLOCK + 50])
    cost = device.fetch(indexed({"a": data}))
    assert device.file("a") == data
    size = 10 * BLOCK + 100
    assert hub.ranges == [
        (2 * BLOCK, 4 * BLOCK - 1),
        (7 * BLOCK, 8 * BLOCK - 1),
        (9 * BLOCK, size - 1),
    ]
    assert cost.present == 6 * BLOCK
    assert cost.received == 3 * BLOCK + BLOCK + 100


def test_a_part_longer_than_the_file_is_cut(hub: Hub, device: Device) -> None:
    data = content(3 * BLOCK)
    (device.into / f"a{PART}").write_bytes(data + b"more")
    assert device.fetch(indexed({"a": data})).requests == 0
    assert device.file("a") == data


def test_blocks_of_other_releases_are_copied(hub: Hub, device: Device, tmp_path: Path) -> None:
    old = content(8 * BLOCK)
    new = old[: 4 * BLOCK] + content(BLOCK, seed=1) + old[5 * BLOCK :] + b"tail"
    near = tmp_path / "files"
    near.mkdir()
    (near / "some").write_bytes(old)
    hub.holds(new)
    cost = device.fetch(indexed({"a": new}), near=[near])
    assert device.file("a") == new
    assert (cost.copied, cost.received) == (7 * BLOCK, BLOCK + 4)


def test_a_local_file_that_changed_meanwhile_is_not_believed(
    hub: Hub, device: Device, tmp_path: Path
) -> None:
    data = content(4 * BLOCK)
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "some").write_bytes(data)
    near = LocalBlocks([tmp_path / "near"], BLOCK)
    first = hashlib.sha256(data[:BLOCK]).hexdigest()
    assert near(first, BLOCK) == data[:BLOCK]
    (tmp_path / "near" / "some").write_bytes(content(4 * BLOCK, seed=1))
    hub.holds(data)
    files = HubFiles(hub.url)
    downloader = Downloader(files, limits=device.limits)
    cost = downloader.fetch_now(indexed({"a": data}), ["a"], device.into, lambda d, t: None, near)
    assert (cost.copied, device.file("a")) == (0, data)
    downloader.close()
    files.close()


def test_a_link_that_breaks_goes_on_at_that_very_byte(hub: Hub, device: Device) -> None:
    data = content(10 * BLOCK)
    hub.holds(data)
    hub.replies = [cut_after(BLOCK + 100), cut_after(7), cut_after(3 * BLOCK)]
    cost = device.fetch(indexed({"a": data}))
    assert device.file("a") == data
    assert [first for first, _ in hub.ranges] == [0, BLOCK + 100, BLOCK + 107, 4 * BLOCK + 107]
    assert cost.received == len(data)


def test_200_instead_of_206_costs_bytes_and_nothing_else(hub: Hub, device: Device) -> None:
    data = content(6 * BLOCK + 5)
    hub.holds(data)
    (device.into / f"a{PART}").write_bytes(data[: 2 * BLOCK])
    hub.always = whole
    cost = device.fetch(indexed({"a": data}))
    assert device.file("a") == data
    assert (cost.requests, cost.present) == (1, 2 * BLOCK)


def test_a_flipped_bit_costs_its_block_once_more(hub: Hub, device: Device) -> None:
    data = content(6 * BLOCK)
    hub.holds(data)
    hub.replies = [flipped(3 * BLOCK + 9)]
    cost = device.fetch(indexed({"a": data}))
    assert device.file("a") == data
    assert hub.ranges == [(0, 6 * BLOCK - 1), (3 * BLOCK, 4 * BLOCK - 1)]
    assert cost.received == 7 * BLOCK


def test_a_block_that_is_always_wrong_fails_the_attempt(hub: Hub, device: Device) -> None:
    data = content(6 * BLOCK)
    hub.holds(data)
    hub.always = lambda request: flipped(max(0, 3 * BLOCK - request.first))(request)
    with pytest.raises(StepFailed, match="block 3 came 3 times") as caught:
        device.fetch(indexed({"a": data}))
    assert caught.value.code == "download/block"
    assert not (device.into / "a").exists()


def test_another_content_of_the_same_length_is_noticed_after_two_blocks(
    hub: Hub, device: Device
) -> None:
    data = content(8000 * BLOCK)
    hub.blobs[hashlib.sha256(data).hexdigest()] = content(8000 * BLOCK, seed=1)
    with pytest.raises(StepFailed) as caught:
        device.fetch(indexed({"a": data}))
    assert caught.value.code == "download/block"
    assert len(hub.ranges) == 3
    assert hub.sent < len(data)  # three times what fits between the two, not three times all


def test_an_endless_answer_ends_where_the_index_says(hub: Hub, device: Device) -> None:
    data = content(3 * BLOCK)
    hub.holds(data)
    hub.always = lambda request: request.part(lambda body: body + content(1 << 20))
    cost = device.fetch(indexed({"a": data}))
    assert device.file("a") == data
    assert cost.received < 3 * BLOCK + (1 << 18)


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (status(416), "download/range"),
        (status(404), "download/missing"),
        (status(403), "download/forbidden"),
        (status(500), "download/answer"),
        (status(503, Retry_After="7"), "download/busy"),
        (lambda r: r.part(Content_Range=f"bytes 0-2/{BLOCK}"), "download/answer"),
        (lambda r: r.part(Content_Range=f"bytes 1-2/{3 * BLOCK}"), "download/answer"),
        (lambda r: r.part(Content_Range="nonsense"), "download/answer"),
        (lambda r: r.part(Content_Encoding="gzip"), "download/answer"),
        (lambda r: r.send(200, b"<html>log in here</html>"), "download/answer"),
        (lambda r: r.part(lambda body: b""), "download/answer"),
        (cut_after(0), "download/unreachable"),
    ],
)
def test_an_answer_without_the_bytes_is_asked_again_and_then_reported(
    hub: Hub, device: Device, reply: Reply, code: str
) -> None:
    data = content(3 * BLOCK)
    hub.holds(data)
    hub.replies = [reply] * 2
    device.fetch(indexed({"a": data}))
    assert device.file("a") == data
    (device.into / "a").unlink()
    device.waits.seconds.clear()
    hub.always = reply
    with pytest.raises(StepInterrupted) as caught:
        device.fetch(indexed({"a": data}))
    assert caught.value.code == code
    assert len(device.waits.seconds) == device.limits.failures - 1


def test_a_portal_that_answers_everything_is_recognized_by_its_length(
    hub: Hub, device: Device
) -> None:
    hub.holds(content(BLOCK))
    hub.always = lambda request: request.send(200, b"<html>log in here</html>")
    with pytest.raises(StepInterrupted, match="sent with 24 bytes, the signed index says 4096"):
        device.fetch(indexed({"a": content(BLOCK)}))


def test_waits_grow_with_a_random_part_and_honor_retry_after(hub: Hub, device: Device) -> None:
    data = content(BLOCK)
    hub.holds(data)
    hub.replies = [status(500)] * 3 + [status(503, Retry_After="60")]
    device.fetch(indexed({"a": data}))
    # Half of 2, 4, 8 and 16 seconds, because chance says 0.5.
    assert device.waits.seconds == [1.0, 2.0, 4.0, 68.0]


def test_progress_ends_the_growth_of_waits(hub: Hub, device: Device) -> None:
    data = content(100 * BLOCK)
    hub.holds(data)
    hub.replies = [cut_after(50)] * 20
    device.fetch(indexed({"a": data}))
    assert device.waits.seconds == [0.5] * 20


def test_a_hub_that_is_away_interrupts_and_keeps_what_is_here(hub: Hub, device: Device) -> None:
    data = content(4 * BLOCK)
    index = indexed({"a": data})
    hub.holds(data)
    hub.replies = [cut_after(2 * BLOCK)]
    hub.always = status(502)
    with pytest.raises(StepInterrupted):
        device.fetch(index)
    assert left_over(device.into) == [f"a{PART}"]
    hub.always = good
    assert device.fetch(index).present == 2 * BLOCK


def test_nobody_listening_is_named(into: Path) -> None:
    hub = Hub()
    hub.close()
    device = Device(hub, into)
    with pytest.raises(StepInterrupted) as caught:
        device.fetch(indexed({"a": b"x"}))
    assert caught.value.code == "download/unreachable"


def test_a_disk_without_room_is_noticed_before_anything_is_asked(hub: Hub, device: Device) -> None:
    device.free = lambda folder: 9_999
    with pytest.raises(StepFailed) as caught:
        device.fetch(indexed({"a": content(10_000)}))
    assert caught.value.code == "disk/full"
    assert hub.ranges == []
    device.free = lambda folder: 10_000
    hub.holds(content(10_000))
    device.fetch(indexed({"a": content(10_000)}))


def test_what_is_here_already_needs_no_room(hub: Hub, device: Device) -> None:
    data = content(100 * BLOCK)
    hub.holds(data)
    (device.into / f"a{PART}").write_bytes(data[: 90 * BLOCK])
    device.free = lambda folder: 11 * BLOCK
    device.fetch(indexed({"a": data}))


def test_a_disk_that_fills_up_meanwhile_is_named(hub: Hub, into: Path) -> None:
    """The limit on file sizes makes the operating system refuse a write, in a child process."""
    data = content(40 * BLOCK)
    hub.holds(data)
    code = child(
        hub.url,
        into,
        indexed({"a": data}),
        before=f"resource.setrlimit(resource.RLIMIT_FSIZE, ({20 * BLOCK}, {20 * BLOCK}))",
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "disk/full" in done.stderr
    assert not (into / "a").exists()


def test_an_index_whose_blocks_do_not_make_up_the_file_is_refused(hub: Hub, device: Device) -> None:
    data = content(3 * BLOCK)
    index = indexed({"a": data})
    lie = replace(index.files["a"], sha256=hashlib.sha256(b"else").hexdigest())
    hub.blobs[lie.sha256] = data
    with pytest.raises(StepRefused) as caught:
        device.fetch(replace(index, files={"a": lie}))
    assert caught.value.code == "index/contradiction"
    assert not (device.into / "a").exists()


@pytest.mark.parametrize("name", ["../a", "/a", "x/../../a", f"a{PART}", ""])
def test_names_that_leave_the_folder_are_refused(hub: Hub, device: Device, name: str) -> None:
    data = b"x"
    hub.holds(data)
    with pytest.raises(StepRefused) as caught:
        device.fetch(indexed({name: data}))
    assert caught.value.code == "index/name"
    assert list(device.into.rglob("*")) == []


def test_links_in_the_folder_are_not_followed(hub: Hub, device: Device, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"precious")
    (device.into / "variants").symlink_to(outside)
    (device.into / f"b{PART}").symlink_to(outside / "precious")
    (device.into / "c").symlink_to(outside / "precious")
    files = {"variants/precious": b"one", "b": b"two", "c": b"three"}
    hub.holds(*files.values())
    device.fetch(indexed(files))
    assert (outside / "precious").read_bytes() == b"precious"
    assert {name: device.file(name) for name in files} == files
    assert not any(path.is_symlink() for path in device.into.rglob("*"))


def test_a_token_is_not_sent_in_the_clear_nor_to_another_host(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="TLS only"):
        HubFiles("http://hub.example:8000", token=lambda: "secret")
    other = Hub()
    other.holds(b"data")
    digest = hashlib.sha256(b"data").hexdigest()
    hub.blobs[digest] = b"data"
    # Another name of this machine is another host to whoever keeps secrets.
    elsewhere = other.url.replace("127.0.0.1", "localhost")
    hub.always = status(307, Location=f"{elsewhere}/blobs/sha256/{digest}")
    files = HubFiles(hub.url, token=lambda: "secret")
    downloader = Downloader(files, free=lambda folder: 1 << 40)
    downloader.fetch_now(indexed({"a": b"data"}), ["a"], tmp_path, lambda done, total: None)
    assert hub.headers[0]["Authorization"] == "Bearer secret"
    assert "Authorization" not in other.headers[0]
    downloader.close()
    files.close()
    other.close()


def test_a_cap_spreads_bytes_over_time(hub: Hub, device: Device) -> None:
    data = content(10 * BLOCK)
    hub.holds(data)
    device.limits = replace(device.limits, bytes_per_s=BLOCK)
    device.fetch(indexed({"a": data}))
    # The clock of this test stands still, so every wait includes the ones before it.
    assert device.waits.seconds[-1] == pytest.approx(10.0)


def test_a_stopped_download_ends_at_once_and_keeps_what_is_here(hub: Hub, device: Device) -> None:
    data = content(4 * BLOCK)
    hub.holds(data)
    device.waits.stopped = True
    with pytest.raises(StepInterrupted) as caught:
        device.fetch(indexed({"a": data}))
    assert caught.value.code == "download/stopped"


async def test_a_cancelled_download_has_stopped_when_its_caller_hears_of_it(
    hub: Hub, into: Path
) -> None:
    """The hub says nothing for ever: only an abort from another thread ends the read."""
    data = content(4 * BLOCK)
    hub.holds(data)
    here, release = asyncio.Event(), threading.Event()

    def stall(request: Request) -> None:
        cut_after(BLOCK)(request)
        release.wait(30)

    hub.always = stall
    files = HubFiles(hub.url, read_timeout_s=60)
    downloader = Downloader(files, limits=Limits(spare_bytes=0))
    task = asyncio.create_task(
        downloader.fetch(indexed({"a": data}), ["a"], into, lambda done, total: here.set())
    )
    await asyncio.wait_for(here.wait(), 30)
    started = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - started < 5
    release.set()
    hub.always = good
    cost = await downloader.fetch(indexed({"a": data}), ["a"], into, lambda done, total: None)
    assert (into / "a").read_bytes() == data
    assert cost.present + cost.received == len(data)
    downloader.close()
    files.close()


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    size=st.integers(0, 6 * BLOCK),
    cuts=st.lists(st.integers(0, 3 * BLOCK), max_size=5),
    seed=st.integers(0, 3),
    kept=st.integers(0, 6 * BLOCK),
)
def test_whatever_was_cut_where_the_file_is_right_and_nothing_is_paid_twice(
    tmp_path_factory: pytest.TempPathFactory, size: int, cuts: list[int], seed: int, kept: int
) -> None:
    data = content(size, seed)
    hub = Hub()
    try:
        hub.holds(data)
        hub.replies = [cut_after(amount) for amount in cuts]
        into = tmp_path_factory.mktemp("into")
        (into / f"a{PART}").write_bytes(data[:kept])
        device = Device(hub, into)
        cost = device.fetch(indexed({"a": data}))
        assert device.file("a") == data
        assert cost.present + cost.received == size
    finally:
        hub.close()


def child(url: str, into: Path, index: ReleaseIndex, *, before: str = "", limits: str = "") -> str:
    """Return the program of a process that downloads and prints figures as JSON."""
    into.parent.joinpath("index.json").write_bytes(
        replace(index, files={**index.files, "bundle.json": NO_BUNDLE}).to_json()
    )
    return f"""
import json, resource, sys, time
from pathlib import Path
from edge_agent.update.download import Downloader, HubFiles, Limits
from edge_agent.update.lifecycle import StepEnded
from fogline_protocol import release_index
index = release_index.parse(Path({str(into.parent / "index.json")!r}).read_bytes())
downloader = Downloader(HubFiles({url!r}), limits=Limits(spare_bytes=0, backoff_s=0.01, {limits}))
def peak():
    # Not getrusage: its maximum includes that of the process this one was started from.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
start = peak()
{before}
try:
    cost = downloader.fetch_now(index, ["a"], Path({str(into)!r}), lambda done, total: None)
except StepEnded as error:
    sys.exit(str(error))
print(json.dumps({{"memory": peak() - start, "received": cost.received, "present": cost.present}}))
"""


_DIGEST = "0" * 64
NO_BUNDLE = IndexedFile(_DIGEST, 1, (_DIGEST,))


def test_kill_9_in_the_middle_costs_at_most_what_was_in_flight(hub: Hub, into: Path) -> None:
    data = content(400 * BLOCK)
    hub.holds(data)
    code = child(hub.url, into, indexed({"a": data}), limits=f"bytes_per_s={200 * BLOCK}")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    part = into / f"a{PART}"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size >= 100 * BLOCK):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    size = part.stat().st_size
    assert not (into / "a").exists()
    cost = Device(hub, into).fetch(indexed({"a": data}))
    assert (into / "a").read_bytes() == data
    assert cost.present == size // BLOCK * BLOCK
    assert cost.received == len(data) - cost.present


class CuttingProxy:
    """Forwards TCP and resets the connection after every ``every`` bytes, ``cuts`` times."""

    def __init__(self, port: int, every: int, cuts: int) -> None:
        self._port = port
        self._every = every
        self.cuts_left = cuts
        self.forwarded = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._port)
        upward = asyncio.create_task(self._copy(reader, up_writer, count=False))
        try:
            await self._copy(up_reader, writer, count=True)
        finally:
            upward.cancel()
            for one in (writer, up_writer):
                one.transport.abort()

    async def _copy(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, count: bool
    ) -> None:
        here = 0
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()
            if count:
                here += len(data)
                self.forwarded += len(data)
                if here >= self._every and self.cuts_left:
                    self.cuts_left -= 1
                    return


async def test_200_mb_through_a_link_that_is_cut_20_times(tmp_path: Path) -> None:
    """At most 10 % extra bytes, at constant memory (fleet-updates.md 11, R2)."""
    size = 200_000_000
    source = tmp_path / "model"
    digester = FileDigester()
    noise = os.urandom(1 << 20)
    with source.open("wb") as file:
        for number in range(size // len(noise) + 1):
            data = (number.to_bytes(8, "big") + noise[8:])[: size - file.tell()]
            digester.update(data)
            file.write(data)
    whole_file = digester.finish()
    blobs = Blobs(tmp_path / "blobs")
    os.link(source, blobs.path(whole_file.sha256))
    application = web.Application()
    application.add_routes(routes(blobs, tmp_path))
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    proxy = CuttingProxy(runner.addresses[0][1], every=size // 21, cuts=20)
    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    into = tmp_path / "into"
    into.mkdir()
    index = ReleaseIndex("digits", 1, "1.0.0", _DIGEST, {"a": whole_file})
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", child(url, into, index), stdout=subprocess.PIPE
    )
    output, _ = await process.communicate()
    figures = json.loads(output)
    server.close()
    await runner.cleanup()
    assert proxy.cuts_left == 0
    assert figures["received"] == size
    assert proxy.forwarded <= 1.1 * size
    assert figures["memory"] < 16 << 20
    with (into / "a").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == whole_file.sha256
