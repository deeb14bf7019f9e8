"""One front: a gRPC server that hands every call to the hub that started it."""

import asyncio
import contextlib
import mmap
import os
import signal
import socket
import sys
from collections.abc import Iterable
from pathlib import Path

from cloud_hub.front.relay import FrontEnd, Kind
from fogline_protocol import grpc_service, grpc_transport
from fogline_protocol.door_memory import Memory
from fogline_protocol.grpc_calls import Context, Metadata, Method

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
        calls = _Everything(hub)
        door = grpc_transport.new_door(
            setup["door"],
            calls,
            max_message_bytes=setup["max_message_bytes"],
            admit=calls.admit,
            memory=Memory(setup["memory_bytes"], lambda: hub.rejected("memory")),
            books=hub,
            share_port=True,
        )
        tls = None
        if setup["tls_key"]:
            tls = grpc_transport.Pair(Path(setup["tls_cert"]), Path(setup["tls_key"]))
        try:
            await door.listen(setup["host"], setup["port"], tls)
        except OSError as error:
            hub.send_document(Kind.REFUSED, str(error))
            hub.close()
            return
        hub.send(Kind.READY)
        try:
            grace_s = await hub.stop
        except asyncio.CancelledError:
            await door.stop(None)
            return
        await door.stop(grace_s)
        hub.close()


class _Everything:
    """Hands on whatever is asked (``grpc_calls.Methods``): what there is, the hub knows."""

    def __init__(self, hub: FrontEnd) -> None:
        self._hub = hub

    def get(self, path: str, /) -> Method:
        async def hand_on(data: bytes, context: Context) -> bytes:
            passed_on = _passed_on(context.invocation_metadata() or ())
            return await self._hub.ask(
                path, data, context.time_remaining(), passed_on, entry=context.entry
            )

        return hand_on

    async def admit(self, path: str, metadata: Metadata) -> None:
        """Ask the hub whether a stream may be opened; about other calls it decides with the call."""
        if path == grpc_service.STREAM:
            await self._hub.ask(path, b"", None, _passed_on(metadata), admit=True)


def _passed_on(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    return {key: str(value) for key, value in metadata if key in PASSED_ON}


if __name__ == "__main__":
    main()
