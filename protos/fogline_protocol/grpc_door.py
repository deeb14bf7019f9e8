"""Serves gRPC methods over HTTP/2 by itself, at a fraction of what grpcio takes for a call.

It carries the same ``Methods`` as a server of grpcio does and means the same by them (see
``grpc_calls``). Here are the listening sockets, who is let in, and the end; below it:

    grpc_connection.py  one connection: calls, tasks, time
    grpc_messages.py    messages in bodies; rooms.py: how many bytes of them at a time
    door_memory.py      who gives way when all peers together hold much
    lingering.py        the end of a connection
    http2.py            the protocol, pure; http2_frames.py, header_blocks.py, grpc_headers.py

What a stranger can make us keep is bounded per connection, and so is the number of those; what all
of them can is bounded by the memory that the doors of a process share.
"""

import asyncio
import contextlib
import logging
import os
import resource
import socket
import ssl
import time
from collections.abc import Collection, Iterator

from fogline_protocol import door_memory
from fogline_protocol.door_memory import Holder, Memory
from fogline_protocol.grpc_calls import Admit, Methods
from fogline_protocol.grpc_connection import HANDSHAKE_S, IDLE_S, Connection, Service
from fogline_protocol.lingering import LINGER_S
from fogline_protocol.outcomes import Books

MAX_CONNECTIONS = 4096  # of one door, if the process may open as many files
CROWDED = 7 / 8  # of all connections; from there on the idle ones give way
CROWDED_IDLE_S = 60.0  # without a call, then
BACKLOG = 1024  # newcomers that wait in the kernel
ACCEPT_RETRY_S = 1.0  # after none could be taken
SWEEP_S = 5.0  # between two looks at what does not get on
SETTLE_S = 0.1  # between the first word of the end and the last, for calls on their way in

log = logging.getLogger("fogline.grpc")


