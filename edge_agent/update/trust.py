"""Decides what this device believes of what a hub says has been released.

python-tuf's ``ngclient`` does the checking; this file closes the three gaps that it leaves on a
device that loses power and whose clock may say anything:

* **Durability.** ngclient renames without fsync. What it wrote is synced here before anything is
  believed of it, and the highest version seen of every role is kept in ``marks.json``. So
  metadata that was garbled by a power cut is fetched again, but never at an older version.
* **Clock.** ngclient asks the device's clock what has expired. ``floor`` is the latest moment that
  certainly has passed: this software's making, the hub's time when somebody trusted told it, the
  ``issued`` field of the last timestamp. Metadata that expired before the floor has expired,
  whatever the clock says. A clock that is ahead blocks new releases and nothing else.
* **Downloads.** Only metadata and small documents come this way, in memory and with limits.

Marks of a role are forgotten when a verified root (or, for a delegated role, a verified targets
role) gives it other keys: that is how a fleet recovers after a thief of a key has signed the
version 2,147,483,647. With the timestamp's keys goes the floor that it has raised.

The first root comes with the enrollment. Without one, only a hub on this very machine is
believed at first sight, and the log says so.
"""

import asyncio
import contextlib
import datetime
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import structlog
from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    SlowRetrievalError,
    UnsignedMetadataError,
)
from tuf.api.metadata import (  # type: ignore[attr-defined]
    Metadata,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from edge_agent.update.download import HubFiles, LinkBroken
from edge_agent.update.lifecycle import StepInterrupted, StepRefused
from edge_agent.update.marks import Marks, MetadataRefused
from fogline_protocol import certificate, documents, release_index
from fogline_protocol.certificate import Certificate
from fogline_protocol.documents import MAX_DOCUMENT_BYTES, DocumentError
from fogline_protocol.release_index import ReleaseIndex

# No clock is right that is before this software was made. Raised with each version of it.
BUILD_TIME = datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC).timestamp()

CERTIFICATES = "certificates"  # the role that may speak of certificates, and no other
UNKNOWN_TARGET = "metadata/unknown-target"  # code: the hub has signed nothing for a path
ISSUED = "issued"  # the hub's time in the signed timestamp
MAX_FETCH_S = 60.0  # for one metadata file, however slowly it drips
FLOOR_STEP_S = 3600.0  # the hub's time is written down when it has moved on by so much

_METADATA_URL = "/tuf/metadata/"
_TARGETS_URL = "/tuf/targets/"
_TIME = "%Y-%m-%dT%H:%M:%SZ"

P = ParamSpec("P")
T = TypeVar("T")

_log = structlog.get_logger()


class HubAway(StepInterrupted):
    """The hub did not answer (``hub/unreachable``) or would not (``hub/refused``)."""


class DocumentRefused(StepRefused):
    """A signed document is not what its place promises: the hub must publish it again."""


