"""Tensors on the wire: the only place that knows datatypes, byte order and limits.

A tensor is a numpy array everywhere in fogline; its Open Inference datatype follows from
its dtype. Two dtypes need a word: BYTES is an object array of ``bytes``, and BF16, which
numpy lacks, is the opaque two-byte dtype ``V2`` that nothing else uses.

Source of the raw layout: Open Inference Protocol v2, "Tensor Data": row-major, little
endian, no padding, BYTES elements behind a 32-bit length.
"""

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Parameter = bool | int | float | str  # what may be said of a request or of one tensor

BYTES = np.dtype(object)
BF16 = np.dtype("V2")

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "BF16": BF16,
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": BYTES,
}
DATATYPES: dict[np.dtype[Any], str] = {dtype: name for name, dtype in DTYPES.items()}

MAX_RANK = 32  # of a numpy array before 2.0; no model comes near it
MAX_ELEMENTS = 1 << 31  # beyond it a 32-bit index in a kernel overflows
MAX_BYTES_ELEMENTS = 1 << 20  # each becomes a Python object: more would hold every other caller up


class TensorError(ValueError):
    """A tensor that contradicts itself: the sender's fault, its message names the tensor's part."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a model says of one input or output."""

    name: str
    datatype: str
    shape: tuple[int, ...]  # -1 where variable, the batch dimension included

    def mismatch(self, array: Array) -> str | None:
        """Say how ``array`` differs from this spec, or None if it fits."""
        found = datatype_of(array)
        if found != self.datatype:
            return f"expected datatype {self.datatype}, got {found}"
        if len(array.shape) != len(self.shape) or any(
            want not in (-1, have) for want, have in zip(self.shape, array.shape, strict=True)
        ):
            return f"expected shape {list(self.shape)}, got {list(array.shape)}"
        return None


def datatype_of(array: Array) -> str:
    """Return the Open Inference datatype of an array.

    Raises:
        TensorError: the protocol has no datatype for the array's dtype.
    """
    try:
        return DATATYPES[array.dtype]
    except KeyError:
        raise TensorError(f"no Open Inference datatype for numpy dtype {array.dtype}") from None


def dtype_of(datatype: str) -> np.dtype[Any]:
    """Return the numpy dtype of an Open Inference datatype.

    Raises:
        TensorError: there is no such datatype.
    """
    try:
        return DTYPES[datatype]
    except KeyError:
        raise TensorError(f"unknown datatype {datatype!r}, known are {', '.join(DTYPES)}") from None


def element_count(shape: Sequence[int]) -> int:
    """Return how many elements a tensor of this concrete shape holds.

    Raises:
        TensorError: a dimension is negative, or the rank or product exceeds the limits.
    """
    if len(shape) > MAX_RANK:
        raise TensorError(f"shape has {len(shape)} dimensions, at most {MAX_RANK} are accepted")
    if any(dim < 0 for dim in shape):
        raise TensorError(f"shape {list(shape)} has a negative dimension")
    # Without its zeros, which would hide the rest: numpy refuses an empty array of huge rows too.
    if math.prod(dim or 1 for dim in shape) > MAX_ELEMENTS:
        raise TensorError(f"shape {list(shape)} has more than {MAX_ELEMENTS} elements")
    return math.prod(shape)


def from_raw(datatype: str, shape: Sequence[int], raw: bytes | bytearray | memoryview) -> Array:
    """Read a tensor from its raw bytes; numeric results are read-only views of ``raw``.

    Raises:
        TensorError: unknown datatype, impossible shape, or a length that does not fit them.
    """
    dtype = dtype_of(datatype)
    count = element_count(shape)
    if dtype == BYTES:
        if count > MAX_BYTES_ELEMENTS:
            raise TensorError(f"{count} BYTES elements, at most {MAX_BYTES_ELEMENTS} are accepted")
        return _object_array(_split_bytes(bytes(raw), count), shape)
    expected = count * dtype.itemsize
    if len(raw) != expected:
        raise TensorError(
            f"expected {expected} bytes for {datatype} of shape {list(shape)}, got {len(raw)}"
        )
    array = np.frombuffer(raw, dtype=dtype).reshape(shape)
    array.flags.writeable = False  # also where ``raw`` could be written
    return array


