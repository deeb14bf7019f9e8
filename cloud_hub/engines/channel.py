"""Exchanges documents with arrays between two processes of this hub.

The document travels as one datagram; the arrays lie in memory that both ends map, so each is
copied once, by whoever sends it. Each end owns the memory that it writes. It grows when a
message needs more, and the new descriptor travels with that message. A sender that has to join
arrays anyway joins them there.

    sender: copy arrays into own memory ─ datagram {document, where they lie} ─► receiver: views

The ends take turns: the arrays of a message are valid until its receiver answers. Both ends are
the same version of the same program, so what arrives is believed.
"""

import array
import fcntl
import json
import math
import mmap
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cloud_hub.engines.engine import Arrays
from fogline_protocol import tensors
from fogline_protocol.tensors import Array

Document = Mapping[str, Any]
Message = tuple[dict[str, Any], dict[str, Array]]
# Name, datatype, shape, and where the bytes lie: offset and length.
_Place = tuple[str, str, tuple[int, ...], int, int]

MAX_DATAGRAM = 128 << 10  # below the kernel's default of 208 KiB for a socket
ALIGNMENT = 64  # of every array: a cache line, and what vector instructions like
SMALLEST = 1 << 16
# Memory that can neither shrink nor grow: reading it can never fault.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


_NOTHING: Array = np.empty(0, np.uint8)


class Gone(Exception):
    """The other end has closed, or its process has ended."""


class Channel:
    """One end. ``pair`` makes both; ``fileno`` is readable when there is something to receive."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._memory = _NOTHING  # ours, which we write
        self._unsent: list[int] = []  # its descriptor, until the other end has it
        self._joined: tuple[Arrays, list[_Place]] | None = None  # what lies in it already
        self._theirs: mmap.mmap | None = None

    @classmethod
    def pair(cls) -> tuple["Channel", socket.socket]:
        """Return an end for this process and a socket to make the other one of, in a child."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), theirs

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._socket.fileno()

    def send(self, document: Document, arrays: Arrays | None = None) -> None:
        """Send a document and arrays; what the other end sent before is valid no longer.

        Raises:
            Gone: nobody is there to receive it.
            TensorError: the protocol has no datatype for an array.
        """
        if self._joined is not None and arrays is self._joined[0]:
            places = self._joined[1]
        else:
            places = self._write(arrays or {})
        self._joined = None
        message = json.dumps([document, places]).encode()
        descriptors, self._unsent = self._unsent, []
        ancillary = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
            if descriptors
            else []
        )
        try:
            self._socket.sendmsg([message], ancillary)
        except OSError as error:
            raise Gone(str(error)) from None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def join(self, requests: Sequence[Arrays]) -> Arrays:
        """Join arrays along their first axis where they are sent from: so ``send`` copies nothing.

        What the other end sent before is valid no longer, nor is what was joined before. All have
        the same names, types but BYTES, and shapes but for the first axis.

        Raises:
            TensorError: the protocol has no datatype for an array.
        """
        places: list[_Place] = []
        end = 0
        for name, first in requests[0].items():
            rows = sum(len(request[name]) for request in requests)
            shape = (rows, *first.shape[1:])
            length = math.prod(shape) * first.itemsize
            places.append((name, tensors.datatype_of(first), shape, end, length))
            end += _aligned(length)
        self._make_room(end)
        joined = {}
        for name, _, shape, offset, length in places:
            room = self._memory[offset : offset + length].view(requests[0][name].dtype)
            joined[name] = np.concatenate(
                [request[name] for request in requests], out=room.reshape(shape)
            )
        self._joined = joined, places
        return joined

    def receive(self) -> Message:
        """Return the next document and views of its arrays; waits for it if need be.

        Raises:
            Gone: the other end has closed.
        """
        try:
            message, descriptors, _, _ = socket.recv_fds(self._socket, MAX_DATAGRAM, 1)
        except OSError as error:
            raise Gone(str(error)) from None
        if not message:
            raise Gone("the other end has closed")
        for descriptor in descriptors:
            self._theirs = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
            os.close(descriptor)
        document, places = json.loads(message)
        memory = memoryview(self._theirs or b"")
        return document, {
            name: tensors.from_raw(datatype, shape, memory[offset : offset + length])
            for name, datatype, shape, offset, length in places
        }

    def close(self) -> None:
        """Close this end. Memory goes when its last view does."""
        self._socket.close()
        self._memory, self._theirs, self._joined = _NOTHING, None, None
        self._forget()

    def _write(self, arrays: Arrays) -> list[_Place]:
        """Copy arrays into our memory and return where they lie."""
        places: list[_Place] = []
        parts: list[Array] = []
        end = 0
        for name, values in arrays.items():
            part = _bytes_of(values)
            places.append((name, tensors.datatype_of(values), values.shape, end, len(part)))
            parts.append(part)
            end += _aligned(len(part))
        self._make_room(end)
        for part, (_, _, _, offset, length) in zip(parts, places, strict=True):
            if length:
                self._memory[offset : offset + length] = part
        return places

    def _make_room(self, size: int) -> None:
        """Have at least ``size`` bytes; new ones are passed on with the next message."""
        if len(self._memory) >= size:
            return
        room = max(SMALLEST, 1 << (size - 1).bit_length())
        descriptor = os.memfd_create("fogline-tensors", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, room)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            self._memory = np.frombuffer(mmap.mmap(descriptor, room), np.uint8)
        except BaseException:
            os.close(descriptor)
            raise
        self._forget()  # memory that the other end has not heard of, it need not
        self._unsent = [descriptor]

    def _forget(self) -> None:
        for descriptor in self._unsent:
            os.close(descriptor)
        self._unsent = []


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def _bytes_of(values: Array) -> Array:
    """Return the raw bytes of a tensor as a flat array, without a copy if they lie together."""
    if values.dtype == tensors.BYTES:
        return np.frombuffer(tensors.to_raw(values), np.uint8)
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