def connections_allowed() -> int:
    """Return how many connections a door takes: the other files of the process need room too."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, files * 3 // 4))


class GrpcDoor:
    """A server: ``await listen(...)``, ``await stop(grace_s)``. Lives on one event loop."""

    def __init__(
        self,
        methods: Methods,
        *,
        streams: Collection[str],
        max_message_bytes: int,
        admit: Admit | None = None,
        memory: Memory | None = None,
        books: Books | None = None,
        counted: Collection[str] = (),
        max_connections: int | None = None,
    ) -> None:
        """Serve ``methods``; those of ``streams`` are streams of requests, the others unary.

        ``admit`` is asked in the task of every call, before anything else of it is done there;
        what it notes in context variables, its method finds. ``memory`` is shared with other
        doors, if there are some. ``books`` are told how each request of a path in ``counted`` ends.
        Beyond ``max_connections``, by default ``connections_allowed()``, newcomers are closed.
        """
        if memory is None:
            memory = Memory(door_memory.default_limit(max_message_bytes))
        self._memory = memory
        self._service = Service(
            methods, frozenset(streams), max_message_bytes, admit, memory, books, frozenset(counted)
        )
        self.max_connections = max_connections or connections_allowed()
        self.connections: set[Connection] = set()
        self.all_gone = asyncio.Event()  # no connection is open
        self._stopping = False
        self._listening: list[socket.socket] = []
        # Sockets that were taken and are not connections yet: with TLS that takes a while.
        self._arriving: dict[Connection, asyncio.Task[None]] = {}
        self._refused = 0  # newcomers since the last sweep, because there are too many
        self._told_of = 0  # refusals of the memory
        self._sweeper: asyncio.Task[None] | None = None

    async def listen(
        self, host: str, port: int, *, tls: ssl.SSLContext | None = None, share_port: bool = False
    ) -> int:
        """Open a TCP port on every address of ``host`` and return it; 0: any free one.

        It is shared with nobody, unless it is one of several doors that were started to share it.

        Raises:
            OSError: the port is in use, or the address is not this machine's.
        """
        loop = asyncio.get_running_loop()
        if tls is not None:
            tls.set_alpn_protocols(["h2"])
            tls.options |= ssl.OP_NO_RENEGOTIATION  # costs us more than who asks for it
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((f, str(at[0])) for f, *_, at in found):
            listening = socket.create_server(
                (address, port), family=family, backlog=BACKLOG, reuse_port=share_port
            )
            self._open(listening, tls)
            port = listening.getsockname()[1]
        return port

    async def listen_unix(self, path: str | os.PathLike[str]) -> None:
        """Open a Unix socket; the caller has seen to it that the path is free.

        Raises:
            OSError: the path is taken, or this process may not make it.
        """
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.bind(os.fspath(path))
            listening.listen(BACKLOG)
        except OSError:
            listening.close()
            raise
        self._open(listening, None)

    async def stop(self, grace_s: float | None) -> None:
        """Stop: calls in flight have ``grace_s`` to finish, new ones are refused; None: at once."""
        loop = asyncio.get_running_loop()
        for listening in self._listening:
            loop.remove_reader(listening)
            listening.close()
        self._listening.clear()
        self._stopping = True
        self._told()
        await asyncio.sleep(0)  # what was taken a moment ago begins, so that it can be ended
        if grace_s is not None and self.connections:
            for connection in tuple(self.connections):
                connection.go_away(last=False)
            await asyncio.sleep(SETTLE_S)
            for connection in tuple(self.connections):
                connection.go_away(last=True)
            await self._gone_within(grace_s)
        arriving = tuple(self._arriving.values())
        for task in arriving:
            task.cancel()
        await asyncio.gather(*arriving, return_exceptions=True)
        for connection in tuple(self.connections):
            connection.break_off()
        await self._gone_within(LINGER_S)
        for connection in tuple(self.connections):
            connection.abort()
        await self.all_gone.wait()
        if self._sweeper is not None:
            self._memory.remove(self)
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)

    def sweep(self, now: float) -> None:
        """End connections and calls that do not get on; ``now`` as of ``time.monotonic()``."""
        if self._refused:
            log.warning(
                "%d newcomers were closed: there are %d connections, which is the limit",
                self._refused,
                self.max_connections,
            )
            self._refused = 0
        if self._memory.refusals != self._told_of:
            log.warning(
                "%d calls were refused or ended: the memory of the doors, %d bytes, was full",
                self._memory.refusals - self._told_of,
                self._memory.limit,
            )
            self._told_of = self._memory.refusals
        crowded = self._taken() >= CROWDED * self.max_connections
        for connection in tuple(self.connections):
            connection.sweep(now, CROWDED_IDLE_S if crowded else IDLE_S)

    def senders(self) -> Iterator[Holder]:
        """Return whose requests have begun and not ended."""
        for connection in tuple(self.connections):
            yield from connection.senders()

    def readers(self) -> Iterator[Holder]:
        """Return whose answers wait to be read."""
        for connection in tuple(self.connections):
            yield from connection.readers()

    def joined(self, connection: Connection) -> None:
        """Note a connection that was made."""
        self._arriving.pop(connection, None)
        self.connections.add(connection)
        self._told()
        if self._stopping:
            connection.go_away(last=True)

    def left(self, connection: Connection) -> None:
        """Note a connection that was lost."""
        self.connections.discard(connection)
        self._told()

    def _taken(self) -> int:
        return len(self.connections) + len(self._arriving)

    def _told(self) -> None:
        if self.connections:
            self.all_gone.clear()
        else:
            self.all_gone.set()

    async def _gone_within(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.all_gone.wait()

    # Newcomers

    def _open(self, listening: socket.socket, tls: ssl.SSLContext | None) -> None:
        listening.setblocking(False)
        self._listening.append(listening)
        self._take_from(listening, tls)
        if self._sweeper is None:
            self._memory.add(self)
            self._sweeper = asyncio.create_task(self._sweep(), name="grpc-door-sweep")

    def _take_from(self, listening: socket.socket, tls: ssl.SSLContext | None) -> None:
        if listening in self._listening:  # it is not closed yet
            asyncio.get_running_loop().add_reader(listening, self._take, listening, tls)

    def _take(self, listening: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Take one newcomer, so that a crowd of them holds up nobody who is here."""
        loop = asyncio.get_running_loop()
        try:
            newcomer, _ = listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return
        except OSError as error:  # no more files or memory: at once it would fail again
            log.warning("no connection can be taken for a moment: %s", error)
            loop.remove_reader(listening)
            loop.call_later(ACCEPT_RETRY_S, self._take_from, listening, tls)
            return
        if self._taken() >= self.max_connections:
            # Without a word: a client of gRPC that was greeted and then sent away comes again at
            # once, hundreds of times a second; one whose connection fails waits longer each time.
            newcomer.close()
            self._refused += 1
            return
        connection = Connection(self._service, self)
        newcomer.setblocking(False)
        self._arriving[connection] = loop.create_task(self._welcome(connection, newcomer, tls))

    async def _welcome(
        self, connection: Connection, newcomer: socket.socket, tls: ssl.SSLContext | None
    ) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                newcomer,
                ssl=tls,
                ssl_handshake_timeout=None if tls is None else HANDSHAKE_S,
                ssl_shutdown_timeout=None if tls is None else LINGER_S,
            )
        except OSError as error:
            log.debug("a newcomer did not come in: %s", error)
        finally:
            self._arriving.pop(connection, None)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep(time.monotonic())
