"""Open Inference requests and responses as values.

No transport here: doors (``grpc_service``, ``rest_service``) and the client translate bytes
to these values. Whatever stands behind a door, hub or
agent, is an ``InferenceServer``.

Source: Open Inference Protocol v2 and Triton's protocol documents; the raw-contents rules
are numbered as in Triton's ``infer_handler.cc``.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from google.protobuf.message import DecodeError

from fogline_protocol import known_messages, shared_memory, tensors
from fogline_protocol.errors import BadRequest, InferenceError, ServerFault
from fogline_protocol.model_config import ModelConfig
from fogline_protocol.outcomes import Entry
from fogline_protocol.shared_memory import Place, SharedMemory
from fogline_protocol.statistics import ModelStatistics
from fogline_protocol.tensors import BYTES, Array, TensorError, TensorSpec
from fogline_protocol.tensors import Parameter as Parameter
from fogline_protocol.v1 import inference_pb2 as pb


@dataclass(slots=True)
class InferRequest:
    """One call: named tensors for one model."""

    model: str
    inputs: Mapping[str, Array]
    version: str = ""  # empty: the server chooses
    id: str = ""
    outputs: Sequence[str] = ()  # empty: all, in the model's order
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    # What the doors do with single outputs once there is an answer, see ``doors.answer``:
    classification: Mapping[str, int] = field(default_factory=dict)  # rank the best k
    places: Mapping[str, Place] = field(default_factory=dict)  # put it into shared memory
    entry: Entry | None = None  # in the books of whom it is asked; None: ``infer`` is all of it


@dataclass(slots=True)
class InferResponse:
    """The answer to one call."""

    model: str
    version: str
    outputs: Mapping[str, Array]
    id: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    elsewhere: Collection[str] = ()  # outputs whose tensor was put into shared memory


@dataclass(frozen=True, slots=True)
class ServerMetadata:
    """Who answers, and which protocol extensions really work."""

    name: str
    version: str
    extensions: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What a caller must know of a model. Versions are decimal integers as text."""

    name: str
    versions: Sequence[str]
    platform: str
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    properties: Mapping[str, str] = field(default_factory=dict)


class InferenceServer(Protocol):
    """What stands behind a door. All methods may raise ``InferenceError``."""

    def server_metadata(self) -> ServerMetadata:
        """Return who this is."""
        ...

    def server_ready(self) -> bool:
        """Return whether every model that should be served is."""
        ...

    def model_metadata(self, name: str, version: str) -> ModelMetadata:
        """Return the contract of a model; ``NotFound`` if there is none."""
        ...

    def model_ready(self, name: str, version: str) -> bool:
        """Return whether the model answers now; ``NotFound`` if there is none."""
        ...

    def model_config(self, name: str, version: str) -> ModelConfig:
        """Return how a model is served; ``NotFound`` if there is none."""
        ...

    def model_statistics(self, name: str, version: str) -> Sequence[ModelStatistics]:
        """Return the counts of a model, of all models if ``name`` is empty."""
        ...

    async def infer(self, request: InferRequest, deadline: float | None) -> InferResponse:
        """Answer; ``deadline`` is in seconds of ``time.monotonic()``, None means no hurry."""
        ...


def timeout_s(parameters: Mapping[str, Parameter]) -> float | None:
    """Return the request parameter ``timeout``, which travels in microseconds, in seconds.

    Raises:
        BadRequest: it is not a whole number of at least 0; 0 means none.
    """
    value = parameters.get("timeout")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadRequest(f"parameter 'timeout' must be whole microseconds, got {value!r}")
    return value / 1e6 or None


