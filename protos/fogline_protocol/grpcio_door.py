"""A server of methods over bytes made of grpcio, Google's library: the reference.

The only file on the serving side that needs the library, which is 10 MB and a twentieth of a
second of every process that imports it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Never, TypeAlias

import grpc

from fogline_protocol import grpc_calls, grpc_messages, grpc_service
from fogline_protocol.errors import InferenceError
from fogline_protocol.grpc_calls import Admit, Method, Methods
from fogline_protocol.outcomes import (
    CANCELLED,
    DEADLINE_EXCEEDED,
    INTERNAL,
    OK,
    UNKNOWN_CALL,
    Books,
    Entries,
    Entry,
    outcome_of,
)

Carrier = grpc.aio.ServicerContext[bytes, bytes]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"

SETTLE_S = 0.1  # between the decision to stop and the stop, for calls that are on their way in


class GrpcioDoor:
    """A server for ``methods``; ``streams`` are the paths of those that are streams."""

    def __init__(
        self,
        methods: Methods,
        *,
        streams: Collection[str],
        max_message_bytes: int,
        admit: Admit | None,
        books: Books | None,
        counted: Collection[str],
        share_port: bool,
    ) -> None:
        ledger = None if books is None else _Ledger(books, counted)
        self._server = new_server(
            max_message_bytes=max_message_bytes,
            interceptors=[] if admit is None else [Admitting(admit, ledger)],
            share_port=share_port,
        )
        self._server.add_generic_rpc_handlers(
            (_Handler(methods, streams, max_message_bytes, ledger),)
        )
        self._started = False

    async def listen(self, host: str, port: int, tls: tuple[bytes, bytes] | None = None) -> int:
        """Open a TCP port and return it; ``tls`` is key and certificate chain, as PEM.

        Raises:
            OSError: the port is in use, or the address is not this machine's.
        """
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if tls is None:
            return await self._opened(lambda: self._server.add_insecure_port(address))
        credentials = grpc.ssl_server_credentials([tls])
        return await self._opened(lambda: self._server.add_secure_port(address, credentials))

    async def listen_unix(self, path: Path) -> None:
        """Open a Unix socket at ``path``.

        Raises:
            OSError: something is there, or this process may not.
        """
        await self._opened(lambda: self._server.add_insecure_port(f"unix:{path}"))

    async def stop(self, grace_s: float | None) -> None:
        """Stop: calls in flight have ``grace_s`` to finish, new ones are refused; None: at once."""
        if grace_s is None or not self._started:
            await self._server.stop(None)
        else:
            await stop(self._server, grace_s)

    async def _opened(self, add_port: Callable[[], int]) -> int:
        try:
            port = add_port()
        except RuntimeError as error:
            raise OSError(str(error)) from None
        if not self._started:
            self._started = True
            await self._server.start()
        return port


def new_server(
    *,
    max_message_bytes: int = grpc_service.DEFAULT_MAX_MESSAGE_BYTES,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    share_port: bool = False,
) -> grpc.aio.Server:
    """Return a server that accepts messages up to the limit.

    It refuses to share its port, unless it is one of several that were started to share it.
    """
    return grpc.aio.server(
        interceptors=list(interceptors),
        options=[
            # With the default, a second server starts silently on the same port and takes
            # some of the calls.
            ("grpc.so_reuseport", int(share_port)),
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


def handler(methods: Methods, streams: Collection[str] = ()) -> grpc.GenericRpcHandler:
    """Return grpcio's handler for methods over bytes; ``streams`` are paths of streams of them.

    It translates errors at the door.
    """
    return _Handler(methods, streams, grpc_service.DEFAULT_MAX_MESSAGE_BYTES, None)


class _Ledger:
    """The books, open for the requests of some paths."""

    def __init__(self, books: Books, counted: Collection[str]) -> None:
        self.books = books
        self._counted = counted

    def open(self, path: str) -> Entry | None:
        return self.books.open_entry() if path in self._counted else None

    def entries(self, path: str) -> Entries | None:
        return Entries(self.books) if path in self._counted else None


class _Call:
    """A call of grpcio and its request in the books (``grpc_calls.Context``)."""

    __slots__ = ("_carrier", "entry")

    def __init__(self, carrier: Carrier, entry: Entry | None) -> None:
        self._carrier = carrier
        self.entry = entry

    def time_remaining(self) -> float | None:
        return self._carrier.time_remaining()

    def invocation_metadata(self) -> Any:
        return self._carrier.invocation_metadata()

    def left(self) -> str:
        """Return the outcome of a call that the library has ended."""
        remaining = self.time_remaining()
        return DEADLINE_EXCEEDED if remaining is not None and remaining <= 0 else CANCELLED


class _Handler(grpc.GenericRpcHandler):
    def __init__(
        self, methods: Methods, streams: Collection[str], limit: int, ledger: _Ledger | None
    ) -> None:
        self._methods = methods
        self._streams = streams
        self._limit = limit  # of an answer: the library would refuse it unseen by the books
        self._ledger = ledger

    def service(self, details: grpc.HandlerCallDetails) -> Handler:
        path = details.method
        method = self._methods.get(path)
        if method is None:
            if self._ledger is not None:
                self._ledger.books.rejected(UNKNOWN_CALL)
            return None
        wrap = _stream if path in self._streams else _unary
        return wrap(path, method, self._limit, self._ledger)


class Admitting(grpc.aio.ServerInterceptor):
    """Lets grpcio ask ``admit`` before a byte of a request is parsed."""

    def __init__(self, admit: Admit, ledger: _Ledger | None) -> None:
        self._admit = admit
        self._ledger = ledger

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Refuse, or go on; the handler runs in this very task (test_admission.py checks that)."""
        try:
            await self._admit(details.method, tuple(details.invocation_metadata or ()))
        except InferenceError as error:
            problem = error  # the name of an except clause ends with it
            if (
                self._ledger is not None
                and (entry := self._ledger.open(details.method)) is not None
            ):
                entry.end(outcome_of(error))

            # As a stream, so that nothing is waited for: it suits unary calls as well.
            async def refuse(_requests: Any, context: Carrier) -> None:
                await _abort(context, problem)

            return grpc.stream_stream_rpc_method_handler(refuse)
        return await continuation(details)


