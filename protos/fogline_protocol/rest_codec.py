"""Inference requests and responses as HTTP carries them: JSON, and raw bytes behind it.

With the binary extension a body is a JSON part, whose length a header names, and then the
tensors in their order. A length of 0 says that the whole body is the only input.

Source: Open Inference Protocol v2 REST, Triton's docs/protocol/extension_binary_data.md.
"""

import json
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from fogline_protocol import big_json, inference, shared_memory, tensors
from fogline_protocol.errors import BadRequest, Unsupported
from fogline_protocol.inference import InferRequest, InferResponse, Parameter, Wanted
from fogline_protocol.shared_memory import SharedMemory
from fogline_protocol.tensors import Array, TensorError, TensorSpec

HEADER_LENGTH = "Inference-Header-Content-Length"
# From this size on JSON is read and written in pieces, which belongs beside the event loop. Up
# to it json takes about 3 ms.
LARGE_BYTES = 1 << 18
PIECE_ELEMENTS = 2048

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wish:
    """Which outputs a caller wants as raw bytes."""

    everything: bool = False
    outputs: Mapping[str, bool] = field(default_factory=dict)  # what was said of single ones

    def binary(self, output: str) -> bool:
        """Return whether ``output`` leaves as raw bytes."""
        return self.outputs.get(output, self.everything)


def split_body(body: bytes, header: str | None) -> tuple[bytes, memoryview]:
    """Return the JSON part of a body and the bytes behind it; ``header`` names its length.

    Raises:
        BadRequest: the header is no length within the body.
    """
    if header is None:
        return body, memoryview(b"")
    # Digits alone: int() would also take signs, spaces and digits of other scripts.
    if not (header.isascii() and header.isdigit() and len(header) < 12):
        raise BadRequest(f"{HEADER_LENGTH} must be a number of bytes, got {header[:40]!r}")
    length = int(header)
    if length > len(body):
        raise BadRequest(f"{HEADER_LENGTH} is {length}, the body has {len(body)} bytes")
    return body[:length], memoryview(body)[length:]


def decode_raw(
    model: str, version: str, body: bytes, inputs: Sequence[TensorSpec], *, batches: bool
) -> tuple[InferRequest, Wish]:
    """Read a request whose whole body is the only input of a model: one row.

    Raises:
        BadRequest: the model has several inputs, or the bytes leave the shape open.
    """
    if len(inputs) != 1:
        raise BadRequest(
            f"a body without JSON suits models of one input, this one has "
            f"{[spec.name for spec in inputs]}"
        )
    (spec,) = inputs
    shape = [1 if at == 0 and batches else dim for at, dim in enumerate(spec.shape)]
    try:
        if spec.datatype == "BYTES":
            if any(dim not in (-1, 1) for dim in shape):
                raise TensorError(f"a body without JSON is one element, the model takes {shape}")
            array = np.empty([1] * len(shape), dtype=object)
            array.flat[0] = bytes(body)
        else:
            known = math.prod(dim for dim in shape if dim != -1)
            row = known * tensors.dtype_of(spec.datatype).itemsize
            if shape.count(-1) == 1 and row:
                shape[shape.index(-1)] = len(body) // row
            elif -1 in shape:
                raise TensorError(f"a body without JSON leaves the shape {shape} open")
            array = tensors.from_raw(spec.datatype, shape, body)
    except TensorError as error:
        raise BadRequest(f"input {spec.name!r}: {error}") from None
    return InferRequest(model, {spec.name: array}, version), Wish(everything=True)