def priority(parameters: Mapping[str, Parameter]) -> int:
    """Return the request parameter ``priority``: 1 is the highest, 0 the default.

    Raises:
        BadRequest: it is not a whole number of at least 0.
    """
    value = parameters.get("priority", 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadRequest(
            f"parameter 'priority' must be a whole number from 0 (the default) on, 1 being the "
            f"highest, got {value!r}"
        )
    return value


def check_parameters(parameters: Mapping[str, Parameter]) -> None:
    """Refuse request parameters that the protocol reserves or that it gives another type.

    Raises:
        BadRequest: the text names the parameter.
    """
    for key in parameters:
        # The C++ client sends the exception with every request (perf_analyzer 2.50).
        if key.startswith("triton_") and key != "triton_enable_empty_final_response":
            raise BadRequest(f"parameter {key!r} is reserved")
    priority(parameters)


def check_inputs(specs: Sequence[TensorSpec], inputs: Mapping[str, Array]) -> None:
    """Hold a request's tensors against a model's contract.

    Raises:
        BadRequest: a tensor is missing, unknown, or of another datatype or shape.
    """
    for spec in specs:
        array = inputs.get(spec.name)
        if array is None:
            raise BadRequest(f"input {spec.name!r} is missing, got {sorted(inputs)}")
        problem = spec.mismatch(array)
        if problem is not None:
            raise BadRequest(f"input {spec.name!r}: {problem}")
    if len(inputs) != len(specs):
        known = {spec.name for spec in specs}
        raise BadRequest(
            f"unknown input {sorted(set(inputs) - known)}, the model has {sorted(known)}"
        )


def check_outputs(specs: Sequence[TensorSpec], names: Sequence[str]) -> Sequence[str]:
    """Return the outputs to deliver, in the order asked for.

    Raises:
        BadRequest: a name is not an output of the model, or comes twice.
    """
    known = [spec.name for spec in specs]
    if not names:
        return known
    for name in names:
        if name not in known:
            raise BadRequest(f"unknown output {name!r}, the model has {known}")
    if len(set(names)) != len(names):
        raise BadRequest(f"an output is asked for twice: {list(names)}")
    return names


def decode_request(data: bytes, shared: SharedMemory | None = None) -> InferRequest:
    """Read a ``ModelInferRequest``; ``shared`` holds the regions that it may name.

    Raises:
        BadRequest: malformed bytes, or tensors that contradict themselves.
        NotFound: a region of shared memory that nobody registered.
        Unsupported: shared memory, which this server does not offer.
    """
    parts = known_messages.split_request(data)
    if parts is None:
        return parse_request(data, shared)
    head, id, raw = parts
    known = _REQUESTS.get(head)
    if known is not None and (request := known.read(data, id, raw)) is not None:
        return request
    request = parse_request(data, shared)
    if known is None and (found := _KnownRequest.of(head, request)) is not None:
        _REQUESTS.put(head, found)
    return request


def parse_request(data: bytes, shared: SharedMemory | None = None) -> InferRequest:
    """Read a ``ModelInferRequest`` with protobuf, as ``decode_request`` says."""
    message = pb.ModelInferRequest()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise BadRequest("the request is not a ModelInferRequest: malformed protobuf") from None
    parameters = _parameters(message.parameters)
    check_parameters(parameters)
    outputs = [
        Wanted.read(output.name, _parameters(output.parameters), shared)
        for output in message.outputs
    ]
    return InferRequest(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        inputs=_inputs(message, shared),
        outputs=[output.name for output in outputs],
        parameters=parameters,
        classification={o.name: o.classes for o in outputs if o.classes},
        places={o.name: o.place for o in outputs if o.place is not None},
    )


@dataclass(frozen=True, slots=True)
class _KnownRequest:
    """What requests with one head have in common."""

    model: str
    version: str
    inputs: Sequence[tuple[str, np.dtype[Any], tuple[int, ...], int]]  # with their length in bytes
    outputs: Sequence[str]
    parameters: Mapping[str, Parameter]

    @classmethod
    def of(cls, head: bytes, request: InferRequest) -> "_KnownRequest | None":
        """Return what a head means that came with ``request``; None: it depends on more."""
        message = pb.ModelInferRequest.FromString(head)
        if any(tensor.parameters or tensor.HasField("contents") for tensor in message.inputs):
            return None
        if any(output.parameters for output in message.outputs):
            return None
        if any(array.dtype == BYTES for array in request.inputs.values()):
            return None  # as long as its elements
        return cls(
            request.model,
            request.version,
            [(n, a.dtype, a.shape, a.nbytes) for n, a in request.inputs.items()],
            tuple(request.outputs),
            request.parameters,
        )

    def read(self, data: bytes, id: bytes, raw: Sequence[tuple[int, int]]) -> InferRequest | None:
        """Return the request of these tensors; None: it is not a good one."""
        if len(raw) != len(self.inputs):
            return None
        inputs: dict[str, Array] = {}
        for (start, end), (name, dtype, shape, size) in zip(raw, self.inputs, strict=True):
            if end - start != size:
                return None
            # Without a copy, unless the numbers would lie across the words of the machine.
            if start % dtype.alignment:
                flat = np.frombuffer(data[start:end], dtype)
            else:
                flat = np.frombuffer(data, dtype, size // dtype.itemsize, start)
            inputs[name] = flat.reshape(shape)
        try:
            text = id.decode()
        except UnicodeDecodeError:
            return None
        return InferRequest(
            self.model, inputs, self.version, text, self.outputs, dict(self.parameters)
        )


_REQUESTS = known_messages.Remembered[_KnownRequest]()  # what a head means depends on it alone
_RESPONSES = known_messages.Remembered[bytes]()


def _inputs(message: pb.ModelInferRequest, shared: SharedMemory | None) -> dict[str, Array]:
    borrowed = shared_memory.Inputs(shared)
    lent = {
        tensor.name: borrowed.read(tensor.name, _parameters(tensor.parameters))
        for tensor in message.inputs
        if tensor.parameters
    }
    raw = message.raw_input_contents
    # One entry per input that is not in shared memory, in their order.
    in_order = iter(raw)
    expected = sum(lent.get(tensor.name) is None for tensor in message.inputs)
    if raw and len(raw) != expected:
        raise BadRequest(
            f"expected one raw_input_contents per input that is not in shared memory: {expected}, "
            f"got {len(raw)}"
        )
    inputs: dict[str, Array] = {}
    for tensor in message.inputs:
        if tensor.name in inputs:
            raise BadRequest(f"input {tensor.name!r} comes twice")
        has_contents = tensor.HasField("contents")
        region = lent.get(tensor.name)
        try:
            if region is not None:
                if has_contents:
                    raise BadRequest(
                        f"contents field must not be specified for {tensor.name!r}, which is in "
                        "shared memory"
                    )
                inputs[tensor.name] = tensors.from_raw(tensor.datatype, tensor.shape, region)
            elif raw:
                if has_contents:
                    raise BadRequest(
                        "contents field must not be specified when using raw_input_contents "
                        f"for {tensor.name!r}"
                    )
                inputs[tensor.name] = tensors.from_raw(
                    tensor.datatype, tensor.shape, next(in_order)
                )
            elif has_contents:
                inputs[tensor.name] = _from_contents(tensor)
            elif tensors.element_count(tensor.shape) == 0:
                inputs[tensor.name] = tensors.from_raw(tensor.datatype, tensor.shape, b"")
            else:
                raise BadRequest(f"unable to find data for input tensor {tensor.name!r}")
        except TensorError as error:
            raise BadRequest(f"input {tensor.name!r}: {error}") from None
    return inputs


@dataclass(frozen=True, slots=True)
class Wanted:
    """One output that a caller asks for, and in which form."""

    name: str
    classes: int = 0  # 0: the tensor itself
    place: Place | None = None  # None: in the response

    @classmethod
    def read(
        cls, name: str, parameters: Mapping[str, Parameter], shared: SharedMemory | None
    ) -> "Wanted":
        """Return what the parameters of a requested output say.

        Raises:
            BadRequest: they contradict each other, or a value is impossible.
            NotFound: the region of shared memory is not registered.
            Unsupported: shared memory, which this server does not offer.
        """
        if not parameters:
            return cls(name)
        best = 0
        if "classification" in parameters:
            best = classes(name, parameters["classification"])
        place = shared_memory.find(shared, name, parameters)
        if best and place is not None:
            raise BadRequest(
                f"output {name!r}: 'classification' and shared memory exclude each other"
            )
        return cls(name, best, place)


def classes(output: str, value: Parameter) -> int:
    """Return how many classes of an output a caller asks for.

    Raises:
        BadRequest: it is not a whole number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadRequest(f"output {output!r}: 'classification' must be at least 1, got {value!r}")
    return value


def request_id(data: bytes) -> str:
    """Return the id of a request that may be faulty otherwise, for the answer that refuses it."""
    try:
        return pb.ModelInferRequest.FromString(data).id
    except DecodeError:
        return ""


def encode_stream_response(response: InferResponse) -> bytes:
    """Return the response as a ``ModelStreamInferResponse``, marked as its request's last one.

    Models here give one response per request, so the last one is never empty.
    """
    parameters = {**response.parameters, "triton_final_response": True}
    message = _response(dataclasses.replace(response, parameters=parameters))
    return pb.ModelStreamInferResponse(infer_response=message).SerializeToString()


def encode_stream_error(id: str, error: InferenceError) -> bytes:
    """Return a ``ModelStreamInferResponse`` that refuses the request ``id``.

    When to return is a parameter here: the trailing metadata are those of the whole stream.
    """
    response = pb.ModelInferResponse(id=id)
    if error.retry_after_s is not None:
        response.parameters["fogline.retry_after_s"].double_param = error.retry_after_s
    return pb.ModelStreamInferResponse(
        error_message=str(error), infer_response=response
    ).SerializeToString()


def encode_request(request: InferRequest) -> bytes:
    """Return the request as a ``ModelInferRequest`` with raw contents."""
    message = pb.ModelInferRequest(
        model_name=request.model, model_version=request.version, id=request.id
    )
    _fill_parameters(message.parameters, request.parameters)
    for name, array in request.inputs.items():
        message.inputs.add(name=name, datatype=tensors.datatype_of(array), shape=array.shape)
        message.raw_input_contents.append(tensors.to_raw(array))
    for name in request.outputs:
        message.outputs.add(name=name)
    return message.SerializeToString()


def encode_response(response: InferResponse) -> bytes:
    """Return the response as a ``ModelInferResponse``: one raw entry per output, always.

    Typed contents are never sent: Triton's C++ client reads ``raw_output_contents[i]`` unchecked.
    """
    elsewhere, arrays = response.elsewhere, response.outputs
    key = known_messages.response_head(
        response.model,
        response.version,
        response.parameters,
        [(name, array.dtype, array.shape) for name, array in arrays.items()],
    )
    if key is None or elsewhere:
        return _response(response).SerializeToString()
    head = _RESPONSES.get(key)
    if head is None:
        message = _response(dataclasses.replace(response, id="", elsewhere=arrays.keys()))
        message.ClearField("raw_output_contents")
        head = message.SerializeToString()
        if len(head) <= known_messages.HEAD_BYTES:
            _RESPONSES.put(key, head)
    parts = [head]
    if response.id:
        parts.append(known_messages.field(_RESPONSE_ID, response.id.encode()))
    for array in arrays.values():
        parts.append(known_messages.field(_RESPONSE_RAW, tensors.to_raw(array)))
    return b"".join(parts)


# Field number and wire type of ``ModelInferResponse``.
_RESPONSE_ID, _RESPONSE_RAW = 0x1A, 0x32


def _response(response: InferResponse) -> pb.ModelInferResponse:
    message = pb.ModelInferResponse(
        model_name=response.model, model_version=response.version, id=response.id
    )
    _fill_parameters(message.parameters, response.parameters)
    for name, array in response.outputs.items():
        message.outputs.add(name=name, datatype=tensors.datatype_of(array), shape=array.shape)
        raw = b"" if name in response.elsewhere else tensors.to_raw(array)
        message.raw_output_contents.append(raw)
    return message


def decode_response(data: bytes) -> InferResponse:
    """Read a ``ModelInferResponse``.

    Raises:
        ServerFault: the server sent something else.
    """
    message = pb.ModelInferResponse()
    try:
        message.ParseFromString(data)
        if len(message.raw_output_contents) != len(message.outputs):
            raise TensorError(
                f"{len(message.outputs)} outputs, {len(message.raw_output_contents)} raw contents"
            )
        outputs = {
            tensor.name: tensors.from_raw(tensor.datatype, tensor.shape, raw)
            for tensor, raw in zip(message.outputs, message.raw_output_contents, strict=True)
        }
    except (DecodeError, TensorError) as error:
        raise ServerFault(f"the server's answer cannot be read: {error}") from None
    return InferResponse(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        outputs=outputs,
        parameters=_parameters(message.parameters),
    )


def decode_metadata(data: bytes) -> ModelMetadata:
    """Read a ``ModelMetadataResponse``.

    Raises:
        ServerFault: the server sent something else.
    """
    message = pb.ModelMetadataResponse()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise ServerFault(f"the server's answer cannot be read: {error}") from None
    return ModelMetadata(
        name=message.name,
        versions=tuple(message.versions),
        platform=message.platform,
        inputs=tuple(TensorSpec(t.name, t.datatype, tuple(t.shape)) for t in message.inputs),
        outputs=tuple(TensorSpec(t.name, t.datatype, tuple(t.shape)) for t in message.outputs),
        properties=dict(message.properties),
    )


def encode_metadata(metadata: ModelMetadata) -> bytes:
    """Return the metadata as a ``ModelMetadataResponse``."""
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=metadata.name,
        versions=metadata.versions,
        platform=metadata.platform,
        inputs=[tensor(name=s.name, datatype=s.datatype, shape=s.shape) for s in metadata.inputs],
        outputs=[tensor(name=s.name, datatype=s.datatype, shape=s.shape) for s in metadata.outputs],
        properties=metadata.properties,
    ).SerializeToString()


_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def _from_contents(tensor: pb.ModelInferRequest.InferInputTensor) -> Array:
    field_name = _CONTENTS.get(tensor.datatype)
    values = () if field_name is None else getattr(tensor.contents, field_name)
    return tensors.from_values(tensor.datatype, tensor.shape, values)


def _parameters(messages: Mapping[str, pb.InferParameter]) -> dict[str, Parameter]:
    parameters: dict[str, Parameter] = {}
    for key, message in messages.items():
        kind = message.WhichOneof("parameter_choice")
        if kind is not None:
            parameters[key] = getattr(message, kind)
    return parameters


def _fill_parameters(
    messages: "Mapping[str, pb.InferParameter]", parameters: Mapping[str, Parameter]
) -> None:
    for key, value in parameters.items():
        if isinstance(value, bool):
            messages[key].bool_param = value
        elif isinstance(value, int) and value >= 1 << 63:
            messages[key].uint64_param = value
        elif isinstance(value, int):
            messages[key].int64_param = value
        elif isinstance(value, float):
            messages[key].double_param = value
        else:
            messages[key].string_param = value
