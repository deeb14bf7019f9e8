"""One front: a gRPC server that hands every call to the hub that started it."""

import asyncio
import contextlib
import mmap
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import grpc

from cloud_hub.front.relay import FrontEnd, Kind
from fogline_protocol import grpc_calls, grpc_service
from fogline_protocol.grpc_calls import Context

# What the hub needs to know of a call beside its bytes.
PASSED_ON = ("authorization",)


def main() -> None:
    """Serve for the hub at the other end of a socket; arguments: its descriptor, the memory's."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the hub says when to stop, or hangs up
    end, memory = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    asyncio.run(_serve(end, mmap.mmap(memory, os.fstat(memory).st_size)))


async def _serve(end: socket.socket, memory: mmap.mmap) -> None:
    loop = asyncio.get_running_loop()
    _, hub = await loop.create_connection(lambda: FrontEnd(memory), sock=end)
    with contextlib.suppress(asyncio.CancelledError):  # the hub hung up
        setup = await hub.setup
        server = grpc_service.new_server(
            max_message_bytes=setup["max_message_bytes"], share_port=True
        )
        server.add_generic_rpc_handlers((_Everything(hub),))
        try:
            _listen(server, setup)
        except (RuntimeError, OSError) as error:
            hub.send_document(Kind.REFUSED, str(error))
            hub.close()
            return
        await server.start()
        hub.send(Kind.READY)
        try:
            grace_s = await hub.stop
        except asyncio.CancelledError:
            await server.stop(None)
            return
        await grpc_service.stop(server, grace_s)
        hub.close()


def _listen(server: grpc.aio.Server, setup: dict[str, Any]) -> None:
    if setup["tls_key"]:
        pair = (Path(setup["tls_key"]).read_bytes(), Path(setup["tls_cert"]).read_bytes())
        server.add_secure_port(setup["address"], grpc.ssl_server_credentials([pair]))
    else:
        server.add_insecure_port(setup["address"])


class _Everything(grpc.GenericRpcHandler):
    """Hands on whatever is asked: what there is, the hub knows."""

    def __init__(self, hub: FrontEnd) -> None:
        self._hub = hub

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        path = details.method

        async def hand_on(data: bytes, context: Context, *, admit: bool = False) -> bytes:
            metadata = context.invocation_metadata() or ()
            passed_on = {key: str(value) for key, value in metadata if key in PASSED_ON}
            left = context.time_remaining()
            return await self._hub.ask(path, data, left, passed_on, admit=admit)

        async def admit(context: Context) -> None:
            await hand_on(b"", context, admit=True)

        if path == grpc_service.STREAM:
            return grpc_calls.stream(path, hand_on, admit)
        return grpc_calls.unary(path, hand_on)


if __name__ == "__main__":
    main()