def _unary(
    path: str, method: Method, limit: int, ledger: _Ledger | None
) -> "grpc.RpcMethodHandler[Any, Any]":
    async def call(data: bytes, context: Carrier) -> bytes:
        entry = None if ledger is None else ledger.open(path)
        asked = _Call(context, entry)
        try:
            answer = await grpc_calls.translating(path, method, data, asked)
            grpc_messages.check_answer(answer, limit)
        except InferenceError as error:
            if entry is not None:
                entry.end(outcome_of(error))
            await _abort(context, error)
        except asyncio.CancelledError:
            if entry is not None:
                entry.end(asked.left())
            raise
        if entry is not None:
            entry.end(OK)
        return answer

    return grpc.unary_unary_rpc_method_handler(call)


def _stream(
    path: str, method: Method, limit: int, ledger: _Ledger | None
) -> "grpc.RpcMethodHandler[Any, Any]":
    async def call(requests: AsyncIterator[bytes], context: Carrier) -> None:
        entries = None if ledger is None else ledger.entries(path)
        asked = _Call(context, None)

        async def arriving() -> AsyncIterator[bytes]:
            with contextlib.suppress(grpc.aio.BaseError):  # the caller broke off
                async for data in requests:
                    yield data

        async def write(answer: bytes) -> None:
            grpc_messages.check_answer(answer, limit)
            await context.write(answer)

        outcome = INTERNAL
        try:
            await grpc_calls.answer_stream(path, method, arriving(), asked, write, entries)
            outcome = OK
        except InferenceError as error:
            outcome = outcome_of(error)
            await _abort(context, error)
        except (asyncio.CancelledError, grpc.aio.BaseError):  # or a write that nobody waits for
            outcome = asked.left()
            raise
        finally:
            if entries is not None:
                entries.end(outcome)

    return grpc.stream_stream_rpc_method_handler(call)


async def _abort(context: Carrier, error: InferenceError) -> Never:
    """End a call with the status and the text of ``error``; nothing else aborts one."""
    code = getattr(grpc.StatusCode, error.grpc_code)
    await context.abort(code, grpc_calls.text_of(error), grpc_calls.pushback(error))
