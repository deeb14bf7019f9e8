"""Holds the bytes of releases by digest, and serves them and the signed metadata over HTTP.

    DATA/blobs/sha256/<hex>    one file per content; it is complete or it is not there
    DATA/tuf/metadata          written by trust.py
    DATA/tuf/targets           written by trust.py

A blob's name is the proof of its content, so blobs are never changed, need no database row to
be safe, and may be served to anybody who may see the release: devices trust the signed index,
never the place the bytes came from. A blob that no release names is harmless.

``Disk`` is what every durable write on this side is made of. It is passed in, so that the
tests can cut the power between any two of its operations.
"""

import asyncio
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from fogline_protocol.release_index import FileDigester, IndexedFile

SHA256 = re.compile(r"[0-9a-f]{64}")
CHUNK_BYTES = 1 << 20

MAX_TRANSFERS = 64  # at once; a wave of 10,000 devices is told to come back instead of starving all
RETRY_AFTER_S = 5

_METADATA_FILE = re.compile(r"([0-9]{1,10}\.)?[a-z0-9][a-z0-9-]{0,63}\.json")
_TARGET_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_MAX_TARGET_PARTS = 8
_IMMUTABLE = "public, max-age=31536000, immutable"
_PARTIAL = ".incoming-"


class BlobRefused(Exception):
    """The content is not what it was said to be; the message names file and digests."""


class Disk:
    """The operations a durable write is made of, in the order they are used."""

    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        """Create or replace the content of ``path`` and force it to the disk."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # the file may be left over from a crash
            file.write(data)
            file.flush()
            os.fsync(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Put ``old`` where ``new`` is. It may be undone by a power cut until ``sync``."""
        os.replace(old, new)

    def sync(self, directory: Path) -> None:
        """Make the names in ``directory`` survive a power cut."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_file(disk: Disk, path: Path, data: bytes, mode: int = 0o644) -> None:
    """Give ``path`` a new content, whole or not at all. The caller syncs the directory."""
    partial = path.with_name(f".{path.name}.tmp")
    disk.write(partial, data, mode)
    disk.rename(partial, path)


class Blobs:
    """The content-addressed store below ``DATA/blobs``. One process writes it."""

    def __init__(self, directory: Path, disk: Disk | None = None) -> None:
        self.directory = directory / "sha256"
        self._disk = disk or Disk()
        self.directory.mkdir(parents=True, exist_ok=True)
        for partial in self.directory.glob(f"{_PARTIAL}*"):
            partial.unlink()  # a crash left it; nobody knows it by this name

    def path(self, sha256: str) -> Path:
        """Return where the blob lies or would lie."""
        if not SHA256.fullmatch(sha256):
            raise ValueError(f"{sha256!r} is not a SHA-256")
        return self.directory / sha256

    def put(self, source: Path, sha256: str) -> IndexedFile:
        """Keep a copy of ``source``, durably, and return its block digests.

        The digest is computed over the bytes that were copied, not over what ``source`` was
        when somebody looked at it before. Constant memory; a blob that is here is only read.

        Raises:
            BlobRefused: the bytes do not have this digest.
            OSError: the disk is full or fails. Nothing remains of the attempt.
        """
        final = self.path(sha256)
        if final.is_file():
            indexed = _digests(final)
            if indexed.sha256 == sha256:
                return indexed
            # The disk lost bits since. The copy below replaces it.
        descriptor, name = tempfile.mkstemp(prefix=_PARTIAL, dir=self.directory)
        partial = Path(name)
        try:
            digester = FileDigester()
            with source.open("rb") as read, os.fdopen(descriptor, "wb") as write:
                while chunk := read.read(CHUNK_BYTES):
                    digester.update(chunk)
                    write.write(chunk)
                write.flush()
                os.fchmod(write.fileno(), 0o644)
                os.fsync(write.fileno())
            indexed = digester.finish()
            if indexed.sha256 != sha256:
                raise BlobRefused(f"{source.name}: SHA-256 is {indexed.sha256}, expected {sha256}")
            self._disk.rename(partial, final)
            self._disk.sync(self.directory)
            return indexed
        finally:
            partial.unlink(missing_ok=True)


def routes(
    blobs: Blobs, tuf: Path, *, max_transfers: int = MAX_TRANSFERS
) -> Sequence[web.RouteDef]:
    """Return the routes below which devices find metadata, targets and blobs.

    Who may ask is decided by the application's middleware, for these as for all others.
    """
    transfers = asyncio.Semaphore(max_transfers)

    async def blob(request: web.Request) -> web.StreamResponse:
        sha256 = request.match_info["sha256"]
        if not SHA256.fullmatch(sha256):
            raise web.HTTPNotFound(text="a blob is named by 64 lower-case hexadecimal digits\n")
        path = blobs.path(sha256)
        if not path.is_file():
            raise web.HTTPNotFound(text=f"this hub has no blob {sha256}\n")
        if transfers.locked():
            raise web.HTTPServiceUnavailable(
                text=f"{max_transfers} transfers are under way, come back later\n",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        headers = {"Cache-Control": _IMMUTABLE, "Content-Type": "application/octet-stream"}
        return _Transfer(path, transfers, headers)

    async def metadata(request: web.Request) -> web.StreamResponse:
        name = request.match_info["file"]
        path = tuf / "metadata" / name
        if not _METADATA_FILE.fullmatch(name) or not path.is_file():
            # Devices ask for the next root by its number: "not yet" must never be remembered.
            raise web.HTTPNotFound(text="no such metadata\n", headers={"Cache-Control": "no-store"})
        versioned = name[0].isdigit()
        headers = {"Cache-Control": _IMMUTABLE if versioned else "no-cache"}
        return web.FileResponse(path, headers=headers)

    async def target(request: web.Request) -> web.StreamResponse:
        parts = request.match_info["path"].split("/")
        plain = len(parts) <= _MAX_TARGET_PARTS and all(map(_TARGET_PART.fullmatch, parts))
        path = (tuf / "targets").joinpath(*parts) if plain else None
        if path is None or not path.is_file():
            raise web.HTTPNotFound(text="no such target\n", headers={"Cache-Control": "no-store"})
        return web.FileResponse(path, headers={"Cache-Control": _IMMUTABLE})

    return (
        web.get("/blobs/sha256/{sha256}", blob),
        web.get("/tuf/metadata/{file}", metadata),
        web.get("/tuf/targets/{path:.+}", target),
    )


class _Transfer(web.FileResponse):
    """A file response that holds one place among the transfers while it is sent."""

    def __init__(self, path: Path, transfers: asyncio.Semaphore, headers: dict[str, str]) -> None:
        super().__init__(path, headers=headers)
        self._transfers = transfers

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        async with self._transfers:
            return await super().prepare(request)


def _digests(path: Path) -> IndexedFile:
    digester = FileDigester()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digester.update(chunk)
    return digester.finish()
