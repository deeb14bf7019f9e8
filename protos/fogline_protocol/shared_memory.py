"""Tensors in POSIX shared memory that a caller on this machine has registered.

Regions are read with ``pread`` and written with ``pwrite``, never mapped: the file is the
caller's, who may truncate it at any moment, and a mapping would end this process with SIGBUS
where a short read is a refusal. Each tensor is copied once, as it would be from a socket.

A region is held by its table and by the requests that use it; its file is closed when the
last of them lets go, so unregistering never pulls memory away from a running request.

Source: triton-inference-server/server docs/protocol/extension_shared_memory.md.
"""

import os
import stat
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fogline_protocol import tensors
from fogline_protocol.errors import (
    AlreadyExists,
    BadRequest,
    NotFound,
    Overloaded,
    TooLarge,
    Unavailable,
    Unsupported,
)
from fogline_protocol.tensors import Array, Parameter
from fogline_protocol.v1 import inference_pb2 as pb

REGION = "shared_memory_region"
BYTE_SIZE = "shared_memory_byte_size"
OFFSET = "shared_memory_offset"

OFF = "shared memory is not offered here: start this server with --allow-shared-memory"
NO_CUDA = "CUDA shared memory is not offered by this server: use system shared memory"

MAX_REGIONS = 256  # each keeps a file open, and a process may usually open 1024
MAX_REGION_BYTES = 1 << 32
MAX_NAME_BYTES = 255  # of a file, and of a region as well


@dataclass(frozen=True, slots=True)
class RegionStatus:
    """One registered region: ``byte_size`` bytes from ``offset`` on of the object ``key``."""

    name: str
    key: str
    offset: int
    byte_size: int


