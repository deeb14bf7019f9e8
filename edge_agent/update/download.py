"""Brings the files of a release to this device, block by block, over HTTP Range.

A file grows as ``<name>.part`` and gets its name when every block and the whole have the
digests of the signed index. Nothing else is remembered: what is already here is found out by
looking at it, so a download resumes after any interruption, ``kill -9`` and power cuts
included, and a part that the disk has garbled is simply fetched again.

    blocks in <name>.part that verify          → kept
    blocks found in other local files          → copied
    runs of missing blocks                     → one Range request each
    a link that breaks inside a block          → goes on at that byte
    200 instead of 206                         → the wanted blocks are picked out of it
    a block with the wrong digest              → asked again, at most three times
    416, 404, 503, nonsense                    → asked again later, with full jitter

Where the bytes come from needs no trust. Memory is one block and one chunk, whatever the size
of the file. Time, chance and free space are arguments.
"""

import asyncio
import contextlib
import errno
import hashlib
import ipaddress
import os
import random
import re
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import urllib3

from edge_agent.update.blocks import (
    Find,
    Growing,
    Job,
    Progress,
    Stop,
    Transferred,
    nowhere,
    stopped,
)
from edge_agent.update.disk import DiskFull
from edge_agent.update.lifecycle import StepFailed, StepInterrupted, StepRefused
from fogline_protocol.release_index import IndexedFile, ReleaseIndex

CHUNK_BYTES = 1 << 17
PART = ".part"

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class LinkBroken(Exception):
    """The hub was not reached, or stopped in the middle: ask again later."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How patient and how greedy a download is."""

    backoff_s: float = 1.0  # doubles with each failure in a row; a random part of it is waited
    backoff_max_s: float = 600.0
    failures: int = 6  # in a row without a new byte; then the caller hears that the hub is away
    block_tries: int = 3  # wrong digests of one block before the attempt has failed
    sync_bytes: int = 16 << 20  # written between two fsyncs
    spare_bytes: int = 16 << 20  # that stay free on the disk, for logs and state files
    bytes_per_s: float | None = None  # None: as fast as the link is


