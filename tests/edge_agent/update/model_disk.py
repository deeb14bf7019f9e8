"""A disk in memory that shows every state a power cut can leave.

What is written is volatile until the file is synced: a crash leaves the old content, none, half
or all of the new one. Names are volatile until their folder is synced: of the changes since,
any subset may survive, in no order; a rename is one change. This is harsher than journaling
file systems are, and as harsh as POSIX allows.
"""

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Union

from edge_agent.update.disk import Entry, folder_of


@dataclass(eq=False)
class _File:
    content: bytes = b""
    durable: bytes = b""
    links: int = 0

    def survivors(self) -> set[bytes]:
        if self.content == self.durable:
            return {self.content}
        return {self.durable, b"", self.content[: len(self.content) // 2], self.content}


@dataclass(eq=False)
class _Folder:
    names: "dict[str, _Node]" = field(default_factory=dict)
    durable: "dict[str, _Node]" = field(default_factory=dict)
    changes: "list[dict[str, _Node | None]]" = field(default_factory=list)  # since the last sync

    def change(self, what: "dict[str, _Node | None]") -> None:
        self.changes.append(what)
        _apply(self.names, what)

    def survivors(self) -> "Iterator[dict[str, _Node]]":
        for kept in itertools.product((False, True), repeat=len(self.changes)):
            names = dict(self.durable)
            for keep, change in zip(kept, self.changes, strict=True):
                if keep:
                    _apply(names, change)
            yield names


_Node = _File | _Folder

# A folder is its names with what they stand for; a file is its identity and its content.
Image = Union["frozenset[tuple[str, Image]]", tuple[int, bytes]]


def _apply(names: dict[str, _Node], change: "dict[str, _Node | None]") -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class ModelDisk:
    """A ``Disk`` with room for ``capacity`` bytes, which calls ``after`` with every change."""

    def __init__(
        self,
        *,
        after: Callable[[str, str], None] = lambda operation, path: None,
        forget: Callable[[str], bool] = lambda path: False,
        capacity: int = 1 << 40,
    ) -> None:
        self._root = _Folder()
        self.after = after
        self.forget = forget  # paths whose syncs do nothing
        self.capacity = capacity

    @classmethod
    def booted(cls, image: Image) -> "ModelDisk":
        """Return a disk that holds ``image``, all of it durable."""
        disk = cls()
        files: dict[int, _File] = {}

        def folder(names: Image) -> _Folder:
            node = _Folder()
            assert isinstance(names, frozenset)
            for name, child in names:
                if isinstance(child, frozenset):
                    node.names[name] = folder(child)
                else:
                    identity, content = child
                    file = files.setdefault(identity, _File(content, content))
                    file.links += 1
                    node.names[name] = file
            node.durable = dict(node.names)
            return node

        disk._root = folder(image)
        return disk

    def crashes(self) -> set[Image]:
        """Return every image of the disk that a power cut now can leave."""
        known: dict[int, set[Image]] = {}

        def images(node: _Node) -> set[Image]:
            if id(node) not in known:
                found: set[Image] = set()
                if isinstance(node, _File):
                    found.update((id(node), content) for content in node.survivors())
                else:
                    for names in node.survivors():
                        for children in itertools.product(*(images(n) for n in names.values())):
                            found.add(frozenset(zip(names, children, strict=True)))
                known[id(node)] = found
            return known[id(node)]

        return images(self._root)

    def read(self, path: str) -> bytes:
        return self._file(path).content

    def write(self, path: str, data: bytes) -> None:
        folder, name = self._parent(path)
        node = folder.names.get(name)
        if isinstance(node, _Folder):
            raise _error(errno.EISDIR, path)
        used = self._used() - (len(node.content) if node else 0)
        fits = max(0, self.capacity - used)
        if node is None:
            node = _File(links=1)
            folder.change({name: node})
        node.content = data[:fits]  # a full disk takes what it can, as the real one does
        self.after("write", path)
        if len(data) > fits:
            raise _error(errno.ENOSPC, path)

    def sync(self, path: str) -> None:
        node = self._node(path)
        if not self.forget(path):
            if isinstance(node, _File):
                node.durable = node.content
            else:
                node.durable, node.changes = dict(node.names), []
        self.after("sync", path)

    def rename(self, old: str, new: str) -> None:
        if folder_of(old) != folder_of(new):
            raise _error(errno.EXDEV, old)
        folder, name = self._parent(old)
        node = self._node(old)
        at = folder.names.get(new.rpartition("/")[2])
        if isinstance(at, _Folder) and (isinstance(node, _File) or at.names):
            raise _error(errno.EISDIR if isinstance(node, _File) else errno.ENOTEMPTY, new)
        if isinstance(at, _File) and isinstance(node, _Folder):
            raise _error(errno.ENOTDIR, new)
        if isinstance(at, _File):
            at.links -= 1
        folder.change({name: None, new.rpartition("/")[2]: node})
        self.after("rename", new)

    def link(self, old: str, new: str) -> None:
        node = self._file(old)
        folder, name = self._parent(new)
        if name in folder.names:
            raise _error(errno.EEXIST, new)
        node.links += 1
        folder.change({name: node})
        self.after("link", new)

    def unlink(self, path: str) -> None:
        node = self._file(path)
        folder, name = self._parent(path)
        node.links -= 1
        folder.change({name: None})
        self.after("unlink", path)

    def make_folder(self, path: str) -> None:
        folder, name = self._parent(path)
        if name in folder.names:
            raise _error(errno.EEXIST, path)
        folder.change({name: _Folder()})
        self.after("make_folder", path)

    def remove_folder(self, path: str) -> None:
        node = self._node(path)
        if isinstance(node, _File):
            raise _error(errno.ENOTDIR, path)
        if node.names:
            raise _error(errno.ENOTEMPTY, path)
        folder, name = self._parent(path)
        folder.change({name: None})
        self.after("remove_folder", path)

    def entries(self, path: str) -> tuple[Entry, ...]:
        node = self._node(path)
        if isinstance(node, _File):
            raise _error(errno.ENOTDIR, path)
        return tuple(
            Entry(name, isinstance(n, _Folder), n.links if isinstance(n, _File) else 2)
            for name, n in sorted(node.names.items())
        )

    def _used(self) -> int:
        seen: dict[int, int] = {}

        def walk(node: _Node) -> None:
            if isinstance(node, _File):
                seen[id(node)] = len(node.content)
            else:
                for child in node.names.values():
                    walk(child)

        walk(self._root)
        return sum(seen.values())

    def _node(self, path: str) -> _Node:
        node: _Node = self._root
        for name in path.split("/") if path else ():
            if isinstance(node, _File):
                raise _error(errno.ENOTDIR, path)
            if name not in node.names:
                raise _error(errno.ENOENT, path)
            node = node.names[name]
        return node

    def _file(self, path: str) -> _File:
        node = self._node(path)
        if isinstance(node, _Folder):
            raise _error(errno.EISDIR, path)
        return node

    def _parent(self, path: str) -> tuple[_Folder, str]:
        node = self._node(folder_of(path))
        if isinstance(node, _File):
            raise _error(errno.ENOTDIR, path)
        return node, path.rpartition("/")[2]


def _error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)