class Region:
    """The memory behind a registered region. Open as long as somebody holds it."""

    __slots__ = ("__weakref__", "_descriptor", "status")

    def __init__(self, status: RegionStatus, descriptor: int) -> None:
        self.status = status
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def read(self, offset: int, byte_size: int) -> bytearray:
        """Return a copy of ``byte_size`` bytes from ``offset`` of the region on.

        Raises:
            BadRequest: the caller has made its memory shorter since it was registered.
        """
        found = bytearray(byte_size)
        view = memoryview(found)
        at = 0
        while at < byte_size:
            start = self.status.offset + offset + at
            got = os.preadv(self._descriptor, [view[at:]], start)
            if got == 0:
                raise self._truncated(start)
            at += got
        return found

    def write(self, offset: int, data: memoryview) -> None:
        """Write ``data``, bytes, to ``offset`` of the region.

        Raises:
            BadRequest: the caller has made its memory shorter since it was registered.
            Unavailable: the machine has no memory left to back the region.
        """
        start = self.status.offset + offset
        # pwrite would make the file longer than its owner made it.
        size = os.fstat(self._descriptor).st_size
        if size < start + len(data):
            raise self._truncated(size)
        at = 0
        while at < len(data):
            try:
                at += os.pwrite(self._descriptor, data[at:], start + at)
            except OSError as error:
                raise Unavailable(
                    f"shared memory region {self.status.name!r} cannot be written: {error.strerror}"
                ) from None

    def _truncated(self, end: int) -> BadRequest:
        status = self.status
        return BadRequest(
            f"shared memory region {status.name!r} reaches to byte {status.offset + status.byte_size} "
            f"of {status.key!r}, whose file ends at {end} now: it was made shorter after it was "
            "registered"
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a region one tensor is, or is to be put."""

    region: Region
    offset: int  # within the region
    byte_size: int

    def read(self) -> bytearray:
        """Return a copy of the bytes here; see ``Region.read``."""
        return self.region.read(self.offset, self.byte_size)

    def put(self, output: str, array: Array) -> None:
        """Write an output's tensor here.

        Raises:
            BadRequest: there is not enough room, or the memory was made shorter.
            Unavailable: the machine has no memory left.
        """
        data = tensors.raw_view(array)
        if len(data) > self.byte_size:
            raise BadRequest(
                f"shared memory size specified with the request for output {output!r} "
                f"({self.byte_size} bytes) should be at least {len(data)} bytes to hold the results"
            )
        self.region.write(self.offset, data)


class SharedMemory:
    """The table of registered regions, one for all doors of a server."""

    def __init__(
        self,
        *,
        max_request_bytes: int,
        max_regions: int = MAX_REGIONS,
        max_region_bytes: int = MAX_REGION_BYTES,
        directory: Path = Path("/dev/shm"),
    ) -> None:
        self.max_request_bytes = max_request_bytes  # all inputs of one request together
        self._max_regions = max_regions
        self._max_region_bytes = max_region_bytes
        self._directory = directory
        self._regions: dict[str, Region] = {}

    def register(self, status: RegionStatus) -> None:
        """Take a region into the table.

        Raises:
            BadRequest: an impossible name, key, offset or size, or an object that is shorter.
            AlreadyExists: the name is taken.
            NotFound: there is no such shared memory object.
            Overloaded: the table is full.
        """
        if not 0 < len(status.name.encode(errors="replace")) <= MAX_NAME_BYTES:
            raise BadRequest(
                f"the name of a region has 1 to {MAX_NAME_BYTES} bytes, got {status.name!r}"
            )
        if status.name in self._regions:
            raise AlreadyExists(
                f"shared memory region {status.name!r} is registered already: unregister it first"
            )
        if not 0 < status.byte_size <= self._max_region_bytes:
            raise BadRequest(
                f"shared memory region {status.name!r}: byte_size must lie between 1 and "
                f"{self._max_region_bytes}, got {status.byte_size}"
            )
        if status.offset < 0:
            raise BadRequest(
                f"shared memory region {status.name!r}: offset must be at least 0, got {status.offset}"
            )
        if len(self._regions) >= self._max_regions:
            raise Overloaded(
                f"{self._max_regions} shared memory regions are registered, the limit: unregister "
                "those that are done with"
            )
        self._regions[status.name] = Region(status, self._open(status))

    def _open(self, status: RegionStatus) -> int:
        """Return a descriptor of the object, which reaches as far as the region does."""
        name = status.key.removeprefix("/")
        # The rule of shm_open(3), which would not keep a slash in the middle out everywhere.
        if (
            "/" in name
            or "\0" in name
            or name in ("", ".", "..")
            or len(name.encode(errors="replace")) > MAX_NAME_BYTES
        ):
            raise BadRequest(
                f"shared memory key {status.key!r} is no name of a POSIX shared memory object: one "
                f"part of 1 to {MAX_NAME_BYTES} bytes, with or without a slash before it"
            )
        try:
            descriptor = os.open(
                self._directory / name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            )
        except FileNotFoundError:
            raise NotFound(
                f"there is no shared memory object {status.key!r} on this machine: create it "
                "before it is registered (and share /dev/shm between containers)"
            ) from None
        except (OSError, UnicodeEncodeError) as error:
            reason = getattr(error, "strerror", None) or "not a name"
            raise BadRequest(
                f"shared memory key {status.key!r} cannot be opened: {reason}"
            ) from None
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise BadRequest(f"shared memory key {status.key!r} is no shared memory object")
            if status.offset + status.byte_size > found.st_size:
                raise BadRequest(
                    f"shared memory region {status.name!r} would reach to byte "
                    f"{status.offset + status.byte_size} of {status.key!r}, which has "
                    f"{found.st_size} bytes"
                )
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def unregister(self, name: str) -> None:
        """Take a region out of the table, or all of them if ``name`` is empty.

        As in Triton a name that is not there is no error. Requests in flight keep what they use.
        """
        if name:
            self._regions.pop(name, None)
        else:
            self._regions.clear()

    def status(self, name: str) -> Sequence[RegionStatus]:
        """Return a region, or all of them if ``name`` is empty.

        Raises:
            NotFound: there is no such region.
        """
        return [self._find(name).status] if name else [r.status for r in self._regions.values()]

    def place(self, tensor: str, parameters: Mapping[str, Parameter]) -> Place | None:
        """Return where a tensor is by its own parameters, or None if it is not in a region.

        Raises:
            BadRequest: parameters that contradict each other or reach beyond the region.
            NotFound: the region is not registered.
        """
        if not mentioned(parameters):
            return None
        region, size = parameters.get(REGION), parameters.get(BYTE_SIZE)
        offset = parameters.get(OFFSET, 0)
        if not isinstance(region, str) or not region or size is None:
            raise BadRequest(
                f"tensor {tensor!r}: {REGION!r}, a name, and {BYTE_SIZE!r} belong together, "
                f"got {region!r} and {size!r}"
            )
        for key, value in ((BYTE_SIZE, size), (OFFSET, offset)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise BadRequest(
                    f"tensor {tensor!r}: {key!r} must be a number of bytes, got {value!r}"
                )
        assert isinstance(size, int)
        assert isinstance(offset, int)
        found = self._find(region)
        if offset + size > found.status.byte_size:
            raise BadRequest(
                f"tensor {tensor!r}: {size} bytes at offset {offset} reach beyond shared memory "
                f"region {region!r}, which has {found.status.byte_size} bytes"
            )
        return Place(found, offset, size)

    def _find(self, name: str) -> Region:
        try:
            return self._regions[name]
        except KeyError:
            raise NotFound(
                f"unable to find system shared memory region {name!r}: it is not registered"
            ) from None


class Inputs:
    """The inputs of one request that are in shared memory, and how much they are together."""

    __slots__ = ("_left", "_shared")

    def __init__(self, shared: SharedMemory | None) -> None:
        self._shared = shared
        self._left = 0 if shared is None else shared.max_request_bytes

    def read(self, tensor: str, parameters: Mapping[str, Parameter]) -> bytearray | None:
        """Return a copy of an input's bytes, or None if it is not in shared memory.

        Raises:
            InferenceError: see ``find`` and ``Region.read``.
            TooLarge: the inputs are more than one request may bring.
        """
        place = find(self._shared, tensor, parameters)
        if place is None or self._shared is None:
            return None
        if place.byte_size > self._left:
            raise TooLarge(
                f"the inputs in shared memory are larger than {self._shared.max_request_bytes} "
                "bytes, the limit of one request (--max-message-bytes)"
            )
        self._left -= place.byte_size
        return place.read()


def find(
    shared: SharedMemory | None, tensor: str, parameters: Mapping[str, Parameter]
) -> Place | None:
    """Return where a tensor is, or None if it is not in shared memory.

    Raises:
        Unsupported: it is, and shared memory is not offered.
        InferenceError: see ``SharedMemory.place``.
    """
    if not mentioned(parameters):
        return None
    if shared is None:
        raise Unsupported(f"tensor {tensor!r}: {OFF}")
    return shared.place(tensor, parameters)


def mentioned(parameters: Mapping[str, Any]) -> bool:
    """Return whether a tensor's parameters say anything of shared memory."""
    return bool(parameters) and (
        REGION in parameters or BYTE_SIZE in parameters or OFFSET in parameters
    )


def encode_status(regions: Sequence[RegionStatus]) -> bytes:
    """Return the regions as a ``SystemSharedMemoryStatusResponse``."""
    message = pb.SystemSharedMemoryStatusResponse()
    for region in regions:
        found = message.regions[region.name]
        found.name, found.key = region.name, region.key
        found.offset, found.byte_size = region.offset, region.byte_size
    return message.SerializeToString()


def status_document(regions: Sequence[RegionStatus]) -> Sequence[Mapping[str, Any]]:
    """Return the regions as a JSON-ready document."""
    return [
        {"name": r.name, "key": r.key, "offset": r.offset, "byte_size": r.byte_size}
        for r in regions
    ]
