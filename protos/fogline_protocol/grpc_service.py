"""Serves any ``InferenceServer`` over gRPC, as unmodified Open Inference clients expect it.

The handlers are registered under the literal path ``inference.GRPCInferenceService``; the
messages are ours (see ``inference.proto``). Handlers take and give bytes, so what a request
costs beyond the door is decided in ``inference.py`` alone.
"""

import time
from collections.abc import Mapping
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from fogline_protocol import (
    inference,
    model_config,
    repository,
    settings,
    shared_memory,
    statistics,
)
from fogline_protocol.doors import NOTHING_EXTRA, Extras, answer
from fogline_protocol.errors import BadRequest, NotFound, Unsupported
from fogline_protocol.grpc_calls import Context, Method
from fogline_protocol.inference import InferenceServer, InferResponse
from fogline_protocol.repository import ModelControl
from fogline_protocol.shared_memory import RegionStatus, SharedMemory
from fogline_protocol.v1 import inference_pb2 as pb

SERVICE = "inference.GRPCInferenceService"
INFER = f"/{SERVICE}/ModelInfer"
STREAM = f"/{SERVICE}/ModelStreamInfer"
COUNTED = frozenset((INFER, STREAM))  # whose requests are in the books
HEALTH = "grpc.health.v1.Health"
DEFAULT_MAX_MESSAGE_BYTES = 64 << 20  # sixteen times grpcio's default, which images exceed

M = TypeVar("M", bound=Message)


def methods(
    server: InferenceServer, control: ModelControl | None = None, extras: Extras = NOTHING_EXTRA
) -> Mapping[str, Method]:
    """Return the methods of the protocol by their paths, whatever carries the calls.

    Without ``control`` the repository calls, and whatever ``extras`` leave out, answer
    UNIMPLEMENTED with a text.
    """

    async def server_live(_request: bytes, _context: Context) -> bytes:
        return pb.ServerLiveResponse(live=True).SerializeToString()

    async def server_ready(_request: bytes, _context: Context) -> bytes:
        return pb.ServerReadyResponse(ready=server.server_ready()).SerializeToString()

    async def server_metadata(_request: bytes, _context: Context) -> bytes:
        metadata = server.server_metadata()
        return pb.ServerMetadataResponse(
            name=metadata.name,
            version=metadata.version,
            extensions=extras.advertised(metadata.extensions),
        ).SerializeToString()

    async def model_ready(data: bytes, _context: Context) -> bytes:
        request = _parse(pb.ModelReadyRequest(), data)
        ready = server.model_ready(request.name, request.version)
        return pb.ModelReadyResponse(ready=ready).SerializeToString()

    async def model_metadata(data: bytes, _context: Context) -> bytes:
        request = _parse(pb.ModelMetadataRequest(), data)
        return inference.encode_metadata(server.model_metadata(request.name, request.version))

    async def config(data: bytes, _context: Context) -> bytes:
        request = _parse(pb.ModelConfigRequest(), data)
        return model_config.encode(server.model_config(request.name, request.version))

    async def model_statistics(data: bytes, _context: Context) -> bytes:
        request = _parse(pb.ModelStatisticsRequest(), data)
        return statistics.encode(server.model_statistics(request.name, request.version))

    async def infer(data: bytes, context: Context) -> InferResponse:
        request = inference.decode_request(data, extras.shared_memory)
        request.entry = context.entry
        deadline = _deadline(context, inference.timeout_s(request.parameters))
        return await answer(server, request, deadline)

    async def model_infer(data: bytes, context: Context) -> bytes:
        return inference.encode_response(await infer(data, context))

    async def stream_infer(data: bytes, context: Context) -> bytes:
        return inference.encode_stream_response(await infer(data, context))

    found: dict[str, Method] = {
        "ServerLive": server_live,
        "ServerReady": server_ready,
        "ServerMetadata": server_metadata,
        "ModelReady": model_ready,
        "ModelMetadata": model_metadata,
        "ModelConfig": config,
        "ModelStatistics": model_statistics,
        "ModelInfer": model_infer,
        "ModelStreamInfer": stream_infer,
    }
    if control is not None:
        found |= _repository_methods(control)
    found |= _shared_memory_methods(extras.shared_memory) | _settings_methods(extras)
    for name in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name:
        found.setdefault(name, _not_offered(name))
    return {f"/{SERVICE}/{name}": method for name, method in found.items()}


