"""The two ways to carry gRPC calls to ``Methods``, behind one narrow interface.

``http2`` is our own code (``grpc_door``): a small request costs it least. ``grpcio`` is Google's
library, the reference: what a client may expect is what it gets there.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from fogline_protocol import grpc_service
from fogline_protocol.door_memory import Memory
from fogline_protocol.grpc_calls import Admit, Methods
from fogline_protocol.grpc_door import GrpcDoor
from fogline_protocol.outcomes import Books

Kind = Literal["http2", "grpcio"]


@dataclass(frozen=True, slots=True)
class Pair:
    """What a door shows callers who want to know whom they reach: two PEM files."""

    certificate: Path
    key: Path


class Door(Protocol):
    """A server of gRPC methods."""

    async def listen(self, host: str, port: int, tls: Pair | None = None) -> int:
        """Open a TCP port of ``host`` and return it; 0: any free one.

        Raises:
            OSError: the port is in use, the address is not this machine's, or there is no such pair.
        """
        ...

    async def listen_unix(self, path: Path) -> None:
        """Open a Unix socket at ``path``, where nothing is.

        Raises:
            OSError: something is there, or this process may not.
        """
        ...

    async def stop(self, grace_s: float | None) -> None:
        """Stop: calls in flight have ``grace_s`` to finish, new ones are refused; None: at once."""
        ...


def new_door(
    kind: Kind,
    methods: Methods,
    *,
    max_message_bytes: int = grpc_service.DEFAULT_MAX_MESSAGE_BYTES,
    admit: Admit | None = None,
    memory: Memory | None = None,
    books: Books | None = None,
    share_port: bool = False,
) -> Door:
    """Return a door for ``methods`` that is not open yet.

    Args:
        kind: what it is made of.
        methods: answer the calls, by their paths.
        max_message_bytes: longer messages are refused, and not sent.
        admit: is asked in the task of every call before its method; it may refuse the call, and
            what it notes in context variables the method finds.
        memory: what callers may make the door hold, shared with other doors; None: a memory of its
            own. Google's library knows none.
        books: are told how each request for inference ends. What Google's library refuses by
            itself, a message that is too long or cut short, they do not hear of.
        share_port: this is one of several doors that were started to share a port.
    """
    if kind == "http2":
        return _Http2(methods, max_message_bytes, admit, memory, books, share_port)
    return _Grpcio(methods, max_message_bytes, admit, books, share_port)


class _Http2:
    def __init__(
        self,
        methods: Methods,
        max_message_bytes: int,
        admit: Admit | None,
        memory: Memory | None,
        books: Books | None,
        share_port: bool,
    ) -> None:
        self._door = GrpcDoor(
            methods,
            streams={grpc_service.STREAM},
            max_message_bytes=max_message_bytes,
            admit=admit,
            memory=memory,
            books=books,
            counted=grpc_service.COUNTED,
        )
        self._share_port = share_port

    async def listen(self, host: str, port: int, tls: Pair | None = None) -> int:
        context = None
        if tls is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(tls.certificate, tls.key)
        return await self._door.listen(host, port, tls=context, share_port=self._share_port)

    async def listen_unix(self, path: Path) -> None:
        await self._door.listen_unix(path)

    async def stop(self, grace_s: float | None) -> None:
        await self._door.stop(grace_s)


class _Grpcio:
    def __init__(
        self,
        methods: Methods,
        max_message_bytes: int,
        admit: Admit | None,
        books: Books | None,
        share_port: bool,
    ) -> None:
        from fogline_protocol.grpcio_door import GrpcioDoor  # with it comes Google's library

        self._door = GrpcioDoor(
            methods,
            streams={grpc_service.STREAM},
            max_message_bytes=max_message_bytes,
            admit=admit,
            books=books,
            counted=grpc_service.COUNTED,
            share_port=share_port,
        )

    async def listen(self, host: str, port: int, tls: Pair | None = None) -> int:
        pair = None
        if tls is not None:
            pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
        return await self._door.listen(host, port, pair)

    async def listen_unix(self, path: Path) -> None:
        await self._door.listen_unix(path)

    async def stop(self, grace_s: float | None) -> None:
        await self._door.stop(grace_s)