def decode_request(
    model: str,
    version: str,
    text: bytes,
    binary: memoryview,
    shared: SharedMemory | None = None,
) -> tuple[InferRequest, Wish]:
    """Read an inference request from its JSON part and the bytes behind it.

    ``shared`` holds the regions of shared memory that it may name.

    Raises:
        BadRequest: not JSON, or not a request; the text names the part that is wrong.
        NotFound: a region of shared memory that nobody registered.
        Unsupported: shared memory, which is not offered here.
    """
    document = big_json.Document(text) if len(text) > LARGE_BYTES else None
    request = _typed(parse(text) if document is None else document.root, dict, "the body")
    parameters = dict(_parameters(request.get("parameters", {}), "parameters"))
    everything = parameters.pop("binary_data_output", False)
    if not isinstance(everything, bool):
        raise BadRequest("parameters.binary_data_output must be true or false")
    inference.check_parameters(parameters)
    inputs: dict[str, Array] = {}
    borrowed = shared_memory.Inputs(shared)
    at = 0
    for index, entry in enumerate(_typed(request.get("inputs"), list, "inputs")):
        where = f"inputs[{index}]"
        tensor = _typed(entry, dict, where)
        name = _typed(tensor.get("name"), str, f"{where}.name")
        if name in inputs:
            raise BadRequest(f"input {name!r} comes twice")
        datatype = _typed(tensor.get("datatype"), str, f"{where}.datatype")
        shape = _typed(tensor.get("shape"), list, f"{where}.shape")
        if any(isinstance(dim, bool) or not isinstance(dim, int) for dim in shape):
            raise BadRequest(f"{where}.shape must be whole numbers, got {shape}")
        own = _parameters(tensor.get("parameters", {}), f"{where}.parameters")
        try:
            region = borrowed.read(name, own)
            if region is not None:
                if "data" in tensor or "binary_data_size" in own:
                    raise BadRequest(f"{where} is in shared memory, so it has no other data")
                inputs[name] = tensors.from_raw(datatype, shape, region)
            elif "binary_data_size" in own:
                size = own["binary_data_size"]
                if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                    raise BadRequest(f"{where}: 'binary_data_size' must be a number of bytes")
                if "data" in tensor:
                    raise BadRequest(f"{where} has both data and binary_data_size")
                if size > len(binary) - at:
                    raise BadRequest(
                        f"{where} claims {size} bytes behind the JSON, {len(binary) - at} are left"
                    )
                inputs[name] = tensors.from_raw(datatype, shape, binary[at : at + size])
                at += size
            else:
                data = tensor.get("data")
                numbers = None if document is None else document.numbers(data)
                if numbers is None:
                    data = _typed(data, list, f"{where}.data")
                    inputs[name] = tensors.from_values(datatype, shape, _flat(data))
                else:
                    inputs[name] = tensors.from_pieces(
                        datatype, shape, map(_flat, numbers.pieces())
                    )
        except TensorError as error:
            raise BadRequest(f"input {name!r}: {error}") from None
    if at != len(binary):
        raise BadRequest(f"{len(binary) - at} bytes are left over behind the JSON")
    outputs: list[Wanted] = []
    wishes: dict[str, bool] = {}
    for index, entry in enumerate(_typed(request.get("outputs", []), list, "outputs")):
        where = f"outputs[{index}]"
        output = _typed(entry, dict, where)
        name = _typed(output.get("name"), str, f"{where}.name")
        own = _parameters(output.get("parameters", {}), f"{where}.parameters")
        outputs.append(Wanted.read(name, own, shared))
        if "binary_data" in own:
            wishes[name] = own["binary_data"] is True
    return InferRequest(
        model=model,
        version=version,
        id=_typed(request.get("id", ""), str, "id"),
        inputs=inputs,
        outputs=[output.name for output in outputs],
        parameters=parameters,
        classification={o.name: o.classes for o in outputs if o.classes},
        places={o.name: o.place for o in outputs if o.place is not None},
    ), Wish(everything, wishes)