class HubFiles:
    """The HTTP side of one hub: opens paths, whole or in part."""

    def __init__(
        self,
        url: str,
        *,
        token: Callable[[], str] | None = None,
        ca: Path | None = None,
        connect_timeout_s: float = 10.0,
        read_timeout_s: float = 30.0,
    ) -> None:
        """Name the hub, e.g. ``https://hub.example:8000``.

        Args:
            url: scheme, host and port.
            token: returns the bearer token to send; asked for every request.
            ca: PEM of the authority behind the hub's certificate; None: the system's.
            connect_timeout_s: seconds to reach it.
            read_timeout_s: seconds without a byte before the link counts as broken.

        Raises:
            ValueError: no such URL, or a token would travel unencrypted.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not http://HOST:PORT or https://HOST:PORT")
        self.is_loopback = _is_loopback(parts.hostname)
        if token is not None and parts.scheme != "https" and not self.is_loopback:
            raise ValueError(f"a token is sent over TLS only, {url!r} is not https")
        self.url = url.rstrip("/")
        self._token = token
        self._pool = urllib3.PoolManager(
            num_pools=4,
            maxsize=2,
            ca_certs=str(ca) if ca is not None else None,
            timeout=urllib3.Timeout(connect=connect_timeout_s, read=read_timeout_s),
            # Breaks are counted and waited for by the caller. A hub may redirect to an object
            # store; urllib3 does not repeat the token to another host.
            retries=urllib3.Retry(
                3, connect=0, read=0, status=0, other=0, respect_retry_after_header=False
            ),
        )

    def open(self, path: str, first: int | None = None, last: int | None = None) -> "Answer":
        """Ask for ``path``, or for its bytes ``first`` to ``last`` inclusive.

        Raises:
            LinkBroken: there was no answer.
        """
        headers = {"Accept-Encoding": "identity", "User-Agent": "fogline-agent"}
        if first is not None:
            headers["Range"] = f"bytes={first}-{'' if last is None else last}"
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token()}"
        try:
            response = self._pool.request(
                "GET", self.url + path, headers=headers, preload_content=False
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise LinkBroken(f"{self.url}: {_reason(error)}") from None
        return Answer(response)

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()


class Answer:
    """One HTTP answer: its head is here, its body is read piece by piece."""

    def __init__(self, response: urllib3.BaseHTTPResponse) -> None:
        self._response = response
        self.status = response.status

    def header(self, name: str) -> str:
        """Return a header's value, or an empty text."""
        return self._response.headers.get(name, "")

    def read(self) -> bytes:
        """Return what has arrived, at most ``CHUNK_BYTES``; nothing at the end.

        Raises:
            LinkBroken: the body ends before its announced length, or nothing arrives.
        """
        try:
            return self._response.read1(CHUNK_BYTES, decode_content=False) or b""
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise LinkBroken(_reason(error)) from None

    def abort(self) -> None:
        """Wake the thread that waits in ``read``. Any thread may call it, at any time."""
        with contextlib.suppress(RuntimeError, ValueError, OSError):
            self._response.shutdown()

    def close(self) -> None:
        """Give the connection back if the body was read to its end, else close it."""
        self._response.close()


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user may still write to the disk of ``folder``."""
    usage = os.statvfs(folder)
    return usage.f_bavail * usage.f_frsize


class Downloader:
    """Fetches files of releases from one hub, one release at a time."""

    def __init__(
        self,
        hub: HubFiles,
        *,
        limits: Limits | None = None,
        chance: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
        free: Callable[[Path], int] = free_bytes,
    ) -> None:
        """Make a downloader.

        Args:
            hub: where the bytes are.
            limits: patience and greed.
            chance: returns numbers in [0, 1).
            clock: returns seconds.
            free: returns the bytes free on the disk of a folder.
        """
        self._hub = hub
        self._limits = limits or Limits()
        self._chance = chance
        self._clock = clock
        self._free = free
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fogline-download")
        self._answer: Answer | None = None  # being read; replaced by the thread only

    async def fetch(
        self,
        index: ReleaseIndex,
        names: Collection[str],
        into: Path,
        progress: Progress,
        find: Find = nowhere,
    ) -> Transferred:
        """Do ``fetch_now`` in a thread of its own; a cancelled call has stopped writing."""
        loop = asyncio.get_running_loop()
        stop = threading.Event()

        def tell(done: int, total: int) -> None:
            loop.call_soon_threadsafe(progress, done, total)

        work = loop.run_in_executor(
            self._thread, self.fetch_now, index, names, into, tell, find, stop
        )
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            stop.set()
            while not work.done():
                if (answer := self._answer) is not None:
                    answer.abort()
                await asyncio.wait([work], timeout=0.1)
            work.exception()  # it is looked at, so nobody complains that it was not
            raise

    def fetch_now(
        self,
        index: ReleaseIndex,
        names: Collection[str],
        into: Path,
        progress: Progress,
        find: Find = nowhere,
        stop: Stop | None = None,
    ) -> Transferred:
        """Fill ``into`` with the files ``names`` of ``index``; others are not asked for.

        Raises:
            StepInterrupted: the hub cannot be reached or does not give the bytes, or ``stop``
                was set; what was fetched stays.
            StepRefused: the index contradicts itself.
            StepFailed: a block comes with the wrong digest again and again, or there is no
                room on the disk.
            OSError: the disk fails.
        """
        stop = stop or threading.Event()
        files = [(name, index.files[name]) for name in sorted(names)]
        for name, _ in files:
            if name.endswith(PART):
                raise StepRefused("index/name", f"{name}: a file must not end in {PART}")
        total = sum(file.bytes for _, file in files)
        job = Job(stop, progress, find, total, bytearray(index.block_bytes))
        with _disk_errors():
            waiting = [(n, f) for n, f in files if not _is_here(into, n, f, job)]
            self._check_room(into, waiting)
            for name, file in waiting:
                self._fetch_file(into, name, file, job)
        return job.transferred

    def close(self) -> None:
        """End the thread. Cancel what runs in it before."""
        self._thread.shutdown()

    def _check_room(self, into: Path, waiting: Sequence[tuple[str, IndexedFile]]) -> None:
        here = 0
        for name, _ in waiting:
            with contextlib.suppress(FileNotFoundError):
                here += (into / (name + PART)).lstat().st_blocks * 512
        needed = sum(file.bytes for _, file in waiting) - here
        free = self._free(into)
        if needed > 0 and needed + self._limits.spare_bytes > free:
            raise StepFailed(
                DiskFull.code,
                f"{needed} bytes are to be fetched and {self._limits.spare_bytes} must stay free, "
                f"but the disk of {into} has room for {free}",
            )

    def _fetch_file(self, into: Path, name: str, file: IndexedFile, job: Job) -> None:
        final = _place(into, name)
        part = final.with_name(final.name + PART)
        if part.is_symlink():
            part.unlink()
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            if os.fstat(descriptor).st_size > file.bytes:
                os.ftruncate(descriptor, file.bytes)
            growing = Growing(
                descriptor,
                name,
                file,
                job,
                block_tries=self._limits.block_tries,
                sync_bytes=self._limits.sync_bytes,
            )
            growing.keep_what_is_here()
            growing.copy_what_is_near()
            self._receive(growing, job)
            growing.check_whole()
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(part, final)
        _sync_folders(final.parent, into)

    def _receive(self, growing: Growing, job: Job) -> None:
        """Ask until nothing is missing."""
        failures = 0
        pace = _Pace(self._limits.bytes_per_s, self._clock)
        while (span := growing.missing()) is not None:
            if job.stop.is_set():
                raise stopped()
            arrived = growing.arrived
            wait_s, trouble = 0.0, None
            try:
                wait_s, trouble = self._ask(growing, job, pace, *span)
            except LinkBroken as error:
                trouble = StepInterrupted("download/unreachable", str(error))
            failures = 0 if growing.arrived > arrived else failures + 1
            if trouble is None and failures == 0:
                continue
            if failures >= self._limits.failures:
                raise trouble or StepInterrupted(
                    "download/answer", "the hub answers, but not with the bytes that were asked for"
                )
            ceiling = min(self._limits.backoff_max_s, self._limits.backoff_s * 2.0**failures)
            jittered = ceiling * self._chance()
            if job.stop.wait(min(wait_s, self._limits.backoff_max_s) + jittered):
                raise stopped()

    def _ask(
        self, growing: Growing, job: Job, pace: "_Pace", first: int, end: int
    ) -> tuple[float, StepInterrupted | None]:
        """Ask for the bytes ``first`` to ``end`` (exclusive) once.

        Returns:
            Seconds that the hub wants to be left alone, and what was wrong with its answer.
        """
        sha256 = growing.file.sha256
        job.transferred.requests += 1
        answer = self._hub.open(f"/blobs/sha256/{sha256}", first, end - 1)
        self._answer = answer
        try:
            if answer.status not in (200, 206):
                return _retry_after(answer), _refusal(answer, growing.name)
            start = _start(answer, first, growing.file.bytes)
            if isinstance(start, str):
                return 0.0, StepInterrupted("download/answer", f"{growing.name}: {start}")
            growing.at(start)
            wrong = 0
            while not growing.reached(end):
                chunk = answer.read()
                if not chunk:
                    break
                if job.stop.is_set():
                    raise stopped()
                job.transferred.received += len(chunk)
                wrong += growing.feed(chunk)
                if wrong > 1:
                    # Not one flipped bit but another content: do not pay for all of it.
                    return 0.0, StepInterrupted(
                        "download/block", f"{growing.name}: several blocks have a wrong digest"
                    )
                pace.spend(len(chunk), job.stop)
            return 0.0, None
        finally:
            self._answer = None
            answer.close()


class _Pace:
    """Keeps a download below so many bytes per second, without saving up pauses for a burst."""

    def __init__(self, bytes_per_s: float | None, clock: Callable[[], float]) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._free_at = 0.0

    def spend(self, amount: int, stop: Stop) -> None:
        if self._bytes_per_s is None:
            return
        now = self._clock()
        self._free_at = max(self._free_at, now) + amount / self._bytes_per_s
        if stop.wait(self._free_at - now):
            raise stopped()


def _is_here(into: Path, name: str, file: IndexedFile, job: Job) -> bool:
    """Return whether the finished file lies there; something else under its name is removed."""
    path = _place(into, name)
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    if stat.S_ISREG(found.st_mode) and found.st_size == file.bytes:
        with path.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() == file.sha256:
                job.transferred.present += file.bytes
                job.add(file.bytes)
                return True
    path.unlink()
    return False


def _place(into: Path, name: str) -> Path:
    """Return where ``name`` belongs; its folders are made, and none of them is a link."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts:
        raise StepRefused("index/name", f"{name!r} is not a plain path inside the bundle")
    folder = into
    for part in parts[:-1]:
        folder = folder / part
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            folder.unlink()
        folder.mkdir(exist_ok=True)
    return folder / parts[-1]