class Trust:
    """What one device believes of one hub. It is the only user of its folder.

    All work happens in one thread of its own, because ngclient is synchronous and takes no lock.
    """

    def __init__(
        self,
        folder: Path,
        hub: HubFiles,
        *,
        root: Path | None = None,
        build_time: float = BUILD_TIME,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Make the trust of a device. Nothing is read, written or asked yet.

        Args:
            folder: for metadata, marks and the first root; used by nobody else.
            hub: where metadata and documents come from.
            root: the hub's root metadata that came with the enrollment. Once it was used, the
                copy in ``folder`` counts.
            build_time: seconds since 1970 that no right clock is before.
            clock: the device's clock, for what is told about it; ngclient reads its own.
        """
        self._folder = folder
        self._metadata = folder / "metadata"
        self._hub = hub
        self._root = root
        self._build_time = build_time
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fogline-trust")

    async def refresh(self) -> None:
        """Bring the metadata up to date.

        Raises:
            MetadataRefused: what came is not believed.
            HubAway: nothing came.
            OSError: the disk is full or fails.
        """
        await self._in_thread(self._refresh)

    async def index(self, target: str) -> ReleaseIndex:
        """Return the index at the target path ``MODEL/NUMBER/index.json``, as the hub signed it.

        Raises:
            MetadataRefused: what came is not believed, or nothing was signed for this path.
            DocumentRefused: what was signed is not the index of this release.
            HubAway: nothing came.
            OSError: the disk is full or fails.
        """
        return await self._in_thread(self._index, target)

    async def certificate(self, target: str) -> Certificate:
        """Return the certificate at ``certificates/MODEL/NUMBER/ID.json``, signed by its own role.

        Raises:
            MetadataRefused: what came is not believed, or nothing was signed for this path.
            DocumentRefused: what was signed is not this certificate.
            HubAway: nothing came.
            OSError: the disk is full or fails.
        """
        return certificate.parse(await self.certificate_document(target))

    async def certificate_document(self, target: str) -> bytes:
        """Return the verified bytes of a certificate. Raises what ``certificate`` raises."""
        return await self._in_thread(self._certificate, target)

    async def observe_time(self, now: float) -> None:
        """Take note that ``now`` (seconds since 1970) has passed, as somebody trusted said."""
        await self._in_thread(self._observe, now)

    async def clock_problem(self) -> str | None:
        """Say in a sentence what is wrong with the device's clock, or None."""
        return await self._in_thread(self._clock_problem)

    def close(self) -> None:
        """End the thread; a refresh in it ends first."""
        self._thread.shutdown()

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: function(*args, **kwargs)
        )

    def _index(self, target: str) -> ReleaseIndex:
        with _document_errors("index"):
            model, number = release_index.split_index_target(target)
        _, data = self._document(target, "index")
        with _document_errors("index"):
            index = release_index.parse(data)
        if (index.model, index.release) != (model, number):
            raise DocumentRefused(
                "index/mismatch",
                f"{target} was signed, but it is the index of {index.model} release {index.release}",
            )
        return index

    def _certificate(self, target: str) -> bytes:
        with _document_errors("certificate"):
            model, _, expected = release_index.split_certificate_target(target)
        role, data = self._document(target, "certificate")
        if role != CERTIFICATES:
            raise MetadataRefused(
                "metadata/unsigned",
                f"{target} was signed by the role {role}, not by {CERTIFICATES}",
            )
        with _document_errors("certificate"):
            found = certificate.parse(data)
        if found.model != model or documents.sha256(data)[:16] != expected:
            raise DocumentRefused(
                "certificate/mismatch", f"{target} was signed, but it is another certificate"
            )
        return data

    def _document(self, target: str, kind: str) -> tuple[str, bytes]:
        """Return the role that signed ``target``, and its verified bytes."""
        updater, view, before = self._verified()
        try:
            with self._named_errors():
                info = updater.get_targetinfo(target)
                role = view.role_of(target)
                if role is None:
                    raise MetadataRefused(UNKNOWN_TARGET, f"nobody may sign {target}")
                view.add(role)
        finally:
            self._accept(view, before)  # what was verified counts, whatever the look-up came to
        # The walk of ngclient and ours must have ended at the same signature.
        signed = view.targets[role].targets.get(target)
        if info is None or signed is None or info != signed:
            raise MetadataRefused(UNKNOWN_TARGET, f"the hub has signed nothing for {target}")
        if info.length > MAX_DOCUMENT_BYTES:
            raise DocumentRefused(
                f"{kind}/too-large",
                f"{target} has {info.length} bytes, at most {MAX_DOCUMENT_BYTES}",
            )
        return role, self._download(info, kind)

    def _download(self, info: TargetFile, kind: str) -> bytes:
        with self._named_errors():
            url = _TARGETS_URL + info.get_prefixed_paths()[0]
            data = _Fetcher(self._hub).download_bytes(url, info.length)
            try:
                info.verify_length_and_hashes(data)
            except LengthOrHashMismatchError:
                raise MetadataRefused(
                    f"{kind}/mismatch",
                    f"what came for {info.path} does not have the digest that was signed",
                ) from None
            return data

    def _refresh(self) -> None:
        _, view, before = self._verified()
        self._accept(view, before)

    def _verified(self) -> "tuple[Updater, _View, Mapping[str, tuple[int, int]]]":
        """Return the top-level metadata as ngclient believes it, and the files before that."""
        anchor = self._anchor()
        self._metadata.mkdir(parents=True, exist_ok=True)
        before = _stamps(self._metadata)
        with self._named_errors():
            updater = Updater(
                str(self._metadata),
                _METADATA_URL,
                fetcher=_Fetcher(self._hub),
                config=UpdaterConfig(),
                bootstrap=anchor,
            )
            updater.refresh()
            view = _View(self._metadata)
        return updater, view, before

    def _accept(self, view: "_View", before: Mapping[str, tuple[int, int]]) -> None:
        """Check what was verified against what is remembered, then remember it, durably."""
        known = self._marks()
        marks = view.checked(known, self._build_time)
        _sync_changed(self._metadata, before)
        if marks != known:
            self._write("marks.json", marks.to_json())

    def _anchor(self) -> bytes:
        """Return the root metadata that everything else is judged by."""
        kept = self._folder / "root.json"
        with contextlib.suppress(FileNotFoundError):
            return kept.read_bytes()
        if self._root is not None:
            anchor = self._root.read_bytes()
        elif self._hub.is_loopback:
            anchor = self._first_sight()
        else:
            raise MetadataRefused(
                "metadata/no-root",
                f"this device has no root metadata for {self._hub.url}; give it the root.json of the "
                "hub's enrollment. Only a hub on this machine is believed at first sight",
            )
        with self._named_errors():
            root = Metadata[Root].from_bytes(anchor).signed
            if not isinstance(root, Root):
                raise RepositoryError("the given root metadata is of another kind")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write("root.json", anchor)
        return anchor

    def _first_sight(self) -> bytes:
        with self._named_errors():
            anchor = _Fetcher(self._hub).download_bytes(
                f"{_METADATA_URL}1.root.json", UpdaterConfig().root_max_length
            )
        _log.warning(
            "hub believed at first sight",
            hub=self._hub.url,
            root_sha256=documents.sha256(anchor),
            why="it is on this machine, and no root metadata was given",
        )
        return anchor

    def _observe(self, now: float) -> None:
        marks = self._marks()
        if now >= marks.floor + FLOOR_STEP_S:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write("marks.json", replace(marks, floor=now).to_json())

    def _clock_problem(self) -> str | None:
        floor = max(self._build_time, self._marks().floor)
        if self._clock() < floor:
            return f"the clock says {_text(self._clock())}, but {_text(floor)} has passed"
        return None

    def _marks(self) -> Marks:
        try:
            return Marks.parse((self._folder / "marks.json").read_bytes())
        except FileNotFoundError:
            return Marks()
        except ValueError as error:
            # Never half-written by us, so the disk has lost it. A device that refused every
            # update from now on would be worse off than one that relies on its metadata alone.
            _log.error("marks damaged", why=str(error), file=str(self._folder / "marks.json"))
            return Marks()

    def _write(self, name: str, data: bytes) -> None:
        path = self._folder / name
        partial = path.with_suffix(".tmp")
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync(self._folder)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Translate what tuf raises: by code for programs, by sentence for people."""
        try:
            yield
        except ExpiredMetadataError as error:
            floor = max(self._build_time, self._marks().floor)
            raise MetadataRefused(
                "metadata/expired",
                f"{error} by this device's clock, {_text(self._clock())}; the hub was last known to "
                f"say {_text(floor)}. Either the hub has stopped signing or the clock is ahead; "
                "what serves goes on serving",
            ) from None
        except BadVersionNumberError as error:
            raise MetadataRefused("metadata/rollback", str(error)) from None
        except UnsignedMetadataError as error:
            raise MetadataRefused("metadata/unsigned", str(error)) from None
        except LengthOrHashMismatchError as error:
            raise MetadataRefused("metadata/mismatch", str(error)) from None
        except DownloadLengthMismatchError as error:
            raise MetadataRefused("metadata/too-large", str(error)) from None
        except DownloadHTTPError as error:
            raise HubAway("hub/refused", str(error)) from None
        except DownloadError as error:
            raise HubAway("hub/unreachable", str(error)) from None
        except (RepositoryError, ValueError, KeyError, TypeError) as error:
            raise MetadataRefused("metadata/malformed", str(error)) from None


class _Fetcher(FetcherInterface):
    """Lets ngclient ask our hub, with our time-outs, token and authority."""

    def __init__(self, hub: HubFiles) -> None:
        self._hub = hub

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Return at most ``max_length`` bytes. The inherited one goes through a temporary file."""
        data = bytearray()
        with contextlib.closing(self._fetch(url)) as chunks:
            for chunk in chunks:
                data += chunk
                if len(data) > max_length:
                    raise DownloadLengthMismatchError(
                        f"{url}: more than the {max_length} bytes that it may have"
                    )
        return bytes(data)

    def _fetch(self, url: str) -> Generator[bytes, None, None]:
        until = time.monotonic() + MAX_FETCH_S
        try:
            answer = self._hub.open(url)
            try:
                if answer.status != 200:
                    raise DownloadHTTPError(
                        f"{self._hub.url}{url}: HTTP {answer.status}", answer.status
                    )
                while chunk := answer.read():
                    yield chunk
                    if time.monotonic() > until:
                        raise SlowRetrievalError(f"{url}: not complete after {MAX_FETCH_S:.0f} s")
            finally:
                answer.close()
        except LinkBroken as error:
            raise DownloadError(str(error)) from None