def raw_view(array: Array) -> memoryview:
    """Return the raw bytes of a tensor, without a copy where the array has them in their order.

    Raises:
        TensorError: a BYTES element is neither bytes nor text.
    """
    if array.dtype == BYTES or not array.size:
        return memoryview(to_raw(array))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def to_raw(array: Array) -> bytes:
    """Return the raw bytes of a tensor.

    Raises:
        TensorError: a BYTES element is neither bytes nor text.
    """
    if array.dtype != BYTES:
        return array.tobytes()
    parts: list[bytes] = []
    for element in array.flat:
        data = element.encode() if isinstance(element, str) else element
        if not isinstance(data, bytes):
            raise TensorError(
                f"a BYTES element must be bytes or text, got {type(element).__name__}"
            )
        parts.append(struct.pack("<I", len(data)))
        parts.append(data)
    return b"".join(parts)


def from_values(datatype: str, shape: Sequence[int], values: Iterable[Any]) -> Array:
    """Build a tensor from a flat sequence of Python values, as typed contents and JSON carry them.

    Raises:
        TensorError: the number, the type or the range of the values does not fit, or the
            datatype exists in raw form only (FP16, BF16).
    """
    dtype = dtype_of(datatype)
    count = element_count(shape)
    if datatype in ("FP16", "BF16"):
        raise TensorError(f"{datatype} must be sent as raw bytes")
    flat = list(values)
    if len(flat) != count:
        raise TensorError(f"expected {count} values for shape {list(shape)}, got {len(flat)}")
    if dtype == BYTES:
        try:
            return _object_array([v.encode() if isinstance(v, str) else v for v in flat], shape)
        except UnicodeEncodeError:  # JSON can spell half a character
            raise TensorError("a BYTES element is not Unicode text") from None
    try:
        if dtype.kind in "iu" and any(isinstance(v, bool) or v != int(v) for v in flat):
            raise TensorError(f"{datatype} takes whole numbers only")
        # numpy would read None as NaN, True as 1 and "1.5" as a number.
        if dtype.kind == "f" and not all(type(v) in (int, float) for v in flat):
            raise TensorError(f"a value does not fit {datatype}: numbers only")
        if dtype.kind == "b" and not all(isinstance(v, bool) for v in flat):
            raise TensorError("BOOL takes true and false only")
        with np.errstate(over="raise"):  # or 1e39 would silently become infinite
            return np.array(flat, dtype=dtype).reshape(shape)
    except (TypeError, ValueError, ArithmeticError) as error:
        if isinstance(error, TensorError):
            raise
        raise TensorError(f"a value does not fit {datatype}: {error}") from None


def from_pieces(datatype: str, shape: Sequence[int], pieces: Iterable[Sequence[Any]]) -> Array:
    """Build a tensor as ``from_values`` does, from values that come in parts.

    Raises:
        TensorError: as there.
    """
    count = element_count(shape)
    parts: list[Array] = []
    got = 0
    for piece in pieces:
        got += len(piece)
        if got <= count:  # else only their number is of interest
            parts.append(from_values(datatype, [len(piece)], piece))
    if got != count:
        raise TensorError(f"expected {count} values for shape {list(shape)}, got {got}")
    return np.concatenate(parts).reshape(shape)


def _split_bytes(raw: bytes, count: int) -> list[bytes]:
    # Every element takes at least its length field, so a huge count cannot buy memory.
    if count * 4 > len(raw):
        raise TensorError(f"expected {count} BYTES elements, got {len(raw)} bytes in all")
    elements: list[bytes] = []
    at = 0
    for _ in range(count):
        if at + 4 > len(raw):
            raise TensorError(
                f"expected {count} BYTES elements, the data ends after {len(elements)}"
            )
        (length,) = struct.unpack_from("<I", raw, at)
        at += 4
        if at + length > len(raw):
            raise TensorError(
                f"BYTES element {len(elements)} claims {length} bytes, {len(raw) - at} are left"
            )
        elements.append(raw[at : at + length])
        at += length
    if at != len(raw):
        raise TensorError(f"{len(raw) - at} bytes are left over after {count} BYTES elements")
    return elements


def _object_array(elements: Sequence[object], shape: Sequence[int]) -> Array:
    for element in elements:
        if not isinstance(element, bytes):
            raise TensorError(f"a BYTES element must be text, got {type(element).__name__}")
    flat = np.empty(len(elements), dtype=object)
    flat[:] = elements
    return flat.reshape(shape)