def _repository_methods(control: ModelControl) -> dict[str, Method]:
    async def index(data: bytes, _context: Context) -> bytes:
        request = _parse(pb.RepositoryIndexRequest(), data)
        return repository.encode_index(repository.chosen(control.repository_index(), request.ready))

    async def load(data: bytes, _context: Context) -> bytes:
        request = _parse(pb.RepositoryModelLoadRequest(), data)
        await control.load_model(request.model_name, sorted(request.parameters))
        return b""

    async def unload(data: bytes, _context: Context) -> bytes:
        request = _parse(pb.RepositoryModelUnloadRequest(), data)
        await control.unload_model(request.model_name)
        return b""

    return {
        "RepositoryIndex": index,
        "RepositoryModelLoad": load,
        "RepositoryModelUnload": unload,
    }


def _shared_memory_methods(shared: SharedMemory | None) -> dict[str, Method]:
    system, cuda = "SystemSharedMemory", "CudaSharedMemory"
    calls = ("Status", "Register", "Unregister")
    if shared is None:
        return {
            f"{kind}{call}": _not_offered("", shared_memory.OFF)
            for kind in (system, cuda)
            for call in calls
        }

    async def status(data: bytes, _context: Context) -> bytes:
        request = _parse(pb.SystemSharedMemoryStatusRequest(), data)
        return shared_memory.encode_status(shared.status(request.name))

    async def register(data: bytes, _context: Context) -> bytes:
        request = _parse(pb.SystemSharedMemoryRegisterRequest(), data)
        shared.register(RegionStatus(request.name, request.key, request.offset, request.byte_size))
        return b""

    async def unregister(data: bytes, _context: Context) -> bytes:
        shared.unregister(_parse(pb.SystemSharedMemoryUnregisterRequest(), data).name)
        return b""

    async def no_cuda_regions(data: bytes, _context: Context) -> bytes:
        # Both calls have the one field; asked about all regions, the answer is: there are none.
        if _parse(pb.CudaSharedMemoryStatusRequest(), data).name:
            raise Unsupported(shared_memory.NO_CUDA)
        return b""

    return {
        f"{system}Status": status,
        f"{system}Register": register,
        f"{system}Unregister": unregister,
        f"{cuda}Status": no_cuda_regions,
        f"{cuda}Register": _not_offered("", shared_memory.NO_CUDA),
        f"{cuda}Unregister": no_cuda_regions,
    }


def _settings_methods(extras: Extras) -> dict[str, Method]:
    trace, logs = extras.trace, extras.logs

    async def trace_setting(data: bytes, _context: Context) -> bytes:
        if trace is None:
            raise Unsupported(extras.trace_refusal)
        request = _parse(pb.TraceSettingRequest(), data)
        found = trace.change_trace(request.model_name, settings.decode_trace(request))
        return settings.encode_trace(found)

    async def log_settings(data: bytes, _context: Context) -> bytes:
        if logs is None:
            raise Unsupported("log settings are not offered by this server")
        request = _parse(pb.LogSettingsRequest(), data)
        return settings.encode_log(logs.change(settings.decode_log(request)))

    return {"TraceSetting": trace_setting, "LogSettings": log_settings}


def _not_offered(name: str, text: str = "") -> Method:
    async def refuse(_data: bytes, _context: Context) -> bytes:
        raise Unsupported(text or f"{name} is not offered by this server")

    return refuse


def health_methods(server: InferenceServer) -> Mapping[str, Method]:
    """Return the methods of ``grpc.health.v1.Health``, which load balancers and probes ask.

    Only ``Check`` is offered: a client that would rather watch falls back when it is told so.
    """

    async def check(data: bytes, _context: Context) -> bytes:
        service = _parse(pb.HealthCheckRequest(), data).service
        if service not in ("", SERVICE):
            raise NotFound(f"unknown service {service!r}, known is {SERVICE!r}")
        status = pb.HealthCheckResponse.ServingStatus
        ready = status.SERVING if server.server_ready() else status.NOT_SERVING
        return pb.HealthCheckResponse(status=ready).SerializeToString()

    return {f"/{HEALTH}/Check": check, f"/{HEALTH}/Watch": _not_offered("Watch")}


def _parse(message: M, data: bytes) -> M:
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise BadRequest(f"malformed {type(message).__name__}") from None
    return message


def _deadline(context: Context, timeout_s: float | None) -> float | None:
    remaining = context.time_remaining()
    if timeout_s is not None:
        remaining = timeout_s if remaining is None else min(remaining, timeout_s)
    return None if remaining is None else time.monotonic() + remaining
