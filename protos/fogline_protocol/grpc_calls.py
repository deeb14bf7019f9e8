"""Calls over bytes: what one costs beyond grpcio, and how errors leave by the door.

A unary call that fails ends with a status. A stream of requests outlives the failure of one:
the error travels in-band with the id of its request and the next ones are answered, unless
the caller sent the metadata ``triton_grpc_error: true``, which asks for the end of the stream.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Never

import grpc

from fogline_protocol import inference
from fogline_protocol.inference import InferenceError, InferResponse, ServerFault

# The text of an error travels as a header, of which clients take 8 KiB in all by default, and
# non-ASCII bytes are three there. A text that quotes a long name would take its status along.
MAX_ERROR_BYTES = 2048

Context = grpc.aio.ServicerContext[bytes, bytes]
Method = Callable[[bytes, Context], Awaitable[bytes]]
Infer = Callable[[bytes, Context], Awaitable[InferResponse]]

STREAM_IN_FLIGHT = 64  # requests of one stream; the next ones wait unread, on the caller's side

log = logging.getLogger("fogline.grpc")


def generic_handler(service: str, methods: Mapping[str, Method]) -> grpc.GenericRpcHandler:
    """Return a handler for unary methods over bytes that translates errors at the door."""
    return grpc.method_handlers_generic_handler(
        service, {name: unary(f"{service}/{name}", method) for name, method in methods.items()}
    )


async def abort(context: Context, error: InferenceError) -> Never:
    """End a call with the status and the text of ``error``: the only place that aborts."""
    text = str(error)
    encoded = text.encode(errors="replace")
    if len(encoded) > MAX_ERROR_BYTES:
        text = encoded[:MAX_ERROR_BYTES].decode(errors="ignore") + "..."
    await context.abort(getattr(grpc.StatusCode, error.grpc_code), text)


def unary(path: str, method: Method) -> "grpc.RpcMethodHandler[Any, Any]":
    """Return the handler of one unary method."""

    async def call(data: bytes, context: Context) -> bytes:
        try:
            answer = await method(data, context)
            log.debug("%s answered", path)
            return answer
        except Exception as error:
            # The last door: a fault of ours ends this call, never the process.
            await abort(context, _translated(path, error))

    return grpc.unary_unary_rpc_method_handler(call)


def stream(path: str, infer: Infer) -> "grpc.RpcMethodHandler[Any, Any]":
    """Return the handler of a stream of inference requests, answered in their order.

    Requests of one stream run side by side, up to ``STREAM_IN_FLIGHT``.
    """

    async def call(requests: AsyncIterator[bytes], context: Context) -> None:
        by_status = _wants_status(context)
        # In order of arrival; None: the caller sends no more.
        answers: asyncio.Queue[asyncio.Task[bytes | InferenceError] | None]
        answers = asyncio.Queue(STREAM_IN_FLIGHT)
        # Owned by this call: whatever ends it takes everything below along.
        running: set[asyncio.Task[Any]] = set()

        def start(work: Any) -> asyncio.Task[Any]:
            task = asyncio.create_task(work)
            running.add(task)
            task.add_done_callback(running.discard)
            return task

        async def read() -> None:
            with contextlib.suppress(grpc.aio.BaseError):  # the caller broke off
                async for data in requests:
                    await answers.put(start(_streamed(path, infer, data, context, by_status)))
            await answers.put(None)

        start(read())
        try:
            while (task := await answers.get()) is not None:
                found = await task
                if isinstance(found, InferenceError):
                    await abort(context, found)
                await context.write(found)
        finally:
            for task in tuple(running):
                task.cancel()

    return grpc.stream_stream_rpc_method_handler(call)


async def _streamed(
    path: str, infer: Infer, data: bytes, context: Context, by_status: bool
) -> bytes | InferenceError:
    """Return the message that answers one request of a stream, or what must end the stream."""
    try:
        return inference.encode_stream_response(await infer(data, context))
    except Exception as error:  # as in a unary call
        translated = _translated(path, error)
    if by_status:
        return translated
    return inference.encode_stream_error(inference.request_id(data), translated)


def _wants_status(context: Context) -> bool:
    return any(
        key == "triton_grpc_error" and value in ("true", b"true")
        for key, value in context.invocation_metadata() or ()
    )


def _translated(path: str, error: Exception) -> InferenceError:
    if isinstance(error, InferenceError):
        log.info("%s refused: %s: %s", path, error.grpc_code, error)
        return error
    log.error("%s failed", path, exc_info=error)
    return ServerFault(f"{path} failed, see the server's log")
