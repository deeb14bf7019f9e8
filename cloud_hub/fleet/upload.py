"""Packs a bundle into one stream, and unpacks what strangers send as one.

The format is tar (ustar), plain or gzip: what ``tar -c`` writes. It is read here and not with
``tarfile``, because an upload is hostile until ``release.read`` has seen it, and what can go
wrong in an archive is a longer list than what a bundle needs: regular files and folders with
plain names. Links, devices, sparse files and names that come in extension headers are refused.
"""

import gzip
import io
import shutil
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

CHUNK_BYTES = 1 << 18
_RECORD = tarfile.BLOCKSIZE
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_HARMLESS = ("mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment")
_MAX_EXTENSION_BYTES = 1 << 16


class UploadRefused(Exception):
    """The stream is not an archive of a bundle. Nothing of it is left."""


class Stream(Protocol):
    """Something bytes can be read from."""

    def read(self, size: int, /) -> bytes:
        """Return at most ``size`` bytes; nothing at the end."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What an upload may hold."""

    total_bytes: int = 8 << 30  # unpacked
    files: int = 4096
    depth: int = 8
    name_bytes: int = 200  # of one part of a path


def pack(directory: Path, into: Stream | io.IOBase) -> None:
    """Write the files below ``directory`` as one plain archive."""
    with tarfile.open(fileobj=into, mode="w|", format=tarfile.USTAR_FORMAT) as archive:  # type: ignore[call-overload]
        for path in sorted(directory.rglob("*")):
            if path.is_file() and not path.is_symlink():
                entry = tarfile.TarInfo(path.relative_to(directory).as_posix())
                entry.size = path.stat().st_size
                entry.mode = 0o644
                with path.open("rb") as file:
                    archive.addfile(entry, file)


def unpack(stream: Stream, into: Path, limits: Limits | None = None) -> Path:
    """Unpack ``stream`` into the new folder ``into`` and return where the bundle begins.

    An archive of a folder and an archive of the folder's content are both accepted.

    Raises:
        UploadRefused: it is not an archive of regular files with plain names, or too large;
            ``into`` is removed again.
        OSError: the disk is full or fails; ``into`` is removed again.
    """
    into.mkdir(parents=True)
    try:
        _Unpacking(_decompressed(stream), into, limits or Limits()).run()
    except BaseException as error:
        shutil.rmtree(into, ignore_errors=True)
        if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
            raise UploadRefused(f"the compressed stream is damaged: {error}") from None
        raise
    children = list(into.iterdir())
    return children[0] if len(children) == 1 and children[0].is_dir() else into


class _Unpacking:
    """One archive on its way to the disk."""

    def __init__(self, stream: Stream, into: Path, limits: Limits) -> None:
        self._stream = stream
        self._into = into
        self._limits = limits
        self._bytes = 0
        self._files = 0

    def run(self) -> None:
        while (header := self._exactly(_RECORD, "a header")).count(0) != _RECORD:
            try:
                entry = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
            except (tarfile.HeaderError, UnicodeDecodeError) as error:
                raise UploadRefused(f"not a tar archive: {error}") from None
            if entry.size < 0:
                raise UploadRefused(f"{entry.name}: a negative size")
            if entry.type in _EXTENSIONS:
                self._check_extension(entry)
            elif entry.isdir():
                self._skip_to_record(entry.size, self._place(entry.name, folder=True))
            elif entry.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                self._file(entry)
            else:
                raise UploadRefused(
                    f"{entry.name!r} is neither a regular file nor a folder; links and long names "
                    "are not accepted (write it with tar --format=ustar)"
                )

    def _file(self, entry: tarfile.TarInfo) -> None:
        self._files += 1
        self._bytes += entry.size
        if self._files > self._limits.files:
            raise UploadRefused(f"more than {self._limits.files} files")
        if self._bytes > self._limits.total_bytes:
            raise UploadRefused(f"more than {self._limits.total_bytes} bytes unpacked")
        path = self._place(entry.name, folder=False)
        left = entry.size
        with path.open("xb") as file:
            while left:
                data = self._exactly(min(CHUNK_BYTES, left), entry.name)
                file.write(data)
                left -= len(data)
        self._exactly(-entry.size % _RECORD, entry.name)

    def _place(self, name: str, *, folder: bool) -> Path:
        parts = [part for part in PurePosixPath(name).parts if part != "."]
        if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
            raise UploadRefused(f"{name!r} is not a plain path inside the archive")
        if len(parts) > self._limits.depth or (not parts and not folder):
            raise UploadRefused(f"{name!r} is no name of a bundle's file")
        if any(len(part.encode()) > self._limits.name_bytes for part in parts):
            raise UploadRefused(f"{name[:80]!r}… is too long")
        path = self._into.joinpath(*parts)
        try:
            (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UploadRefused(f"{name!r} lies inside a file of the same archive") from None
        if not folder and path.exists():
            raise UploadRefused(f"{name!r} comes twice")
        return path

    def _check_extension(self, entry: tarfile.TarInfo) -> None:
        if entry.size > _MAX_EXTENSION_BYTES:
            raise UploadRefused(f"an extension header of {entry.size} bytes")
        data = self._exactly(entry.size, "an extension header")
        self._exactly(-entry.size % _RECORD, "an extension header")
        while data:
            length, _, rest = data.partition(b" ")
            key, _, _ = rest.partition(b"=")
            if not length.isdigit() or int(length) < 5 or key.decode("latin-1") not in _HARMLESS:
                raise UploadRefused(
                    f"the extension header {key[:40].decode('latin-1')!r} is not accepted (write it "
                    "with tar --format=ustar)"
                )
            data = data[int(length) :]

    def _skip_to_record(self, size: int, path: Path) -> None:
        if size:
            raise UploadRefused(f"{path.name}: a folder with content of its own")

    def _exactly(self, size: int, what: str) -> bytes:
        data = b""
        while len(data) < size:
            part = self._stream.read(size - len(data))
            if not part:
                raise UploadRefused(f"the archive ends inside {what}")
            data += part
        return data


class _Replayed:
    """A stream whose first bytes were looked at."""

    def __init__(self, first: bytes, rest: Stream) -> None:
        self._first = first
        self._rest = rest

    def read(self, size: int = -1, /) -> bytes:
        if self._first:
            part, self._first = self._first[:size], self._first[size:]
            return part
        return self._rest.read(size)


def _decompressed(stream: Stream) -> Stream:
    first = b""
    while len(first) < 2 and (part := stream.read(2 - len(first))):
        first += part
    whole = _Replayed(first, stream)
    if first == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=whole, mode="rb")  # type: ignore[call-overload,no-any-return]
    return whole
