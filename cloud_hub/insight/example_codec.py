"""Examples as bytes: canonical, so that the same tensors have the same digest; and over the wire.

Pure. Packed tensors are one line of JSON, names in order, each with datatype, shape and length,
and then their raw bytes. The SHA-256 of packed inputs is their name on the disk, so what was read
is proven whole by its name. An export is a stream of frames, each a line of JSON and its payload;
the last one says that it is the last, so a stream that breaks off is never taken for a short one.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fogline_protocol import tensors
from fogline_protocol.tensors import Array, TensorError

MAX_HEAD_BYTES = 1 << 20
MAX_FRAME_BYTES = 2 << 30
_to_json = json.JSONEncoder(separators=(",", ":")).encode
_HEAD = struct.Struct(">II")  # bytes of a frame's document, and of its payload


class ExampleDamaged(Exception):
    """The bytes are not what was packed: leave it out."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one example beside its tensors; the latest time that it came."""

    sha256: str  # of the packed inputs
    at: float  # seconds since the epoch, the hub's clock
    device: str
    source: str  # empty: none was named
    reason: str
    propensity: float
    score: float
    release: str  # of the device, MODEL@VERSION
    edge_sha256: str
    hub_model: str
    hub_sha256: str  # empty: an upstream that does not name its models
    count: int  # how often it came in this way


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One input with what both tiers said about it; arrays have no batch dimension."""

    facts: Facts
    inputs: Mapping[str, Array]
    edge: Mapping[str, Array]
    hub: Mapping[str, Array]


def pack(arrays: Mapping[str, Array]) -> bytes:
    """Return the tensors as bytes: the same ones, in whatever order, always give the same.

    Raises:
        TensorError: the protocol has no datatype for an array.
    """
    head: dict[str, list[Any]] = {}
    raw: list[bytes] = []
    for name in sorted(arrays):
        array = arrays[name]
        data = tensors.to_raw(array)
        head[name] = [tensors.datatype_of(array), list(array.shape), len(data)]
        raw.append(data)
    return b"".join((_to_json(head).encode(), b"\n", *raw))


def unpack(data: bytes) -> dict[str, Array]:
    """Return what was packed.

    Raises:
        ExampleDamaged: these bytes are something else.
    """
    line, newline, _ = data[:MAX_HEAD_BYTES].partition(b"\n")
    try:
        if not newline:
            raise ValueError("no end of its head")
        arrays: dict[str, Array] = {}
        at = len(line) + 1
        for name, (datatype, shape, length) in json.loads(line).items():
            arrays[name] = tensors.from_raw(datatype, shape, memoryview(data)[at : at + length])
            at += length
        if at != len(data):
            raise ValueError(f"{len(data) - at} bytes too many")
    except (ValueError, TypeError, AttributeError, TensorError, RecursionError) as error:
        raise ExampleDamaged(str(error)) from None
    return arrays


def sha256_of(packed: bytes) -> str:
    """Return the name of packed inputs."""
    return hashlib.sha256(packed).hexdigest()


def layout_of(arrays: Mapping[str, Array]) -> str:
    """Return names, datatypes and shapes as people read them: ``image FP32[1,8,8]``."""
    return "; ".join(
        f"{name} {tensors.datatype_of(array)}[{','.join(map(str, array.shape))}]"
        for name, array in sorted(arrays.items())
    )


def has_shapes(layout: str, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Return whether examples of a layout have these inputs in these shapes."""
    found = {part.split(" ")[0]: part for part in layout.split("; ")}
    return all(
        name in found and found[name].endswith(f"[{','.join(map(str, shape))}]")
        for name, shape in shapes.items()
    )


def frame(document: Mapping[str, Any], payload: Sequence[bytes] = ()) -> bytes:
    """Return one frame of an export."""
    head = _to_json(document).encode()
    return b"".join((_HEAD.pack(len(head), sum(map(len, payload))), head, *payload))


def example_frame(facts: Facts, inputs: bytes, edge: bytes, hub: bytes) -> bytes:
    """Return the frame of an example whose tensors are packed."""
    lengths = [len(inputs), len(edge), len(hub)]
    return frame({"example": asdict(facts), "lengths": lengths}, (inputs, edge, hub))


def read_example(document: Mapping[str, Any], payload: bytes) -> Example:
    """Return the example in a frame.

    Raises:
        ExampleDamaged: there is none in it, or its inputs are not those of its name.
    """
    try:
        facts = Facts(**document["example"])
        first, second, third = document["lengths"]
    except (KeyError, TypeError, ValueError) as error:
        raise ExampleDamaged(f"no example: {error!r}") from None
    if first + second + third != len(payload):
        raise ExampleDamaged(f"{len(payload)} bytes, {first + second + third} were announced")
    inputs = payload[:first]
    if sha256_of(inputs) != facts.sha256:
        raise ExampleDamaged(f"the inputs of {facts.sha256} are not those of this name")
    edge, hub = payload[first : first + second], payload[first + second :]
    return Example(facts, unpack(inputs), unpack(edge), unpack(hub))


class FrameReader:
    """Cuts frames out of what arrives; holds at most one frame and a chunk."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, data: bytes) -> Iterable[tuple[Mapping[str, Any], bytes]]:
        """Take bytes as they come and return the frames that are complete.

        Raises:
            ExampleDamaged: this is no stream of frames.
        """
        self._received += data
        while len(self._received) >= _HEAD.size:
            head, payload = _HEAD.unpack_from(self._received)
            if head > MAX_HEAD_BYTES or payload > MAX_FRAME_BYTES:
                raise ExampleDamaged("what arrives is no export of examples")
            end = _HEAD.size + head + payload
            if len(self._received) < end:
                return
            try:
                document = json.loads(self._received[_HEAD.size : _HEAD.size + head])
            except ValueError:
                raise ExampleDamaged("what arrives is no export of examples") from None
            content = bytes(self._received[_HEAD.size + head : end])
            del self._received[:end]
            yield document, content
