"""Serves any ``InferenceServer`` over gRPC, as unmodified Open Inference clients expect it.

The handlers are registered under the literal path ``inference.GRPCInferenceService``; the
messages are ours (see ``inference.proto``). Handlers take and give bytes, so what a request
costs beyond grpcio is decided in ``inference.py`` alone.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Never, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from fogline_protocol import inference
from fogline_protocol.inference import BadRequest, InferenceError, InferenceServer
from fogline_protocol.v1 import inference_pb2 as pb

SERVICE = "inference.GRPCInferenceService"
DEFAULT_MAX_MESSAGE_BYTES = 64 << 20  # sixteen times grpcio's default, which images exceed
# The text of an error travels as a header, of which clients take 8 KiB in all by default, and
# non-ASCII bytes are three there. A text that quotes a long name would take its status along.
MAX_ERROR_BYTES = 2048
SETTLE_S = 0.1  # between the decision to stop and the stop, for calls that are on their way in

Context = grpc.aio.ServicerContext[bytes, bytes]
M = TypeVar("M", bound=Message)
Method = Callable[[bytes, Context], Awaitable[bytes]]

log = logging.getLogger("fogline.grpc")


def new_server(
    *,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> grpc.aio.Server:
    """Return a server that refuses to share its port and accepts messages up to the limit."""
    return grpc.aio.server(
        interceptors=list(interceptors),
        options=[
            # With the default, a second server starts silently on the same port and takes
            # some of the calls.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
        ],
    )


async def stop(server: grpc.aio.Server, grace_s: float) -> None:
    """Stop a server: calls in flight have ``grace_s`` to finish, new ones are refused.

    gRPC cancels calls that have arrived but were not accepted yet, so those come first.
    """
    await asyncio.sleep(SETTLE_S)
    await server.stop(grace_s)


def handler(server: InferenceServer) -> grpc.GenericRpcHandler:
    """Return the handler to add to a ``grpc.aio.Server``."""

    async def server_live(_request: bytes, _context: Context) -> bytes:
        return pb.ServerLiveResponse(live=True).SerializeToString()

    async def server_ready(_request: bytes, _context: Context) -> bytes:
        return pb.ServerReadyResponse(ready=server.server_ready()).SerializeToString()

    async def server_metadata(_request: bytes, _context: Context) -> bytes:
        metadata = server.server_metadata()
        return pb.ServerMetadataResponse(
            name=metadata.name, version=metadata.version, extensions=metadata.extensions
        ).SerializeToString()

    async def model_ready(data: bytes, _context: Context) -> bytes:
        request = _parse(pb.ModelReadyRequest(), data)
        ready = server.model_ready(request.name, request.version)
        return pb.ModelReadyResponse(ready=ready).SerializeToString()

    async def model_metadata(data: bytes, _context: Context) -> bytes:
        request = _parse(pb.ModelMetadataRequest(), data)
        return inference.encode_metadata(server.model_metadata(request.name, request.version))

    async def model_infer(data: bytes, context: Context) -> bytes:
        request = inference.decode_request(data)
        deadline = _deadline(context, inference.timeout_s(request.parameters))
        return inference.encode_response(await server.infer(request, deadline))

    return generic_handler(
        SERVICE,
        {
            "ServerLive": server_live,
            "ServerReady": server_ready,
            "ServerMetadata": server_metadata,
            "ModelReady": model_ready,
            "ModelMetadata": model_metadata,
            "ModelInfer": model_infer,
        },
    )


def generic_handler(service: str, methods: Mapping[str, Method]) -> grpc.GenericRpcHandler:
    """Return a handler for unary methods over bytes that translates errors at the door."""
    return grpc.method_handlers_generic_handler(
        service,
        {
            name: grpc.unary_unary_rpc_method_handler(_translating(f"{service}/{name}", method))
            for name, method in methods.items()
        },
    )


async def abort(context: Context, error: InferenceError) -> Never:
    """End a call with the status and the text of ``error``: the only place that aborts."""
    text = str(error)
    encoded = text.encode(errors="replace")
    if len(encoded) > MAX_ERROR_BYTES:
        text = encoded[:MAX_ERROR_BYTES].decode(errors="ignore") + "..."
    await context.abort(getattr(grpc.StatusCode, error.grpc_code), text)


def _translating(path: str, method: Method) -> Any:
    async def call(data: bytes, context: Context) -> bytes:
        try:
            return await method(data, context)
        except InferenceError as error:
            log.info("%s refused: %s: %s", path, error.grpc_code, error)
            await abort(context, error)
        except Exception:
            # The last door: a fault of ours ends this call, never the process.
            log.exception("%s failed", path)
            await abort(context, inference.ServerFault(f"{path} failed, see the server's log"))

    return call


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
