"""The inputs of examples on the disk: one file per content, named by its SHA-256.

    DATA/examples/<group>/<sha256>     a group is one tenant's one model: nobody shares a file

A file appears under its name by a rename of what was written whole, so a killed hub leaves no half
of one. It is not forced to the disk: an example is one of many, and a power cut that takes the
last seconds of them is found when they are read, because the name proves the content.
"""

import contextlib
import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from cloud_hub.insight import example_codec
from cloud_hub.insight.example_codec import ExampleDamaged

BLOCK_BYTES = 4096  # what the smallest file takes of a disk


class Group(NamedTuple):
    """Whose examples they are, and of which device model."""

    tenant: str
    model: str

    @property
    def folder(self) -> str:
        """The name of its folder; a tenant may be called anything."""
        return _folder(self)


@functools.lru_cache(256)
def _folder(group: Group) -> str:
    return hashlib.sha256(repr(tuple(group)).encode()).hexdigest()[:32]


def write_file(path: Path, data: bytes) -> None:
    """Give a file the content ``data``."""
    with path.open("wb") as file:
        file.write(data)


class ExampleFiles:
    """The files below one directory. One process writes them."""

    def __init__(self, directory: Path, write: Callable[[Path, bytes], None] = write_file) -> None:
        """Keep files in ``directory``; tests give a ``write`` whose disk is full."""
        self.directory = directory
        self._write = write
        self._made: set[Group] = set()  # whose folders are there for certain

    def put(self, group: Group, sha256: str, data: bytes) -> None:
        """Keep ``data`` under its name; what is there already stays.

        Raises:
            OSError: the disk is full or fails. Nothing remains of the attempt.
        """
        path = self._path(group, sha256)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size == len(data):
                return  # a shorter one was cut by a power cut
        if group not in self._made:
            # What devices sent is nobody's to read but ours.
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.parent.mkdir(exist_ok=True)
            self._made.add(group)
        partial = path.with_name(f".{sha256}")
        try:
            self._write(partial, data)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def read(self, group: Group, sha256: str) -> bytes:
        """Return the content of that name.

        Raises:
            ExampleDamaged: it is gone, or is not what its name says.
            OSError: the disk fails.
        """
        try:
            data = self._path(group, sha256).read_bytes()
        except FileNotFoundError:
            raise ExampleDamaged(f"{sha256} is gone") from None
        if example_codec.sha256_of(data) != sha256:
            raise ExampleDamaged(f"{sha256} is not what its name says")
        return data

    def remove(self, group: Group, names: Collection[str]) -> None:
        """Delete files, those that are gone already among them."""
        for sha256 in names:
            self._path(group, sha256).unlink(missing_ok=True)

    def groups(self) -> Iterator[str]:
        """Return the folders that there are."""
        if self.directory.is_dir():
            with os.scandir(self.directory) as entries:
                yield from (entry.name for entry in entries if entry.is_dir())

    def sweep(self, folder: str, known: Collection[str]) -> int:
        """Delete what is not ``known`` from a group's folder, and the folder if it is empty.

        That is what a kill left between a file and its row.
        """
        path, removed = self.directory / folder, 0
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name not in known:
                    Path(entry.path).unlink()
                    removed += 1
        if not known:
            shutil.rmtree(path, ignore_errors=True)
            self._made.clear()
        return removed

    def _path(self, group: Group, sha256: str) -> Path:
        return self.directory / group.folder / sha256


def on_disk(size: int) -> int:
    """Return how much of the disk a file of ``size`` bytes takes."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
