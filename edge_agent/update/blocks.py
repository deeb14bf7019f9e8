"""What a device has of a file: which blocks are here and right, and where others may be found.

``Growing`` is one ``<name>.part`` on the disk. It decides which bytes are still missing, takes
bytes from wherever they come, and writes a block only after its digest was checked. It neither
asks nor waits for anything: that is ``download.py``.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from edge_agent.update.lifecycle import StepFailed, StepInterrupted, StepRefused
from fogline_protocol.release_index import BLOCK_BYTES, IndexedFile

Progress = Callable[[int, int], None]  # bytes here, bytes in all
Find = Callable[[str, int], bytes | None]  # (SHA-256, length) -> a block this device has


class LocalBlocks:
    """Finds blocks in files that are on this device anyway: other releases, earlier attempts.

    The folders are read once, when the first block is looked for. What is returned is not
    trusted: whoever asks checks the digest.
    """

    def __init__(self, folders: Sequence[Path], block_bytes: int = BLOCK_BYTES) -> None:
        self._folders = folders
        self._block_bytes = block_bytes
        self._where: dict[bytes, tuple[Path, int]] | None = None

    def __call__(self, sha256: str, length: int) -> bytes | None:
        """Return ``length`` bytes that had this digest when they were last seen, or None."""
        if self._where is None:
            self._where = dict(self._scan())
        place = self._where.get(bytes.fromhex(sha256))
        if place is None:
            return None
        try:
            with place[0].open("rb") as file:
                file.seek(place[1])
                return file.read(length)
        except OSError:
            return None  # collected meanwhile

    def _scan(self) -> Iterator[tuple[bytes, tuple[Path, int]]]:
        for top in self._folders:
            for folder, _, names in os.walk(top):
                for name in names:
                    path = Path(folder, name)
                    with contextlib.suppress(OSError):
                        if stat.S_ISREG(path.lstat().st_mode):
                            yield from self._blocks(path)

    def _blocks(self, path: Path) -> Iterator[tuple[bytes, tuple[Path, int]]]:
        offset = 0
        with path.open("rb") as file:
            while block := file.read(self._block_bytes):
                yield hashlib.sha256(block).digest(), (path, offset)
                offset += len(block)


def nowhere(sha256: str, length: int) -> bytes | None:
    """Find no block: a device without other releases."""
    return None


class Stop(Protocol):
    """Tells a download to end. ``threading.Event`` is one."""

    def is_set(self) -> bool:
        """Return whether it should end."""
        ...

    def wait(self, timeout: float) -> bool:
        """Wait for at most ``timeout`` seconds; return whether it should end."""
        ...


@dataclass(slots=True)
class Transferred:
    """What a download cost. ``present`` and ``copied`` did not travel."""

    present: int = 0  # bytes that were here
    copied: int = 0  # bytes copied from other local files
    received: int = 0  # bytes of bodies that came over the link
    requests: int = 0


@dataclass(slots=True)
class Job:
    """One call of ``fetch_now``."""

    stop: Stop
    progress: Progress
    find: Find
    total: int
    buffer: bytearray  # for the block that is being received; as long as a block
    done: int = 0
    transferred: Transferred = field(default_factory=Transferred)

    def add(self, amount: int) -> None:
        """Count bytes that are here and right."""
        self.done += amount
        self.progress(self.done, self.total)


class Growing:
    """A file of which some blocks are here. Bytes arrive in order from ``at`` on."""

    def __init__(
        self,
        descriptor: int,
        name: str,
        file: IndexedFile,
        job: Job,
        *,
        block_tries: int,
        sync_bytes: int,
    ) -> None:
        """Look at nothing yet.

        Args:
            descriptor: of the open part; the caller's to close.
            name: of the file, for what people are told.
            file: what it has to become.
            job: the download it belongs to.
            block_tries: wrong digests of one block before the attempt has failed.
            sync_bytes: written between two fsyncs.
        """
        self.name = name
        self.file = file
        self._descriptor = descriptor
        self._job = job
        self._block_tries = block_tries
        self._sync_bytes = sync_bytes
        self._block_bytes = len(job.buffer)
        self._here = bytearray(len(file.blocks))  # 1: the block is on the disk and right
        self._wrong: dict[int, int] = {}  # wrong digests by block
        self._position = 0  # in the file, of the next byte to arrive
        self._block = -1  # whose beginning is in the buffer
        self._filled = 0  # bytes of it
        self._unsynced = 0

    @property
    def arrived(self) -> int:
        """How many bytes need not be asked for any more, as far as is known."""
        return self._here.count(1) * self._block_bytes + self._filled

    def keep_what_is_here(self) -> None:
        """Find the blocks that an earlier attempt has written."""
        size = os.fstat(self._descriptor).st_size
        for number, expected in enumerate(self.file.blocks):
            offset, length = self._extent(number)
            if self._job.stop.is_set():
                raise stopped()
            if offset + length <= size and _sha256(self._read(offset, length)) == expected:
                self._have(number)
                self._job.transferred.present += length

    def copy_what_is_near(self) -> None:
        """Copy the blocks that other local files hold."""
        for number, expected in enumerate(self.file.blocks):
            if self._here[number]:
                continue
            if self._job.stop.is_set():
                raise stopped()
            offset, length = self._extent(number)
            found = self._job.find(expected, length)
            if found is not None and len(found) == length and _sha256(found) == expected:
                self._write(offset, found)
                self._have(number)
                self._job.transferred.copied += length

    def missing(self) -> tuple[int, int] | None:
        """Return first byte and end of the first run of missing blocks, or None."""
        first = self._here.find(0)
        if first < 0:
            return None
        behind = self._here.find(1, first)
        last = (len(self._here) if behind < 0 else behind) - 1
        offset, length = self._extent(last)
        begin = self._extent(first)[0] + (self._filled if self._block == first else 0)
        return begin, offset + length

    def at(self, position: int) -> None:
        """Take note that the next byte to arrive is the one at ``position``."""
        self._position = position
        number = position // self._block_bytes
        if number != self._block or position != self._extent(number)[0] + self._filled:
            self._block, self._filled = -1, 0

    def reached(self, end: int) -> bool:
        """Return whether the bytes before ``end`` have arrived."""
        return self._position >= end

    def feed(self, chunk: bytes) -> int:
        """Take bytes that arrived; return how many blocks they completed with a wrong digest.

        Raises:
            StepFailed: one block has now been wrong too often.
        """
        wrong = 0
        view = memoryview(chunk)
        while view and self._position < self.file.bytes:
            number = self._position // self._block_bytes
            offset, length = self._extent(number)
            inside = self._position - offset
            part = view[: length - inside]
            if not self._here[number]:
                if inside == 0:
                    self._block, self._filled = number, 0
                if self._block == number:
                    self._job.buffer[inside : inside + len(part)] = part
                    self._filled += len(part)
                    if self._filled == length:
                        wrong += self._complete(number)
            self._position += len(part)
            view = view[len(part) :]
        return wrong

    def check_whole(self) -> None:
        """Check the digest of the whole file; its blocks are right already.

        Raises:
            StepRefused: the index names blocks that do not make up the file.
        """
        if len(self.file.blocks) == 1:
            return  # the block is the file
        digest = hashlib.sha256()
        for number in range(len(self.file.blocks)):
            if self._job.stop.is_set():
                raise stopped()
            digest.update(self._read(*self._extent(number)))
        if digest.hexdigest() != self.file.sha256:
            raise StepRefused(
                "index/contradiction",
                f"{self.name}: every block has the digest of the signed index, yet the whole has "
                f"{digest.hexdigest()} and not {self.file.sha256}; the hub must publish it again",
            )

    def _complete(self, number: int) -> int:
        block = memoryview(self._job.buffer)[: self._filled]
        self._block, self._filled = -1, 0
        if _sha256(block) == self.file.blocks[number]:
            self._write(self._extent(number)[0], block)
            self._have(number)
            return 0
        self._wrong[number] = self._wrong.get(number, 0) + 1
        if self._wrong[number] >= self._block_tries:
            raise StepFailed(
                "download/block",
                f"{self.name}: block {number} came {self._wrong[number]} times with a digest that is "
                "not the one in the signed index; the hub's copy or the way to it is damaged",
            )
        return 1

    def _have(self, number: int) -> None:
        self._here[number] = 1
        self._job.add(self._extent(number)[1])

    def _extent(self, number: int) -> tuple[int, int]:
        offset = number * self._block_bytes
        return offset, min(self._block_bytes, self.file.bytes - offset)

    def _read(self, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            offset += written
            view = view[written:]
        self._unsynced += len(data)
        if self._unsynced >= self._sync_bytes:
            os.fdatasync(self._descriptor)
            self._unsynced = 0


def stopped() -> StepInterrupted:
    """Return what a download that was told to end ends with."""
    return StepInterrupted("download/stopped", "the download was stopped; what is here stays")


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