def _sync_folders(folder: Path, top: Path) -> None:
    while True:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if folder == top:
            return
        folder = folder.parent


def _start(answer: Answer, first: int, size: int) -> int | str:
    """Return the offset of the body's first byte, or what is wrong with the answer."""
    encoding = answer.header("Content-Encoding")
    if encoding not in ("", "identity"):
        return f"the answer is encoded as {encoding!r}, which nobody asked for"
    if answer.status == 200:
        length = answer.header("Content-Length")
        if length and length != str(size):
            return f"the whole file was sent with {length} bytes, the signed index says {size}"
        return 0
    match = _CONTENT_RANGE.fullmatch(answer.header("Content-Range"))
    if match is None or int(match[1]) != first or match[3] not in ("*", str(size)):
        return (
            f"asked for bytes from {first} of {size}, the answer is "
            f"{answer.header('Content-Range') or 'a part without a range'!r}"
        )
    return first


def _refusal(answer: Answer, name: str) -> StepInterrupted:
    # None of these says anything about the release: a proxy, a portal or a hub that is being
    # restored give them as well. They are reported, and asked again for as long as it takes.
    code, what = {
        401: ("download/forbidden", "the hub does not accept this device's identity"),
        403: ("download/forbidden", "the hub does not accept this device's identity"),
        404: ("download/missing", "the hub does not have the file that its index names"),
        410: ("download/missing", "the hub does not have the file that its index names"),
        416: ("download/range", "the hub's copy is shorter than its index says"),
        429: ("download/busy", "the hub asked to come back later"),
        503: ("download/busy", "the hub asked to come back later"),
    }.get(answer.status, ("download/answer", "the hub cannot answer"))
    return StepInterrupted(code, f"{name}: {what} (HTTP {answer.status})")


def _retry_after(answer: Answer) -> float:
    seconds = answer.header("Retry-After")
    return float(seconds) if seconds.isdecimal() else 0.0


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Name the errors of a disk without room; the others are the caller's to name."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StepFailed(
                DiskFull.code, f"{error.filename or 'the release'}: no room left on the disk"
            ) from error
        raise


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reason(error: BaseException) -> str:
    """Return the innermost cause in words; urllib3 wraps it several times."""
    while isinstance(inner := getattr(error, "reason", None), BaseException):
        error = inner
    return str(error) or type(error).__name__
