"""Open Inference requests and responses as values, and what may go wrong with them.

No transport here: doors (``grpc_service``, ``rest_service``) and the client translate bytes
to these values and these errors to status codes. Whatever stands behind a door, hub or
agent, is an ``InferenceServer``.

Source: Open Inference Protocol v2 and Triton's protocol documents; the raw-contents rules
are numbered as in Triton's ``infer_handler.cc``.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from google.protobuf.message import DecodeError

from fogline_protocol import tensors
from fogline_protocol.model_config import ModelConfig
from fogline_protocol.statistics import ModelStatistics
from fogline_protocol.tensors import Array, TensorError, TensorSpec
from fogline_protocol.v1 import inference_pb2 as pb

Parameter = bool | int | float | str


class InferenceError(Exception):
    """A request that got no answer. The class says what the caller does next.

    The text is never empty: Triton's C++ client takes an error without text for success.
    """

    grpc_code = "INTERNAL"
    http_status = 500

    def __init__(self, text: str, *, retry_after_s: float | None = None) -> None:
        """Make an error that tells the caller ``text`` and, where that is known, when to return.

        ``retry_after_s`` travels as ``grpc-retry-pushback-ms`` and ``Retry-After``: before it the
        same request will meet the same end. ``math.inf``: it should not be made again.
        """
        super().__init__(text or f"{type(self).__name__}: no further information")
        self.retry_after_s = retry_after_s


class BadRequest(InferenceError):
    """The caller's fault: the same request will fail again."""

    grpc_code, http_status = "INVALID_ARGUMENT", 400


class TooLarge(BadRequest):
    """Longer than this server reads: send less at once."""

    http_status = 413


class Unauthenticated(InferenceError):
    """The caller must say who it is."""

    grpc_code, http_status = "UNAUTHENTICATED", 401


class Forbidden(InferenceError):
    """The caller is known and may not do this."""

    grpc_code, http_status = "PERMISSION_DENIED", 403


class NotFound(InferenceError):
    """There is no such model or version here."""

    grpc_code, http_status = "NOT_FOUND", 404


class Overloaded(InferenceError):
    """Too much is waiting already: come back later."""

    grpc_code, http_status = "RESOURCE_EXHAUSTED", 429


class Unsupported(InferenceError):
    """The protocol knows this, this server does not."""

    grpc_code, http_status = "UNIMPLEMENTED", 501


class Unavailable(InferenceError):
    """Nobody can answer at the moment: another server, or the same one later, may."""

    grpc_code, http_status = "UNAVAILABLE", 503


class DeadlineExceeded(InferenceError):
    """The caller's time ran out before there was an answer."""

    grpc_code, http_status = "DEADLINE_EXCEEDED", 504


class ServerFault(InferenceError):
    """The server's own fault, its log knows more."""


ERRORS: Mapping[str, type[InferenceError]] = {
    error.grpc_code: error
    for error in (
        BadRequest, Unauthenticated, Forbidden, NotFound, Overloaded, Unsupported, Unavailable,
        DeadlineExceeded, ServerFault,
    )
}  # fmt: skip


@dataclass(slots=True)
class InferRequest:
    """One call: named tensors for one model."""

    model: str
    inputs: Mapping[str, Array]
    version: str = ""  # empty: the server chooses
    id: str = ""
    outputs: Sequence[str] = ()  # empty: all, in the model's order
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    classification: Mapping[str, int] = field(default_factory=dict)  # output -> best k; see doors


@dataclass(slots=True)
class InferResponse:
    """The answer to one call."""

    model: str
    version: str
    outputs: Mapping[str, Array]
    id: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


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


def check_parameters(parameters: Mapping[str, Parameter]) -> None:
    """Refuse request parameters that the protocol reserves or that it gives another type.

    Raises:
        BadRequest: the text names the parameter.
    """
    for key in parameters:
        # The C++ client sends the exception with every request (perf_analyzer 2.50).
        if key.startswith("triton_") and key != "triton_enable_empty_final_response":
            raise BadRequest(f"parameter {key!r} is reserved")
    priority = parameters.get("priority", 0)
    if isinstance(priority, bool) or not isinstance(priority, int) or priority < 0:
        raise BadRequest(
            f"parameter 'priority' must be a whole number from 0 (the default) on, 1 being the "
            f"highest, got {priority!r}"
        )


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


def decode_request(data: bytes) -> InferRequest:
    """Read a ``ModelInferRequest``.

    Raises:
        BadRequest: malformed bytes, or tensors that contradict themselves.
        Unsupported: shared memory, which this server does not offer.
    """
    message = pb.ModelInferRequest()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise BadRequest("the request is not a ModelInferRequest: malformed protobuf") from None
    parameters = _parameters(message.parameters)
    check_parameters(parameters)
    shared = [t.name for t in message.inputs if "shared_memory_region" in t.parameters]
    shared += [t.name for t in message.outputs if "shared_memory_region" in t.parameters]
    if shared:
        raise Unsupported(f"tensors {shared}: shared memory is not offered here")
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise BadRequest(
            f"expected one raw_input_contents per input: {len(message.inputs)}, got {len(raw)}"
        )
    inputs: dict[str, Array] = {}
    for index, tensor in enumerate(message.inputs):
        if tensor.name in inputs:
            raise BadRequest(f"input {tensor.name!r} comes twice")
        has_contents = tensor.HasField("contents")
        try:
            if raw:
                if has_contents:
                    raise BadRequest(
                        "contents field must not be specified when using raw_input_contents "
                        f"for {tensor.name!r}"
                    )
                inputs[tensor.name] = tensors.from_raw(tensor.datatype, tensor.shape, raw[index])
            elif has_contents:
                inputs[tensor.name] = _from_contents(tensor)
            elif tensors.element_count(tensor.shape) == 0:
                inputs[tensor.name] = tensors.from_raw(tensor.datatype, tensor.shape, b"")
            else:
                raise BadRequest(f"unable to find data for input tensor {tensor.name!r}")
        except TensorError as error:
            raise BadRequest(f"input {tensor.name!r}: {error}") from None
    return InferRequest(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        inputs=inputs,
        outputs=[output.name for output in message.outputs],
        parameters=parameters,
        classification={
            output.name: classes(
                output.name, _parameters(output.parameters).get("classification", "")
            )
            for output in message.outputs
            if "classification" in output.parameters
        },
    )


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
    """Return a ``ModelStreamInferResponse`` that refuses the request ``id``."""
    return pb.ModelStreamInferResponse(
        error_message=str(error), infer_response=pb.ModelInferResponse(id=id)
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
    return _response(response).SerializeToString()


def _response(response: InferResponse) -> pb.ModelInferResponse:
    message = pb.ModelInferResponse(
        model_name=response.model, model_version=response.version, id=response.id
    )
    _fill_parameters(message.parameters, response.parameters)
    for name, array in response.outputs.items():
        message.outputs.add(name=name, datatype=tensors.datatype_of(array), shape=array.shape)
        message.raw_output_contents.append(tensors.to_raw(array))
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
