"""Keeps answers for requests that come again, bit by bit the same.

Pure: time comes in as a number, nothing here waits. An entry is found only by the tenant whose
request made it, for the same model, version, digest and input bytes; so a new digest needs no
invalidation, and ``keep`` merely frees what can never be found again.

The bound is on real memory: arrays are copied in, because an output may be a few rows of a large
batch that it would hold on to, and what Python adds is counted.
"""

import hashlib
import sys
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from fogline_protocol import tensors
from fogline_protocol.tensors import Array

Arrays = Mapping[str, Array]

# What Python adds, held against the real thing by a test: to an entry its key, its hash and its
# places in the tables, to an output its array and its place among the others.
ENTRY_BYTES = 1100
OUTPUT_BYTES = 300
SWEEP = 256  # entries freed at once: a switch must not hold callers up
# More is hashed in a thread: at the 0.4 to 1 GB/s of a core, it takes up to half a millisecond.
SHORT_BYTES = 256 << 10
_SLOW_ELEMENT_BYTES = 1000  # what a BYTES element costs in time, as if it were so many bytes


class Key(NamedTuple):
    """What must be equal for one answer to stand for another."""

    tenant: str
    model: str
    version: str
    digest: str  # of the model that computes; never empty
    kind: Hashable  # of request parameters that reach the engine
    inputs: bytes  # a hash


@dataclass(frozen=True, slots=True)
class _Entry:
    outputs: Arrays
    size: int
    expires: float
    group: dict[Key, None]  # all that go together, this one included


_Group = tuple[str, str, str]  # model, version, digest


class ResponseCache:
    """Answers of all models, at most ``max_bytes`` together; the one used longest ago goes first."""

    def __init__(self, max_bytes: int, ttl_s: float) -> None:
        self.max_bytes = max_bytes
        self.ttl_s = ttl_s
        self.bytes = 0
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()  # used longest ago first
        self._groups: dict[_Group, dict[Key, None]] = {}
        self._condemned: list[dict[Key, None]] = []  # groups that nobody can ask for any more

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<ResponseCache {len(self)} answers, {self.bytes} of {self.max_bytes} bytes>"

    def get(self, key: Key, now: float) -> Arrays | None:
        """Return the outputs kept for ``key``, or None. They can be read, not written."""
        self._sweep()
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires <= now:
            self._remove(key)
            return None
        self._entries.move_to_end(key)
        return entry.outputs

    def put(self, key: Key, outputs: Arrays, now: float) -> None:
        """Keep a copy of ``outputs`` for ``ttl_s``, unless it alone exceeds the bound."""
        self._sweep()
        if key in self._entries:
            self._remove(key)
        size = size_of(outputs)
        if size > self.max_bytes:
            return
        while self.bytes + size > self.max_bytes:
            if not self._sweep():
                self._remove(next(iter(self._entries)))
        kept = MappingProxyType({name: _copy(array) for name, array in outputs.items()})
        group = self._groups.setdefault(_group(key), {})
        group[key] = None
        self._entries[key] = _Entry(kept, size, now + self.ttl_s, group)
        self.bytes += size

    def keep(self, model: str, served: Mapping[str, str]) -> None:
        """Free what was kept of a model for other versions and digests than ``served`` names.

        A large heap of entries is freed little by little, with the next calls.
        """
        for group in [g for g in self._groups if g[0] == model and served.get(g[1]) != g[2]]:
            self._condemned.append(self._groups.pop(group))
        self._sweep()

    def _sweep(self) -> bool:
        """Free some of what is condemned; return whether there was any."""
        if not self._condemned:
            return False
        for _ in range(SWEEP):
            group = self._condemned[-1]
            if group:
                self._remove(next(iter(group)))
            else:
                self._condemned.pop()
                if not self._condemned:
                    break
        return True

    def _remove(self, key: Key) -> None:
        entry = self._entries.pop(key)
        self.bytes -= entry.size
        del entry.group[key]
        if not entry.group and self._groups.get(_group(key)) is entry.group:
            del self._groups[_group(key)]


def hash_of(inputs: Arrays) -> bytes:
    """Return a hash of names, datatypes, shapes and bytes, in whatever order the tensors came.

    Raises:
        TensorError: the protocol has no datatype for an array.
    """
    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(inputs):
        array = inputs[name]
        # Everything before the bytes says how many follow, so no two requests read the same.
        digest.update(repr((name, tensors.datatype_of(array), array.shape)).encode())
        if array.dtype == tensors.BYTES:
            digest.update(tensors.to_raw(array))
        else:
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.digest()


def is_short(inputs: Arrays) -> bool:
    """Return whether hashing is quick enough for the event loop."""
    work = 0
    for array in inputs.values():
        work += array.size * _SLOW_ELEMENT_BYTES if array.dtype == tensors.BYTES else array.nbytes
    return work <= SHORT_BYTES


def size_of(outputs: Arrays) -> int:
    """Return the memory that a copy of ``outputs`` takes in the cache."""
    size = ENTRY_BYTES
    for name, array in outputs.items():
        size += OUTPUT_BYTES + sys.getsizeof(name) + array.nbytes
        if array.dtype == tensors.BYTES:
            size += sum(sys.getsizeof(element) for element in array.flat)
    return size


def _group(key: Key) -> _Group:
    return key.model, key.version, key.digest


def _copy(array: Array) -> Array:
    copied = array.copy()
    copied.flags.writeable = False
    return copied