class _View:
    """The metadata that ngclient has just verified, read back from where it keeps it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.root = self._read("root", Root)
        self.timestamp = self._read("timestamp", Timestamp)
        self.snapshot = self._read("snapshot", Snapshot)
        self.targets: dict[str, Targets] = {"targets": self._read("targets", Targets)}

    def role_of(self, target: str) -> str | None:
        """Return the first role that the top-level targets role lets sign ``target``."""
        delegations = self.targets["targets"].delegations
        if delegations is None:
            return None
        return next((name for name, _ in delegations.get_roles_for_target(target)), None)

    def add(self, role: str) -> None:
        """Read a delegated role. Call it after ngclient has looked a target of it up."""
        self.targets[role] = self._read(role, Targets)

    def checked(self, marks: Marks, build_time: float) -> Marks:
        """Return the marks raised by what is here.

        Raises:
            MetadataRefused: something is older than what is marked, or expired before the floor.
        """
        seen: list[tuple[str, Signed, Sequence[str]]] = [
            ("root", self.root, self.root.roles["root"].keyids),
            ("timestamp", self.timestamp, self.root.roles["timestamp"].keyids),
            ("snapshot", self.snapshot, self.root.roles["snapshot"].keyids),
            *((role, signed, self._keyids(role)) for role, signed in self.targets.items()),
        ]
        for role, _, keyids in seen:
            marks = marks.under(role, keyids)
        issued = _issued(self.timestamp)
        floor = max(build_time, marks.floor, issued)
        for role, signed, keyids in seen:
            if signed.expires.timestamp() <= floor:
                raise MetadataRefused(
                    "metadata/expired",
                    f"{role} expired at {_text(signed.expires.timestamp())}, and {_text(floor)} has "
                    "certainly passed; the hub has stopped signing, or old metadata is replayed",
                )
            marks = marks.raised(role, signed.version, keyids)
        marks = marks.with_listed({n: meta.version for n, meta in self.snapshot.meta.items()})
        return replace(marks, floor=max(marks.floor, issued))

    def _keyids(self, role: str) -> Sequence[str]:
        if role == "targets":
            return list(self.root.roles["targets"].keyids)
        delegations = self.targets["targets"].delegations
        if delegations is None or delegations.roles is None:
            return []
        return list(delegations.roles[role].keyids)

    def _read(self, role: str, kind: type[Any]) -> Any:
        signed = Metadata[Any].from_bytes((self._folder / f"{role}.json").read_bytes()).signed
        if not isinstance(signed, kind):
            raise RepositoryError(f"{role}.json is of another kind")
        return signed


def _issued(timestamp: Timestamp) -> float:
    """Return when the hub made the timestamp, or 0 if it does not say so."""
    text = timestamp.unrecognized_fields.get(ISSUED)
    if text is None:
        return 0.0
    try:
        issued = datetime.datetime.strptime(text, _TIME).replace(tzinfo=datetime.UTC).timestamp()
    except (ValueError, TypeError):
        raise MetadataRefused(
            "metadata/malformed", f"the timestamp was issued at {text!r}, which is no time"
        ) from None
    if issued > timestamp.expires.timestamp():
        raise MetadataRefused("metadata/malformed", "the timestamp was issued after it expired")
    return issued


@contextlib.contextmanager
def _document_errors(kind: str) -> Iterator[None]:
    try:
        yield
    except DocumentError as error:
        raise DocumentRefused(f"{kind}/malformed", str(error)) from None


def _stamps(folder: Path) -> Mapping[str, tuple[int, int]]:
    """Return what tells a replaced file from the one before, by path."""
    found = {}
    for path in folder.rglob("*.json"):
        status = path.lstat()
        found[str(path)] = (status.st_ino, status.st_mtime_ns)
    return found


def _sync_changed(folder: Path, before: Mapping[str, tuple[int, int]]) -> None:
    changed = [
        Path(path)
        for path, stamp in _stamps(folder).items()
        if before.get(path) != stamp and not Path(path).is_symlink()
    ]
    for path in changed:
        _sync(path)
    for parent in {path.parent for path in changed}:
        _sync(parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _text(seconds: float) -> str:
    # A clock may say anything, also what no calendar can.
    seconds = min(max(seconds, 0.0), 253_402_300_799.0)
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime(_TIME)