def encode_response(response: InferResponse, wish: Wish) -> tuple[bytes, int | None]:
    """Return the body of a response, and the length of its JSON part if bytes follow it.

    Raises:
        Unsupported: an output has a datatype or a value that JSON cannot carry.
    """
    outputs: list[dict[str, Any]] = []
    raw: list[bytes] = []
    large: dict[str, Iterator[list[Any]]] = {}
    for name, array in response.outputs.items():
        output: dict[str, Any] = {
            "name": name,
            "datatype": tensors.datatype_of(array),
            "shape": list(array.shape),
        }
        outputs.append(output)
        if name in response.elsewhere:
            continue  # no parameters: Triton's C++ client takes any for those of raw bytes
        if wish.binary(name):
            raw.append(tensors.to_raw(array))
            output["parameters"] = {"binary_data_size": len(raw[-1])}
        elif is_large(array):
            output["data"] = mark = secrets.token_hex(16)
            large[mark] = _pieces(name, array)
        else:
            output["data"] = [value for piece in _pieces(name, array) for value in piece]
    document: dict[str, Any] = {
        "model_name": response.model,
        "model_version": response.version,
        "outputs": outputs,
    }
    if response.id:
        document["id"] = response.id
    if response.parameters:
        document["parameters"] = {key: _finite(value) for key, value in response.parameters.items()}
    text = big_json.dumps(document, large) if large else json.dumps(document).encode()
    return b"".join([text, *raw]), len(text) if raw else None


def large_response(response: InferResponse, wish: Wish) -> bool:
    """Return whether encoding ``response`` belongs beside the event loop."""
    return any(
        is_large(array)
        for name, array in response.outputs.items()
        if not wish.binary(name) and name not in response.elsewhere
    )


def is_large(array: Array) -> bool:
    """Return whether a tensor is written in pieces."""
    return array.size * 8 > LARGE_BYTES


def parse(text: bytes) -> Any:
    """Return the document that a body is.

    Raises:
        BadRequest: it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None


def _finite(value: Parameter) -> Parameter:
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def _pieces(name: str, array: Array) -> Iterator[list[Any]]:
    """Give the values of a tensor as JSON carries them, in parts."""
    datatype = tensors.datatype_of(array)
    if datatype in ("FP16", "BF16"):
        raise Unsupported(f"output {name!r} is {datatype}, which JSON cannot carry: use gRPC")
    flat = array.reshape(-1)
    for at in range(0, len(flat), PIECE_ELEMENTS):
        piece = flat[at : at + PIECE_ELEMENTS]
        if datatype == "BYTES":
            try:
                yield [
                    element if isinstance(element, str) else element.decode() for element in piece
                ]
            except UnicodeDecodeError:
                raise Unsupported(
                    f"output {name!r} is not text, which JSON cannot carry: use gRPC"
                ) from None
        elif array.dtype.kind == "f" and not np.isfinite(piece).all():
            raise Unsupported(
                f"output {name!r} has values that are not finite, which JSON cannot carry: use gRPC"
            )
        else:
            yield piece.tolist()


_JSON_NAMES: Mapping[type, str] = {dict: "an object", list: "a list", str: "a text"}


def _typed(value: Any, kind: type[T], where: str) -> T:
    if not isinstance(value, kind):
        raise BadRequest(f"{where} must be {_JSON_NAMES[kind]}, got {type(value).__name__}")
    if isinstance(value, str) and not _is_text(value):
        raise BadRequest(f"{where} is not Unicode text: {value!r}")
    return value


def _is_text(value: str) -> bool:
    """Return whether it has whole characters only: JSON can spell half of one."""
    return not any("\ud800" <= char <= "\udfff" for char in value)


def _parameters(document: Any, where: str) -> Mapping[str, Parameter]:
    parameters = _typed(document, dict, where)
    for key, value in parameters.items():
        if not isinstance(value, bool | int | float | str):
            raise BadRequest(f"{where}.{key} must be a flag, a number or a text")
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
            raise BadRequest(f"{where}.{key} has more than 64 bits")
        if not _is_text(key) or (isinstance(value, str) and not _is_text(value)):
            raise BadRequest(f"{where}.{key!r} is not Unicode text")
    return parameters


def _flat(data: list[Any]) -> list[Any]:
    """Return nested lists flattened, row by row: the protocol allows both forms."""
    flat: list[Any] = []
    stack: list[Any] = [data]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack.extend(reversed(item))
        else:
            flat.append(item)
    return flat
