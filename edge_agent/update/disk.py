"""The operations on files that the order of writes in ``slots.py`` is made of, and nothing else.

They are few so that a model of a disk can offer the same ones, forget at will what was not
synced, and show every state that a power cut can leave. Both pass the same contract test.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(Exception):
    """The disk has no room for what was to be written. Nothing half-written was left."""

    code = "disk/full"


class DiskFault(Exception):
    """The disk failed. What was written before is still there, as far as the disk knows."""

    code = "disk/fault"


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a folder."""

    name: str
    is_folder: bool
    links: int  # names that a file has; 1 for one that only this name keeps


class Disk(Protocol):
    """The operations on files that the protocol is made of. Paths are relative, with slashes.

    All raise ``OSError`` as the operating system does. Nothing is durable before ``sync``: of a
    file for its content, of a folder for the names in it.
    """

    def read(self, path: str) -> bytes:
        """Return the content of a file."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Create a file, or replace its content."""
        ...

    def sync(self, path: str) -> None:
        """Make the content of a file, or the names in a folder ("" is the root), durable."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Give a file or folder another name in the same folder; a file may replace a file."""
        ...

    def link(self, old: str, new: str) -> None:
        """Give a file a second name."""
        ...

    def unlink(self, path: str) -> None:
        """Remove a name of a file."""
        ...

    def make_folder(self, path: str) -> None:
        """Create an empty folder."""
        ...

    def remove_folder(self, path: str) -> None:
        """Remove an empty folder."""
        ...

    def entries(self, path: str) -> tuple[Entry, ...]:
        """Return what a folder holds, by name."""
        ...


class LocalDisk:
    """The folder ``root`` of a real file system."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, path: str) -> bytes:
        """Return the content of a file."""
        return (self.root / path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        """Create a file, or replace its content."""
        (self.root / path).write_bytes(data)

    def sync(self, path: str) -> None:
        """Fsync a file or folder. Linux flushes through a descriptor that can only read, too."""
        handle = os.open(self.root / path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, old: str, new: str) -> None:
        """Give a file or folder another name in the same folder; a file may replace a file."""
        if folder_of(old) != folder_of(new):
            raise OSError(errno.EXDEV, "renames stay in one folder, to be one change", old)
        os.rename(self.root / old, self.root / new)

    def link(self, old: str, new: str) -> None:
        """Give a file a second name."""
        os.link(self.root / old, self.root / new, follow_symlinks=False)

    def unlink(self, path: str) -> None:
        """Remove a name of a file."""
        os.unlink(self.root / path)

    def make_folder(self, path: str) -> None:
        """Create an empty folder."""
        os.mkdir(self.root / path)

    def remove_folder(self, path: str) -> None:
        """Remove an empty folder."""
        os.rmdir(self.root / path)

    def entries(self, path: str) -> tuple[Entry, ...]:
        """Return what a folder holds, by name. A link to a folder is no folder."""
        with os.scandir(self.root / path) as found:
            return tuple(
                sorted(
                    (
                        Entry(
                            e.name,
                            e.is_dir(follow_symlinks=False),
                            e.stat(follow_symlinks=False).st_nlink,
                        )
                        for e in found
                    ),
                    key=lambda entry: entry.name,
                )
            )


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Translate the operating system's errors into the two that callers tell apart."""
    try:
        yield
    except OSError as error:
        where = error.filename or "the disk"
        if error.errno in _FULL:
            raise DiskFull(f"{where}: no space is left on the device") from error
        raise DiskFault(f"{where}: {error.strerror or error}") from error


def folder_of(path: str) -> str:
    """Return the folder that holds ``path``; "" is the root."""
    return path.rpartition("/")[0]
